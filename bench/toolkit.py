"""Finds and runs the CUDA toolkit's compiler and disassembler, on machines with or without a GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from bench.machine import ROOT

DTYPES = {"0": "fp32", "1": "bf16", "2": "fp16"}
DISTRIBUTIONS = ("normal", "rademacher")
CUDA_SOURCE = "csrc/cuda/kernels.cu"


class Missing(Exception):
    """A tool is not there; the text says which and where it was looked for."""


def nvcc() -> str:
    """Path of nvcc."""
    return _find("nvcc", [Path("/usr/local/cuda/bin/nvcc")])


def cuobjdump() -> str:
    """Path of cuobjdump: $PYZO_CUOBJDUMP, the PATH, the toolkit, or the copy inside the triton package."""
    places = [Path(os.environ.get("PYZO_CUOBJDUMP", "")), Path("/usr/local/cuda/bin/cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    return _find("cuobjdump", places)


def _find(name: str, places: list[Path]) -> str:
    found = shutil.which(name) or next((str(place) for place in places if place.is_file()), None)
    if found is None:
        raise Missing(f"{name}: not in $PATH or {', '.join(str(place) for place in places)}")
    return found


def output(*command: str) -> str:
    """What a command prints, stdout and stderr; an error carries it."""
    done = subprocess.run(command, check=False, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


def cubin(architecture: int, folder: Path) -> Path:
    """Machine code of the kernels for one architecture, compiled with the flags of the build."""
    target = folder / f"kernels.{architecture}.cubin"
    compile_cubin(CUDA_SOURCE, architecture, target)
    return target


def compile_cubin(source: str, architecture: int, target: Path, *extra: str) -> str:
    """Compiles one file with the flags of the build; returns what nvcc prints."""
    lines = (ROOT / "csrc" / "nvcc.flags").read_text().splitlines()
    flags = [line for line in lines if line and not line.startswith("#")]
    real = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    return output(nvcc(), *flags, "-Icsrc", real, *extra, "-cubin", source, "-o", str(target))


def resources(architecture: int, folder: Path) -> dict[str, dict[str, int]]:
    """Registers, stack and spilled bytes of every kernel, as ptxas reports them."""
    report = compile_cubin(CUDA_SOURCE, architecture, folder / "kernels.cubin", "-Xptxas=-v")
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        registers = re.search(r"Used (\d+) registers", part)[1]
        found[part.partition("'")[0]] = {
            "registers": int(registers), "stack_bytes": int(stack), "spill_bytes": int(stores) + int(loads),
        }  # fmt: skip
    return found


KINDS = {1: "perturb", 2: "update", 4: "undo", 5: "undo+perturb", 6: "undo+update", 8: "many directions"}


def short_name(mangled: str) -> str:
    """A kernel's name with its template arguments, as in "pass_kernel bf16 normal stochastic undo+update"."""
    name = re.search(r"\d([a-z]+(?:_[a-z]+)*_kernel)", mangled)
    words = [name[1] if name else mangled]
    words += [DTYPES[code] for code in re.findall(r"5DtypeE(\d)E", mangled)]
    numbers = [int(code) for code in re.findall(r"Li(\d+)E", mangled)]  # distribution, then the kind of pass
    words += [DISTRIBUTIONS[code] for code in numbers[:1]]
    words += ["stochastic" if flag == "1" else "nearest" for flag in re.findall(r"Lb(\d)E", mangled)]
    return " ".join([*words, *(KINDS[code] for code in numbers[1:])])
