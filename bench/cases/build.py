"""How long the build takes, in a fresh copy of the tree, and what the CUDA compiler made of the kernels."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import toolkit
from bench.cases.sass import ARCHITECTURE
from bench.harness import Recorder, against
from bench.machine import ROOT

CPU_SECONDS, CUDA_SECONDS, KERNELS = 60.0, 480.0, 150
SOURCES = ("csrc", "pyzo", "setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE")


def run(recorder: Recorder) -> None:
    """Adds the rows of both builds and of every kernel. A dry run builds nothing."""
    if not recorder.dry_run:
        config = {"cuda": "no", "cores": os.cpu_count()}
        recorder.add("build", "pip install", config, **_seconds(CPU_SECONDS, PYZO_CUDA="0"))
    try:
        toolkit.nvcc()
    except toolkit.Missing as reason:
        recorder.add("build", "pip install", {"cuda": ARCHITECTURE}, reason=str(reason))
        return
    if not recorder.dry_run:
        config = {"cuda": ARCHITECTURE, "cores": os.cpu_count()}
        recorder.add(
            "build", "pip install", config, **_seconds(CUDA_SECONDS, PYZO_CUDA="1", PYZO_ARCHS=str(ARCHITECTURE))
        )
    with tempfile.TemporaryDirectory() as folder:
        kernels = toolkit.resources(ARCHITECTURE, Path(folder))
    config = {"cuda": ARCHITECTURE}
    recorder.add(
        "kernels",
        "nvcc",
        config,
        value=len(kernels),
        unit="instantiations",
        **against(KERNELS, len(kernels), at_least=False),
    )
    for name, numbers in kernels.items():
        config = {"kernel": toolkit.short_name(name), "cuda": ARCHITECTURE}
        recorder.add("registers", "nvcc", config, value=numbers["registers"], unit="registers", **numbers)


def _seconds(limit: float, **environment: str) -> dict[str, object]:
    """Wall time of `pip install` of a fresh copy of the sources with the packages of this Python."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "pyzo"
        copy.mkdir()
        for name in SOURCES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            elif source.is_file():
                shutil.copy(source, copy / name)
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-build-isolation",
            "--no-deps",
            "--target",
            f"{folder}/site",
            ".",
        ]
        start = time.perf_counter()
        done = subprocess.run(
            command, check=False, cwd=copy, env={**os.environ, **environment}, capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr[-4000:]}")
    return {"value": seconds, "unit": "s", "n": 1, **against(limit, seconds, at_least=False)}
