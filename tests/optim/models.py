"""What tests of the optimizers share: a small transformer with its data, every method by name, comparisons."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyzo import optim
from pyzo.estimators import OneSided, TwoSided
from pyzo.masks import Random

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT = {"store": "snapshot"}


@dataclass(frozen=True)
class Recipe:
    """A method: its optimizer with arguments that fit `Transformer`, and how often a step calls the closure."""

    optimizer: type[optim.ZOSGD] | type[optim.ZOSignSGD] | type[optim.ZOAdam] | type[optim.ZOConservativeSGD]
    calls: int
    arguments: dict[str, Any] = field(default_factory=dict)

    def __call__(self, params: Any, **changed: Any) -> optim.ZOSGD:
        return self.optimizer(params, **{"eps": 1e-2, "lr": 1e-2, **self.arguments, **changed})


METHODS = {
    "sgd": Recipe(optim.ZOSGD, 2),
    "sgd q=2": Recipe(optim.ZOSGD, 4, {"estimator": TwoSided(2)}),
    "one-sided": Recipe(optim.ZOSGD, 4, {"estimator": OneSided(3)}),
    "fzoo": Recipe(optim.ZOSGD, 4, {"estimator": OneSided(3, "std"), "distribution": "rademacher", "lr": 3e-3}),
    "momentum": Recipe(optim.ZOSGD, 2, {"momentum": 0.9, "dampening": 0.1, "lr": 3e-3}),
    "nesterov": Recipe(optim.ZOSGD, 2, {"momentum": 0.8, "nesterov": True, "lr": 3e-3}),
    "sign": Recipe(optim.ZOSignSGD, 2, {"lr": 3e-3}),
    "sign scalar": Recipe(optim.ZOSignSGD, 2, {"form": "scalar", "lr": 5e-3}),
    "adam": Recipe(optim.ZOAdam, 2, {"lr": 1e-2}),
    "adamw": Recipe(optim.ZOAdam, 2, {"lr": 1e-2, "decoupled": True, "betas": (0.8, 0.99)}),
    "conservative": Recipe(optim.ZOConservativeSGD, 5),
    "conservative one-sided": Recipe(optim.ZOConservativeSGD, 4, {"estimator": OneSided()}),
    "sparse adam": Recipe(optim.ZOAdam, 2, {"lr": 1e-2, "mask": Random(0.5, refresh=2)}),
    "forward": Recipe(optim.ForwardGradSGD, 1),
}
STATEFUL = ("momentum", "nesterov", "adam", "adamw", "sparse adam")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
methods = pytest.mark.parametrize("method", METHODS)
stateful = pytest.mark.parametrize("method", STATEFUL)


class Transformer(nn.Module):
    """One pre-norm block with one head of attention on [n, length, 4], then 3 classes: 323 weights in 6 tensors."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.enter = nn.Linear(4, 8, bias=False)
        self.norm = nn.LayerNorm(8, bias=False)
        self.qkv = nn.Linear(8, 24, bias=False)
        self.up = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + self.dropout((q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v)
        h = h + self.dropout(functional.gelu(self.up(h)))
        return self.head(h.mean(1))


DECAYED = ("enter.weight", "qkv.weight", "up.weight", "head.weight")


def transformer(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Transformer:
    """The same initial weights at every call; biases are not zero, so that decay would move them."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer(dropout)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Twelve sequences of 5 and their classes, which can be learnt."""
    x = torch.randn(12, 5, 4, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), x.mean(dim=(1, 2)).gt(0).long() + x[:, 0, 0].gt(0.5).long()


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(model(x).float(), y)


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    """The loss of a model of one dtype on `batch`."""
    x, y = batch(next(model.parameters()).dtype)
    return lambda: cross_entropy(model, x, y)


class Calls:
    """A closure that counts its calls and does something else at one of them."""

    def __init__(self, closure: Callable[[], Tensor], at: int, instead: Callable[[Tensor], Tensor]):
        self.closure, self.at, self.instead = closure, at, instead
        self.count = 0

    def __call__(self) -> Tensor:
        self.count += 1
        loss = self.closure()
        return self.instead(loss) if self.count == self.at else loss


def run_state(opt: torch.optim.Optimizer) -> dict[str, int]:
    """The counters of a run: seed, draw, applied, skipped."""
    return opt.state_dict()["pyzo"]["runs"][""]
