"""Runs a function in a process of its own that has imported what it needs and computed nothing yet."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

# Imported once, by the process that all others are forked from: most of the time of a small measurement.
PRELOADED = ("bench.memory.measure", "bench.memory.imports")

Result = TypeVar("Result")


def apart(function: Callable[..., Result], *arguments: object) -> Result:
    """What the function returns; it and its arguments are picklable."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()
