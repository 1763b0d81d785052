"""exp, log, tanh, erf and the rest: the C++ test on every instruction set, the reference's bits and errors, the fit."""

import importlib.util
import subprocess

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from test_cpp import CSRC, ISAS, NOT_ON_THIS_MACHINE, ROOT, build, run

from pyzo.reference import elementary
from pyzo.reference.arithmetic import float_of_bits

mpmath = pytest.importorskip("mpmath")
NAMES = ("exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf", "below", "density")  # in the order of the C++ test
# Largest errors over every float32 input, in units of the last place: of normal and of subnormal results, as `all` of
# csrc/tests/test_elementary.cpp measures them, rounded up.
BOUNDS = {
    "exp": (0.92, 0.86),
    "expm1": (1.6, 0.0),
    "log": (0.93, 0.0),
    "log1p": (0.93, 0.0),
    "tanh": (1.59, 0.0),
    "sigmoid": (2.79, 0.86),
    "erf": (1.7, 0.84),
    "below": (3.78, 1.95),
    "density": (1.51, 1.08),
}
# Largest error as a multiple of that of torch's own float32 function, and that function. torch computes tanh, erf and
# expm1 on the CPU in more than float32, to 0.5 units.
TORCH = {
    "exp": (2.0, torch.exp),
    "expm1": (3.3, torch.expm1),
    "log": (2.0, torch.log),
    "log1p": (2.0, torch.log1p),
    "tanh": (3.3, torch.tanh),
    "sigmoid": (2.0, torch.sigmoid),
    "erf": (3.3, torch.erf),
    "below": (0.01, torch.special.ndtr),
}


def ours(name: str, x: torch.Tensor) -> torch.Tensor:
    if name in ("below", "density"):
        return elementary.normal_distribution(x)[name == "density"]
    return getattr(elementary, name)(x)


def ideal(name: str, x: torch.Tensor) -> torch.Tensor:
    """In float64, accurate relative to its size."""
    x = x.double()
    if name == "sigmoid":
        return torch.where(x < 0, x.exp() / (1 + x.exp()), torch.sigmoid(x))
    if name == "below":
        return torch.special.erfc(-x * 0.5**0.5) / 2
    if name == "density":
        return torch.exp(-x * x / 2) * (2 * torch.pi) ** -0.5
    return getattr(torch, name)(x)


def patterns(n: int) -> torch.Tensor:
    """Floats of every exponent and kind."""
    return float_of_bits(torch.arange(n) * 2654435769 & 0xFFFFFFFF)


def largest_errors(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """In units of the last place, of normal and of subnormal results."""
    unit = torch.ldexp(torch.ones_like(want), torch.frexp(want).exponent.clamp(min=-125) - 24)
    error = (got.double() - want).abs() / unit
    counts = want.abs() < 2.0**128 - 2.0**103  # no NaN, nothing that rounds to infinity
    small = want.abs() < 2.0**-126
    return error[counts & ~small].max().item(), error[counts & small].amax().item() if small.any() else 0.0


@pytest.mark.parametrize("lanes", ISAS)
def test_program(lanes, tmp_path):
    source = CSRC / "tests" / "test_elementary.cpp"
    code = run(build(tmp_path / lanes, f"-DPYZO_ISA={lanes}", f"-DPYZO_LANES={ISAS[lanes]}", source))
    if code == NOT_ON_THIS_MACHINE:
        pytest.skip(f"this machine has no {lanes}: compiled, not run")
    assert code == 0


def test_reference_has_the_bits_of_the_header(tmp_path, one_thread):
    n = 1 << 16
    source = CSRC / "tests" / "test_elementary.cpp"
    program = build(tmp_path / "base", "-DPYZO_ISA=base", "-DPYZO_LANES=4", source)
    output = subprocess.run([program, "values", str(n)], check=True, capture_output=True).stdout
    values = torch.from_numpy(np.frombuffer(output, np.float32).copy()).view(len(NAMES), n)
    x = patterns(n)
    for name, want in zip(NAMES, values, strict=True):
        got = ours(name, x)
        assert torch.equal(got.isnan(), want.isnan()), name
        assert_same_bits(got.nan_to_num(0.0, torch.inf, -torch.inf), want.nan_to_num(0.0, torch.inf, -torch.inf), name)


@pytest.mark.parametrize("name", NAMES)
def test_errors_of_the_reference(name, one_thread):
    x = torch.cat((patterns(1 << 18), torch.linspace(-15.0, 15.0, 1 << 17)))
    got, want = ours(name, x), ideal(name, x)
    assert torch.equal(got.isnan(), want.isnan())
    errors = largest_errors(got, want)
    print(name, errors)
    assert errors[0] <= BOUNDS[name][0]
    assert errors[1] <= BOUNDS[name][1]
    if name in TORCH:
        factor, function = TORCH[name]
        assert errors[0] <= factor * largest_errors(function(x), want)[0]


def test_far_tail_of_the_normal():
    """Against mpmath, where the float64 of the other tests is not independent of torch."""
    for x in (-0.5, -1.0, -3.0, -6.5, -10.0, -12.875):  # float32 numbers
        below, density = (value.item() for value in elementary.normal_distribution(torch.tensor(x)))
        with mpmath.workdps(30):
            assert abs(below / mpmath.ncdf(x) - 1) < BOUNDS["below"][0] * 2.0**-23
            assert abs(density / mpmath.npdf(x) - 1) < BOUNDS["density"][0] * 2.0**-23


def test_signs_of_zero_and_limits():
    zero = torch.tensor([0.0, -0.0])
    for name in ("expm1", "log1p", "tanh", "erf"):
        assert_same_bits(ours(name, zero), zero, name)
    infinite = torch.tensor([-torch.inf, torch.inf])
    limits = {"exp": (0, torch.inf), "expm1": (-1, torch.inf), "tanh": (-1, 1), "sigmoid": (0, 1), "erf": (-1, 1)}
    for name, want in {**limits, "below": (0, 1), "density": (0, 0)}.items():
        assert_same_bits(ours(name, infinite), torch.tensor(want, dtype=torch.float32), name)
    assert elementary.log(zero).tolist() == [-torch.inf, -torch.inf]
    assert elementary.log1p(torch.tensor(-1.0)).item() == -torch.inf
    assert elementary.log(infinite)[1] == elementary.log1p(infinite)[1] == torch.inf
    assert elementary.log(torch.tensor([-1.0, -torch.inf])).isnan().all()
    assert elementary.log1p(torch.tensor([-1.5, -torch.inf])).isnan().all()


def test_constants_are_what_the_fit_derives():
    spec = importlib.util.spec_from_file_location("fit_elementary", ROOT / "bench" / "fit_elementary.py")
    fit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fit)
    header = (CSRC / "core" / "elementary.h").read_text()
    at = 0
    for literal in fit.literals():  # in the order of the header
        at = header.find(f"({literal}", at)
        assert at >= 0, f"{literal} is not in elementary.h after the constants before it"
        at += len(literal)
