"""Instructions per element of the passes on the CPU, counted by valgrind as it runs them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.harness import Recorder

DTYPES = ("float32", "bfloat16")
ISA = "avx2"  # the widest that valgrind runs
ELEMENTS = {True: 1 << 12, False: 1 << 16}  # dry run, real
FUNCTION = (
    f"pyzo::cpu::{ISA}::pass(pyzo::PassArgs const&, pyzo::TensorArgs const&, pyzo::Dtype, pyzo::Dtype, long, long)"
)
UNIT = "instructions per element"


def run(recorder: Recorder) -> None:
    """Adds a row for every kind of pass over one tensor."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        recorder.add(UNIT, "pyzo", {"isa": ISA}, reason="no valgrind on this machine")
        return
    elements = ELEMENTS[recorder.dry_run]
    with tempfile.TemporaryDirectory() as folder:
        kinds, counts = counted(valgrind, Path(folder), elements)
    for (dtype, distribution, what), count in zip(kinds, counts, strict=True):
        config = {"isa": ISA, "elements": elements, "dtype": dtype, "distribution": distribution}
        recorder.add(what, "pyzo", config, value=count / elements, unit=UNIT)


def counted(valgrind: str, folder: Path, elements: int) -> tuple[list[list[str]], list[int]]:
    """What was run, and the instructions of each call of the pass."""
    profile = folder / "profile"
    command = [
        valgrind,
        "--tool=callgrind",
        "--collect-atstart=no",
        f"--toggle-collect={FUNCTION}",
        f"--dump-after={FUNCTION}",
        f"--callgrind-out-file={profile}",
        *(sys.executable, "-m", "bench.cases.instructions", str(elements)),
    ]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True, cwd=folder
    )
    dumps = sorted(folder.glob("profile.*"), key=lambda file: int(file.suffix[1:]))
    totals = [int(re.search(r"^summary: (\d+)", dump.read_text(), re.MULTILINE)[1]) for dump in dumps]
    return json.loads(done.stdout.splitlines()[-1]), totals


def main(elements: int) -> None:
    """Runs every kind of pass once, and prints which."""
    import torch

    from bench.pass_kinds import DISTRIBUTIONS, PassKinds
    from pyzo import ops

    torch.set_num_threads(1)
    ops.select_isa(ISA)
    done = []
    for dtype in DTYPES:
        for distribution in DISTRIBUTIONS:
            weights = torch.zeros(elements, dtype=getattr(torch, dtype)).add_(0.02)
            for what, call in PassKinds([weights], distribution=distribution).calls().items():
                call()
                done.append((dtype, distribution, what))
    print(json.dumps(done))


if __name__ == "__main__":
    main(int(sys.argv[1]))
