"""Derives the coefficients of csrc/core/elementary.h: minimax fits by Remez exchange, rounded one by one to float32.

Run: python -m bench.fit_elementary
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import mpmath
import numpy as np
from mpmath import mpf

Number = mpmath.mpf
Function = Callable[[Number], Number]
GRID = 160  # Chebyshev points; the fit is the best one on them, so their number belongs to the definition
mpmath.mp.dps = 40


@dataclass(frozen=True)
class Fit:
    """What a polynomial or quotient of polynomials approximates, and where its error counts how much."""

    name: str
    target: Function
    weight: Function  # |weight * error| is made small: the relative error of what is returned, per error of the fit
    interval: tuple[float, float]
    degree: int
    denominator: int = 0  # its degree
    unit: float = 1.0  # its constant term
    first: tuple[float, ...] = ()  # coefficients that are given, the first in `order`
    variable: Function = lambda x: x  # what the polynomial is a polynomial of

    def grid(self) -> list[Number]:
        low, high = map(mpf, self.interval)
        angles = (mpmath.pi * (2 * i + 1) / (2 * GRID) for i in range(GRID))
        return [(low + high) / 2 - (high - low) / 2 * mpmath.cos(angle) for angle in angles]


def _tail(t: Number) -> Number:
    """1 - erf(t) to the power 1/4."""
    return mpmath.root(mpmath.erfc(t), 4)


def _mills(t: Number) -> Number:
    return mpmath.exp(t * t / 2) * mpmath.erfc(t / mpmath.sqrt(2)) / 2


HALF_LN2 = 0.34658  # a little more than ln(2) / 2: arguments are reduced by a rounded product
TANH_TURN, ERF_TURN = 0.55, 1.0  # |x| from which tanh and erf are 1 less something
SLOPE = 2.506634
FITS = (
    # expm1(f) = f + f^2 P(f)
    Fit(
        "exponential",
        lambda f: (mpmath.expm1(f) - f) / f**2,
        lambda f: f**2 / abs(mpmath.expm1(f)),
        (-HALF_LN2, HALF_LN2),
        4,
    ),
    # tanh(x) = x + x^3 P(x^2)
    Fit(
        "tanh near 0",
        lambda x: (mpmath.tanh(x) / x - 1) / x**2,
        lambda x: x**3 / mpmath.tanh(x),
        (1e-6, TANH_TURN),
        3,
        variable=lambda x: x * x,
    ),
    # erf(x) = x + x P(x^2)
    Fit(
        "erf near 0",
        lambda x: mpmath.erf(x) / x - 1,
        lambda x: x / mpmath.erf(x),
        (1e-6, ERF_TURN),
        5,
        variable=lambda x: x * x,
    ),
    # erf(t) = 1 - P(t)^4
    Fit("erf far from 0", _tail, lambda t: 4 * _tail(t) ** 3 / mpmath.erf(t), (ERF_TURN, 3.95), 7),
    # Phi(-t) = exp(-t^2 / 2) / (SLOPE t + P(t) / Q(t)). With the exact slope, sqrt(2 pi), the error would be twice
    # as large. The common scale of P and Q is, of 32 tried, the one with the smallest error of Phi after all roundings.
    Fit(
        "normal tail",
        lambda t: 1 / _mills(t) - mpf(float(np.float32(SLOPE))) * t,
        _mills,
        (0.0, 13.05),
        3,
        4,
        unit=1.78125,
        first=(3.5625,),
    ),
    # log(1 + f) = f + f^2 P(f)
    Fit(
        "logarithm",
        lambda f: (mpmath.log1p(f) - f) / f**2,
        lambda f: f**2 / abs(mpmath.log1p(f)),
        (-0.25, 0.5),
        8,
    ),
)


def polynomial(coefficients: list[Number], x: Number) -> Number:
    return mpmath.polyval(coefficients[::-1], x)


def remez(fit: Fit, fixed: list[Number], rounds: int = 50) -> tuple[list[Number], Number]:
    """Coefficients with the least largest weighted error on the grid, and that error.

    Remez's exchange for quotients (Cheney, "Introduction to Approximation Theory", chapter 5): on one more point than
    free coefficients the best fit has errors of one size and alternating sign; points move to the extremes of the
    error. The equations are linear in the coefficients once the denominator that multiplies the error is known, so
    they are solved again with the new denominator until it stays.

    Args:
        fixed: values of the first coefficients in `order`.
    """
    x = fit.grid()
    u, target, weight = ([f(v) for v in x] for f in (fit.variable, fit.target, fit.weight))
    columns = [[v**p if top else -t * v**p for v, t in zip(u, target, strict=True)] for top, p in order(fit)]
    given, free = columns[: len(fixed)], columns[len(fixed) :]
    known = [
        t * fit.unit - sum(c * column[i] for c, column in zip(fixed, given, strict=True)) for i, t in enumerate(target)
    ]
    n = len(free) + 1
    points = [round((0.5 - 0.5 * float(mpmath.cos(mpmath.pi * (i + 0.5) / n))) * (GRID - 1)) for i in range(n)]
    below = [mpf(1)] * GRID  # the denominator on the grid
    for _ in range(rounds):
        for _ in range(rounds):
            rows = [[*(column[i] for column in free), (-1) ** k * below[i] / weight[i]] for k, i in enumerate(points)]
            *solution, level = mpmath.lu_solve(mpmath.matrix(rows), mpmath.matrix([known[i] for i in points]))
            coefficients = [*fixed, *solution]
            numerator, denominator = split(fit, coefficients)
            before, below = below, [polynomial(denominator, v) for v in u]
            if max(abs(a - b) / abs(b) for a, b in zip(before, below, strict=True)) < mpf("1e-25"):
                break
        error = [w * (t - polynomial(numerator, v) / b) for v, t, w, b in zip(u, target, weight, below, strict=True)]
        if max(map(abs, error)) <= abs(level) * (1 + mpf("1e-20")):
            return coefficients, abs(level)
        points = _alternating_extremes(error, n)
    raise RuntimeError(f"{fit.name}: no equioscillation after {rounds} exchanges")


def _alternating_extremes(error: list[Number], n: int) -> list[int]:
    """The largest |error| of each stretch of one sign; of more than n stretches, n that alternate."""
    stretches = groupby(range(len(error)), key=lambda i: error[i] > 0)
    extremes = [max(stretch, key=lambda i: abs(error[i])) for _, stretch in stretches]
    while len(extremes) > n:
        size = [abs(error[i]) for i in extremes]
        least = size.index(min(size))
        if least in (0, len(size) - 1):
            extremes.pop(least)
        elif len(extremes) == n + 1:
            extremes.pop(0 if size[0] < size[-1] else -1)
        else:  # with one of its neighbours, which have the other sign
            extremes.pop(least)
            extremes.pop(least - 1 if size[least - 1] < size[least + 1] else least)
    return extremes


def order(fit: Fit) -> list[tuple[bool, int]]:
    """(is of the numerator, power) of the coefficients, in the order in which they are rounded.

    The lowest power comes first, but last where the interval lies around 0: with the constant term fixed, everything
    that is left would be 0 there, and the best fit need not alternate.
    """
    powers = range(max(fit.degree, fit.denominator) + 1)
    pairs = [(top, p) for p in (powers if fit.interval[0] >= 0 else reversed(powers)) for top in (True, False)]
    return [(top, p) for top, p in pairs if (p <= fit.degree if top else 1 <= p <= fit.denominator)]


def split(fit: Fit, coefficients: list[Number]) -> tuple[list[Number], list[Number]]:
    """Numerator and denominator, from the lowest power up."""
    named = dict(zip(order(fit), coefficients, strict=True))
    numerator = [named[True, p] for p in range(fit.degree + 1)]
    return numerator, [mpf(fit.unit), *(named[False, p] for p in range(1, fit.denominator + 1))]


def rounded(fit: Fit) -> tuple[list[Number], list[Number]]:
    """The float32 coefficients: the first in `order` is rounded, the others fitted anew, the next rounded, ..."""
    fixed = list(map(mpf, fit.first))
    while len(fixed) < len(order(fit)):
        coefficients, _ = remez(fit, fixed)
        fixed.append(mpf(float(np.float32(float(coefficients[len(fixed)])))))
    return split(fit, fixed)


def largest_error(fit: Fit, numerator: list[Number], denominator: list[Number]) -> Number:
    """Of the fit, weighted, on the grid."""
    return max(
        abs(fit.weight(x) * (fit.target(x) - polynomial(numerator, u) / polynomial(denominator, u)))
        for x, u in ((x, fit.variable(x)) for x in fit.grid())
    )


def text(coefficient: Number) -> str:
    return f"{np.float32(float(coefficient)):.9g}f"


def literals() -> list[str]:
    """The coefficients in csrc/core/elementary.h in their order: denominators first, from the highest power down."""
    return [text(c) for fit in FITS for part in rounded(fit)[::-1] if len(part) > 1 for c in part[::-1]]


if __name__ == "__main__":
    for fit in FITS:
        numerator, denominator = rounded(fit)
        print(f"{fit.name}: relative error {float(largest_error(fit, numerator, denominator)) * 2**24:.3f} 2^-24")
        for part in (denominator, numerator):
            if len(part) > 1:
                print("  from the highest power down: " + " ".join(text(c) for c in part[::-1]))
