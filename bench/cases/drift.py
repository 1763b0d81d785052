"""What steps that change nothing (lr = 0) leave of 16-bit and 32-bit weights: MeZO in torch, and pyzo's stores."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from bench.half import dtype_name
from bench.harness import Recorder, against
from bench.laboratory import one_thread
from bench.pass_kinds import DISTRIBUTIONS, EPS
from pyzo import optim
from pyzo.baselines import EagerZO

SIDE = {True: 16, False: 256}  # dry run, real; of the square matrix of weights
CYCLES = {True: (1, 2, 3), False: (10, 100, 1000)}
SIGMA = 0.02  # of the weights
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MEZO = "MeZO in torch"
EXACT = ("snapshot", "scratch")
STORES = ("inplace", *EXACT)
LOWER = 7.0  # how many times less than MeZO in bf16 (issue 6)

Step = Callable[[Callable[[], Tensor]], Tensor]


@dataclass(frozen=True)
class Drift:
    """From weights w to weights v: rms(v - w) / rms(w), share of elements whose bits differ, std(v) / std(w) - 1."""

    rms: float
    changed: float
    spread_change: float

    @classmethod
    def between(cls, before: Tensor, after: Tensor) -> "Drift":
        bits = torch.int16 if before.element_size() == 2 else torch.int32
        changed = (before.view(bits) != after.view(bits)).double().mean()
        w, v = before.double(), after.double()
        rms = ((v - w).square().mean() / w.square().mean()).sqrt()
        return cls(rms.item(), changed.item(), (v.std() / w.std() - 1).item())


def run(recorder: Recorder) -> None:
    """Adds a row for every dtype, distribution, way to step and number of steps."""
    side, cycles = SIDE[recorder.dry_run], CYCLES[recorder.dry_run]
    for dtype, distribution in product(DTYPES, DISTRIBUTIONS):
        config = {"elements": side**2, "sigma": SIGMA, "eps": EPS}
        config |= {"dtype": dtype_name(dtype), "distribution": distribution}
        with one_thread():
            found = {name: drifts(name, dtype, distribution, side, cycles) for name in (MEZO, *STORES)}
        for name, after in found.items():
            for count, drift, mezo in zip(cycles, after, found[MEZO], strict=True):
                numbers: dict[str, object] = {"changed": drift.changed, "spread_change": drift.spread_change}
                if name in EXACT:
                    numbers |= against(0.0, drift.changed, at_least=False)
                elif name != MEZO:
                    numbers["times_lower"] = mezo.rms / drift.rms
                    if dtype == torch.bfloat16 and count == cycles[-1]:
                        numbers |= against(mezo.rms / LOWER, drift.rms, at_least=False)
                recorder.add("drift", name, {**config, "cycles": count}, value=drift.rms, unit="of rms", **numbers)


def drifts(name: str, dtype: torch.dtype, distribution: str, side: int, cycles: tuple[int, ...]) -> list[Drift]:
    """After so many steps of lr = 0, ascending, of a matrix of normal weights and a loss that depends on them."""
    torch.manual_seed(0)
    model = nn.Linear(side, side, bias=False, dtype=dtype).requires_grad_()
    nn.init.normal_(model.weight, std=SIGMA)
    batch = torch.randn(1, side, dtype=dtype)
    step, before = stepper(name, model, distribution), model.weight.detach().clone()
    found = []
    for count in range(1, cycles[-1] + 1):
        step(lambda: model(batch).float().square().mean())
        if count in cycles:
            found.append(Drift.between(before, model.weight.detach()))
    return found


def stepper(name: str, model: nn.Module, distribution: str) -> Step:
    """Two-sided steps as MeZO makes them in torch, or by one of pyzo's stores."""
    if name == MEZO:
        return EagerZO(model.parameters(), 0.0, eps=EPS, distribution=distribution).step
    return optim.ZOSGD(model, lr=0.0, eps=EPS, distribution=distribution, store=name).step
