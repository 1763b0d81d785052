"""Estimators: which points they probe, what they make of the losses, what they refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pyzo import control as layout
from pyzo import ops
from pyzo.estimators import Estimator, ForwardGrad, OneSided, TwoSided


class Recorder:
    """Points that note what is asked of them; the losses are 0, 1, 2, ... in the order of the calls."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def note(self, what: Any) -> Tensor:
        self.asked.append(what)
        return torch.tensor(float(len(self.asked) - 1))

    def here(self) -> Tensor:
        return self.note("w")

    def at(self, direction: int, sign: float) -> Tensor:
        return self.note((direction, sign))

    def along(self, direction: int) -> tuple[Tensor, Tensor]:
        return self.note(("along", direction)), torch.tensor(10.0 * (direction + 1))


@pytest.mark.parametrize(
    ("estimator", "asked", "losses"),
    [
        (TwoSided(), [(0, 1.0), (0, -1.0)], [0, 1]),
        (TwoSided(2), [(0, 1.0), (0, -1.0), (1, 1.0), (1, -1.0)], [0, 1, 2, 3]),
        (OneSided(), ["w", (0, 1.0)], [0, 1]),
        (OneSided(3), ["w", (0, 1.0), (1, 1.0), (2, 1.0)], [0, 1, 2, 3]),
        (OneSided(2, "std"), ["w", (0, 1.0), (1, 1.0)], [0, 1, 2]),
        (ForwardGrad(), [("along", 0)], [0, 10]),
        (ForwardGrad(2), [("along", 0), ("along", 1)], [0, 10, 1, 20]),
    ],
    ids=str,
)
def test_points_in_their_order(estimator, asked, losses):
    """l(w) is shared by all directions, and asked for where it is needed only."""
    points = Recorder()
    values = estimator.probe(points)
    assert points.asked == asked
    assert [v.item() for v in values] == losses
    assert estimator.loss_here == (asked[0] not in ((0, 1.0),))


LOSSES = torch.tensor([1.7, 2.9, 1.1, 0.3, 3.1, -0.4], dtype=torch.float64)
EPS = (1e-2, 3e-3)


def coefficients(estimator: Estimator, losses: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """What `estimate_` writes for two rows with EPS: the coefficients [2, q] and ok."""
    control = ops.control(estimator.q, 2)
    control.view(torch.float64)[layout.LINES :, layout.EPS] = torch.tensor(EPS, dtype=torch.float64)
    ops.begin_step_(control)
    estimator.estimate_(control, losses, **options)
    found = control.view(torch.float64)[layout.LINES :, layout.COEFFICIENTS : layout.COEFFICIENTS + estimator.q]
    return found, control[0, layout.OK]


@pytest.mark.parametrize("q", [1, 3])
def test_coefficients_are_the_formulas(q):
    """In float64, with the directions averaged; bits, since the order of operations is part of the contract."""
    for r, eps in enumerate(EPS):
        for k in range(q):
            two = (LOSSES[2 * k] - LOSSES[2 * k + 1]) / (2.0 * eps * q)
            one = (LOSSES[1 + k] - LOSSES[0]) / (eps * q)
            forward = LOSSES[2 * k + 1] / q
            assert coefficients(TwoSided(q), LOSSES[: 2 * q])[0][r, k] == two
            assert coefficients(OneSided(q), LOSSES[: q + 1])[0][r, k] == one
            assert coefficients(ForwardGrad(q), LOSSES[: 2 * q])[0][r, k] == forward


@pytest.mark.parametrize("q", [2, 5])
def test_normalised_coefficients_do_without_eps(q):
    """(l_k - l_0) / (q std): std of the probes with q - 1 below, l(w) not among them."""
    found, ok = coefficients(OneSided(q, "std"), LOSSES[: q + 1])
    want = (LOSSES[1 : q + 1] - LOSSES[0]) / (q * LOSSES[1 : q + 1].std(correction=1))
    assert ok
    for r in range(2):
        torch.testing.assert_close(found[r], want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("estimator", [TwoSided(3), OneSided(3), ForwardGrad(3)], ids=str)
def test_signs_alone(estimator):
    losses = torch.tensor([0.0, 2.0, 0.0, -3.0, 0.0, 0.0], dtype=torch.float64)
    found, ok = coefficients(estimator, losses[: 4 if isinstance(estimator, OneSided) else 6], signs=True)
    want = {TwoSided: [-1, 1, 0], OneSided: [1, 0, -1], ForwardGrad: [1, -1, 0]}[type(estimator)]
    assert ok
    assert torch.equal(found, torch.tensor([want, want], dtype=torch.float64) / 3)


@pytest.mark.parametrize("estimator", [TwoSided(2), OneSided(2), OneSided(2, "std"), ForwardGrad(2)], ids=str)
@pytest.mark.parametrize("signs", [False, True])
def test_any_loss_that_is_not_finite_clears_ok(estimator, signs):
    count = 3 if isinstance(estimator, OneSided) else 4
    assert coefficients(estimator, LOSSES[:count], signs=signs)[1]
    for i in range(count):
        for bad in (math.nan, math.inf, -math.inf):
            losses = LOSSES[:count].clone()
            losses[i] = bad
            assert not coefficients(estimator, losses, signs=signs)[1]


def test_losses_without_spread_clear_ok_where_they_are_normalised():
    assert not coefficients(OneSided(3, "std"), torch.tensor([1.0, 2.0, 2.0, 2.0], dtype=torch.float64))[1]


@pytest.mark.parametrize("kind", [TwoSided, OneSided, ForwardGrad])
@pytest.mark.parametrize("q", [0, -1, 1.5, True, "2", None])
def test_bad_q(kind, q):
    with pytest.raises(ValueError, match="q: expected an integer >= 1, got"):
        kind(q)


def test_bad_normalisations():
    with pytest.raises(ValueError, match="normalize: expected None or 'std', got 'mean'"):
        OneSided(2, "mean")
    with pytest.raises(ValueError, match="q: expected >= 2 directions to take a standard deviation of, got 1"):
        OneSided(1, "std")


def test_estimators_are_values():
    assert TwoSided(2) == TwoSided(2) != TwoSided(3)
    assert OneSided(2) != OneSided(2, "std")
    assert TwoSided(1) != OneSided(1)
