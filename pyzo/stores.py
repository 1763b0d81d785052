"""Weight stores: how perturbed weights exist during a step, and how the unperturbed ones come back."""

from dataclasses import replace

import torch

from pyzo.passes import Sweep, Update

# A snapshot is chosen by itself for 16-bit weights when its copy takes at most this share of the module's bytes.
SNAPSHOT_SHARE = 0.1


class Store:
    """The protocol of a step: `open`, any number of moves, then `update` or `restore`.

    `move` goes to w + sign * eps * z_k, `home` to w, `attempt` to what an update would make of w.
    Every method is called where interrupts are deferred. `restore` may be called at any point and more than once: it
    is the undo part of the step's journal.
    """

    name: str

    def __init__(self, reason: str):
        self.reason = reason

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reason!r})"

    def open(self, sweep: Sweep) -> None:
        raise NotImplementedError

    def move(self, direction: int, sign: float) -> None:
        raise NotImplementedError

    def home(self) -> None:
        """`restore`, in the middle of a step."""
        self.restore()

    def attempt(self, update: Update) -> None:
        raise NotImplementedError

    def update(self, update: Update) -> None:
        raise NotImplementedError

    def restore(self) -> None:
        raise NotImplementedError


class InPlace(Store):
    """Perturbs the parameters themselves. No extra memory; the way back rounds (low drift in 16 bit).

    From +eps to -eps is round(round(w - eps z) - eps z), and the last restore rides on the update: three passes for a
    two-sided step. An attempted update is taken back by the opposite one, rounded with the complement of its bits.
    """

    name = "inplace"

    def open(self, sweep: Sweep) -> None:
        self._sweep = sweep
        # Where each part stands: at (direction, sign), at an attempted update, or at w.
        self._at: list[tuple[int, float] | Update | None] = [None for _ in sweep]

    def _leave(self, index: int) -> tuple[int, float] | None:
        """Takes back an attempted update; returns what the next pass has to undo on its way."""
        at = self._at[index]
        if isinstance(at, Update):
            self._sweep.run(index, update=replace(at, sign=-at.sign, retract=True))
            self._at[index] = at = None
        return None if at is None else (at[0], -at[1])

    def move(self, direction: int, sign: float) -> None:
        for index in self._sweep:
            self._sweep.run(index, undo=self._leave(index), perturb=(direction, sign))
            self._at[index] = (direction, sign)

    def attempt(self, update: Update) -> None:
        for index in self._sweep:
            self._sweep.run(index, undo=self._leave(index), update=update)
            self._at[index] = update

    def update(self, update: Update) -> None:
        for index in self._sweep:
            self._sweep.run(index, undo=self._leave(index), update=update)
            self._at[index] = None

    def restore(self) -> None:
        for index in self._sweep:
            undo = self._leave(index)
            if undo is not None:
                self._sweep.run(index, undo=undo)
                self._at[index] = None


class Snapshot(Store):
    """Keeps a copy of the trained tensors. Exact: whatever happens, the weights come back bit for bit."""

    name = "snapshot"

    def __init__(self, reason: str):
        super().__init__(reason)
        self._copies: list[list[torch.Tensor]] = []

    def open(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._moved = [False for _ in sweep]
        same = len(self._copies) == len(sweep.parts) and all(
            len(copy) == len(part.tensors)
            and all(
                c.shape == t.shape and c.dtype == t.dtype and c.device == t.device
                for c, t in zip(copy, part.tensors, strict=True)
            )
            for copy, part in zip(self._copies, sweep.parts, strict=True)
        )
        if not same:
            self._copies = [[torch.empty_like(t, requires_grad=False) for t in part.tensors] for part in sweep.parts]
        for copy, part in zip(self._copies, sweep.parts, strict=True):
            torch._foreach_copy_(copy, part.tensors)

    def move(self, direction: int, sign: float) -> None:
        for index in self._sweep:
            self._moved[index] = True
            self._sweep.run(index, src=self._copies[index], perturb=(direction, sign))

    def attempt(self, update: Update) -> None:
        for index in self._sweep:
            self._moved[index] = True
            self._sweep.run(index, src=self._copies[index], update=update)

    def update(self, update: Update) -> None:
        for index in self._sweep:
            self._sweep.run(index, src=self._copies[index], update=update)
            self._moved[index] = False

    def restore(self) -> None:
        for index in self._sweep:
            if self._moved[index]:
                torch._foreach_copy_(self._sweep.parts[index].tensors, self._copies[index])
                self._moved[index] = False


def choose(name: str, trained: list[torch.Tensor], module_bytes: int | None) -> Store:
    """The store called `name`, or for "auto" the one that fits the trained tensors.

    Args:
        name: "auto", "inplace" or "snapshot".
        trained: the trained tensors.
        module_bytes: bytes of all parameters of the module, trained or not; None where only parameters are known.
    """
    if name == "inplace":
        return InPlace("asked for")
    if name == "snapshot":
        return Snapshot("asked for")
    if name != "auto":
        raise ValueError(f"store: expected 'auto', 'inplace' or 'snapshot', got {name!r}")
    if all(t.dtype == torch.float32 for t in trained):
        return InPlace("all trained weights are fp32, where the way back is exact to an ulp")
    own = sum(t.numel() * t.element_size() for t in trained)
    if module_bytes is not None and own <= SNAPSHOT_SHARE * module_bytes:
        return Snapshot(
            f"16-bit weights, and a copy of the trained ones takes {own} of the module's {module_bytes} bytes"
        )
    return InPlace("16-bit weights whose copy would be large: ask for store='snapshot' to have them exact")
