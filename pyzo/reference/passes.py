"""The operators that write weights and noise: what one pass does to an element, and the field into a tensor."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .arithmetic import bits_of_float, float32, float_of_bits, fma, round_nearest, round_stochastic
from .control import CHOICE, COEFFICIENTS, KEEP_ALL, LINES, OK, ROUNDING_SEED, Row, read_row, read_seed
from .field import MASK_STREAM, ROUNDING_STREAM, STATE_FACTORS, draw, global_index, philox4x32, random_bits
from .rules import update

_M64 = 2**64 - 1
_SAME_SIZE_INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def pass_(
    src: list[Tensor],
    dst: list[Tensor],
    state: list[Tensor],
    bits: list[Tensor],
    indices: list[Tensor],
    low: list[Tensor],
    table: Tensor,
    control: Tensor,
    distribution: int,
    undo: int,
    undo_sign: float,
    rule: int,
    directions: int,
    update_sign: float,
    chosen: bool,
    retract: bool,
    perturb: int,
    perturb_sign: float,
    stochastic: bool,
    masked: bool,
    trial: bool,
) -> None:
    """One sweep over all tensors. For each element w, each line rounded to the storage dtype:
        undo     w <- round(w + undo_sign eps z_undo)            where undo >= 0
        update   w, state <- rule(w, g, state), g = sum_j c_j z_j  where directions > 0 and ok
        perturb  w <- round(w + perturb_sign eps z_perturb)      where perturb >= 0
    Where masked, an element outside the mask (`trained_elements`) keeps weight and state; in place no magnitude
    counts. A weight or state whose result equals it, or is NaN, keeps its bits (-0.0 and the payload of a NaN survive).
    What keeps its weight has that of its source.

    A bfloat16 weight with low bits stands for its master (`join_master`): an update reads the master, is not rounded,
    and becomes weight and low bits again (`split_master`), or the weight alone where it is a trial. What keeps its
    master keeps the bits of both. Such an update neither undoes nor perturbs nor retracts.

    All rounds to nearest, but with `stochastic` the update: weights of 16 bits with the rounding bits r of the step,
    bfloat16 state s with (r STATE_FACTORS[s]) mod 2^16. The update uses the new states before they are rounded.

    Args:
        src: sources, or empty for dst itself. With indices: of the listed elements alone.
        dst: T destinations, float32, bfloat16 or float16, each whole.
        state: the S T states of the rule, the first state of all tensors before the second, all float32 or all
            bfloat16. May be empty where directions is 0. With indices: of the listed elements alone.
        bits: a mask of each destination, packed as by `mask_bits_`, or no bytes for one without; or no tensors.
        indices: which elements of each destination the pass touches, int64 [listed], increasing; or no tensors: all.
            An element has the noise, the rounding bits and the mask bits that it has in a pass over all.
        low: int16 low bits for each weight of each destination (with indices: for the listed elements alone), none for
            a tensor that is not bfloat16; or no tensors.
        table: int64 [T, 5]: key, base, inner, stride, row of each tensor.
        control: int64 [3 + rows, 16 + 2 directions].
        distribution: a position in DISTRIBUTIONS.
        undo, perturb: a direction, or -1.
        rule: a position in RULES.
        directions: update with directions 0 .. directions - 1; 0 is no update.
        update_sign, chosen: lr is multiplied by update_sign and, where chosen, by the choice of `choose_`.
        retract: rounds with 65535 - r in place of r, which takes back an update of the opposite sign: exactly where
            weight and result lie between the same powers of two, nothing decays and rounding is stochastic.
            A rule with states takes update_sign = 1, chosen = retract = False.
        trial: `low` is read, but stays as it is.
    """
    lr_factor = float(float32(update_sign))
    if chosen:
        lr_factor *= float(control.view(torch.float64)[0, CHOICE])
    for i, (source, target, (key, base, inner, stride, r)) in enumerate(
        zip(src or dst, dst, table.tolist(), strict=True)
    ):
        local = indices[i] if indices else torch.arange(target.numel())
        index = global_index(target.numel(), base=base, inner=inner, stride=stride)[local]
        field, row = _Field(control, distribution, key, index), read_row(control, r)
        from_ = source.reshape(-1) if src else target.reshape(-1)[local]
        w = from_.to(torch.float32)
        trained = torch.ones_like(local, dtype=torch.bool)
        if masked:
            trained = trained_elements(row if src else replace(row, threshold=torch.inf), key, index, w)
            if bits:
                trained &= packed_elements(bits[i], local)
        updates = directions > 0 and int(control[0, OK]) != 0
        splits = updates and bool(low) and target.dtype == torch.bfloat16
        before = v = join_master(from_, low[i].reshape(-1)) if splits else w
        if undo >= 0:
            v = round_nearest(fma(float32(undo_sign) * float32(row.eps), field.z(undo), v), target.dtype)
        if updates:
            c = control.view(torch.float64)[LINES + r, COEFFICIENTS : COEFFICIENTS + directions].to(torch.float32)
            g = _estimate(c, [field.z(j) for j in range(directions)])
            states = state[i :: len(dst)]
            old = [s.reshape(-1).to(torch.float32) for s in states]
            v, new = update(rule, v, g, old, replace(row, lr=row.lr * lr_factor))
            dtype = torch.float32 if splits else target.dtype
            v = field.rounded(v, dtype, stochastic, lambda r: 65535 - r if retract else r)
            for s, x, was, factor in zip(states, new, old, STATE_FACTORS, strict=False):
                stored = field.rounded(x, s.dtype, stochastic, lambda r, factor=factor: r * factor & 0xFFFF)
                _store(s, torch.arange(s.numel()), s.reshape(-1), stored, trained & ((stored < was) | (stored > was)))
        if perturb >= 0:
            v = round_nearest(fma(float32(perturb_sign) * float32(row.eps), field.z(perturb), v), target.dtype)
        changed = trained & ((v < before) | (v > before))
        if splits:
            v, new_low = split_master(v)
            if not trial:
                low[i].view(-1)[changed] = new_low[changed]
        _store(target, local, from_, v, changed)


def join_master(weight: Tensor, low: Tensor) -> Tensor:
    """The float32 master of a bfloat16 weight and its int16 low bits: bits(master) = 2^16 bits(weight) + low.

    A weight that is infinite or NaN is its own master; a zero with negative low bits, which `split_master` never makes,
    is that zero.
    """
    codes = weight.view(torch.int16).to(torch.int64)
    sign, magnitude = codes & 0x8000, codes & 0x7FFF
    joined = ((magnitude << 16) + low.to(torch.int64)).clamp(min=0)
    return float_of_bits((sign << 16) | torch.where(magnitude < 0x7F80, joined, magnitude << 16))


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 masters in two parts, as `join_master` takes them: the weight, still as float32, and its low bits.

    The weight is the master rounded to nearest, a tie away from zero. A finite master that would round to infinity is
    held at the largest that does not, 0x7F7F7FFF. NaN has no parts worth storing.
    """
    codes = bits_of_float(master)
    sign, magnitude = codes & 0x80000000, codes & 0x7FFFFFFF
    magnitude = torch.where(magnitude < 0x7F800000, magnitude.clamp(max=0x7F7F7FFF), magnitude)
    upper = (magnitude + 0x8000) & 0xFFFF0000
    return float_of_bits(sign | upper), (magnitude - upper).to(torch.int16)


def pass_rows_(
    out: list[Tensor],
    ids: list[Tensor],
    bits: list[Tensor],
    sizes: list[int],
    table: Tensor,
    control: Tensor,
    distribution: int,
    rule: int,
    directions: int,
    update_sign: float,
    chosen: bool,
    perturb: int,
    perturb_sign: float,
    stochastic: bool,
    masked: bool,
) -> None:
    """Rows that were looked up in matrices, moved as a pass over the whole matrices, from elsewhere, moves them.

    Args:
        out: T matrices [n, d], float32, bfloat16 or float16.
        ids: int64 [n] for each: row i of `out` is row ids[i] of its matrix. A row may be looked up more than once.
        bits: a mask of each whole matrix as `pass_` takes it, or no tensors.
        sizes: T numbers, the rows of each matrix.
        rule: one without states where directions > 0.
        table, control, and what follows: as for `pass_`, without undo and retract.
    """
    for i, (rows, which, size) in enumerate(zip(out, ids, sizes, strict=True)):
        looked_up = rows.view(_SAME_SIZE_INTEGER[rows.dtype])
        occurrence = (which[:, None] == which).tril(-1).sum(1)  # how often a row's id stands before it
        for own in (occurrence == k for k in occurrence.unique()):  # each id at most once at a time
            whole = torch.zeros(size, rows.shape[1], dtype=looked_up.dtype)
            whole[which[own]] = looked_up[own]
            moved = torch.empty_like(whole)
            pass_(
                [whole.view(rows.dtype)],
                [moved.view(rows.dtype)],
                [],
                bits[i : i + 1],
                [],
                [],
                table[i : i + 1],
                control,
                distribution,
                -1,
                0.0,
                rule,
                directions,
                update_sign,
                chosen,
                False,
                perturb,
                perturb_sign,
                stochastic,
                masked,
                False,
            )
            looked_up[own] = moved[which[own]]


def trained_elements(row: Row, key: int, index: Tensor, w: Tensor) -> Tensor:
    """Which elements of a tensor the mask of its row lets move, as booleans.

    Those whose mask bits are below `keep` and whose magnitude is at most `threshold` (`small_elements`).

    Args:
        index: int64 [n], global.
        w: float32 [n], the weights there as the pass finds them.
    """
    trained = torch.ones_like(index, dtype=torch.bool)
    if row.keep < KEEP_ALL:
        trained &= random_bits(row.mask_seed, key, MASK_STREAM, index) < row.keep
    if float32(row.threshold) != torch.inf:  # where all magnitudes are small enough, a NaN is, too
        trained &= small_elements(row, w)
    return trained


def packed_elements(packed: Tensor, local: Tensor) -> Tensor:
    """Which of the local elements a packed mask lets move: element 8 j + k by bit k of byte j; all, without bytes."""
    if packed.numel() == 0:
        return torch.ones_like(local, dtype=torch.bool)
    return (packed.long()[local >> 3] >> (local & 7) & 1) != 0


def small_elements(row: Row, w: Tensor) -> Tensor:
    """Which of the float32 weights are in magnitude at most the row's threshold as float32; a NaN never is."""
    return w.abs() <= float32(row.threshold)


def mask_bits_(weights: list[Tensor], bits: list[Tensor], table: Tensor, control: Tensor) -> None:
    """Writes which weights are small (`small_elements`), packed: element 8 j + k has bit k of byte j, other bits are 0.

    Args:
        weights: T tensors, float32, bfloat16 or float16.
        bits: uint8 [ceil(n / 8)] for each tensor of n elements.
        table: as `pass_` takes it; the row alone counts.
    """
    for w, out, r in zip(weights, bits, table[:, 4].tolist(), strict=True):
        small = small_elements(read_row(control, r), w.reshape(-1).to(torch.float32))
        padded = torch.nn.functional.pad(small.long(), (0, 8 * len(out) - len(small))).view(-1, 8)
        out.copy_((padded << torch.arange(8)).sum(1))


@dataclass(frozen=True)
class _Field:
    """What the noise field says about the elements of one tensor in one step."""

    control: Tensor
    distribution: int
    key: int
    index: Tensor

    def z(self, j: int) -> Tensor:
        """Direction j."""
        return draw(self.distribution, read_seed(self.control, j), self.key, self.index)

    def rounded(self, x: Tensor, dtype: torch.dtype, stochastic: bool, permuted: Callable[[Tensor], Tensor]) -> Tensor:
        """A new weight or state rounded to `dtype`; if asked, stochastically with `permuted` of the bits r."""
        if not stochastic or dtype == torch.float32:
            return round_nearest(x, dtype)
        r = random_bits(int(self.control[0, ROUNDING_SEED]) & _M64, self.key, ROUNDING_STREAM, self.index)
        return round_stochastic(x, dtype, permuted(r))


def _estimate(coefficients: Tensor, z: list[Tensor]) -> Tensor:
    """g = c_0 z_0, then g <- fma(c_j, z_j, g) in the order of the directions."""
    g = coefficients[0] * z[0]
    for c, z_j in zip(coefficients[1:], z[1:], strict=True):
        g = fma(c, z_j, g)
    return g


def _store(target: Tensor, local: Tensor, source: Tensor, v: Tensor, changed: Tensor) -> None:
    """Writes to the elements `local` v where it changed and the source's bits elsewhere.

    As integers: copies of NaN keep their payload.
    """
    integer = _SAME_SIZE_INTEGER[target.dtype]
    new, old = v.to(target.dtype).view(integer), source.view(integer)
    target.view(integer).view(-1)[local] = torch.where(changed, new, old)


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
