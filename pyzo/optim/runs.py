"""What a step works on: blocks of trained tensors, each with a run of its own (seeds, counters, rows of scalars)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pyzo.control import Control
from pyzo.estimators import Block
from pyzo.masks import Mask, TensorMask
from pyzo.optim.params import Named
from pyzo.passes import BlockControls


@dataclass(frozen=True)
class RowKey:
    """What the tensors of a row share.

    Attributes:
        group: index of their parameter group.
        decays: whether weight decay is for them.
        born: how many updates of their block were applied before they joined.
        mask: (keep, threshold) where a mask was fitted to them, else None: it is the same in all the group.
    """

    group: int
    decays: bool
    born: int
    mask: tuple[int, float] | None


@dataclass(frozen=True)
class Run:
    """A block at work: a control tensor on each of its devices, and what the rows of all of them stand for."""

    block: Block
    controls: BlockControls
    rows: list[RowKey]

    @property
    def first(self) -> Control:
        """Any of the control tensors: those of a block say the same."""
        return next(iter(self.controls.values()))

    def row_of(self, group: int) -> int | None:
        """A row of a parameter group; None where the block has none of its tensors."""
        return next((i for i, key in enumerate(self.rows) if key.group == group), None)


@dataclass(frozen=True)
class Probed:
    """A unit of the estimator whose probes are done: its runs, its parts of the sweep, its losses."""

    runs: list[Run]
    parts: list[int]
    reach: int
    losses: list[torch.Tensor]


class FittedMasks:
    """The masks of the parameter groups, fitted once to each tensor that they are for."""

    def __init__(self) -> None:
        self._of: dict[Mask, dict[torch.Tensor, TensorMask]] = {}

    def fit(
        self, groups: list[dict[str, Any]], named: Iterable[Named], known: Iterable[str]
    ) -> list[TensorMask | None]:
        """The mask of each of the trained tensors, None where it is that of the group. `known`: names of all."""
        named, known = list(named), set(known)
        masks = [group["mask"] for group in groups]
        for mask in {mask for mask in masks if mask is not None and mask.is_fitted}:
            own = {n.name: n.tensor for n in named if masks[n.group] == mask}
            of = self._of.setdefault(mask, {})
            if any(t not in of for t in own.values()):
                mask.check_names(known)
                for name, fitted in mask.fit(own).items():
                    of.setdefault(own[name], fitted)
        return [self._of[masks[n.group]][n.tensor] if masks[n.group] in self._of else None for n in named]

    def numbers(self, named: Iterable[Named]) -> dict[str, dict[str, float]]:
        """What was measured of the tensors, by name, so that a resumed run need not measure other weights."""
        measured = {t: fitted for of in self._of.values() for t, fitted in of.items()}
        return {
            n.name: {"keep": measured[n.tensor].keep, "threshold": measured[n.tensor].threshold}
            for n in named
            if n.tensor in measured and measured[n.tensor].bits is None and measured[n.tensor].indices is None
        }

    def load(
        self, groups: list[dict[str, Any]], named: Iterable[Named], numbers: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """As if the masks had been fitted with what `numbers` returned."""
        self._of.clear()
        for n in named:
            mask = groups[n.group]["mask"]
            if mask is not None and mask.is_fitted and n.name in numbers:
                self._of.setdefault(mask, {})[n.tensor] = TensorMask(**numbers[n.name])
