"""`pyzo.masks.Random`: its resolution, what it refuses, and the bits it is drawn from, through an optimizer."""

import pytest
import torch
from torch import nn

import pyzo
from pyzo import reference
from pyzo.masks import Random
from pyzo.optim import ZOSGD

KEY = pyzo.tensor_key("w")


@pytest.mark.parametrize(
    ("sparsity", "keep"),
    [(0.0, 65536), (0, 65536), (0.5, 32768), (0.1, 58982), (2.0**-16, 65535), (1 - 2.0**-16, 1), (0.9, 6554)],
)
def test_sparsity_is_heeded_to_16_bits(sparsity, keep):
    assert Random(sparsity).keep == keep
    assert abs(keep / 65536 - (1 - sparsity)) <= 2.0**-17


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1 - 2.0**-18, 1.5, float("nan"), float("inf"), "0.5", None, True])
def test_bad_sparsities(sparsity):
    with pytest.raises(ValueError, match="sparsity: expected a number in"):
        Random(sparsity)


@pytest.mark.parametrize("refresh", [0, -1, 1.5, True, "2", None])
def test_bad_refreshes(refresh):
    with pytest.raises(ValueError, match="refresh: expected an integer >= 1, got"):
        Random(0.5, refresh)


def test_masks_are_values():
    assert Random(0.5, refresh=2) == Random(0.5, 2)
    assert hash(Random(0.5)) == hash(Random(0.5))
    with pytest.raises(AttributeError):
        Random(0.5).sparsity = 0.1


@pytest.mark.parametrize("refresh", [1, 3])
def test_elements_move_where_the_mask_stream_is_below_the_threshold(refresh):
    """The mask of step t is that of step 1 + (t - 1) // refresh * refresh, a function of run seed, name and index."""
    n, seed, mask = 5000, 11, Random(0.3, refresh)
    w = nn.Parameter(torch.zeros(n))
    opt = ZOSGD([("w", w)], lr=1.0, eps=1.0, seed=seed, mask=mask, distribution="rademacher", store="snapshot")
    for step in range(1, 8):
        with torch.no_grad():
            w.zero_()
        losses = iter([1.0, 0.0])
        opt.step(lambda losses=losses: next(losses))
        drawn = reference.direction_seed(seed, 1 + (step - 1) // refresh, reference.MASK_DIRECTION)
        bits = reference.random_bits(drawn, KEY, reference.MASK_STREAM, torch.arange(n))
        assert torch.equal(w.detach() != 0, bits < mask.keep), step


def test_what_moves_moves_as_without_a_mask():
    """Bit for bit: a mask takes elements out, it does not scale the others."""
    ends = []
    for mask in (None, Random(0.5)):
        w = nn.Parameter(torch.linspace(-1, 1, 3000))
        opt = ZOSGD([("w", w)], lr=0.1, eps=0.1, mask=mask, store="snapshot")
        losses = iter([1.0, 0.0])
        opt.step(lambda losses=losses: next(losses))
        ends.append(w.detach())
    start = torch.linspace(-1, 1, 3000)
    there = ends[1] != start
    assert 1300 < there.sum() < 1700
    assert torch.equal(ends[1][there], ends[0][there])


def test_a_mask_may_be_set_changed_and_removed_between_steps():
    w = nn.Parameter(torch.zeros(4000))
    opt = ZOSGD([("w", w)], lr=1.0, eps=1.0, distribution="rademacher", store="snapshot")
    shares = []
    for mask in (None, Random(0.25), Random(0.75), None):
        with torch.no_grad():
            w.zero_()
        opt.param_groups[0]["mask"] = mask
        losses = iter([1.0, 0.0])
        opt.step(lambda losses=losses: next(losses))
        shares.append((w != 0).double().mean().item())
    assert (shares[0], shares[3]) == (1.0, 1.0)
    for share, kept in zip(shares[1:3], (0.75, 0.25), strict=True):
        assert abs(share - kept) < 5 * (0.75 * 0.25 / 4000) ** 0.5
