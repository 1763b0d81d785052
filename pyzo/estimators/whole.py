"""The estimators that probe all trained tensors together."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pyzo.estimators.base import FORWARD, ONE_SIDED, PLAIN, STD, TWO_SIDED, Estimator, Points


@dataclass(frozen=True)
class Directions(Estimator):
    """An estimate from q directions of all trained tensors.

    Args:
        q: how many directions a step uses, >= 1.
    """

    q: int = 1
    kind: ClassVar[int]
    loss_here: ClassVar[bool]

    def __post_init__(self) -> None:
        if not isinstance(self.q, int) or isinstance(self.q, bool) or self.q < 1:
            raise ValueError(f"q: expected an integer >= 1, got {self.q!r}")


@dataclass(frozen=True)
class TwoSided(Directions):
    """SPSA with 2 q forwards: g = 1/q sum_k (l(w + eps z_k) - l(w - eps z_k)) / (2 eps) z_k.

    Source: MeZO, arXiv 2305.17333, definition 1 and n-SPSA; the ZO-SGD of arXiv 2402.11592.
    """

    kind = TWO_SIDED
    loss_here = False

    def probe(self, points: Points) -> list[torch.Tensor]:
        return [points.at(k, sign) for k in range(self.q) for sign in (1.0, -1.0)]


@dataclass(frozen=True)
class OneSided(Directions):
    """Forward differences with q + 1 forwards: g = 1/q sum_k (l(w + eps z_k) - l(w)) / eps z_k, l(w) shared by all.

    With `normalize="std"` the differences are divided by the sample standard deviation of the q losses instead of eps:
    with Rademacher directions FZOO's step, g = sum_k (l_k - l_0) / (q std) z_k (arXiv 2506.09034). Losses without any
    spread skip the step.

    Args:
        q: how many directions a step uses, >= 1; >= 2 with `normalize`.
        normalize: None or "std".
    """

    normalize: str | None = None
    kind = ONE_SIDED
    loss_here = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize not in (None, "std"):
            raise ValueError(f"normalize: expected None or 'std', got {self.normalize!r}")
        if self.normalize == "std" and self.q < 2:
            raise ValueError(f"q: expected >= 2 directions to take a standard deviation of, got {self.q}")

    @property
    def scaling(self) -> int:
        return STD if self.normalize == "std" else PLAIN

    def probe(self, points: Points) -> list[torch.Tensor]:
        return [points.here(), *(points.at(k, 1.0) for k in range(self.q))]


@dataclass(frozen=True)
class ForwardGrad(Directions):
    """Forward gradient: g = 1/q sum_k <grad l(w), z_k> z_k, exact in eps, by q forward-mode evaluations.

    Needs memory for one tangent per trained weight. Source: the Forward-Grad of arXiv 2402.11592 (arXiv 2202.08587).
    The losses of a step are l(w) and the derivative, in turn for each direction.
    """

    kind = FORWARD
    loss_here = True

    def probe(self, points: Points) -> list[torch.Tensor]:
        return [value for k in range(self.q) for value in points.along(k)]
