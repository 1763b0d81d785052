"""Measures the providers of one job interleaved in one run and records each as a row of numbers and conditions."""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import machine
from pyzo.timing import Provider, interleave

RESULTS = machine.ROOT / "bench" / "results"


def quantile(samples: Sequence[float], share: float) -> float:
    """Quantile by linear interpolation between order statistics."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def summary(samples: Sequence[float], *, unit: str = "s") -> dict[str, float]:
    """Median, p20, p80 and n."""
    return {
        f"median_{unit}": statistics.median(samples),
        f"p20_{unit}": quantile(samples, 0.2),
        f"p80_{unit}": quantile(samples, 0.8),
        "n": len(samples),
    }


def speedup(baseline: Sequence[float], candidate: Sequence[float]) -> dict[str, float]:
    """How many times faster: ratio of the medians, and p20 and p80 of the ratios of each round."""
    if len(baseline) != len(candidate):
        raise ValueError(f"candidate: expected {len(baseline)} samples as the baseline has, got {len(candidate)}")
    paired = [b / c for b, c in zip(baseline, candidate, strict=True)]
    return {
        "of_medians": statistics.median(baseline) / statistics.median(candidate),
        "p20": quantile(paired, 0.2),
        "p80": quantile(paired, 0.8),
    }


def copy_rate(device: str, *, nbytes: int, repeats: int) -> float:
    """Bytes per second, read plus written, of torch's own copy of `nbytes` of random data on the device."""
    source = torch.empty(nbytes // 4, device=device).uniform_()
    target = torch.zeros_like(source)
    samples = interleave([Provider("copy", lambda: target.copy_(source))], repeats=repeats, device=device)
    return 2 * source.nbytes / statistics.median(samples["copy"])


@dataclass
class Recorder:
    """Collects the rows of one run and appends them to a file of JSON lines.

    Rows of a dirty tree go to bench/results/temporary/, rows of a dry run (tiny sizes, no claim) to a temporary folder.
    """

    case: str
    device: str = "cpu"
    dry_run: bool = False
    out: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit, self.clean = machine.commit()
        if self.dry_run and self.out is not None and self.out.resolve().is_relative_to(RESULTS):
            raise ValueError(f"out: expected a path outside bench/results in a dry run, got {self.out}")
        nbytes, repeats = (1 << 20, 3) if self.dry_run else (1 << 28, 9) if self.device == "cpu" else (1 << 32, 9)
        self.copy_rate = copy_rate(self.device, nbytes=nbytes, repeats=repeats)
        self.machine = {**machine.cpu(), **machine.gpu(self.device), "copy_bytes_per_s": self.copy_rate}
        self.versions = machine.versions()
        self._written = 0

    def add(self, what: str, provider: str, config: Mapping[str, object], **numbers: object) -> dict[str, Any]:
        """Adds a row: what was done, by whom, under which conditions, the numbers. A dry run has no targets."""
        if self.dry_run:
            numbers = {name: number for name, number in numbers.items() if name not in against(0, 0)}
        row = {
            "case": self.case,
            "what": what,
            "provider": provider,
            "config": dict(config),
            **numbers,
            "device": torch.device(self.device).type,
            "dry_run": self.dry_run,
            "machine": self.machine,
            "versions": self.versions,
            "commit": self.commit,
            "clean": self.clean,
            "command": " ".join(sys.orig_argv),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.rows.append(row)
        return row

    def path(self) -> Path:
        """File the rows belong to."""
        if self.out is not None:
            return self.out
        name = f"{machine.slug(self.device)}.jsonl"
        if self.dry_run:
            return Path(tempfile.gettempdir()) / "pyzo-dry-run" / name
        return RESULTS / name if self.clean else RESULTS / "temporary" / name

    def write(self) -> Path:
        """Appends the rows that are not written yet and returns the file."""
        path = self.path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as lines:
            for row in self.rows[self._written :]:
                lines.write(json.dumps(row, sort_keys=True) + "\n")
        self._written = len(self.rows)
        return path


def against(target: float, value: float, *, at_least: bool = True) -> dict[str, object]:
    """Fields that compare a value with its target."""
    return {
        "target": target,
        "target_kind": ">=" if at_least else "<=",
        "met": value >= target if at_least else value <= target,
    }


def load(path: Path) -> list[dict[str, Any]]:
    """Rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as short lines: what, provider, conditions, time or value, rate, ratio, target."""
    lines = []
    for row in rows:
        config = " ".join(str(value) for value in row["config"].values())
        if "median_s" in row:
            value = f"{row['median_s'] * 1e3:10.3f} ms"
        elif "value" in row:
            value = f"{row['value']:10.4g} {row['unit']}"
        else:
            value = row.get("reason", "")
        rate = f"{row['elements_per_s'] * 1e-9:7.3f} G/s" if "elements_per_s" in row else " " * 11
        ratio = f"{row['ratio']['of_medians']:6.2f} x {row['ratio']['to']}" if "ratio" in row else ""
        share = f"{row['copy_share']['of_medians']:5.2f} of copy" if "copy_share" in row else ""
        target = (
            f"{row['target_kind']} {row['target']:g} {'met' if row['met'] else 'MISSED'}" if "target" in row else ""
        )
        lines.append(
            f"{row['what']:26} {row['provider']:24} {config:40} {value} {rate} {ratio} {share} {target}".rstrip()
        )
    return "\n".join(lines)
