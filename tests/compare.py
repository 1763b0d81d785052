"""Comparisons of optimizers and models before and after: copies, and equality bit for bit."""

from collections.abc import Iterable
from typing import Any

import torch
from bits import assert_same_bits
from torch import Tensor, nn


def copies(tensors: Iterable[Tensor] | nn.Module) -> list[Tensor]:
    """Copies of tensors, or of the parameters of a module."""
    tensors = tensors.parameters() if isinstance(tensors, nn.Module) else tensors
    return [t.detach().clone() for t in tensors]


def states(opt: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer keeps per weight, in the order of its parameters."""
    params = [p for group in opt.param_groups for p in group["params"]]
    return [opt.state[p][name] for p in params if p in opt.state for name in sorted(opt.state[p])]


def assert_same(got: Iterable[Tensor] | nn.Module, want: Iterable[Tensor] | nn.Module, what: str = "") -> None:
    """Fails unless tensors, or the parameters of modules, have equal bits."""
    for i, (a, b) in enumerate(zip(copies(got), copies(want), strict=True)):
        assert_same_bits(a, b, f"{what} tensor {i}")


def same(got: Iterable[Tensor] | nn.Module, want: Iterable[Tensor] | nn.Module) -> bool:
    """Whether all tensors are equal."""
    return all(torch.equal(a, b) for a, b in zip(copies(got), copies(want), strict=True))


def assert_same_trees(got: Any, want: Any, where: str = "") -> None:
    """Fails unless nested dicts and lists are equal, tensors in them bit for bit."""
    if isinstance(want, Tensor):
        assert_same_bits(got, want, where)
    elif isinstance(want, dict):
        assert list(got) == list(want), where
        for key in want:
            assert_same_trees(got[key], want[key], f"{where}.{key}")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), where
        for i, value in enumerate(want):
            assert_same_trees(got[i], value, f"{where}[{i}]")
    else:
        assert type(got) is type(want) and got == want, (where, got, want)
