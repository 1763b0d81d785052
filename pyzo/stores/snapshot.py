"""The store that keeps a copy of what a step may move."""

import torch

from pyzo.passes import Sweep, Update
from pyzo.stores.base import Store


class Snapshot(Store):
    """Keeps a copy of what a step may move. Exact: whatever happens, the weights come back bit for bit."""

    name = "snapshot"

    def __init__(self, reason: str):
        super().__init__(reason)
        self._sweep: Sweep | None = None
        self._copies: list[list[torch.Tensor]] = []
        self._states: list[list[torch.Tensor]] | None = None

    @property
    def extra_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for own in (*self._copies, *(self._states or ())) for t in own)

    def open(self, sweep: Sweep, *, keep_states: bool) -> None:
        if sweep is not self._sweep:
            self._copies = [part.copies() for part in sweep.parts]
            self._states = None
            self._sweep = sweep
        self._moved = [False for _ in sweep]
        for part, copies in zip(sweep.parts, self._copies, strict=True):
            part.save(copies)
        if keep_states:
            if self._states is None:
                self._states = [[torch.empty_like(s) for s in part.kept] for part in sweep.parts]
            for part, states in zip(sweep.parts, self._states, strict=True):
                if states:
                    torch._foreach_copy_(states, part.kept)
        self._updated: set[int] = set()

    def _home(self, index: int) -> None:
        if self._moved[index]:
            self._sweep.run(index, src=self._copies[index])
            self._moved[index] = False

    def move(self, parts: list[int], direction: int, sign: float) -> None:
        for index in self._sweep:
            if index not in parts:
                self._home(index)
        for index in parts:
            self._moved[index] = True
            self._sweep.run(index, src=self._copies[index], perturb=(direction, sign))

    def home(self) -> None:
        for index in self._sweep:
            self._home(index)

    def attempt(self, parts: list[int], update: Update) -> None:
        for index in parts:
            self._moved[index] = True
            self._sweep.run(index, src=self._copies[index], update=update, trial=True)

    def update(self, parts: list[int], update: Update) -> None:
        for index in parts:
            self._updated.add(index)  # before: an update that fails has begun
            self._sweep.run(index, src=self._copies[index], update=update)
            self._moved[index] = False

    def roll_back(self) -> set[int]:
        for index in self._updated:
            self._moved[index] = True
            if self._states is not None and self._states[index]:
                torch._foreach_copy_(self._sweep.parts[index].kept, self._states[index])
        self.home()
        return set()
