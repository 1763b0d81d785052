"""Records what the demo measured as rows of bench/results (`bench/demo.py --record`)."""

import math
import statistics
from pathlib import Path
from typing import Any

from bench.demo_training import FULL
from bench.harness import Recorder, against

LEAST_TIMES_CHANCE = 1.6  # issue 2, item 6


def record(numbers: dict[str, Any], task: str) -> Path:
    """Adds rows for accuracies, losses, step times and peaks; returns the file."""
    recorder = Recorder("demo")
    base = {"task": task, "classes": len(numbers["classes"]), **numbers["texts"], **numbers["settings"]}
    before = numbers["before"]
    recorder.add("held out, before", "zero head", base, value=before["accuracy"], unit="accuracy", loss=before["loss"])
    for run in numbers["runs"]:
        config = {**base, "seed": run["seed"]}
        for method, score in run["held_out"].items():
            extra = {"loss_change": run["loss_change"]} if method == FULL else {}
            recorder.add(
                "held out, after", method, config, value=score["accuracy"], unit="accuracy",
                loss=score["loss"], train_s=run["seconds"][method], **extra,
            )  # fmt: skip
    accuracies = [run["held_out"][FULL]["accuracy"] for run in numbers["runs"]]
    if len(accuracies) > 1:
        low = statistics.fmean(accuracies) - 2 * statistics.stdev(accuracies) / math.sqrt(len(accuracies))
        recorder.add(
            "held out, mean - 2 standard errors", FULL, {**base, "seeds": len(accuracies)},
            value=low, unit="accuracy", mean=statistics.fmean(accuracies),
            **against(LEAST_TIMES_CHANCE / len(numbers["classes"]), low),
        )  # fmt: skip
    for method, times in numbers["step_seconds"].items():
        recorder.add("demo step", method, base, samples=times)
    inference = numbers["peak_bytes"].get("inference")
    for mode, peak in numbers["peak_bytes"].items():
        recorder.add("peak above inference", mode, base, value=peak - inference, unit="bytes", peak_bytes=peak)
    return recorder.write()
