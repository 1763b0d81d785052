"""Bytes per element that layers keep, with the linear after them: the table of docs/low-memory.md, measured."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzo.memory import account
from pyzo.nn import (
    GEGLU,
    ActivationLinear,
    FewBitActivation,
    GatedLinear,
    GatedLoRALinear,
    LoRALinear,
    MSLayerNorm,
    MSRMSNorm,
    OutputActivation,
    ReGELU2,
    ReSiLU2,
    SeededDropout,
    SwiGLU,
)

TOKENS, WIDTH, OUT, RANK = 32, 256, 16, 1
Layer = Callable[..., Tensor]


def more_of_a_mask() -> int:
    """Bytes that a mask of plain torch takes here beyond 1; on the CPU it may have the dtype of the input."""
    x = torch.ones(WIDTH, dtype=torch.bfloat16, requires_grad=True) * 1
    return account(lambda: F.dropout(x, 0.5)).nbytes // WIDTH - 1


MASK = more_of_a_mask()


def llama_norm(x: Tensor) -> Tensor:
    """As Hugging Face writes it, with a trained weight."""
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return torch.ones(WIDTH, dtype=x.dtype, requires_grad=True) * normalised.to(x.dtype)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), *(torch.ones(WIDTH, dtype=x.dtype, requires_grad=True) for _ in range(2)))


def before(layer: Layer) -> Callable[[nn.Linear], Layer]:
    """The layer, then the linear."""
    return lambda linear: lambda *inputs: linear(layer(*inputs))


def recomputing(kind: type) -> Callable[[nn.Linear], Layer]:
    """One that has the linear inside, with its parameters."""

    def build(linear: nn.Linear) -> nn.Module:
        layer = kind(WIDTH, OUT, dtype=linear.weight.dtype)
        return layer.requires_grad_(linear.weight.requires_grad)

    return build


def adapter(linear: nn.Linear) -> Layer:
    a, b = (nn.Linear(*sizes, bias=False, dtype=torch.bfloat16) for sizes in ((WIDTH, RANK), (RANK, OUT)))
    return lambda x: linear(x) + b(a(F.dropout(x, 0.5)))


# By the first words of a row, or the layer that its third cell names: how many inputs, what runs, what the CPU adds.
PLAIN = {
    "GELU, SiLU, Mish": (1, before(F.gelu), 0),
    "norm then linears": (1, before(layer_norm), 0),
    "silu(gate) * up then linear": (2, before(lambda gate, up: F.silu(gate) * up), 0),
    "dropout then linear": (1, before(lambda x: F.dropout(x, 0.5)), MASK),
    "silu(gate) * up then frozen": (2, lambda linear: lambda g, u: adapter(linear)(F.silu(g) * u), MASK),
}
OWN = {
    "ActivationLinear": (1, recomputing(ActivationLinear)),
    "OutputActivation": (1, before(OutputActivation("gelu"))),
    "FewBitActivation": (1, before(FewBitActivation("mish", 2))),
    "ReGELU2": (1, before(ReGELU2())),
    "ReSiLU2": (1, before(ReSiLU2())),
    "MSLayerNorm": (1, before(MSLayerNorm(WIDTH, affine=True, dtype=torch.bfloat16))),
    "MSRMSNorm": (1, before(MSRMSNorm(WIDTH, affine=True, dtype=torch.bfloat16))),
    "GatedLinear": (2, recomputing(GatedLinear)),
    "SwiGLU": (2, before(SwiGLU())),
    "GEGLU": (2, before(GEGLU())),
    "ReSiLU2()(gate) * up": (2, before(lambda gate, up: ReSiLU2()(gate) * up)),
    "SeededDropout": (1, before(SeededDropout())),
    "GatedLoRALinear": (2, lambda linear: GatedLoRALinear(linear, RANK, dropout=0.5)),
}


def rows() -> list[list[str]]:
    """Cells: what is in the model, plain torch, layer, bytes of that, gradient."""
    text = (Path(__file__).parents[2] / "docs" / "low-memory.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def numbers(cell: str) -> list[float]:
    """Of "trained / frozen"; one number is of a frozen linear with an adapter."""
    return [float(n) for n in re.match(r"([\d.]+)(?: / ([\d.]+))?", cell).groups() if n]


def bytes_per_element(count: int, build: Callable[[nn.Linear], Layer], trained: bool) -> float:
    linear = nn.Linear(WIDTH, OUT, dtype=torch.bfloat16).requires_grad_(trained)
    layer = build(linear)
    inputs = [torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True) * 1 for _ in range(count)]
    return account(lambda: layer(*inputs), linear).nbytes / (TOKENS * WIDTH)


def assert_keeps(cell: str, count: int, build: Callable[[nn.Linear], Layer], more: float = 0.0) -> None:
    want = numbers(cell)
    got = [bytes_per_element(count, build, trained) for trained in ((True, False) if len(want) > 1 else (False,))]
    assert got == pytest.approx([n + more for n in want], abs=0.05)  # a number per row, a rank of 1, a seed


@pytest.mark.parametrize("row", PLAIN)
def test_plain_torch(row, one_thread):
    (cells,) = (cells for cells in rows() if cells[0].startswith(row))
    count, build, more = PLAIN[row]
    assert_keeps(cells[1], count, build, more)


def test_the_norm_of_llama(one_thread):
    (cells,) = (cells for cells in rows() if cells[0].startswith("norm"))
    assert_keeps(re.search(r"Llama's: (.*)\)", cells[1]).group(1), 1, before(llama_norm))


@pytest.mark.parametrize("name", OWN)
def test_layers(name, one_thread):
    (cells,) = (cells for cells in rows() if f"`{name}`" in cells[2])
    assert_keeps(cells[3], *OWN[name])


def test_adapters_beside_each_other(one_thread):
    """What a second adapter on the same input adds."""
    (cells,) = (cells for cells in rows() if "`LoRALinear`" in cells[2])
    assert cells[1].startswith("3 for each") and cells[3].startswith("0 beyond")

    def added(make: Callable[[nn.Linear], Layer]) -> float:
        def build(linear: nn.Linear, many: int) -> Layer:
            layers = [make(linear) for _ in range(many)]
            return lambda x: sum(layer(x) for layer in layers)

        one, two = (bytes_per_element(1, lambda linear, n=n: build(linear, n), False) for n in (1, 2))
        return two - one

    assert added(adapter) == pytest.approx(3 + MASK, abs=0.05)
    assert added(lambda linear: LoRALinear(linear, RANK, dropout=0.5)) == pytest.approx(0, abs=0.05)
