"""Forward-Grad: descent along exact directional derivatives, without backpropagation."""

from typing import Any

from pyzo.estimators import ForwardGrad
from pyzo.optim.base import Params
from pyzo.optim.sgd import ZOSGD


class ForwardGradSGD(ZOSGD):
    """`ZOSGD` with the estimator `pyzo.estimators.ForwardGrad(q)`: the Forward-Grad of arXiv 2402.11592.

    Each direction costs one forward with dual numbers, and all of them one tangent per trained weight. The closure must
    be differentiable; attention runs in its math form, and an operator without forward-mode rule is refused by name.

    Args:
        params: what to train; a module, parameters, (name, parameter) pairs or groups.
        lr: learning rate.
        q: how many directions a step averages, >= 1.
        common: momentum, nesterov, dampening, weight_decay, mask, distribution, store, rounding, master, state_dtype,
            seed, process_group as `ZOSGD` takes them.
    """

    def __init__(self, params: Params, lr: float = 1e-6, *, q: int = 1, **common: Any):
        super().__init__(params, lr, estimator=ForwardGrad(q), **common)
