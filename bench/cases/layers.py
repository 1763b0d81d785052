"""Forward and backward of every layer against the same layer in plain torch, eager and compiled, interleaved."""

import torch

from bench import heap, layer_jobs, layers
from bench.harness import Recorder

DTYPES = (torch.float32, torch.bfloat16)


def run(recorder: Recorder) -> None:
    """Adds the rows of all layers and dtypes."""
    sizes = layer_jobs.DRY if recorder.dry_run else layer_jobs.CPU
    kept = heap.keep()
    for dtype in DTYPES:
        torch.manual_seed(0)
        for job in layer_jobs.jobs(sizes, dtype, recorder.device):
            layers.compare(recorder, job, repeats=2 if recorder.dry_run else 7, pages="kept" if kept else "fresh")
