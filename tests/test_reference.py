"""The specification itself: its arithmetic against rational arithmetic, its noise against the ideal, its estimates,
rules and steps against torch.optim and formulas written out in float64."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from bits import assert_same_bits, bits, weights

from pyzo import reference
from pyzo.reference import Method, Row

_FORMATS = {  # fraction bits, smallest normal exponent, largest exponent
    torch.float32: (23, -126, 127),
    torch.bfloat16: (7, -126, 127),
    torch.float16: (10, -14, 15),
}


def quantum(x: Fraction, dtype: torch.dtype) -> Fraction:
    """Distance of neighbouring values of `dtype` at x."""
    fraction_bits, smallest, _ = _FORMATS[dtype]
    exponent = smallest
    if x:
        exponent = max(smallest, math.floor(math.log2(abs(x))))
        exponent += abs(x) >= Fraction(2) ** (exponent + 1)  # log2 is rounded
        exponent -= abs(x) < Fraction(2) ** exponent and exponent > smallest
    return Fraction(2) ** (exponent - fraction_bits)


def exact_nearest(x: Fraction, dtype: torch.dtype) -> float:
    """x rounded to nearest even, as a float."""
    q = quantum(x, dtype)
    r = round(x / q) * q  # Fraction rounds half to even
    return math.copysign(math.inf, x) if abs(r) >= Fraction(2) ** (_FORMATS[dtype][2] + 1) else float(r)


def draws(n: int, seed: int, *, low: int = -30, high: int = 30) -> list[float]:
    """float32 numbers of many magnitudes, some with few bits so that ties occur."""
    rng = random.Random(seed)
    mantissa = [rng.getrandbits(rng.choice((1, 3, 8, 12, 24))) for _ in range(n)]
    return [m * rng.choice((-1, 1)) * 2.0 ** rng.randrange(low, high) for m in mantissa]


@pytest.mark.parametrize("low", [-30, -75])  # -75: subnormal products
def test_fma_rounds_once(low):
    a, b, c = draws(5000, 1, low=low), draws(5000, 2, low=low), draws(5000, 3, low=2 * low)
    got = reference.fma(*(torch.tensor(x, dtype=torch.float64).float() for x in (a, b, c)))
    exact = [Fraction(x) * Fraction(y) + Fraction(torch.tensor(z).item()) for x, y, z in zip(a, b, c, strict=True)]
    want = torch.tensor([exact_nearest(x, torch.float32) for x in exact], dtype=torch.float64).float()
    assert torch.equal(got, want)
    separate = torch.tensor(a).float() * torch.tensor(b).float() + torch.tensor(c).float()
    assert (separate != want).sum() > 10  # the inputs tell one rounding from two


def test_divide_and_sqrt_round_once():
    tiny, huge = 2.0**-149, 3.4028234663852886e38
    a = [*draws(3000, 7), *draws(1000, 8, low=-149, high=-120), 1.0, tiny, 3 * tiny, huge, 2.0**-126]
    b = [*draws(3000, 9), *draws(1000, 10, low=-20, high=100), 3.0, 2.0, 2.0, 0.3, 3.0]
    pairs = [(x, y) for x, y in zip(a, torch.tensor(b).tolist(), strict=True) if y]
    x, y = (torch.tensor(column, dtype=torch.float64).float() for column in zip(*pairs, strict=True))
    want = [math.copysign(exact_nearest(Fraction(p) / Fraction(q), torch.float32), p * q) for p, q in pairs]
    assert_same_bits(reference.divide(x, y), torch.tensor(want))
    assert sum(0 < abs(v) < 2.0**-126 for v in want) > 100  # subnormal quotients are among them

    for v in {abs(v) for v in a} - {0.0}:
        root = Fraction(reference.sqrt(torch.tensor(v)).item())
        half = quantum(root, torch.float32) / 2
        assert (root - half) ** 2 < Fraction(v) < (root + half) ** 2
    ends = torch.tensor([0.0, math.inf])
    assert_same_bits(reference.sqrt(ends), ends)
    assert reference.divide(torch.tensor([1.0, -1.0, 0.0]), torch.tensor(0.0)).tolist()[:2] == [math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_round_nearest(dtype):
    x = torch.tensor(
        [*draws(5000, 4), 65504.0, 65519.0, 65520.0, 3.4e38, -3.4e38, 0.0, 2.0**-149, 2.0**-25, 3 * 2.0**-25]
    )
    want = torch.tensor([exact_nearest(Fraction(v), dtype) for v in x.tolist()])
    assert torch.equal(reference.round_nearest(x, dtype), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_round_stochastic(dtype):
    x = torch.tensor(
        [*draws(5000, 5), 65504.0, 65520.0, 65535.0, 3.4e38, -3.4e38, 0.0, -0.0, 2.0**-149, 2.0**-25, -(2.0**-14)]
    )
    random_bits = torch.randint(0, 65536, x.shape, generator=torch.Generator().manual_seed(6))
    random_bits[::7], random_bits[::11] = 0, 65535
    want = []
    for v, r in zip(x.tolist(), random_bits.tolist(), strict=True):
        q = quantum(Fraction(v), dtype)
        rounded = (math.floor(abs(Fraction(v)) / q * 65536) + r) // 65536 * q
        overflows = rounded >= Fraction(2) ** (_FORMATS[dtype][2] + 1)
        want.append(math.copysign(math.inf if overflows else float(rounded), v))
    assert_same_bits(reference.round_stochastic(x, dtype, random_bits), torch.tensor(want))
    specials = torch.tensor([math.inf, -math.inf, math.nan])
    assert_same_bits(reference.round_stochastic(specials, dtype, torch.tensor([65535] * 3)), specials)


def test_philox_known_answers_of_random123():
    counter = torch.tensor([[0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]])
    key = 0x299F31D0A4093822
    assert reference.philox4x32(counter, key).tolist() == [[0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]]
    assert reference.philox4x32(counter, key, rounds=10).tolist() == [[0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]]
    ones = torch.full((1, 4), 2**32 - 1)
    assert reference.philox4x32(ones, 2**64 - 1, rounds=10).tolist() == [
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    ]


def test_radius_is_near_the_ideal():
    edges = torch.arange(3000)
    a = torch.cat((edges, 2**31 + edges - 1500, 2**32 - 1 - edges, torch.arange(0, 2**32, 99991)))
    ideal = torch.sqrt(-2 * torch.log((a.double() + 0.5) / 2**32))
    assert (reference.radius(a).double() - ideal).abs().max() <= 1e-5


def test_direction_is_near_the_ideal():
    b = torch.arange(0, 2**32, 9973)
    cos, sin = reference.direction_of(b)
    t = (b & 0x7FFFFE | 1).double() / 2**23 - 0.5
    sign = 1.0 - 2.0 * (b >> 31)
    assert (cos.double() - sign * torch.cos(math.pi * t)).abs().max() <= 1e-6
    assert (sin.double() - torch.sin(math.pi * t)).abs().max() <= 1e-6


def test_elements_come_in_blocks_of_their_stream():
    index = torch.arange(8 * 128)
    words = reference.field_words(5, 6, 1, index[:8])
    signs = [1.0 - 2.0 * (words[i // 128, i % 128 // 32].item() >> i % 32 & 1) for i in index.tolist()]
    assert reference.rademacher(5, 6, index).tolist() == signs
    assert (reference.ROUNDING_STREAM, reference.MASK_STREAM) == (2, 3)
    for stream in (2, 3):
        words = reference.field_words(5, 6, stream, index[:128])
        halves = [words[i // 8, i % 8 // 2].item() >> 16 * (i % 2) & 0xFFFF for i in index.tolist()]
        assert reference.random_bits(5, 6, stream, index).tolist() == halves


def test_global_index_of_a_rectangle():
    whole = torch.arange(12 * 20).view(12, 20)
    assert torch.equal(reference.global_index(12 * 7, base=5, inner=7, stride=20), whole[:, 5:12].reshape(-1))
    assert torch.equal(reference.global_index(40, base=60), whole[3:5].reshape(-1))


def test_direction_seeds_are_distinct():
    seeds = {reference.direction_seed(1, step, k) for step in range(200) for k in (*range(50), 2**64 - 2, 2**64 - 1)}
    assert len(seeds) == 200 * 52


# The control tensor ---------------------------------------------------------------------------------------------------


def doubles(control: torch.Tensor) -> torch.Tensor:
    return control.cpu().view(torch.float64)


def test_words_of_a_row():
    row = Row(
        **{"lr": 0.1, "eps": 0.2, "weight_decay": 0.3, "beta1": 0.4, "beta2": 0.5, "dampening": 0.6, "rule_eps": 0.7},
        **{"option": True, "born": 8, "age": 9, "correction1": 0.10, "correction2": 0.11},
        **{"keep": 12, "refresh": 13, "mask_seed": 2**64 - 14, "threshold": 0.15},
    )
    control = reference.new_control(2, [Row(), row], 2**64 - 5)
    assert control.shape == (5, 16 + 2 * 2) and control[0, 4] == -5 and doubles(control)[3, 12:14].view(torch.int64)[0]
    assert doubles(control)[4, :8].tolist() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0]
    assert control[4, 8:10].tolist() == [8, 9]
    assert doubles(control)[4, 10:12].tolist() == [0.10, 0.11]
    assert control[4, 12:15].tolist() == [12, 13, -14]
    assert doubles(control)[3, 15].item() == math.inf and doubles(control)[4, 15].item() == 0.15
    assert control[4, 16:].tolist() == [0, 0, 0, 0]
    assert reference.read_row(control, 0) == Row() and reference.read_row(control, 1) == row


def test_begin_step():
    run, refresh = 2**64 - 3, (0, 1, 3)
    control = reference.new_control(2, [Row(refresh=r) for r in refresh], run)
    control[0, 0], doubles(control)[0, 6] = 0, 1.0
    for t in range(1, 8):
        reference.begin_step_(control)
        assert control[0, :4].tolist() == [1, 0, t, 0] and doubles(control)[0, 6] == 0.0
        assert [s % 2**64 for s in control[1, :2].tolist()] == [reference.direction_seed(run, t, k) for k in (0, 1)]
        assert control[0, 5].item() % 2**64 == reference.direction_seed(run, t, 2**64 - 1)
        drawn_in = (t, t, 1 + (t - 1) // 3)  # 1 1 1 2 2 2 3
        seeds = [reference.read_row(control, r).mask_seed for r in range(3)]
        assert seeds == [reference.direction_seed(run, first, 2**64 - 2) for first in drawn_in]


EPS = (1e-3, 2e-3)
FLAT = [1.0, 1.5, 1.5, 1.5]  # no spread
HUGE = [0.0, 1e39, 0.0, 0.0]
STEEP = [1e308, -1e308]  # the difference overflows
SIGMA = math.sqrt(((2.0 - 3.0) ** 2 + (4.0 - 3.0) ** 2) / 1)  # of 2 and 4


def both(*coefficients: float) -> list[list[float]]:
    return [list(coefficients)] * 2


@pytest.mark.parametrize(
    ("kind", "scaling", "q", "losses", "want"),
    [
        (0, 0, 1, [1.0, 0.5], [[0.5 / (2.0 * e * 1)] for e in EPS]),
        (0, 0, 2, [1.0, 0.5, 2.0, 3.0], [[0.5 / (2.0 * e * 2), -1.0 / (2.0 * e * 2)] for e in EPS]),
        (0, 0, 1, [1.0, 0.5, 7.0], [[0.5 / (2.0 * e * 1)] for e in EPS]),  # l(w) of a conservative step
        (0, 2, 3, [1.0, 0.5, 2.0, 3.0, 4.0, 4.0], both(1 / 3, -1 / 3, 0.0)),
        (1, 0, 2, [1.0, 2.0, 4.0], [[1.0 / (e * 2), 3.0 / (e * 2)] for e in EPS]),
        (1, 1, 2, [1.0, 2.0, 4.0], both(1.0 / (2 * SIGMA), 3.0 / (2 * SIGMA))),
        (1, 2, 2, [1.0, 2.0, 0.5], both(0.5, -0.5)),
        (2, 0, 2, [9.0, 3.0, 9.0, -5.0], both(1.5, -2.5)),
        (2, 2, 2, [9.0, 3.0, 9.0, -5.0], both(0.5, -0.5)),
        (0, 0, 1, [1.0, math.nan], None),
        (0, 0, 1, [math.inf, 1.0], None),
        (0, 0, 1, [1.0, 0.5, math.nan], None),
        (0, 0, 1, HUGE[1:3], None),  # finite losses, a coefficient beyond float32
        (0, 2, 1, HUGE[1:3], both(1.0)),
        (0, 2, 1, STEEP, None),
        (1, 0, 3, HUGE, None),
        (1, 1, 3, FLAT, None),
        (1, 1, 2, [math.nan, 2.0, 4.0], None),
        (2, 0, 1, [math.inf, 2.0], None),
        (2, 0, 1, [1.0, 1e39], None),
    ],
)
def test_estimate(kind, scaling, q, losses, want, device):
    rows = [Row(eps=e, beta1=0.9, beta2=b, born=born) for e, b, born in zip(EPS, (0.999, 0.0), (0, 5), strict=True)]
    control = reference.new_control(3, rows, 1)
    control[0, 1:4] = torch.tensor([7, 8, 9])
    operated = control.clone().to(device)
    values = torch.tensor(losses, dtype=torch.float64)
    reference.estimate_(control, values, kind, q, scaling)
    assert control[0, :4].tolist() == [int(want is not None), 7 + (want is None), 8, 9 + (want is not None)]
    torch.testing.assert_close(doubles(control)[2, : len(losses)], values, rtol=0, atol=0, equal_nan=True)
    for r, row in enumerate(rows):
        got, age = reference.read_row(control, r), 10 - row.born
        if want is None:
            assert got == row
        else:
            assert doubles(control)[3 + r, 16 : 16 + q].tolist() == want[r]
            assert got.age == age
            assert got.correction1 == pytest.approx(1 - 0.9**age, rel=1e-15)
            assert got.correction2 == pytest.approx(1 - row.beta2**age, rel=1e-13)  # near 1: 1 - beta2^age cancels

    torch.ops.pyzo.estimate_(operated, values.to(device), kind, q, scaling)
    torch.testing.assert_close(doubles(operated), doubles(control), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(operated[:2].cpu(), control[:2])
    assert torch.equal(operated[3:, 8:10].cpu(), control[3:, 8:10])


def test_zero_eps_skips():
    control = reference.new_control(1, [Row(eps=1.0), Row(eps=0.0)], 1)
    reference.estimate_(control, torch.tensor([1.0, 0.5], dtype=torch.float64), 0, 1, 0)
    assert control[0, :4].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("stay", "down", "up", "choice"),
    [
        (2.0, 1.0, 3.0, 1.0),
        (2.0, 3.0, 1.0, -1.0),
        (1.0, 2.0, 3.0, 0.0),
        (3.0, 1.0, 2.0, 1.0),
        (3.0, 2.0, 1.0, -1.0),
        (2.0, 1.0, 1.0, 1.0),
        (2.0, 2.0, 2.0, 1.0),
        (2.0, 2.0, 1.0, -1.0),
        (2.0, 3.0, 2.0, 0.0),
        (2.0, math.nan, 1.0, -1.0),
        (2.0, math.inf, 1.0, -1.0),
        (2.0, math.nan, 3.0, 0.0),
        (2.0, 1.0, math.nan, 1.0),
        (2.0, 1.0, -math.inf, 1.0),
        (2.0, 3.0, math.nan, 0.0),
        (2.0, math.nan, math.nan, 0.0),
        (math.nan, 1.0, 1.0, 0.0),
        (math.inf, 1.0, 2.0, 0.0),
        (-math.inf, 1.0, 2.0, 0.0),
    ],
)
@pytest.mark.parametrize("ok", [1, 0])
def test_choose(stay, down, up, choice, ok, device):
    control = reference.new_control(2, [Row()], 1)
    control[0, 0], control[2, :5] = ok, 77
    doubles(control)[0, 6] = 5.0
    operated, losses = control.clone().to(device), torch.tensor([stay, down, up], dtype=torch.float64)
    reference.choose_(control, losses)
    assert doubles(control)[0, 6] == (choice if ok else 0.0)
    assert control[2].tolist()[:5] == [77] * 5
    torch.testing.assert_close(doubles(control)[2, 5:8], losses, rtol=0, atol=0, equal_nan=True)
    torch.ops.pyzo.choose_(operated, losses.to(device))
    torch.testing.assert_close(doubles(operated), doubles(control), rtol=0, atol=0, equal_nan=True)


# Rules ----------------------------------------------------------------------------------------------------------------

KEY = 99
TABLE = torch.tensor([[KEY, 0, 0, 0, 0]])
NONE = {"undo": -1, "undo_sign": 0.0, "rule": 0, "directions": 0, "update_sign": 1.0, "chosen": False, "retract": False}
NONE |= {"perturb": -1, "perturb_sign": 0.0, "stochastic": False, "masked": True, "distribution": 0, "trial": False}
Optimizer = Callable[[torch.Tensor], torch.optim.Optimizer]


def sweep(w: torch.Tensor, state: list[torch.Tensor], control: torch.Tensor, **arguments: object) -> None:
    """A pass over one tensor in place."""
    reference.pass_([], [w], state, [], [], [], TABLE, control, **NONE | arguments)


def begin(control: torch.Tensor, n: int, coefficient: float) -> torch.Tensor:
    """Begins a step whose estimate is coefficient * z; returns that estimate, float32 [n]."""
    reference.begin_step_(control)
    reference.estimate_(control, torch.tensor([0.0, coefficient], dtype=torch.float64), 2, 1, 0)
    z = reference.noise(n, seed=control[1, 0].item() % 2**64, key=KEY)
    return torch.tensor(coefficient, dtype=torch.float64).float() * z


def sgd(**options: object) -> Optimizer:
    return lambda p: torch.optim.SGD([p], lr=0.03, foreach=False, **options)


def adam(kind: type = torch.optim.Adam, **options: object) -> Optimizer:
    return lambda p: kind([p], lr=0.03, foreach=False, **options)


@pytest.mark.parametrize(
    ("rule", "row", "optimizer"),
    [
        ("sgd", {}, sgd()),
        ("sgd", {"weight_decay": 0.2}, sgd(weight_decay=0.2)),
        ("momentum", {"beta1": 0.9}, sgd(momentum=0.9)),
        ("momentum", {"beta1": 0.9, "option": True}, sgd(momentum=0.9, nesterov=True)),
        ("momentum", {"beta1": 0.8, "dampening": 0.3}, sgd(momentum=0.8, dampening=0.3)),
        (
            "momentum",
            {"beta1": 0.9, "option": True, "weight_decay": 0.2},
            sgd(momentum=0.9, nesterov=True, weight_decay=0.2),
        ),
        ("adam", {"beta1": 0.9, "beta2": 0.999, "rule_eps": 1e-8}, adam()),
        ("adam", {"beta1": 0.7, "beta2": 0.9, "rule_eps": 1e-2}, adam(betas=(0.7, 0.9), eps=1e-2)),
        (
            "adam",
            {"beta1": 0.9, "beta2": 0.999, "rule_eps": 1e-8, "weight_decay": 0.2},
            adam(weight_decay=0.2),
        ),
        (
            "adam",
            {"beta1": 0.9, "beta2": 0.999, "rule_eps": 1e-8, "weight_decay": 0.2, "option": True},
            adam(torch.optim.AdamW, weight_decay=0.2),
        ),
    ],
)
def test_rules_are_as_near_to_float64_as_torch_s(rule, row, optimizer):
    """The error of weights and states after 10 updates is at most twice that of torch.optim in float32."""
    n = 2000
    w = torch.randn(n, generator=torch.Generator().manual_seed(1))
    start = w.clone()
    single, double = (w.to(dtype, copy=True).requires_grad_() for dtype in (torch.float32, torch.float64))
    optimizers = [optimizer(single), optimizer(double)]
    states = [torch.zeros(n) for _ in reference.STATES[rule]]
    control = reference.new_control(1, [Row(lr=0.03, **row)], 2)
    for coefficient in (1.0, -0.7, 0.3, 2.0, 1.1, -3.0, 0.01, 0.9, -0.4, 1.7):
        g = begin(control, n, coefficient)
        sweep(w, states, control, rule=reference.RULES.index(rule), directions=1)
        for p, opt in zip((single, double), optimizers, strict=True):
            p.grad = g.to(p.dtype)
            opt.step()
    pairs = [(w, single, double)]
    for name, state in zip(reference.STATES[rule], states, strict=True):
        pairs.append((state, *(opt.state[p][name] for p, opt in zip((single, double), optimizers, strict=True))))
    for by_pass, by_torch, exact in pairs:
        ours, theirs = ((x.detach().double() - exact.detach()).abs() for x in (by_pass, by_torch))
        assert theirs.max() > 0 and ours.max() <= 2 * theirs.max() and ours.mean() <= 2 * theirs.mean()
    assert (w - start).abs().mean() > 0.02


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_sign_rule(weight_decay):
    w = torch.randn(500, generator=torch.Generator().manual_seed(3))
    control = reference.new_control(2, [Row(lr=0.25, weight_decay=weight_decay)], 4)
    reference.begin_step_(control)
    # Rademacher directions and equal coefficients: g is exactly zero at half of the elements.
    reference.estimate_(control, torch.tensor([0.0, 3.0, 0.0, 3.0], dtype=torch.float64), 2, 2, 0)
    seeds = [s % 2**64 for s in control[1, :2].tolist()]
    g = sum(reference.noise(500, seed=s, key=KEY, distribution="rademacher") for s in seeds)
    assert 150 < (g == 0).sum() < 350
    want = w.double() - 0.25 * (torch.sign(g) + weight_decay * w.double())
    got = w.clone()
    sweep(got, [], control, rule=1, directions=2, distribution=1)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2.0**-22)


def test_first_update_is_not_dampened_and_counts_from_birth():
    """A row that joined after two updates has its first one when the others have their third."""
    n, mu, dampening = 50, 0.5, 0.75
    row = Row(lr=0.5, beta1=mu, dampening=dampening)
    control = reference.new_control(1, [row, replace(row, born=2)], 5)
    buffers = [torch.zeros(n), torch.full((n,), 1e30)]
    weights_of = [torch.zeros(n), torch.zeros(n)]
    table = torch.tensor([[KEY, 0, 0, 0, 0], [KEY, 0, 0, 0, 1]])
    exact = torch.zeros(n, dtype=torch.float64)
    for t in (1, 2, 3):
        g = begin(control, n, 0.5 * t)
        joined = slice(2 if t > 2 else 1)
        step = NONE | {"rule": 2, "directions": 1}
        reference.pass_([], weights_of[joined], buffers[joined], [], [], [], table[joined], control, **step)
        exact = g.double() if t == 1 else mu * exact + (1 - dampening) * g.double()
        torch.testing.assert_close(buffers[0].double(), exact, rtol=1e-6, atol=1e-7)
    assert [reference.read_row(control, r).age for r in (0, 1)] == [3, 1]
    assert torch.equal(buffers[1], g)
    torch.testing.assert_close(weights_of[1], -0.5 * g, rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_states_round_by_permuted_bits_of_the_weight(rule, dtype):
    n = 3000
    row = Row(lr=0.03, beta1=0.9, beta2=0.99, rule_eps=1e-6)
    control = reference.new_control(1, [row], 6)
    begin(control, n, 1.0)
    begin(control, n, 0.8)  # not the first update
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(n, generator=generator).to(dtype)
    old = [torch.rand(n, generator=generator).bfloat16() for _ in reference.STATES[rule]]
    for stochastic in (True, False):
        wide, narrow = [s.float() for s in old], [s.clone() for s in old]
        w_wide, w_narrow = w.clone(), w.clone()
        for weight, states in ((w_wide, wide), (w_narrow, narrow)):
            sweep(weight, states, control, rule=reference.RULES.index(rule), directions=1, stochastic=stochastic)
        assert_same_bits(w_narrow, w_wide)  # the update reads the states before they are rounded
        for s, (n_state, w_state) in enumerate(zip(narrow, wide, strict=True)):
            r = reference.random_bits(control[0, 5].item() % 2**64, KEY, 2, torch.arange(n))
            r = r * reference.STATE_FACTORS[s] % 65536
            want = reference.round_stochastic(w_state, torch.bfloat16, r) if stochastic else w_state
            assert_same_bits(n_state, want.bfloat16(), f"state {s}, stochastic {stochastic}")
            assert not torch.equal(n_state, old[s])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_retract_takes_back_a_stochastic_update(dtype):
    n = 20000
    generator = torch.Generator().manual_seed(8)
    sign = 1.0 - 2.0 * (torch.rand(n, generator=generator) < 0.5).float()
    w = (sign * (1.3 + 0.4 * torch.rand(n, generator=generator))).to(dtype)  # stays in [1, 2): |update| <= 6.7 * 0.04
    control = reference.new_control(1, [Row(lr=0.04)], 9)
    begin(control, n, 1.0)
    for update_sign in (1.0, -1.0):
        moved = w.clone()
        sweep(moved, [], control, directions=1, update_sign=update_sign, stochastic=True)
        assert (moved != w).float().mean() > 0.8
        back, forth = moved.clone(), moved.clone()
        sweep(back, [], control, directions=1, update_sign=-update_sign, retract=True, stochastic=True)
        assert_same_bits(back, w)
        sweep(forth, [], control, directions=1, update_sign=-update_sign, stochastic=True)
        assert (forth != w).float().mean() > 0.1  # the same bits twice do not take back


# Masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1000, 16384, 50000, 65536])
def test_mask_keeps_weights_and_states_outside(keep):
    n, p = 60000, keep / 65536
    w = weights(n, torch.bfloat16, seed=10)
    states = [torch.randn(n), torch.rand(n)]
    control = reference.new_control(1, [Row(lr=0.5, eps=0.5, beta1=0.9, beta2=0.99, rule_eps=1e-8, keep=keep)], 11)
    begin(control, n, 1.0)
    seed = reference.read_row(control, 0).mask_seed
    trained = reference.random_bits(seed, KEY, 3, torch.arange(n)) < keep
    assert abs(trained.float().mean().item() - p) <= 5 * math.sqrt(p * (1 - p) / n)

    after, new = w.clone(), [s.clone() for s in states]
    sweep(after, new, control, rule=3, directions=1, stochastic=True, perturb=0, perturb_sign=1.0)
    for got, old in zip((after, *new), (w, *states), strict=True):
        assert_same_bits(got[~trained], old[~trained])
    free, free_states = w.clone(), [s.clone() for s in states]
    step = {"rule": 3, "directions": 1, "stochastic": True, "perturb": 0, "perturb_sign": 1.0, "masked": False}
    sweep(free, free_states, control, **step)
    for got, unmasked in zip((after, *new), (free, *free_states), strict=True):
        assert_same_bits(got[trained], unmasked[trained])
    moved = bits(free) != bits(w)
    assert moved.float().mean() > 0.7


def test_mask_lasts_refresh_steps():
    n, keep = 60000, 20000
    control = reference.new_control(1, [Row(eps=1.0, keep=keep, refresh=3)], 12)
    masks = []
    for _ in range(7):
        begin(control, n, 1.0)
        w = torch.zeros(n)
        sweep(w, [], control, perturb=0, perturb_sign=1.0)
        masks.append(w != 0)
    assert [bool(torch.equal(a, b)) for a, b in itertools.pairwise(masks)] == [True, True, False, True, True, False]
    p = (keep / 65536) ** 2  # share in two independent masks
    share = (masks[0] & masks[3]).float().mean().item()
    assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / n)


# Steps ----------------------------------------------------------------------------------------------------------------

SHAPES = {"a": (7, 30), "b": (41,)}
KEYS = {"a": 1, "b": 2**56 - 1}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 13) -> dict[str, torch.Tensor]:
    """Weights in +-[1.25, 1.75)."""
    generator = torch.Generator().manual_seed(seed)
    named = {}
    for name, shape in SHAPES.items():
        sign = 1.0 - 2.0 * (torch.rand(shape, generator=generator) < 0.5).float()
        named[name] = (sign * (1.25 + 0.5 * torch.rand(shape, generator=generator))).to(dtype)
    return named


def copy_of(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: w.clone() for name, w in named.items()}


def flat(named: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([w.reshape(-1).double() for w in named.values()])


def directions(run: int, step: int, q: int, distribution: str) -> list[torch.Tensor]:
    """z_k over all parameters, float64."""
    drawn = []
    for k in range(q):
        field = {"seed": reference.direction_seed(run, step, k), "distribution": distribution}
        drawn.append(flat({n: reference.noise(math.prod(s), key=KEYS[n], **field) for n, s in SHAPES.items()}))
    return drawn


class Script:
    """A closure that notes the weights at each call and returns losses from a list."""

    def __init__(self, named: dict[str, torch.Tensor], losses: list[float]):
        self.named, self.losses, self.seen = named, iter(losses), []

    def __call__(self) -> torch.Tensor:
        self.seen.append(copy_of(self.named))
        return torch.tensor(next(self.losses), dtype=torch.float64)


LR, STEP_EPS = 0.01, 0.02
TWO_SIDED = [3.0, 2.0, 1.0, 2.5]
ONE_SIDED = [1.0, 1.25, 0.5, 1.125]
DEVIATION = torch.tensor(ONE_SIDED[1:]).double().std().item()
CASES = {  # name -> arguments of Method, losses, points (0: w; (k, sign): w + sign eps z_k), coefficients
    "two-sided": ({}, TWO_SIDED[:2], [(0, 1), (0, -1)], [1.0 / (2 * STEP_EPS)]),
    "two-sided, q = 2": (
        {"q": 2},
        TWO_SIDED,
        [(0, 1), (0, -1), (1, 1), (1, -1)],
        [1.0 / (4 * STEP_EPS), -1.5 / (4 * STEP_EPS)],
    ),
    "one-sided": (
        {"q": 3, "estimator": "one-sided"},
        ONE_SIDED,
        [0, (0, 1), (1, 1), (2, 1)],
        [d / (3 * STEP_EPS) for d in (0.25, -0.5, 0.125)],
    ),
    "FZOO": (
        {"q": 3, "estimator": "one-sided", "scaling": "std", "distribution": "rademacher"},
        ONE_SIDED,
        [0, (0, 1), (1, 1), (2, 1)],
        [d / (3 * DEVIATION) for d in (0.25, -0.5, 0.125)],
    ),
    "scalar sign": ({"scaling": "sign"}, [2.0, 3.0], [(0, 1), (0, -1)], [-1.0]),
}


@pytest.mark.parametrize("store", ["inplace", "snapshot"])
@pytest.mark.parametrize("rule", ["sgd", "sign", "momentum", "adam"])
@pytest.mark.parametrize("case", CASES)
def test_step_of_a_method(case, rule, store):
    """Points, coefficients and the first update against the formulas of the papers in float64."""
    arguments, losses, points, coefficients = CASES[case]
    w = parameters()
    start, script, run = flat(w), Script(w, losses), 2**63 + 5
    row = Row(lr=LR, eps=STEP_EPS, weight_decay=0.1, beta1=0.9, beta2=0.99, rule_eps=1e-8)
    method = Method(w, KEYS, row, rule=rule, store=store, seed=run, **arguments)
    assert method.step(script).tolist() == losses
    z = directions(run, 1, len(coefficients), arguments.get("distribution", "normal"))
    for point, seen in zip(points, script.seen, strict=True):
        want = start if point == 0 else start + point[1] * STEP_EPS * z[point[0]]
        torch.testing.assert_close(flat(seen), want, rtol=0, atol=1e-6)

    g = sum(c * z_k for c, z_k in zip(coefficients, z, strict=True))
    decayed = g + 0.1 * start
    steps = {
        "sgd": decayed,
        "sign": torch.sign(g) + 0.1 * start,
        "momentum": decayed,
        "adam": decayed / (decayed.abs() + 1e-8),  # m^ = g and v^ = g^2 in the first step
    }
    torch.testing.assert_close(flat(w), start - LR * steps[rule], rtol=0, atol=3e-6)
    want_states = {"momentum_buffer": decayed, "exp_avg": 0.1 * decayed, "exp_avg_sq": 0.01 * decayed**2}
    assert list(method.states) == list(reference.STATES[rule])
    for name, state in method.states.items():
        torch.testing.assert_close(flat(state), want_states[name], rtol=1e-5, atol=1e-6)


def test_forward_gradient():
    w, target, keep = parameters(), parameters(seed=14), 40000
    start, tangents_seen = flat(w), []

    def closure(tangents: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        tangents_seen.append(flat(tangents))
        difference = flat(w) - flat(target)
        return difference.square().sum() / 2, difference @ tangents_seen[-1]

    method = Method(w, KEYS, Row(lr=LR, eps=1.0, keep=keep), estimator="forward", q=2, seed=15)
    losses = method.step(closure)
    seed = reference.read_row(method.control, 0).mask_seed
    trained = torch.cat(
        [reference.random_bits(seed, KEYS[n], 3, torch.arange(math.prod(s))) < keep for n, s in SHAPES.items()]
    )
    z = [trained * z_k for z_k in directions(15, 1, 2, "normal")]
    for seen, z_k in zip(tangents_seen, z, strict=True):
        torch.testing.assert_close(seen, z_k, rtol=0, atol=0)
    gradient = start - flat(target)
    loss = gradient @ gradient / 2
    want = torch.stack([loss, gradient @ z[0], loss, gradient @ z[1]])
    torch.testing.assert_close(losses, want, rtol=1e-12, atol=1e-12)
    want = start - LR * sum((gradient @ z_k) / 2 * z_k for z_k in z)
    torch.testing.assert_close(flat(w), want, rtol=0, atol=1e-6)


OUTCOMES = {1.0: [2.0, 1.0, 3.0], -1.0: [2.0, 3.0, 1.0], 0.0: [1.0, 2.0, 3.0]}  # l(w), then of the candidates


@pytest.mark.parametrize("choice", OUTCOMES)
@pytest.mark.parametrize("estimator", ["two-sided", "one-sided"])
@pytest.mark.parametrize(("store", "dtype"), [("inplace", torch.bfloat16), ("snapshot", torch.float32)])
def test_conservative_step_ends_on_the_best_point(store, dtype, estimator, choice):
    """Rademacher directions of a multiple of the quantum, so that in place the probes come back exactly in bfloat16."""
    here, down, up = OUTCOMES[choice]
    q = 2
    probes = [4.0, 3.0, 1.0, 2.0] if estimator == "two-sided" else [0.5, 1.75]
    differences = [1.0, -1.0] if estimator == "two-sided" else [0.5 - here, 1.75 - here]
    eps = 2.0**-6
    c = [d / (q * eps * (2 if estimator == "two-sided" else 1)) for d in differences]
    w = parameters(dtype)
    start, script = flat(w), Script(w, [here, *probes, down, up])
    method = Method(
        w,
        KEYS,
        Row(lr=2.0**-10 / 3, eps=eps),
        estimator=estimator,
        q=q,
        store=store,
        seed=16,
        conservative=True,
        distribution="rademacher",
    )
    losses = method.step(script)
    assert losses.tolist() == ([*probes, here] if estimator == "two-sided" else [here, *probes])
    candidates = [flat(seen) for seen in script.seen[-2:]]
    g = sum(c_k * z_k for c_k, z_k in zip(c, directions(16, 1, q, "rademacher"), strict=True))
    assert torch.equal(flat(script.seen[0]), start)
    for sign, candidate in zip((1, -1), candidates, strict=True):
        quantum_of_candidate = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-22
        assert (candidate - (start - sign * 2.0**-10 / 3 * g)).abs().max() <= quantum_of_candidate
        assert (candidate != start).double().mean() > 0.1
    assert torch.equal(flat(w), {1.0: candidates[0], -1.0: candidates[1], 0.0: start}[choice])
    assert doubles(method.control)[2, 2 * q + 1 : 2 * q + 4].tolist() == [here, down, up]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_accepting_conservative_step_is_the_plain_step(dtype):
    plain, conservative = parameters(dtype), parameters(dtype)
    row = Row(lr=LR, eps=STEP_EPS, weight_decay=0.1)
    a = Method(plain, KEYS, row, store="snapshot", seed=17)
    b = Method(conservative, KEYS, row, store="snapshot", seed=17, conservative=True)
    for _ in range(3):
        a.step(Script(plain, [3.0, 2.0]))
        b.step(Script(conservative, [2.5, 3.0, 2.0, 2.0, 3.0]))
    assert torch.equal(flat(plain), flat(conservative)) and not torch.equal(flat(plain), flat(parameters(dtype)))


METHODS = {  # name -> arguments of Method, forwards
    "ZO-SGD": ({"q": 2}, 4),
    "one-sided": ({"estimator": "one-sided", "q": 2}, 3),
    "FZOO": ({"estimator": "one-sided", "q": 2, "scaling": "std"}, 3),
    "sign": ({"rule": "sign"}, 2),
    "momentum": ({"rule": "momentum"}, 2),
    "Adam": ({"rule": "adam"}, 2),
    "conservative": ({"conservative": True}, 5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_lr_or_with_a_bad_loss_changes_no_weight(method, dtype):
    arguments, forwards = METHODS[method]
    w = {"a": weights(500, dtype, seed=18).view(5, 100), "b": weights(41, dtype, seed=19)}
    start = copy_of(w)
    run = Method(w, KEYS, Row(eps=0.1, beta1=0.9, beta2=0.99, rule_eps=1e-8), store="snapshot", seed=20, **arguments)
    run.step(Script(w, [0.1 * i * i for i in range(forwards)]))
    assert run.control[0, :4].tolist() == [1, 0, 1, 1]
    reference.write_row(run.control, 0, replace(reference.read_row(run.control, 0), lr=0.5))
    states = {name: copy_of(state) for name, state in run.states.items()}
    run.step(Script(w, [math.nan] * forwards))
    assert run.control[0, :4].tolist() == [0, 1, 2, 1] and reference.read_row(run.control, 0).age == 1
    for name in w:
        assert_same_bits(w[name], start[name], name)
        for state, old in states.items():
            assert_same_bits(run.states[state][name], old[name], f"{state} of {name}")
            assert not torch.equal(old[name], torch.zeros_like(old[name]))


def test_rows_of_a_method():
    w = parameters()
    start = copy_of(w)
    method = Method(w, KEYS, [Row(lr=LR, eps=STEP_EPS), Row(eps=2 * STEP_EPS)], row_of={"b": 1}, seed=21)
    script = Script(w, [2.0, 1.0])
    method.step(script)
    for name, eps in (("a", STEP_EPS), ("b", 2 * STEP_EPS)):
        z = reference.noise(w[name].numel(), seed=reference.direction_seed(21, 1, 0), key=KEYS[name])
        seen = (script.seen[0][name] - start[name]).reshape(-1)
        torch.testing.assert_close(seen, eps * z, rtol=0, atol=1e-6)
    assert (w["a"] - start["a"]).abs().max() > 1e-2
    assert (w["b"] - start["b"]).abs().max() < 1e-6  # lr 0; in place, so the way back rounds
