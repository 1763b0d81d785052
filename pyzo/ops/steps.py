"""The operators of zeroth-order steps: a fake of each for torch.compile, and a typed function around each."""

from collections.abc import Sequence

import torch

from .library import operators as _ops

DISTRIBUTIONS = {"normal": 0, "rademacher": 1}
RULES = {"sgd": 0, "sign": 1, "momentum": 2, "adam": 3}
STATES = {"sgd": 0, "sign": 0, "momentum": 1, "adam": 2}  # numbers that a rule keeps per weight
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEEP_ALL = 65536  # masks and dropout keep an element whose 16 random bits are below a number up to this


def _nothing(*args: object) -> None:
    """Fake of an operator that only writes into its arguments."""


for _name in ("pass_", "pass_rows_", "mask_bits_", "noise_", "philox_", "begin_step_", "estimate_", "choose_"):
    torch.library.register_fake(f"pyzo::{_name}", _nothing)


def signed(value: int) -> int:
    """The int64 with the bits of a 64-bit unsigned integer, as operators and the control tensor hold seeds and keys."""
    return value - (1 << 64) if value >> 63 else value


def check_unsigned(name: str, value: int, bits: int) -> int:
    """`value` as an int in [0, 2^bits); TypeError or ValueError that names the argument otherwise."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    value = value.__index__()
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name}: expected an integer in [0, 2^{bits}), got {value}")
    return value


def distribution_code(name: str) -> int:
    """The operators' number of a distribution; ValueError for an unknown name."""
    if name not in DISTRIBUTIONS:
        raise ValueError(f"distribution: expected one of {', '.join(map(repr, DISTRIBUTIONS))}, got {name!r}")
    return DISTRIBUTIONS[name]


def control(directions: int, rows: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """An empty control tensor: int64 [3 + rows, 16 + 2 directions], laid out as csrc/core/control.h says."""
    return torch.zeros(3 + rows, 16 + 2 * directions, dtype=torch.int64, device=device)


def pass_(
    src: list[torch.Tensor],
    dst: list[torch.Tensor],
    state: list[torch.Tensor],
    table: torch.Tensor,
    control: torch.Tensor,
    *,
    bits: Sequence[torch.Tensor] = (),
    indices: Sequence[torch.Tensor] = (),
    low: Sequence[torch.Tensor] = (),
    distribution: int,
    undo: int = -1,
    undo_sign: float = 0.0,
    rule: int = 0,
    directions: int = 0,
    update_sign: float = 1.0,
    chosen: bool = False,
    retract: bool = False,
    perturb: int = -1,
    perturb_sign: float = 0.0,
    stochastic: bool = False,
    masked: bool = False,
    trial: bool = False,
) -> None:
    """One sweep over tensors of one device (DESIGN.md section 4): undo, then update, then perturb, each element once.

    Args:
        src: where the weights are read; empty: from `dst`. With `indices` as long as each list: the listed weights.
        dst: contiguous float32, bfloat16 or float16 tensors, any shapes, none sharing memory.
        state: what the rule keeps, float32 or bfloat16: its first state for every tensor of `dst`, then its second.
            With `indices` as long as each list.
        table: int64 [len(dst), 5] on the CPU: key, base, inner, stride (the shard), row of `control`.
        control: int64 [3 + rows, 16 + 2 directions] on the tensors' device (csrc/core/control.h).
        bits: none, or one mask for each tensor of `dst`: contiguous uint8 [ceil(n / 8)], element 8 j + k in bit k of
            byte j, or no bytes where a tensor has no such mask. Heeded where `masked`.
        indices: none, or the local indices of the only elements of each tensor of `dst` that the pass touches, at the
            cost of those: contiguous int64 [listed], strictly increasing, in [0, n). Not beside `bits`. What they
            are is checked on the CPU; on CUDA, where no pass waits for the device, an index outside [0, n) is skipped
            and the order is not looked at (an index that stands twice is then moved by two threads at once).
        low: none, or the low halves of the float32 masters of bfloat16 weights, which an update then reads and makes
            unrounded (csrc/core/split.h; "undo", "perturb" and "retract" are not for such a pass): contiguous int16,
            as long as each of `dst` (with `indices`, as each list), or no elements where weights have another dtype.
        undo: direction whose perturbation is taken back by adding undo_sign * eps * z, or -1.
        rule: a number of RULES.
        directions: how many directions, from 0 on, the update sums; 0: no update.
        update_sign: factor of lr.
        chosen: multiply lr by the control tensor's choice (1, -1 or 0), too.
        retract: round stochastically with the complement of the random bits, which takes back the same update with the
            other sign exactly, but where it crossed a power of two.
        perturb: direction that is added last, times perturb_sign * eps, or -1.
        stochastic: round the update of 16-bit weights and states stochastically.
        masked: leave elements alone that are outside the mask: whose 16 mask bits are not below the row's `keep`, whose
            bit in `bits` is 0, or whose magnitude in `src` is above the row's threshold. In place no magnitude counts:
            `mask_bits_` notes what it was before the weights moved.
        trial: leave `low` as it is: the weights of the update are only tried.
    """
    _ops.pass_(
        src,
        dst,
        state,
        list(bits),
        list(indices),
        list(low),
        table,
        control,
        distribution,
        undo,
        undo_sign,
        rule,
        directions,
        update_sign,
        chosen,
        retract,
        perturb,
        perturb_sign,
        stochastic,
        masked,
        trial,
    )


def pass_rows_(
    out: list[torch.Tensor],
    ids: list[torch.Tensor],
    sizes: list[int],
    table: torch.Tensor,
    control: torch.Tensor,
    *,
    bits: Sequence[torch.Tensor] = (),
    distribution: int,
    rule: int = 0,
    directions: int = 0,
    update_sign: float = 1.0,
    chosen: bool = False,
    perturb: int = -1,
    perturb_sign: float = 0.0,
    stochastic: bool = False,
    masked: bool = False,
) -> None:
    """Moves looked-up rows of matrices (embeddings) as a pass over the whole matrices would: update, then perturb.

    `out[i]` is `weight[ids]` of a matrix [size, d] that stays as it is. Afterwards its bits are those of
    `moved[ids]`, where `pass_([weight], [moved], ...)` was told the same; the cost is that of the rows.

    Args:
        out: contiguous float32, bfloat16 or float16 matrices [n, d], none sharing memory, changed in place.
        ids: which rows of its matrix those of each `out` are: contiguous int64 [n], in any order, repeated or not, in
            [0, size). What they are is checked on the CPU; on CUDA, where no pass waits for the device, a row outside
            the matrix is left alone.
        sizes: the rows of each matrix.
        table: as `pass_` takes it, a line for each matrix.
        control: as `pass_` takes it.
        bits: none, or one mask for each whole matrix, as `pass_` takes it.
        distribution: as for `pass_`, and so are all that follow.
        rule: one without states where `directions` is not 0.
        masked: as for `pass_` from elsewhere: magnitudes count, as they are in `out`.

    Raises:
        RuntimeError: an argument that is none of these, by name, before anything is written.
    """
    _ops.pass_rows_(
        out,
        ids,
        list(bits),
        sizes,
        table,
        control,
        distribution,
        rule,
        directions,
        update_sign,
        chosen,
        perturb,
        perturb_sign,
        stochastic,
        masked,
    )


def mask_bits_(
    weights: list[torch.Tensor], bits: list[torch.Tensor], table: torch.Tensor, control: torch.Tensor
) -> None:
    """Which weights are at most their row's threshold in magnitude (a NaN is not), for `pass_`.

    Args:
        weights: contiguous float32, bfloat16 or float16 tensors of one device.
        bits: where the masks go: contiguous uint8 [ceil(n / 8)] for each; element 8 j + k in bit k of byte j, bits that
            belong to no element 0.
        table: as `pass_` takes it, of which the row alone is read.
        control: as `pass_` takes it.
    """
    _ops.mask_bits_(weights, bits, table, control)


def noise_(out: torch.Tensor, *, seed: int, key: int, base: int, inner: int, stride: int, distribution: int) -> None:
    """Fill `out` (contiguous float32, bfloat16, float16) with the noise field; see `pyzo.noise`."""
    _ops.noise_(out, signed(seed), key, base, inner, stride, distribution)


def begin_step_(control: torch.Tensor) -> None:
    """Advance the step counter of a control tensor and draw the seeds of its directions."""
    _ops.begin_step_(control)


def estimate_(control: torch.Tensor, losses: torch.Tensor, *, kind: int, q: int, scaling: int) -> None:
    """Coefficients of q directions in each row, or a cleared ok, from float64 losses (csrc/core/control.h).

    Args:
        control: as `pass_` takes it.
        losses: float64 vector in order of evaluation; those that the kind does not need are only watched.
        kind: 0 two-sided (l+, l- in turn), 1 one-sided (l(w), then l+), 2 forward (l(w), derivative in turn).
        q: how many directions.
        scaling: 0 plain, 1 by the standard deviation of the losses (one-sided, q >= 2), 2 signs only.
    """
    _ops.estimate_(control, losses, kind, q, scaling)


def choose_(control: torch.Tensor, losses: torch.Tensor) -> None:
    """Which of w, w - lr g, w + lr g a conservative step ends at, from the float64 losses [3] there."""
    _ops.choose_(control, losses)


def isas() -> list[str]:
    """Instruction sets of this machine that pyzo has bodies for, best first."""
    return [name.rstrip("*") for name in _ops.isas().split()]


def select_isa(name: str) -> None:
    """Use the bodies of one instruction set ("" = the best). For tests: results never depend on it."""
    if not _ops.select_isa(name):
        raise ValueError(f"name: expected one of {isas()} or '', got {name!r}")


def cuda_stream_bound() -> bool:
    """Whether the loaded torch offers the CUDA stream that the CUDA kernels run on."""
    return _ops.cuda_stream_bound()
