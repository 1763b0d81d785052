"""Times several ways to do a job in turn, so that what disturbs the machine disturbs all of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Samples = list[float]


@dataclass(frozen=True)
class Provider:
    """One way to do a job: pyzo's, a baseline's, or a limit of the machine."""

    name: str
    call: Callable[[], object]


def interleave(
    providers: Sequence[Provider], *, repeats: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, Samples]:
    """Seconds of every call: `repeats` rounds, each running all providers once, the first one moving on every round.

    What disturbs the machine for longer than a call disturbs all providers alike, so ratios within a round are paired.
    CUDA calls are timed by events on the current stream; no L2 flush, so sizes must be several times the cache.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    names = [provider.name for provider in providers]
    if len(set(names)) != len(names):
        raise ValueError(f"providers: expected distinct names, got {names}")
    timed = _timed_by_events if torch.device(device).type == "cuda" else _timed_by_clock
    for _ in range(warmup):
        for provider in providers:
            provider.call()
    samples: dict[str, Samples] = {name: [] for name in names}
    for start in range(repeats):
        for k in range(len(providers)):
            provider = providers[(start + k) % len(providers)]
            samples[provider.name].append(timed(provider.call))
    return samples


def _timed_by_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _timed_by_events(call: Callable[[], object]) -> float:
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) * 1e-3
