"""Whether the demo's model learned, by differences that are larger than chance explains."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

LOSS_ERRORS = 3.0  # standard errors by which the held-out loss must fall
CHANCE_FACTOR = 1.6  # of chance, that the mean accuracy over seeds must exceed by two standard errors
SEEDS_FOR_CHANCE, CLASSES_FOR_CHANCE = 3, 4


@dataclass(frozen=True)
class Score:
    """Per-example results on held-out text: losses float32 [n], correct bool [n]."""

    losses: Tensor
    correct: Tensor

    @property
    def loss(self) -> float:
        return self.losses.mean().item()

    @property
    def accuracy(self) -> float:
        return self.correct.float().mean().item()


@dataclass(frozen=True)
class Change:
    """Mean of the paired per-example changes of the held-out loss, and its standard error."""

    mean: float
    error: float

    @classmethod
    def between(cls, before: Score, after: Score) -> "Change":
        """The change from `before` to `after`, which score the same examples in the same order."""
        differences = (after.losses.double() - before.losses.double()).tolist()
        return cls(statistics.fmean(differences), standard_error(differences))


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values."""
    return statistics.stdev(values) / math.sqrt(len(values))


def shortfalls(changes: Sequence[Change], accuracies: Sequence[float], *, classes: int, majority: float) -> list[str]:
    """Why this does not count as learning, one sentence per reason; empty where it does.

    Args:
        changes: of the held-out loss, one per seed.
        accuracies: on held-out text after training, one per seed.
        classes: number of classes.
        majority: share of the most frequent class in the held-out text.
    """
    reasons = []
    for number, (change, accuracy) in enumerate(zip(changes, accuracies, strict=True), start=1):
        # Written so that a NaN is a reason too.
        if not change.mean < -LOSS_ERRORS * change.error:
            reasons.append(
                f"run {number}: held-out loss changed by {change.mean:+.4f}, standard error {change.error:.4f}; "
                f"expected a fall by more than {LOSS_ERRORS:g} standard errors"
            )
        if not accuracy > majority:
            reasons.append(
                f"run {number}: accuracy {accuracy:.1%}, expected more than the majority class, {majority:.1%}"
            )
    if len(accuracies) >= SEEDS_FOR_CHANCE and classes >= CLASSES_FOR_CHANCE:
        low = statistics.fmean(accuracies) - 2 * standard_error(accuracies)
        if not low >= CHANCE_FACTOR / classes:
            reasons.append(
                f"accuracy over {len(accuracies)} seeds: mean - 2 standard errors is {low:.1%}, "
                f"expected at least {CHANCE_FACTOR:g} x chance, {CHANCE_FACTOR / classes:.1%}"
            )
    return reasons
