"""ZO-SGD-Sign: steps by the sign of a zeroth-order estimate."""

from typing import Any

import torch

from pyzo.optim.base import Params, ZOOptimizer


class ZOSignSGD(ZOOptimizer):
    """w <- w - lr (sign(g) + weight_decay w), g a zeroth-order estimate; keeps no state.

    Three algorithms go by the name of ZO-SGD-Sign; two of them are here, and the third (either one under Adam) is not:
    "elementwise" takes the sign of every element of g (the formula of arXiv 2402.11592; signSGD, arXiv 1802.04434), a
    step of +-lr for each weight; "scalar" replaces each coefficient by its sign, g = 1/q sum_k sign(c_k) z_k, which is
    what the published code of arXiv 2402.11592 hands to its optimizer.

    Args:
        params: what to train; a module, parameters, (name, parameter) pairs or groups.
        lr: learning rate, the length of each weight's step in the elementwise form.
        form: "elementwise" or "scalar".
        common: eps, weight_decay, estimator, mask, distribution, store, rounding, master, seed, process_group as
            `ZOOptimizer` takes them.
    """

    def __init__(self, params: Params, lr: float = 1e-6, *, form: str = "elementwise", **common: Any):
        if form not in ("elementwise", "scalar"):
            raise ValueError(f"form: expected 'elementwise' or 'scalar', got {form!r}")
        self._form = form
        self.rule = "sign" if form == "elementwise" else "sgd"
        super().__init__(params, {"lr": lr}, **common)

    def _estimate_(self, control: torch.Tensor, losses: torch.Tensor) -> None:
        self._estimator.estimate_(control, losses, signs=self._form == "scalar")
