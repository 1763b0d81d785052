"""Says where a measurement was made: processor, device, versions, commit."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def cpu() -> dict[str, object]:
    """Model, family, cores this process may use, and the vector instructions they have."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": f"{fields.get('model name', platform.processor())} {platform.machine()}",
        "cpu_family_model": f"{fields.get('cpu family', '?')}.{fields.get('model', '?')}",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "vector": [name for name in ("avx2", "fma", "avx512f", "avx512bw") if name in flags],
    }


def gpu(device: str) -> dict[str, object]:
    """Name, multiprocessors, memory, L2 of a CUDA device; empty for the CPU."""
    if torch.device(device).type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def slug(device: str) -> str:
    """Name of this machine as a file name: the GPU's, or the processor's with its number of cores."""
    facts = cpu()
    name = gpu(device).get("gpu") or f"{facts['cpu']}-{facts['cpu_family_model']}-{facts['cores']}-cores"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def versions() -> dict[str, str | None]:
    """Versions that can change a number; pyzo's instruction set and noise version belong to its build."""
    try:
        pyzo = importlib.metadata.version("pyzo")
    except importlib.metadata.PackageNotFoundError:
        pyzo = None
    return {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "pyzo": pyzo}


def commit() -> tuple[str, bool]:
    """Commit of the tree and whether it is clean; recorded rows themselves do not count as changes.

    Where the tree travels without its `.git`, PYZO_COMMIT says it: "<hash>", or "<hash>-dirty".
    """
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if head is None:
        head, dirty, _ = os.environ.get("PYZO_COMMIT", "unknown").partition("-dirty")
        return head, not dirty and head != "unknown"
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results")
    return head, changes == ""


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
