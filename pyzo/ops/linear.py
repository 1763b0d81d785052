"""Linear layers that recompute their input in backward: of a gated product, and of an activation."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .activations import function_code
from .autograd import autocasts, check_float, differentiable, product_dtype, without_autocast
from .dropouts import check_probability, dropped, new_seed
from .gates import as_rows, check_gate, gate_gradients
from .library import operators as _ops
from .overwrite import is_plain, unpack


def gate_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    function: str = "silu",
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y W^T + bias (+ scale * (dropout(y) A^T) B^T), of y = h(gate) * up; the down projection of a gated MLP.

    Exact. Saved are `gate`, `up` and the parameters: neither h nor the product, which backward recomputes for the
    gradients of `weight` and `a`: 4 bytes per element of 16-bit `gate` where plain torch keeps 8. With an adapter also
    [tokens, r] numbers and the seed of its dropout.

    Args:
        gate, up: [..., I], as in `gate`.
        weight: [out, I]. Dtype of `gate`; under autocast any, as the matrix products are in autocast's dtype.
        bias: [out] or None.
        function: a name of FUNCTIONS.
        a, b: a LoRA adapter (Hu et al. 2021, arXiv 2106.09685), [r, I] and [out, r], or None, None; of any dtype, as
            they are cast inside.
        scale: of the adapter's output.
        p: probability of the dropout before the adapter.
        seed: int64 [1] on the device of `gate`, from which the dropout is drawn; None: drawn itself, as `dropout` does.

    Returns:
        [..., out], in the dtype of `gate`, or autocast's.
    """
    check_gate(gate, up)
    dtype = product_dtype(gate)
    _check_linear("gate", gate, weight, bias)
    _check_dtypes(gate, dtype, weight=weight, bias=bias)
    if (a is None) != (b is None):
        raise ValueError(f"{'a' if a is None else 'b'}: expected a tensor, as its partner is one, got None")
    if a is not None:
        rank = a.shape[0] if a.dim() else None
        _check_parameters(gate, a=(a, (None, gate.shape[-1])), b=(b, (weight.shape[0], rank)))
    if not check_probability(p):
        seed = None
    elif a is None:
        raise ValueError(f"p: expected 0 without an adapter, got {p}")
    elif seed is None:
        seed = new_seed(gate.device)
    code = function_code(function)
    return _gate_linear(as_rows(gate), as_rows(up), weight, bias, a, b, seed, float(scale), float(p), code, dtype)[0]


def activation_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, function: str = "gelu") -> Tensor:
    """h(x) W^T + bias; saves `x` and the weight: h(x) is recomputed in backward for the gradient of the weight. Exact.

    Args:
        x: [..., I]; float32, bfloat16 or float16 (float64 on the CPU), any strides.
        weight: [out, I]. Dtype of `x`; under autocast any, as the matrix products are in autocast's dtype.
        bias: [out] or None.
        function: a name of FUNCTIONS.

    Returns:
        [..., out], in the dtype of `x`, or autocast's.
    """
    check_float("x", x)
    dtype = product_dtype(x)
    _check_linear("x", x, weight, bias)
    _check_dtypes(x, dtype, weight=weight, bias=bias)
    return _activation_linear(x.contiguous(), weight, bias, function_code(function), dtype)


def _check_dtypes(x: Tensor, dtype: torch.dtype, **parameters: Tensor | None) -> None:
    """TypeError where a parameter has not the dtype of the products, and no autocast will cast it."""
    for name, t in parameters.items():
        if t is None or t.dtype == dtype:
            continue
        if not autocasts(x.device.type) or t.dtype == torch.float64:
            raise TypeError(f"{name}: expected {dtype}, as the input is and autocast is off, got {t.dtype}")


def _check_linear(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """TypeError or ValueError where `x` is not what a linear layer of these parameters takes."""
    if x.dim() == 0:
        raise ValueError(f"{name}: expected shape [..., in_features], got []")
    _check_parameters(x, weight=(weight, (None, x.shape[-1])))
    _check_parameters(x, bias=(bias, (weight.shape[0],)))


def _check_parameters(x: Tensor, **parameters: tuple[Tensor | None, tuple[int | None, ...]]) -> None:
    """TypeError or ValueError where a parameter does not fit; None in a shape is any size."""
    for name, (t, shape) in parameters.items():
        if t is None:
            continue
        check_float(name, t)
        if t.dim() != len(shape) or any(want not in (None, size) for size, want in zip(t.shape, shape, strict=True)):
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name}: expected shape [{expected}], got {list(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, as the input, got {t.device}")


def as_matrix(x: Tensor) -> Tensor:
    """[..., n] as [tokens, n]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _linear_of_gate(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    function: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The result, and what the adapter's `a` made of the product (without an adapter nothing)."""
    product = as_matrix(_ops.gate(gate, up, function).to(dtype))
    y = functional.linear(product, weight.to(dtype), None if bias is None else bias.to(dtype))
    if a is None:
        low = y.new_empty(0)
    else:
        low = functional.linear(dropped(product, seed, p), a.to(dtype))
        y.addmm_(low, b.to(dtype).t(), alpha=scale)
    return y.view(*gate.shape[:-1], weight.shape[0]), low


def _fake_gate_linear(gate, up, weight, bias, a, b, seed, scale, p, function, dtype):
    low = (0,) if a is None else (math.prod(gate.shape[:-1]), a.shape[0])
    return gate.new_empty((*gate.shape[:-1], weight.shape[0]), dtype=dtype), gate.new_empty(low, dtype=dtype)


def _save_gate_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gate, up, weight, bias, a, b, seed, ctx.scale, ctx.p, ctx.function, ctx.dtype = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    adapter = () if a is None else (a, b, output[1])
    ctx.save_for_backward(gate, up, weight, *adapter, *(() if seed is None else (seed,)))
    ctx.set_materialize_grads(False)


def _gate_linear_backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (gate, up, weight, *rest), overwrite = unpack(ctx, gradient)
    out: list[Tensor | None] = [None] * 11
    if gradient is None:
        return tuple(out)
    a, b, low = rest[:3] if rest else (None, None, None)
    seed = rest[3] if len(rest) > 3 else None
    needs = ctx.needs_input_grad
    with without_autocast(gate.device.type):
        dy = as_matrix(gradient)
        to_low = (dy @ b.to(ctx.dtype)).mul_(ctx.scale) if a is not None and any(needs[i] for i in (0, 1, 4)) else None
        needs_product = needs[2] or needs[4]
        if needs[0] or needs[1]:
            inner = dy @ weight.to(ctx.dtype)
            if to_low is not None:
                inner += dropped(to_low @ a.to(ctx.dtype), seed, ctx.p)
            inner = inner.to(gate.dtype).view(gate.shape)
            out[0], out[1], product = gate_gradients(inner, gate, up, ctx.function, needs_product, overwrite)
            del inner
        elif needs_product:
            product = _ops.gate(gate, up, ctx.function)
        if needs_product:
            product = as_matrix(product.to(ctx.dtype))
        if needs[2]:
            out[2] = (dy.t() @ product).to(weight.dtype)
        if needs[3]:
            out[3] = dy.sum(0, dtype=ctx.bias_dtype)
        if needs[4]:
            out[4] = (to_low.t() @ dropped(product, seed, ctx.p)).to(a.dtype)
        if needs[5]:
            out[5] = (dy.t() @ low).mul_(ctx.scale).to(b.dtype)
    return tuple(out)


torch.library.custom_op("pyzo::gate_linear", _linear_of_gate, mutates_args=()).register_fake(_fake_gate_linear)
_gate_linear = differentiable("gate_linear", _gate_linear_backward, _save_gate_linear, _linear_of_gate)


def _linear_of_activation(x: Tensor, weight: Tensor, bias: Tensor | None, function: int, dtype: torch.dtype) -> Tensor:
    value = _ops.activation(x, function).to(dtype)
    return functional.linear(value, weight.to(dtype), None if bias is None else bias.to(dtype))


def _fake_activation_linear(x, weight, bias, function, dtype):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _save_activation_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.function, ctx.dtype = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _activation_linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    to_x = to_weight = to_bias = None
    with without_autocast(x.device.type):
        dy = as_matrix(gradient)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        value = None
        if needs_x:
            inner = (dy @ weight.to(ctx.dtype)).to(x.dtype).view(x.shape)
            if needs_weight and is_plain(inner):
                to_x, value = _ops.activation_backward_(inner, x, ctx.function), inner
            else:
                to_x = _ops.activation_backward(inner, x, ctx.function)
            del inner
        if needs_weight:
            if value is None:
                value = _ops.activation(x, ctx.function)
            to_weight = (dy.t() @ as_matrix(value.to(ctx.dtype))).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            to_bias = dy.sum(0, dtype=ctx.bias_dtype)
    return to_x, to_weight, to_bias, None, None


_op = torch.library.custom_op("pyzo::activation_linear", _linear_of_activation, mutates_args=())
_op.register_fake(_fake_activation_linear)
_activation_linear = differentiable(
    "activation_linear", _activation_linear_backward, _save_activation_linear, _linear_of_activation
)
