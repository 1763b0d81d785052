"""exp, expm1, log, log1p, tanh, sigmoid, erf and the normal distribution as `csrc/core/elementary.h` computes them.

float32 in, float32 out, of any shape; every operation is rounded once. Coefficients: `bench/fit_elementary.py`.
"""

import torch
from torch import Tensor

from .arithmetic import bits_of_float, divide, float32, float_of_bits, fma

ROUND = 1.5 * 2.0**23  # added to a number it leaves the nearest integer in the low bits of the sum
LOG2_E, LN2_HIGH, LN2_LOW = 1.44269504, 0.693145751953125, 1.42860677e-06
_M32 = 2**32 - 1


def exp(x: Tensor) -> Tensor:
    """e^x = 2^n e^f, |f| <= ln(2) / 2. 2^n comes in two factors, as it may be no normal number."""
    y = _at_most(torch.where(x < -104.0, float32(-104.0), x), 89.0)
    shifted, f = _reduce(y, 127.0)
    outer = torch.where(y < -80.0, float32(2.0**-64), float32(2.0))
    inner = float_of_bits(_exponent(shifted) + 0x3F800000 - bits_of_float(outer) & _M32)
    return _exponential(f, 1.0, 1.0) * inner * outer


def expm1(x: Tensor) -> Tensor:
    """e^x - 1: 2 (2^(n-1) (e^f - 1) + (2^(n-1) - 1/2))."""
    y = _at_most(torch.where(x < -18.0, float32(-18.0), x), 89.0)
    shifted, f = _reduce(y, 126.0)
    less_one = fma(f * f, _terms(f, 1.0, 1.0), f)
    half = float_of_bits(_exponent(shifted))
    result = fma(less_one, half, half - 0.5)
    return torch.where(x.abs() < 2.0**-25, x, result + result)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return sigmoids(x)[0]


def sigmoids(x: Tensor) -> tuple[Tensor, Tensor]:
    """1 / (1 + e^-x) and 1 less that: with y = |x| they are 1 / (1 + e^-y) and e^-y / (1 + e^-y)."""
    y = _at_most(x.abs(), 104.0)
    shifted, f = _reduce(y, 151.0, sign=-1.0)
    e = _exponential(f, -1.0, 2.0**-24) * float_of_bits(_exponent(shifted))
    r = divide(float32(1.0), e + 1.0)
    return torch.where(x < 0.0, e * r, r), torch.where(x < 0.0, r, e * r)


def tanh(x: Tensor) -> Tensor:
    """1 - 2 / (e^2|x| + 1), below 0.55 an odd polynomial."""
    y = _at_most(x.abs(), 9.5)
    s = y * y
    p = _polynomial(s, 0.0164381526, -0.0526721403, 0.133207306, -0.333329469)
    near = fma(p * s, y, y)
    shifted = fma(y, float32(2.0 * LOG2_E), float32(ROUND))
    f = fma(shifted - ROUND, float32(-0.346573591), y)
    e = float_of_bits(bits_of_float(_exponential(f, 2.0, 1.0)) + _exponent(shifted) & _M32)
    far = fma(divide(float32(1.0), e + 1.0), float32(-2.0), float32(1.0))
    return torch.copysign(torch.where(y > 0.55, far, near), x)


def erf(x: Tensor) -> Tensor:
    """An odd polynomial up to 1, from there 1 less the fourth power of a polynomial."""
    y = _at_most(x.abs(), 4.2)
    p = _polynomial(
        y * y, -0.000561984314, 0.00491490168, -0.0267092139, 0.112801135, -0.37612319, 0.128379121
    )  # fmt: skip
    q = _polynomial(
        y, -0.000155831891, 0.0029113912, -0.0203693975, 0.0604014955, -0.0400665998, -0.0745549053, -0.302314669,
        1.00391805,
    )  # fmt: skip
    q = q * q
    return torch.copysign(torch.where(y > 1.0, fma(-q, q, float32(1.0)), fma(p, y, y)), x)


def normal_distribution(x: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of being below `x` and the density at `x` of the standard normal, relative to their size.

    Below -t lies e^(-t^2 / 2) / (c t + m / d), with e^(-t^2 / 2) = 2^n e^(-f / 2), f = t^2 + 2 n ln 2.
    """
    t = _at_most(x.abs(), 14.42)
    shifted = fma(t * float32(-0.5 * LOG2_E), t, float32(ROUND))
    exact = fma(shifted, float32(2.0 * LN2_HIGH), float32(-2.0 * LN2_HIGH * ROUND))
    f = fma(exact, divide(float32(LN2_LOW), float32(LN2_HIGH)), fma(t, t, exact))
    less_one = fma(_terms(f, -0.5, 0.25), f, float32(-0.5)) * f
    power = float_of_bits(_exponent(shifted) + (151 << 23) & _M32)
    d = _polynomial(t, 0.0173339322, 0.162596792, 0.705429971, 1.63203514, 1.78125, factor=2.0**-24)
    m = _polynomial(t, 0.0432971604, 0.410972267, 1.64159489, 3.5625)
    ratio = d * divide(float32(1.0), fma(t * float32(2.506634 * 2.0**24), d, m))
    tail = fma(ratio, less_one, ratio) * power
    scale = float32(0.398942292 * 2.0**-24)
    return torch.where(x > 0.0, 1.0 - tail, tail), fma(scale, less_one, scale) * power


def log(x: Tensor) -> Tensor:
    """n ln 2 + log(1 + f), x = 2^n (1 + f), 1 + f in [3/4, 3/2)."""
    small = x < 2.0**-126
    y = torch.where(small, x * 2.0**23, x)
    extra = torch.where(small, 23.0 * 2.0**23, 0.0)
    k = 0x3FBFFFFF - bits_of_float(y) & 0xFF800000
    f = float_of_bits(bits_of_float(y) + k & _M32) - 1.0
    return _or_special(x, _logarithm(f, _signed(k) + extra))


def log1p(x: Tensor) -> Tensor:
    """log(1 + x): as log, with 1 + f = 2^-n x + 2^-n."""
    u = x + 1.0
    k = 0x3FC00000 - bits_of_float(u) & 0xFF800000
    power = float_of_bits(0x40800000 + k & _M32)
    f = float_of_bits(bits_of_float(x) + k & _M32) - fma(power, float32(-0.25), float32(1.0))
    return _or_special(u, _logarithm(f, _signed(k)))


def _at_most(x: Tensor, high: float) -> Tensor:
    """`x`, but no more than `high`; NaN stays."""
    return torch.where(x > float32(high), float32(high), x)


def _polynomial(x: Tensor, *coefficients: float, factor: float = 1.0) -> Tensor:
    """Horner's rule, from the highest power down; the coefficients times `factor`, a power of two."""
    first, *others = (float32(c) * factor for c in coefficients)
    p = first
    for c in others:
        p = fma(p, x, c)
    return p


def _reduce(y: Tensor, bias: float, *, sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """(n + ROUND + bias, y - sign n ln 2) with n the integer nearest to sign y / ln 2."""
    shifted = fma(y, float32(sign * LOG2_E), float32(ROUND + bias))
    n = shifted - (ROUND + bias)
    return shifted, fma(n, float32(-sign * LN2_LOW), fma(n, float32(-sign * LN2_HIGH), y))


def _exponent(shifted: Tensor) -> Tensor:
    """The low bits of `shifted` in the place of a float's exponent, 32 bits."""
    return bits_of_float(shifted) << 23 & _M32


def _terms(f: Tensor, scale: float, factor: float) -> Tensor:
    """factor q(scale f), e^f = 1 + f + f^2 q(f); `scale` and `factor` are powers of two, up to their signs."""
    coefficients = (0.00138825795, 0.0083665112, 0.0416671969, 0.166665435, 0.49999997)
    scaled = (c * scale**power for c, power in zip(coefficients, (4, 3, 2, 1, 0), strict=True))
    return _polynomial(f, *scaled, factor=factor)


def _exponential(f: Tensor, scale: float, factor: float) -> Tensor:
    """factor e^(scale f)"""
    slope = fma(_terms(f, scale, factor * scale * scale), f, float32(factor * scale))
    return fma(slope, f, float32(factor))


def _logarithm(f: Tensor, k: Tensor) -> Tensor:
    """log(1 + f) - k ln(2) / 2^23"""
    q = _polynomial(
        f, -0.0449051075, 0.104477048, -0.131619781, 0.144820675, -0.166477904, 0.199906096, -0.250000536, 0.333334535,
        -0.5,
    )  # fmt: skip
    return fma(k, float32(-8.26295832e-08), fma(q, f * f, f))


def _signed(k: Tensor) -> Tensor:
    """32-bit patterns as signed integers, rounded to float32."""
    return torch.where(k >= 1 << 31, k - (1 << 32), k).to(torch.float32)


def _or_special(x: Tensor, result: Tensor) -> Tensor:
    """`result` where `x` is a positive number, else what the logarithm of x is."""
    not_positive = torch.where(x < 0.0, torch.nan, x - torch.inf)
    return torch.where(x > 0.0, torch.where(x < torch.inf, result, x), not_positive)
