"""The store that perturbs the parameters themselves."""

from pyzo.passes import Sweep, Update
from pyzo.stores.base import Store


class InPlace(Store):
    """Perturbs the parameters themselves. No extra memory; the way back rounds (low drift in 16 bit).

    From +eps to -eps is round(round(w - eps z) - eps z), and the last way home rides on the update: three passes for a
    two-sided step. An update is taken back by the opposite one, rounded with the complement of its bits, which rules
    that keep state do not allow. Masks by magnitude take one bit per weight.
    """

    name = "inplace"
    is_exact = False
    extra_bytes = 0

    def open(self, sweep: Sweep, *, keep_states: bool) -> None:
        self._sweep = sweep
        # Where each part stands: at (direction, sign), at an attempted update, or at w.
        self._at: list[tuple[int, float] | Update | None] = [None for _ in sweep]
        self._updated: dict[int, Update] = {}
        for index in sweep:
            sweep.measure(index)

    def _leave(self, index: int) -> tuple[int, float] | None:
        """Takes back an attempted update; returns what the next pass has to undo on its way."""
        at = self._at[index]
        if isinstance(at, Update):
            self._sweep.take_back(index, at)
            self._at[index] = at = None
        return None if at is None else (at[0], -at[1])

    def _home(self, index: int) -> None:
        undo = self._leave(index)
        if undo is not None:
            self._sweep.run(index, undo=undo)
            self._at[index] = None

    def move(self, parts: list[int], direction: int, sign: float) -> None:
        for index in self._sweep:
            if index not in parts:
                self._home(index)
        for index in parts:
            self._sweep.run(index, undo=self._leave(index), perturb=(direction, sign))
            self._at[index] = (direction, sign)

    def home(self) -> None:
        for index in self._sweep:
            self._home(index)

    def attempt(self, parts: list[int], update: Update) -> None:
        for index in parts:
            self._sweep.run(index, undo=self._leave(index), update=update)
            self._at[index] = update

    def update(self, parts: list[int], update: Update) -> None:
        for index in parts:
            self._sweep.run(index, undo=self._leave(index), update=update)
            self._at[index] = None
            self._updated[index] = update

    def roll_back(self) -> set[int]:
        self.home()
        if self._sweep.has_states:
            return set(self._updated)
        while self._updated:
            self._sweep.take_back(*self._updated.popitem())
        return set()
