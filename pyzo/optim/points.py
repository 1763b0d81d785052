"""The points of one step: moves the weights through the store, calls the closure there, and checks what it returns."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from pyzo.forward import directional_derivative, new_tangents
from pyzo.generators import Rewound
from pyzo.interrupts import DeferredInterrupts
from pyzo.optim.prefix import Prefix
from pyzo.passes import Sweep, Update
from pyzo.stores import Store

Closure = Callable[[], Any]


class Points:
    """What a step offers to its estimator (`pyzo.estimators.Points`), with the same dropout at every point.

    Args:
        closure: the user's.
        sweep, store: the trained tensors and how they are moved.
        interrupts: those of the step, allowed while the closure runs.
        prefix: what to run of the model's stack of layers.
        here: l(w), where it is known already.
        rewinds: whether to set torch's generators back between points.
    """

    def __init__(
        self,
        closure: Closure,
        sweep: Sweep,
        store: Store,
        interrupts: DeferredInterrupts,
        *,
        prefix: Prefix,
        here: torch.Tensor | None = None,
        rewinds: bool = True,
    ):
        self._closure = closure
        self._sweep = sweep
        self._store = store
        self._interrupts = interrupts
        self._prefix = prefix
        self._here = here
        self._parts = list(sweep)
        self.calls = 0
        self.rewind = Rewound({part.control.device for part in sweep.parts}) if rewinds else lambda: None

    def select(self, parts: list[int], reach: int) -> None:
        """What the next points move: these parts of the sweep; layers of the stack before `reach` cannot tell."""
        self._parts = parts
        self._tangents: list[list[torch.Tensor]] | None = None
        self._prefix.reach = reach

    def here(self) -> torch.Tensor:
        if self._here is None:
            self._store.home()
            self._here = self._loss()
        return self._here

    def at(self, direction: int, sign: float) -> torch.Tensor:
        self._store.move(self._parts, direction, sign)
        return self._loss()

    def attempt(self, parts: list[int], update: Update) -> torch.Tensor:
        """The loss at what `update` would make of the weights of some parts."""
        self._store.attempt(parts, update)
        return self._loss()

    def update(self, parts: list[int], update: Update) -> None:
        """To the new weights of some parts."""
        self._store.update(parts, update)
        self._here = None

    def along(self, direction: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._store.home()
        parts = [self._sweep.parts[index] for index in self._parts]
        if self._tangents is None:
            self._tangents = [new_tangents(part.tensors) for part in parts]
        for index, tangents in zip(self._parts, self._tangents, strict=True):
            torch._foreach_zero_(tangents)
            self._sweep.measure(index)
            self._sweep.run(index, dst=tangents, perturb=(direction, 1.0))
        weights = [t for part in parts for t in part.tensors]
        tangents = [t for own in self._tangents for t in own]
        loss, derivative = directional_derivative(self._call, weights, tangents)
        return self._scalar(loss), self._scalar(derivative)

    def _loss(self) -> torch.Tensor:
        loss = self._prefix.evaluate(lambda: self._scalar(self._call()))
        while self._store.must_repeat(loss):
            self._prefix.forget()
            loss = self._prefix.evaluate(lambda: self._scalar(self._call()))
        return loss

    def _call(self) -> Any:
        if self.calls:
            self.rewind()
        self.calls += 1
        torch.clear_autocast_cache()  # casts of the weights as they were at the point before
        with torch.no_grad(), self._store.evaluation(), self._interrupts.allowed():
            return self._closure()

    @staticmethod
    def _scalar(loss: Any) -> torch.Tensor:
        if isinstance(loss, (int, float)):
            loss = torch.tensor(loss, dtype=torch.float64)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or loss.is_complex():
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise TypeError(f"closure: expected it to return a real scalar loss, got {what}")
        loss = loss.detach().reshape(())
        return loss if loss.is_floating_point() else loss.double()  # a count of errors is a loss too


def warn_of_quantum(loss: torch.Tensor, eps: float) -> None:
    """Warns that losses of a 16-bit dtype make coarse coefficients."""
    quantum = torch.finfo(loss.dtype).eps / 2  # of numbers in [1/2, 1)
    warnings.warn(
        f"closure returns a {loss.dtype} loss: between 0.5 and 1 such losses are {quantum:.2g} apart, so "
        f"coefficients are multiples of {quantum / (2 * eps):.2g} at eps={eps:g}. Compute the loss in float32.",
        stacklevel=4,
    )
