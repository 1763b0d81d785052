"""Runs CPU cases and records their rows: python -m bench.run [--dry-run] [--out FILE] CASE ..."""

import argparse
import importlib
from pathlib import Path

from bench.harness import Recorder, table

CASES = (
    "passes",
    "rules",
    "indices",
    "small",
    "methods",
    "step",
    "memory",
    "layers",
    "gradients",
    "activations",
    "hybrid",
    "convert",
    "build",
    "sass",
    "instructions",
    "normal",
    "drift",
    "scratch",
    "learn_sparse",
    "learn_blocks",
    "learn_hybrid",
    "learn_variants",
    "learn_bf16",
)


def main(arguments: list[str] | None = None) -> None:
    """Runs the named cases one after another; each writes its rows when it ends."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Measure pyzo on this machine's CPU.")
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE", help=f"one or more of {', '.join(CASES)}")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, rows to a temporary folder")
    parser.add_argument(
        "--out", type=Path, help="file of JSON lines to append to, instead of bench/results/<machine>.jsonl"
    )
    options = parser.parse_args(arguments)
    for name in options.cases:
        recorder = Recorder(name, dry_run=options.dry_run, out=options.out)
        importlib.import_module(f"bench.cases.{name}").run(recorder)
        print(table(recorder.rows))
        print(f"{len(recorder.rows)} rows -> {recorder.write()}")


if __name__ == "__main__":
    main()
