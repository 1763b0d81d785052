"""The operators that write the control tensor, begin_step_, estimate_ and choose_, against the reference in every word,
and against what their numbers mean."""

import decimal
import itertools
import math
import random

import pytest
import torch

from pyzo import control as layout
from pyzo import ops, reference
from pyzo.reference import Row

FLOATS = [*range(layout.BORN), layout.CORRECTION1, layout.CORRECTION2, layout.THRESHOLD]
NAN, INF = math.nan, math.inf
# Every kind and scaling that estimate_ takes, with every number of directions that it can be.
ESTIMATES = [
    (kind, scaling, q)
    for kind, scaling, q in itertools.product(range(3), range(3), (1, 2, 3, 5))
    if reference.SCALINGS[scaling] != "std" or (reference.ESTIMATORS[kind] == "one-sided" and q > 1)
]
DIRECTIONS = 5


def assert_same_words(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal words, but that a double may be any NaN where NaN is wanted."""
    got = got.cpu()
    floats = torch.zeros_like(want, dtype=torch.bool)
    floats[0, layout.CHOICE] = floats[2] = True
    floats[layout.LINES :, FLOATS] = floats[layout.LINES :, layout.COEFFICIENTS :] = True
    nan = floats & torch.isnan(want.view(torch.float64)) & torch.isnan(got.view(torch.float64))
    different = ((got != want) & ~nan).nonzero()
    assert not len(different), f"line and word {different[0].tolist()} of {len(different)}"


def some_row(rng: random.Random) -> Row:
    return Row(
        lr=rng.random(),
        eps=rng.choice([0.0, 1e-3, 1.0, rng.random(), 1e-300]),
        weight_decay=rng.random(),
        beta1=rng.choice([0.0, 0.9, rng.random()]),
        beta2=rng.choice([0.0, 0.999, rng.random()]),
        born=rng.randrange(100),
        age=rng.randrange(100),
        correction1=rng.random(),
        correction2=rng.random(),
        keep=rng.randrange(65537),
        refresh=rng.choice([0, 1, 2, 7, 2**62]),
        mask_seed=rng.getrandbits(64),
        threshold=rng.choice([INF, 0.0, rng.random()]),
    )


def some_control(rng: random.Random, *, directions: int = DIRECTIONS, rows: int = 3) -> torch.Tensor:
    """A control tensor in the middle of a run, with something in every word."""
    control = torch.tensor(
        [[rng.getrandbits(63) for _ in range(16 + 2 * directions)] for _ in range(layout.LINES + rows)]
    )
    for r in range(rows):
        reference.write_row(control, r, some_row(rng))
    control[0, layout.DRAW] = rng.choice([0, 1, 6, rng.getrandbits(62)])
    control[0, layout.APPLIED] = rng.randrange(100, 10**6)
    control[0, layout.RUN_SEED] = ops.signed(rng.getrandbits(64))
    return control


def some_loss(rng: random.Random) -> float:
    return rng.choice([1.0, 0.0, -0.0, rng.gauss(0, 1), rng.gauss(0, 1) * 2.0 ** rng.randrange(-80, 80)])


def test_begin_step(device):
    rng = random.Random(1)
    for _ in range(50):
        control = some_control(rng)
        operated = control.clone().to(device)
        for _ in range(3):
            reference.begin_step_(control)
            torch.ops.pyzo.begin_step_(operated)
            assert_same_words(operated, control)


def test_the_first_direction_moves_the_seeds_of_directions_alone(device):
    """Control tensors of one step with other directions: seeds of their own, the same rounding and masks."""
    whole, part = (reference.new_control(q, [Row(), Row(refresh=3)], 2**64 - 5).to(device) for q in (7, 3))
    part[0, layout.FIRST] = 4
    for _ in range(4):
        for control in (whole, part):
            torch.ops.pyzo.begin_step_(control)
        assert torch.equal(part[1, :3], whole[1, 4:7])
        assert torch.equal(part[0, : layout.FIRST], whole[0, : layout.FIRST])
        assert torch.equal(part[layout.LINES :, layout.MASK_SEED], whole[layout.LINES :, layout.MASK_SEED])
    assert part[0, layout.FIRST] == 4


@pytest.mark.parametrize(("kind", "scaling", "q"), ESTIMATES)
def test_estimate(kind, scaling, q, device):
    """Losses of many sizes, some not finite, some without spread, and further ones that are only watched."""
    rng = random.Random(100 * kind + 10 * scaling + q)
    needed = 1 + q if reference.ESTIMATORS[kind] == "one-sided" else 2 * q
    outcomes = []
    for trial in range(60):
        control = some_control(rng)
        operated = control.clone().to(device)
        losses = [some_loss(rng) for _ in range(needed + rng.randrange(2 * DIRECTIONS + 2 - needed))]
        if trial % 4 == 1:
            losses[rng.randrange(len(losses))] = rng.choice([NAN, INF, -INF, 1e39, 1e308, -1e308])
        elif trial % 4 == 2:
            losses = [losses[0]] * len(losses)
        elif trial % 4 == 3:
            losses = [1e8 + rng.gauss(0, 1) for _ in losses]  # the rounding of the mean shows in the deviation
        values = torch.tensor(losses, dtype=torch.float64)
        reference.estimate_(control, values, kind, q, scaling)
        torch.ops.pyzo.estimate_(operated, values.to(device), kind, q, scaling)
        assert_same_words(operated, control)
        outcomes.append(int(control[0, layout.OK]))
    assert 0 < sum(outcomes) < len(outcomes)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(("kind", "scaling", "q"), ESTIMATES)
def test_a_loss_that_is_not_finite_skips_wherever_it_stands(kind, scaling, q, bad, device):
    needed = 1 + q if reference.ESTIMATORS[kind] == "one-sided" else 2 * q
    row = Row(eps=0.5, beta1=0.5, beta2=0.5, born=3, age=4, correction1=5.0, correction2=6.0)
    for place, further in itertools.product(range(needed + 1), (0, 1)):
        if place >= needed + further:
            continue
        control = reference.new_control(DIRECTIONS, [row], 1)
        control[0, :4] = torch.tensor([1, 10, 20, 30])
        values = torch.arange(needed + further, dtype=torch.float64)
        values[place] = bad
        operated = control.to(device)
        torch.ops.pyzo.estimate_(operated, values.to(device), kind, q, scaling)
        assert operated[0, :4].tolist() == [0, 11, 20, 30]
        assert reference.read_row(operated.cpu(), 0) == row  # its age and corrections too


def test_a_coefficient_beyond_float32_skips_in_any_row(device):
    """3.4e38 is the largest float32; float64 goes on to 1.8e308."""
    largest = torch.finfo(torch.float32).max
    for last, ok in ((largest, 1), (largest * (1 + 2.0**-26), 1), (largest * (1 + 2.0**-24), 0), (1e300, 0)):
        control = reference.new_control(1, [Row(eps=1.0), Row(eps=0.5)], 1).to(device)
        torch.ops.pyzo.estimate_(control, torch.tensor([last, 0.0], dtype=torch.float64, device=device), 0, 1, 0)
        assert control[0, :4].tolist() == [ok, 1 - ok, 0, ok]


@pytest.mark.parametrize("q", [2, 3, 5])
def test_losses_without_spread_have_no_standard_deviation(q, device):
    for here in (1.0, 2.0):  # 0 / 0 and a number over 0
        control = reference.new_control(q, [Row(eps=1.0)], 1).to(device)
        losses = torch.tensor([here] + [1.0] * q, dtype=torch.float64, device=device)
        torch.ops.pyzo.estimate_(control, losses, 1, q, 1)
        assert control[0, :4].tolist() == [0, 1, 0, 0]


def test_standardised_coefficients_do_not_know_the_unit_of_the_loss(device):
    """(l_k - l_0) / (q sigma): twice the loss, and any other origin, give the same; to rounding of the mean."""
    losses = torch.tensor([1.5, 2.0, 4.0, 3.0], dtype=torch.float64)
    found = []
    for scale, shift in ((1.0, 0.0), (2.0**20, 0.0), (1.0, 8.0)):
        control = reference.new_control(3, [Row(eps=1e-3)], 1).to(device)
        torch.ops.pyzo.estimate_(control, (losses * scale + shift).to(device), 1, 3, 1)
        found.append(control.cpu().view(torch.float64)[layout.LINES, layout.COEFFICIENTS :][:3])
    sigma = losses[1:].std(unbiased=True)
    for coefficients in found:
        torch.testing.assert_close(coefficients, (losses[1:] - losses[0]) / (3 * sigma), rtol=1e-14, atol=0)


def test_corrections_over_a_long_run(device):
    """1 - beta^age for rows born at different times; skips do not age."""
    rows = [Row(eps=1.0, beta1=0.9, beta2=0.999), Row(eps=1.0, beta1=0.0, beta2=1 - 1e-9, born=17)]
    control = reference.new_control(1, rows, 1).to(device)
    good, bad = (torch.tensor(v, dtype=torch.float64, device=device) for v in ([1.0, 0.5], [1.0, NAN]))
    for applied in (1, 18, 19, 1000, 10**6):
        control[0, layout.APPLIED] = applied - 1
        for losses in (bad, good, bad):
            torch.ops.pyzo.estimate_(control, losses, 0, 1, 0)
        for r, row in enumerate(rows):
            got = reference.read_row(control.cpu(), r)
            age = applied - row.born
            if age < 1:
                continue
            assert got.age == age
            for beta, correction in ((row.beta1, got.correction1), (row.beta2, got.correction2)):
                with decimal.localcontext(prec=60):
                    power = decimal.Decimal(beta) ** age
                    error = abs(decimal.Decimal(correction) - (1 - power))
                # Squaring doubles a relative error: beta^age is within age half ulps. Then 1 - beta^age is rounded.
                assert error <= age * 2.0**-53 * float(power) * 1.01 + 2.0**-53
    assert control[0, :4].tolist() == [0, 10, 0, 10**6]


def test_choose(device):
    """The least finite loss wins; among equal ones w - lr g, then w, then w + lr g. Nothing else is written."""
    rng = random.Random(2)
    for stay, down, up, ok in itertools.product(*[(-INF, -1.0, 1.0, 2.0, INF, NAN)] * 3, (0, 1)):
        control = some_control(rng, rows=1)
        control[0, layout.OK] = ok
        operated = control.clone().to(device)
        losses = torch.tensor([stay, down, up], dtype=torch.float64)
        reference.choose_(control, losses)
        torch.ops.pyzo.choose_(operated, losses.to(device))
        assert_same_words(operated, control)
        points = [(loss, place, choice) for place, (loss, choice) in enumerate(((down, 1.0), (stay, 0.0), (up, -1.0)))]
        best = min(point for point in points if math.isfinite(point[0])) if ok and math.isfinite(stay) else (0, 0, 0.0)
        assert operated.cpu().view(torch.float64)[0, layout.CHOICE] == best[2], (stay, down, up, ok)


def test_rows_of_the_host_are_those_of_the_specification(device):
    """`Control.write_rows` and the reference agree about every word."""
    rng = random.Random(3)
    seed = 2**64 - 9
    rows = [some_row(rng) for _ in range(4)]
    control = layout.Control(2, len(rows), torch.device(device), seed)
    names = layout.Row._fields
    control.write_rows([layout.Row(**{name: getattr(row, name) for name in names}) for row in rows])
    want = [Row(**{name: getattr(row, name) for name in names}) for row in rows]
    assert_same_words(control.tensor, reference.new_control(2, want, seed))
    torch.ops.pyzo.begin_step_(control.tensor)
    assert control.read_header() == {"seed": seed, "draw": 1, "applied": 0, "skipped": 0}
    assert control.read_seeds(2) == [reference.direction_seed(seed, 1, k) for k in range(2)]


def test_the_host_reads_what_the_operators_wrote(device):
    control = layout.Control(2, 2, torch.device(device), 5)
    control.write_rows([layout.Row(lr=0.1, eps=0.5), layout.Row(lr=0.1, eps=0.25)])
    ops.begin_step_(control.tensor)
    losses = torch.tensor([1.0, 3.0, 2.0, 1.0, 7.0], dtype=torch.float64)
    candidates = torch.tensor([7.0, 8.0, 6.0], dtype=torch.float64)
    ops.estimate_(control.tensor, losses.to(device), kind=0, q=2, scaling=0)
    ops.choose_(control.tensor, candidates.to(device))
    assert control.read_coefficients(2).tolist() == [[-1.0, 0.5], [-2.0, 1.0]]
    assert torch.equal(control.read_losses(5), losses)
    assert torch.equal(control.read_candidates(), candidates)
    assert control.read_choice() == -1
    assert control.read_skipped() == 0
    before = control.remember()
    ops.estimate_(control.tensor, losses.to(device) * NAN, kind=0, q=2, scaling=0)
    assert control.read_skipped() == 1
    control.recall(before)
    assert torch.equal(control.tensor, before)
