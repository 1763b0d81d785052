"""Dropout again, from the definition of its mask."""

import torch
from torch import Tensor

from .arithmetic import round_nearest
from .field import DROPOUT_STREAM, random_bits


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x scaled by 2^16 / keep where an element's 16 bits are below keep = round((1 - p) 2^16), else 0.

    Args:
        x: float32, bfloat16, float16 or float64, any shape; the bits belong to the row-major index.
        seed: int64 [1].
        p: in [0, 1 - 2^-17).

    Returns:
        Of x's shape and dtype, computed in float32 (float64 for float64) and rounded once.
    """
    keep = round((1 - p) * 65536)
    bits = random_bits(int(seed) % 2**64, 0, DROPOUT_STREAM, torch.arange(x.numel())).view(x.shape)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.tensor(65536 / keep, dtype=wide.dtype)
    y = torch.where(bits < keep, wide * scale, torch.zeros((), dtype=wide.dtype))
    return y if x.dtype == wide.dtype else round_nearest(y, x.dtype).to(x.dtype)
