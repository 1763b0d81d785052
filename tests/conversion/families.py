"""The small model of each family that conversion is tested on: `bench.memory.families` in narrow."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2]))  # at the end: pyzo is the installed one

from bench.memory import families
from bench.memory.families import Encoder, Size

__all__ = ["FAMILIES", "HIDDEN", "TOKENS", "Encoder", "Family", "batch_of", "small"]

TOKENS = 64
HIDDEN = 128
SIZE = Size(HIDDEN, 4, TOKENS)
SIZES = {"vit": replace(SIZE, length=32, patch=4), "swin": Size(96, 3, 56)}
MINIMUM = {"swin": 0.45}  # where that is more than was asked for


@dataclass(frozen=True)
class Family:
    """How to build a model with so many layers and dropout, and what it is called with.

    Attributes:
        build: (layers, dropout, width) -> model; width None: HIDDEN.
        batch: rows, and a width where it is not HIDDEN -> keyword arguments.
        minimum: share of the saved bytes per layer that conversion saves under autocast.
        tokens, hidden: of one row and layer, the unit of saved numbers.
    """

    build: Callable[..., nn.Module]
    batch: Callable[..., dict[str, Any]]
    minimum: float
    tokens: int = TOKENS
    hidden: int = HIDDEN


def _family(name: str) -> Family:
    about, size = families.FAMILIES[name], SIZES.get(name, SIZE)

    def build(layers: int, dropout: float = 0.0, width: int = size.width) -> nn.Module:
        if not name.startswith("encoder"):
            pytest.importorskip("transformers")
        return about.build(layers, replace(size, width=width), dropout)

    def batch(rows: int, width: int = size.width) -> dict[str, Any]:
        return about.batch(rows, replace(size, width=width))

    return Family(build, batch, MINIMUM.get(name, about.minimum), about.tokens(size), size.width)


FAMILIES = {name: _family(name) for name in families.FAMILIES}
WIDTH = 32  # of models that are trained


def small(name: str, layers: int = 2, dropout: float = 0.0) -> nn.Module:
    """A narrow model of a family."""
    return FAMILIES[name].build(layers, dropout, 64 if name == "swin" else WIDTH)


def batch_of(name: str, rows: int = 2) -> dict[str, Any]:
    """Keyword arguments for a narrow model, a loss among its results."""
    return FAMILIES[name].batch(rows, WIDTH)
