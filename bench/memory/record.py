"""Records the rows of all settings, one process per measurement; what its file has is not measured again."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from bench.harness import Recorder, against, load, speedup, summary
from bench.laboratory import one_thread
from bench.memory import measure, settings, ways
from bench.memory.apart import apart
from bench.memory.settings import FULL, Grid, Setting

MEMORY, STEP, LESS = "memory", "step", "saved per layer, less than eager"
BEST = "pyzo, better of exact and paper"
LEAST_SPEED = 0.97  # of eager's, for the exact recipe: not lower beyond noise (issue 7)
Row = dict[str, Any]


def key(what: str, provider: str, config: Mapping[str, object]) -> str:
    """Names a row; how products are computed follows from the machine, which has a file of its own."""
    return json.dumps([what, provider, {k: v for k, v in config.items() if k != "products"}], sort_keys=True)


class Convert:
    """Measures and records.

    Args:
        recorder: whose file both holds the rows that there are and receives new ones. Rows of a dirty tree do not count
            for a clean one.
        grid: what is measured.
        run: how a measurement is run; in a dry run in this process.
    """

    def __init__(self, recorder: Recorder, grid: Grid, run: Callable[..., Any] = apart):
        self.recorder, self.grid, self.run = recorder, grid, run
        path = recorder.path()
        self.done = {
            key(row["what"], row["provider"], row["config"]): row
            for row in (load(path) if path.exists() else [])
            if row["case"] == recorder.case and (row["clean"] or not recorder.clean)
        }

    def all(self) -> None:
        """Every setting: first the memory of all ways, then their steps."""
        found = self.grid.settings()
        for number, setting in enumerate(found, start=1):
            print(f"{number}/{len(found)} {' '.join(map(str, setting.config().values()))}", flush=True)
            self.memory(setting)
            if setting.timed:
                self.steps(setting)

    def memory(self, setting: Setting) -> None:
        """A row per way, and one that compares the better of pyzo's with eager where the issue has a target."""
        eager: Row = {}
        for way in self.present(setting, MEMORY):
            name = key(MEMORY, way, setting.config())
            if name not in self.done:
                numbers = self.run(measure.memory, setting, way, self.recorder.device, self.grid.backend)
                base = eager or numbers
                self.add(
                    MEMORY,
                    way,
                    {**setting.config(), "products": numbers.pop("products")},
                    value=numbers["peak_bytes"] / base["peak_bytes"],
                    unit="x eager's peak",
                    saved_share=numbers["saved_bytes"] / base["saved_bytes"],
                    **numbers,
                )
            eager = eager or self.done[name]
        if setting.per_layer and key(LESS, BEST, setting.config()) not in self.done:
            self.compare(setting, eager)

    def compare(self, setting: Setting, eager: Row) -> None:
        units = {way: self.done[key(MEMORY, way, setting.config())]["units_per_layer"] for way in ways.OURS}
        best = min(units, key=units.__getitem__)
        less = 1 - units[best] / eager["units_per_layer"]
        target = against(setting.about.minimum, less) if setting.training == FULL else {}
        self.add(LESS, BEST, setting.config(), value=less, unit="of eager", best=best, **target)

    def steps(self, setting: Setting) -> None:
        """A row per way: all of a setting are timed in turn, so all are measured again where one is missing."""
        present = self.present(setting, STEP)
        if all(key(STEP, way, setting.config()) in self.done for way in present):
            return
        arguments = setting, tuple(present), self.recorder.device, self.grid.rounds, self.grid.backend
        products, samples = self.run(measure.steps, *arguments)
        for way in present:
            numbers: dict[str, object] = summary(samples[way])
            if way != ways.EAGER:
                numbers["ratio"] = {"to": ways.EAGER, **speedup(samples[ways.EAGER], samples[way])}
            if way == ways.EXACT:
                numbers |= against(LEAST_SPEED, numbers["ratio"]["of_medians"])
            self.add(STEP, way, {**setting.config(), "products": products}, **numbers)

    def present(self, setting: Setting, what: str) -> list[str]:
        """The ways that have numbers here; those that have none get a row that says why, once per setting."""
        found = []
        for way in setting.ways:
            reason = ways.left_out(way, setting.family, self.recorder.device)
            if reason is None:
                found.append(way)
            elif reason and what == MEMORY and key(what, way, setting.config()) not in self.done:
                self.add(what, way, setting.config(), reason=reason)
        return found

    def add(self, what: str, provider: str, config: Mapping[str, object], **numbers: object) -> None:
        self.done[key(what, provider, config)] = self.recorder.add(what, provider, config, **numbers)
        self.recorder.write()


def run(recorder: Recorder) -> None:
    """Adds the rows of this machine's CPU, of a GPU, or of a dry run, whose few measurements share this process."""
    if recorder.dry_run:
        with one_thread():
            Convert(recorder, settings.DRY, run=lambda function, *arguments: function(*arguments)).all()
        return
    Convert(recorder, settings.CPU if recorder.device == "cpu" else settings.GPU).all()
