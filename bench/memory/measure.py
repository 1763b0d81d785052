"""Measures one setting in this process: what one way keeps for backward and its peak, or the steps of all ways."""

import copy
import gc

import torch

from bench import allocations, heap
from bench.memory import products, ways
from bench.memory.settings import Setting
from pyzo.timing import Provider, Samples, interleave

Numbers = dict[str, object]


def memory(setting: Setting, way: str, device: str, backend: str) -> Numbers:
    """Bytes that are kept between forward and backward, and the most at one time, above the model with its gradients.

    Both are of torch's allocator. One step comes first: what is converted, compiled and allocated once is there then.
    """
    kind = products.widen(device)
    loss = ways.prepare(way, setting.model(device), setting.batch(device), backend=backend)
    loss().backward()
    kept = allocations.alive(loss, device=device).kept_bytes
    peak = allocations.alive(lambda: loss().backward(), device=device).peak_bytes
    numbers: Numbers = {"products": kind, "saved_bytes": kept, "peak_bytes": peak}
    if setting.per_layer and way != ways.COMPILE:  # which would compile four times more
        del loss
        numbers["units_per_layer"] = units_per_layer(setting, way, device)
    return numbers


def units_per_layer(setting: Setting, way: str, device: str) -> float:
    """What one more layer keeps for one more row, in [tokens, hidden] tensors of 16-bit numbers.

    Differences leave out what a model or a batch keeps once; two rows and one, with two layers and one.
    """

    def kept(layers: int, rows: int) -> int:
        loss = ways.prepare(way, setting.model(device, layers), setting.batch(device, rows))
        loss()  # converts the model
        gc.collect()
        return allocations.alive(loss, device=device).kept_bytes

    few, many = (kept(2, rows) - kept(1, rows) for rows in (1, 2))
    return (many - few) / (2 * setting.about.tokens(setting.size) * setting.size.width)


def steps(setting: Setting, present: tuple[str, ...], device: str, rounds: int, backend: str) -> tuple[str, Samples]:
    """Seconds of the forward and backward pass of every way in turn, and how products are computed.

    On the CPU the C library keeps freed memory, as in the case `layers`.
    """
    kind = products.widen(device)
    if torch.device(device).type == "cpu":
        heap.keep()
    stock, batch = setting.model(device), setting.batch(device)
    losses = {way: ways.prepare(way, copy.deepcopy(stock), batch, backend=backend) for way in present}
    providers = [Provider(way, lambda loss=loss: loss().backward()) for way, loss in losses.items()]
    return kind, interleave(providers, repeats=rounds, warmup=1 if device == "cpu" else 3, device=device)
