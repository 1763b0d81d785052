"""The mask of Sparse-MeZO: the weights of small magnitude move, by a threshold that is fixed before training."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pyzo.masks.base import Mask, TensorMask
from pyzo.masks.order import kth_smallest


@dataclass(frozen=True)
class SmallMagnitude(Mask):
    """m = [|w| <= threshold of the tensor], of the weights as each step begins (Sparse-MeZO, arXiv 2402.15751).

    The thresholds are measured when the optimizer first sees a tensor, and stay. A store that keeps unperturbed weights
    compares them in every pass; in place, where perturbed weights would cross the threshold, each step notes its mask
    in one bit per weight. Ties count as small: of a tensor of equal numbers (a norm's ones, a bias of zeros)
    everything moves until it has crossed the threshold.

    Args:
        fraction: share of each tensor that moves, in (0, 1]; the paper's sparsity is 1 - fraction.
    """

    fraction: float

    def __post_init__(self) -> None:
        number = isinstance(self.fraction, (int, float)) and not isinstance(self.fraction, bool)
        if not number or not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: expected a number in (0, 1], got {self.fraction!r}")

    def fit(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorMask]:
        masks = {}
        for name, t in tensors.items():
            count = max(1, round(self.fraction * t.numel()))
            threshold = kth_smallest([t], count) if t.numel() else 0.0
            if not math.isfinite(threshold):
                raise ValueError(f"mask: expected finite weights to take a threshold from, got {threshold} in {name}")
            masks[name] = TensorMask(threshold=threshold)
        return masks

    def plain(self) -> dict[str, Any]:
        return {"kind": "SmallMagnitude", **asdict(self)}
