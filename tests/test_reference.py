"""The specification itself: its arithmetic against rational arithmetic, its noise against the ideal, its estimate."""

import math
import random
from fractions import Fraction

import pytest
import torch
from bits import assert_same_bits

from pyzo import reference

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
    words = reference.field_words(5, 6, 2, index[:128])
    halves = [words[i // 8, i % 8 // 2].item() >> 16 * (i % 2) & 0xFFFF for i in index.tolist()]
    assert reference.rounding_bits(5, 6, index).tolist() == halves


def test_global_index_of_a_rectangle():
    whole = torch.arange(12 * 20).view(12, 20)
    assert torch.equal(reference.global_index(12 * 7, base=5, inner=7, stride=20), whole[:, 5:12].reshape(-1))
    assert torch.equal(reference.global_index(40, base=60), whole[3:5].reshape(-1))


def test_direction_seeds_are_distinct():
    seeds = {reference.direction_seed(1, step, k) for step in range(200) for k in (*range(50), 2**64 - 1)}
    assert len(seeds) == 200 * 51


@pytest.mark.parametrize(
    ("losses", "eps", "ok"),
    [
        ([1.0, 0.5, 2.0, 3.0], 1e-3, True),
        ([1.0, math.nan, 2.0, 3.0], 1e-3, False),
        ([1.0, 0.5, math.inf, 3.0], 1e-3, False),
        ([1e300, -1e300, 2.0, 3.0], 1e-3, False),  # finite losses, a coefficient beyond float32
        ([1.0, 0.5, 2.0, 3.0], 0.0, False),
    ],
)
def test_estimate_two_sided(losses, eps, ok, device):
    def make() -> torch.Tensor:
        control = torch.zeros(5, 12, dtype=torch.int64)
        control.view(torch.float64)[3:, 1] = torch.tensor([eps, 2 * eps], dtype=torch.float64)
        control[0, 1:4] = torch.tensor([7, 8, 9])
        return control

    values = torch.tensor(losses, dtype=torch.float64)
    want, got = make(), make().to(device)
    reference.estimate_two_sided_(want, values)
    torch.ops.pyzo.estimate_two_sided_(got, values.to(device))
    doubles, wanted = got.cpu().view(torch.float64), want.view(torch.float64)
    assert torch.equal(got[:2].cpu(), want[:2])
    torch.testing.assert_close(doubles[2:], wanted[2:], rtol=0, atol=0, equal_nan=True)
    assert want[0, :4].tolist() == [int(ok), 7 + (not ok), 8, 9 + ok]
    if ok:
        assert doubles[3, 3:5].tolist() == [(1.0 - 0.5) / (2 * eps * 2), (2.0 - 3.0) / (2 * eps * 2)]
        assert doubles[4, 3:5].tolist() == [(1.0 - 0.5) / (2 * (2 * eps) * 2), (2.0 - 3.0) / (2 * (2 * eps) * 2)]
