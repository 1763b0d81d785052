"""Compares methods that learn: the rate of each by successive halving on one seed, then several other seeds."""

import math
from collections.abc import Mapping, Sequence

from bench.laboratory import Laboratory
from bench.trial import Method, Trial

SEARCH_SEED = 0
SEEDS = (1, 2, 3)
RUNGS = (9, 3, 1)  # a rung trains for the whole number of steps / this
ETA = 3  # of the rates on a rung, one in so many climbs to the next
LEAST = 2  # rates that climb all the same: what is best early may be too much for the whole training


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
    """The rates of the lowest losses, one in ETA but LEAST, best first; a loss that is no number is the highest."""
    ranked = sorted(losses, key=lambda lr: (math.inf if math.isnan(losses[lr]) else losses[lr], lr))
    return tuple(ranked[: max(LEAST, math.ceil(len(ranked) / ETA))])


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
