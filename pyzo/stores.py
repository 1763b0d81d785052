"""Weight stores: how perturbed weights exist during a step, and how the unperturbed ones come back."""

from dataclasses import replace

import torch

from pyzo.passes import Sweep, Update

# A snapshot is chosen by itself for 16-bit weights when its copy takes at most this share of the module's bytes, or of
# those of the trained tensors themselves where only some elements are listed.
SNAPSHOT_SHARE = 0.1


class Store:
    """The protocol of a step: `open`, any number of moves and updates, and `roll_back` if it fails.

    `move` goes to w + sign * eps * z_k, `home` to w, `attempt` to what an update would make of w; each takes the parts
    of the sweep that it is for, and `move` brings all others home. `update` makes a part's new w: it is moved no more
    in this step. Every method is called where interrupts are deferred. `roll_back` is the undo part of the step's
    journal: it may be called at any point.
    """

    name: str

    def __init__(self, reason: str):
        self.reason = reason

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reason!r})"

    def open(self, sweep: Sweep, *, keep_states: bool) -> None:
        """Begins a step. `keep_states`: one part may have been updated when a later one fails."""
        raise NotImplementedError

    def move(self, parts: list[int], direction: int, sign: float) -> None:
        raise NotImplementedError

    def home(self) -> None:
        raise NotImplementedError

    def attempt(self, parts: list[int], update: Update) -> None:
        raise NotImplementedError

    def update(self, parts: list[int], update: Update) -> None:
        raise NotImplementedError

    def roll_back(self) -> set[int]:
        """Brings everything home and takes updates back; returns the parts whose update could not be."""
        raise NotImplementedError


class InPlace(Store):
    """Perturbs the parameters themselves. No extra memory; the way back rounds (low drift in 16 bit).

    From +eps to -eps is round(round(w - eps z) - eps z), and the last way home rides on the update: three passes for a
    two-sided step. An update is taken back by the opposite one, rounded with the complement of its bits, which rules
    that keep state do not allow. Masks by magnitude take one bit per weight.
    """

    name = "inplace"

    def open(self, sweep: Sweep, *, keep_states: bool) -> None:
        self._sweep = sweep
        # Where each part stands: at (direction, sign), at an attempted update, or at w.
        self._at: list[tuple[int, float] | Update | None] = [None for _ in sweep]
        self._updated: dict[int, Update] = {}
        for index in sweep:
            sweep.measure(index)

    def _take_back(self, index: int, update: Update) -> None:
        self._sweep.run(index, update=replace(update, sign=-update.sign, retract=True))

    def _leave(self, index: int) -> tuple[int, float] | None:
        """Takes back an attempted update; returns what the next pass has to undo on its way."""
        at = self._at[index]
        if isinstance(at, Update):
            self._take_back(index, at)
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
            self._take_back(*self._updated.popitem())
        return set()


class Snapshot(Store):
    """Keeps a copy of what a step may move. Exact: whatever happens, the weights come back bit for bit."""

    name = "snapshot"

    def __init__(self, reason: str):
        super().__init__(reason)
        self._sweep: Sweep | None = None

    def open(self, sweep: Sweep, *, keep_states: bool) -> None:
        if sweep is not self._sweep:
            self._copies = [part.copies() for part in sweep.parts]
            self._states: list[list[torch.Tensor]] | None = None
            self._sweep = sweep
        self._moved = [False for _ in sweep]
        for part, copies in zip(sweep.parts, self._copies, strict=True):
            part.save(copies)
        if keep_states:
            if self._states is None:
                self._states = [[torch.empty_like(s) for s in part.states] for part in sweep.parts]
            for part, states in zip(sweep.parts, self._states, strict=True):
                if states:
                    torch._foreach_copy_(states, part.states)
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
            self._sweep.run(index, src=self._copies[index], update=update)

    def update(self, parts: list[int], update: Update) -> None:
        for index in parts:
            self._updated.add(index)  # before: an update that fails has begun
            self._sweep.run(index, src=self._copies[index], update=update)
            self._moved[index] = False

    def roll_back(self) -> set[int]:
        for index in self._updated:
            self._moved[index] = True
            if self._states is not None and self._states[index]:
                torch._foreach_copy_(self._sweep.parts[index].states, self._states[index])
        self.home()
        return set()


def choose(name: str, sweep: Sweep, module_bytes: int | None) -> Store:
    """The store called `name`, or for "auto" the one that fits the trained tensors.

    Args:
        name: "auto", "inplace" or "snapshot".
        sweep: over the trained tensors.
        module_bytes: bytes of all parameters of the module, trained or not; None where only parameters are known.
    """
    if name == "inplace":
        return InPlace("asked for")
    if name == "snapshot":
        return Snapshot("asked for")
    if name != "auto":
        raise ValueError(f"store: expected 'auto', 'inplace' or 'snapshot', got {name!r}")
    tensors = [t for part in sweep.parts for t in part.tensors]
    own = sum(t.numel() * t.element_size() for t in tensors)
    if any(part.indices for part in sweep.parts):
        # As copies: weights between listed ones stay where they are.
        listed = sum(
            i.numel() * t.element_size()
            for part in sweep.parts
            for t, i in zip(part.tensors, part.indices or part.tensors, strict=True)
        )
        if listed <= SNAPSHOT_SHARE * own:
            return Snapshot(f"a copy of the listed weights takes {listed} bytes, those of all weights are {own}")
    if all(t.dtype == torch.float32 for t in tensors):
        return InPlace("all trained weights are fp32, where the way back is exact to an ulp")
    if module_bytes is not None and own <= SNAPSHOT_SHARE * module_bytes:
        return Snapshot(
            f"16-bit weights, and a copy of the trained ones takes {own} of the module's {module_bytes} bytes"
        )
    return InPlace("16-bit weights whose copy would be large: ask for store='snapshot' to have them exact")
