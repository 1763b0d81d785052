"""Memory of a ZO-SGD step above inference: peak of fresh processes, and bytes allocated outside the closure."""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from bench.processes import fresh, peak_bytes

if TYPE_CHECKING:
    from bench.harness import Recorder

MODES = ("inference", "pyzo", "eager")
WIDTH = {True: 64, False: 4096}  # dry run, real
LAYERS = {True: 4, False: 33}  # 33 square layers of 4096 in fp32 are 2.2 GB
BATCH, STEPS = 16, 3
LIMIT_RATIO, LIMIT_BYTES = 1.01, 64 * 1024
TABLE_BYTES = 5 * 8  # of the pointer table, per tensor


def run(recorder: "Recorder") -> None:
    """Adds the rows of all modes."""
    from bench.harness import against  # harness imports pyzo, and this file is what the process that only infers runs

    config = {
        "layers": LAYERS[recorder.dry_run],
        "width": WIDTH[recorder.dry_run],
        "dtype": "float32",
        "store": "inplace",
    }
    config["parameter_bytes"] = config["layers"] * config["width"] ** 2 * 4
    arguments = ["--dry-run"] if recorder.dry_run else []
    found = {mode: fresh("bench.cases.memory", mode, *arguments) for mode in MODES}
    for mode, numbers in found.items():
        ratio = numbers["peak_bytes"] / found["inference"]["peak_bytes"]
        target = against(LIMIT_RATIO, ratio, at_least=False) if mode == "pyzo" else {}
        recorder.add(
            "peak resident set",
            mode,
            config,
            value=ratio,
            unit="x inference",
            peak_bytes=numbers["peak_bytes"],
            **target,
        )
    limit = LIMIT_BYTES + TABLE_BYTES * LAYERS[recorder.dry_run]
    for mode in ("pyzo", "eager"):
        counts = found[mode]["allocated"]
        target = against(limit, counts["total_bytes"], at_least=False) if mode == "pyzo" else {}
        recorder.add(
            "allocated outside closure", mode, config, value=counts["total_bytes"], unit="bytes", **counts, **target
        )


def child(mode: str, dry_run: bool) -> dict[str, object]:
    """Runs one mode in this process: forwards, or steps. The peak is read before the profiler starts."""
    torch.manual_seed(0)
    width = WIDTH[dry_run]
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS[dry_run])))
    batch = torch.randn(BATCH, width)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            return model(batch).square().mean()

    if mode == "inference":
        for _ in range(2 * STEPS):
            loss()
        return {"peak_bytes": peak_bytes()}

    from bench import allocations  # pyzo and the profiler stay out of the process that only infers

    step = _stepper(mode, model)
    for _ in range(STEPS):
        step(loss)
    peak = peak_bytes()
    counts = allocations.outside_closure(lambda: step(allocations.marked(loss)))
    return {"peak_bytes": peak, "allocated": vars(counts)}


def _stepper(mode: str, model: nn.Module) -> Callable[[Callable[[], torch.Tensor]], torch.Tensor]:
    if mode == "pyzo":
        import pyzo

        return pyzo.optim.ZOSGD(model.parameters(), lr=1e-7, eps=1e-3, store="inplace").step

    from pyzo.baselines import EagerMeZO

    return EagerMeZO(model.parameters(), 1e-7, eps=1e-3).step


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], "--dry-run" in sys.argv)))
