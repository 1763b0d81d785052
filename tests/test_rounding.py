"""Rounding to storage by the operators: every 16-bit code, unbiased stochastic rounding, zero updates."""

import math

import pytest
import torch
from bits import assert_same_bits, bits, weights

import pyzo
from pyzo import reference

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def make_control(*, lr: float = 0.0, eps: float = 0.0, coefficient: float = 1.0, draw: int = 1) -> torch.Tensor:
    """One direction, one row."""
    control = torch.zeros(4, 10, dtype=torch.int64)
    control[0, 2] = draw - 1
    control.view(torch.float64)[3, :4] = torch.tensor([lr, eps, 0.0, coefficient], dtype=torch.float64)
    torch.ops.pyzo.begin_step_(control)
    return control


def every_code(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def run(w: torch.Tensor, control: torch.Tensor, *step: object) -> torch.Tensor:
    out = torch.empty_like(w)
    torch.ops.pyzo.pass_([w], [out], torch.tensor([[3, 0, 0, 0, 0]]), control.to(w.device), *step)
    return out


@dtypes
def test_every_code_survives_what_does_not_move_it(dtype, device, isa):
    w = every_code(dtype).to(device)
    for step in ((0, 0, 1.0, 1, 0, 1.0, True), (1, 0, 1.0, 1, 0, 1.0, False), (0, -1, 0.0, 0, -1, 0.0, False)):
        assert_same_bits(run(w, make_control(), *step), w, f"{isa} {step}")


@dtypes
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("size", [2.0**-26, 1e-3, 1.0, 1e4])
def test_every_code_moves_as_the_reference_says(dtype, stochastic, size, isa):
    w = every_code(dtype)
    control = make_control(lr=size, eps=size)
    want = w.clone()
    step = (0, 0, 1.0, 1, 0, -1.0, stochastic)
    reference.pass_([w], [want], torch.tensor([[3, 0, 0, 0, 0]]), control, *step)
    assert_same_bits(run(w, control, *step), want, isa)


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
    got = run(start, control, 1, -1, 0.0, 1, -1, 0.0, True).cpu()
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
            control.view(torch.float64)[3, 3] = sign * quantum / 64
            w = run(w, control, 1, -1, 0.0, 1, -1, 0.0, stochastic)
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
    step = (1, -1, 0.0, 1, -1, 0.0, True)
    first, again, later = (run(w, make_control(lr=1e-3, draw=draw), *step) for draw in (1, 1, 2))
    assert_same_bits(first, again)
    assert (bits(first) != bits(later)).sum() > 100


def test_float32_is_rounded_to_nearest_whatever_is_asked(device):
    w = weights(4096, torch.float32, seed=2).to(device)
    results = [run(w, make_control(lr=1e-3), 0, -1, 0.0, 1, -1, 0.0, stochastic) for stochastic in (False, True)]
    assert_same_bits(*results)


@dtypes
def test_overflow_becomes_infinite(dtype, device):
    """Less than half a quantum beyond the largest value nearest stays, by more it overflows; stochastic does either."""
    top = torch.finfo(dtype).max
    quantum = top - torch.nextafter(torch.tensor(top, dtype=dtype), torch.tensor(0.0, dtype=dtype)).item()
    w = torch.full((4096,), top, dtype=dtype, device=device)
    for share, infinite in ((0.25, False), (0.75, True)):
        got = run(w, make_control(lr=1.0, coefficient=-share * quantum), 1, -1, 0.0, 1, -1, 0.0, False).cpu().float()
        up = pyzo.noise(4096, seed=make_control()[1, 0].item() % 2**64, key=3, distribution="rademacher") > 0
        assert torch.isinf(got[up]).all() == infinite and torch.isfinite(got[~up]).all()
    got = run(w, make_control(lr=1.0, coefficient=-0.5 * quantum), 1, -1, 0.0, 1, -1, 0.0, True).cpu().float()
    beyond = torch.isinf(got[up]).sum().item()
    assert abs(beyond - up.sum().item() / 2) <= 5 * math.sqrt(up.sum().item()) / 2
