"""Sees operators read weights that are not there: outside the calls of the module that they belong to."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Hands operators a buffer in the place of a shut weight.

    Args:
        shut: by address of the memory of what stands for a shut weight, whatever `opened` takes.
        opened: makes the perturbed weight, and sees to it that it will be there the next time.
    """

    def __init__(self, shut: Mapping[int, Any], opened: Callable[[Any, torch.Tensor], torch.Tensor]):
        super().__init__()
        self._shut = shut
        self._opened = opened

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._has_compatible_shallow_copy_type.default:  # parameters are pointed elsewhere
            return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._there, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout != torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return tensor
        which = self._shut.get(tensor.untyped_storage().data_ptr())
        return tensor if which is None else self._opened(which, tensor)
