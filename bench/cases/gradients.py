"""How close gradients with coded activations are to exact ones: cosines of whole-model gradients, for each codebook."""

import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench import gradient_models
from bench.gradient_models import Subject
from bench.harness import Recorder, quantile
from pyzo import nn as layers
from pyzo import ops

BITS = (1, 2, 3, 4)
SEEDS = (0, 1, 2)  # of the Llama-shaped model
DTYPES = (torch.float32, torch.bfloat16)  # the second under autocast
Gradient = dict[str, Tensor]


class Exact(nn.Module):
    """pyzo's activation with its exact derivative: its distance from torch's is rounding alone."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return ops.activation(x, self.function)


@dataclass(frozen=True)
class Substitute:
    """What stands for a model's own activation; codebook and bits are None where there are no codes."""

    provider: str
    module: nn.Module
    codebook: str | None = None
    bits: int | None = None


@dataclass(frozen=True)
class Likeness:
    """Of two gradients of one loss: the cosine, the length of the one in units of the other, cosines by layer."""

    cosine: float
    length: float
    by_layer: dict[str, float]


def run(recorder: Recorder) -> None:
    """Adds the rows of both models."""
    data = gradient_models.texts(recorder.dry_run)
    if recorder.dry_run:
        compare(recorder, data.name, [gradient_models.minilm(data, batches=1, batch=2, probe=16)])
        compare(recorder, data.name, [gradient_models.llama(data, 0, batches=1, steps=1, batch=2, layers=1)])
        return
    compare(recorder, data.name, [gradient_models.minilm(data, batches=5)])
    compare(recorder, data.name, (gradient_models.llama(data, seed, batches=5, steps=200) for seed in SEEDS))


def substitutes(function: str, dtype: torch.dtype) -> Iterator[Substitute]:
    """Everything that is compared in a dtype: codes in float32 alone."""
    yield Substitute("pyzo exact", Exact(function))
    yield Substitute("pyzo output", layers.OutputActivation(function))
    if dtype is not torch.float32:  # many times slower where the processor has no instructions for it
        return
    yield Substitute("pyzo 2-bit", layers.FewBitActivation(function, 2, "paper"), "paper", 2)
    for codebook in ("optimal", "derivative"):
        for bits in BITS:
            yield Substitute(f"pyzo {bits}-bit", layers.FewBitActivation(function, bits, codebook), codebook, bits)


def compare(recorder: Recorder, data: str, subjects: Iterable[Subject]) -> None:
    """Adds the rows of one model, over all batches of all its seeds.

    In bfloat16 each way has two rows: against the model's own activation in bfloat16, and against it in float32.
    """
    found: dict[tuple[str, str | None, int | None, str, str], list[Likeness]] = {}
    losses: list[float] = []
    seeds = 0
    for subject in subjects:
        seeds += 1
        for loss in subject.losses:
            with torch.no_grad():
                losses.append(loss().item())
            for key, likeness in likenesses(subject, loss):
                found.setdefault(key, []).append(likeness)
    for (provider, codebook, bits, dtype, reference), likeness in found.items():
        cosines = [each.cosine for each in likeness]
        parts = likeness[0].by_layer
        recorder.add(
            "gradient cosine",
            provider,
            {
                "model": subject.name,
                "function": subject.function,
                "codebook": codebook,
                "bits": bits,
                "dtype": dtype,
                "reference": reference,
                "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
                "data": data,
                "seeds": seeds,
                "batches": len(subject.losses),
                **subject.facts,
            },
            value=statistics.fmean(cosines),
            unit="cosine",
            least=min(cosines),
            p20=quantile(cosines, 0.2),
            p80=quantile(cosines, 0.8),
            n=len(cosines),
            length=statistics.fmean(each.length for each in likeness),
            by_layer={name: statistics.fmean(each.by_layer[name] for each in likeness) for name in parts},
            loss=statistics.fmean(losses),
        )


def likenesses(
    subject: Subject, loss: Callable[[], Tensor]
) -> Iterator[tuple[tuple[str, str | None, int | None, str, str], Likeness]]:
    """Each way's gradient of one batch beside exact ones, under provider, codebook, bits, dtype and what is exact."""
    own = getattr(subject.mlps()[0], subject.attribute)
    exact: dict[str, Gradient] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        subject.swap(own)
        mine = gradient(subject.model, loss, dtype)
        for reference, theirs in exact.items():
            yield ("eager", None, None, name, f"eager {reference}"), like(theirs, mine)
        exact[name] = mine
        for substitute in substitutes(subject.function, dtype):
            subject.swap(substitute.module)
            mine = gradient(subject.model, loss, dtype)
            for reference, theirs in exact.items():
                key = (substitute.provider, substitute.codebook, substitute.bits, name, f"eager {reference}")
                yield key, like(theirs, mine)
    subject.swap(own)


def gradient(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> Gradient:
    """Gradient of every parameter that has one; dtypes below float32 by autocast."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        value = loss()
    value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def like(theirs: Gradient, mine: Gradient) -> Likeness:
    """How alike two gradients are, summed in float64."""
    if theirs.keys() != mine.keys():
        raise ValueError(f"mine: expected gradients of the same parameters, got others: {theirs.keys() ^ mine.keys()}")
    products: dict[str, Tensor] = {}
    for name in theirs:
        a, b = theirs[name].double().flatten(), mine[name].double().flatten()
        layer = layer_of(name)
        products[layer] = products.get(layer, 0) + torch.stack([a @ b, a @ a, b @ b])
    whole = torch.stack(list(products.values())).sum(0)
    return Likeness(_cosine(whole), (whole[2] / whole[1]).sqrt().item(), {n: _cosine(p) for n, p in products.items()})


def layer_of(name: str) -> str:
    """The layer a parameter belongs to."""
    number = re.search(r"\blayers?\.(\d+)\.", name)
    return f"layer {number[1]}" if number else "embeddings" if "embed" in name else "head"


def _cosine(products: Tensor) -> float:
    """From a.b, a.a and b.b."""
    return (products[0] / (products[1] * products[2]).sqrt()).item()
