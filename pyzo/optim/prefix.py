"""Evaluations that differ in late layers only: what the layers before them put out is computed once and handed on."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pyzo.generators import Rewound


@dataclass(frozen=True)
class _Held:
    """What a layer returned, where torch's generators stood then, and how often its tensors had been written."""

    output: Any
    generators: Rewound
    versions: tuple[int, ...]


class Prefix:
    """Runs a stack of layers from the first one that a probe can change.

    Layers before it are not called: the last of them returns what it returned before. This is right where each layer
    works on the output of the one before it and nothing else sees that output. So the first step computes every loss
    both ways, and where one bit differs, nothing is ever left out.

    Attributes:
        reach: layers before this one put out the same at the next evaluation as at the evaluation before it, and at
            any evaluation since which `reach` was not lower.
        reason: why layers are left out, or why not.
        active: whether they are.
        ran, skipped: calls of layers in the latest step.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], devices: set[torch.device], obstacle: str | None = None):
        self._layers = list(layers)
        self._devices = devices
        self.reach = 0
        self.active = obstacle is None and len(self._layers) > 0
        self.reason = obstacle or ("to be checked in the first step" if layers else "no stack of layers is known")
        self.ran = self.skipped = 0
        self._checks = self.active
        self._skip = self._capture = 0
        self.forget()

    def __repr__(self) -> str:
        return f"Prefix(active={self.active}, reason={self.reason!r})"

    def forget(self) -> None:
        """What was held is not handed on."""
        self._held: list[_Held] = []
        self._held_at = 0  # the layer whose input is held

    @contextmanager
    def step(self, used: bool) -> Iterator[None]:
        """Around a step; outside of it the layers are untouched. `used`: whether to leave anything out."""
        self.ran = self.skipped = 0
        if not (self.active and used):
            was, self.active = self.active, False
            try:
                yield
            finally:
                self.active = was
            return
        own = [layer.__dict__.get("forward") for layer in self._layers]
        for number, layer in enumerate(self._layers):
            layer.forward = self._wrapped(number, layer.forward)
        try:
            yield
            if self._checks and self.active:
                self._checks = False
                self.reason = "the first step found every loss the same bit for bit"
        finally:
            for layer, forward in zip(self._layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward
            self.forget()

    def _wrapped(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def layer(*args: Any, **kwargs: Any) -> Any:
            if number < self._skip:
                self.skipped += 1
                return self._hand_on(last=number == self._skip - 1)
            self.ran += 1
            output = forward(*args, **kwargs)
            if number == self._capture - 1:
                tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
                self._new.append(_Held(output, Rewound(self._devices), tuple(t._version for t in tensors)))
            return output

        return layer

    def _hand_on(self, *, last: bool) -> Any:
        """The held output; nobody reads what layers before the last one return."""
        if self._call >= len(self._held):
            raise RuntimeError(
                f"closure: expected it to call the model as often at every point of a step, {len(self._held)} times"
            )
        held = self._held[self._call]
        if last:
            self._call += 1
            held.generators()
        return held.output

    def evaluate(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The loss of `run`, which calls the model."""
        if not self.active:
            return run()
        if self._held_at > self.reach:
            self.forget()
        if any(
            t._version != version
            for held in self._held
            for t, version in zip(
                (t for t in pytree.tree_leaves(held.output) if isinstance(t, torch.Tensor)), held.versions, strict=True
            )
        ):
            self._give_up("the output of a layer was written to by what came after it")
        if self._checks and self._held_at:
            return self._compare(run)
        return self._run(run, self._held_at, self.reach)

    def _compare(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The loss of a whole evaluation, after one that left layers out and must have found the same."""
        try:
            loss = self._run(run, self._held_at, self.reach)
        except Exception as error:  # something reads what the layers before the last one put out
            loss, reason = None, f"with outputs handed on the closure raised {error!r}"
        whole = self._run(run, 0, 0)
        if loss is not None and not _same(loss, whole):
            reason = f"a loss was {loss.item()!r} with outputs handed on and {whole.item()!r} without"
            loss = None
        if loss is None:
            self._give_up(reason)
        return whole

    def _run(self, run: Callable[[], torch.Tensor], skip: int, capture: int) -> torch.Tensor:
        self._skip, self._capture, self._call = skip, 0 if capture == skip else capture, 0
        self._new: list[_Held] = []
        try:
            loss = run()
        finally:
            self._skip = self._capture = 0
        if self._new:
            self._held, self._held_at = self._new, capture
        return loss

    def _give_up(self, reason: str) -> None:
        self.active, self.reason = False, reason
        self.forget()
        warnings.warn(f"block-wise steps run all layers at every point: {reason}", stacklevel=2)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or bool(torch.isnan(a) & torch.isnan(b))
