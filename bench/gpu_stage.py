"""What every stage of bench/gpu.sh has in common: its arguments, its recorder, its end."""

import argparse
import sys
from pathlib import Path

import torch

from bench.harness import Recorder, table


def begin(stage: str) -> Recorder:
    """Recorder of a stage, on the GPU or, in a dry run, on the CPU."""
    parser = argparse.ArgumentParser(prog=f"bench/gpu.sh {stage}")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit(
            f"bench/gpu.sh {stage}: expected a GPU that torch {torch.__version__} sees, got none; --dry-run needs none"
        )
    return Recorder(
        f"gpu {stage}", device="cpu" if options.dry_run else "cuda", dry_run=options.dry_run, out=options.out
    )


def end(recorder: Recorder, *, failed: bool = False) -> None:
    """Prints and writes the rows; leaves with status 1 where the stage found a fault."""
    print(table(recorder.rows))
    print(f"{len(recorder.rows)} rows -> {recorder.write()}")
    sys.exit(1 if failed else 0)
