"""Runs trials in processes and records each one as it ends; what is recorded is not run again."""

import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from threading import Thread

import torch

from bench.harness import Recorder, load
from bench.learning_problem import Problem, prepare
from bench.trial import FINAL, SEARCH, Numbers, Trial, key, train

WORKERS = 2


class Laboratory:
    """Runs trials in processes of one thread each.

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
