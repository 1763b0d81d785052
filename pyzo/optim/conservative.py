"""ZO-SGD-Cons: a ZO-SGD step that is taken, reversed or left out, whichever is best on the batch."""

from dataclasses import replace
from typing import Any

import torch

from pyzo import ops
from pyzo.optim.base import Last, Params, ZOOptimizer
from pyzo.optim.points import Points
from pyzo.passes import Update


class ZOConservativeSGD(ZOOptimizer):
    """w <- argmin of l over {w, w - lr g, w + lr g} on the batch: the ZO-SGD-Cons of arXiv 2402.11592; keeps no state.

    Five forwards with a two-sided estimate and q = 1; four with `OneSided()`, which shares l(w). A tie goes to
    w - lr g, then to w. Under an exact store the step ends bit-exactly on one of the three points; in place, within
    rounding of it (16-bit weights: an attempted update is taken back exactly, but where it crosses a power of two).

    Args:
        params: what to train; a module, parameters, (name, parameter) pairs or groups.
        lr: learning rate.
        common: eps, weight_decay, estimator, mask, distribution, store, rounding, seed, process_group as `ZOOptimizer`
            takes them.
    """

    def __init__(self, params: Params, lr: float = 1e-6, **common: Any):
        super().__init__(params, {"lr": lr}, **common)

    def _probe(self, points: Points) -> list[torch.Tensor]:
        # First, when the weights have not moved yet; behind what the estimator takes, watched for being finite.
        here = [] if self._estimator.loss_here else [points.here()]
        return [*self._estimator.probe(points), *here]

    def _estimate(self, values: list[torch.Tensor]) -> torch.Tensor:
        super()._estimate(values)
        return values[0 if self._estimator.loss_here else -1]

    def _update(self, points: Points, values: list[torch.Tensor]) -> None:
        q = self._estimator.q
        here = values[0 if self._estimator.loss_here else -1]
        down = points.attempt(Update(q, sign=1.0))
        up = points.attempt(Update(q, sign=-1.0))
        for own in self._share([here, down, up]):
            ops.choose_(self._controls[own.device].tensor, own)
        self.store.update(Update(q, chosen=True))

    @property
    def last(self) -> Last | None:
        """As in `ZOOptimizer`, with the losses at the candidates and the choice among them."""
        last, control = super().last, self._first()
        return last and replace(last, candidates=control.read_candidates(), choice=control.read_choice())
