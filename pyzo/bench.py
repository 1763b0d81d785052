"""`python -m pyzo bench`: pyzo's passes beside the same work in plain torch, taking turns on the user's machine."""

import argparse
import importlib.metadata
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from pyzo import baselines, control, ops
from pyzo.timing import Provider, interleave

LR, EPS, SEED = 1e-6, 1e-3, 1
MOMENTUM, BETAS, ADAM_EPS = 0.9, (0.9, 0.999), 1e-8
AGE = 2  # of the update: the first one is special to momentum and Adam
DTYPES = (torch.float32, torch.bfloat16)
ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}  # several times the caches, little memory
LEAST_ROUNDS, MOST_ROUNDS = 3, 25


class Passes:
    """The passes over a list of tensors as an optimizer calls them, without the optimizer around it.

    Args:
        tensors: contiguous tensors of one dtype on one device, changed in place.
        distribution: "normal" or "rademacher".
        directions: how many directions an update sums.
        rule: "sgd", "sign", "momentum" or "adam".
        state_dtype: of what the rule keeps, torch.float32 or torch.bfloat16.
        seed: of the run, from which the directions' seeds are drawn.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        distribution: str,
        directions: int = 1,
        rule: str = "sgd",
        state_dtype: torch.dtype = torch.float32,
        seed: int = SEED,
    ) -> None:
        self.tensors = list(tensors)
        self.directions = directions
        self.state = [torch.zeros_like(t, dtype=state_dtype) for _ in range(ops.STATES[rule]) for t in self.tensors]
        self._distribution, self._rule = ops.distribution_code(distribution), ops.RULES[rule]
        self.table = torch.tensor([[1 + key, 0, 0, 0, 0] for key in range(len(self.tensors))], dtype=torch.int64)
        scalars = control.Control(directions, 1, self.tensors[0].device, seed)
        beta1, beta2 = (MOMENTUM, 0.0) if rule == "momentum" else BETAS
        scalars.write_rows([control.Row(lr=LR, eps=EPS, weight_decay=0.0, beta1=beta1, beta2=beta2, rule_eps=ADAM_EPS)])
        ops.begin_step_(scalars.tensor)
        self.control = scalars.tensor
        # What the losses of a step would set: coefficients of both signs, a conservative step that accepts.
        doubles, row = self.control.view(torch.float64), control.LINES
        coefficients = torch.linspace(-1.0, 2.0, directions, dtype=torch.float64)
        doubles[row, control.COEFFICIENTS : control.COEFFICIENTS + directions] = coefficients.to(doubles.device)
        doubles[row, control.CORRECTION1], doubles[row, control.CORRECTION2] = 1 - beta1**AGE, 1 - beta2**AGE
        doubles[0, control.CHOICE] = 1.0
        self.control[row, control.AGE] = AGE

    def perturb(self) -> None:
        """w + eps z."""
        self.run(perturb=0, perturb_sign=1.0)

    def restore_update(self, *, stochastic: bool) -> None:
        """From w - eps z of the last direction back to w, then the rule's step along all directions."""
        self.run(undo=self.directions - 1, undo_sign=1.0, directions=self.directions, stochastic=stochastic)

    def run(self, **what: float) -> None:
        """One pass; `what` as in `pyzo.ops.pass_`."""
        ops.pass_(
            [],
            self.tensors,
            self.state if what.get("directions") else [],
            self.table,
            self.control,
            distribution=self._distribution,
            rule=self._rule if what.get("directions") else 0,
            **what,
        )


def pairs(weights: torch.Tensor) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Every job by name, as pyzo does it and as people write it in torch, over the same weights."""
    tensors = [weights]
    for distribution in ops.DISTRIBUTIONS:
        passes = Passes(tensors, distribution=distribution)
        eager = partial(baselines.eager_perturb_, tensors, EPS, 1.0, SEED, distribution)
        yield f"perturb, {distribution}", passes.perturb, eager
    for rule in ops.RULES:
        passes = Passes(tensors, distribution="normal", rule=rule)
        fused = partial(passes.restore_update, stochastic=weights.element_size() == 2)
        yield f"restore + update, {rule}", fused, partial(_eager_restore_update, tensors, rule, {})


def _eager_restore_update(tensors: list[torch.Tensor], rule: str, states: dict) -> None:
    baselines.eager_perturb_(tensors, EPS, 1.0, SEED)
    baselines.eager_update_(tensors, coefficients=[1.0], seeds=[SEED], rule=rule, states=states, lr=LR)


def lines(dtype: torch.dtype, elements: int, device: str, seconds: float) -> Iterator[str]:
    """The rows of one dtype, measured for about `seconds`; the first says over how many rounds."""
    torch.manual_seed(SEED)
    jobs = list(pairs(torch.empty(elements, dtype=dtype, device=device).normal_(0, 0.02)))
    providers = [Provider(f"pyzo {name}", fused) for name, fused, _ in jobs]
    providers += [Provider(f"torch {name}", eager) for name, _, eager in jobs]
    first = interleave(providers, repeats=1, warmup=1, device=device)
    rounds = int(seconds / sum(map(sum, first.values()))) - 2  # the first and its warm-up are spent
    rounds = min(max(rounds, LEAST_ROUNDS), MOST_ROUNDS)
    samples = interleave(providers, repeats=rounds, warmup=0, device=device)
    yield f"{str(dtype).removeprefix('torch.')}, medians of {rounds} rounds"
    for name, *_ in jobs:
        fused, eager = (elements * 1e-9 / statistics.median(samples[f"{who} {name}"]) for who in ("pyzo", "torch"))
        yield f"  {name:28} {fused:9.3g} {eager:9.3g} {fused / eager:8.3g} x"


def conditions(device: str) -> str:
    """Versions, threads and instruction set, or the GPU."""
    try:
        version = importlib.metadata.version("pyzo")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed by pip"
    if torch.device(device).type == "cuda":
        place = torch.cuda.get_device_name(device)
    else:
        place = f"{torch.get_num_threads()} threads, {ops.isas()[0]}, {platform.machine()}"
    return f"pyzo {version}, torch {torch.__version__}, Python {platform.python_version()}, {place}"


def main(arguments: list[str]) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pyzo bench", description="Measure pyzo beside plain torch on this machine."
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu or cuda (default: {default})")
    parser.add_argument("--elements", type=int, help="weights in the tensor (default: 2^24 on a CPU, 2^27 on a GPU)")
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long to measure (default: 60)")
    options = parser.parse_args(arguments)
    try:
        device = torch.empty(0, device=options.device).device
    except (AssertionError, RuntimeError) as error:
        parser.error(f"--device: expected a device of this torch, got {options.device!r} ({error})")
    if device.type not in ELEMENTS:
        parser.error(f"--device: expected cpu or cuda, got {options.device!r}")
    elements = ELEMENTS[device.type] if options.elements is None else options.elements
    if elements < 1:
        parser.error(f"--elements: expected at least 1, got {elements}")
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds: expected a positive number, got {options.seconds}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose stream the events of the timing are on
    print(f"{elements:,} weights in one tensor, 10^9 weights/s\n{'':30} {'pyzo':>9} {'torch':>9} {'ratio':>10}")
    for dtype in DTYPES:
        for line in lines(dtype, elements, options.device, options.seconds / len(DTYPES)):
            print(line, flush=True)
    print("torch: each tensor as MeZO and torch.optim write it (pyzo/baselines.py); restore and update are two sweeps")
    print("there and one pass of pyzo, which rounds bfloat16 stochastically and keeps its state in float32.")
    print(conditions(options.device))
    return 0
