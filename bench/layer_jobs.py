"""Layers as people write them in plain torch beside pyzo's: what is computed, on which tensors, at which sizes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bench import eager_layers
from pyzo import nn, ops

Call = Callable[..., Tensor]
BITS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Sizes:
    """How large the tensors are.

    Attributes:
        elements: of layers that work element by element.
    """

    elements: int


DRY = Sizes(elements=1 << 10)
CPU = Sizes(elements=1 << 23)
GPU = Sizes(elements=1 << 30)


@dataclass(frozen=True)
class Way:
    """How pyzo computes a layer, and what its kernels must move per element of the output.

    Attributes:
        call: takes the inputs of its job.
        forward, backward: tensors of the output's size that are read or written; 0 where products of matrices decide.
        codes: bytes on top of that which forward writes and backward reads.
    """

    call: Call
    forward: float = 0
    backward: float = 0
    codes: float = 0

    def moved(self, part: str, itemsize: int) -> float:
        """Bytes per element of the output that a part must move; 0 where that does not decide its time."""
        tensors = {"forward": self.forward, "backward": self.backward}.get(part, self.forward + self.backward)
        codes = self.codes * (1 if part in ("forward", "backward") else 2)
        return tensors * itemsize + codes if tensors else 0


@dataclass(frozen=True)
class Job:
    """One layer on one set of tensors.

    Attributes:
        what: its name.
        config: its conditions.
        inputs: tensors that get gradients, in the order in which every call takes them.
        eager: what it is measured against, in plain torch.
        pyzo: pyzo's ways by name.
        others: further baselines by name.
        faster_backward: names of the ways whose backward pass has to be faster than the eager one.
        compile: whether the baseline is measured under torch.compile too (once per layer: compiling takes long).
    """

    what: str
    config: Mapping[str, object]
    inputs: tuple[Tensor, ...]
    eager: Call
    pyzo: Mapping[str, Way]
    others: Mapping[str, Call] = field(default_factory=dict)
    faster_backward: tuple[str, ...] = ()
    compile: bool = True


def leaf(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers that get a gradient."""
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_()


def activations(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Job]:
    """Every function with its exact derivative; GELU and SiLU with codes of 1 to 4 bits and from their output too."""
    for function in ops.FUNCTIONS:
        ways = {"exact": Way(partial(ops.activation, function=function), 2, 3)}
        paper = {"gelu": nn.ReGELU2, "silu": nn.ReSiLU2}.get(function)
        if paper is not None:
            ways[paper.__name__] = Way(paper(), 2, 2, codes=2 / 8)
            for bits in BITS:
                ways[f"{bits} bits"] = Way(nn.FewBitActivation(function, bits), 2, 2, codes=bits / 8)
            ways["output"] = Way(nn.OutputActivation(function), 2, 3, codes=1 / 8)
        x = leaf(sizes.elements, dtype=dtype, device=device)
        yield Job(
            function,
            {"elements": sizes.elements},
            (x,),
            eager_layers.ACTIVATIONS[function],
            ways,
            faster_backward=(paper.__name__,) if paper else (),
        )


FAMILIES: tuple[Callable[[Sizes, torch.dtype, str], Iterator[Job]], ...] = (activations,)


def jobs(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Job]:
    """The jobs of all families, each made when its turn comes."""
    for family in FAMILIES:
        yield from family(sizes, dtype, device)
