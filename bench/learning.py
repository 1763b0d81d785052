"""Trials of methods that learn: rates by successive halving, then seeds; a row per trial, and none is run twice."""

import copy
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from bench.demo_check import Change
from bench.demo_model import Classifier
from bench.demo_training import batches
from bench.harness import Recorder, load
from bench.learning_problem import Problem, prepare, score

SEARCH_SEED = 0
SEEDS = (1, 2, 3)
RUNGS = (9, 3, 1)  # a rung trains for the whole number of steps / this
ETA = 3  # of the rates on a rung, one in so many climbs to the next
CHECKPOINTS = 4  # held-out scores along a final trial, the last one at its end
BATCH = 16
WORKERS = 2
SEARCH, FINAL = "rate", "learning"  # `what` of a row

Step = Callable[[Callable[[], Tensor]], Tensor]
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A way to train, all of it but the rate.

    Attributes:
        name: the provider of its rows; a name means one set of settings.
        settings: what it is, for the rows.
        forwards: how often a step calls the closure.
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
    started = time.process_time()
    model = copy.deepcopy(problem.model)
    step = trial.method.prepare(model, trial.lr, trial.seed)
    before = None if trial.search else score(model, problem.held_out)
    stops = [trial.steps] if trial.search else checkpoints(trial.steps)
    calls = 0
    losses: list[float] = []
    curve: list[dict[str, float]] = []

    def closure(batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return model.loss(batch)

    for done, batch in enumerate(batches(problem.train, trial.steps, trial.batch, trial.seed), start=1):
        losses.append(step(partial(closure, batch)).item())
        if done in stops and not trial.search:
            now = score(model, problem.held_out)
            point = {"forwards": calls, "loss": now.loss, "accuracy": now.accuracy}
            curve.append({**point, "train_loss": statistics.fmean(losses)})
            losses.clear()
    if calls != trial.steps * trial.method.forwards:
        raise RuntimeError(
            f"{trial.method.name}: expected {trial.method.forwards} forwards per step, got {calls} in {trial.steps}"
        )
    numbers: Numbers = {"forwards": calls}
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


class Laboratory:
    """Runs trials in processes of one thread each and writes a row as soon as one ends; a recorded trial is not run.

    Args:
        recorder: whose file both holds the trials that ended and receives new ones. Rows of a dirty tree do not count
            for a clean one.
        make: of the problem, picklable; None: `prepare`.
        workers: how many processes; 0: in this one; None: WORKERS, in a dry run 0.
    """

    def __init__(
        self, recorder: Recorder, *, make: Callable[[], Problem] | None = None, workers: int | None = None
    ) -> None:
        self.recorder = recorder
        self.make = make or (partial(prepare, dry_run=True) if recorder.dry_run else prepare)
        self.workers = (0 if recorder.dry_run else WORKERS) if workers is None else workers
        self.problem = self.make()
        path = recorder.path()
        self.done = {
            key(row["what"], row["provider"], row["config"]): row
            for row in (load(path) if path.exists() else [])
            if row["what"] in (SEARCH, FINAL) and (row["clean"] or not recorder.clean)
        }

    def run(self, trials: Sequence[Trial]) -> list[Numbers]:
        """The rows of all trials, in their order."""
        names = [key(trial.what, trial.method.name, trial.config(self.problem.facts)) for trial in trials]
        missing = {name: trial for name, trial in zip(names, trials, strict=True) if name not in self.done}
        if missing and self.workers:
            self._run_apart(missing)
        else:
            with one_thread():
                for name, trial in missing.items():
                    self._record(name, trial, train(trial, self.problem))
        return [self.done[name] for name in names]

    def _run_apart(self, trials: Mapping[str, Trial]) -> None:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(self.workers, len(trials)), context, _start, (self.make,)) as pool:
            running = {pool.submit(_train, trial): (name, trial) for name, trial in trials.items()}
            try:
                for future in as_completed(running):
                    self._record(*running[future], future.result())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _record(self, name: str, trial: Trial, numbers: Numbers) -> None:
        config = trial.config(self.problem.facts)
        self.done[name] = self.recorder.add(trial.what, trial.method.name, config, **numbers)
        self.recorder.write()
        print(f"{trial.what} {trial.method.name} lr {trial.lr:g} seed {trial.seed}: {numbers['value']:.4f}", flush=True)


_worker: dict[str, Problem] = {}  # of a worker process, which makes the problem once


def _start(make: Callable[[], Problem]) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker["problem"] = make()


def _train(trial: Trial) -> Numbers:
    return train(trial, _worker["problem"])


def _end_with_parent() -> None:
    """Or a worker whose parent was killed would compute on for nobody, and then wait for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def search(laboratory: Laboratory, methods: Sequence[Method], steps: Mapping[str, int]) -> dict[str, float]:
    """The rate of each method that successive halving over its rates chooses; a dry run takes two rates alone.

    Args:
        steps: of a whole training, by the name of the method.
    """
    few = 2 if laboratory.recorder.dry_run else None
    left = {method.name: method.rates[:few] for method in methods}
    for rung in RUNGS:
        trials = [
            Trial(method, lr, SEARCH_SEED, max(1, steps[method.name] // rung), search=True)
            for method in methods
            if len(left[method.name]) > 1
            for lr in left[method.name]
        ]
        losses: dict[str, dict[float, float]] = {}
        for trial, numbers in zip(trials, laboratory.run(trials), strict=True):
            losses.setdefault(trial.method.name, {})[trial.lr] = numbers["value"]
        left |= {name: survivors(values) for name, values in losses.items()}
    for method in methods if few is None else ():
        if left[method.name][0] in (method.rates[0], method.rates[-1]) and len(method.rates) > 1:
            print(
                f"{method.name}: the chosen rate {left[method.name][0]:g} is at the edge of {method.rates}", flush=True
            )
    return {name: rates[0] for name, rates in left.items()}


def survivors(losses: Mapping[float, float]) -> tuple[float, ...]:
    """The rates of the lowest losses, one in ETA, best first; a loss that is no number is the highest."""
    ranked = sorted(losses, key=lambda lr: (math.inf if math.isnan(losses[lr]) else losses[lr], lr))
    return tuple(ranked[: math.ceil(len(ranked) / ETA)])


def compare(laboratory: Laboratory, methods: Sequence[Method], steps: Mapping[str, int]) -> None:
    """Trains every method from all seeds (a dry run: one) at the rate that its search chooses, seed by seed."""
    rates = search(laboratory, methods, steps)
    laboratory.run(
        [
            Trial(method, rates[method.name], seed, steps[method.name], search=False)
            for seed in (SEEDS[:1] if laboratory.recorder.dry_run else SEEDS)
            for method in methods
        ]
    )


def equal_forwards(methods: Sequence[Method], forwards: int) -> dict[str, int]:
    """How many steps of each method make so many forwards."""
    return {method.name: max(1, forwards // method.forwards) for method in methods}
