"""Estimators: which points of a step are probed, and how losses become coefficients of the seeded gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pyzo import ops

Probe = Callable[[int, float], torch.Tensor]


@dataclass(frozen=True)
class TwoSided:
    """SPSA with 2 q forwards: g = 1/q sum_k (l(w + eps z_k) - l(w - eps z_k)) / (2 eps) z_k.

    Source: MeZO, arXiv 2305.17333, definition 1 and n-SPSA; the ZO-SGD of arXiv 2402.11592.

    Args:
        q: how many directions a step averages, >= 1.
    """

    q: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.q, int) or isinstance(self.q, bool) or self.q < 1:
            raise ValueError(f"q: expected an integer >= 1, got {self.q!r}")

    @property
    def directions(self) -> int:
        return self.q

    def probe(self, loss_at: Probe) -> list[torch.Tensor]:
        """The losses in the order that `estimate_` takes them; `loss_at(k, sign)` evaluates at w + sign eps z_k."""
        return [loss_at(k, sign) for k in range(self.q) for sign in (1.0, -1.0)]

    def estimate_(self, control: torch.Tensor, losses: torch.Tensor) -> None:
        """Write the coefficients (or a skip) into a control tensor, from float64 losses on its device."""
        ops.estimate_two_sided_(control, losses)
