"""What pyzo is measured against, in plain torch as people write it: eager MeZO, its foreach form, backpropagation."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


@torch.no_grad()
def eager_perturb_(parameters: Iterable[Tensor], eps: float, scale: float, seed: int) -> None:
    """theta <- theta + scale eps z, z ~ N(0, I) drawn anew from `seed` (MeZO, arXiv 2305.17333, algorithm 1)."""
    torch.manual_seed(seed)
    for p in parameters:
        z = torch.normal(mean=0.0, std=1.0, size=p.shape, dtype=p.dtype, device=p.device)
        p.data = p.data + scale * z * eps


@torch.no_grad()
def eager_update_(
    parameters: Iterable[Tensor], *, lr: float, coefficient: float, seed: int, weight_decay: float = 0.0
) -> None:
    """theta <- theta - lr (coefficient z + weight_decay theta), with the z that `eager_perturb_` draws from `seed`."""
    torch.manual_seed(seed)
    for p in parameters:
        z = torch.normal(mean=0.0, std=1.0, size=p.shape, dtype=p.dtype, device=p.device)
        p.data = p.data - lr * (coefficient * z + weight_decay * p.data)


@torch.no_grad()
def foreach_perturb_(parameters: Iterable[Tensor], eps: float, scale: float, seed: int) -> None:
    """`eager_perturb_` with one horizontally fused addition; every z is alive at once, as large as the weights."""
    weights, directions = _weights_and_directions(parameters, seed)
    torch._foreach_add_(weights, directions, alpha=scale * eps)


@torch.no_grad()
def foreach_update_(
    parameters: Iterable[Tensor], *, lr: float, coefficient: float, seed: int, weight_decay: float = 0.0
) -> None:
    """`eager_update_` with horizontally fused operations."""
    weights, directions = _weights_and_directions(parameters, seed)
    if weight_decay:
        torch._foreach_mul_(weights, 1.0 - lr * weight_decay)
    torch._foreach_add_(weights, directions, alpha=-lr * coefficient)


class EagerMeZO:
    """MeZO's training step: perturb, forward, perturb back twice as far, forward, restore, update.

    Args:
        params: parameters, or groups {"params": ..., "lr": ..., "eps": ...} as torch.optim takes them.
        lr, eps, weight_decay: of the groups that do not set their own.
        seed: of the NumPy generator that draws the seed of each step.
        foreach: use torch's horizontally fused operations.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        foreach: bool = False,
    ):
        given = list(params)
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        self.groups = [{**defaults, **group, "params": list(group["params"])} for group in groups]
        self._seeds = np.random.default_rng(seed)
        self._perturb, self._update = (
            (foreach_perturb_, foreach_update_) if foreach else (eager_perturb_, eager_update_)
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step; returns the mean of the two probe losses."""
        seeds = [int(seed) for seed in self._seeds.integers(10**9, size=len(self.groups))]
        self._move(1.0, seeds)
        plus = closure()
        self._move(-2.0, seeds)
        minus = closure()
        self._move(1.0, seeds)
        difference = (plus - minus).item()
        for group, seed in zip(self.groups, seeds, strict=True):
            self._update(
                group["params"],
                lr=group["lr"],
                coefficient=difference / (2 * group["eps"]),
                seed=seed,
                weight_decay=group["weight_decay"],
            )
        return (plus + minus) / 2

    def _move(self, scale: float, seeds: list[int]) -> None:
        for group, seed in zip(self.groups, seeds, strict=True):
            self._perturb(group["params"], group["eps"], scale, seed)


def backprop_step(optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> Tensor:
    """One first-order step of any torch optimizer; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = closure()
    loss.backward()
    optimizer.step()
    return loss.detach()


def _weights_and_directions(parameters: Iterable[Tensor], seed: int) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(seed)
    weights = [p.data for p in parameters]
    return weights, [torch.normal(mean=0.0, std=1.0, size=w.shape, dtype=w.dtype, device=w.device) for w in weights]
