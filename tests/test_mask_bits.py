"""mask_bits_: which weights are small, packed, against the reference and against what the numbers mean."""

import itertools
import math

import pytest
import torch
from bits import assert_same_bits, weights
from packed import unpack
from sweeps import DTYPES, dtypes, each_isa, make_control, place

from pyzo import control as layout
from pyzo import ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")  # but where a test asks for `threads`

SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 1023, 1024, 1025, 5000)


def thresholds(*values: float) -> torch.Tensor:
    """A control tensor with a row for each threshold."""
    control = make_control(1, len(values), seed=1)
    control.view(torch.float64)[layout.LINES :, layout.THRESHOLD] = torch.tensor(values, dtype=torch.float64)
    return control


def table(rows: list[int]) -> torch.Tensor:
    return torch.tensor([[0, 0, 0, 0, r] for r in rows], dtype=torch.int64).reshape(-1, 5)


def masks(sizes: tuple[int, ...], device: str = "cpu") -> list[torch.Tensor]:
    """Room for packed masks, with bits in it that must go; off alignment."""
    filled = [torch.full(((n + 7) // 8,), 0xA5, dtype=torch.uint8) for n in sizes]
    return [place(t, i % 5, device) for i, t in enumerate(filled)]


def small(w: torch.Tensor, threshold: float, device: str) -> torch.Tensor:
    """What mask_bits_ says of one tensor, as booleans."""
    (bits,) = masks((w.numel(),), device)
    ops.mask_bits_([w.to(device)], [bits], table([0]), thresholds(threshold).to(device))
    return unpack(bits, w.numel())


@dtypes
@pytest.mark.parametrize("threshold", [0.0, 0.01, 1.0, 1e300, math.inf, -1.0, math.nan])
def test_sizes_places_and_special_numbers(dtype, threshold, device):
    """Every tensor in one call; a bit that belongs to no element is 0."""
    control = thresholds(threshold)
    w = [weights(n, dtype, seed=n) for n in SIZES]
    want = masks(SIZES)
    reference.mask_bits_(w, want, table([0] * len(w)), control)
    for isa in each_isa(device):
        got = masks(SIZES, device)
        placed = [place(t, i % 8, device) for i, t in enumerate(w)]
        ops.mask_bits_(placed, got, table([0] * len(w)), control.to(device))
        for g, t, wanted, before in zip(got, placed, want, w, strict=True):
            assert_same_bits(g.cpu(), wanted, f"{isa}, {len(before)}")
            assert_same_bits(t.cpu(), before)
            assert torch.equal(unpack(g, len(before)), before.float().abs() <= torch.tensor(threshold).float())


@dtypes
def test_the_threshold_itself_is_small_and_its_neighbour_is_not(dtype, device):
    """Subnormal numbers too."""
    for value in (1.0, 1.5 * 2.0**-14, torch.finfo(dtype).smallest_normal, torch.finfo(dtype).smallest_normal / 4, 0.0):
        threshold = torch.tensor(value, dtype=dtype)
        above = torch.nextafter(threshold, torch.tensor(torch.inf, dtype=dtype))
        w = torch.stack((threshold, -threshold, above, -above))
        for isa in each_isa(device):
            assert small(w, threshold.double().item(), device).tolist() == [True, True, False, False], (isa, value)


def test_the_threshold_is_rounded_to_float32_once(device):
    one_up = 1.0 + 2.0**-23
    w = torch.tensor([1.0, one_up])
    assert small(w, 1.0 + 2.0**-25, device).tolist() == [True, False]
    assert small(w, 1.0 + 2.0**-24 + 2.0**-40, device).tolist() == [True, True]


def test_rows_and_dtypes_of_one_call(device):
    limits = (0.01, math.inf, 0.5)
    w = [weights(500 + k, DTYPES[k % 3], seed=k) for k in range(9)]
    rows = [k % 3 for k in range(4)] + [2 - k % 3 for k in range(5)]
    bits = masks(tuple(len(t) for t in w), device)
    ops.mask_bits_([t.to(device) for t in w], bits, table(rows), thresholds(*limits).to(device))
    for t, b, r in zip(w, bits, rows, strict=True):
        assert torch.equal(unpack(b, len(t)), t.float().abs() <= limits[r])


@dtypes
def test_numbers_of_threads(dtype, threads):
    w = [weights(n, dtype, seed=n) for n in (100003, 3, 40000)]
    bits = masks(tuple(len(t) for t in w))
    ops.mask_bits_(w, bits, table([0] * 3), thresholds(0.01))
    for t, b in zip(w, bits, strict=True):
        assert torch.equal(unpack(b, len(t)), t.float().abs() <= torch.tensor(0.01))


@dtypes
def test_a_pass_with_these_bits_moves_what_a_pass_with_the_threshold_moves(dtype, device):
    """And what the bits keep does not change with the weights, as a mask of perturbed weights must not."""
    n, line = 3000, [[3, 5, 0, 0, 0]]
    control = make_control(1, seed=2, threshold=0.01, keep=layout.KEEP_ALL).to(device)
    (bits,) = masks((n,), device)
    w = weights(n, dtype, seed=3).to(device)
    ops.mask_bits_([w], [bits], table([0]), control)
    plain = make_control(1, seed=2, keep=layout.KEEP_ALL).to(device)
    by_bits, by_threshold = w.clone(), w.clone()
    step = {"distribution": 0, "perturb": 0, "perturb_sign": 1.0, "masked": True}
    ops.pass_([], [by_bits], [], torch.tensor(line), plain, bits=[bits], **step)
    ops.pass_([w], [by_threshold], [], torch.tensor(line), control, **step)
    assert_same_bits(by_bits, by_threshold)
    assert not torch.equal(by_bits, w)


def byte(*shape: int, device: str) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8, device=device)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            lambda d: {"weights": [torch.ones(9, dtype=torch.float64, device=d)]},
            r"weights\[0\]: expected a contiguous fl",
        ),
        (lambda d: {"weights": [torch.ones(9, 2, device=d)[:, 0]]}, r"weights\[0\]: .*not contiguous"),
        (lambda d: {"bits": []}, "bits: expected as many tensors as weights, which has 1, got 0"),
        (
            lambda d: {"bits": [byte(1, device=d)]},
            r"bits\[0\]: expected a contiguous uint8 tensor of 2 bytes, a bit for",
        ),
        (lambda d: {"bits": [byte(0, device=d)]}, r"bits\[0\]: expected .* of the 9 elements of weights\[0\], got"),
        (lambda d: {"bits": [byte(2, device=d).char()]}, r"bits\[0\]: .*got Char\[2\]"),
        (lambda d: {"bits": [byte(2, 2, device=d)[:, 0]]}, r"bits\[0\]: .*not contiguous"),
        (lambda d: {"table": table([1])}, r"weights\[0\]: expected a row of control in \[0, 1\), got 1"),
        (lambda d: {"table": table([0, 0])}, r"table: expected a contiguous int64 tensor \[1, 5\]"),
        (lambda d: {"control": torch.zeros(3, device=d)}, "control: expected"),
    ],
)
def test_what_is_refused(bad, message, device):
    good = {"weights": [torch.ones(9, device=device)], "bits": [byte(2, device=device)], "table": table([0])}
    arguments = {**good, "control": thresholds(1.0).to(device), **bad(device)}
    before = [b.clone() for b in arguments["bits"]]
    with pytest.raises(RuntimeError, match=message):
        ops.mask_bits_(*arguments.values())
    for b, old in zip(arguments["bits"], before, strict=True):
        assert torch.equal(b, old)


def test_overlaps_are_refused(device):
    memory = torch.zeros(64, dtype=torch.uint8, device=device)
    w = torch.ones(8, device=device)
    control = thresholds(1.0).to(device)
    for first, second in itertools.combinations((memory[:2], memory[1:3], memory[:2]), 2):
        with pytest.raises(RuntimeError, match=r"bits\[\d\]: expected memory of its own.*overlaps bits\[\d\]"):
            ops.mask_bits_([w.repeat(2), w.repeat(2)], [first, second], table([0, 0]), control)
    own = memory[:4].view(torch.float32)
    with pytest.raises(RuntimeError, match=r"weights\[0\]: expected memory apart from what is written.*bits\[0\]"):
        ops.mask_bits_([own], [memory[:1]], table([0]), control)
