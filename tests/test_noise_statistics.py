"""Statistics of the noise field at fixed seeds; bounds are 5 standard deviations under the ideal law."""

import math

import pytest
import torch

import pyzo
from pyzo import ops

N = 1 << 22
FIELDS = [(0, 0), (1, 2), (2**64 - 1, 2**56 - 1)]  # seed, key
fields = pytest.mark.parametrize(("seed", "key"), FIELDS)
MOMENTS = {1: 0, 2: 1, 3: 0, 4: 3, 5: 0, 6: 15}
EVEN_MOMENTS = {2: 1, 4: 3, 6: 15, 8: 105, 10: 945, 12: 10395}


def normal(seed: int, key: int, n: int = N, offset: int = 0) -> torch.Tensor:
    return pyzo.noise(n, seed=seed, key=key, offset=offset).double()


def signs(seed: int, key: int, n: int = N) -> torch.Tensor:
    return pyzo.noise(n, seed=seed, key=key, distribution="rademacher").double()


def rounding_words(seed: int, key: int, blocks: int) -> torch.Tensor:
    """The words behind the bits of stochastic rounding: int32 [blocks, 4]."""
    out = torch.empty(blocks, 4, dtype=torch.int32)
    torch.ops.pyzo.philox_(out, ops.signed(seed), ops.signed(key << 8 | 2), 0)
    return out


def deviations(values: torch.Tensor, mean: float, variance: float) -> float:
    """Distance of the average from `mean`, in standard deviations of an average of independent values."""
    return abs(values.mean().item() - mean) / math.sqrt(variance / values.numel())


def moment_deviations(z: torch.Tensor) -> list[float]:
    return [deviations(z**k, m, EVEN_MOMENTS[2 * k] - m * m) for k, m in MOMENTS.items()]


def chi_square_deviations(counts: torch.Tensor) -> float:
    """Distance of Pearson's statistic of equally likely bins from its mean, in its standard deviations."""
    expected = counts.sum().item() / counts.numel()
    freedom = counts.numel() - 1
    return abs(((counts.double() - expected) ** 2).sum().item() / expected - freedom) / math.sqrt(2 * freedom)


@fields
def test_moments_to_sixth_order(seed, key):
    assert max(moment_deviations(normal(seed, key))) <= 5


def test_moments_far_out_in_a_large_tensor():
    assert max(moment_deviations(normal(1, 2, offset=2**40))) <= 5


def test_moments_would_see_a_scale_off_by_a_percent_and_a_shift():
    z = normal(1, 2)
    assert max(moment_deviations(1.01 * z)) > 5
    assert max(moment_deviations(z + 0.01)) > 5


@fields
def test_normals_fall_into_equally_likely_bins(seed, key):
    bins = 512
    place = (0.5 * torch.special.erfc(-normal(seed, key) / math.sqrt(2)) * bins).long().clamp(max=bins - 1)
    assert chi_square_deviations(torch.bincount(place, minlength=bins)) <= 5


@fields
@pytest.mark.parametrize("sigma", [3, 4])
@pytest.mark.parametrize("side", [-1, 1])
def test_tail_mass(seed, key, sigma, side):
    p = math.erfc(sigma / math.sqrt(2)) / 2
    beyond = (side * normal(seed, key) > sigma).double()
    assert deviations(beyond, p, p * (1 - p)) <= 5


@fields
def test_each_element_of_a_block_is_normal(seed, key):
    for z in normal(seed, key).view(-1, 4).unbind(1):
        assert max(moment_deviations(z)) <= 5


@pytest.mark.parametrize("draw", [normal, signs])
@pytest.mark.parametrize("lag", range(1, 9))
def test_neighbouring_elements_are_uncorrelated(draw, lag):
    z = draw(1, 2)
    a, b = z[:-lag], z[lag:]
    assert deviations(a * b, 0.0, 1.0) <= 5
    if draw is normal:  # Box-Muller pairs share their radius
        assert deviations((a * a - 1) * (b * b - 1), 0.0, 4.0) <= 5


OTHERS = {
    "next seed": (8, 100),
    "seed, bit 32": (7 + 2**32, 100),
    "seed, bit 63": (7 + 2**63, 100),
    "next key": (7, 101),
    "key, bit 31": (7, 100 + 2**31),
    "key, bit 55": (7, 100 + 2**55),
}


@pytest.mark.parametrize("draw", [normal, signs])
@pytest.mark.parametrize("other", OTHERS)
def test_neighbouring_seeds_and_keys_are_uncorrelated(draw, other):
    a, b = draw(7, 100), draw(*OTHERS[other])
    assert deviations(a * b, 0.0, 1.0) <= 5
    assert deviations(a[1:] * b[:-1], 0.0, 1.0) <= 5
    if draw is normal:
        assert deviations((a * a - 1) * (b * b - 1), 0.0, 4.0) <= 5


def test_directions_of_one_step_and_steps_of_one_direction_are_uncorrelated():
    def seeds(step: int) -> list[int]:
        control = ops.control(2, 1)
        control[0, 2] = step - 1
        torch.ops.pyzo.begin_step_(control)
        return [*control[1, :2].tolist(), control[0, 5].item()]

    first, second = seeds(1), seeds(2)
    z = [normal(seed % 2**64, 1) for seed in (first[0], first[1], second[0], first[2])]
    for i in range(len(z)):
        for j in range(i):
            assert deviations(z[i] * z[j], 0.0, 1.0) <= 5


def test_streams_are_uncorrelated():
    z, s = normal(3, 4), signs(3, 4)
    halves = rounding_words(3, 4, N // 8).view(torch.int16).double().view(-1)
    halves = halves / math.sqrt((2.0**32 - 1) / 12)  # variance 1, mean -1/2 code
    assert deviations(z * s, 0.0, 1.0) <= 5
    assert deviations(z * halves, 0.0, 1.0) <= 5
    assert deviations(s * halves, 0.0, 1.0) <= 5
    assert deviations((z * z - 1) * s, 0.0, 2.0) <= 5


@fields
def test_rounding_bits_are_uniform(seed, key):
    words = rounding_words(seed, key, N // 8)
    halves = words.view(torch.int16).view(-1).int() & 0xFFFF
    assert chi_square_deviations(torch.bincount(halves, minlength=1 << 16)) <= 5
    for bit in range(16):
        assert deviations((halves >> bit & 1).double(), 0.5, 0.25) <= 5
    neighbours = (halves[:-1] & 0xFF) << 8 | halves[1:] & 0xFF
    assert chi_square_deviations(torch.bincount(neighbours[::2], minlength=1 << 16)) <= 5


@fields
def test_signs_are_balanced(seed, key):
    s = signs(seed, key)
    assert torch.equal(s.abs(), torch.ones_like(s))
    assert deviations(s, 0.0, 1.0) <= 5


@fields
def test_signs_are_balanced_and_uncorrelated_at_every_bit_of_a_block(seed, key):
    s = signs(seed, key).view(-1, 128)
    blocks = len(s)
    assert s.mean(0).abs().max().item() <= 5 / math.sqrt(blocks)
    correlation = s.T @ s / blocks - torch.eye(128, dtype=torch.float64)
    assert correlation.abs().max().item() <= 5 / math.sqrt(blocks)
    following = s[:-1].T @ s[1:] / (blocks - 1)  # with the bits of the next block
    assert following.abs().max().item() <= 5 / math.sqrt(blocks - 1)
