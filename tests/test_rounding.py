"""Rounding to storage by the operators: every 16-bit code, unbiased stochastic rounding of weights and states."""

import math

import pytest
import torch
from bits import assert_same_bits, bits, weights
from sweeps import arguments, run

import pyzo
from pyzo import control as layout
from pyzo import reference

SIGNS = {"distribution": 1, "directions": 1}  # an update along a direction of signs

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def make_control(*, draw: int = 1, coefficient: float = 1.0, **scalars: float) -> torch.Tensor:
    """One direction, one row, of step `draw`."""
    control = reference.new_control(1, [reference.Row(**scalars)], 0)
    control[0, layout.DRAW] = draw - 1
    torch.ops.pyzo.begin_step_(control)
    control.view(torch.float64)[layout.LINES, layout.COEFFICIENTS] = coefficient
    return control


def every_code(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def after(w: torch.Tensor, control: torch.Tensor, **step: object) -> torch.Tensor:
    """What a pass makes of `w`."""
    out = torch.empty_like(w)
    run([out], [[3, 0, 0, 0, 0]], control, src=[w], **step)
    return out


@dtypes
def test_every_code_survives_what_does_not_move_it(dtype, device, isa):
    w = every_code(dtype).to(device)
    everything = {"undo": 0, "undo_sign": 1.0, "directions": 1, "perturb": 0, "perturb_sign": 1.0}
    for step in ({**everything, "stochastic": True}, {**everything, "distribution": 1}, {}):
        assert_same_bits(after(w, make_control(), **step), w, f"{isa} {step}")


@dtypes
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("size", [2.0**-26, 1e-3, 1.0, 1e4])
def test_every_code_moves_as_the_reference_says(dtype, stochastic, size, isa):
    w = every_code(dtype)
    control = make_control(lr=size, eps=size)
    want = w.clone()
    step = {"undo": 0, "undo_sign": 1.0, "directions": 1, "perturb": 0, "perturb_sign": -1.0, "stochastic": stochastic}
    reference.pass_([w], [want], [], [], [], [], torch.tensor([[3, 0, 0, 0, 0]]), control, **arguments(step))
    assert_same_bits(after(w, control, **step), want, isa)


@dtypes
@pytest.mark.parametrize("share", [2.0**-9, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("w", [1.0, -1.5, 2.0**-12, 3 * 2.0**-20])
def test_stochastic_rounding_is_unbiased(dtype, share, w, device):
    """The share of elements that move is the update in quanta, within 5 sigma of a binomial and 2^-16."""
    n = 1 << 18
    start = torch.full((n,), w, dtype=dtype, device=device)
    away = torch.nextafter(start[:1].cpu(), torch.tensor([math.copysign(math.inf, w)], dtype=dtype)).item()
    step = share * (away - w)
    # One direction of signs would move elements both ways; the sign that moves away from zero is looked at.
    control = make_control(lr=1.0, coefficient=-step)
    got = after(start, control, **SIGNS, stochastic=True).cpu()
    outward = pyzo.noise(n, seed=control[1, 0].item() % 2**64, key=3, distribution="rademacher") > 0
    moved = (got[outward] == away).sum().item()
    assert ((got[outward] == w) | (got[outward] == away)).all()
    count = int(outward.sum())
    sigma = math.sqrt(count * share * (1 - share))
    assert abs(moved - count * share) <= 5 * sigma + count * 2.0**-16


@dtypes
def test_stochastic_rounding_does_not_lose_small_updates(dtype, device):
    """Updates of 1/64 of a quantum: nearest never moves, stochastic moves by their sum, within 5 sigma."""
    n, steps = 4096, 256
    quantum = torch.finfo(dtype).eps
    start = torch.ones(n, dtype=dtype, device=device)
    for stochastic in (False, True):
        w = start
        for t in range(steps):
            control = make_control(lr=1.0, draw=t + 1)
            sign = 1.0 if int(control[1, 0]) % 2 else -1.0  # any sign: the mean over elements is what counts
            control.view(torch.float64)[layout.LINES, layout.COEFFICIENTS] = sign * quantum / 64
            w = after(w, control, **SIGNS, stochastic=stochastic)
        moved = (w.cpu().double() - 1) / quantum
        if not stochastic:
            assert not moved.any()
            continue
        # A step moves by one quantum with probability 1/64 (below 1 quanta are half as large: by half with 1/32).
        sigma = math.sqrt(steps / 64 / n)
        assert abs(moved.mean().item()) <= 5 * sigma
        assert 0.5 * steps / 64 <= moved.var().item() <= 2 * steps / 64


@dtypes
def test_rounding_bits_do_not_repeat_the_noise(dtype, device):
    """Two draws, and two tensors, round differently; the same ones round alike."""
    w = weights(4096, dtype, seed=1, special=False).to(device)
    first, again, later = (after(w, make_control(lr=1e-3, draw=draw), **SIGNS, stochastic=True) for draw in (1, 1, 2))
    assert_same_bits(first, again)
    assert (bits(first) != bits(later)).sum() > 100


def test_float32_is_rounded_to_nearest_whatever_is_asked(device):
    w = weights(4096, torch.float32, seed=2).to(device)
    results = [after(w, make_control(lr=1e-3), directions=1, stochastic=stochastic) for stochastic in (False, True)]
    assert_same_bits(*results)


@dtypes
def test_overflow_becomes_infinite(dtype, device):
    """Less than half a quantum beyond the largest value nearest stays, by more it overflows; stochastic does either."""
    top = torch.finfo(dtype).max
    quantum = top - torch.nextafter(torch.tensor(top, dtype=dtype), torch.tensor(0.0, dtype=dtype)).item()
    w = torch.full((4096,), top, dtype=dtype, device=device)
    for share, infinite in ((0.25, False), (0.75, True)):
        got = after(w, make_control(lr=1.0, coefficient=-share * quantum), **SIGNS).cpu().float()
        up = pyzo.noise(4096, seed=make_control()[1, 0].item() % 2**64, key=3, distribution="rademacher") > 0
        assert torch.isinf(got[up]).all() == infinite and torch.isfinite(got[~up]).all()
    got = after(w, make_control(lr=1.0, coefficient=-0.5 * quantum), **SIGNS, stochastic=True).cpu().float()
    beyond = torch.isinf(got[up]).sum().item()
    assert abs(beyond - up.sum().item() / 2) <= 5 * math.sqrt(up.sum().item()) / 2


@pytest.mark.parametrize("share", [2.0**-9, 0.25, 0.5, 0.9])
def test_stochastic_rounding_of_states_is_unbiased_and_apart_from_the_weight_s(share, device):
    """Weight, m and v are moved up one quantum each with probability `share`: alone, and in pairs with its square."""
    n = 1 << 18
    eps = torch.finfo(torch.bfloat16).eps
    w, m, v = (torch.ones(n, dtype=torch.bfloat16, device=device) for _ in range(3))
    # With these betas the next m and v are both 1 + share eps, as is w - lr m / sqrt(v) nearly.
    g = 1 + 2 * share * eps
    scalars = {"beta1": 0.5, "beta2": 1 - share * eps / (g * g - 1), "correction1": 1.0, "correction2": 1.0}
    control = make_control(lr=-share * eps, coefficient=g, **scalars)
    step = {"rule": "adam", "directions": 1, "distribution": 1, "stochastic": True}
    run([w], [[3, 0, 0, 0, 0]], control, state=[m, v], **step)
    up = pyzo.noise(n, seed=control[1, 0].item() % 2**64, key=3, distribution="rademacher") > 0
    rounded_up = [(t.cpu() > 1)[up] for t in (w, m, v)]
    count = int(up.sum())
    for a in range(3):
        for b in range(a, 3):
            p = share if a == b else share * share
            got = (rounded_up[a] & rounded_up[b]).sum().item()
            # m / sqrt(v) is 1 to within eps, and shares have 16 bits: the probabilities are off by 2^-6 of themselves.
            assert abs(got - count * p) <= 5 * math.sqrt(count * p * (1 - p)) + count * (p * 2.0**-6 + 2.0**-16), (a, b)
