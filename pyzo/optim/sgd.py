"""ZO-SGD: stochastic gradient descent on a zeroth-order estimate, with or without momentum."""

from typing import Any

from pyzo.optim.base import Params, ZOOptimizer, check_number


class ZOSGD(ZOOptimizer):
    """w <- w - lr (g + weight_decay w), g = sum_k c_k z_k from forward passes alone (MeZO, arXiv 2305.17333, alg. 1).

    Keeps no state without momentum: z_k is regenerated from its seed in every pass. A two-sided step with q directions
    makes 2 q forwards and 2 q + 1 passes over the trained weights. With momentum (the ZO-SGD-MMT of arXiv 2402.11592)
    it is torch.optim.SGD's: b <- momentum b + (1 - dampening) g, w <- w - lr b, or lr (g + momentum b) with Nesterov.

    Args:
        params: what to train; a module, parameters, (name, parameter) pairs or groups.
        lr: learning rate; full fine-tuning of language models takes 1e-7 to 1e-6.
        momentum: in [0, 1); a buffer of one number per weight, where it is not 0.
        nesterov: look ahead along the buffer; needs momentum and no dampening.
        dampening: in [0, 1); share of g that does not enter the buffer, after the first update.
        common: eps, weight_decay, estimator, mask, distribution, store, rounding, master, state_dtype, seed,
            process_group as `ZOOptimizer` takes them.

    Whether there is momentum is decided when the optimizer is made: by the default or any group.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        dampening: float = 0.0,
        **common: Any,
    ):
        own = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "dampening": dampening}
        super().__init__(params, own, **common)

    def _choose_rule(self) -> None:
        if any(group["momentum"] for group in self.param_groups):
            self.rule, self.state_names = "momentum", ("momentum_buffer",)

    def _check_own(self, group: dict[str, Any], where: str) -> None:
        check_number("momentum", group["momentum"], where, 0.0, 1.0)
        check_number("dampening", group["dampening"], where, 0.0, 1.0)
        if group["nesterov"] and (not group["momentum"] or group["dampening"]):
            raise ValueError(f"nesterov: expected momentum > 0 and dampening = 0 with it {where}")
        if group["momentum"] and self.rule != "momentum":
            raise ValueError(f"momentum: expected 0, as when the optimizer was made, got {group['momentum']!r} {where}")

    def _own_row(self, group: dict[str, Any]) -> dict[str, float]:
        return {
            "beta1": float(group["momentum"]),
            "dampening": float(group["dampening"]),
            "option": float(group["nesterov"]),
        }
