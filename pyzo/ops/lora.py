"""A linear with a LoRA adapter as one operator: dropout of the adapter's input keeps neither a mask nor a copy."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .autograd import check_float, differentiable, once_differentiable, product_dtype, without_autocast
from .dropouts import check_probability, dropped, new_seed
from .library import operators as _ops
from .linear import as_matrix
from .overwrite import is_plain


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + scale (dropout(x) A^T) B^T (LoRA, arXiv 2106.09685, section 4.1): [..., out].

    Saved: x itself (the tensor that other readers of x save too), t = dropout(x) A^T [tokens, r], the seed and the
    parameters, and of these only what the gradients that are asked for need: a frozen W with frozen A saves no x.
    Backward draws the mask again and computes dropout(x) anew for the gradient of A.

    Everything is computed in the autocast dtype of x's device where autocast is on (not for float64), else in x's
    dtype; tensors of another dtype are cast inside, so no cast copy is saved. Gradients have the dtypes of their
    tensors.

    Args:
        x: [..., in], float32, bfloat16 or float16 (float64 on the CPU), any strides.
        weight: [out, in].
        bias: [out] or None.
        a: [r, in].
        b: [out, r].
        scale: of the adapter, alpha / r.
        p: probability of dropout in [0, 1 - 2^-17), resolved to 2^-16; 0: none, and no seed is drawn.
        seed: int64 [1] on x's device; None: drawn from torch's default generator of that device.

    Raises:
        TypeError: a tensor of a dtype that layers do not take.
        ValueError: shapes or devices that do not fit, p out of range.
    """
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("a", a), ("b", b)):
        if tensor is not None:
            check_float(name, tensor)
            if tensor.device != x.device:
                raise ValueError(f"{name}: expected a tensor on {x.device}, as x, got {tensor.device}")
    _check_shapes(x, weight, bias, a, b)
    if not check_probability(p):
        seed = None
    elif seed is None:
        seed = new_seed(x.device)
    return _lora_linear(x, weight, bias, a, b, seed, scale, p, product_dtype(x))[0]


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> None:
    def expect(name: str, tensor: Tensor, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(f"{name}: expected {expected}, got {list(tensor.shape)}")

    expect("weight", weight, weight.dim() == 2, "a matrix [out, in]")
    out, inner = weight.shape
    expect("x", x, x.dim() > 0 and x.shape[-1] == inner, f"[..., {inner}], as weight is {list(weight.shape)}")
    if bias is not None:
        expect("bias", bias, bias.shape == (out,), f"[{out}], as weight is {list(weight.shape)}")
    expect("a", a, a.dim() == 2 and a.shape[1] == inner, f"[r, {inner}], as weight is {list(weight.shape)}")
    expect("b", b, b.shape == (out, a.shape[0]), f"[{out}, {a.shape[0]}], as weight and a say")


def _linear_and_adapter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    scale: float,
    p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The output [..., out] and t [tokens, r]; a seed of None means no dropout."""
    rows = as_matrix(x).to(dtype)
    y = functional.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    t = dropped(rows, seed, p) @ a.to(dtype).t()
    y.addmm_(t, b.to(dtype).t(), alpha=scale)
    return y.view(*x.shape[:-1], weight.shape[0]), t


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    scale: float,
    p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
    return y, x.new_empty((math.prod(x.shape[:-1]), a.shape[0]), dtype=dtype)


def _gradients(
    gradient: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    t: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight, bias, a and b in the gradient's dtype; an empty tensor where `needs` says no."""
    dtype, inner = gradient.dtype, gradient.shape[:-1]
    gradient = as_matrix(gradient)
    grads = [gradient.new_empty(0) for _ in needs]
    with without_autocast(gradient.device.type):
        if needs[1] or needs[3]:
            rows = as_matrix(x).to(dtype)
        if needs[0] or needs[3]:
            of_t = torch.addmm(gradient.new_zeros(1), gradient, b.to(dtype), beta=0, alpha=scale)  # [tokens, r]
        if needs[0]:
            of_rows = dropped(of_t @ a.to(dtype), seed, p).addmm_(gradient, weight.to(dtype))
            grads[0] = of_rows.view(*inner, weight.shape[1])
        if needs[1]:
            grads[1] = gradient.t() @ rows
        if needs[2]:
            grads[2] = gradient.sum(0)
        if needs[3]:
            grads[3] = of_t.t() @ dropped(rows, seed, p)
        if needs[4]:
            grads[4] = torch.addmm(gradient.new_zeros(1), gradient.t(), t, beta=0, alpha=scale)
    return grads


def _fake_gradients(
    gradient: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    t: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    needs: list[bool],
) -> list[Tensor]:
    grads = [gradient.new_empty(0) for _ in needs]
    out = gradient.shape[-1]
    if needs[0]:
        grads[0] = gradient.new_empty((*gradient.shape[:-1], weight.shape[1]))
    if needs[1]:
        grads[1] = gradient.new_empty((out, x.shape[-1]))
    if needs[2]:
        grads[2] = gradient.new_empty(out)
    if needs[3]:
        grads[3] = gradient.new_empty((b.shape[1], x.shape[-1]))
    if needs[4]:
        grads[4] = gradient.new_empty((out, t.shape[1]))
    return grads


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, a, b, seed, ctx.scale, ctx.p, _ = inputs
    of_x, of_weight, _, of_a, of_b = ctx.needs = list(ctx.needs_input_grad[:5])
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, weight, bias, a, b)]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if of_weight or of_a else None,
        weight if of_x else None,
        a if of_x else None,
        b if of_x or of_a else None,
        output[1] if of_b else None,
        seed if of_x or of_a else None,
    )


def _backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 9
    run = _gradients if is_plain(gradient) else _ops.lora_linear_backward
    grads = run(gradient, *ctx.saved_tensors, ctx.scale, ctx.p, ctx.needs)
    cast = (grad.to(dtype) if need else None for grad, dtype, need in zip(grads, ctx.dtypes, ctx.needs, strict=True))
    return (*cast, None, None, None, None)


# One operator, so that a compiler's partition of the graph cannot move dropout(x), which needs no gradient, into the
# forward pass and save it.
_op = torch.library.custom_op("pyzo::lora_linear_backward", _gradients, mutates_args=())
_op.register_fake(_fake_gradients)
torch.library.custom_op("pyzo::lora_linear", _linear_and_adapter, mutates_args=()).register_fake(_fake)
_lora_linear = differentiable("lora_linear", _backward, _save, _linear_and_adapter)
once_differentiable("lora_linear_backward")
