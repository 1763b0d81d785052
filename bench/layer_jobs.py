"""Layers as people write them in plain torch beside pyzo's: what is computed, on which tensors, at which sizes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bench import eager_layers
from pyzo import nn, ops

Call = Callable[..., Tensor]
BITS = (1, 2, 3, 4)
P = 0.1  # of dropout
RANK, SCALE = 16, 2.0  # of adapters


@dataclass(frozen=True)
class Sizes:
    """How large the tensors are.

    Attributes:
        elements: of layers that work element by element.
        norms: rows and columns of norms; under torch.compile the first alone is measured.
        tokens, hidden, intermediate: of linear layers; intermediate is the width inside an MLP.
        shrink: tokens, hidden and intermediate are divided by this in 16 bits.
    """

    elements: int
    norms: tuple[tuple[int, int], ...]
    tokens: int
    hidden: int
    intermediate: int
    shrink: int = 1

    def linear(self, dtype: torch.dtype) -> tuple[int, int, int]:
        """tokens, hidden, intermediate."""
        by = self.shrink if dtype.itemsize == 2 else 1
        return self.tokens // by, self.hidden // by, self.intermediate // by


DRY = Sizes(elements=1 << 10, norms=((4, 24),), tokens=8, hidden=16, intermediate=24)
CPU = Sizes(elements=1 << 23, norms=((4096, 768), (2048, 4096)), tokens=1024, hidden=1024, intermediate=2752, shrink=2)
GPU = Sizes(elements=1 << 30, norms=((1 << 20, 768), (1 << 18, 4096)), tokens=1 << 14, hidden=4096, intermediate=11008)


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
        random: whether every call draws anew, so that no two results are alike.
        compile: whether the baseline is measured under torch.compile too (once per layer: compiling takes long).
    """

    what: str
    config: Mapping[str, object]
    inputs: tuple[Tensor, ...]
    eager: Call
    pyzo: Mapping[str, Way]
    others: Mapping[str, Call] = field(default_factory=dict)
    faster_backward: tuple[str, ...] = ()
    random: bool = False
    compile: bool = True


def leaf(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers that get a gradient."""
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_()


def matrix(rows: int, columns: int, *, dtype: torch.dtype, device: str) -> Tensor:
    """A weight that keeps the size of what it multiplies; it gets a gradient."""
    return (torch.randn(rows, columns, dtype=dtype, device=device) * columns**-0.5).requires_grad_()


def activations(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Job]:
    """Every function with its exact derivative; GELU and SiLU with codes of 1 to 4 bits and from their output too."""
    for function in ops.FUNCTIONS:
        ways = {"exact": Way(partial(ops.activation, function=function), 2, 3)}
        paper = {"gelu": nn.ReGELU2, "silu": nn.ReSiLU2}.get(function)
        if paper is not None:
            ways[paper.__name__] = Way(paper(), 2, 2, codes=2 / 8)
            for bits in BITS:
                ways[f"{bits}-bit"] = Way(nn.FewBitActivation(function, bits), 2, 2, codes=bits / 8)
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


def norms(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Job]:
    """LayerNorm and RMSNorm, with parameters and without, which backward takes from the output, or from the input."""
    for rows, columns in sizes.norms:
        first = (rows, columns) == sizes.norms[0]
        for affine in (True, False):
            for kind, eps, eager in (
                (nn.MSLayerNorm, 1e-5, functional.layer_norm),
                (nn.MSRMSNorm, 1e-6, functional.rms_norm),
            ):
                x = leaf(rows, columns, dtype=dtype, device=device)
                module = kind(columns, eps=eps, affine=affine, device=device, dtype=dtype)
                parameters = tuple(module.parameters())
                with torch.no_grad():
                    for parameter in parameters:
                        parameter.normal_(1.0, 0.1)
                from_input = partial(ops.norm, eps=eps, centered=kind.centered, from_input=True)
                others = {"HF lines": eager_layers.hf_rms_norm} if affine and kind is nn.MSRMSNorm else {}
                yield Job(
                    eager.__name__,
                    {"rows": rows, "columns": columns, "affine": affine},
                    (x, *parameters),
                    lambda x, *parameters, eager=eager, eps=eps: eager(x, x.shape[-1:], *parameters, eps=eps),
                    {
                        "from output": Way(lambda x, *_, module=module: module(x), 2, 3),
                        "from input": Way(from_input, 2, 3),
                    },
                    others,
                    compile=first,
                )


def gates(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Job]:
    """Gated products alone."""
    for what, eager, module in (
        ("swiglu", eager_layers.swiglu, nn.SwiGLU()),
        ("geglu", eager_layers.geglu, nn.GEGLU()),
    ):
        inputs = tuple(leaf(sizes.elements // 1024, 1024, dtype=dtype, device=device) for _ in range(2))
        yield Job(what, {"elements": sizes.elements}, inputs, eager, {"exact": Way(module, 3, 5)})


def recomputed(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Job]:
    """Linear layers behind a gate or an activation, whose input is recomputed in backward."""
    tokens, hidden, intermediate = sizes.linear(dtype)
    config = {"tokens": tokens, "in": intermediate, "out": hidden}
    gate, up = (leaf(tokens, intermediate, dtype=dtype, device=device) for _ in range(2))
    weight = matrix(hidden, intermediate, dtype=dtype, device=device)
    swiglu = nn.SwiGLU()
    ways = {
        "gate_linear": Way(ops.gate_linear),
        "gate, linear": Way(lambda gate, up, weight: functional.linear(swiglu(gate, up), weight)),
    }
    yield Job("swiglu linear", config, (gate, up, weight), eager_layers.swiglu_linear, ways)
    ways = {"activation_linear": Way(ops.activation_linear)}
    yield Job("gelu linear", config, (gate, weight), eager_layers.gelu_linear, ways)


def dropouts(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Job]:
    """Dropout alone."""
    x = leaf(sizes.elements, dtype=dtype, device=device)
    eager = partial(functional.dropout, p=P)
    ways = {"seeded": Way(nn.SeededDropout(P), 2, 2)}
    yield Job("dropout", {"elements": sizes.elements, "p": P}, (x,), eager, ways, random=True)


def adapters(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Job]:
    """A frozen linear layer with a low-rank adapter, with and without dropout."""
    tokens, hidden, _ = sizes.linear(dtype)
    weight = matrix(hidden, hidden, dtype=dtype, device=device).detach()
    x = leaf(tokens, hidden, dtype=dtype, device=device)
    a = matrix(RANK, hidden, dtype=dtype, device=device)
    b = matrix(hidden, RANK, dtype=dtype, device=device)
    for p in (0.0, P):
        config = {"tokens": tokens, "in": hidden, "out": hidden, "rank": RANK, "p": p}
        eager = partial(eager_layers.lora_linear, weight=weight, scale=SCALE, p=p)
        ours = Way(lambda x, a, b, p=p: ops.lora_linear(x, weight, None, a, b, SCALE, p))
        yield Job("lora linear", config, (x, a, b), eager, {"lora_linear": ours}, random=p > 0)


FAMILIES: tuple[Callable[[Sizes, torch.dtype, str], Iterator[Job]], ...] = (
    activations,
    norms,
    gates,
    recomputed,
    dropouts,
    adapters,
)


def jobs(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Job]:
    """The jobs of all families, each made when its turn comes."""
    for family in FAMILIES:
        yield from family(sizes, dtype, device)
