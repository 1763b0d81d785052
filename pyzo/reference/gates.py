"""The operators of gates: computed in float32 (float64 as such), every operation rounded once, equal in every bit."""

import torch
from torch import Tensor

from .activations import value_and_slope, wide


def gate(gate: Tensor, up: Tensor, function: int) -> Tensor:
    return (value_and_slope(function, wide(gate))[0] * wide(up)).to(gate.dtype).contiguous()


def gate_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, function: int, product: bool
) -> tuple[Tensor, Tensor, Tensor]:
    value, slope = value_and_slope(function, wide(gate))
    to_gate, to_up = wide(gradient) * wide(up) * slope, wide(gradient) * value
    to_product = value * wide(up) if product else torch.empty(0)
    return tuple(t.to(gate.dtype).contiguous() for t in (to_gate, to_up, to_product))


def gate_backward_(gradient: Tensor, gate: Tensor, up: Tensor, function: int, product: bool) -> None:
    to_gate, to_up, to_product = gate_backward(gradient, gate, up, function, product)
    gate.copy_(to_gate)
    up.copy_(to_up)
    if product:
        gradient.copy_(to_product)


OPERATORS = (gate, gate_backward, gate_backward_)
