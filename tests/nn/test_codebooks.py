"""`pyzo.nn.codebooks`: every built-in table derived again, what the tables are worth, and what is refused."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pyzo.nn.codebooks import FUNCTIONS, KINDS, Codebook, codebook

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # at the end: pyzo is the installed one

pytest.importorskip("scipy")
from bench import fit_codebooks as fit  # noqa: E402

ACTIVATIONS = {h.name: h for h in fit.ACTIVATIONS}
FITTED = [(kind, name, bits) for kind in fit.OBJECTIVES for name in ACTIVATIONS for bits in fit.BITS]
# Best tables of an even h - x/2 that are not their own mirror image.
ONE_SIDED = {("optimal", "gelu", 3), ("optimal", "gelu_tanh", 3), ("derivative", "hardswish", 2)}
# The hinges a of g = sum of a_i max(x - c_i, 0) that LowMemoryBP (arXiv 2406.16282) ships.
HINGES = {
    "gelu": (-0.04922261145617846, 1.0979632065417297, -0.048740595085551286),
    "silu": (-0.04060357190528599, 1.080925428529668, -0.040321856624382146),
}


@pytest.fixture(scope="module")
def tables():
    """All fitted tables, derived anew: (kind, function, bits) -> thresholds, slopes, cost. About 12 s."""
    return {key: fit.derive(key[0], ACTIVATIONS[key[1]], key[2]) for key in FITTED}


def arrays(kind, name, bits):
    book = codebook(name, bits, kind)
    return np.array(book.thresholds), np.array(book.slopes)


@pytest.mark.parametrize(("kind", "name", "bits"), FITTED)
def test_tables_are_what_the_fit_derives(tables, kind, name, bits):
    """Twelve digits; quick_gelu, scaled from silu in the library, is fitted by itself here."""
    thresholds, slopes = arrays(kind, name, bits)
    np.testing.assert_allclose(thresholds, tables[kind, name, bits][0], rtol=0, atol=2e-11)
    np.testing.assert_allclose(slopes, tables[kind, name, bits][1], rtol=0, atol=2e-11)


def test_the_generated_part_of_the_file(tables):
    """Its literals and its table of errors; and the comparison sees a changed digit and a missing line."""
    source = Path(fit.codebooks.__file__).read_text()
    have, want = source[source.index(fit.MARK) :], fit.generated(tables)
    assert fit.differences(have, want) == []
    assert len(fit.differences(have.replace("3.17130974269", "3.17130974273"), want)) == 1
    assert fit.differences(have[: have.rindex("# fmt: on")], want)


@pytest.mark.parametrize(("kind", "name", "bits"), [key for key in FITTED if key[::2] != ("optimal", 1)])
def test_tables_are_minima(kind, name, bits):
    """Stationary with a positive definite Hessian; a threshold where h' jumps costs more on either side.

    The gradient's bound is the literals' rounding, 5e-12, times the Hessian's largest eigenvalue, below 3.
    """
    h, objective = ACTIVATIONS[name], fit.OBJECTIVES[kind][1]
    c, _ = arrays(kind, name, bits)
    free = fit.free_thresholds(objective, h, c)
    cost, gradient, _ = objective(h, c)
    assert np.abs(gradient[free]).max() < 1.5e-11 * math.sqrt(len(c))
    curvature = np.linalg.eigvalsh(fit.hessian(objective, h, c)[np.ix_(free, free)])
    assert curvature[0] > 0
    assert curvature[-1] < 3
    for pinned in np.flatnonzero(~free):
        for move in (-1e-3, 1e-3):
            assert objective(h, c + move * (np.arange(len(c)) == pinned))[0] > cost + 1e-6


@pytest.mark.parametrize("kind", fit.OBJECTIVES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradient_of_the_objectives(kind, name):
    """Against central differences of the cost, away from any minimum."""
    h, objective, step = ACTIVATIONS[name], fit.OBJECTIVES[kind][1], 1e-5
    c = np.array([-4.1, -2.3, -1.2, -0.45, 0.3, 0.9, 2.6])
    gradient = objective(h, c)[1]
    differences = [(objective(h, c + d)[0] - objective(h, c - d)[0]) / (2 * step) for d in step * np.eye(len(c))]
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(gradient, differences, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("kind", "name", "bits"), [key for key in FITTED if key[0] == "optimal"])
def test_cost_is_the_distance_of_the_broken_line(kind, name, bits):
    """The objective works with knots; this integrand with the sum of hinges."""
    h, (c, slopes) = ACTIVATIONS[name], arrays(kind, name, bits)
    cost = fit.OBJECTIVES[kind][1](h, c)[0]
    # Literals rounded by 5e-12 offset the right tail by up to 15 hinges * (1e-11 * 8.5 + 5e-12 * 0.5) = 1.3e-9; the
    # distance moves by at most that times the square root of the tail's length, 48 + 17.
    assert abs(fit.primitive_distance(h, c, slopes) - math.sqrt(cost)) < 1.1e-8


@pytest.mark.parametrize(
    ("name", "bits", "squared", "distance"),
    [
        ("gelu", 1, "0.06176505", "0.248526"),
        ("silu", 1, "0.31630258", "0.562408"),
        ("mish", 1, "0.21095258", None),
        ("hardswish", 1, "0.45", None),
        ("softplus", 1, "0.60102845", None),
        ("gelu_tanh", 1, "0.06183674", None),
        ("quick_gelu", 1, "0.06415405", None),
        ("gelu", 2, "0.00950693504757", "0.0975035130"),
        ("silu", 2, "0.0399413164634", "0.1998532373"),
        ("gelu_tanh", 2, "0.00955215155", "0.0977351091"),
        ("quick_gelu", 2, "0.00810109468", "0.0900060813"),
        ("mish", 2, "0.0192636995", "0.1387937299"),
        ("hardswish", 2, "0.1166666667", "0.3415650255"),
        ("softplus", 2, "0.0144984705", "0.1204095945"),
        ("elu", 2, "0.00146652078", "0.0382951796"),
        ("gelu", 3, "0.00017889895", "0.0133753113"),
        ("silu", 3, "0.00119693946", "0.0345968129"),
        ("gelu_tanh", 3, "0.00017331903", "0.0131650686"),
        ("quick_gelu", 3, "0.00024276916", "0.0155810514"),
        ("mish", 3, "0.00042679813", "0.0206590933"),
        ("hardswish", 3, "0.00095801330", "0.0309517900"),
        ("softplus", 3, "0.00062814377", "0.0250627964"),
        ("elu", 3, "0.000053180281", "0.0072924811"),
    ],
)
def test_cost_of_optimal_tables(name, bits, squared, distance):
    """Found by an independent fit (L-BFGS, then Newton's method, over hinges); to all of its digits."""
    cost = fit.primitive_cost(ACTIVATIONS[name], arrays("optimal", name, bits)[0])[0]
    for expected, value in ((squared, cost), (distance, math.sqrt(cost))):
        if expected is not None:
            assert f"{value:.{len(expected) - 2}f}" == expected


@pytest.mark.parametrize(("name", "distance"), [("gelu", "0.097515825602"), ("silu", "0.199859445827")])
def test_published_tables(name, distance):
    """Slopes are the sums of the published hinges in float32; distances, of the hinges in double, are mpmath's."""
    book, hinges = codebook(name, 2, "paper"), np.array(HINGES[name])
    assert np.array_equal(np.array(book.slopes), np.append(0, np.cumsum(hinges.astype(np.float32), dtype=np.float32)))
    assert abs(hinges @ np.array(book.thresholds)) < 1e-15  # no offset at infinity
    slopes = np.append(0.0, np.cumsum(hinges))
    assert f"{fit.primitive_distance(ACTIVATIONS[name], np.array(book.thresholds), slopes):.12f}" == distance
    assert fit.primitive_cost(ACTIVATIONS[name], arrays("optimal", name, 2)[0])[0] < float(distance) ** 2


def test_published_slopes_at_infinity():
    assert codebook("gelu", 2, "paper").slopes[3] == 1.0
    assert codebook("silu", 2, "paper").slopes[3] == np.float32(1.00000012)


@pytest.mark.parametrize(
    ("kind", "name", "bits", "expected"),
    [
        ("paper", "gelu", 2, 0.357),
        ("optimal", "gelu", 1, 0.320),
        ("optimal", "gelu", 3, 0.112),
        ("paper", "silu", 2, 0.471),
        ("optimal", "silu", 1, 0.421),
    ],
)
def test_error_of_the_derivative(kind, name, bits, expected):
    """Under x ~ N(0, 1): what earlier measurements of the published table and of ReLU' gave."""
    assert round(fit.derivative_error(ACTIVATIONS[name], *arrays(kind, name, bits)), 3) == expected


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_tables_follow_the_derivative_better(name):
    """At every size, by the integral that they minimise and for x ~ N(0, 1)."""
    h = ACTIVATIONS[name]
    for bits in fit.BITS:
        optimal, derivative = (arrays(kind, name, bits) for kind in ("optimal", "derivative"))
        assert fit.derivative_cost(h, derivative[0])[0] <= fit.derivative_cost(h, optimal[0])[0]
        assert fit.derivative_error(h, *derivative) <= fit.derivative_error(h, *optimal)


@pytest.mark.parametrize(("kind", "name", "bits"), FITTED)
def test_structure(kind, name, bits):
    """Limits of h' outside, the sizes of `bits`; even h - x/2: own mirror image, or the image of negative sum."""
    h, book, (c, slopes) = ACTIVATIONS[name], codebook(name, bits, kind), arrays(kind, name, bits)
    assert book.bits == bits
    assert len(c) == 2**bits - 1
    assert (slopes[0], slopes[-1]) == (0, 1)
    if (kind, name, bits) in ONE_SIDED:
        assert c.sum() < -0.1
        objective = fit.OBJECTIVES[kind][1]
        np.testing.assert_allclose(objective(h, -c[::-1])[0], objective(h, c)[0], rtol=1e-12)
    elif h.even:
        assert np.array_equal(c, -c[::-1])
        np.testing.assert_allclose(slopes + slopes[::-1], 1.0, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
        ("silu", F.silu),
        ("mish", F.mish),
        ("softplus", lambda x: F.softplus(x, threshold=100.0)),
        ("elu", F.elu),
        ("hardswish", F.hardswish),
    ],
)
def test_fitted_functions_are_those_of_torch(name, function):
    """Values, values above either asymptote, and derivatives, in double."""
    h = ACTIVATIONS[name]
    x = torch.linspace(-20.03, 20.01, 4001, dtype=torch.float64, requires_grad=True)
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    x, y = x.detach().numpy(), y.detach().numpy()
    for have, want in [
        (h.value(x), y),
        (h.over(x, True), y - x),
        (h.over(x, False), y - h.left),
        (h.slope(x), slope.numpy()),
    ]:
        np.testing.assert_allclose(have, want, rtol=1e-14, atol=1e-14)
    assert set(ACTIVATIONS) | {"relu"} == set(FUNCTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_relu_is_exact(kind):
    assert codebook("relu", 1, kind) == Codebook((0.0,), (0.0, 1.0))
    with pytest.raises(ValueError, match=r"bits: expected 1 for relu, whose derivative has two values .*, got 2"):
        codebook("relu", 2, kind)


def test_own_tables():
    book = Codebook([-1, 0, 2], (0, -0.5, 1.5, 1))
    assert (book.thresholds, book.slopes, book.bits) == ((-1.0, 0.0, 2.0), (0.0, -0.5, 1.5, 1.0), 2)
    assert hash(book) == hash(Codebook((-1.0, 0.0, 2.0), (0.0, -0.5, 1.5, 1.0)))
    assert codebook("gelu", 2, book) is book
    assert codebook("mish", 2, ((-1, 0, 2), (0, -0.5, 1.5, 1))) == book
    assert codebook("silu", 2, [torch.tensor([-1.0, 0.0, 2.0]), np.array([0, -0.5, 1.5, 1])]) == book
    with pytest.raises(AttributeError):
        book.slopes = ()
    with pytest.raises(ValueError, match=r"kind: expected a codebook of 8 slopes \(3 bits\), got 4"):
        codebook("gelu", 3, book)


@pytest.mark.parametrize(
    ("thresholds", "slopes", "message"),
    [
        ((), (1,), r"thresholds: expected \[1, 3, 7, 15\] of them \(2\^bits - 1\), got 0"),
        ((0, 1), (0, 1, 2), "thresholds: expected .* got 2"),
        (range(31), range(32), "thresholds: expected .* got 31"),
        ((0,), (0,), "slopes: expected 2, one more than thresholds, got 1"),
        ((0, 1, 2), (0, 1, 2, 3, 4), "slopes: expected 4, one more than thresholds, got 5"),
        ((0, 2, 1), (0, 1, 2, 3), "thresholds: expected them to increase strictly, .* got"),
        ((0, 1, 1), (0, 1, 2, 3), "thresholds: expected them to increase strictly"),
        ((0, 1, 1 + 2.0**-25), (0, 1, 2, 3), "increase strictly, also after rounding to float32"),
        ((math.nan,), (0, 1), "thresholds: expected numbers that are finite in float32, got"),
        ((1e39,), (0, 1), "thresholds: expected numbers that are finite in float32, got"),
        ((0,), (0, math.inf), "slopes: expected numbers that are finite in float32, got"),
        ((0,), (0, 10**400), "slopes: expected a sequence of numbers, got"),
        ((0,), None, "slopes: expected a sequence of numbers, got None"),
        (("a",), (0, 1), "thresholds: expected a sequence of numbers, got"),
        (0.0, (0, 1), "thresholds: expected a sequence of numbers, got 0.0"),
    ],
)
def test_bad_tables(thresholds, slopes, message):
    with pytest.raises(ValueError, match=message):
        Codebook(thresholds, slopes)


@pytest.mark.parametrize(
    ("function", "bits", "kind", "message"),
    [
        ("tanh", 2, "optimal", "function: expected one of gelu, .*, relu, got 'tanh'"),
        (None, 2, "optimal", "function: expected one of .* got None"),
        ("gelu", 0, "optimal", "bits: expected an integer from 1 to 4, got 0"),
        ("gelu", 5, "optimal", "bits: expected an integer from 1 to 4, got 5"),
        ("gelu", 2.0, "optimal", "bits: expected an integer from 1 to 4, got 2.0"),
        ("gelu", True, "optimal", "bits: expected an integer from 1 to 4, got True"),
        (
            "gelu",
            2,
            "best",
            "kind: expected one of 'paper', 'optimal', 'derivative', a .* or a pair .* got 'best'",
        ),
        ("gelu", 2, None, "kind: expected one of .* got None"),
        ("gelu", 2, (1, 2, 3), "kind: expected one of .* got"),
        ("gelu", 1, "paper", "kind: expected 'optimal' or 'derivative' for gelu at 1 bits, got 'paper'"),
        ("mish", 2, "paper", "for mish at 2 bits, got 'paper', which exists for gelu and silu at 2 bits"),
        ("gelu_tanh", 2, "paper", "for gelu_tanh at 2 bits, got 'paper'"),
    ],
)
def test_bad_arguments(function, bits, kind, message):
    with pytest.raises(ValueError, match=message):
        codebook(function, bits, kind)
