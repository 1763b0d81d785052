"""The control tensor, what steers a pass from step to step, and the operators that write it (csrc/core/control.h).

An int64 matrix [3 + rows, 16 + 2 directions] of 8-byte words:
    line 0      header: ok, skipped, draw, applied, run seed, rounding seed, choice (a float64), first
                direction
    line 1      the seed of each direction
    line 2      the losses that `estimate_` saw, and from word 2 directions + 1 on the three of `choose_`, as float64
    line 3 + r  row r: the fields of `Row` in their order, then from word 16 on, as float64, the coefficients
A row is what some tensors share: their parameter group, whether they decay, since when they are trained. Each tensor
names its row in the table of a pass.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .arithmetic import float64
from .field import MASK_DIRECTION, ROUNDING_DIRECTION, direction_seed

OK, SKIPPED, DRAW, APPLIED, RUN_SEED, ROUNDING_SEED, CHOICE, FIRST = range(8)
LINES, COEFFICIENTS = 3, 16  # lines before the rows, words before what there is one of per direction
KEEP_ALL = 65536
ESTIMATORS = ("two-sided", "one-sided", "forward")  # by the number that `estimate_` takes as kind
SCALINGS = ("plain", "std", "sign")  # by the number that `estimate_` takes as scaling

_M64 = 2**64 - 1


@dataclass(frozen=True)
class Row:
    """The scalars of a row, in the order of its words: a float or bool is stored as float64, an int as int64.

    Attributes:
        lr, eps, weight_decay: learning rate, length of the probe, weight decay.
        beta1, beta2: decay of Adam's averages; beta1 is the momentum of the rule "momentum".
        dampening: of the rule "momentum".
        rule_eps: what Adam adds to its denominator.
        option: Nesterov's form of "momentum"; decoupled weight decay of "adam".
        born: how many updates had been applied when the row's tensors joined.
        age: number of the update at hand, 1 for the first.
        correction1, correction2: 1 - beta1^age, 1 - beta2^age.
        keep: an element is trained where its 16 mask bits are below; 65536: all are.
        refresh: number of steps that a mask lasts.
        mask_seed: of the mask of the step, 64 bits.
        threshold: an element is trained where its magnitude is at most this; infinity: all are, NaN too.
    """

    lr: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    dampening: float = 0.0
    rule_eps: float = 0.0
    option: bool = False
    born: int = 0
    age: int = 0
    correction1: float = 0.0
    correction2: float = 0.0
    keep: int = KEEP_ALL
    refresh: int = 1
    mask_seed: int = 0
    threshold: float = math.inf


def new_control(directions: int, rows: list[Row], seed: int) -> Tensor:
    """The control tensor of a run that has not begun: capacity for `directions`, its rows, the seed of the run."""
    control = torch.zeros(LINES + len(rows), COEFFICIENTS + 2 * directions, dtype=torch.int64)
    control[0, RUN_SEED] = _signed(seed)
    for r, row in enumerate(rows):
        write_row(control, r, row)
    return control


def write_row(control: Tensor, r: int, row: Row) -> None:
    """Writes every scalar of row r; the coefficients stay."""
    for word, field in enumerate(fields(Row)):
        value = getattr(row, field.name)
        if field.type is int:
            control[LINES + r, word] = _signed(value)
        else:
            control.view(torch.float64)[LINES + r, word] = float(value)


def read_row(control: Tensor, r: int) -> Row:
    """The scalars of row r."""
    integers, doubles = control[LINES + r].tolist(), control.view(torch.float64)[LINES + r].tolist()
    values = {
        field.name: integers[word] if field.type is int else field.type(doubles[word])
        for word, field in enumerate(fields(Row))
    }
    values["mask_seed"] &= _M64
    return Row(**values)


def read_seed(control: Tensor, j: int) -> int:
    """The seed of direction j, 64 bits."""
    return int(control[1, j]) & _M64


def begin_step_(control: Tensor) -> None:
    """Draws the next step: draw += 1; from the run seed every direction's seed, the rounding seed and each row's mask
    seed, which changes every `refresh` steps (a row that says 0 means 1); ok = 1, choice = 0.

    Direction k of the tensor is direction first + k of the step; the other seeds do not depend on `first`.
    """
    control[0, DRAW] += 1
    run, step, first = int(control[0, RUN_SEED]) & _M64, int(control[0, DRAW]), int(control[0, FIRST])
    for k in range((control.shape[1] - COEFFICIENTS) // 2):
        control[1, k] = _signed(direction_seed(run, step, first + k))
    control[0, ROUNDING_SEED] = _signed(direction_seed(run, step, ROUNDING_DIRECTION))
    word = _word("mask_seed")
    for r in range(len(control) - LINES):
        drawn_in = 1 + (step - 1) // max(read_row(control, r).refresh, 1)
        control[LINES + r, word] = _signed(direction_seed(run, drawn_in, MASK_DIRECTION))
    control[0, OK] = 1
    control.view(torch.float64)[0, CHOICE] = 0.0


def estimate_(control: Tensor, losses: Tensor, kind: int, q: int, scaling: int) -> None:
    """Turns losses into the coefficients of the seeded gradient g = sum_k c_k z_k, k < q, of every row.

    What is measured along direction k, and its coefficient with scaling "plain":
        two-sided  l(w + eps z_k) - l(w - eps z_k)  c_k = difference_k / (2 eps q)  SPSA; MeZO, arXiv 2305.17333, def. 1
        one-sided  l(w + eps z_k) - l(w)            c_k = difference_k / (eps q)
        forward    <grad l(w), z_k>                 c_k = difference_k / q          by forward-mode differentiation
    "std" (one-sided, q >= 2): c_k = difference_k / (q sigma), sigma the sample standard deviation of the q losses
    l(w + eps z_k) (FZOO, arXiv 2506.09034). "sign": c_k = sign(difference_k) / q; a difference that is not finite stays
    what it is.

    A loss that is not finite, or a coefficient that is not finite as float32, clears ok and counts a skip. Else the
    step counts as applied, and every row learns the number of its update and the bias corrections that belong to it.

    Args:
        losses: float64. two-sided: l(w + eps z_k), l(w - eps z_k) for k = 0 .. q - 1 in turn; one-sided: l(w), then
            l(w + eps z_k); forward: l(w), <grad l(w), z_k> in turn. Further ones are recorded, and must be finite.
        kind: a position in ESTIMATORS.
        scaling: a position in SCALINGS.
    """
    doubles = control.view(torch.float64)
    doubles[2, : len(losses)] = losses
    if ESTIMATORS[kind] == "two-sided":
        difference = losses[0 : 2 * q : 2] - losses[1 : 2 * q : 2]
    elif ESTIMATORS[kind] == "one-sided":
        difference = losses[1 : q + 1] - losses[0]
    else:
        difference = losses[1 : 2 * q : 2]
    sigma = _deviation(losses[1 : q + 1].tolist()) if SCALINGS[scaling] == "std" else math.nan
    if SCALINGS[scaling] == "sign":
        difference = torch.where(torch.isfinite(difference), torch.sign(difference), difference)

    ok = bool(torch.isfinite(losses).all())
    for r in range(len(control) - LINES):
        eps = read_row(control, r).eps
        if SCALINGS[scaling] == "std":
            unit = q * sigma
        elif SCALINGS[scaling] == "sign" or ESTIMATORS[kind] == "forward":
            unit = float(q)
        else:
            unit = (2.0 * eps if ESTIMATORS[kind] == "two-sided" else eps) * q
        coefficients = difference / float64(unit)
        doubles[LINES + r, COEFFICIENTS : COEFFICIENTS + q] = coefficients
        ok = ok and bool(torch.isfinite(coefficients.to(torch.float32)).all())

    control[0, OK] = int(ok)
    control[0, APPLIED if ok else SKIPPED] += 1
    if ok:
        for r in range(len(control) - LINES):
            row = read_row(control, r)
            age = int(control[0, APPLIED]) - row.born
            control[LINES + r, _word("age")] = age
            doubles[LINES + r, _word("correction1")] = 1.0 - _power(row.beta1, age)
            doubles[LINES + r, _word("correction2")] = 1.0 - _power(row.beta2, age)


def choose_(control: Tensor, losses: Tensor) -> None:
    """Where a conservative step ends: choice = 1 at w - lr g, -1 at w + lr g, 0 at w (ZO-SGD-Cons, arXiv 2402.11592).

    The least of the three losses wins; among equal ones w - lr g before w before w + lr g. A candidate whose loss is
    not finite is never chosen, and none is without a finite l(w) or where ok is 0.

    Args:
        losses: float64 [3]: l(w), l(w - lr g), l(w + lr g).
    """
    doubles = control.view(torch.float64)
    directions = (control.shape[1] - COEFFICIENTS) // 2
    doubles[2, 2 * directions + 1 : 2 * directions + 4] = losses
    stay, down, up = losses.tolist()
    choice = 0.0
    if int(control[0, OK]) != 0 and math.isfinite(stay):
        if math.isfinite(down) and down <= stay and (down <= up or not math.isfinite(up)):
            choice = 1.0
        elif math.isfinite(up) and up < stay:
            choice = -1.0
    doubles[0, CHOICE] = choice


def _deviation(values: list[float]) -> float:
    """sqrt(sum (x - mean)^2 / (n - 1)), summed in order."""
    total = squares = 0.0
    for x in values:
        total += x
    mean = total / len(values)
    for x in values:
        squares += (x - mean) * (x - mean)
    return math.sqrt(squares / (len(values) - 1))


def _power(b: float, n: int) -> float:
    """b^n by binary exponentiation, which is the same everywhere (libm's pow is not)."""
    r = 1.0
    while n > 0:
        if n & 1:
            r *= b
        b *= b
        n >>= 1
    return r


def _word(name: str) -> int:
    return [field.name for field in fields(Row)].index(name)


def _signed(x: int) -> int:
    return (x & _M64) - (1 << 64) if x >> 63 & 1 else x & _M64
