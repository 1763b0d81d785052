"""The operators of activation functions: exact values, with what backward needs saved in full or as k-bit codes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import check_float, differentiable, needs_graph, once_differentiable
from .library import operators as _ops

# Numbered as csrc/core/functions.h does.
FUNCTIONS = ("relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "mish", "softplus", "elu", "hardswish")


def function_code(name: str) -> int:
    """The operators' number of an activation function; ValueError for an unknown name."""
    if name not in FUNCTIONS:
        raise ValueError(f"function: expected one of {', '.join(map(repr, FUNCTIONS))}, got {name!r}")
    return FUNCTIONS.index(name)


def activation(x: Tensor, function: str) -> Tensor:
    """h(x), exact; backward multiplies by h'(x) computed from `x`, which is saved.

    Args:
        x: float32, bfloat16 or float16 (float64 on the CPU), any shape and strides.
        function: a name of FUNCTIONS; `gelu` is the one with erf, `softplus` has beta 1, `elu` alpha 1.
    """
    check_float("x", x)
    return _activation(x.contiguous(), function_code(function))


def coded_activation(x: Tensor, function: str, thresholds: Sequence[float], slopes: Sequence[float]) -> Tensor:
    """h(x), exact; backward multiplies by slopes[code(x)], and only the codes are saved, k bits per element.

    The code of an element is the number of thresholds that it exceeds (0 for NaN), so an element that equals a
    threshold belongs to the segment below (LowMemoryBP, arXiv 2406.16282, section 4.2).

    Args:
        x: float32, bfloat16 or float16 (float64 on the CPU), any shape and strides.
        function: a name of FUNCTIONS.
        thresholds: 2^k - 1 increasing numbers, k from 1 to 4, compared as float32.
        slopes: 2^k numbers, used as float32.
    """
    check_float("x", x)
    code = function_code(function)
    if not needs_graph(x):
        return _ops.activation(x.contiguous(), code)
    return _coded_activation(x.contiguous(), code, list(thresholds), list(slopes))[0]


def output_activation(x: Tensor, function: str) -> Tensor:
    """h(x), exact; backward takes h'(x) from the output, and a bit per element says on which side of the minimum x lay.

    For where the next layer keeps the output anyway: 1/8 byte per element on top of it. The fitted derivative of GELU,
    SiLU and Mish is within 1e-4 of h' (float32: 2e-4, 4e-5 root mean square over x ~ N(0, 1)); the rounding of a 16-bit
    output adds up to 1.5e-2 near the minimum (bfloat16; 2e-3 root mean square) or 7e-3 (float16; 5e-4), for hard-swish
    2.4e-2 or 9e-3. ReLU, softplus, ELU and hard-swish have no error of the first kind, and but for hard-swish they need
    no bit.

    Args:
        x: float32, bfloat16 or float16 (float64 on the CPU), any shape and strides.
        function: a name of FUNCTIONS.
    """
    check_float("x", x)
    code = function_code(function)
    if not needs_graph(x):
        return _ops.activation(x.contiguous(), code)
    return _output_activation(x.contiguous(), code)[0]


def _like(x: Tensor, *args: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like_and_codes(
    x: Tensor, function: int, thresholds: Sequence[float], slopes: Sequence[float]
) -> tuple[Tensor, Tensor]:
    bits = len(thresholds).bit_length()
    return _like(x), x.new_empty((x.numel() * bits + 7) // 8, dtype=torch.uint8)


def _like_and_sides(x: Tensor, function: int) -> tuple[Tensor, Tensor]:
    sided = FUNCTIONS[function] not in ("relu", "softplus", "elu")
    return _like(x), x.new_empty((x.numel() + 7) // 8 if sided else 0, dtype=torch.uint8)


for _name in (
    "activation",
    "activation_backward",
    "activation_backward_",
    "coded_activation_backward",
    "output_activation_backward",
):
    torch.library.register_fake(f"pyzo::{_name}", _like)
torch.library.register_fake("pyzo::coded_activation", _like_and_codes)
torch.library.register_fake("pyzo::output_activation", _like_and_sides)


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.function = inputs
    ctx.save_for_backward(x)


def _activation_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _ops.activation_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.function), None


def _save_codes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.slopes = inputs[3]
    ctx.set_materialize_grads(False)  # of the codes
    ctx.save_for_backward(output[1])


def _coded_activation_backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 4
    return _ops.coded_activation_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.slopes), None, None, None


def _save_output(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.function = inputs[1]
    ctx.set_materialize_grads(False)  # of the sides
    ctx.save_for_backward(*output)


def _output_activation_backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, None]:
    if gradient is None:
        return None, None
    return _ops.output_activation_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.function), None


_activation = differentiable("activation", _activation_backward, _save_input)
_coded_activation = differentiable("coded_activation", _coded_activation_backward, _save_codes)
_output_activation = differentiable("output_activation", _output_activation_backward, _save_output)
for _name in ("activation_backward", "coded_activation_backward", "output_activation_backward"):
    once_differentiable(_name)
