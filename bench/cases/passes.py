"""Throughput of every pass against MeZO's eager line and a loop that only moves the bytes, on the same tensors."""

from collections.abc import Callable

import torch

from bench.cases import shapes
from bench.harness import Recorder, against, speedup, summary
from bench.pass_kinds import DISTRIBUTIONS, PassKinds
from pyzo import baselines
from pyzo.timing import Provider, Samples, interleave

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Least ratio to the eager line `p.data = p.data + c * z * eps`, by what the pass does (DESIGN.md section 9).
TARGETS = {
    ("normal", "perturb", "float32"): 14.0,
    ("normal", "perturb", "bfloat16"): 14.0,
    ("normal", "restore+update stochastic", "bfloat16"): 8.0,
    ("rademacher", "restore+update stochastic", "bfloat16"): 20.0,
}
# Least share of the speed of `p.add_(c)`, which only moves the bytes.
SHARES = {("rademacher", "perturb", "float32"): 0.9, ("rademacher", "perturb", "bfloat16"): 0.9}
SEED, EPS = 1, 1e-3


def run(recorder: Recorder) -> None:
    """Adds the rows of all tensor lists and dtypes."""
    lists = {"one tensor": shapes.one(1 << (12 if recorder.dry_run else 26)), "MiniLM": shapes.minilm()}
    if recorder.dry_run:
        lists["MiniLM"] = [(3,), (65,), (17, 12)]
    for name, sizes in lists.items():
        for dtype in DTYPES:
            compare(recorder, name, sizes, dtype, repeats=3 if recorder.dry_run else 15)


def compare(recorder: Recorder, name: str, sizes: list[shapes.Shape], dtype: torch.dtype, *, repeats: int) -> None:
    """Adds the rows of one tensor list: the eager lines, the ceiling and all passes, interleaved."""
    torch.manual_seed(0)
    tensors = [torch.empty(size, dtype=dtype, device=recorder.device).normal_(0, 0.02) for size in sizes]
    calls: dict[tuple[str, str], Callable[[], object]] = {
        ("eager", "perturb"): lambda: baselines.eager_perturb_(tensors, EPS, 1.0, SEED),
        ("eager", "update"): lambda: baselines.eager_update_(tensors, lr=1e-6, coefficients=[1.0], seeds=[SEED]),
        ("eager foreach", "perturb"): lambda: baselines.foreach_perturb_(tensors, EPS, 1.0, SEED),
        ("torch add_", "ceiling"): lambda: [tensor.add_(1e-5) for tensor in tensors],
    }
    for distribution in DISTRIBUTIONS:
        for what, call in PassKinds(tensors, distribution=distribution).calls().items():
            calls[f"pyzo {distribution}", what] = call
    samples = interleave(
        [Provider(f"{provider}/{what}", call) for (provider, what), call in calls.items()],
        repeats=repeats,
        device=recorder.device,
    )
    by_call = {key: samples["/".join(key)] for key in calls}
    config = {
        "tensors": name,
        "count": len(sizes),
        "elements": shapes.elements(sizes),
        "dtype": str(dtype).removeprefix("torch."),
    }
    for key in calls:
        record(recorder, *key, config, by_call)


def record(
    recorder: Recorder, provider: str, what: str, config: dict[str, object], samples: dict[tuple[str, str], Samples]
) -> None:
    """Adds the row of one provider: its times, its ratio to the eager line and its share of the ceiling."""
    mine = samples[provider, what]
    numbers: dict[str, object] = summary(mine)
    numbers["elements_per_s"] = config["elements"] / numbers["median_s"]
    numbers["ceiling_share"] = speedup(samples["torch add_", "ceiling"], mine)
    if provider.startswith("pyzo"):
        distribution = provider.split()[1]
        config = {
            **config,
            "distribution": distribution,
            "rounding": what.split()[-1] if "update" in what else "nearest",
        }
        ratio = {"to": "eager perturb", **speedup(samples["eager", "perturb"], mine)}
        numbers["ratio"] = ratio
        if what.startswith("restore+update"):  # MeZO needs two sweeps for it
            work = [a + b for a, b in zip(samples["eager", "perturb"], samples["eager", "update"], strict=True)]
            numbers["ratio_same_work"] = {"to": "eager restore and update", **speedup(work, mine)}
        name = (distribution, what, str(config["dtype"]))
        if name in TARGETS:
            numbers |= against(TARGETS[name], ratio["of_medians"])
        elif name in SHARES:
            numbers |= against(SHARES[name], numbers["ceiling_share"]["of_medians"])
    recorder.add(what, provider, config, **numbers)
