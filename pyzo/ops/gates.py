"""The operators of gates: h(gate) * up, of which only gate and up are saved."""

from typing import Any

import torch
from torch import Tensor

from .activations import function_code
from .autograd import check_float, differentiable, once_differentiable
from .library import operators as _ops
from .overwrite import release, unpack


def gate(gate: Tensor, up: Tensor, function: str) -> Tensor:
    """h(gate) * up, rounded once; exact in both passes, and nothing but `gate` and `up` is saved (h is recomputed).

    Where nobody else can see `gate` and `up` any more and the graph is not kept, their gradients are written over
    them, so that backward allocates nothing.

    Args:
        gate, up: float32, bfloat16 or float16 (float64 on the CPU), of one dtype, shape and device. Views whose rows
            are contiguous, as the two halves of one tensor, are taken and saved as they are; else they are copied.
        function: a name of FUNCTIONS.

    Returns:
        A contiguous tensor of the same shape.
    """
    check_gate(gate, up)
    return _gate(as_rows(gate), as_rows(up), function_code(function))


def check_gate(gate: Tensor, up: Tensor) -> None:
    """TypeError or ValueError where `gate` and `up` are not a pair that can be multiplied."""
    check_float("gate", gate)
    check_float("up", up)
    if up.dtype != gate.dtype:
        raise TypeError(f"up: expected the dtype of gate, {gate.dtype}, got {up.dtype}")
    if up.shape != gate.shape:
        raise ValueError(f"up: expected the shape of gate, {list(gate.shape)}, got {list(up.shape)}")
    if up.device != gate.device:
        raise ValueError(f"up: expected the device of gate, {gate.device}, got {up.device}")


def as_rows(t: Tensor) -> Tensor:
    """`t` where its elements lie in rows one stride apart, else a contiguous copy."""
    if t.is_contiguous():
        return t
    if t.stride(-1) != 1:
        return t.contiguous()
    step = None  # the stride with which the next dimension goes on in rows
    for size, stride in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride < t.shape[-1] if step is None else stride != step:
            return t.contiguous()
        step = stride * size
    return t


def _product(gate: Tensor, up: Tensor, function: int) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _gradients(gradient: Tensor, gate: Tensor, up: Tensor, function: int, product: bool) -> tuple[Tensor, ...]:
    return (
        _product(gate, up, function),
        _product(gate, up, function),
        _product(gate, up, function) if product else gate.new_empty(0),
    )


def _nothing(*args: object) -> None:
    return None


torch.library.register_fake("pyzo::gate", _product)
torch.library.register_fake("pyzo::gate_backward", _gradients)
torch.library.register_fake("pyzo::gate_backward_", _nothing)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.function = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    (gate, up), overwrite = unpack(ctx, gradient)
    gate_gradient, up_gradient, _ = gate_gradients(gradient.contiguous(), gate, up, ctx.function, False, overwrite)
    return gate_gradient, up_gradient, None


def gate_gradients(
    gradient: Tensor, gate: Tensor, up: Tensor, function: int, product: bool, overwrite: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gate` and `up`, and, if asked for, the product; `overwrite`: over `gate`, `up` and `gradient`."""
    if not overwrite:
        return _ops.gate_backward(gradient, gate, up, function, product)
    _ops.gate_backward_(gradient, gate, up, function, product)
    return release(gate), release(up), gradient


_gate = differentiable("gate", _backward, _save)
once_differentiable("gate_backward")
