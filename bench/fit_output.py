"""Derives the coefficients of csrc/core/output.h: the derivative of an activation function as a function of its output.

Run: python -m bench.fit_output
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import chebyshev
from scipy.optimize import brentq
from scipy.special import expit, ndtr

Function = Callable[[np.ndarray], np.ndarray]
POINTS = 600  # Chebyshev points of a fit; the fit is the least-squares one on them, so their number belongs to it
RIGHT_DEGREE, LEFT_DEGREE = 16, 9
TANH_SCALE, TANH_CUBE = 2.0 * np.sqrt(2.0 / np.pi), 0.044715


@dataclass(frozen=True)
class Activation:
    """A function with one minimum, and how its derivative is fitted.

    Attributes:
        value, slope: of x.
        far: x from where on the derivative counts as constant.
        root: whether the left polynomial is one in a root, where the function falls to 0 as fast as a Gaussian.
    """

    name: str
    value: Function
    slope: Function
    far: float
    root: bool

    @property
    def turn(self) -> float:
        """Where the minimum is."""
        return brentq(self.slope, -2.0, -0.3, xtol=1e-15)


def _gelu_slope(x: np.ndarray) -> np.ndarray:
    return ndtr(x) + x * np.exp(-0.5 * x * x) / np.sqrt(2.0 * np.pi)


def _inner(x: np.ndarray) -> np.ndarray:
    return TANH_SCALE * (x + TANH_CUBE * x**3)


def _tanh_slope(x: np.ndarray) -> np.ndarray:
    u = _inner(x)
    return expit(u) * (1.0 + x * TANH_SCALE * (1.0 + 3.0 * TANH_CUBE * x * x) * expit(-u))


def _mish_parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    e = np.exp(x)
    n = e * (e + 2.0)
    return n / (n + 2.0), 2.0 / (n + 2.0)


def _mish_slope(x: np.ndarray) -> np.ndarray:
    w, less = _mish_parts(x)
    return w + x * less * (1.0 + w) * expit(x)


ACTIVATIONS = (
    Activation("gelu", lambda x: x * ndtr(x), _gelu_slope, 4.75, True),
    Activation("gelu_tanh", lambda x: x * expit(_inner(x)), _tanh_slope, 4.6, True),
    Activation("silu", lambda x: x * expit(x), lambda x: expit(x) * (1.0 + x * expit(-x)), 13.0, False),
    Activation("mish", lambda x: x * _mish_parts(x)[0], _mish_slope, 6.8, False),
)


@dataclass(frozen=True)
class Fit:
    """What core/output.h holds of one function.

    Attributes:
        turn, least: x and value of the minimum.
        right_scale: 2 / S, S the root of value - least at `far`; the right polynomial is one in t = right_scale s - 1,
            s the root of value - least.
        left_scale: 1 / the root of -least; on the left the slope is w times a polynomial in 2 w - 1, with w = 1 -
            left_scale s or its root, so that it vanishes with the value.
        right, left: coefficients, from the highest power down.
        error: largest error of the two, in exact arithmetic.
    """

    turn: float
    least: float
    right_scale: float
    left_scale: float
    right: np.ndarray
    left: np.ndarray
    error: float


def fit(activation: Activation) -> Fit:
    turn = activation.turn
    least = float(activation.value(np.float64(turn)))
    width = np.sqrt(float(activation.value(np.float64(activation.far))) - least)
    t = -np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS)
    w = (t + 1.0) / 2.0
    s = width * w
    far = activation.far + 1.0
    right, right_error = _polynomial(activation, t, least + s * s, turn, far, RIGHT_DEGREE, np.ones_like(t))
    height = 1.0 - (w * w if activation.root else w)
    left, left_error = _polynomial(activation, t, least - least * height**2, turn, -90.0, LEFT_DEGREE, w)
    return Fit(turn, least, 2.0 / width, (-least) ** -0.5, right, left, max(right_error, left_error))


def _polynomial(
    activation: Activation,
    t: np.ndarray,
    value: np.ndarray,
    turn: float,
    outside: float,
    degree: int,
    factor: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Coefficients in t of slope / factor where the function has these values, x between `turn` and `outside`."""
    inner, outer = np.full_like(t, turn), np.full_like(t, outside)
    for _ in range(200):  # bisection
        middle = (inner + outer) / 2.0
        below = activation.value(middle) < value
        inner, outer = np.where(below, middle, inner), np.where(below, outer, middle)
    slope = activation.slope((inner + outer) / 2.0)
    fitted = chebyshev.chebfit(t, slope / factor, degree, w=factor)
    error = np.abs(factor * chebyshev.chebval(t, fitted) - slope)
    return chebyshev.cheb2poly(fitted)[::-1], float(error.max())


def text(number: float) -> str:
    return f"{np.float32(number):.9g}f"


def lines(activation: Activation) -> list[str]:
    """The members of an OutputFit in core/output.h, in its order."""
    found = fit(activation)
    scalars = ", ".join(map(text, (found.turn, found.least, found.right_scale, found.left_scale)))
    return [scalars, *("{" + ", ".join(map(text, p)) + "}" for p in (found.right, found.left))]


if __name__ == "__main__":
    for each in ACTIVATIONS:
        print(f"{each.name}: largest error of the slope {fit(each).error:.1e}")
        print("  {" + ",\n   ".join(lines(each)) + "};")
