"""The operators of norms: LayerNorm and RMSNorm whose backward pass works from their output, or from their input."""

import math
from typing import Any

import torch
from torch import Tensor

from .autograd import check_float, differentiable, once_differentiable
from .library import operators as _ops


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    centered: bool,
    weight_offset: float = 0.0,
    dtype: torch.dtype | None = None,
    from_input: bool = False,
) -> Tensor:
    """gamma * x̂ + beta over the last dimension, gamma = weight_offset + weight, in fp32 with one rounding at the end.

    x̂ = (x - mean) / sqrt(var + eps) where centered (LayerNorm, population variance), else x / sqrt(mean(x²) + eps)
    (RMSNorm). Without `weight` gamma is 1 (whatever the offset), without `bias` beta is 0.

    Backward keeps the output and 1/std alone (MS-LayerNorm and MS-RMSNorm of LowMemoryBP, arXiv 2406.16282): the output
    is the very tensor that a linear behind it keeps too, so a norm costs 4 bytes a row. x̂ is (y - beta) / gamma, and
    with g = gamma * gradient, dx = (g - mean(g) - x̂ mean(g x̂)) / std, without mean(g) for RMSNorm. That x̂ is off by
    about u (1 + |beta/gamma|) + s / |gamma|, where u is the unit roundoff of the output's dtype and s half its smallest
    subnormal: where that is not small (gamma = 0 gives NaN), ask for `from_input`. The modules of pyzo.nn decide by
    themselves. The output must not be changed in place before backward, as autograd reports.

    A gradient that is nearly parallel to x̂, noise + a x̂, leaves in dx the small difference of large terms: its relative
    error is then about a u / 2 (a 2^-9 in bf16; 1.7e-3 where a is 0 or `from_input`), as the output is rounded.

    Gradients of weight and bias are sums in fp32 over blocks of rows and then over blocks in order: the same bits for
    any number of threads.

    Args:
        x: [..., D], float32, bfloat16 or float16 (float64 on the CPU), any strides.
        weight, bias: [D] or None, of any of these dtypes (float64 with float64 only).
        eps: in units of x², >= 0.
        centered: LayerNorm; else RMSNorm.
        weight_offset: 1.0 for Gemma's norms.
        dtype: of the output; None: that of `x`.
        from_input: keep `x` instead of the output for backward.

    Returns:
        [..., D] of `dtype`, contiguous.

    Raises:
        TypeError: a dtype that is not named above.
        RuntimeError: sizes, devices or dtypes that do not fit, naming the argument.
    """
    check_float("x", x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_float(name, parameter)
    parameters = (None if p is None else p.contiguous() for p in (weight, bias))
    dtype = x.dtype if dtype is None else dtype
    return _norm(x.contiguous(), *parameters, eps, centered, weight_offset, from_input, dtype)[0]


def norm_pair(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    centered: bool,
    weight_offset: float = 0.0,
    dtype: torch.dtype,
    low: torch.dtype,
    from_input: bool = False,
) -> tuple[Tensor, Tensor]:
    """`norm` twice, of which backward keeps the second result: in `dtype` for a residual, in `low` for linears.

    For norms whose output a residual reads in fp32 and linears under autocast in 16 bits. The second result is the
    first one rounded to `low`, as autocast would cast it for each linear; backward computes x̂ from it, as `norm` does
    from an output of that dtype, and adds the gradients of both in `dtype`. In eager mode only.

    Args:
        x, weight, bias, eps, centered, weight_offset, from_input: as `norm` takes them.
        dtype, low: of the results.

    Returns:
        Two tensors of the shape of `x`.
    """
    check_float("x", x)
    parameters = (None if p is None else p.contiguous() for p in (weight, bias))
    return _NormPair.apply(x.contiguous(), *parameters, eps, centered, weight_offset, from_input, dtype, low)


class _NormPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, centered, weight_offset, from_input, dtype, low):
        with torch._C._AutoDispatchBelowAutograd():
            y, rstd = _ops.norm(x, weight, bias, eps, centered, weight_offset, from_input, dtype)
            cast = y.to(low)
        ctx.centered, ctx.weight_offset, ctx.from_input = centered, weight_offset, from_input
        ctx.x_dtype, ctx.dtype = x.dtype, dtype
        ctx.save_for_backward(x if from_input else cast, rstd, weight, bias)
        ctx.set_materialize_grads(False)
        return y, cast

    @staticmethod
    def backward(ctx, gradient, low_gradient):
        if gradient is None and low_gradient is None:
            return (None,) * 9
        saved, rstd, weight, bias = ctx.saved_tensors
        if gradient is None or low_gradient is None:
            total = (low_gradient if gradient is None else gradient).to(ctx.dtype)
        else:
            total = gradient + low_gradient
        if not ctx.from_input:
            saved = saved.to(ctx.dtype)
        return *_gradients(ctx, total, saved, rstd, weight, bias, ctx.x_dtype), *[None] * 6


def _statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _norm_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
    from_input: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(math.prod(x.shape[:-1]), dtype=_statistics(x))


def _backward_fake(
    gradient: Tensor,
    saved: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    centered: bool,
    weight_offset: float,
    from_input: bool,
    dtype: torch.dtype,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    of_weight = weight.new_empty(weight.shape) if weight is not None and weight_gradient else gradient.new_empty(0)
    of_bias = bias.new_empty(bias.shape) if bias is not None and bias_gradient else gradient.new_empty(0)
    return gradient.new_empty(gradient.shape, dtype=dtype), of_weight, of_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.centered, ctx.weight_offset, ctx.from_input, _ = inputs
    y, rstd = output
    ctx.dtype = x.dtype
    ctx.save_for_backward(x if ctx.from_input else y, rstd, weight, bias)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _norm_backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 8
    saved, rstd, weight, bias = ctx.saved_tensors
    return *_gradients(ctx, gradient, saved, rstd, weight, bias, ctx.dtype), *[None] * 5


def _gradients(
    ctx: Any,
    gradient: Tensor,
    saved: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of the input, in its dtype, and of weight and bias where they are wanted."""
    wanted = [p is not None and n for p, n in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)]
    dx, dweight, dbias = _ops.norm_backward(
        gradient.contiguous(),
        saved,
        rstd,
        weight,
        bias,
        ctx.centered,
        ctx.weight_offset,
        ctx.from_input,
        dtype,
        *wanted,
    )
    return dx, dweight if wanted[0] else None, dbias if wanted[1] else None


torch.library.register_fake("pyzo::norm", _norm_fake)
torch.library.register_fake("pyzo::norm_backward", _backward_fake)
_norm = differentiable("norm", _norm_backward, _save)
once_differentiable("norm_backward")
