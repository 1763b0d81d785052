"""What recorded rows of converted models say: the last row of each measurement, a setting at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.memory import ways
from bench.memory.record import BEST, LESS, MEMORY, STEP, key

Row = dict[str, Any]


@dataclass
class Found:
    """Rows of one setting by way.

    Attributes:
        config: what they have in common.
        memory, steps: by way.
        less: of the better of pyzo's ways against eager, per layer; None where that was not measured.
    """

    config: dict[str, Any]
    memory: dict[str, Row] = field(default_factory=dict)
    steps: dict[str, Row] = field(default_factory=dict)
    less: Row | None = None

    def saved(self, way: str) -> float | None:
        """Kept between forward and backward, of eager's."""
        return self.memory.get(way, {}).get("saved_share")

    def peak(self, way: str) -> float | None:
        """Most at one time above the model, of eager's."""
        return self.memory.get(way, {}).get("value")

    def units(self, way: str) -> float | None:
        """Kept by one more layer, in [tokens, hidden] tensors of 16-bit numbers."""
        return self.memory.get(way, {}).get("units_per_layer")

    def speed(self, way: str) -> float | None:
        """Steps per second, of eager's."""
        if way == ways.EAGER:
            return 1.0 if way in self.steps else None
        return self.steps[way]["ratio"]["of_medians"] if way in self.steps else None


CASES = ("convert", "gpu convert")


def found(rows: Sequence[Row]) -> list[Found]:
    """The settings of the clean rows, in the order of their first rows; of rows recorded twice the last."""
    settings: dict[str, Found] = {}
    for row in rows:
        if row["case"] not in CASES or not row["clean"] or row["dry_run"]:
            continue
        config = {name: value for name, value in row["config"].items() if name != "products"}
        one = settings.setdefault(key("", "", config), Found(config))
        one.config |= row["config"]
        if row["what"] == MEMORY and "reason" not in row:
            one.memory[row["provider"]] = row
        elif row["what"] == STEP:
            one.steps[row["provider"]] = row
        elif row["what"] == LESS and row["provider"] == BEST:
            one.less = row
    return list(settings.values())
