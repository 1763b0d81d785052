"""GPU stage: the golden hashes of noise and of a step, and GPU against CPU on many more elements, bit for bit."""

import sys

import torch

import pyzo
from bench import gpu_stage
from bench.harness import Recorder
from bench.machine import ROOT
from bench.pass_kinds import DISTRIBUTIONS
from pyzo import ops

sys.path.append(str(ROOT / "tests"))
import golden

ELEMENTS = {True: 1 << 12, False: 1 << 24}  # of the comparison beyond golden.txt


def main() -> None:
    """One row per line of tests/golden.txt; a hash that differs fails the stage."""
    recorder = gpu_stage.begin("golden")
    found = [check_hash(recorder, "noise", field, noise(field, recorder.device)) for field in golden.noise_lines()]
    for field in golden.pass_lines():
        found.append(check_hash(recorder, "pass", field, golden.pass_step(torch.ops.pyzo, field, recorder.device)))
    for distribution in DISTRIBUTIONS:
        for dtype in ops.DTYPES:
            found.append(check_bits(recorder, distribution, dtype))
    gpu_stage.end(recorder, failed=not all(found))


def noise(field: golden.Field, device: str) -> torch.Tensor:
    """The noise that a line of golden.txt describes."""
    out = torch.empty(field.n, dtype=field.torch_dtype, device=device)
    code = ops.distribution_code(field.distribution)
    ops.noise_(
        out, seed=field.seed, key=field.key, base=field.base, inner=field.inner, stride=field.stride, distribution=code
    )
    return out


def check_hash(recorder: Recorder, what: str, field: golden.Field, values: torch.Tensor) -> bool:
    """Adds the row of one line."""
    got = golden.hash_of(values)
    recorder.add(
        f"golden {what}", "pyzo", {"line": str(field)}, value=float(got == field.hash), unit="equal", hash=f"{got:016x}"
    )
    return got == field.hash


def check_bits(recorder: Recorder, distribution: str, dtype: torch.dtype) -> bool:
    """Adds the row that counts elements whose bits differ between this device and the CPU."""
    n = ELEMENTS[recorder.dry_run]
    here, there = (
        pyzo.noise(n, seed=3, key=5, offset=1 << 40, distribution=distribution, dtype=dtype, device=device)
        for device in (recorder.device, "cpu")
    )
    integer = torch.int32 if dtype.itemsize == 4 else torch.int16
    different = int((here.cpu().view(integer) != there.view(integer)).sum())
    config = {"distribution": distribution, "dtype": str(dtype).removeprefix("torch."), "elements": n}
    recorder.add("bits against the CPU", "pyzo", config, value=different, unit="differ")
    return different == 0


if __name__ == "__main__":
    main()
