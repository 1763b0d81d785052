"""Embeddings: the rows that a batch looks up are perturbed, and no others."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode, resolve_name

# What asks for no values; every other function finds the whole weight there.
_ABOUT = {
    f"torch.Tensor.{name}.__get__"
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_sparse")
} | {f"torch.Tensor.{name}" for name in ("size", "dim", "numel", "stride", "is_floating_point", "is_contiguous")}


class Lookup(TorchFunctionMode):
    """While an embedding runs: `functional.embedding` of its weight is left to `rows`.

    Args:
        weight: the parameter.
        rows: returns the perturbed rows of some ids.
        whole: puts the whole weight there, for functions that are no lookups.
    """

    def __init__(self, weight: torch.Tensor, rows: Callable[[torch.Tensor], torch.Tensor], whole: Callable[[], None]):
        super().__init__()
        self._weight = weight
        self._rows = rows
        self._whole = whole

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding:
            ids, weight, *others = _read(*args, **kwargs)
            if weight is self._weight and isinstance(ids, torch.Tensor) and not any(others):
                return self._rows(ids)
        if any(a is self._weight for a in (*args, *kwargs.values())) and resolve_name(func) not in _ABOUT:
            self._whole()
        return func(*args, **kwargs)


def leave() -> None:
    """Ends lookups that an interrupt left running: one that comes between the call and `__exit__` skips the latter."""
    while isinstance(mode := _get_current_function_mode(), Lookup):
        mode.__exit__(None, None, None)


def _read(
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: Any = 2.0,
    scale_grad_by_freq: Any = False,
    sparse: Any = False,
) -> tuple[Any, Any, Any]:
    """The arguments of `functional.embedding`: ids, weight, and what is more than a lookup. The others are about
    gradients."""
    return input, weight, max_norm
