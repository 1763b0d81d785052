"""The command of every plot: rows of one file in, one SVG out."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.harness import RESULTS, load


def command(module: str, picture: str, draw: Callable[[Sequence[dict[str, Any]], Path], None]) -> None:
    """Reads the file of rows that is named, writes bench/results/<picture> unless --out says where."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("rows", type=Path, help="file of JSON lines")
    parser.add_argument("--out", type=Path, default=RESULTS / picture)
    options = parser.parse_args()
    draw(load(options.rows), options.out)
    print(options.out)
