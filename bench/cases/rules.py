"""Update pass of every rule against the same method in eager torch, on the same tensors, interleaved."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.cases import shapes
from bench.harness import Recorder, against, speedup, summary
from bench.pass_kinds import DISTRIBUTIONS, EPS, LR, PassKinds
from pyzo import baselines, ops
from pyzo.timing import Provider, Samples, interleave

DTYPES = (torch.float32, torch.bfloat16)
MANY = 4  # directions
TARGET = 8.0  # least ratio to the two eager sweeps that the pass replaces (issue 3)
SEED = 1


@dataclass(frozen=True)
class Method:
    """What is updated how: a rule with a number of directions, or the three updates of the conservative step."""

    name: str
    rule: str
    directions: int = 1
    updates: tuple[float, ...] = (1.0,)  # of one eager step, as multiples of lr


METHODS = (
    *(Method(rule, rule) for rule in ops.RULES),
    Method(f"sgd q={MANY}", "sgd", directions=MANY),
    Method("conservative", "sgd", updates=(1.0, -2.0, 1.0)),
)


def run(recorder: Recorder) -> None:
    """Adds the rows of all tensor lists, dtypes and distributions."""
    lists = {"one tensor": shapes.one(1 << (12 if recorder.dry_run else 25)), "MiniLM": shapes.minilm()}
    if recorder.dry_run:
        lists["MiniLM"] = [(3,), (65,), (17, 12)]
    for name, sizes in lists.items():
        for dtype in DTYPES:
            for distribution in DISTRIBUTIONS:
                compare(recorder, name, sizes, dtype, distribution, repeats=3 if recorder.dry_run else 7)


def compare(
    recorder: Recorder, name: str, sizes: list[shapes.Shape], dtype: torch.dtype, distribution: str, *, repeats: int
) -> None:
    """Adds the rows of one tensor list: the eager restore, and every method in eager torch and as a pass."""
    torch.manual_seed(0)
    tensors = [torch.empty(size, dtype=dtype, device=recorder.device).normal_(0, 0.02) for size in sizes]
    rounding = "stochastic" if dtype.itemsize == 2 else "nearest"
    config = {
        "tensors": name,
        "count": len(sizes),
        "elements": shapes.elements(sizes),
        "dtype": _name(dtype),
        "distribution": distribution,
    }
    eager: dict[str, Callable[[], object]] = {
        "restore": partial(baselines.eager_perturb_, tensors, EPS, 1.0, SEED, distribution)
    }
    fused: dict[tuple[str, torch.dtype | None], Callable[[], object]] = {}
    for method in METHODS:
        eager[method.name] = partial(eager_updates, tensors, method, {}, distribution)
        for state_dtype in state_dtypes(method, dtype):
            kinds = PassKinds(
                tensors,
                distribution=distribution,
                directions=method.directions,
                rule=method.rule,
                state_dtype=state_dtype or torch.float32,
            )
            call = kinds.conservative if method.name == "conservative" else kinds.restore_update
            fused[method.name, state_dtype] = partial(call, stochastic=rounding == "stochastic")
    providers = [Provider(f"eager {what}", call) for what, call in eager.items()]
    providers += [Provider(f"pyzo {what} {state}", call) for (what, state), call in fused.items()]
    samples = interleave(providers, repeats=repeats, device=recorder.device)

    for what in eager:
        recorder.add(
            what if what == "restore" else f"update {what}",
            f"eager {distribution}",
            {**config, "rounding": "nearest", "state": config["dtype"] if ops.STATES.get(what) else None},
            **timed(config, samples[f"eager {what}"]),
        )
    for what, state in fused:
        numbers = compared(config, samples, what, samples[f"pyzo {what} {state}"])
        numbers |= against(TARGET, numbers["ratio_same_work"]["of_medians"])
        recorder.add(
            f"restore+update {what}",
            f"pyzo {distribution}",
            {**config, "rounding": rounding, "state": _name(state) if state else None},
            **numbers,
        )


def state_dtypes(method: Method, dtype: torch.dtype) -> list[torch.dtype | None]:
    """What the rule's state is kept in, in turn; None for rules without state."""
    if not ops.STATES[method.rule]:
        return [None]
    return [torch.float32] if dtype.itemsize == 4 else [torch.float32, torch.bfloat16]


@torch.no_grad()
def eager_updates(tensors: list[torch.Tensor], method: Method, states: dict, distribution: str) -> None:
    """The updates of one step of the method; every one draws its directions anew."""
    for scale in method.updates:
        baselines.eager_update_(
            tensors,
            coefficients=[1.0] * method.directions,
            seeds=list(range(SEED, SEED + method.directions)),
            rule=method.rule,
            states=states,
            distribution=distribution,
            lr=scale * LR,
        )


def timed(config: dict[str, object], samples: Samples) -> dict[str, object]:
    """Times of a call, and elements per second."""
    numbers: dict[str, object] = summary(samples)
    return {**numbers, "elements_per_s": config["elements"] / numbers["median_s"]}


def compared(config: dict[str, object], samples: dict[str, Samples], what: str, mine: Samples) -> dict[str, object]:
    """The same for a pass, with its ratio to the eager update alone, and to the two sweeps it replaces."""
    update = samples[f"eager {what}"]
    both = [a + b for a, b in zip(samples["eager restore"], update, strict=True)]
    return {
        **timed(config, mine),
        "ratio": {"to": "eager update", **speedup(update, mine)},
        "ratio_same_work": {"to": "eager restore and update", **speedup(both, mine)},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
