"""pyzo._host, the noise field on NumPy arrays: known answers, shapes, shards and errors."""

import math

import golden
import numpy as np
import pytest

from pyzo import _host

# Random123, tests/kat_vectors, philox4x32: rounds, counter, key, answer.
KNOWN_ANSWERS = """
7 00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48
7 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662
7 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""
SEED, KEY = 0x9E3779B97F4A7C15, 0x00C0FFEE12345678 & ((1 << 56) - 1)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
DISTRIBUTIONS = ("normal", "rademacher")


def noise(n, **options):
    return _host.noise(n, **{"seed": SEED, "key": KEY, **options})


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("line", KNOWN_ANSWERS.split("\n")[1:-1])
def test_philox_gives_the_known_answers_of_random123(line):
    rounds, *words = line.split()
    c0, c1, c2, c3, k0, k1, *answer = (int(word, 16) for word in words)
    got = _host.philox(k1 << 32 | k0, c3 << 32 | c2, c1 << 32 | c0, 1, rounds=int(rounds))
    assert got.dtype == np.uint32
    assert got.tolist() == [answer]


def test_philox_counts_blocks_and_wraps_at_two_to_the_64():
    words = _host.philox(SEED, 5, 2**64 - 2, 4)
    assert words.shape == (4, 4)
    for row, block in zip(words, (2**64 - 2, 2**64 - 1, 0, 1), strict=True):
        assert same_bits(row, _host.philox(SEED, 5, block, 1)[0])
    assert _host.philox(SEED, 5, 0, 0).shape == (0, 4)


def test_direction_seeds_differ_by_run_step_and_direction():
    grid = [(run, t, k) for run in (0, 1, 2**64 - 1) for t in range(10) for k in range(10)]
    seeds = [_host.direction_seed(*place) for place in grid]
    assert all(isinstance(seed, int) and 0 <= seed < 2**64 for seed in seeds)
    assert len(set(seeds)) == len(grid)


def test_noise_is_made_of_the_philox_words():
    """Element i of a Rademacher field is the sign of bit i % 128 of the counter (key << 8 | stream 1, i // 128)."""
    words = _host.philox(SEED, KEY << 8 | 1, 0, 3)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:300]
    assert np.array_equal(noise(300, distribution="rademacher"), 1.0 - 2.0 * bits)


def test_normal_noise_is_box_muller_of_the_philox_words():
    words = _host.philox(SEED, KEY << 8, 0, 256).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((words[:, 0::2] + 0.5) / 2.0**32))
    got = noise(1024).reshape(256, 2, 2).astype(np.float64)
    assert np.abs(np.hypot(got[:, :, 0], got[:, :, 1]) - radius).max() <= 2e-5


@pytest.mark.parametrize("body", _host.isas())
@pytest.mark.parametrize("field", golden.noise_lines(), ids=str)
def test_golden_noise(field, body):
    rectangle = {"inner": field.inner, "stride": field.stride} if field.inner else {}
    got = _host.noise(
        field.n,
        seed=field.seed,
        key=field.key,
        offset=field.base,
        distribution=field.distribution,
        dtype=field.dtype,
        isa=body,
        **rectangle,
    )
    assert golden.hash_of(got) == field.hash


def test_golden_direction_seeds():
    lines = golden.seed_lines()
    assert lines
    for run, step, direction, seed in lines:
        assert _host.direction_seed(run, step, direction) == seed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("body", _host.isas())
def test_every_instruction_set_gives_the_same_bits(body, distribution, dtype):
    for n in (0, 1, 3, 4, 5, 63, 64, 65, 1023, 1024, 1025, 5000):
        best = noise(n, distribution=distribution, dtype=dtype)
        assert best.shape == (n,) and best.dtype == DTYPES[dtype]
        assert same_bits(best, noise(n, distribution=distribution, dtype=dtype, isa=body))


def test_selecting_an_instruction_set_changes_no_bit():
    before = noise(1000)
    try:
        for isa in _host.isas():
            _host.select_isa(isa)
            assert same_bits(before, noise(1000))
    finally:
        _host.select_isa("")


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_16_bit_noise_is_float32_noise_rounded_to_nearest(distribution):
    z = noise(4096, distribution=distribution)
    assert same_bits(noise(4096, distribution=distribution, dtype="float16"), z.astype(np.float16))
    u = z.view(np.uint32)
    bfloat16 = ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)
    assert same_bits(noise(4096, distribution=distribution, dtype="bfloat16"), bfloat16)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("first", [0, 1, 1022, 2**31 - 3, 2**32 - 5, 2**63 - 40])
def test_a_run_is_part_of_the_field(first, distribution):
    """Also beyond 32-bit indices, and up to the last index there is."""
    whole = noise(40, offset=first, distribution=distribution)
    for begin, n in ((0, 40), (1, 7), (13, 27)):
        assert same_bits(noise(n, offset=first + begin, distribution=distribution), whole[begin : begin + n])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_row_and_column_shards_are_parts_of_the_field(distribution):
    rows, columns = 37, 101
    whole = noise(rows * columns, distribution=distribution).reshape(rows, columns)
    row = noise(5 * columns, offset=11 * columns, distribution=distribution)
    assert same_bits(row, whole[11:16].ravel())
    for first, width in ((0, 1), (3, 64), (90, 11)):
        shard = noise(rows * width, offset=first, inner=width, stride=columns, distribution=distribution)
        assert same_bits(shard, whole[:, first : first + width].ravel())


def test_moments_lie_within_five_standard_errors():
    n = 1 << 20
    z = noise(n).astype(np.float64)
    assert abs(z.mean()) <= 5 / math.sqrt(n)
    assert abs((z * z).mean() - 1) <= 5 * math.sqrt(2 / n)  # Var z^2 = 2
    assert abs((z**4).mean() - 3) <= 5 * math.sqrt(96 / n)  # Var z^4 = 105 - 9
    sign = noise(n, distribution="rademacher").astype(np.float64)
    assert set(np.unique(sign)) == {-1.0, 1.0}
    assert abs(sign.mean()) <= 5 / math.sqrt(n)


def test_seed_key_and_distribution_each_change_the_noise():
    fields = [noise(64), noise(64, seed=SEED ^ 1), noise(64, seed=SEED ^ 1 << 63), noise(64, key=KEY ^ 1)]
    fields += [noise(64, key=KEY ^ 1 << 55), noise(64, distribution="rademacher")]
    assert len({field.tobytes() for field in fields}) == len(fields)


def test_numpy_integers_are_integers():
    assert same_bits(noise(np.int32(9), seed=np.uint64(SEED), key=np.int64(KEY)), noise(9))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"n: expected an integer in \[0, 2\*\*63\), got -1", {"n": -1}),
        (TypeError, r"n: expected an integer in \[0, 2\*\*63\), got 2\.0", {"n": 2.0}),
        (ValueError, r"seed: expected an integer in \[0, 2\*\*64\), got -1", {"seed": -1}),
        (ValueError, r"seed: expected an integer in \[0, 2\*\*64\), got 18446744073709551616", {"seed": 2**64}),
        (TypeError, r"seed: expected an integer in \[0, 2\*\*64\), got 'x'", {"seed": "x"}),
        (ValueError, r"key: expected an integer in \[0, 2\*\*56\), got 72057594037927936", {"key": 2**56}),
        (ValueError, r"offset: expected an integer in \[0, 2\*\*63\), got 9223372036854775808", {"offset": 2**63}),
        (
            ValueError,
            r"offset: expected a shard whose .* 2\*\*63, got 9223372036854775807",
            {"offset": 2**63 - 1},
        ),
        (ValueError, r"inner: expected a value, since the other is given, got None", {"stride": 3}),
        (ValueError, r"stride: expected a value, since the other is given, got None", {"inner": 3}),
        (ValueError, r"inner: expected at least 1, got 0", {"inner": 0, "stride": 3}),
        (ValueError, r"stride: expected at least inner, got 3", {"inner": 4, "stride": 3}),
        (ValueError, r"offset: expected a shard whose", {"inner": 1, "stride": 2**62 + 1, "n": 3}),
        (ValueError, r"distribution: expected 'normal' or 'rademacher', got 'uniform'", {"distribution": "uniform"}),
        (ValueError, r"dtype: expected 'float32', 'bfloat16' or 'float16', got 'float64'", {"dtype": "float64"}),
        (ValueError, r"isa: expected one of this machine's instruction sets '.*base', got 'z80'", {"isa": "z80"}),
    ],
)
def test_errors_name_the_argument_what_was_expected_and_what_came(error, message, options):
    with pytest.raises(error, match=f"^{message}"):
        noise(**{"n": 4, **options})


def test_errors_of_the_other_functions():
    with pytest.raises(ValueError, match=r"^rounds: expected 7 \(the noise field's\) or 10, got 8"):
        _host.philox(0, 0, 0, 1, rounds=8)
    with pytest.raises(ValueError, match=r"^t: expected an integer in \[0, 2\*\*64\), got -1"):
        _host.direction_seed(0, -1, 0)
    with pytest.raises(ValueError, match=r"^name: expected one of this machine's instruction sets '.*', got 'z80'"):
        _host.select_isa("z80")


def test_the_noise_version_is_one():
    assert _host.noise_version == 1
