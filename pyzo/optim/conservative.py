"""ZO-SGD-Cons: a ZO-SGD step that is taken, reversed or left out, whichever is best on the batch."""

from dataclasses import replace
from typing import Any

import torch

from pyzo import ops
from pyzo.optim.base import Last, Params, ZOOptimizer
from pyzo.optim.points import Points
from pyzo.optim.runs import Probed
from pyzo.passes import Update


class ZOConservativeSGD(ZOOptimizer):
    """w <- argmin of l over {w, w - lr g, w + lr g} on the batch: the ZO-SGD-Cons of arXiv 2402.11592; keeps no state.

    Five forwards with a two-sided estimate and q = 1; four with `OneSided()`, which shares l(w). A tie goes to
    w - lr g, then to w. Under an exact store the step ends bit-exactly on one of the three points; in place, within
    rounding of it (16-bit weights: an attempted update is taken back exactly, but where it crosses a power of two).

    Args:
        params: what to train; a module, parameters, (name, parameter) pairs or groups.
        lr: learning rate.
        common: eps, weight_decay, estimator, mask, distribution, store, rounding, master, seed, process_group as
            `ZOOptimizer` takes them.
    """

    def __init__(self, params: Params, lr: float = 1e-6, **common: Any):
        super().__init__(params, {"lr": lr}, **common)

    def _probe(self, points: Points) -> list[torch.Tensor]:
        # First, when the weights have not moved yet; behind what the estimator takes, watched for being finite.
        here = [] if self._estimator.loss_here else [points.here()]
        return [*self._estimator.probe(points), *here]

    def _loss(self, units: list[Probed], losses: list[torch.Tensor]) -> torch.Tensor:
        return self._here(units[0])

    def _here(self, unit: Probed) -> torch.Tensor:
        return unit.losses[0 if self._estimator.loss_here else -1]

    def _update(self, points: Points, units: list[Probed]) -> None:
        q = self._estimator.q
        parts = [part for unit in units for part in unit.parts]
        points.select(parts, min(unit.reach for unit in units))
        down = points.attempt(parts, Update(q, sign=1.0))
        up = points.attempt(parts, Update(q, sign=-1.0))
        shared = self._share([self._here(units[0]), down, up])
        for unit in units:
            for run in unit.runs:
                for device, control in run.controls.items():
                    ops.choose_(control.tensor, shared[device])
        points.update(parts, Update(q, chosen=True))

    @property
    def last(self) -> Last | None:
        """As in `ZOOptimizer`, with the losses at the candidates and the choice among them."""
        last = super().last
        if last is None:
            return None
        control = self._seen[-1].runs[0].first
        return replace(last, candidates=control.read_candidates(), choice=control.read_choice())
