"""Attention that keeps its inputs for backward where torch would keep its probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend

from pyzo.generators import Rewound

from .autograd import needs_graph, product_dtype, without_autocast

# What torch keeps, in bytes of the inputs: below this a second forward pass of the attention costs much for little.
LEAST_RATIO = 2
_math = torch.ops.aten._scaled_dot_product_attention_math.default


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    addends: tuple[Tensor, ...] = (),
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, which computes its probabilities again in backward. Exact.

    Torch has no fused kernel for some attention: on the CPU where the mask is trained (a relative position bias) or
    something is dropped. It takes its math path then, which keeps the probabilities, [heads, L, S] numbers for L tokens
    that look at S, and float32 copies of 16-bit inputs. Where that is LEAST_RATIO times the inputs or more, backward
    runs the path anew from `query`, `key`, `value` and the mask here: the same bits, results and gradients, for one
    more forward pass of the attention. Elsewhere, and in compiled or transformed code, this is torch's function itself.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as torch takes them. Dropout draws
            torch's masks from torch's generator, as ever; its state is kept, and set again for backward.
        addends: two tensors whose sum is `attn_mask`, kept in its place where they are smaller (a bias of the heads and
            a mask of the windows); they get the gradient that would come to them through it.

    Returns:
        As torch's function: [..., L, E], in the dtype of `query`, or autocast's.
    """
    options = _Options(dropout_p, is_causal, scale, enable_gqa)
    plan = _planned(query, key, value, attn_mask, options, addends)
    if isinstance(plan, str):
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    inputs, mask, kept = plan
    return _Attention.apply(options, None if mask is None else mask.detach(), *inputs, *kept)


def attention_reason(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    addends: tuple[Tensor, ...] = (),
) -> str:
    """Why `attention` of these arguments is torch's own function; empty where it computes its probabilities again."""
    options = _Options(dropout_p, is_causal, scale, enable_gqa)
    plan = _planned(query, key, value, attn_mask, options, addends)
    return plan if isinstance(plan, str) else ""


@dataclass(frozen=True)
class _Options:
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool


_Plan = tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, tuple[Tensor, ...]]


def _planned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: _Options,
    addends: tuple[Tensor, ...],
) -> _Plan | str:
    """Inputs and mask as autocast casts them, and what is kept of the mask; why nothing is recomputed, else."""
    given = (query, key, value, *(() if mask is None else (mask,)))
    if not needs_graph(*given):
        return "nothing of it is trained"
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in given) or query.device.type not in ("cpu", "cuda"):
        return "its tensors are no plain ones of the CPU or a GPU"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return "it is traced or transformed"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are computed"
    if options.dropout_p > 0 and query.is_cuda and torch.cuda.is_current_stream_capturing():
        return "the state of the generator cannot be read while a CUDA graph is captured"
    inputs = (_cast(query), _cast(key), _cast(value))
    cast = None if mask is None else _cast(mask)
    choice = torch._fused_sdp_choice(
        *inputs, cast, options.dropout_p, options.is_causal, scale=options.scale, enable_gqa=options.enable_gqa
    )
    if choice != SDPBackend.MATH.value:
        return "torch has a kernel for it, which keeps no probabilities"
    kept: tuple[Tensor, ...] = ()
    if mask is not None:
        # A mask that is not trained may be that of every layer, which keep one storage; a trained one is this call's.
        kept = (cast if mask.requires_grad else mask,)
    if addends and _nbytes(addends) < _nbytes(kept):
        kept = addends
    # Torch computes 16-bit attention in float32, and keeps dropped probabilities and their mask besides.
    probabilities = query.shape[:-1].numel() * key.shape[-2] * (3 if options.dropout_p > 0 else 1)
    torchs = (probabilities + sum(t.numel() for t in inputs)) * max(inputs[0].element_size(), 4)
    if torchs < LEAST_RATIO * _nbytes((*inputs, *kept)):
        return "its inputs are as large as half of what torch keeps of it"
    return inputs, cast, kept


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, mask, query, key, value, *kept):
        ctx.options, ctx.mask_dtype = options, None if mask is None else mask.dtype
        ctx.rewind = Rewound({query.device}) if options.dropout_p > 0 else None
        ctx.save_for_backward(query, key, value, *kept)
        return _attended(query, key, value, mask, options)

    @staticmethod
    def backward(ctx, gradient):
        needed = ctx.needs_input_grad[2:]
        again = torch.is_grad_enabled()  # with create_graph=True: the gradients are differentiated, too
        if again:
            inputs = [t.view_as(t) for t in ctx.saved_tensors]
        else:
            inputs = [t.detach().requires_grad_(needs) for t, needs in zip(ctx.saved_tensors, needed, strict=True)]
        query, key, value, *kept = inputs
        now = None if ctx.rewind is None else Rewound({query.device})
        try:
            if ctx.rewind is not None:
                ctx.rewind()
            with torch.enable_grad():
                mask = None
                if kept:
                    mask = kept[0] if len(kept) == 1 else torch.add(*kept)
                    mask = mask.to(ctx.mask_dtype)
                result = _attended(query, key, value, mask, ctx.options)
        finally:
            if now is not None:
                now()
        wanted = [t for t, needs in zip(inputs, needed, strict=True) if needs]
        found = iter(torch.autograd.grad(result, wanted, gradient, create_graph=again))
        return None, None, *(next(found) if needs else None for needs in needed)


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: _Options) -> Tensor:
    """Torch's math path, whatever kernel torch would choose now."""
    if mask is not None and mask.dtype == torch.bool:  # as torch turns it into one that is added
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    with without_autocast(query.device.type):
        return _math(
            query,
            key,
            value,
            mask,
            options.dropout_p,
            options.is_causal,
            scale=options.scale,
            enable_gqa=options.enable_gqa,
        )[0]


def _cast(tensor: Tensor) -> Tensor:
    """As autocast casts it for attention."""
    return tensor.to(product_dtype(tensor)) if tensor.is_floating_point() else tensor


def _nbytes(tensors: tuple[Tensor, ...]) -> int:
    """What keeping them costs; a tensor that is expanded repeats its numbers and holds few."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
