"""Loads the library that registers the operators `torch.ops.pyzo.*`."""

from pathlib import Path

import torch

_FILE = Path(__file__).parents[1] / "_C.so"
if not _FILE.exists():
    raise ImportError(f"{_FILE} is missing: build it with `pip install .` (or `pip install -e .`) in pyzo's repository")
torch.ops.load_library(_FILE)
operators = torch.ops.pyzo
