"""Exact order statistics of magnitudes over many tensors at once, a chunk at a time and without concatenating them."""

from collections.abc import Callable, Iterator, Sequence

import torch

CHUNK = 1 << 22  # elements that are looked at together: the memory this takes, whatever the size of the model
_DIGIT = 16  # bits of a magnitude's code that one round over the tensors decides


def kth_smallest(tensors: Sequence[torch.Tensor], k: int) -> float:
    """The k-th smallest magnitude, k >= 1, among all elements of floating-point tensors; NaN counts as the largest.

    Reads every element twice. Memory: a chunk and 65,536 counters.

    Raises:
        ValueError: fewer than k elements.
    """
    total = sum(t.numel() for t in tensors)
    if not 1 <= k <= total:
        raise ValueError(f"k: expected an integer in [1, {total}], got {k}")
    code = 0
    for shift in (_DIGIT, 0):  # the codes of fp32 magnitudes are in the order of the magnitudes
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for t in tensors:
            for codes in _codes(t):
                digits = (codes >> shift) & 0xFFFF if shift else codes[codes >> _DIGIT == code] & 0xFFFF
                counts += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, k))
        k -= int(below[digit - 1]) if digit else 0
        code = (code << _DIGIT) | digit
    return torch.tensor(code, dtype=torch.int32).view(torch.float32).item()


def count_at_most(tensor: torch.Tensor, threshold: float) -> int:
    """How many elements have a magnitude of at most `threshold`; NaN never does."""
    return sum(int((chunk.abs() <= threshold).sum()) for chunk in chunks(tensor))


def chunks(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """The elements in order, as flat views none of which is larger than CHUNK."""
    return tensor.detach().reshape(-1).split(CHUNK)


def select(tensor: torch.Tensor, wanted: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Indices int64, in order, of the elements of which `wanted`, given a flat piece, says True."""
    found, start = [], 0
    for chunk in chunks(tensor):
        found.append(wanted(chunk).nonzero().squeeze(1) + start)
        start += len(chunk)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=tensor.device)


def _codes(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bits of the fp32 magnitudes as integers, a chunk at a time."""
    return ((chunk.float().view(torch.int32) & 0x7FFFFFFF).long() for chunk in chunks(tensor))
