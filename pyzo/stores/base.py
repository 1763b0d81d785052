"""What a weight store is to a step: how perturbed weights exist, and how the unperturbed ones come back."""

from contextlib import AbstractContextManager, nullcontext

import torch

from pyzo.passes import Sweep, Update


class Store:
    """The protocol of a step: `open`, any number of moves, evaluations and updates, then `close`, or `roll_back`.

    `move` goes to w + sign * eps * z_k, `home` to w, `attempt` to what an update would make of w; each takes the parts
    of the sweep that it is for, and `move` brings all others home. `update` makes a part's new w: it is moved no more
    in this step. The closure runs inside `evaluation`, where the weights are seen as they were moved. Every method is
    called where interrupts are deferred. `roll_back` is the undo part of the step's journal: it may be called at any
    point.

    Attributes:
        reason: why it was chosen.
        is_exact: whether weights come back bit for bit.
        extra_bytes: memory that it holds besides the weights.
    """

    name: str
    is_exact: bool = True

    def __init__(self, reason: str):
        self.reason = reason

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reason!r})"

    @property
    def extra_bytes(self) -> int:
        raise NotImplementedError

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

    def evaluation(self) -> AbstractContextManager[None]:
        """Around a call of the closure."""
        return nullcontext()

    def must_repeat(self, loss: torch.Tensor) -> bool:
        """Whether the evaluation that has ended with this loss found out what it needed only as it ran."""
        return False

    def close(self) -> None:
        """Ends a step that succeeded."""

    def roll_back(self) -> set[int]:
        """Brings everything home and takes updates back; returns the parts whose update could not be."""
        raise NotImplementedError

    def doubt(self) -> None:
        """A loss was not finite: look at the next step as closely as at the first one."""
