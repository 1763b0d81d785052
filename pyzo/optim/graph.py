"""A whole step in a CUDA graph: perturb, forward, perturb, forward, estimate, update, seeds drawn on the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from pyzo.optim.base import ZOOptimizer


@contextmanager
def idle(optimizer: "ZOOptimizer") -> Iterator[None]:
    """Steps inside do all their work and change no bit: perturbations have length 0, and every loss counts as NaN."""
    before = [(control, control.remember()) for control in optimizer._controls()]
    seen, steps = (optimizer._seen, optimizer._forwards), optimizer._steps
    optimizer._mode = "idle"
    try:
        yield
    finally:
        optimizer._mode, (optimizer._seen, optimizer._forwards), optimizer._steps = "live", seen, steps
        for control, copy in before:
            control.recall(copy)
        optimizer._prepare()  # rows as they are without


class Captured:
    """A step on batches of one shape; see `ZOOptimizer.capture`.

    Attributes:
        graph: the CUDA graph, or None where each call makes an ordinary step.
        reason: why it is as it is.
    """

    def __init__(self, optimizer: "ZOOptimizer", closure: Callable[[Any], Any], example: Any):
        if not callable(closure):
            raise TypeError(f"closure: expected a function of a batch, got {type(closure).__name__}")
        leaves, self._form = pytree.tree_flatten(example)
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                raise TypeError(f"example: expected tensors as leaves, got {type(leaf).__name__} as leaf {i}")
        self._optimizer = optimizer
        self._closure = closure
        self._batch = [leaf.clone() for leaf in leaves]
        self._static = pytree.tree_unflatten(self._batch, self._form)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._loss: torch.Tensor | None = None
        self._sweep: object = None
        self.reason = self._attempt()

    def __repr__(self) -> str:
        return f"Captured(graph={'recorded' if self.graph else None}, reason={self.reason!r})"

    def __call__(self, batch: Any) -> torch.Tensor:
        """One step on `batch`; returns its loss, as `step` does. Nothing waits for the device.

        Raises:
            ValueError: the batch is built, shaped or typed otherwise than the example.
        """
        leaves, form = pytree.tree_flatten(batch)
        if form != self._form:
            raise ValueError(f"batch: expected the structure of the example, {self._form}, got {form}")
        for i, (leaf, place) in enumerate(zip(leaves, self._batch, strict=True)):
            if not isinstance(leaf, torch.Tensor) or (leaf.shape, leaf.dtype) != (place.shape, place.dtype):
                got = f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
                raise ValueError(f"batch: expected {place.dtype} {tuple(place.shape)} as leaf {i}, got {got}")
        if self.graph is None:
            return self._optimizer.step(lambda: self._closure(batch))
        if self._optimizer._prepare() is not self._sweep:  # parameters moved, froze, or groups were added
            self.graph = None
            self.reason = self._attempt()
            if self.graph is None:
                return self._optimizer.step(lambda: self._closure(batch))
        for leaf, place in zip(leaves, self._batch, strict=True):
            place.copy_(leaf, non_blocking=True)
        self.graph.replay()
        return self._loss

    def _attempt(self) -> str:
        return self._obstacle() or self._record()

    def _step(self) -> torch.Tensor:
        return self._optimizer.step(lambda: self._closure(self._static))

    def _obstacle(self) -> str | None:
        """Why a step cannot be recorded, as far as is known before trying."""
        if not self._optimizer._estimator.is_static:
            return "which layers a step moves is drawn on the host"
        devices = {part.control.device for part in self._optimizer._prepare().parts}
        if {device.type for device in devices} != {"cuda"}:
            return "the trained parameters are not on a CUDA device"
        if len(devices) > 1:
            return "the trained parameters are on several devices"
        elsewhere = {str(leaf.device) for leaf in self._batch} - {str(device) for device in devices}
        return f"the batch is on {', '.join(sorted(elsewhere))}" if elsewhere else None

    def _record(self) -> str:
        """Warms up on a side stream, records the step, and returns why the outcome is what it is."""
        device = next(iter({part.control.device for part in self._optimizer._prepare().parts}))
        optimizer, side = self._optimizer, torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        generators = torch.get_rng_state(), torch.cuda.get_rng_state(device)
        with torch.cuda.stream(side), idle(optimizer):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream(device).wait_stream(side)
        after = torch.get_rng_state(), torch.cuda.get_rng_state(device)
        drawn = not all(torch.equal(a, b) for a, b in zip(generators, after, strict=True))
        torch.set_rng_state(generators[0])
        torch.cuda.set_rng_state(generators[1], device)
        if drawn:
            return "the closure draws random numbers, which a graph would repeat: call model.eval(), or train with step"
        graph = torch.cuda.CUDAGraph()
        optimizer._mode = "recording"
        try:
            with torch.cuda.graph(graph, stream=side):
                self._loss = self._step()
        except RuntimeError as error:  # nothing has run: recording only notes
            return f"the closure cannot be recorded: {error}"
        finally:
            optimizer._mode = "live"
        self.graph, self._sweep = graph, optimizer._prepare()
        return "recorded"
