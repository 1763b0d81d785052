"""Finds and runs the CUDA toolkit's compiler and disassembler, on machines with or without a GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.machine import ROOT

DTYPES = {"0": "fp32", "1": "bf16", "2": "fp16"}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
DISTRIBUTIONS = ("normal", "rademacher")
RULES = {0: ("sgd", 0), 1: ("sign", 0), 2: ("momentum", 1), 3: ("adam", 2)}  # and the states they keep
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


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


def cubins(architecture: int, folder: Path) -> list[Path]:
    """Machine code of all kernels for one architecture, compiled with the flags of the build."""
    made = [(source, folder / f"{Path(source).stem}.{architecture}.cubin") for source in CUDA_SOURCES]
    for source, target in made:
        compile_cubin(source, architecture, target)
    return [target for _, target in made]


def compile_cubin(source: str, architecture: int, target: Path, *extra: str) -> str:
    """Compiles one file with the flags of the build; returns what nvcc prints."""
    lines = (ROOT / "csrc" / "nvcc.flags").read_text().splitlines()
    flags = [line for line in lines if line and not line.startswith("#")]
    real = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    return output(nvcc(), *flags, "-Icsrc", real, *extra, "-cubin", source, "-o", str(target))


def resources(architecture: int, folder: Path) -> dict[str, dict[str, int]]:
    """Registers, stack and spilled bytes of every kernel, as ptxas reports them."""
    reports = [compile_cubin(source, architecture, folder / "kernels.cubin", "-Xptxas=-v") for source in CUDA_SOURCES]
    found = {}
    for part in (part for report in reports for part in report.split("Compiling entry function '")[1:]):
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        registers = re.search(r"Used (\d+) registers", part)[1]
        found[part.partition("'")[0]] = {
            "registers": int(registers), "stack_bytes": int(stack), "spill_bytes": int(stores) + int(loads),
        }  # fmt: skip
    return found


TENSOR_KERNELS = ("pass_kernel", "noise_kernel")
KINDS = {1: "perturb", 2: "update", 4: "undo", 5: "undo+perturb", 6: "undo+update", 8: "general"}


@dataclass(frozen=True)
class Kernel:
    """The template arguments of a kernel over tensors, read from its mangled name; None where it has no such one."""

    name: str
    dtype: str | None = None
    state_dtype: str | None = None
    distribution: str | None = None
    stochastic: bool | None = None
    kind: str | None = None
    rule: str | None = None
    states: int = 0
    arguments: tuple[str, ...] = ()  # of a kernel of layers, as they are

    @classmethod
    def parse(cls, mangled: str) -> "Kernel":
        name = re.search(r"\d([a-z]+(?:_[a-z]+)*_kernel)", mangled)
        if name and name[1] not in TENSOR_KERNELS:
            return cls(name[1], arguments=tuple(re.findall(r"L(?:N\w*?5DtypeE|[bi])(\d+)E", mangled)))
        # The second argument of a type that occurred names it by a substitution, S2_ or the like.
        dtypes = [DTYPES[code] for code in re.findall(r"L(?:N\w*?5DtypeE|S\d*_)(\d)E", mangled)]
        numbers = [int(code) for code in re.findall(r"Li(\d+)E", mangled)]
        flags = re.findall(r"Lb(\d)E", mangled)
        rule, states = RULES[numbers[2]] if len(numbers) > 2 else (None, 0)
        return cls(
            name[1] if name else mangled,
            dtypes[0] if dtypes else None,
            dtypes[1] if len(dtypes) > 1 and states else None,
            DISTRIBUTIONS[numbers[0]] if numbers else None,
            flags[0] == "1" if flags else None,
            KINDS[numbers[1]] if len(numbers) > 1 else None,
            rule,
            states,
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes that the kernel stores for one element: its weight or noise, and its states."""
        return BYTES[self.dtype or "fp32"] + self.states * BYTES[self.state_dtype or "fp32"]

    def __str__(self) -> str:
        rounding = {None: None, True: "stochastic", False: "nearest"}[self.stochastic]
        state = self.state_dtype and f"state {self.state_dtype}"
        words = (self.name, self.dtype, self.distribution, rounding, self.kind, self.rule, state, *self.arguments)
        return " ".join(word for word in words if word)


def short_name(mangled: str) -> str:
    """A kernel's name with its template arguments, as in "pass_kernel bf16 normal stochastic undo+update sgd"."""
    return str(Kernel.parse(mangled))
