"""The noise field z(seed, tensor key, element index) as a tensor (`pyzo.noise`), and the keys of parameters."""

import hashlib
from collections.abc import Sequence

import torch

from pyzo import ops

NOISE_VERSION = 1
WRAPPER_PREFIXES = ("_orig_mod.", "module.", "base_model.model.")


def tensor_key(name: str) -> int:
    """The 56-bit key of a parameter: BLAKE2b-56 of its UTF-8 name, little-endian, without what wrappers add.

    `_orig_mod.` (torch.compile) is dropped wherever it stands, `module.` (DDP) and `base_model.model.` (PEFT) at the
    front, so that a run sees the same noise whether or not its model is wrapped.
    """
    name = name.replace("_orig_mod.", "")
    while name.startswith(WRAPPER_PREFIXES):
        name = name[len(next(prefix for prefix in WRAPPER_PREFIXES if name.startswith(prefix))) :]
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")


def noise(
    shape: int | Sequence[int],
    *,
    seed: int,
    key: int,
    offset: int = 0,
    inner: int | None = None,
    stride: int | None = None,
    distribution: str = "normal",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The noise of a tensor or of a rectangle of it, as every pass regenerates it: a pure function of its arguments.

    Element i of the result, in row-major order, is z at global index offset + (i // inner) * stride + i % inner of the
    tensor with this key: (rows, columns from c on) of a matrix with n columns is offset=c, inner=width, stride=n.

    Args:
        shape: of the result.
        seed: of the direction, an integer in [0, 2^64).
        key: of the tensor, an integer in [0, 2^56); `pyzo.tensor_key(name)` for a parameter.
        offset: global index of the first element.
        inner: length of a run of neighbouring elements; None: the whole result is one run.
        stride: distance between the starts of runs, in elements; needed with `inner`.
        distribution: "normal" (N(0, 1), Box-Muller on Philox4x32-7, tails to 6.7) or "rademacher" (-1 or 1).
        dtype: float32, bfloat16 or float16; the field is fp32, rounded to nearest.
        device: the CPU and CUDA devices give equal bits.

    Returns:
        A new tensor. Raises TypeError or ValueError naming the argument.
    """
    seed = ops.check_unsigned("seed", seed, 64)
    key = ops.check_unsigned("key", key, 56)
    offset = ops.check_unsigned("offset", offset, 63)
    code = ops.distribution_code(distribution)
    if dtype not in ops.DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, ops.DTYPES))}, got {dtype}")
    if (inner is None) != (stride is None):
        raise ValueError(f"inner, stride: expected both or neither, got inner={inner}, stride={stride}")
    if inner is not None:
        inner, stride = ops.check_unsigned("inner", inner, 63), ops.check_unsigned("stride", stride, 63)
        if not 0 < inner <= stride:
            raise ValueError(f"inner: expected 0 < inner <= stride, got inner={inner}, stride={stride}")
    out = torch.empty(shape, dtype=dtype, device=device)
    ops.noise_(out, seed=seed, key=key, base=offset, inner=inner or 0, stride=stride or 0, distribution=code)
    return out
