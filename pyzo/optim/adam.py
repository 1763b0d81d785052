"""ZO-Adam: Adam on a zeroth-order estimate."""

from typing import Any

from pyzo.optim.base import Params, ZOOptimizer, check_number


class ZOAdam(ZOOptimizer):
    """Adam (arXiv 1412.6980) on a zeroth-order estimate g that is never stored: the ZO-Adam of arXiv 2402.11592.

    m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2, w <- w - lr m / (1 - beta1^t) / (sqrt(v / (1 -
    beta2^t)) + adam_eps). m and v are fp32 (or `state_dtype`), whatever the dtype of the weights; t counts the updates
    of the parameter itself, and skipped steps not at all.

    Args:
        params: what to train; a module, parameters, (name, parameter) pairs or groups.
        lr: learning rate; grids of the literature span 1e-6 to 1e-3.
        betas: (beta1, beta2), each in [0, 1).
        adam_eps: added to the root, >= 0. `eps` is the length of the probe.
        decoupled: decay the weights themselves (AdamW, arXiv 1711.05101) instead of adding weight_decay w to g.
        common: eps, weight_decay, estimator, mask, distribution, store, rounding, master, state_dtype, seed,
            process_group as `ZOOptimizer` takes them.
    """

    rule = "adam"
    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-5,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        decoupled: bool = False,
        **common: Any,
    ):
        own = {"lr": lr, "betas": tuple(betas), "adam_eps": adam_eps, "decoupled": decoupled}
        super().__init__(params, own, **common)

    def _check_own(self, group: dict[str, Any], where: str) -> None:
        if len(group["betas"]) != 2:
            raise ValueError(f"betas: expected two numbers, got {group['betas']!r} {where}")
        for i, beta in enumerate(group["betas"]):
            check_number(f"betas[{i}]", beta, where, 0.0, 1.0)
        check_number("adam_eps", group["adam_eps"], where, 0.0)

    def _own_row(self, group: dict[str, Any]) -> dict[str, float]:
        return {
            "beta1": float(group["betas"][0]),
            "beta2": float(group["betas"][1]),
            "rule_eps": float(group["adam_eps"]),
            "option": float(group["decoupled"]),
        }
