"""GPU stage: the golden hashes of noise and of steps, and GPU against CPU on many more elements, bit for bit.

Activations too: through them every function of csrc/core/elementary.h that a kernel calls.
"""

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
import sweeps
from bits import weights as weights_of

ELEMENTS = {True: 1 << 12, False: 1 << 24}  # of the comparisons beyond golden.txt
INTEGERS = {2: torch.int16, 4: torch.int32}  # by the size of an element whose bits are compared


def main() -> None:
    """One row per line of tests/golden.txt; a hash that differs fails the stage."""
    recorder = gpu_stage.begin("golden")
    found = []
    for field in golden.noise_lines():
        found.append(
            check_hashes(recorder, "noise", field, (golden.hash_of(noise(field, recorder.device)),), (field.hash,))
        )
    for steps in golden.pass_lines():
        got = golden.pass_hashes(torch.ops.pyzo, steps, recorder.device)
        found.append(check_hashes(recorder, "pass", steps, got, steps.hashes))
    for distribution in DISTRIBUTIONS:
        for dtype in ops.DTYPES:
            found.append(check_noise(recorder, distribution, dtype))
            for rule, states in ops.STATES.items():
                for state_dtype in (torch.float32, torch.bfloat16) if states else (torch.float32,):
                    found.append(check_pass(recorder, distribution, dtype, rule, state_dtype))
    for function in ops.FUNCTIONS:
        for dtype in ops.DTYPES:
            found.append(check_activation(recorder, function, dtype))
    gpu_stage.end(recorder, failed=not all(found))


def noise(field: golden.Field, device: str) -> torch.Tensor:
    """The noise that a line of golden.txt describes."""
    out = torch.empty(field.n, dtype=field.torch_dtype, device=device)
    code = ops.distribution_code(field.distribution)
    ops.noise_(
        out, seed=field.seed, key=field.key, base=field.base, inner=field.inner, stride=field.stride, distribution=code
    )
    return out


def check_hashes(recorder: Recorder, what: str, line: object, got: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Adds the row of one line."""
    text = " ".join(f"{h:016x}" for h in got)
    recorder.add(f"golden {what}", "pyzo", {"line": str(line)}, value=float(got == want), unit="equal", hash=text)
    return got == want


def check_noise(recorder: Recorder, distribution: str, dtype: torch.dtype) -> bool:
    """Adds the row that counts elements of noise whose bits differ between this device and the CPU."""
    n = ELEMENTS[recorder.dry_run]
    here, there = (
        pyzo.noise(n, seed=3, key=5, offset=1 << 40, distribution=distribution, dtype=dtype, device=device)
        for device in (recorder.device, "cpu")
    )
    config = {"distribution": distribution, "dtype": _name(dtype), "elements": n}
    return add_different(recorder, "noise bits against the CPU", config, [here], [there])


def check_pass(recorder: Recorder, distribution: str, dtype: torch.dtype, rule: str, state_dtype: torch.dtype) -> bool:
    """Adds the row that counts weights and states whose bits differ after passes with one direction and with two.

    Aligned or not, from nearest to stochastic, with a mask and without; special numbers are among weights and states.
    """
    n = ELEMENTS[recorder.dry_run]
    weights = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    special = weights_of(min(n, 1 << 16), dtype, seed=2)
    weights[: len(special)] = special
    states = [state.repeat(-(-n // 4096))[:n] for state in sweeps.make_states(rule, [4096], state_dtype, seed=3)]
    control = sweeps.make_control(2, 3, seed=4)
    results = []
    for device in (recorder.device, "cpu"):
        own = [t.to(device, copy=True) for t in (weights, *states)]
        for row, directions, offset in ((0, 1, 0), (1, 2, 0), (2, 1, 3), (1, 1, 0)):
            step = {
                "directions": directions,
                "undo": 0,
                "undo_sign": 1.0,
                "perturb": directions - 1,
                "perturb_sign": 1.0,
            }
            step |= {"rule": rule, "stochastic": row > 0, "masked": row < 2}
            part = [t[offset:] for t in own]
            line = [(7, (1 << 33) + offset, 0, 0, row)]
            distributed = ops.distribution_code(distribution)
            sweeps.run(part[:1], line, control, state=part[1:], distribution=distributed, **step)
        results.append(own)
    config = {"distribution": distribution, "dtype": _name(dtype), "rule": rule, "elements": n}
    if states:
        config["state"] = _name(state_dtype)
    return add_different(recorder, "pass bits against the CPU", config, *results)


def check_activation(recorder: Recorder, function: str, dtype: torch.dtype) -> bool:
    """Adds the row that counts values and derivatives whose bits differ, over patterns of every kind.

    Any NaN counts as any other: arithmetic does not say which one it makes.
    """
    n = ELEMENTS[recorder.dry_run]
    patterns = (torch.arange(n) * 2654435769).to(INTEGERS[dtype.itemsize]).view(dtype)
    results = []
    for device in (recorder.device, "cpu"):
        x = patterns.to(device).requires_grad_()
        value = ops.activation(x, function)
        (slope,) = torch.autograd.grad(value.sum(), x)
        results.append([t.detach().masked_fill(t.isnan(), torch.nan) for t in (value, slope)])
    config = {"function": function, "dtype": _name(dtype), "elements": n}
    return add_different(recorder, "activation bits against the CPU", config, *results)


def add_different(
    recorder: Recorder, what: str, config: dict[str, object], here: list[torch.Tensor], there: list[torch.Tensor]
) -> bool:
    """Adds a row with the number of elements whose bits differ; true where none does."""
    different = 0
    for a, b in zip(here, there, strict=True):
        different += int((a.cpu().view(INTEGERS[a.itemsize]) != b.view(INTEGERS[b.itemsize])).sum())
    recorder.add(what, "pyzo", config, value=different, unit="differ")
    return different == 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
