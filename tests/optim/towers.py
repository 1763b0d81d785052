"""What the tests of block-wise steps share: a stack of layers with something before and behind it, and its data."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Layer(nn.Module):
    """A residual layer with dropout and two linear maps."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.dropout(self.down(functional.gelu(self.up(h))))


class Tower(nn.Module):
    """enter, some layers, norm, head: classes of vectors [n, 4]."""

    def __init__(self, depth: int = 3, width: int = 8, dropout: float = 0.0):
        super().__init__()
        self.enter = nn.Linear(4, width)
        self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h))


BLOCKS = ["enter", "layers.0", "layers.1", "layers.2", "norm", "head"]  # of BlockWise("layer"), in this order


def tower(dtype: torch.dtype = torch.float32, **arguments: float) -> Tower:
    """The same weights at every call."""
    model = Tower(**arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    """Cross-entropy on 16 vectors, in float32."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    y = x.sum(1).gt(0).long() + x[:, 0].gt(0.5).long()
    dtype = next(model.parameters()).dtype
    return lambda: functional.cross_entropy(model(x.to(dtype)).float(), y)
