"""Buffers for perturbed weights: a stack in one piece of memory that all of a model's modules use in turn."""

from collections.abc import Hashable

import torch

ALIGNMENT = 64  # bytes, of every buffer


class Arena:
    """Hands out buffers on one device. What was taken after a `mark` is given back by `release(mark)`.

    The first evaluation finds out how much is needed at once and allocates as it goes; from then on it is one piece.

    Attributes:
        peak: bytes that were in use at once.
        lent: how many parameters point into the arena at the moment.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._slabs: list[tuple[int, torch.Tensor]] = []  # where each begins, and its memory
        self._views: dict[tuple[Hashable, int, int], torch.Tensor] = {}  # made once, used in every evaluation
        self._own: dict[int, int] = {}  # of each piece, how many of its uses are the arena's
        self._top = self._floor = 0
        self.peak = self.lent = 0

    @property
    def allocated_bytes(self) -> int:
        return sum(slab.numel() for _, slab in self._slabs)

    def mark(self) -> int:
        return self._top

    def take(self, key: Hashable, like: torch.Tensor) -> torch.Tensor:
        """An uninitialised buffer of the shape and dtype of `like`; `key` stands for these two."""
        begin, nbytes = self._top, like.numel() * like.element_size()
        end = begin + -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._drop(begin + 1)
        if not self._slabs or end > self._slabs[-1][0] + self._slabs[-1][1].numel():
            self._drop(begin)
            self._grow(begin, end - begin)
        self._top, self.peak = end, max(self.peak, end)
        start, slab = self._slabs[-1]
        view = self._views.get((key, begin, start))
        if view is None:
            before, offset = _uses(slab), begin - start
            view = slab[offset : offset + nbytes].view(like.dtype).view(like.shape)
            self._views[key, begin, start] = view
            self._own[start] += _uses(slab) - before  # a view holds what it is a view of, too
        return view

    def _drop(self, begin: int) -> None:
        """Pieces that begin there or behind: nothing lies in them."""
        while self._slabs and self._slabs[-1][0] >= begin:
            start, _ = self._slabs.pop()
            del self._own[start]
            self._views = {at: view for at, view in self._views.items() if at[2] != start}

    def _grow(self, begin: int, nbytes: int) -> None:
        with torch.inference_mode(False):
            slab = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._own[begin] = _uses(slab)  # first: Ctrl-C may come in between
        self._slabs.append((begin, slab))

    def release(self, mark: int) -> None:
        self._top = max(mark, self._floor)

    def hold(self) -> None:
        """What is in use now stays so until the evaluation ends: somebody has a view of it."""
        self._floor = self._top

    def strangers(self) -> int:
        """How many others than this arena and the parameters it is lent to have views of its memory."""
        return sum(_uses(slab) - self._own[start] for start, slab in self._slabs) - self.lent

    def reset(self) -> None:
        """The end of an evaluation: nothing is in use, and the next one finds one piece of memory."""
        self._top = self._floor = self.lent = 0
        if len(self._slabs) > 1 or (self._slabs and self._slabs[0][1].numel() < self.peak):
            self._slabs, self._views, self._own = [], {}, {}
            self._grow(0, self.peak)


def _uses(tensor: torch.Tensor) -> int:
    """How many tensors and Python objects hold the memory of a tensor."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
