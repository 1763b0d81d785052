"""The operator of dropout whose mask is drawn again in backward: only a seed of 8 bytes is saved."""

from typing import Any

import torch
from torch import Tensor

from .autograd import check_float, differentiable
from .library import operators as _ops
from .steps import KEEP_ALL


def check_probability(p: float) -> bool:
    """Whether dropout of probability p drops anything at 16 bits; ValueError where it would drop everything."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1 or round((1 - p) * KEEP_ALL) == 0:
        raise ValueError(f"p: expected a number in [0, 1 - 2^-17), got {p!r}")
    return round((1 - p) * KEEP_ALL) < KEEP_ALL


def new_seed(device: torch.device) -> Tensor:
    """One seed from torch's default generator of a device: int64 [1] in [0, 2^63 - 1), there.

    That is how `nn.Dropout` draws, so whatever restores torch's generators (checkpointing, a zeroth-order step) gets
    the same mask again.
    """
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """x with elements zeroed at probability p, the others scaled so that the expectation stays; saves its seed only.

    An element is kept where its 16 bits of the noise field (stream 4, tensor key 0, its index in row-major order) are
    below keep = round((1 - p) 2^16), and is then multiplied by 2^16 / keep: p is resolved to 2^-16, and the expectation
    is exact for the p that is used. What is dropped becomes 0, NaN and infinity too. The same seed and shape give the
    same mask on every device. It is linear in x: backward, and backward of that, is the same operator.

    Args:
        x: float32, bfloat16 or float16 (float64 on the CPU), any shape and strides.
        p: probability in [0, 1 - 2^-17). Where keep is 2^16, as for 0, x itself is returned and no seed is drawn.
        seed: int64 [1] on x's device, all 64 bits count, read by the kernel; None: drawn by `new_seed`.

    Raises:
        TypeError: x of another dtype.
        ValueError: p out of range.
    """
    check_float("x", x)
    if not check_probability(p):
        return x
    return _dropout(x.contiguous(), new_seed(x.device) if seed is None else seed, p)


def dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """`x` without a seed; else dropout of it by the operator itself, the same map in backward, as it is linear."""
    return x if seed is None else _ops.dropout(x.contiguous(), seed, p)


def _like(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_seed(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _ops.dropout(gradient.contiguous(), *ctx.saved_tensors, ctx.p), None, None


torch.library.register_fake("pyzo::dropout", _like)
_dropout = differentiable("dropout", _backward, _save_seed)
