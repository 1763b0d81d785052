"""The weight stores of a step: how the weights come to a point w + sign eps z_k, to a candidate, and to the end.

`sweep(src=..., undo=..., ...)` is one pass over all tensors, with the arguments of `pass_` that are not "none".
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Sweep = Callable[..., None]


class InPlace:
    """Perturbs the weights themselves: each pass takes back the perturbation before it adds the next or updates."""

    def __init__(self, sweep: Sweep, tensors: list[Tensor]):
        self._sweep = sweep
        self._at: tuple[int, float] | None = None  # direction and sign of the perturbation that stands
        self._candidate = 0.0  # sign of the update that stands

    def base(self) -> None:
        """To w."""
        if self._at is not None:
            self._sweep(**self._undo())

    def move(self, k: int, sign: float) -> None:
        """To w + sign eps z_k."""
        self._sweep(**self._undo(), perturb=k, perturb_sign=sign)
        self._at = (k, sign)

    def update(self, directions: int) -> None:
        """To the end of the step."""
        self._sweep(**self._undo(), directions=directions)

    def candidate(self, directions: int, sign: float) -> None:
        """To w - sign lr g, from a probe or from the other candidate, whose update is taken back first."""
        self._retract(directions)
        self._sweep(**self._undo(), directions=directions, update_sign=sign)
        self._candidate = sign

    def update_chosen(self, directions: int) -> None:
        """To the end of a conservative step."""
        self._retract(directions)
        self._sweep(directions=directions, chosen=True)

    def _retract(self, directions: int) -> None:
        if self._candidate != 0.0:
            self._sweep(directions=directions, update_sign=-self._candidate, retract=True)
            self._candidate = 0.0

    def _undo(self) -> dict[str, Any]:
        at, self._at = self._at, None
        return {} if at is None else {"undo": at[0], "undo_sign": -at[1]}


class Snapshot:
    """Keeps a copy of the weights from the beginning of the step: every point is reached from the copy."""

    def __init__(self, sweep: Sweep, tensors: list[Tensor]):
        self._sweep, self._tensors, self._copy = sweep, tensors, [t.clone() for t in tensors]
        self._moved = False

    def base(self) -> None:
        """To w."""
        if self._moved:
            for t, copy in zip(self._tensors, self._copy, strict=True):
                t.copy_(copy)
            self._moved = False

    def move(self, k: int, sign: float) -> None:
        """To w + sign eps z_k."""
        self._sweep(src=self._copy, perturb=k, perturb_sign=sign)
        self._moved = True

    def update(self, directions: int) -> None:
        """To the end of the step."""
        self._sweep(src=self._copy, directions=directions)

    def candidate(self, directions: int, sign: float) -> None:
        """To w - sign lr g."""
        self._sweep(src=self._copy, directions=directions, update_sign=sign, trial=True)
        self._moved = True

    def update_chosen(self, directions: int) -> None:
        """To the end of a conservative step."""
        self._sweep(src=self._copy, directions=directions, chosen=True)


STORES = {"inplace": InPlace, "snapshot": Snapshot}
