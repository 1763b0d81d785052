"""ZO-SGD: stochastic gradient descent on a zeroth-order estimate."""

from pyzo.estimators import TwoSided
from pyzo.optim.base import Params, ZOOptimizer


class ZOSGD(ZOOptimizer):
    """w <- w - lr (g + weight_decay w), g = sum_k c_k z_k from forward passes alone (MeZO, arXiv 2305.17333, alg. 1).

    Keeps no state: z_k is regenerated from its seed in every pass. A two-sided step with q directions makes 2 q
    forwards and 2 q + 1 passes over the trained weights.

    Args:
        params: a module (its parameters that require gradients), parameters, (name, parameter) pairs or parameter
            groups. Names (a module has them) make the noise independent of the order of parameters.
        lr: learning rate; full fine-tuning of language models takes 1e-7 to 1e-6.
        eps: length of the probe; 1e-3 for full weights, 1e-2 for LoRA, 1e-1 for prefixes (arXiv 2305.17333).
        weight_decay: wd of the formula above, added to the estimate as in torch.optim.SGD.
        estimator: `pyzo.estimators.TwoSided(q)`; None: q = 1.
        distribution: "normal" or "rademacher" directions.
        store: "inplace", "snapshot" or "auto"; what was chosen and why is in `opt.store`.
        rounding: "stochastic" or "nearest" rounding of updates of 16-bit weights.
        seed: of the run, in [0, 2^64). The same seed and losses give the same weights, bit for bit.

    `lr`, `eps` and `weight_decay` may be set per group, and changed between steps by hand or by a scheduler.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        estimator: TwoSided | None = None,
        distribution: str = "normal",
        store: str = "auto",
        rounding: str = "stochastic",
        seed: int = 0,
    ):
        super().__init__(
            params,
            {"lr": lr, "eps": eps, "weight_decay": weight_decay},
            estimator=estimator or TwoSided(),
            distribution=distribution,
            store=store,
            rounding=rounding,
            seed=seed,
        )
