"""The operators of norms in plain torch: on the CPU equal in every bit, whatever the instruction set.

Sums over a row are 32 partial sums, element j in partial sum j mod 32 in order, then halved until one is left (the
first half plus the second). Sums over rows are taken over blocks of rows in order, then over blocks in order. Each
operation is rounded once.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

SUMS = 32  # partial sums of a row
BLOCK_ROWS, BLOCKS = 32, 64  # rows of a block at least, blocks at most


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
    from_input: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """[..., D] -> the output of `dtype`, and 1/std of each row, [rows]."""
    wide = _wide(x)
    mean, rstd = _moments(wide, eps, centered)
    y = (wide - mean) * rstd
    if weight is not None or bias is not None:
        gamma, beta = _affine(wide, weight, bias, weight_offset)
        y = y * gamma + beta
    return y.to(dtype).reshape(x.shape), rstd.squeeze(1)


def norm_backward(
    gradient: Tensor,
    saved: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    centered: bool,
    weight_offset: float,
    from_input: bool,
    dtype: torch.dtype,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in `dtype`), weight and bias (empty where not wanted)."""
    wide, value, scale = _wide(gradient), _wide(saved), rstd.reshape(-1, 1)
    gamma, beta = _affine(wide, weight, bias, weight_offset)
    value = (value - _moments(value, 0.0, centered)[0]) * scale if from_input else (value - beta) * (1 / gamma)
    g = wide * gamma
    columns = wide.shape[1]
    mean_g = _row_sum(g) / columns if centered else 0.0
    dx = ((g - mean_g) - value * (_row_sum(g * value) / columns)) * scale
    none = gradient.new_empty(0)
    return (
        dx.to(dtype).reshape(gradient.shape),
        _column_sum(wide * value).to(weight.dtype) if weight is not None and weight_gradient else none,
        _column_sum(wide).to(bias.dtype) if bias is not None and bias_gradient else none,
    )


def _wide(t: Tensor) -> Tensor:
    """[rows, D] in the arithmetic's precision."""
    return t.reshape(-1, t.shape[-1]).to(torch.promote_types(t.dtype, torch.float32))


def _affine(like: Tensor, weight: Tensor | None, bias: Tensor | None, offset: float) -> tuple[Tensor, Tensor]:
    gamma = like.new_ones(like.shape[1]) if weight is None else offset + weight.to(like.dtype)
    return gamma, torch.zeros_like(gamma) if bias is None else bias.to(like.dtype)


def _moments(x: Tensor, eps: float, centered: bool) -> tuple[Tensor, Tensor]:
    """Mean and 1/std of each row, [rows, 1]; the mean of RMSNorm is 0."""
    columns = x.shape[1]
    if not centered:
        return torch.zeros_like(x[:, :1]), _reciprocal_root(_row_sum(x * x) / columns + eps)
    mean = _row_sum(x) / columns
    rest = x - mean
    shift = _row_sum(rest) / columns
    variance = (_row_sum(rest * rest) / columns - shift * shift).clamp(min=0)
    return mean + shift, _reciprocal_root(variance + eps)


def _reciprocal_root(x: Tensor) -> Tensor:
    """1 / sqrt(x), both correctly rounded, which torch's float32 root is not."""
    return 1 / x.double().sqrt().to(x.dtype)


def _row_sum(x: Tensor) -> Tensor:
    rows, columns = x.shape
    groups = (columns + SUMS - 1) // SUMS
    parts = pad(x, (0, groups * SUMS - columns)).reshape(rows, groups, SUMS)
    total = torch.zeros_like(parts[:, 0])
    for k in range(groups):
        total = total + parts[:, k]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total


def _column_sum(x: Tensor) -> Tensor:
    rows = x.shape[0]
    blocks = max(1, min(rows // BLOCK_ROWS, BLOCKS))
    total = x.new_zeros(x.shape[1])
    for block in range(blocks):
        part = x.new_zeros(x.shape[1])
        for row in range(block * rows // blocks, (block + 1) * rows // blocks):
            part = part + x[row]
        total = total + part
    return total


OPERATORS = (norm, norm_backward)
