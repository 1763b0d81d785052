"""GPU stage: installs pyzo from the tree for this GPU alone, without network, and checks that its CUDA is bound."""

import os
import subprocess
import sys
import time

import torch

from bench import gpu_stage
from bench.machine import ROOT

CHECK = (
    "import json, pyzo; from pyzo import ops; print(json.dumps([pyzo.__file__, ops.cuda_stream_bound(), ops.isas()]))"
)


def main() -> None:
    """Builds into $PYZO_SITE."""
    recorder = gpu_stage.begin("build")
    if recorder.dry_run:
        sys.exit("bench/gpu.sh build: has no dry run; `pip install .` is its CPU counterpart")
    architecture = "{}{}".format(*torch.cuda.get_device_capability())
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--upgrade"]
    command += ["--target", os.environ["PYZO_SITE"], str(ROOT)]
    start = time.perf_counter()
    done = subprocess.run(command, check=False, env={**os.environ, "PYZO_CUDA": "1", "PYZO_ARCHS": architecture})
    seconds = time.perf_counter() - start
    config = {"cuda": architecture, "cores": os.cpu_count()}
    if done.returncode != 0:
        recorder.add("build", "pip install", config, reason=f"exit status {done.returncode}")
        gpu_stage.end(recorder, failed=True)
    check = subprocess.run([sys.executable, "-c", CHECK], check=False, capture_output=True, text=True)
    recorder.add(
        "build",
        "pip install",
        config,
        value=seconds,
        unit="s",
        n=1,
        loaded=check.stdout.strip(),
        error=check.stderr[-2000:],
    )
    gpu_stage.end(recorder, failed=", true," not in check.stdout)


if __name__ == "__main__":
    main()
