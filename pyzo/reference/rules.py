"""The rules: how an element's weight and state follow from the estimate g, in float32, each operation rounded once.

A rule takes float32 vectors w and g, the list of its states, and the row's scalars, and returns the new w and states,
unrounded. Scalars are derived in float64 and rounded to float32 once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .arithmetic import divide, float32, float64, fma, sqrt
from .control import Row

RULES = ("sgd", "sign", "momentum", "adam")  # by the number that `pass_` takes
STATES = {  # in their order in the state of a pass, by the names of torch.optim
    "sgd": (),
    "sign": (),
    "momentum": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
}

Updated = tuple[Tensor, list[Tensor]]


def update(rule: int, w: Tensor, g: Tensor, state: list[Tensor], row: Row) -> Updated:
    """The new weight and states by a rule, a position in RULES."""
    rules: dict[str, Callable[..., Updated]] = {"sgd": sgd, "sign": sign, "momentum": momentum, "adam": adam}
    return rules[RULES[rule]](w, g, state, row)


def decayed(w: Tensor, g: Tensor, row: Row) -> Tensor:
    """g + wd w; the decay term is left out, not multiplied by zero, where wd is 0."""
    weight_decay = float32(row.weight_decay)
    return fma(weight_decay, w, g) if weight_decay != 0 else g


def sgd(w: Tensor, g: Tensor, state: list[Tensor], row: Row) -> Updated:
    """w <- w - lr (g + wd w)."""
    return fma(-float32(row.lr), decayed(w, g, row), w), []


def sign(w: Tensor, g: Tensor, state: list[Tensor], row: Row) -> Updated:
    """w <- w - lr (sign(g) + wd w), elementwise, sign(0) = sign(NaN) = 0 (signSGD, arXiv 1802.04434)."""
    s = (g > 0).to(torch.float32) - (g < 0).to(torch.float32)
    return fma(-float32(row.lr), decayed(w, s, row), w), []


def momentum(w: Tensor, g: Tensor, state: list[Tensor], row: Row) -> Updated:
    """b <- mu b + (1 - dampening) (g + wd w), w <- w - lr b: heavy ball as in torch.optim.SGD.

    The first update has no past and no dampening: b <- g + wd w. Nesterov: w <- w - lr (g + wd w + mu b).
    """
    (b,) = state
    g = decayed(w, g, row)
    mu = float32(row.beta1)
    first = row.age <= 1
    b = fma(float32(0.0) if first else mu, b, float32(1.0 if first else 1.0 - row.dampening) * g)
    step = fma(mu, b, g) if row.option else b
    return fma(-float32(row.lr), step, w), [b]


def adam(w: Tensor, g: Tensor, state: list[Tensor], row: Row) -> Updated:
    """Adam (arXiv 1412.6980, algorithm 1) with the decay inside g, or decoupled (AdamW, arXiv 1711.05101, algorithm 2).

    m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2, and w <- w - lr m' / (sqrt(v') + eps) with
    m' = m / (1 - beta1^t), v' = v / (1 - beta2^t). The operations are in the order of torch.optim.Adam's.
    """
    m, v = state
    start = w
    if not row.option:
        g = decayed(w, g, row)
    elif float32(row.weight_decay) != 0:
        start = fma(float32(-(row.lr * row.weight_decay)), w, w)
    m = fma(float32(1.0 - row.beta1), g - m, m)
    v = fma(float32(row.beta2), v, float32(1.0 - row.beta2) * g * g)
    root = float32(float64(1.0) / float64(row.correction2).sqrt())
    denominator = fma(sqrt(v), root, float32(row.rule_eps))
    minus_step = float32(float64(-row.lr) / float64(row.correction1))
    return fma(minus_step, divide(m, denominator), start), [m, v]
