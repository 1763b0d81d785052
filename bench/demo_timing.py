"""Times a training step of pyzo beside the same step of eager MeZO, interleaved in one run."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from tqdm import tqdm

import pyzo
from bench.demo_model import Classifier, Examples
from bench.demo_training import Settings, parameter_groups
from pyzo.baselines import EagerMeZO

WARMUP = 2  # rounds
Step = Callable[[Callable[[], Tensor]], Tensor]


@dataclass
class StepTimes:
    """Seconds of each timed step, and of the forwards inside it."""

    steps: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)

    @property
    def step_s(self) -> float:
        return statistics.median(self.steps)

    @property
    def forwards_s(self) -> float:
        return statistics.median(self.forwards)

    @property
    def passes_s(self) -> float:
        """Everything of a step but its forwards: perturbing, restoring, updating, and the optimizer's own work."""
        return statistics.median(step - forwards for step, forwards in zip(self.steps, self.forwards, strict=True))


def time_steps(model: Classifier, batch: Examples, settings: Settings, *, rounds: int) -> dict[str, StepTimes]:
    """Times of pyzo, eager MeZO and its foreach form, each on a copy of the model, taking turns every round."""
    times: dict[str, StepTimes] = {}
    calls: dict[str, Callable[[], None]] = {}
    for name, make in (("pyzo", pyzo_step), ("eager MeZO", eager_step), ("eager MeZO, foreach", foreach_step)):
        own = copy.deepcopy(model)
        times[name] = StepTimes()
        calls[name] = _timed(make(own, settings), lambda own=own: own.loss(batch), times[name])
    for round_ in tqdm(range(WARMUP + rounds), "timing steps"):
        if round_ == WARMUP:
            for measured in times.values():
                measured.steps.clear()
                measured.forwards.clear()
        for call in calls.values():
            call()
    return times


def _timed(step: Step, loss: Callable[[], Tensor], times: StepTimes) -> Callable[[], None]:
    def closure() -> Tensor:
        start = time.perf_counter()
        value = loss()
        times.forwards[-1] += time.perf_counter() - start
        return value

    def call() -> None:
        times.forwards.append(0.0)
        start = time.perf_counter()
        step(closure)
        times.steps.append(time.perf_counter() - start)

    return call


def pyzo_step(model: Classifier, settings: Settings) -> Step:
    groups = parameter_groups(model, settings)
    return pyzo.optim.ZOSGD(groups, distribution=settings.distribution, store=settings.store).step


def eager_step(model: Classifier, settings: Settings, *, foreach: bool = False) -> Step:
    groups = [{**group, "params": [p for _, p in group["params"]]} for group in parameter_groups(model, settings)]
    return EagerMeZO(groups, settings.lr, foreach=foreach).step


def foreach_step(model: Classifier, settings: Settings) -> Step:
    return eager_step(model, settings, foreach=True)
