"""One of the processes of test_converted_models.py: `python ranks.py RANK WORLD FOLDER` saves averaged gradients."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from families import batch_of, small
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pyzo


def gradients_of(rank: int, wrap: bool = False) -> dict[str, Tensor]:
    """Of a converted model on the rank's batch, verified on its first forward pass."""
    model = small("llama")
    pyzo.convert(model)
    network: nn.Module = DistributedDataParallel(model) if wrap else model
    for _ in range(2):
        network.zero_grad()
        network(**batch_of("llama", 2 + rank))["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    torch.save(gradients_of(rank, wrap=True), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
