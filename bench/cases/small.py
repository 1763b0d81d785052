"""Passes over many small tensors against the same passes over one tensor of as many elements."""

import torch

from bench.harness import Recorder, against, speedup, summary
from bench.pass_kinds import DISTRIBUTIONS, PassKinds
from pyzo.timing import Provider, interleave

DTYPES = (torch.float32, torch.bfloat16)
COUNT, ELEMENTS = 400, 1000
LIMIT = 3.0  # most times the time of one tensor (issue 8)
CALLS = 10  # in a sample: a call takes less than a clock is good for


def run(recorder: Recorder) -> None:
    """Adds the rows of all dtypes and distributions."""
    for dtype in DTYPES:
        for distribution in DISTRIBUTIONS:
            compare(recorder, dtype, distribution, repeats=3 if recorder.dry_run else 101)


def compare(recorder: Recorder, dtype: torch.dtype, distribution: str, *, repeats: int) -> None:
    """Adds the rows of every kind of pass, and of torch's `add_` over the same tensors."""
    torch.manual_seed(0)
    lists = {name: [torch.randn(n).to(dtype) * 0.02 for _ in range(k)] for name, n, k in shapes()}
    calls = {}
    for name, tensors in lists.items():
        for what, call in PassKinds(tensors, distribution=distribution).calls().items():
            calls[what, name] = call
        calls["torch add_", name] = lambda tensors=tensors: [tensor.add_(1e-5) for tensor in tensors]
        calls["torch foreach_add_", name] = lambda tensors=tensors: torch._foreach_add_(tensors, 1e-5)
    providers = [
        Provider("/".join(key), lambda call=call: [call() for _ in range(CALLS)]) for key, call in calls.items()
    ]
    samples = interleave(providers, repeats=repeats, device=recorder.device)
    for what, name in calls:
        mine = [seconds / CALLS for seconds in samples[f"{what}/{name}"]]
        config = {"tensors": name, "dtype": str(dtype).removeprefix("torch."), "distribution": distribution}
        numbers: dict[str, object] = summary(mine)
        numbers["elements_per_s"] = COUNT * ELEMENTS / numbers["median_s"]
        if name == "many":
            ratio = speedup(samples[f"{what}/many"], samples[f"{what}/one"])
            numbers["ratio"] = {"to": "time of one tensor", **ratio}
            if not what.startswith("torch"):
                numbers |= against(LIMIT, ratio["of_medians"], at_least=False)
        provider = "torch" if what.startswith("torch") else "pyzo"
        recorder.add(what, provider, {**config, "count": dict((n, k) for n, _, k in shapes())[name]}, **numbers)


def shapes() -> tuple[tuple[str, int, int], ...]:
    """Name, elements and number of tensors."""
    return (("one", COUNT * ELEMENTS, 1), ("many", ELEMENTS, COUNT))
