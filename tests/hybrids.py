"""What tests of hybrid steps share: a small network with a list of four layers, and its data."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH = 16


class Layer(nn.Module):
    """A pre-norm residual block with dropout."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(functional.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """From 4 numbers to 3 classes through four layers."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.enter = nn.Linear(4, 8)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h))


def net(dropout: float = 0.0) -> Net:
    """The same weights at every call."""
    torch.manual_seed(0)
    return Net(dropout)


def data() -> tuple[Tensor, Tensor]:
    """Inputs [BATCH, 4] and their classes, which can be learnt."""
    x = torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(1))
    return x, x[:, 0].gt(0).long() + x[:, 1].gt(0.5).long()


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    x, y = data()
    return lambda: functional.cross_entropy(model(x), y)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
