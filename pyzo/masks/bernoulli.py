"""A seeded Bernoulli mask, drawn again from the noise field in every pass: no storage."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pyzo.control import KEEP_ALL
from pyzo.masks.base import Mask, TensorMask
from pyzo.masks.order import count_at_most, kth_smallest


@dataclass(frozen=True)
class Random(Mask):
    """A Bernoulli mask, drawn from the noise field in every pass: no storage, the same in all passes of a step.

    An element outside the mask keeps its weight and its state under every rule. Source: the sparse-gradient ZO of arXiv
    2402.11592, section 5.

    Args:
        sparsity: share of the elements that stay, in [0, 1); heeded to 2^-16.
        refresh: how many steps a mask lasts, >= 1.
        layerwise: "uniform": the same share of every tensor. "magnitude": what stays of a tensor is the share of its
            weights that global magnitude pruning at `sparsity` would remove, measured once, when the optimizer first
            sees the tensor; which elements stay is drawn all the same.
    """

    sparsity: float
    refresh: int = 1
    layerwise: str = "uniform"

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, (int, float)) or not 0 <= self.sparsity < 1 or self.keep == 0:
            raise ValueError(f"sparsity: expected a number in [0, 1 - 2^-17), got {self.sparsity!r}")
        if not isinstance(self.refresh, int) or isinstance(self.refresh, bool) or self.refresh < 1:
            raise ValueError(f"refresh: expected an integer >= 1, got {self.refresh!r}")
        if self.layerwise not in ("uniform", "magnitude"):
            raise ValueError(f"layerwise: expected 'uniform' or 'magnitude', got {self.layerwise!r}")

    @property
    def is_fitted(self) -> bool:  # type: ignore[override]
        return self.layerwise == "magnitude"

    @property
    def keep(self) -> int:
        """How many of 65536 values of an element's mask bits let it move."""
        return round((1 - self.sparsity) * KEEP_ALL)

    def fit(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorMask]:
        """Shares of the tensors as global magnitude pruning has them: exact, and nothing is concatenated."""
        total = sum(t.numel() for t in tensors.values())
        pruned = round(self.sparsity * total)
        threshold = kth_smallest(list(tensors.values()), pruned) if pruned else -1.0
        return {
            name: TensorMask(keep=round((1 - count_at_most(t, threshold) / max(t.numel(), 1)) * KEEP_ALL))
            for name, t in tensors.items()
        }

    def plain(self) -> dict[str, Any]:
        return {"kind": "Random", **asdict(self)}
