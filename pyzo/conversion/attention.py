"""Attention whose probabilities are computed again in backward, wherever a module asks torch for it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pyzo import ops
from pyzo.ops.autograd import product_dtype

from .swap import Swapped

_SUMS = (torch.add, Tensor.add)  # what + calls, too


class AttentionCalls(TorchFunctionMode):
    """Calls a function in the place of torch's scaled_dot_product_attention, while this mode is on.

    The function gets torch's arguments, and as `addends` the two tensors whose sum the mask is, where it was seen how
    they were added to a larger one.
    """

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self._attend = attend
        # By id of a sum, which is held: the sum, what was added, and the versions of all three.
        self._sums: dict[int, tuple[Tensor, tuple[Tensor, ...], tuple[int, ...]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            return self._attend(*args, **kwargs, addends=self._addends(mask))
        result = func(*args, **kwargs)
        added = func in _SUMS and len(args) == 2 and not kwargs and all(isinstance(t, Tensor) for t in (*args, result))
        if added and result.numel() > max(t.numel() for t in args):
            self._sums[id(result)] = (result, tuple(args), _versions(result, *args))
        return result

    def _addends(self, mask: Tensor | None) -> tuple[Tensor, ...]:
        total, addends, versions = self._sums.get(id(mask), (None, (), ()))
        if total is None or _versions(total, *addends) != versions:
            return ()
        return () if total._backward_hooks or total.retains_grad else addends  # who looks at its gradient gets it


def is_narrow(query: Tensor) -> bool:
    """Whether attention is asked for in 16 bits; torch's math path makes float32 copies of its inputs then."""
    return product_dtype(query).itemsize <= 2


def narrow_attention(query: Tensor, *args: Any, addends: tuple[Tensor, ...] = (), **kwargs: Any) -> Tensor:
    """`pyzo.ops.attention` where it is asked for in 16 bits, and torch's function elsewhere."""
    if is_narrow(query):
        return ops.attention(query, *args, addends=addends, **kwargs)
    return functional.scaled_dot_product_attention(query, *args, **kwargs)


class RecomputingAttention(Swapped):
    """A module that calls scaled_dot_product_attention. Without gradients it is the stock module."""

    attend: Callable[..., Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._stock_forward(*args, **kwargs)
        with AttentionCalls(self.attend):
            return self._stock_forward(*args, **kwargs)


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(0 if t.is_inference() else t._version for t in tensors)
