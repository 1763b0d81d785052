"""GPU stage: every layer against eager and compiled torch, and its kernels' share of the device's copy bandwidth."""

import torch

from bench import gpu_stage, layer_jobs, layers

DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    """Adds the rows of all layers and dtypes, a family's tensors at a time."""
    recorder = gpu_stage.begin("layers")
    sizes = layer_jobs.DRY if recorder.dry_run else layer_jobs.GPU
    for dtype in DTYPES:
        torch.manual_seed(0)
        for job in layer_jobs.jobs(sizes, dtype, recorder.device):
            layers.compare(recorder, job, repeats=2 if recorder.dry_run else 15)
    gpu_stage.end(recorder)


if __name__ == "__main__":
    main()
