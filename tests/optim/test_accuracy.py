"""Momentum and Adam against torch.optim: both round in float32, both are held against torch.optim in float64."""

from typing import Any

import pytest
import torch

import pyzo
from pyzo.optim import ZOSGD, ZOAdam

N = 20_000
CASES = {
    "heavy ball": (ZOSGD, torch.optim.SGD, {"momentum": 0.9}),
    "dampened, decayed": (ZOSGD, torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": (ZOSGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (ZOAdam, torch.optim.Adam, {"betas": (0.9, 0.999)}),
    "adam, decayed": (ZOAdam, torch.optim.Adam, {"betas": (0.8, 0.95), "weight_decay": 0.1}),
    "adamw": (ZOAdam, torch.optim.AdamW, {"betas": (0.9, 0.99), "weight_decay": 0.1}),
}


def own_arguments(torch_class: type, arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments | ({"decoupled": True} if torch_class is torch.optim.AdamW else {})


def error(w: torch.Tensor, exact: torch.Tensor) -> float:
    return (w.detach().double() - exact.detach()).norm().item()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_error_is_at_most_twice_that_of_torch(case):
    """The estimates are the materialised noise times the coefficient of each step, the same numbers for all three."""
    own, theirs, arguments = case
    generator = torch.Generator().manual_seed(3)
    start, slope = torch.randn(2, N, generator=generator)
    w, single, double = (start.clone().requires_grad_(), start.clone(), start.double())
    opt = own([("w", w)], lr=1e-2, eps=1e-2, store="snapshot", seed=4, **own_arguments(theirs, arguments))
    singles, doubles = (theirs([p], lr=1e-2, **arguments) for p in (single, double))
    for step in range(1, 101):
        opt.step(lambda: (slope * w).sum() / 100 + w.square().sum() / 1000)
        c = opt.last.coefficients[0, 0].float()
        g = c * pyzo.noise(N, seed=opt.last.seeds[0], key=pyzo.tensor_key("w"))
        single.grad, double.grad = g, g.double()
        singles.step()
        doubles.step()
        if step in (1, 10, 100):
            assert 0 < error(w, double) <= 2 * error(single, double), step
    assert error(start, double) > 1e4 * error(w, double)  # the weights went somewhere
