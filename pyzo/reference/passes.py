"""The operators: what one pass does to weights, and how the control tensor steers it (csrc/core/control.h).

The control tensor is an int64 matrix [3 + rows, 8 + 2 directions] of 8-byte words:
    line 0      ok, skipped, draw, applied, run seed, rounding seed
    line 1      the seed of each direction
    line 2      losses, as float64
    line 3 + r  row r, as float64: lr, eps, weight decay, then the coefficient of each direction
"""

import torch
from torch import Tensor

from .arithmetic import float32, fma, round_nearest, round_stochastic
from .field import ROUNDING_DIRECTION, direction_seed, draw, global_index, philox4x32, rounding_bits

OK, SKIPPED, DRAW, APPLIED, RUN_SEED, ROUNDING_SEED, HEADER = 0, 1, 2, 3, 4, 5, 8
LR, EPS, WEIGHT_DECAY, COEFFICIENTS = 0, 1, 2, 3
LINES = 3  # before the rows

_M64 = 2**64 - 1
_SAME_SIZE_INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _signed(x: int) -> int:
    return (x & _M64) - (1 << 64) if x >> 63 & 1 else x & _M64


def _seed(control: Tensor, j: int) -> int:
    return int(control[1, j]) & _M64


def begin_step_(control: Tensor) -> None:
    """Draws the next step: draw += 1, every direction's seed and the rounding seed from the run seed, ok = 1."""
    control[0, DRAW] += 1
    run, step = int(control[0, RUN_SEED]) & _M64, int(control[0, DRAW]) & _M64
    for k in range((control.shape[1] - HEADER) // 2):
        control[1, k] = _signed(direction_seed(run, step, k))
    control[0, ROUNDING_SEED] = _signed(direction_seed(run, step, ROUNDING_DIRECTION))
    control[0, OK] = 1


def estimate_two_sided_(control: Tensor, losses: Tensor) -> None:
    """Two-sided estimate (SPSA; MeZO, arXiv 2305.17333, eq. 1): c_k = (l+_k - l-_k) / (2 eps q) for each row's eps.

    A loss that is not finite, or a coefficient that is not finite as float32, clears ok and counts a skip; else the
    step counts as applied.

    Args:
        losses: float64 [2 q]: l(w + eps z_k), l(w - eps z_k) for k = 0 .. q - 1 in turn.
    """
    q = len(losses) // 2
    doubles = control.view(torch.float64)
    doubles[2, : 2 * q] = losses
    difference = losses[0::2] - losses[1::2]
    coefficients = difference / (2.0 * doubles[LINES:, EPS, None] * float(q))
    doubles[LINES:, COEFFICIENTS : COEFFICIENTS + q] = coefficients
    ok = bool(torch.isfinite(losses).all() and torch.isfinite(coefficients.to(torch.float32)).all())
    control[0, OK] = int(ok)
    control[0, APPLIED if ok else SKIPPED] += 1


def pass_(
    src: list[Tensor],
    dst: list[Tensor],
    table: Tensor,
    control: Tensor,
    distribution: int,
    undo: int,
    undo_sign: float,
    directions: int,
    perturb: int,
    perturb_sign: float,
    stochastic: bool,
) -> None:
    """One sweep over all tensors. For each element w, each line rounded to the storage dtype:
        undo     w <- round(w + undo_sign eps z_undo)                       where undo >= 0
        update   w <- round(w - lr (g + weight_decay w)), g = sum_j c_j z_j  where directions > 0 and ok
        perturb  w <- round(w + perturb_sign eps z_perturb)                 where perturb >= 0
    `update` rounds stochastically if asked, 16-bit tensors only; all else rounds to nearest. An element whose result
    equals it, or is NaN, keeps its bits (-0.0 and the payload of a NaN survive).

    Args:
        src: sources, or empty for dst itself.
        dst: destinations, float32, bfloat16 or float16.
        table: int64 [T, 5]: key, base, inner, stride, row of each tensor.
        control: int64 [3 + rows, 8 + 2 directions].
        distribution: a position in DISTRIBUTIONS.
        undo, perturb: a direction, or -1.
        directions: update with directions 0 .. directions - 1; 0 is no update.
    """
    update = directions > 0 and int(control[0, OK]) != 0
    for source, target, (key, base, inner, stride, row) in zip(src or dst, dst, table.tolist(), strict=True):
        index = global_index(target.numel(), base=base, inner=inner, stride=stride)
        scalars = control.view(torch.float64)[LINES + row].to(torch.float32)
        w = source.reshape(-1).to(torch.float32)

        def z(j: int, key: int = key, index: Tensor = index) -> Tensor:
            return draw(distribution, _seed(control, j), key, index)

        v = w
        if undo >= 0:
            v = round_nearest(fma(float32(undo_sign) * scalars[EPS], z(undo), v), target.dtype)
        if update:
            g = _estimate(scalars[COEFFICIENTS:], [z(j) for j in range(directions)])
            v = _sgd(v, g, scalars)
            if stochastic and target.dtype != torch.float32:
                bits = rounding_bits(int(control[0, ROUNDING_SEED]) & _M64, key, index)
                v = round_stochastic(v, target.dtype, bits)
            else:
                v = round_nearest(v, target.dtype)
        if perturb >= 0:
            v = round_nearest(fma(float32(perturb_sign) * scalars[EPS], z(perturb), v), target.dtype)
        _store(target, source, v, (v < w) | (v > w))


def _estimate(coefficients: Tensor, z: list[Tensor]) -> Tensor:
    """g = c_0 z_0, then g <- fma(c_j, z_j, g) in the order of the directions."""
    g = coefficients[0] * z[0]
    for c, z_j in zip(coefficients[1:], z[1:], strict=False):
        g = fma(c, z_j, g)
    return g


def _sgd(w: Tensor, g: Tensor, scalars: Tensor) -> Tensor:
    """w - lr (g + wd w); the decay term is left out, not multiplied by zero, where wd is 0."""
    if scalars[WEIGHT_DECAY] != 0:
        g = fma(scalars[WEIGHT_DECAY], w, g)
    return fma(-scalars[LR], g, w)


def _store(target: Tensor, source: Tensor, v: Tensor, changed: Tensor) -> None:
    """Writes v where it changed and the source's own bits elsewhere (as integers: copies of NaN keep their payload)."""
    integer = _SAME_SIZE_INTEGER[target.dtype]
    new, old = v.to(target.dtype).view(integer), source.reshape(-1).view(integer)
    target.view(integer).view(-1).copy_(torch.where(changed, new, old))


def noise_(out: Tensor, seed: int, key: int, base: int, inner: int, stride: int, distribution: int) -> None:
    """Fills `out` with a shard of the field, rounded to nearest in its dtype. `seed`: 64 bits, as a signed integer."""
    index = global_index(out.numel(), base=base, inner=inner, stride=stride)
    out.view(-1).copy_(round_nearest(draw(distribution, seed & _M64, key, index), out.dtype).to(out.dtype))


def philox_(out: Tensor, seed: int, high: int, block: int) -> None:
    """Fills `out` (int32 [n, 4]) with the words of the counters 2^64 high + block + i, i < n, under key `seed`."""
    block, high = block & _M64, high & _M64
    low = torch.tensor([[b & 0xFFFFFFFF, b >> 32] for b in ((block + i) & _M64 for i in range(len(out)))]).view(-1, 2)
    counter = torch.cat((low, torch.tensor([high & 0xFFFFFFFF, high >> 32]).expand(len(out), 2)), 1)
    words = philox4x32(counter, seed & _M64)
    out.copy_(torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32))
