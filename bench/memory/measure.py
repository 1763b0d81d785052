"""Measures one setting in this process: what one way keeps for backward and its peak, or the steps of all ways."""

import copy
from collections.abc import Sequence
from functools import partial

import torch

from bench import allocations, heap
from bench.memory import products, ways
from bench.memory.settings import Setting
from pyzo.timing import Provider, Samples, interleave

Numbers = dict[str, object]


def memory(setting: Setting, way: str, device: str, backend: str) -> Numbers:
    """Bytes that are kept between forward and backward, and the most at one time, above the model with its gradients.

    Both are of torch's allocator. A step on one row comes first, for torch.compile on all of them: what is converted,
    compiled and allocated once is there then.
    """
    kind = products.widen(device)
    model, batch = setting.model(device), setting.batch(device)
    loss = ways.prepare(way, model, backend=backend)
    loss(batch if way == ways.COMPILE else setting.batch(device, 1)).backward()
    kept = allocations.alive(lambda: loss(batch), device=device).kept_bytes
    peak = allocations.alive(lambda: loss(batch).backward(), device=device).peak_bytes
    numbers: Numbers = {"products": kind, "saved_bytes": kept, "peak_bytes": peak}
    if setting.per_layer and way != ways.COMPILE:  # which would compile four times more
        numbers["units_per_layer"] = units_per_layer(setting, way, device)
    return numbers


def units_per_layer(setting: Setting, way: str, device: str) -> float:
    """What one more layer keeps for one more row, in [tokens, hidden] tensors of 16-bit numbers.

    Differences leave out what a model or a batch keeps once: of two layers and one, on two rows and one.
    """

    def one_more_row(layers: int) -> int:
        loss = ways.prepare(way, setting.model(device, layers))
        one, two = (setting.batch(device, rows) for rows in (1, 2))
        loss(one)  # converts the model
        few, many = (allocations.alive(partial(loss, batch), device=device).kept_bytes for batch in (one, two))
        return many - few

    tokens = setting.about.tokens(setting.size)
    return (one_more_row(2) - one_more_row(1)) / (2 * tokens * setting.size.width)


def steps(setting: Setting, present: Sequence[str], device: str, rounds: int, backend: str) -> tuple[str, Samples]:
    """How products are computed, and seconds of the forward and backward pass of every way in turn.

    On the CPU the C library keeps freed memory, as in the case `layers`.
    """
    kind = products.widen(device)
    cpu = torch.device(device).type == "cpu"
    if cpu:
        heap.keep()
    stock, batch = setting.model(device), setting.batch(device)
    losses = {way: ways.prepare(way, copy.deepcopy(stock), backend=backend) for way in present}
    providers = [Provider(way, lambda loss=loss: loss(batch).backward()) for way, loss in losses.items()]
    return kind, interleave(providers, repeats=rounds, warmup=1 if cpu else 3, device=device)
