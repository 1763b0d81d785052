"""What recorded trials say: the seeds of a method together."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.trial import FINAL

Row = dict[str, Any]


@dataclass(frozen=True)
class Mean:
    """Mean over seeds and its standard error, which one seed does not have."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error)

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} ± {self.error:{spec.lstrip('+')}}"


@dataclass(frozen=True)
class Group:
    """Final trials that differ in nothing but the seed, ordered by it."""

    provider: str
    config: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def forwards(self) -> int:
        """Of one trial."""
        return self.rows[0]["forwards"]

    def over_seeds(self, name: str, *, times: float = 1.0) -> Mean:
        """Of a number of the rows."""
        return Mean.of([times * row[name] for row in self.rows])

    def minus(self, other: "Group") -> Mean | None:
        """Held-out loss less the other's, paired by seed, which is the order of texts; None without a common seed."""
        theirs = {row["config"]["seed"]: row["value"] for row in other.rows}
        mine = {row["config"]["seed"]: row["value"] for row in self.rows}
        common = mine.keys() & theirs.keys()
        return Mean.of([mine[seed] - theirs[seed] for seed in sorted(common)]) if common else None


def groups(rows: Sequence[Row]) -> list[Group]:
    """All groups in the order of their first rows; of trials recorded twice, the later row."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["what"] == FINAL:
            shared = {name: value for name, value in row["config"].items() if name != "seed"}
            name = json.dumps([row["provider"], shared], sort_keys=True)
            found.setdefault(name, {})[row["config"]["seed"]] = row
    return [_group([by_seed[seed] for seed in sorted(by_seed)]) for by_seed in found.values()]


def _group(rows: list[Row]) -> Group:
    config = {name: value for name, value in rows[0]["config"].items() if name != "seed"}
    return Group(rows[0]["provider"], config, tuple(rows))
