"""Derives the coefficients of csrc/core/output.h: the derivative of an activation function as a function of its output.

Run: python -m bench.fit_output
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mpmath import mpf
from scipy.optimize import brentq
from scipy.special import expit, ndtr

from bench import fit_elementary

Function = Callable[[np.ndarray], np.ndarray]
TANH_SCALE, TANH_CUBE = 2.0 * np.sqrt(2.0 / np.pi), 0.044715


@dataclass(frozen=True)
class Activation:
    """A function with one minimum, and how its derivative is fitted.

    Attributes:
        value, slope: of x.
        far: x from where on the derivative counts as constant.
        degree: of both polynomials; more where the function falls to 0 as fast as a Gaussian.
    """

    name: str
    value: Function
    slope: Function
    far: float
    degree: int

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
    Activation("gelu", lambda x: x * ndtr(x), _gelu_slope, 4.75, 7),
    Activation("gelu_tanh", lambda x: x * expit(_inner(x)), _tanh_slope, 4.6, 7),
    Activation("silu", lambda x: x * expit(x), lambda x: expit(x) * (1.0 + x * expit(-x)), 13.0, 6),
    Activation("mish", lambda x: x * _mish_parts(x)[0], _mish_slope, 6.8, 6),
)


@dataclass(frozen=True)
class Fit:
    """What core/output.h holds of one function.

    Attributes:
        turn, least: x and value of the minimum.
        scale, offset: t = scale s + offset, s the root of value - least, negative on the left: -1 where the value is 0
            there, 1 at `far`.
        numerator, denominator: coefficients from the highest power down; their quotient times t + 1, so that it
            vanishes with the value on the left, is the slope.
        error: the largest, before coefficients are rounded.
    """

    turn: float
    least: float
    scale: float
    offset: float
    numerator: list[float]
    denominator: list[float]
    error: float


def fit(activation: Activation) -> Fit:
    """The best quotient: its error has one size and alternating sign (bench/fit_elementary.py)."""
    turn = activation.turn
    least = float(activation.value(np.float64(turn)))
    zero = np.sqrt(-least)  # s is -zero where the value is 0 on the left
    width = np.sqrt(float(activation.value(np.float64(activation.far))) - least) + zero

    def slope(place: mpf) -> mpf:  # the derivative is not smooth in s where the value is 0, so points lie densely there
        s = width * float(place) ** 2 - zero
        return mpf(float(activation.slope(_solve(activation, least + s * s, -90.0 if s < 0 else activation.far + 1.0))))

    quotient = fit_elementary.Fit(
        activation.name,
        lambda place: slope(place) / (2 * place**2),
        lambda place: 2 * place**2,  # t + 1
        (0.0, 1.0),
        activation.degree,
        activation.degree,
        variable=lambda place: 2 * place**2 - 1,
    )
    coefficients, error = fit_elementary.remez(quotient, [])
    numerator, denominator = ([float(c) for c in part[::-1]] for part in fit_elementary.split(quotient, coefficients))
    return Fit(turn, least, 2.0 / width, 2.0 * zero / width - 1.0, numerator, denominator, float(error))


def _solve(activation: Activation, value: float, outside: float) -> np.float64:
    """x between the minimum and `outside` where the function has this value, by bisection."""
    inner, outer = np.float64(activation.turn), np.float64(outside)
    for _ in range(200):
        middle = (inner + outer) / 2.0
        if activation.value(middle) < value:
            inner = middle
        else:
            outer = middle
    return (inner + outer) / 2.0


def text(number: float) -> str:
    digits = f"{np.float32(number):.9g}"
    return f"{digits}.0f" if digits.isdigit() else f"{digits}f"


def lines(activation: Activation) -> list[str]:
    """The members of an OutputFit in core/output.h, in its order."""
    found = fit(activation)
    scalars = ", ".join(map(text, (found.turn, found.least, found.scale, found.offset)))
    return [scalars, *("{" + ", ".join(map(text, p)) + "}" for p in (found.numerator, found.denominator))]


if __name__ == "__main__":
    for each in ACTIVATIONS:
        print(f"{each.name}: largest error of the slope {fit(each).error:.1e}")
        print("  {" + ",\n   ".join(lines(each)) + "};")
