"""The noise field on every device, instruction set and number of threads; where its constants come from."""

import importlib.util
import re
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from bits import assert_same_bits

import pyzo
from pyzo import _host, ops, reference
from pyzo import control as layout

ROOT = Path(__file__).parents[1]
NOISE = pytest.mark.parametrize("field", golden.noise_lines(), ids=str)
PASS = pytest.mark.parametrize("steps", golden.pass_lines(), ids=str)
TOP64, TOP56 = 2**64 - 1, 2**56 - 1


def op_noise(field: golden.Field, device: str) -> torch.Tensor:
    return pyzo.noise(
        field.n,
        seed=field.seed,
        key=field.key,
        offset=field.base,
        inner=field.inner or None,
        stride=field.stride or None,
        distribution=field.distribution,
        dtype=field.torch_dtype,
        device=device,
    )


@NOISE
def test_golden_noise_of_every_instruction_set(field, isa):
    assert golden.hash_of(op_noise(field, "cpu")) == field.hash


@NOISE
def test_golden_noise_of_every_number_of_threads(field, threads):
    assert golden.hash_of(op_noise(field, "cpu")) == field.hash


@NOISE
def test_golden_noise_of_every_device(field, device):
    assert golden.hash_of(op_noise(field, device)) == field.hash


@NOISE
def test_golden_noise_of_the_host_module(field):
    for isa in _host.isas():
        out = _host.noise(
            field.n,
            seed=field.seed,
            key=field.key,
            offset=field.base,
            inner=field.inner or None,
            stride=field.stride or None,
            distribution=field.distribution,
            dtype=field.dtype,
            isa=isa,
        )
        assert golden.hash_of(out) == field.hash, isa


@NOISE
def test_golden_noise_of_the_reference(field):
    out = torch.empty(field.n, dtype=field.torch_dtype)
    distribution = reference.DISTRIBUTIONS.index(field.distribution)
    reference.noise_(out, field.seed, field.key, field.base, field.inner, field.stride, distribution)
    assert golden.hash_of(out) == field.hash


@PASS
def test_golden_pass_of_every_instruction_set(steps, isa):
    assert golden.pass_hashes(torch.ops.pyzo, steps) == steps.hashes


@PASS
def test_golden_pass_of_every_number_of_threads(steps, threads):
    assert golden.pass_hashes(torch.ops.pyzo, steps) == steps.hashes


@PASS
def test_golden_pass_of_every_device(steps, device):
    assert golden.pass_hashes(torch.ops.pyzo, steps, device) == steps.hashes


@PASS
def test_golden_pass_of_the_reference(steps):
    assert golden.pass_hashes(reference, steps) == steps.hashes


@pytest.mark.parametrize(("run", "step", "direction", "seed"), golden.seed_lines())
def test_golden_direction_seeds(run, step, direction, seed):
    assert reference.direction_seed(run, step, direction) == seed
    assert _host.direction_seed(run, step, direction) == seed


def test_golden_hash_sees_values_and_order():
    x = np.arange(10, dtype=np.float32)
    swapped, changed = x.copy(), x.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    changed[9] = np.nextafter(changed[9], 10)
    assert len({golden.hash_of(x), golden.hash_of(swapped), golden.hash_of(changed), golden.hash_of(x[:9])}) == 4


def test_begin_step_draws_the_published_seeds(device):
    run = TOP64 - 5
    control = ops.control(3, 1, device)
    control[0, layout.RUN_SEED] = run - 2**64
    control[0, layout.DRAW] = 6
    torch.ops.pyzo.begin_step_(control)
    seeds = [seed % 2**64 for seed in control[1, :3].tolist()]
    assert seeds == [reference.direction_seed(run, 7, k) for k in range(3)]
    assert control[0].tolist()[:4] == [1, 0, 7, 0]
    assert control[0, layout.ROUNDING_SEED].item() % 2**64 == reference.direction_seed(
        run, 7, reference.ROUNDING_DIRECTION
    )


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words, device):
    def signed64(low: int, high: int) -> int:
        value = low | high << 32
        return value - 2**64 if value >> 63 else value

    out = torch.empty(1, 4, dtype=torch.int32, device=device)
    torch.ops.pyzo.philox_(out, signed64(*key), signed64(*counter[2:]), signed64(*counter[:2]))
    assert [word % 2**32 for word in out[0].tolist()] == words


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shards_are_parts_of_the_whole(distribution, dtype, device):
    options = {"seed": 3, "key": 4, "distribution": distribution, "dtype": dtype, "device": device}
    whole = pyzo.noise((37, 301), **options)
    assert_same_bits(pyzo.noise((5, 301), offset=7 * 301, **options), whole[7:12].contiguous(), "rows")
    for first, width in ((0, 1), (3, 298), (100, 64), (300, 1)):
        columns = pyzo.noise((37, width), offset=first, inner=width, stride=301, **options)
        assert_same_bits(columns, whole[:, first : first + width].contiguous(), f"columns {first}+{width}")


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_16_bit_noise_is_float32_noise_rounded(distribution, device):
    options = {"seed": 5, "key": 6, "distribution": distribution, "device": device}
    z = pyzo.noise(10007, **options)
    for dtype in (torch.bfloat16, torch.float16):
        assert_same_bits(pyzo.noise(10007, dtype=dtype, **options), z.to(dtype), str(dtype))


@pytest.mark.parametrize("base", [2**31 - 100, 2**32 - 100, 2**34 - 100, 2**39 - 200, 2**53 + 1, 2**63 - 1001])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_indices_beyond_32_bits(base, distribution, device):
    got = pyzo.noise(1001, seed=8, key=9, offset=base, distribution=distribution, device=device)
    assert_same_bits(got.cpu(), reference.noise(1001, seed=8, key=9, base=base, distribution=distribution), "one run")
    strided = pyzo.noise(
        1000, seed=8, key=9, offset=17, inner=10, stride=base // 100, distribution=distribution, device=device
    )
    want = reference.noise(1000, seed=8, key=9, base=17, inner=10, stride=base // 100, distribution=distribution)
    assert_same_bits(strided.cpu(), want, "runs")


def test_noise_differs_by_seed_key_and_distribution(device):
    base = {"seed": 1, "key": 1}
    fields = [
        base,
        {"seed": 2, "key": 1},
        {"seed": 1, "key": 2},
        {"seed": 1 + 2**32, "key": 1},
        {"seed": 1, "key": 1 + 2**32},
    ]
    drawn = [pyzo.noise(64, device=device, **field) for field in fields]
    assert len({tuple(z.tolist()) for z in drawn}) == len(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"key": 2**56}, "key"),
        ({"offset": -1}, "offset"),
        ({"inner": 3}, "stride"),
        ({"inner": 3, "stride": 2}, "inner"),
        ({"distribution": "uniform"}, "distribution"),
        ({"dtype": torch.float64}, "dtype"),
    ],
)
def test_noise_names_the_argument_that_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        pyzo.noise(3, **{"seed": 0, "key": 0, **change})


def test_noise_op_checks_its_arguments(device):
    out = torch.zeros(4, 6, device=device)
    for arguments, message in [
        ((out.to(torch.float64), 0, 0, 0, 0, 0, 0), "out: expected a contiguous float32"),
        ((out.t(), 0, 0, 0, 0, 0, 0), "not contiguous"),
        ((out, 0, -1, 0, 0, 0, 0), "key: expected"),
        ((out, 0, 2**56, 0, 0, 0, 0), "key: expected"),
        ((out, 0, 0, -1, 0, 0, 0), "base >= 0"),
        ((out, 0, 0, 2**63 - 23, 0, 0, 0), "indices below 2\\^63"),
        ((out, 0, 0, 0, 6, 5, 0), "stride >= inner"),
        ((out, 0, 0, 0, 6, 2**62, 0), "indices below 2\\^63"),
        ((out, 0, 0, 0, 0, 0, 2), "distribution: expected"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pyzo.noise_(*arguments)
    assert not out.any()


def test_constants_are_what_the_fit_derives():
    spec = importlib.util.spec_from_file_location("fit_normal", ROOT / "bench" / "fit_normal.py")
    fit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fit)
    header = (ROOT / "csrc" / "core" / "normal.h").read_text()
    have = np.array([float(x) for x in re.findall(r"L::splat\((-?\d[\d.]*(?:e-?\d+)?)f\)", header)], np.float32)
    want = np.array(fit.literals(), np.float32)
    assert have.shape == want.shape
    # A change of 4 ulp in the highest coefficients is below what the optimum determines in double precision.
    np.testing.assert_array_less(np.abs(have - want), 4.5 * np.spacing(np.abs(want)))
