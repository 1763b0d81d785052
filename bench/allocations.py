"""Counts the bytes torch's allocators hand out inside a call: outside the closure it runs, or alive at one time."""

import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

CLOSURE = "closure of the step"


@dataclass(frozen=True)
class Allocations:
    """What was allocated, freed or not: number of allocations, bytes of all together, bytes of the largest one."""

    count: int
    total_bytes: int
    largest_bytes: int


def marked(closure: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The closure, with its allocations marked as its own."""

    def run() -> torch.Tensor:
        with record_function(CLOSURE):
            return closure()

    return run


def outside_closure(call: Callable[[], object], *, device: str = "cpu") -> Allocations:
    """Allocations of `call` outside closures wrapped by `marked`.

    The source is torch.profiler's [memory] events, which every c10 allocator (CPU and CUDA) reports, from Python and
    from inside operators alike. What C++ code takes by malloc alone (argument lists) is not seen.
    """
    events, _ = _events(call, device)
    inside = [
        (event.start_ns(), event.end_ns())
        for event in events
        if event.name() == CLOSURE and event.end_ns() > event.start_ns()
    ]
    memory = [event for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    if not inside or not memory:
        raise RuntimeError(
            f"call: expected a marked closure and allocations in it, got {len(inside)} and {len(memory)}"
        )
    sizes = [e.nbytes() for e in memory if not any(start <= e.start_ns() <= end for start, end in inside)]
    return Allocations(count=len(sizes), total_bytes=sum(sizes), largest_bytes=max(sizes, default=0))


@dataclass(frozen=True)
class Alive:
    """Bytes allocated since a call began and not freed: the most at one time, and how many when it returned."""

    peak_bytes: int
    kept_bytes: int


def alive(call: Callable[[], object], *, device: str = "cpu") -> Alive:
    """What `call` holds above what was there before it; what it returns is alive when the count ends.

    On the CPU the source is torch.profiler's [memory] events, which do not tell of memory that was there before and is
    freed meanwhile; on CUDA the allocator's own statistics.
    """
    if torch.device(device).type == "cuda":
        gc.collect()  # or what is freed meanwhile would count against what is allocated
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        now, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        del result
        return Alive(peak_bytes=most - before, kept_bytes=now - before)
    events, result = _events(call, device)
    changes = [event for event in events if event.name() == "[memory]"]
    totals = list(itertools.accumulate((e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())), initial=0))
    del result
    return Alive(peak_bytes=max(totals), kept_bytes=totals[-1])


def _events(call: Callable[[], object], device: str) -> tuple[list[Any], object]:
    """What the profiler saw, and what the call returned."""
    cuda = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        result = call()
    return profiler.profiler.kineto_results.events(), result
