"""Numbers measured in a process of its own, and the resident set of this one; imports nothing that weighs."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def fresh(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m module arguments` prints as JSON in its last line; it sees the same packages."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """Largest resident set of this process since it started (getrusage's would include the parent's)."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """Resident set of this process now."""
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}, got none")
