"""GPU stage: compute-sanitizer over every kind of pass on small awkward tensors, or the reason why it could not run."""

import os
import shutil
import subprocess
import sys

import torch

from bench import gpu_stage
from bench.pass_kinds import DISTRIBUTIONS, PassKinds
from pyzo import ops
from pyzo.control import KEEP, KEEP_ALL, LINES

TOOLS = ("memcheck", "racecheck")
SIZES = (0, 1, 3, 4, 5, 63, 64, 65, 2047, 2048, 2049, 100003)
FAULT = 9  # exit status by which the sanitizer says that it found something
LIMIT_S = 200


def main() -> None:
    """Runs the work under each tool; in a dry run without any."""
    if "--work" in sys.argv:
        work("cuda")
        return
    recorder = gpu_stage.begin("sanitizer")
    if recorder.dry_run:
        work("cpu")
        recorder.add("work alone", "none", {"device": "cpu"}, reason="dry run: no sanitizer on a CPU")
        gpu_stage.end(recorder)
    path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    faults = [check(recorder, path, tool) for tool in TOOLS]
    gpu_stage.end(recorder, failed=any(faults))


def check(recorder, path: str, tool: str) -> bool:
    """Adds the row of one tool; true where it found a fault."""
    command = [
        path,
        "--tool",
        tool,
        "--error-exitcode",
        str(FAULT),
        sys.executable,
        "-m",
        "bench.gpu_sanitizer",
        "--work",
    ]
    # Without torch's cache each tensor is an allocation of its own, whose ends the tool knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command,
            check=False,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as reason:
        recorder.add(tool, "compute-sanitizer", {"sizes": len(SIZES)}, reason=str(reason))
        return False
    summary = next((line for line in done.stdout.splitlines() if "SUMMARY" in line), done.stdout[-500:]).strip("= ")
    print(done.stdout[-3000:])
    recorder.add(tool, "compute-sanitizer", {"sizes": len(SIZES)}, reason=summary, status=done.returncode)
    return done.returncode == FAULT


def work(device: str) -> None:
    """Every kind of pass by every rule, and noise, on tensors of all sizes, aligned and not; one direction and four."""
    for dtype in ops.DTYPES:
        aligned = [torch.zeros(n, dtype=dtype, device=device) for n in SIZES]
        shifted = [torch.zeros(n + 1, dtype=dtype, device=device)[1:] for n in SIZES]
        for distribution in DISTRIBUTIONS:
            for rule, states in ops.STATES.items():
                for state_dtype in (torch.float32, torch.bfloat16) if states else (torch.float32,):
                    passes(aligned + shifted, distribution, rule, state_dtype)
            for tensor in aligned + shifted:
                code = ops.distribution_code(distribution)
                ops.noise_(tensor, seed=1, key=2, base=3, inner=0, stride=0, distribution=code)
    masks(device)
    rows(device)
    control = ops.control(4, 3, device)
    ops.begin_step_(control)
    losses = torch.arange(9, dtype=torch.float64, device=device)
    for kind, scaling in ((0, 0), (1, 0), (2, 0), (1, 1), (0, 2)):
        ops.estimate_(control, losses, kind=kind, q=4, scaling=scaling)
    ops.choose_(control, losses[:3])
    if device == "cuda":
        torch.cuda.synchronize()


def masks(device: str) -> None:
    """Packed masks of tensors of all sizes, aligned and not, passes that heed them, passes over listed elements."""
    for dtype in ops.DTYPES:
        whole = [torch.zeros(n + shift, dtype=dtype, device=device)[shift:] for n in SIZES for shift in (0, 1)]
        bits = [torch.zeros((len(t) + 7) // 8, dtype=torch.uint8, device=device) for t in whole]
        lists = [torch.arange(0, len(t), 3, device=device) for t in whole]
        for distribution in DISTRIBUTIONS:
            for rule, states in ops.STATES.items():
                kinds = PassKinds(whole, distribution=distribution, directions=4, rule=rule)
                ops.mask_bits_(whole, bits, kinds.table, kinds.control)
                step = {"undo": 0, "undo_sign": 1.0, "perturb": 1, "perturb_sign": 1.0, "stochastic": True}
                step |= {"directions": 4, "masked": True}
                kinds.run(bits=bits, **step)
                kinds.state = [torch.zeros(len(i), device=device) for _ in range(states) for i in lists]
                kinds.run(indices=lists, **step)


def rows(device: str) -> None:
    """Looked-up rows of small matrices, on CUDA some outside, with and without packed masks."""
    for dtype in ops.DTYPES:
        sizes = [1 + n % 7 for n in SIZES]
        out = [torch.zeros(n // 50 + 1, min(n, 50), dtype=dtype, device=device) for n in SIZES]
        ids = [torch.arange(len(t), device=device) % size for t, size in zip(out, sizes, strict=True)]
        if device == "cuda":
            for i in ids:
                i[::3] = -1  # which only the CPU refuses
        bits = [
            torch.zeros((s * t.shape[1] + 7) // 8, dtype=torch.uint8, device=device)
            for s, t in zip(sizes, out, strict=True)
        ]
        for distribution in DISTRIBUTIONS:
            kinds = PassKinds(out, distribution=distribution, directions=4)
            for masks_ in ([], bits):
                ops.pass_rows_(
                    out,
                    ids,
                    sizes,
                    kinds.table,
                    kinds.control,
                    bits=masks_,
                    distribution=ops.distribution_code(distribution),
                    directions=4,
                    perturb=1,
                    perturb_sign=1.0,
                    stochastic=True,
                    masked=True,
                )


def passes(tensors: list[torch.Tensor], distribution: str, rule: str, state_dtype: torch.dtype) -> None:
    """Every kind of pass over the tensors; those without update once, with the rule sgd."""
    for directions in (1, 4):
        kinds = PassKinds(tensors, distribution=distribution, directions=directions, rule=rule, state_dtype=state_dtype)
        if rule == "sgd":
            for call in kinds.calls().values():
                call()
            kinds.conservative(stochastic=True)
        kinds.restore_update(stochastic=False)
        kinds.control[LINES, KEEP] = KEEP_ALL // 2
        kinds.run(undo=0, undo_sign=1.0, directions=directions, stochastic=True, masked=True)


if __name__ == "__main__":
    main()
