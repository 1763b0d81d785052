"""What an estimator is to a step: which blocks of tensors it probes, where, and what becomes of the losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pyzo import ops

TWO_SIDED, ONE_SIDED, FORWARD = 0, 1, 2  # kinds of ops.estimate_
PLAIN, STD, SIGNS = 0, 1, 2  # its scalings

Unit = tuple[int, ...]  # numbers of blocks that are probed together, along the same directions
Stage = list[Unit]  # units that are probed at the same weights, one after another, and then updated together


class Points(Protocol):
    """What a step offers to its estimator. Every method calls the user's closure once; scalar tensors come back."""

    def here(self) -> torch.Tensor:
        """l(w)."""

    def at(self, direction: int, sign: float) -> torch.Tensor:
        """l(w + sign eps z_k), z_k zero outside the unit at hand."""

    def along(self, direction: int) -> tuple[torch.Tensor, torch.Tensor]:
        """l(w) and its derivative along z_k, by forward-mode differentiation."""


@dataclass(frozen=True)
class Block:
    """Some of the trained tensors, with seeds, step counts and skips of their own.

    Attributes:
        name: empty for the block of all of them.
        tensors: ids of the tensors.
        first: which of the step's directions is the block's first one.
        reach: number of the first layer of the stack that reads or hands on what they change; 0: any may.
    """

    name: str
    tensors: frozenset[int]
    first: int = 0
    reach: int = 0


@dataclass(frozen=True)
class Partition:
    """All trained tensors in blocks.

    Attributes:
        blocks: in the order in which they are probed.
        layers: the stack that `reach` counts; empty: none is known.
        obstacle: why the layers before a block must run at every point all the same; None: they need not.
    """

    blocks: list[Block]
    layers: tuple[torch.nn.Module, ...] = ()
    obstacle: str | None = None


class Estimator:
    """Base of the estimators: an estimate g = sum_k c_k z_k of the gradient, from q directions for each unit.

    Attributes:
        q: how many directions a unit is probed along.
        kind: of `pyzo.ops.estimate_`.
        loss_here: whether the first of a unit's losses is l(w).
        is_static: whether all steps probe the same units.
    """

    q: int
    kind: int
    loss_here: bool
    is_static: bool = True

    @property
    def scaling(self) -> int:
        return PLAIN

    def partition(self, module: torch.nn.Module | None, named: Sequence[tuple[str, torch.Tensor]]) -> Partition:
        """The blocks of the trained tensors; `module`: what the optimizer was given, if it was a module."""
        return Partition([Block("", frozenset(id(t) for _, t in named))])

    def stages(self, blocks: Sequence[Block], seed: int, step: int) -> list[Stage]:
        """What step number `step` (1 for the first) of the run with this seed does, in order."""
        return [[tuple(range(len(blocks)))]]

    def probe(self, points: Points) -> list[torch.Tensor]:
        """The losses of a unit in the order that `estimate_` takes them."""
        raise NotImplementedError

    def estimate_(self, control: torch.Tensor, losses: torch.Tensor, *, signs: bool = False) -> None:
        """Write the coefficients (or a skip) into a control tensor, from float64 losses on its device.

        `signs` keeps only the sign of what was measured along each direction: c_k = +-1 / q.
        """
        ops.estimate_(control, losses, kind=self.kind, q=self.q, scaling=SIGNS if signs else self.scaling)
