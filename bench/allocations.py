"""Counts the bytes torch's allocators hand out inside a call but outside the closure it runs."""

from collections.abc import Callable
from dataclasses import dataclass

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
    cuda = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
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
