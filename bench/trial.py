"""One training of a method: what identifies it, how it goes, what is scored."""

import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from bench.demo_check import Change
from bench.demo_model import Classifier, Examples
from bench.demo_training import batches
from bench.learning_problem import Problem, score

CHECKPOINTS = 4  # held-out scores along a final trial, the last one at its end
BATCH = 16
SEARCH, FINAL = "rate", "learning"  # `what` of a row

Step = Callable[[Callable[[], Tensor]], Tensor]
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A way to train, all of it but the rate.

    Attributes:
        name: the provider of its rows; a name means one set of settings.
        settings: what it is, for the rows.
        forwards: how often a step calls the closure. The first one may call it more often, to compare (`BlockWise`).
        prepare: makes the step from a model, a rate and a seed; picklable.
        rates: what the search chooses from, ascending.
    """

    name: str
    settings: Mapping[str, object]
    forwards: int
    prepare: Callable[[Classifier, float, int], Step]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Trial:
    """One training. Its seed is that of the order of the texts and of the method's own randomness.

    A trial of a search is scored once, on the validation texts; any other on the held-out texts, at all checkpoints.
    """

    method: Method
    lr: float
    seed: int
    steps: int
    search: bool
    batch: int = BATCH

    @property
    def what(self) -> str:
        return SEARCH if self.search else FINAL

    def config(self, facts: Mapping[str, object]) -> dict[str, object]:
        """All that its numbers depend on but machine and code; one thread, so that they do not depend on cores."""
        return {
            **facts,
            **self.method.settings,
            "lr": self.lr,
            "seed": self.seed,
            "steps": self.steps,
            "batch": self.batch,
            "threads": 1,
        }


def key(what: str, provider: str, config: Mapping[str, object]) -> str:
    """What makes two trials the same."""
    return json.dumps([what, provider, config], sort_keys=True)


def train(trial: Trial, problem: Problem) -> Numbers:
    """Trains a copy of the problem's model and scores it.

    Raises:
        RuntimeError: the method called the closure more or less often than it says.
    """
    forwards = trial.method.forwards
    started = time.process_time()
    model = copy.deepcopy(problem.model)
    step = trial.method.prepare(model, trial.lr, trial.seed)
    before = None if trial.search else score(model, problem.held_out)
    stops = [trial.steps] if trial.search else checkpoints(trial.steps)
    calls, first = 0, forwards
    losses: list[float] = []
    curve: list[dict[str, float]] = []

    def closure(batch: Examples) -> Tensor:
        nonlocal calls
        calls += 1
        return model.loss(batch)

    for done, batch in enumerate(batches(problem.train, trial.steps, trial.batch, trial.seed), start=1):
        losses.append(step(partial(closure, batch)).item())
        first = calls if done == 1 else first
        if done in stops and not trial.search:
            now = score(model, problem.held_out)
            point = {"forwards": done * forwards, "loss": now.loss, "accuracy": now.accuracy}
            curve.append({**point, "train_loss": statistics.fmean(losses)})
            losses.clear()
    if first < forwards or calls - first != (trial.steps - 1) * forwards:
        raise RuntimeError(
            f"{trial.method.name}: expected {forwards} forwards per step, got {calls} in {trial.steps} steps, "
            f"{first} of them in the first"
        )
    numbers: Numbers = {"forwards": trial.steps * forwards}
    if before is None:
        after = score(model, problem.validation)
        numbers |= {"value": after.loss, "unit": "validation loss", "accuracy": after.accuracy}
    else:
        change = Change.between(before, now)
        numbers |= {"value": now.loss, "unit": "held-out loss", "accuracy": now.accuracy}
        numbers |= {"loss_change": {"mean": change.mean, "error": change.error}, "curve": curve}
        numbers |= {"before": {"loss": before.loss, "accuracy": before.accuracy}}
    return {**numbers, "cpu_s": time.process_time() - started}


def checkpoints(steps: int) -> list[int]:
    """After how many steps a final trial is scored."""
    return sorted({max(1, steps * part // CHECKPOINTS) for part in range(1, CHECKPOINTS + 1)})
