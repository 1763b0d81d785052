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
# Of core/output.h: (x and value of the minimum, right and left scale), whether w is a root, right and left coefficients
# from the highest power down.
_OUTPUT_FITS: dict[str, tuple[tuple[float, ...], bool, tuple[float, ...], tuple[float, ...]]] = {
    "gelu": (
        (-0.751791537, -0.169971213, 0.901672721, 2.42556167),
        True,
        (-0.666259289, 0.098605223, 3.28369594, 0.0301932544, -6.69488287, -1.2356261, 7.03512573, 2.81625032,
         -3.52297091, -2.73305964, -0.0760735795, 0.967607141, 1.37635946, 0.314222455, -1.35275126,
         0.241827175, 1.11776638),
        (-0.00693167793, 0.0126130851, -0.000377373362, -0.00745116873, -0.00340794143, 0.00106328959,
         -0.0246052369, 0.220467672, 0.0371927954, -0.228566095),
    ),
    "gelu_tanh": (
        (-0.752461433, -0.170040756, 0.915733457, 2.42506552),
        True,
        (-0.205009446, 0.318607718, 1.28283787, -1.0634371, -3.24297094, 0.989149988, 4.16298914, 0.486734629,
         -2.55690312, -1.48328435, 0.0726192221, 0.74046725, 1.18669987, 0.230796874, -1.31374097,
         0.280980945, 1.11348855),
        (-0.0102125984, 0.0184673294, -0.000229434707, -0.0111261057, -0.00528691849, 0.00543268118,
         -0.0235993415, 0.213979855, 0.0422262326, -0.229655623),
    ),
    "silu": (
        (-1.27846456, -0.278464556, 0.548853636, 1.89502549),
        False,
        (-0.314901143, 0.347262353, 1.59392476, -1.59650409, -3.57017183, 3.17163634, 4.77884579, -3.67192245,
         -4.46795273, 3.01189733, 3.29601312, -2.4611876, -1.53058183, 1.91558969, -0.367524534, -0.216753319,
         1.08236039),
        (0.0162114203, -0.0271087568, -0.00563657656, 0.02418698, 0.000673767645, -0.0129332766,
         0.00574662723, -0.0264107455, 0.224153414, -0.198875979),
    ),
    "mish": (
        (-1.19243121, -0.308843404, 0.750120521, 1.79941285),
        False,
        (0.846726239, 0.33046025, -3.98873711, -1.71135068, 7.98298264, 3.91949224, -8.85947037, -5.32345676,
         5.95416784, 4.94858789, -2.51845384, -3.58497858, 1.04799962, 1.96911383, -1.05315924, -0.0478505902,
         1.08796632),
        (0.0186929833, -0.0313061625, -0.00636421144, 0.0277220029, 0.00106821337, -0.0159613658,
         0.00742090354, -0.0226972513, 0.245975927, -0.224543124),
    ),
}
# fmt: on


def _polynomial(m: type, coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Even and odd powers apart; coefficients from the highest power down."""
    square = x * x
    even, odd = [
        functools.reduce(lambda p, c: m.fma(p, square, m.constant(c)), half[1:], m.constant(half[0]))
        for half in (coefficients[::-1][::2][::-1], coefficients[::-1][1::2][::-1])
    ]
    return m.fma(odd, x, even)


def _fitted_slope(m: type, name: str, y: Tensor, right: Tensor) -> Tensor:
    (_, least, right_scale, left_scale), root, right_fit, left_fit = _OUTPUT_FITS[name]
    one, zero = m.constant(1.0), m.constant(0.0)
    height = y - m.constant(least)
    s = m.sqrt(torch.where(height < 0, zero, height))
    t = m.fma(s, m.constant(right_scale), -one)
    t = torch.where(t > 1.0, one, t)
    w = m.fma(s, m.constant(-left_scale), one)
    w = torch.where(w < 0, zero, w)
    w = m.sqrt(w) if root else w
    left = w * _polynomial(m, left_fit, m.fma(w, m.constant(2.0), -one))
    return torch.where(right, _polynomial(m, right_fit, t), left)


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
    coded_activation,
    coded_activation_backward,
    output_activation,
    output_activation_backward,
)
