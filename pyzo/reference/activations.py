"""The operators of activations: functions and slopes as `csrc/core/functions.h` and `output.h` compute them, and codes.

Computed in float32 and rounded to the dtype of the input, equal in every bit; float64 follows the same formulas with
torch's own exp, log1p and erfc, and agrees to rounding.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import elementary
from .arithmetic import divide, float32, fma, sqrt

Pair = tuple[Tensor, Tensor]


class _Single:
    """float32 as specified."""

    exp, expm1, log1p = elementary.exp, elementary.expm1, elementary.log1p
    normal_distribution, sigmoids = elementary.normal_distribution, elementary.sigmoids
    fma, sqrt = staticmethod(fma), staticmethod(sqrt)
    constant = staticmethod(float32)

    @staticmethod
    def reciprocal(x: Tensor) -> Tensor:
        return divide(float32(1.0), x)


class _Double:
    """float64, of which no bits are promised."""

    exp, expm1, log1p, sqrt, reciprocal = torch.exp, torch.expm1, torch.log1p, torch.sqrt, torch.reciprocal

    @staticmethod
    def normal_distribution(x: Tensor) -> Pair:
        return torch.special.erfc(x * -(0.5**0.5)) / 2, torch.exp(-x * x / 2) * (2 * torch.pi) ** -0.5

    @staticmethod
    def sigmoids(x: Tensor) -> Pair:
        return torch.sigmoid(x), torch.sigmoid(-x)

    @staticmethod
    def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a * b + c

    @staticmethod
    def constant(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64)


def _within(x: Tensor, bound: float) -> Tensor:
    return torch.where(x > bound, bound, torch.where(x < -bound, -bound, x))


def _gated(m: type, x: Tensor, u: Tensor, slope: Tensor) -> Pair:
    """x sigmoid(u(x)), given u and u'."""
    s, complement = m.sigmoids(u)
    return x * s, s * m.fma(_within(x, 128.0) * slope, complement, m.constant(1.0))


def _relu(m: type, x: Tensor) -> Pair:
    return torch.where(x < 0, m.constant(0.0), x), torch.where(x > 0, m.constant(1.0), m.constant(0.0))


def _gelu(m: type, x: Tensor) -> Pair:
    below, density = m.normal_distribution(x)
    return x * below, m.fma(_within(x, 64.0), density, below)


def _gelu_tanh(m: type, x: Tensor) -> Pair:
    y, scale, a = _within(x, 128.0), m.constant(1.5957691216057308), m.constant(0.044715)
    square = y * y
    inner = scale * m.fma(a * square, y, y)
    return _gated(m, x, inner, scale * m.fma(m.constant(3.0) * a, square, m.constant(1.0)))


def _quick_gelu(m: type, x: Tensor) -> Pair:
    return _gated(m, x, m.constant(1.702) * x, m.constant(1.702))


def _silu(m: type, x: Tensor) -> Pair:
    return _gated(m, x, x, m.constant(1.0))


def _mish(m: type, x: Tensor) -> Pair:
    e, two = m.exp(torch.where(x > 22.0, 22.0, x)), m.constant(2.0)
    n = m.fma(e, e, e + e)
    r = m.reciprocal(n + two)
    w = torch.where(x < 0, n * r, m.fma(-two, r, m.constant(1.0)))
    return x * w, m.fma(_within(x, 128.0) * (e * (m.constant(4.0) * r)), m.fma(e, r, r), w)


def _softplus(m: type, x: Tensor) -> Pair:
    return m.log1p(m.exp(-x.abs())) + torch.where(x < 0, m.constant(0.0), x), m.sigmoids(x)[0]


def _elu(m: type, x: Tensor) -> Pair:
    return torch.where(x > 0, x, m.expm1(x)), torch.where(x > 0, m.constant(1.0), m.exp(x))


def _hardswish(m: type, x: Tensor) -> Pair:
    ramp = x + m.constant(3.0)
    ramp = torch.where(ramp < 0, m.constant(0.0), ramp)
    ramp = torch.where(ramp > 6.0, m.constant(6.0), ramp)
    inner = m.fma(x, m.constant(1.0 / 3.0), m.constant(0.5))
    slope = torch.where(x > -3.0, torch.where(x < 3.0, inner, m.constant(1.0)), m.constant(0.0))
    return x * ramp * m.constant(1.0 / 6.0), slope


# In the order of csrc/core/functions.h: value and slope.
FUNCTIONS: dict[str, Callable[[type, Tensor], Pair]] = {
    f.__name__.removeprefix("_"): f
    for f in (_relu, _gelu, _gelu_tanh, _quick_gelu, _silu, _mish, _softplus, _elu, _hardswish)
}
_BY_NUMBER = tuple(FUNCTIONS.values())


def wide(x: Tensor) -> Tensor:
    """What arithmetic is done in: float64 for itself, float32 for everything else."""
    return x if x.dtype == torch.float64 else x.float()


def value_and_slope(function: int, x: Tensor) -> Pair:
    """h(x) and h'(x) of a float32 or float64 tensor, not yet rounded further."""
    return _BY_NUMBER[function](_Double if x.dtype == torch.float64 else _Single, x)


def activation(x: Tensor, function: int) -> Tensor:
    return value_and_slope(function, wide(x))[0].to(x.dtype)


def activation_backward(gradient: Tensor, x: Tensor, function: int) -> Tensor:
    return (wide(gradient) * value_and_slope(function, wide(x))[1]).to(x.dtype)


def activation_backward_(gradient: Tensor, x: Tensor, function: int) -> Tensor:
    out = activation_backward(gradient, x, function)
    gradient.copy_(activation(x, function))
    return out


def codes_of(x: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Number of thresholds, as float32, that each element exceeds."""
    limits = torch.tensor(thresholds).to(wide(x).dtype)
    return (wide(x).flatten()[:, None] > limits).sum(1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bytes with bits k i to k i + k - 1 holding code i, from the lowest bit of byte 0 on."""
    flags = (codes[:, None] >> torch.arange(bits) & 1).flatten()
    flags = torch.nn.functional.pad(flags, (0, -flags.numel() % 8)).view(-1, 8)
    return (flags << torch.arange(8)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes."""
    flags = (packed[:, None].long() >> torch.arange(8) & 1).flatten()[: count * bits].view(count, bits)
    return (flags << torch.arange(bits)).sum(1)


def coded_activation(x: Tensor, function: int, thresholds: Sequence[float], slopes: Sequence[float]) -> Pair:
    bits = len(slopes).bit_length() - 1
    return activation(x, function), pack(codes_of(x, thresholds), bits)


def coded_activation_backward(gradient: Tensor, codes: Tensor, slopes: Sequence[float]) -> Tensor:
    bits = len(slopes).bit_length() - 1
    table = torch.tensor(slopes).to(wide(gradient).dtype)
    slope = table[unpack(codes, bits, gradient.numel())].view(gradient.shape)
    return (wide(gradient) * slope).to(gradient.dtype)


# fmt: off
# Of core/output.h: (x and value of the minimum, scale, offset), coefficients of numerator and denominator from the
# highest power down.
_OUTPUT_FITS: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = {
    "gelu": (
        (-0.751791537, -0.169971213, 0.760347724, -0.686527133),
        (0.883961439, -0.745410383, -0.920314908, 4.16007376, 1.6789093, -2.39921522, 0.399550229, 1.0254724),
        (0.57650274, 1.39220333, 1.49689937, 2.31922364, 1.48398411, -0.628188133, 0.525560677, 1.0),
    ),
    "gelu_tanh": (
        (-0.752461433, -0.170040756, 0.770296872, -0.682360411),
        (0.772758365, -0.777626932, -0.761083484, 3.90377092, 1.24820983, -2.4067862, 0.473815262, 1.01336169),
        (0.513404608, 1.19343162, 1.21119416, 1.9704088, 1.18198943, -0.697199464, 0.559837639, 1.0),
    ),
    "silu": (
        (-1.27846456, -0.278464556, 0.479425907, -0.747008204),
        (0.669136167, -0.341301501, 2.71965337, 5.52208567, 1.79113245, 1.12431669, 1.09974921),
        (0.965669632, 3.86743522, 6.46639204, 6.71035767, 4.15827942, 1.99961042, 1.0),
    ),
    "mish": (
        (-1.19243121, -0.308843404, 0.620737255, -0.655033469),
        (1.00830221, -1.08777523, 2.26098347, 4.92185926, -0.414206564, 0.157931119, 1.03748643),
        (1.02859604, 3.4436655, 3.94357061, 3.93732285, 1.94322419, 0.471511483, 1.0),
    ),
}
# fmt: on


def _polynomial(m: type, coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Horner's rule, from the highest power down."""
    return functools.reduce(lambda p, c: m.fma(p, x, m.constant(c)), coefficients[1:], m.constant(coefficients[0]))


def _fitted_slope(m: type, name: str, y: Tensor, right: Tensor) -> Tensor:
    (_, least, scale, offset), numerator, denominator = _OUTPUT_FITS[name]
    one, zero = m.constant(1.0), m.constant(0.0)
    height = y - m.constant(least)
    s = m.sqrt(torch.where(height < 0, zero, height))
    t = m.fma(torch.where(right, s, -s), m.constant(scale), m.constant(offset))
    t = torch.where(t > 1.0, one, t)
    t = torch.where(t < -1.0, -one, t)
    return (t + one) * _polynomial(m, numerator, t) * m.reciprocal(_polynomial(m, denominator, t))


def _slope_of_output(function: int, y: Tensor, right: Tensor) -> Tensor:
    m: type = _Double if y.dtype == torch.float64 else _Single
    one, zero = m.constant(1.0), m.constant(0.0)
    name = tuple(FUNCTIONS)[function]
    if name == "relu":
        return torch.where(y > 0, one, zero)
    if name == "elu":
        return torch.where(y > 0, one, y + one)
    if name == "softplus":
        return -m.expm1(-y)
    if name == "hardswish":
        root = m.fma(y, m.constant(2.0 / 3.0), m.constant(0.25))
        root = m.sqrt(torch.where(root < 0, zero, root))
        return torch.where(right, torch.where(y < 3.0, root, one), torch.where(y < 0, -root, zero))
    if name == "quick_gelu":
        return _fitted_slope(m, "silu", y * m.constant(1.702), right)
    return _fitted_slope(m, name, y, right)


def turn_of(function: int) -> float | None:
    """Where the minimum is, a float32 number; None where the function has none."""
    name = tuple(FUNCTIONS)[function]
    if name == "quick_gelu":
        return divide(float32(_OUTPUT_FITS["silu"][0][0]), float32(1.702)).item()
    return -1.5 if name == "hardswish" else _OUTPUT_FITS[name][0][0] if name in _OUTPUT_FITS else None


def output_activation(x: Tensor, function: int) -> Pair:
    turn = turn_of(function)
    sides = torch.empty(0, dtype=torch.uint8) if turn is None else pack(codes_of(x, [turn]), 1)
    return activation(x, function), sides


def output_activation_backward(gradient: Tensor, y: Tensor, sides: Tensor, function: int) -> Tensor:
    right = unpack(sides, 1, y.numel()).view(y.shape) == 1 if sides.numel() else torch.zeros(y.shape, dtype=torch.bool)
    return (wide(gradient) * _slope_of_output(function, wide(y), right)).to(y.dtype)


OPERATORS = (
    activation,
    activation_backward,
    activation_backward_,
    coded_activation,
    coded_activation_backward,
    output_activation,
    output_activation_backward,
)
