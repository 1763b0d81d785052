"""Products of bfloat16 matrices on processors that have no instructions for them: summed in float32, rounded once."""

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

NATIVE, WIDE = "native", "float32"
_library: list[torch.library.Library] = []  # what a process replaced stays replaced for as long as this lives


def widen(device: str) -> str:
    """From now on products of bfloat16 matrices are computed so where the processor has no instructions for them.

    torch computes them there without any library, many times slower than in float32, so that nothing else of a step
    would be seen. What replaces them lies below autograd and autocast, for every way of training alike: what is saved,
    and in which dtype, is what it was. Its float32 copies are not torch's memory, as the workspace of a library is not.

    Returns:
        "native" or "float32": for the rows.
    """
    if torch.device(device).type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return NATIVE
    if not _library:
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():  # that a kernel is replaced
            warnings.simplefilter("ignore")
            for name, operands in (("mm", 0), ("bmm", 0), ("addmm", 1), ("baddbmm", 1)):
                for variant in (name, f"{name}.out", *([f"{name}_"] if operands else [])):
                    library.impl(variant, _kernel(variant, operands), "CPU", with_keyset=True, allow_override=True)
        _library.append(library)
    return WIDE


def _kernel(variant: str, first: int) -> Callable[..., Tensor]:
    """The operator that takes over 16-bit products whose factors are the operands `first` and `first` + 1."""
    stock = torch.library.get_kernel(f"aten::{variant}", "CPU")

    def kernel(keys: torch._C.DispatchKeySet, *operands: Tensor, out: Tensor | None = None, **scales: float) -> Tensor:
        a, b = operands[first : first + 2]
        if a.dtype != torch.bfloat16:
            return stock.call_boxed(keys, *operands, **({} if out is None else {"out": out}), **scales)
        if out is None:
            out = operands[0] if variant.endswith("_") else a.new_empty((*a.shape[:-1], b.shape[-1]))
        wide = _workspace(2, out.shape, None)
        getattr(torch, variant.removesuffix(".out").removesuffix("_"))(*_wide(operands), **scales, out=wide)
        return out.copy_(wide)

    return kernel


def _wide(operands: Sequence[Tensor]) -> list[Tensor]:
    places = (0, 1) if len(operands) == 2 else (3, 0, 1)
    return [_workspace(place, x.shape, x.stride()).copy_(x) for place, x in zip(places, operands, strict=True)]


_workspaces: dict[int, np.ndarray] = {}


def _workspace(place: int, shape: Sequence[int], stride: Sequence[int] | None) -> Tensor:
    """Memory of NumPy, used again and again, in the shape and, where it is dense, the order of another tensor."""
    count = math.prod(shape)
    if place not in _workspaces or _workspaces[place].size < count:
        _workspaces[place] = np.empty(count, dtype=np.float32)
    flat = torch.from_numpy(_workspaces[place])[:count]
    if stride is not None and 0 < count == 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)):
        return flat.as_strided(shape, stride)
    return flat.view(shape)
