"""Derives the polynomial coefficients of csrc/core/normal.h: minimax fits by Remez exchange on a grid.

Run: python -m bench.fit_normal
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]
GRID = 1500  # points; the fit is the best one on them, so their number and places belong to the definition


@dataclass(frozen=True)
class Fit:
    """What a polynomial approximates, and where its error counts how much."""

    name: str
    target: Function
    weight: Function  # |weight * error| is made small: the change of what is returned per change of the polynomial
    grid: np.ndarray
    powers: tuple[int, ...]


def _half_turns() -> np.ndarray:
    return np.linspace(0.0, 0.5, GRID)


def _log_arguments() -> np.ndarray:
    """f of ln(1 + f), in [-1/2, 0), dense at both ends."""
    return np.minimum(-0.5 * (0.5 - 0.5 * np.cos(np.linspace(0.0, math.pi, GRID))), -1e-9)


FITS = (
    # The radius sqrt(-2 ln(1 + f)) moves by |f| / (2 radius) per unit of the polynomial -2 ln(1 + f) / f. Where the
    # exponent k is not 0 the radius is larger, and the same error of the polynomial matters less.
    Fit(
        "logarithm",
        lambda f: -2.0 * np.log1p(f) / f,
        lambda f: np.abs(f) / (2.0 * np.sqrt(-2.0 * np.log1p(f))),
        _log_arguments(),
        (0, 1, 2, 3, 4, 5),
    ),
    Fit("sine", lambda t: np.sin(math.pi * t), np.ones_like, _half_turns()[1:], (1, 3, 5, 7)),
    Fit("cosine", lambda t: np.cos(math.pi * t), np.ones_like, _half_turns(), (0, 2, 4, 6, 8)),
)
LOG_TWO = -2.0 * math.log(2.0) / 2**23  # radius: times the exponent in units of 2^-23


def remez(fit: Fit, *, rounds: int = 100) -> tuple[np.ndarray, float]:
    """Coefficients of `fit.powers` with the least largest weighted error on the grid, and that error.

    Remez's exchange (Cheney, "Introduction to Approximation Theory", section 3.8): on one more point than coefficients
    the best fit has errors of one size and alternating sign; points move to the extremes of the error.
    """
    x, n = fit.grid, len(fit.powers) + 1
    basis = np.stack([x**p for p in fit.powers], 1)
    target, weight = fit.target(x), fit.weight(x)
    points = np.unique((0.5 - 0.5 * np.cos(np.linspace(0.05, math.pi - 0.05, n))) * (len(x) - 1)).astype(int)
    signs = (-1.0) ** np.arange(n)
    for _ in range(rounds):
        system = np.column_stack((basis[points], signs / weight[points]))
        *coefficients, level = np.linalg.solve(system, target[points])
        error = (target - basis @ np.array(coefficients)) * weight
        if np.abs(error).max() <= abs(level) * (1.0 + 1e-6):
            return np.array(coefficients), abs(level)
        points = _alternating_extremes(error, n)
    raise RuntimeError(f"{fit.name}: no equioscillation after {rounds} exchanges")


def _alternating_extremes(error: np.ndarray, n: int) -> np.ndarray:
    """The largest |error| of each stretch of one sign; of more than n stretches, n neighbouring ones."""
    stretches = np.split(np.arange(len(error)), np.flatnonzero(np.diff(np.sign(error))) + 1)
    extremes = np.array([stretch[np.abs(error[stretch]).argmax()] for stretch in stretches])
    while len(extremes) > n:
        extremes = extremes[1:] if abs(error[extremes[0]]) < abs(error[extremes[-1]]) else extremes[:-1]
    return extremes


def literals() -> list[float]:
    """The decimal literals of csrc/core/normal.h in their order, before rounding to float32."""
    logarithm, sine, cosine = (remez(fit)[0] for fit in FITS)
    return [*logarithm[::-1], LOG_TWO, 1.5, *sine[::-1], *cosine[::-1]]


if __name__ == "__main__":
    for fit in FITS:
        coefficients, level = remez(fit)
        print(f"{fit.name}: weighted error {level:.3e}, from the highest power down")
        print("  " + " ".join(f"{np.float32(c):.9g}f" for c in coefficients[::-1]))
