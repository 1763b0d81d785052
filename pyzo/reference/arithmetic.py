"""What the specification means by fma, division, sqrt and rounding, on tensors, without relying on fused hardware."""

import torch
from torch import Tensor

_FRACTION_BITS = {torch.bfloat16: 7, torch.float16: 10}
_MIN_EXPONENT = {torch.bfloat16: -126, torch.float16: -14}
_OVERFLOW = {torch.bfloat16: 2.0**128, torch.float16: 2.0**16}


def float64(value: float) -> Tensor:
    """A float64 scalar whose arithmetic is that of IEEE 754: a division by zero makes an infinity or NaN."""
    return torch.tensor(value, dtype=torch.float64)


def float32(value: float | Tensor) -> Tensor:
    """A float32 scalar: `value`, a float or a float64 scalar, rounded once, to nearest even."""
    return torch.as_tensor(value, dtype=torch.float64).to(torch.float32)


def float_of_bits(bits: Tensor) -> Tensor:
    """float32 with the 32-bit patterns `bits` (int64 in [0, 2^32))."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def bits_of_float(x: Tensor) -> Tensor:
    """32-bit patterns of a float32 tensor as int64 in [0, 2^32)."""
    return x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32 tensors, rounded once (IEEE 754 fusedMultiplyAdd; broadcasts).

    The product of two float32 is exact in float64. The sum is rounded to odd: TwoSum (Knuth) tells whether it was
    exact, and if it was not, an even result moves one unit toward the exact value. Rounding that to float32 is then
    the same as rounding the exact value, since 53 >= 24 + 2 bits (Boldo and Melquiond 2008).
    """
    product, addend = torch.broadcast_tensors(a.double() * b.double(), c.double())
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    inexact_even = (error.abs() > 0) & (bits & 1 == 0)  # the error of an infinite or undefined sum is NaN
    step = torch.where((error > 0) == (total > 0), 1, -1)  # away from zero where both have one sign
    return torch.where(inexact_even, bits + step, bits).view(torch.float64).to(torch.float32)


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded float32 square root: a float64 root rounded again is innocuous, since 53 >= 2 * 24 + 2 bits."""
    return x.double().sqrt().to(torch.float32)


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Correctly rounded float32 quotient a / b (broadcasts), through float64 for the reason given at `sqrt`.

    Subnormal quotients too: one that is no tie of two float32 is further from every tie than float64 rounds.
    """
    return (a.double() / b.double()).to(torch.float32)


def round_nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 `x` rounded to the values of `dtype`, nearest even, overflow to infinity; the result is float32."""
    return x.to(dtype).to(torch.float32)


def round_stochastic(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """float32 `x` rounded to bfloat16 or float16 values stochastically; the result is float32.

    With q the distance of neighbouring values of `dtype` at |x| (below the normal range: of its subnormals),
        |result| = q floor((floor(2^16 |x| / q) + random) / 2^16),
    with 16 random bits per element: exact in expectation to 2^-16 q; a representable value never moves. What exceeds
    the largest finite value becomes infinite. Infinities and NaN pass.

    Args:
        x: float32.
        dtype: torch.bfloat16 or torch.float16.
        random: int64 in [0, 2^16), of the shape of `x`.
    """
    magnitude = x.abs().double()
    exponent = torch.frexp(magnitude).exponent - 1  # 2^exponent <= |x| < 2^(exponent + 1)
    exponent = exponent.clamp(min=_MIN_EXPONENT[dtype]) - _FRACTION_BITS[dtype]
    quantum = torch.ldexp(torch.ones_like(magnitude), exponent)
    units = ((magnitude / quantum * 65536.0).floor() + random.double()) / 65536.0
    rounded = units.floor() * quantum
    rounded = torch.where(rounded >= _OVERFLOW[dtype], torch.inf, rounded).to(torch.float32)
    return torch.where(torch.isfinite(x), torch.copysign(rounded, x), x)
