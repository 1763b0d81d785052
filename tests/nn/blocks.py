"""A small transformer-like model of every layer of pyzo.nn, and the same in plain torch where that is exact."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pyzo

WIDTH, INNER = 24, 40


class Block(nn.Module):
    """Norm, adapted linear with dropout, gated MLP, few-bit MLP, recomputing MLP; all with residuals."""

    def __init__(self) -> None:
        super().__init__()
        layers = pyzo.nn
        self.norms = nn.ModuleList([layers.MSRMSNorm(WIDTH, affine=True), layers.MSLayerNorm(WIDTH, affine=True)])
        self.plain = layers.MSLayerNorm(WIDTH)
        self.mix = layers.LoRALinear(nn.Linear(WIDTH, WIDTH), 3, dropout=0.25)
        nn.init.normal_(self.mix.lora_B.weight)
        self.dropout = layers.SeededDropout(0.25)
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = layers.GatedLinear(INNER, WIDTH)
        self.geglu, self.small = layers.GEGLU(), nn.Linear(INNER // 2, WIDTH)
        self.inner = nn.Linear(WIDTH, INNER)
        self.act, self.out = layers.ReGELU2("derivative"), layers.OutputActivation("silu")
        self.outer = nn.Linear(INNER, WIDTH)
        self.recompute = layers.ActivationLinear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.mix(self.norms[0](x)))
        y = self.norms[1](x)
        x = x + self.down(self.gate(y), self.up(y)) + self.small(self.geglu(self.gate(y)))
        inner = self.inner(self.plain(x))
        return x + self.outer(self.act(inner) + self.out(inner)) + self.recompute(inner)


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 1))


class Exact(nn.Module):
    """Norm and gated MLP, norm and MLP: layers of pyzo that are exact, or those of torch with the same parameters."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own, layers = own, pyzo.nn
        self.first = layers.MSRMSNorm(WIDTH, eps=1e-6, affine=True) if own else nn.RMSNorm(WIDTH, eps=1e-6)
        self.second = layers.MSLayerNorm(WIDTH, affine=True) if own else nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = (layers.GatedLinear if own else nn.Linear)(INNER, WIDTH)
        self.inner = nn.Linear(WIDTH, INNER)
        self.outer = (layers.ActivationLinear if own else nn.Linear)(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        gate, up = self.gate(y), self.up(y)
        x = x + (self.down(gate, up) if self.own else self.down(F.silu(gate) * up))
        inner = self.inner(self.second(x))
        return x + (self.outer(inner) if self.own else self.outer(F.gelu(inner)))


def data(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, WIDTH, generator=generator), torch.randn(rows, 5, 1, generator=generator)


def loss_of(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (network(x).float() - y).square().mean()


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def main(rank: int, world: int, folder: Path) -> None:
    """One process of data-parallel training: saves the gradients of one step."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    network = DistributedDataParallel(model())
    torch.manual_seed(rank)
    loss_of(network, *data(4, seed=rank)).backward()
    torch.save(gradients(network.module), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
