"""What pyzo is measured against, in plain torch as people write it: eager zeroth-order steps, and backpropagation."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What a parameter group may set, with the defaults of torch.optim.SGD (but for its momentum) and torch.optim.Adam.
GROUP = {
    "eps": 1e-3,
    "weight_decay": 0.0,
    "momentum": 0.9,
    "dampening": 0.0,
    "nesterov": False,
    "betas": (0.9, 0.999),
    "adam_eps": 1e-8,
    "decoupled": False,
}
Group = Mapping[str, Any]
State = dict[str, Any]
Closure = Callable[[], Tensor]


def sgd_(p: Tensor, g: Tensor, state: State, group: Group) -> None:
    """MeZO's line (arXiv 2305.17333, algorithm 1): theta <- theta - lr (g + weight_decay theta)."""
    p.data = p.data - group["lr"] * (g + group["weight_decay"] * p.data)


def sign_(p: Tensor, g: Tensor, state: State, group: Group) -> None:
    """signSGD (arXiv 1802.04434), elementwise, the decay beside the sign: theta <- theta - lr (sign g + wd theta)."""
    step = torch.sign(g)
    if group["weight_decay"]:
        step = step + group["weight_decay"] * p.data
    p.data = p.data - group["lr"] * step


def momentum_(p: Tensor, g: Tensor, state: State, group: Group) -> None:
    """The heavy ball as torch.optim.SGD computes it tensor by tensor; the buffer has the parameter's dtype."""
    if group["weight_decay"]:
        g = g.add(p.data, alpha=group["weight_decay"])
    buffer = state.get("momentum_buffer")
    if buffer is None:
        buffer = state["momentum_buffer"] = g.clone()
    else:
        buffer.mul_(group["momentum"]).add_(g, alpha=1 - group["dampening"])
    step = g.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
    p.data.add_(step, alpha=-group["lr"])


def adam_(p: Tensor, g: Tensor, state: State, group: Group) -> None:
    """Adam, or AdamW where decoupled, as torch.optim computes it tensor by tensor; moments in the parameter's dtype."""
    lr, weight_decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    state["step"] += 1
    if group["decoupled"]:
        p.data.mul_(1 - lr * weight_decay)
    elif weight_decay:
        g = g.add(p.data, alpha=weight_decay)
    state["exp_avg"].lerp_(g, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    correction1, correction2 = (1 - beta ** state["step"] for beta in (beta1, beta2))
    denominator = (state["exp_avg_sq"].sqrt() / correction2**0.5).add_(group["adam_eps"])
    p.data.addcdiv_(state["exp_avg"], denominator, value=-lr / correction1)


RULES = {"sgd": sgd_, "sign": sign_, "momentum": momentum_, "adam": adam_}


@torch.no_grad()
def eager_perturb_(
    parameters: Iterable[Tensor], eps: float, scale: float, seed: int, distribution: str = "normal"
) -> None:
    """theta <- theta + scale eps z, z drawn anew from `seed` (MeZO, arXiv 2305.17333, algorithm 1)."""
    torch.manual_seed(seed)
    for p in parameters:
        z = _draw(p, distribution)
        p.data = p.data + scale * z * eps


@torch.no_grad()
def eager_update_(
    parameters: Sequence[Tensor],
    *,
    coefficients: Sequence[float],
    seeds: Sequence[int],
    rule: str = "sgd",
    states: dict[Tensor, State] | None = None,
    distribution: str = "normal",
    **group: Any,
) -> None:
    """The rule's update by g = sum_k coefficients[k] z_k, with the z_k that `eager_perturb_` draws from seeds[k].

    Args:
        parameters: changed in place.
        rule: "sgd", "sign", "momentum" or "adam".
        states: what the rule keeps from one update to the next, by parameter; filled here.
        group: lr, and what differs from GROUP.
    """
    if len(seeds) == 1:
        gradients = _along(parameters, coefficients[0], seeds[0], distribution)
    else:
        gradients = _accumulated(parameters, coefficients, seeds, distribution)
    states = {} if states is None else states
    for p, g in zip(parameters, gradients, strict=True):
        RULES[rule](p, g, states.setdefault(p, {}), {**GROUP, **group})


@torch.no_grad()
def foreach_perturb_(parameters: Iterable[Tensor], eps: float, scale: float, seed: int) -> None:
    """`eager_perturb_` with one horizontally fused addition; every z is alive at once, as large as the weights."""
    weights, directions = _weights_and_directions(parameters, seed)
    torch._foreach_add_(weights, directions, alpha=scale * eps)


@torch.no_grad()
def foreach_update_(
    parameters: Iterable[Tensor], *, lr: float, coefficient: float, seed: int, weight_decay: float = 0.0
) -> None:
    """The SGD update of `eager_update_` along one direction with horizontally fused operations."""
    weights, directions = _weights_and_directions(parameters, seed)
    if weight_decay:
        torch._foreach_mul_(weights, 1.0 - lr * weight_decay)
    torch._foreach_add_(weights, directions, alpha=-lr * coefficient)


class EagerZO:
    """A zeroth-order training step: perturb, forward, restore, for each of q directions; then the rule's update.

    ZO-SGD, its sign, momentum and Adam forms (arXiv 2402.11592) by `rule`, n-SPSA by `q`, FZOO (arXiv 2506.09034) by
    one_sided=True, normalize=True, distribution="rademacher" and q=8.

    Args:
        params: parameters, or groups {"params": ..., "lr": ..., "eps": ...} as torch.optim takes them.
        lr: of the groups that do not set their own; further scalars of GROUP alike.
        rule: "sgd", "sign", "momentum" or "adam".
        q: directions of a step.
        one_sided: (l(theta + eps z) - l(theta)) / eps in place of (l(theta + eps z) - l(theta - eps z)) / (2 eps).
        normalize: divide by the standard deviation of the q losses in place of eps; one-sided, q >= 2.
        distribution: "normal" or "rademacher".
        seed: of the NumPy generator that draws the seeds of each step.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        rule: str = "sgd",
        q: int = 1,
        one_sided: bool = False,
        normalize: bool = False,
        distribution: str = "normal",
        seed: int = 0,
        **scalars: Any,
    ):
        if normalize and not (one_sided and q >= 2):
            raise ValueError(f"normalize: expected one_sided=True and q >= 2, got one_sided={one_sided} and q={q}")
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        self.groups = [{**GROUP, "lr": lr, **scalars, **group, "params": list(group["params"])} for group in groups]
        self.states: dict[Tensor, State] = {}
        self._rule, self._q, self._one_sided, self._normalize = rule, q, one_sided, normalize
        self._distribution = distribution
        self._seeds = np.random.default_rng(seed)

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:
        """One step; returns the mean of the probe losses."""
        seeds, losses = self._probe(closure)
        self._update(seeds, losses)
        return torch.stack(losses).mean()

    def _probe(self, closure: Closure) -> tuple[list[list[int]], list[Tensor]]:
        """Seeds [q][groups], and the losses: l+, l- of each direction in turn, or l(theta) and then l+ of each."""
        seeds = self._seeds.integers(10**9, size=(self._q, len(self.groups))).tolist()
        losses = [closure()] if self._one_sided else []
        for direction in seeds:
            self._move(1.0, direction)
            losses.append(closure())
            if not self._one_sided:
                self._move(-2.0, direction)
                losses.append(closure())
            self._move(-1.0 if self._one_sided else 1.0, direction)
        return seeds, losses

    def _move(self, scale: float, seeds: Sequence[int]) -> None:
        for group, seed in zip(self.groups, seeds, strict=True):
            eager_perturb_(group["params"], group["eps"], scale, seed, self._distribution)

    def _update(self, seeds: list[list[int]], losses: list[Tensor], scale: float = 1.0) -> None:
        """The update of every group, its learning rate times `scale`."""
        if self._one_sided:
            differences = [(plus - losses[0]).item() for plus in losses[1:]]
        else:
            differences = [(plus - minus).item() for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
        for index, group in enumerate(self.groups):
            if self._normalize:
                width = statistics.stdev(loss.item() for loss in losses[1:])
            else:
                width = group["eps"] if self._one_sided else 2 * group["eps"]
            coefficients = [difference / (width * self._q) for difference in differences]
            self._update_group(
                {**group, "lr": scale * group["lr"]}, coefficients, [direction[index] for direction in seeds]
            )

    def _update_group(self, group: dict[str, Any], coefficients: list[float], seeds: list[int]) -> None:
        scalars = {name: value for name, value in group.items() if name != "params"}
        eager_update_(
            group["params"],
            coefficients=coefficients,
            seeds=seeds,
            rule=self._rule,
            states=self.states,
            distribution=self._distribution,
            **scalars,
        )


class EagerMeZO(EagerZO):
    """MeZO's training step: perturb, forward, perturb back twice as far, forward, restore, update (SGD, one direction).

    Args:
        params, lr, eps, weight_decay, seed: as in `EagerZO`.
        foreach: use torch's horizontally fused operations.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        foreach: bool = False,
    ):
        super().__init__(params, lr, eps=eps, weight_decay=weight_decay, seed=seed)
        self._foreach = foreach

    def _move(self, scale: float, seeds: Sequence[int]) -> None:
        if not self._foreach:
            return super()._move(scale, seeds)
        for group, seed in zip(self.groups, seeds, strict=True):
            foreach_perturb_(group["params"], group["eps"], scale, seed)

    def _update_group(self, group: dict[str, Any], coefficients: list[float], seeds: list[int]) -> None:
        if not self._foreach:
            return super()._update_group(group, coefficients, seeds)
        foreach_update_(
            group["params"],
            lr=group["lr"],
            coefficient=coefficients[0],
            seed=seeds[0],
            weight_decay=group["weight_decay"],
        )


class EagerConservative(EagerZO):
    """ZO-SGD-Cons (arXiv 2402.11592): ends at the best of theta, theta - lr g, theta + lr g; 5 forwards, two-sided SGD.

    Args:
        params, lr, seed, scalars: as in `EagerZO`. No weight decay: the update must undo itself.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, *, seed: int = 0, **scalars: Any
    ):
        super().__init__(params, lr, seed=seed, **scalars)
        if any(group["weight_decay"] for group in self.groups):
            raise ValueError("weight_decay: expected 0, which the conservative step can take back")

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:
        """One step; returns the mean of the two probe losses."""
        start = closure()
        seeds, losses = self._probe(closure)
        self._update(seeds, losses)
        ahead = closure()
        self._update(seeds, losses, scale=-2.0)
        behind = closure()
        if ahead <= start and ahead <= behind:
            self._update(seeds, losses, scale=2.0)
        elif not behind < start:
            self._update(seeds, losses)
        return torch.stack(losses).mean()


class EagerForwardGrad:
    """Forward-Grad (arXiv 2202.08587): theta <- theta - lr (d z + wd theta), d = <grad l, z> by torch.func.jvp.

    Args:
        model: its parameters that require gradients are trained.
        lr, weight_decay: of all parameters.
        seed: of the NumPy generator that draws the seed of each step.
    """

    def __init__(self, model: torch.nn.Module, lr: float, *, weight_decay: float = 0.0, seed: int = 0):
        self._model, self._group = model, {"lr": lr, "weight_decay": weight_decay}
        self._seeds = np.random.default_rng(seed)

    @torch.no_grad()
    def step(self, inputs: tuple[Any, ...], loss: Callable[[Any], Tensor]) -> Tensor:
        """One step by the loss of model(*inputs); returns it. `loss` takes what the model returns."""
        parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        torch.manual_seed(int(self._seeds.integers(10**9)))
        tangents = {name: _draw(p, "normal") for name, p in parameters.items()}

        def value(weights: dict[str, Tensor]) -> Tensor:
            return loss(torch.func.functional_call(self._model, weights, inputs))

        weights = {name: p.detach() for name, p in parameters.items()}
        result, derivative = torch.func.jvp(value, (weights,), (tangents,))
        for name, p in parameters.items():
            sgd_(p, derivative * tangents[name], {}, self._group)
        return result


def backprop_step(optimizer: torch.optim.Optimizer, closure: Closure) -> Tensor:
    """One first-order step of any torch optimizer; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = closure()
    loss.backward()
    optimizer.step()
    return loss.detach()


def _draw(like: Tensor, distribution: str) -> Tensor:
    if distribution == "normal":
        return torch.normal(mean=0.0, std=1.0, size=like.shape, dtype=like.dtype, device=like.device)
    return torch.randint(0, 2, like.shape, dtype=like.dtype, device=like.device) * 2 - 1


def _along(parameters: Iterable[Tensor], coefficient: float, seed: int, distribution: str) -> Iterator[Tensor]:
    """The gradient along one direction, one tensor at a time."""
    torch.manual_seed(seed)
    for p in parameters:
        yield coefficient * _draw(p, distribution)


def _accumulated(
    parameters: Sequence[Tensor], coefficients: Sequence[float], seeds: Sequence[int], distribution: str
) -> list[Tensor]:
    """The gradient summed over directions: as large as the weights, because each seed draws for all parameters."""
    gradients = [torch.zeros_like(p) for p in parameters]
    for coefficient, seed in zip(coefficients, seeds, strict=True):
        for total, g in zip(gradients, _along(parameters, coefficient, seed, distribution), strict=True):
            total.add_(g)
    return gradients


def _weights_and_directions(parameters: Iterable[Tensor], seed: int) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(seed)
    weights = [p.data for p in parameters]
    return weights, [_draw(w, "normal") for w in weights]
