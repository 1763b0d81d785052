"""One of the processes of test_ranks.py: `python ranks.py RANK WORLD FOLDER` runs every scenario and saves its end."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from compare import copies, states
from models import METHODS, closure_of, cross_entropy, run_state, transformer
from torch import Tensor, nn

import pyzo
from pyzo.optim import ZOSGD

STEPS = 20
# Among them a method with state, one that chooses, one with several directions and one without finite differences.
SCENARIOS = ("sgd", "adam", "conservative", "one-sided", "forward")


def part(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """What a rank sees of the data: sequences of its own."""
    x = torch.randn(6 * world, 5, 4, generator=torch.Generator().manual_seed(5))
    y = torch.randint(0, 3, (6 * world,), generator=torch.Generator().manual_seed(6))
    return x[6 * rank : 6 * (rank + 1)], y[6 * rank : 6 * (rank + 1)]


def scenario(method: str, rank: int, world: int) -> dict[str, object]:
    model = transformer()
    x, y = part(rank, world)
    opt = METHODS[method](model, seed=9, store="snapshot", process_group=dist.group.WORLD)
    losses = []
    for _ in range(STEPS):
        opt.step(lambda: cross_entropy(model, x, y))
        losses.append(opt.last.losses)
    return {"weights": copies(model), "states": copies(states(opt)), "losses": torch.stack(losses)}


def stack() -> nn.Module:
    """Three layers and a head."""
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 3))


def hybrid(rank: int, world: int) -> dict[str, object]:
    """The first layer by ZO, the rest by backpropagation."""
    model, (x, y) = stack(), part(rank, world)
    zo = {"lr": 1e-2, "process_group": dist.group.WORLD}
    both = pyzo.hybrid(model, 1, zo, lambda params: torch.optim.SGD(params, lr=0.1))
    losses = [both.step(lambda: cross_entropy(model, x, y)) for _ in range(STEPS)]
    return {"weights": copies(model), "losses": torch.stack(losses)}


def skip(rank: int) -> dict[str, object]:
    """One rank's loss is not finite: all skip."""
    model = transformer()
    opt = METHODS["adam"](model, seed=9, process_group=dist.group.WORLD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step(lambda: closure_of(model)() * (float("nan") if rank == 1 else 1.0))
    opt.step(closure_of(model))
    return {"weights": copies(model), "run": run_state(opt)}


def message(*arguments: object, **keywords: object) -> str:
    """What an optimizer with these arguments refuses to be made with."""
    try:
        ZOSGD(*arguments, process_group=dist.group.WORLD, **keywords)
    except ValueError as error:
        return str(error)
    return "accepted"


def alone() -> list[str]:
    """The warnings of an optimizer that was not told of the other ranks."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ZOSGD(transformer())
    return [str(w.message) for w in seen]


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    names = list(transformer().named_parameters())
    found = {
        "scenarios": {method: scenario(method, rank, world) for method in SCENARIOS},
        "hybrid": hybrid(rank, world),
        "skip": skip(rank),
        "seeds": message(transformer(), seed=rank),
        "names": message([(f"{rank}.{name}", p) for name, p in names]),
        "alone": alone(),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
