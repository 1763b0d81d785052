"""Passes over looked-up rows: against the reference, and against rows of the whole matrix after a pass over it."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from bits import assert_same_bits, weights
from packed import pack, unpack
from sweeps import (
    DTYPES,
    SHARDS,
    distributions,
    dtypes,
    each_isa,
    make_control,
    place,
    roundings,
    rows_arguments,
    run,
)

from pyzo import control as layout
from pyzo import ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")  # but where a test asks for `threads`

UPDATE = {"directions": 2, "stochastic": True}
EVERYTHING = {**UPDATE, "perturb": 1, "perturb_sign": 1.0}
stateless = pytest.mark.parametrize("rule", ["sgd", "sign"])


def matrix(size: int, width: int, dtype: torch.dtype, *, seed: int) -> torch.Tensor:
    return weights(size * width, dtype, seed=seed).view(size, width)


def some_ids(n: int, size: int, *, seed: int) -> torch.Tensor:
    """n rows of `size`, repeated and in any order; the last one among them."""
    ids = torch.randint(0, size, (n,), generator=torch.Generator().manual_seed(seed))
    ids[n // 2 : n // 2 + 1] = size - 1
    return ids


def some_bits(n: int, *, seed: int) -> torch.Tensor:
    """A packed mask of about half of n elements; its unused bits are set."""
    mask = torch.rand((n + 7) // 8 * 8, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[n:] = True
    return pack(mask)


def run_rows(
    out: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor],
    sizes: Sequence[int],
    lines: Sequence[Sequence[int]],
    control: torch.Tensor,
    *,
    bits: Sequence[torch.Tensor] = (),
    **step: object,
) -> None:
    """One pass by the operator over rows where they lie."""
    table = torch.tensor(lines, dtype=torch.int64).view(-1, 5)
    device = out[0].device if out else control.device
    ids, bits = ([t.to(device) for t in tensors] for tensors in (ids, bits))
    ops.pass_rows_(list(out), ids, list(sizes), table, control.to(device), bits=bits, **rows_arguments(step))


def check(
    matrices: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor],
    lines: Sequence[Sequence[int]],
    control: torch.Tensor,
    *,
    device: str,
    bits: Sequence[torch.Tensor] = (),
    **step: object,
) -> None:
    """Looks the rows up, moves them by the reference and, on every instruction set, by the operator; compares.

    The rows must also be those of the whole matrix moved by `pass_` from elsewhere. They lie 0 to 7 elements off
    alignment.
    """
    sizes = [len(m) for m in matrices]
    rows = [m[i] for m, i in zip(matrices, ids, strict=True)]
    want = [r.clone() for r in rows]
    table = torch.tensor(lines, dtype=torch.int64).view(-1, 5)
    reference.pass_rows_(want, list(ids), list(bits), sizes, table, control, **rows_arguments(step))
    for isa in each_isa(device):
        got = [place(r, (3 * k + 1) % 8, device) for k, r in enumerate(rows)]
        run_rows(got, ids, sizes, lines, control, bits=bits, **step)
        whole = [torch.full_like(m, 7.0).to(device) for m in matrices]
        src, masks = ([t.to(device) for t in tensors] for tensors in (matrices, bits))
        run(whole, lines, control, src=src, bits=masks, **step)
        for k, (g, w, m, i) in enumerate(zip(got, want, whole, ids, strict=True)):
            assert_same_bits(g.cpu(), w, f"{isa or device}, rows of matrix {k}, {step}")
            assert_same_bits(g.cpu(), m.cpu()[i], f"{isa or device}, matrix {k}, {step}")


@stateless
@dtypes
@distributions
@roundings
def test_every_rule_dtype_distribution_and_rounding(rule, dtype, distribution, stochastic, device):
    shapes = ((1, 1), (9, 5), (30, 64), (7, 385))
    control = make_control(2, 2, seed=1)
    matrices = [matrix(*shape, dtype, seed=k) for k, shape in enumerate(shapes)]
    ids = [some_ids(n, size, seed=n) for n, (size, _) in zip((2, 4, 9, 8), shapes, strict=True)]
    step = {**EVERYTHING, "rule": rule, "distribution": distribution, "stochastic": stochastic}
    for k in range(0, len(SHARDS), 4):
        lines = [(i, *SHARDS[k + i], i % 2) for i in range(len(shapes))]
        check(matrices, ids, lines, control, **step, device=device)


@dtypes
@distributions
def test_everything_a_pass_can_fold(dtype, distribution, device):
    control = make_control(3, 2, seed=3)
    w, ids = matrix(11, 40, dtype, seed=4), some_ids(9, 11, seed=5)
    for directions, perturb, stochastic in itertools.product((0, 1, 3), (-1, 0, 2), (False, True)):
        step = {"directions": directions, "perturb": perturb, "perturb_sign": -1.0, "distribution": distribution}
        check([w], [ids], [(5, 1021, 0, 0, 1)], control, **step, stochastic=stochastic, device=device)


@dtypes
@distributions
@pytest.mark.parametrize("width", [1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 384, 1023, 1024, 1025, 2500])
def test_widths_and_shards(dtype, distribution, width, device):
    """The first row, the last row and one that is looked up twice; in every shard."""
    size = 5
    control = make_control(2, seed=width)
    matrices = [matrix(size, width, dtype, seed=k) for k in range(len(SHARDS))]
    lines = [(k, *shard, 0) for k, shard in enumerate(SHARDS)]
    ids = [torch.tensor([size - 1, 2, 0, 2])] * len(SHARDS)
    step = {**EVERYTHING, "perturb": 0, "distribution": distribution, "stochastic": width % 2 == 0}
    check(matrices, ids, lines, control, **step, device=device)


@dtypes
@distributions
@pytest.mark.parametrize("base", [2**31 - 500, 2**32 - 500, 2**34 - 500, 2**39 - 500, 2**63 - 1001])
def test_global_indices_beyond_32_bits(base, dtype, distribution, device):
    control = make_control(2, seed=6)
    w, ids = matrix(13, 77, dtype, seed=7), some_ids(6, 13, seed=8)
    step = {**EVERYTHING, "distribution": distribution}
    check([w], [ids], [(1, base, 0, 0, 0)], control, **step, device=device)
    check([w], [ids], [(2**56 - 1, 13, 10, base // 101, 0)], control, **step, device=device)


@dtypes
@distributions
def test_rows_of_a_matrix_too_large_for_any_memory(dtype, distribution, device):
    """Each is what a matrix of this row alone has there."""
    width, ids = 24, torch.tensor([2**55 - 1, 0, 2**32, 2**55 - 1])
    control = make_control(2, seed=9)
    rows = matrix(len(ids), width, dtype, seed=10)
    step = {**EVERYTHING, "distribution": distribution}
    for isa in each_isa(device):
        got = place(rows, 1, device)
        run_rows([got], [ids], [2**55], [(1, 5, 0, 0, 0)], control, **step)
        alone = [place(row, 0, device) for row in rows]
        run(alone, [(1, 5 + id_ * width, 0, 0, 0) for id_ in ids.tolist()], control, **step)
        for g, a in zip(got, alone, strict=True):
            assert_same_bits(g, a, isa)


# Masks ----------------------------------------------------------------------------------------------------------------


@dtypes
@distributions
def test_masks_of_every_kind(dtype, distribution, device):
    """Each alone and all together; a matrix without packed mask among the others. Magnitudes count."""
    shapes = ((1, 1), (9, 5), (6, 100), (40, 33))
    matrices = [matrix(*shape, dtype, seed=20 + k) for k, shape in enumerate(shapes)]
    ids = [some_ids(7, size, seed=21) for size, _ in shapes]
    bits = [some_bits(size * width, seed=22) for size, width in shapes]
    bits[1] = bits[1][:0]
    lines = [(k, *SHARDS[k + 3], k % 2) for k in range(len(shapes))]
    step = {**EVERYTHING, "distribution": distribution, "masked": True}
    for masks, keep, threshold in (
        (bits, layout.KEEP_ALL, math.inf),
        ([], 30000, math.inf),
        ([], layout.KEEP_ALL, 0.01),
        ([], layout.KEEP_ALL, -1.0),
        (bits, layout.KEEP_ALL - 1, 0.1),
    ):
        control = make_control(2, 2, seed=23, keep=keep, threshold=threshold)
        check(matrices, ids, lines, control, bits=masks, **step, device=device)


@pytest.mark.parametrize("keep", [0, 30000, layout.KEEP_ALL])
@pytest.mark.parametrize("threshold", [-1.0, 0.02, math.inf])
def test_an_element_moves_iff_every_mask_lets_it(keep, threshold, device):
    size, width, key = 50, 100, 3
    control = make_control(1, seed=24, keep=keep, threshold=threshold, eps=1.0)
    w = 0.02 * torch.randn(size, width, generator=torch.Generator().manual_seed(1))
    bits, ids = some_bits(size * width, seed=25), some_ids(80, size, seed=26)
    seed = reference.read_row(control, 0).mask_seed
    drawn = reference.random_bits(seed, key, reference.MASK_STREAM, torch.arange(size * width)) < keep
    want = (unpack(bits, size * width) & drawn).view(size, width) & (w.abs() <= torch.tensor(threshold))
    step = {"perturb": 0, "perturb_sign": 1.0, "distribution": 1, "masked": True}
    for isa in each_isa(device):
        got = w[ids].to(device)
        run_rows([got], [ids], [size], [(key, 0, 0, 0, 0)], control, bits=[bits], **step)
        assert torch.equal(got.cpu() != w[ids], want[ids]), isa


@dtypes
def test_masks_are_heeded_only_where_asked(dtype, device):
    w, ids = matrix(20, 50, dtype, seed=27), some_ids(30, 20, seed=28)
    control = make_control(2, seed=29, keep=0, threshold=0.0)
    bits = [torch.zeros(125, dtype=torch.uint8)]
    check([w], [ids], [(1, 0, 0, 0, 0)], control, bits=bits, **EVERYTHING, device=device)
    got = w[ids].to(device)
    run_rows([got], [ids], [20], [(1, 0, 0, 0, 0)], control, bits=bits, **EVERYTHING)
    assert not torch.equal(got.cpu(), w[ids])


@dtypes
def test_what_does_not_move_keeps_its_bits(dtype, device):
    """Payloads of NaN, -0.0: without work, with lr 0, and outside each mask."""
    w, ids = matrix(20, 50, dtype, seed=30), some_ids(30, 20, seed=31)
    everything = {"keep": layout.KEEP_ALL, "threshold": math.inf}
    zeros = torch.zeros(125, dtype=torch.uint8)
    for scalars, bits, step in (
        ({}, [], {}),
        ({"lr": 0.0, **everything}, [], {**UPDATE, "masked": True}),
        ({**everything, "keep": 0}, [], {**EVERYTHING, "masked": True}),
        ({**everything, "threshold": -1.0}, [], {**EVERYTHING, "masked": True}),
        (everything, [zeros], {**EVERYTHING, "masked": True}),
    ):
        control = make_control(2, seed=32, **scalars)
        for isa in each_isa(device):
            got = place(w[ids], 1, device)
            run_rows([got], [ids], [20], [(1, 0, 0, 0, 0)], control, bits=bits, **step)
            assert_same_bits(got.cpu(), w[ids], f"{isa}, {scalars}")


# Rows, tensors and steps ----------------------------------------------------------------------------------------------


@dtypes
def test_a_row_looked_up_twice_may_hold_different_weights(dtype, device):
    """Each is moved by itself, with the noise of its place."""
    control = make_control(2, seed=33, keep=30000, threshold=1.0)
    rows, ids = matrix(6, 70, dtype, seed=34), torch.tensor([1, 4, 1, 1, 4, 0])
    want = rows.clone()
    table = torch.tensor([[1, 3, 0, 0, 0]])
    step = {**EVERYTHING, "masked": True}
    reference.pass_rows_([want], [ids], [], [5], table, control, **rows_arguments(step))
    for isa in each_isa(device):
        got = place(rows, 3, device)
        run_rows([got], [ids], [5], table.tolist(), control, **step)
        assert_same_bits(got.cpu(), want, isa)


@dtypes
def test_nothing_to_move(dtype, device):
    """No rows, rows without elements, a matrix without rows; among others."""
    control = make_control(2, seed=35)
    matrices = [matrix(4, 5, dtype, seed=36), *(torch.empty(shape, dtype=dtype) for shape in ((0, 5), (4, 0), (0, 0)))]
    ids = [torch.tensor(which, dtype=torch.int64) for which in ([3, 3], [], [1, 2, 3], [])]
    check(matrices, ids, [(k, 0, 0, 0, 0) for k in range(4)], control, **EVERYTHING, device=device)
    run_rows([], [], [], [], control.to(device), **EVERYTHING)
    unread = matrix(4, 5, dtype, seed=37)
    check([unread], [ids[1]], [(1, 0, 0, 0, 0)], control, **EVERYTHING, device=device)


def test_many_matrices_of_one_call(device):
    """More than a CUDA launch takes, of mixed dtypes, without rows among them."""
    control = make_control(2, 3, seed=38)
    matrices = [matrix(1 + k % 4, (1, 3, 8, 33)[k // 4 % 4], DTYPES[k % 3], seed=k) for k in range(300)]
    ids = [some_ids(k % 3, len(m), seed=k) for k, m in enumerate(matrices)]
    lines = [(k, *SHARDS[k % len(SHARDS)], k % 3) for k in range(len(matrices))]
    check(matrices, ids, lines, control, **EVERYTHING, device=device)


@dtypes
def test_numbers_of_threads(dtype, threads):
    """They cut rows in two, too."""
    control = make_control(2, seed=39, keep=50000)
    shapes = ((300, 100), (2, 3), (3, 10001))
    matrices = [matrix(*shape, dtype, seed=k) for k, shape in enumerate(shapes)]
    ids = [some_ids(n, size, seed=40) for n, (size, _) in zip((250, 1, 3), shapes, strict=True)]
    lines = [(k, *SHARDS[k + 4], 0) for k in range(len(shapes))]
    check(matrices, ids, lines, control, **EVERYTHING, masked=True, device="cpu")


def test_a_skipped_step_perturbs_but_does_not_update(device):
    control = make_control(2, 2, seed=41, ok=False)
    w, ids = matrix(20, 50, torch.bfloat16, seed=42), some_ids(30, 20, seed=43)
    check([w], [ids], [(1, 0, 0, 0, 1)], control, **EVERYTHING, device=device)
    still = w[ids].to(device)
    run_rows([still], [ids], [20], [(1, 0, 0, 0, 1)], control, **UPDATE)
    assert_same_bits(still.cpu(), w[ids])


@stateless
def test_factors_of_the_update(rule, device):
    control = make_control(2, 2, seed=44)
    control.view(torch.float64)[0, layout.CHOICE] = -1.0
    w, ids = matrix(20, 50, torch.float16, seed=45), some_ids(30, 20, seed=46)
    for chosen, sign in itertools.product((False, True), (1.0, -0.5)):
        step = {"rule": rule, "update_sign": sign, "chosen": chosen, **UPDATE}
        check([w], [ids], [(1, 3, 0, 0, 1)], control, **step, device=device)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_a_rule_with_states_may_be_named_where_nothing_is_updated(rule, device):
    control = make_control(2, seed=47)
    w, ids = matrix(20, 50, torch.float32, seed=48), some_ids(30, 20, seed=49)
    perturbed, named = (w[ids].to(device) for _ in range(2))
    for rows, step in ((perturbed, {}), (named, {"rule": rule})):
        run_rows([rows], [ids], [20], [(1, 0, 0, 0, 0)], control, perturb=0, perturb_sign=1.0, **step)
    assert_same_bits(named, perturbed)
    assert not torch.equal(named.cpu(), w[ids])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_rows_outside_the_matrix_are_left_alone():
    """They cannot be read before the kernel runs."""
    ids = torch.tensor([-(2**62), -1, 3, 10, 2**40, 2**62], device="cuda")
    out = torch.ones(len(ids), 33, device="cuda")
    run_rows([out], [ids], [10], [(1, 0, 0, 0, 0)], make_control(2, seed=50), **EVERYTHING, distribution=1)
    assert torch.equal((out != 1.0).all(1), ids == 3)
    assert torch.equal((out != 1.0).any(1), ids == 3)


def test_the_reference_has_the_rows_of_the_dense_pass():
    """The specification itself, with repeated rows."""
    control = make_control(1, seed=51, keep=30000, threshold=0.1)
    w, ids = (
        matrix(
            9,
            13,
            torch.bfloat16,
            seed=52,
        ),
        some_ids(12, 9, seed=53),
    )
    bits, table = [some_bits(117, seed=54)], torch.tensor([[1, 77, 10, 33, 0]])
    moved, rows = torch.empty_like(w), w[ids]
    step = (0, -1, 0.0, 0, 1, 1.0, False, False, 0, 1.0, True, True, False)
    reference.pass_([w], [moved], [], bits, [], [], table, control, *step)
    reference.pass_rows_([rows], [ids], bits, [9], table, control, 0, 0, 1, 1.0, False, 0, 1.0, True, True)
    assert_same_bits(rows, moved[ids])
    assert not torch.equal(rows, w[ids])


# What is refused ------------------------------------------------------------------------------------------------------


def looked_up(device: str) -> dict[str, object]:
    """Arguments that are right: two matrices of 10 rows of 8."""
    return {
        "out": [torch.ones(3, 8, device=device) for _ in range(2)],
        "ids": [torch.tensor([1, 1, 9], device=device) for _ in range(2)],
        "sizes": [10, 10],
        "lines": [[1, 0, 0, 0, 0], [2, 0, 0, 0, 0]],
        "control": make_control(2, seed=60).to(device),
    }


def refused(message: str, *, device: str, **changes: object) -> None:
    """The pass must raise with this message and leave all rows as they were; so must its checks alone."""
    for step in (EVERYTHING, {}):
        arguments = {**looked_up(device), **step, **changes}
        before = [t.clone() for t in arguments["out"]]
        with pytest.raises(RuntimeError, match=message):
            run_rows(**arguments)
        for t, b in zip(arguments["out"], before, strict=True):
            assert torch.equal(t, b)


def test_the_arguments_of_these_tests_are_valid(device):
    arguments = {**looked_up(device), **EVERYTHING}
    run_rows(**arguments)
    first, second = arguments["out"]
    assert (first != 1).any(1).all() and not torch.equal(first, second)
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda good: good.double(),
            r"out\[1\]: expected a contiguous float32, bfloat16 or float16 tensor, got Double",
        ),
        (lambda good: good.int(), r"out\[1\]: expected a contiguous float32, .*, got Int\[3, 8\]"),
        (lambda good: good.t().contiguous().t(), r"out\[1\]: expected a contiguous float32, .*not contiguous"),
        (lambda good: good.view(24), r"out\[1\]: expected a matrix, got Float\[24\]"),
        (lambda good: good.view(3, 2, 4), r"out\[1\]: expected a matrix, got Float\[3, 2, 4\]"),
    ],
)
def test_rows_of_another_kind(make, message, device):
    first, second = looked_up(device)["out"]
    refused(message, out=[first, make(second)], device=device)


def test_overlapping_rows(device):
    storage = torch.ones(48, device=device)
    message = r"out\[1\]: expected memory of its own, got a tensor that overlaps out\[0\]"
    refused(message, out=[storage[:24].view(3, 8), storage[23:47].view(3, 8)], device=device)
    out = [storage[:24].view(3, 8), storage[24:].view(3, 8)]
    message = r": expected memory apart from what is written, got a tensor that overlaps out\[0\]"
    own = torch.zeros(6, dtype=torch.int64, device=device)
    ids = looked_up(device)["ids"]
    refused(
        r"ids\[0\]" + message,
        out=[own[:6].view(torch.float32).view(3, 4), out[1]],
        ids=[own[:3], ids[1]],
        device=device,
    )
    bits = [storage.view(torch.uint8)[:10], torch.zeros(10, dtype=torch.uint8, device=device)]
    refused(r"bits\[0\]" + message, out=out, bits=bits, device=device)
    run_rows(**{**looked_up(device), "out": out, "ids": [ids[0], ids[0]]})  # neighbours, shared ids


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda good: good.int(), r"Int\[3\]"),
        (lambda good: good.double(), r"Double\[3\]"),
        (lambda good: good[:2], r"Long\[2\]"),
        (lambda good: good.view(1, 3), r"Long\[1, 3\]"),
        (lambda good: good.repeat_interleave(2)[::2], r"Long\[3\].*not contiguous"),
    ],
)
def test_ids_of_another_kind(make, got, device):
    first, second = looked_up(device)["ids"]
    message = rf"ids\[1\]: expected a contiguous int64 vector, an id for each row of out\[1\], .*, got {got}"
    refused(message, ids=[first, make(second)], device=device)


@pytest.mark.parametrize("ids", [(-1, 0, 0), (0, 10, 3), (1, 2, 2**62), (0, 0, -(2**63))], ids=str)
def test_ids_are_in_range_on_the_cpu(ids):
    first = torch.tensor([1, 1, 9])
    (position,) = (k for k, id_ in enumerate(ids) if not 0 <= id_ < 10)
    message = rf"ids\[1\]: expected rows in \[0, 10\), got {ids[position]} at position {position}"
    refused(message, ids=[first, torch.tensor(ids)], device="cpu")
    refused(
        r"ids\[1\]: expected rows in \[0, 0\), got 0 at position 0", ids=[first, first * 0], sizes=[10, 0], device="cpu"
    )


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda device: torch.zeros(11, dtype=torch.uint8, device=device), r"Byte\[11\]"),
        (lambda device: torch.zeros(3, dtype=torch.uint8, device=device), r"Byte\[3\]"),  # of the rows alone
        (lambda device: torch.zeros(10, dtype=torch.int8, device=device), r"Char\[10\]"),
        (lambda device: torch.zeros(20, dtype=torch.uint8, device=device)[::2], r"Byte\[10\].*not contiguous"),
    ],
)
def test_masks_of_another_kind(make, got, device):
    good = torch.zeros(10, dtype=torch.uint8, device=device)
    message = (
        r"bits\[1\]: expected a contiguous uint8 tensor of 10 bytes or none, a bit for each of the 80 elements of "
    )
    message += rf"the matrix of out\[1\], got {got}"
    for masked in (False, True):
        refused(message, bits=[good, make(device)], masked=masked, device=device)


def test_numbers_of_tensors(device):
    good = looked_up(device)
    mask = torch.zeros(10, dtype=torch.uint8, device=device)
    refused(r"ids: expected as many tensors as out, which has 2, got 1", ids=good["ids"][:1], device=device)
    refused(r"sizes: expected as many numbers as out has tensors, 2, got 3", sizes=[10] * 3, device=device)
    refused(r"bits: expected no tensors or as many as out, which has 2, got 1", bits=[mask], device=device)
    refused(r"table: expected a contiguous int64 tensor \[2, 5\] on cpu", lines=good["lines"][:1], device=device)


def test_sizes_of_matrices(device):
    message = r"sizes\[1\]: expected a number of rows of 8 elements each, fewer than 2\^63 in all, got "
    for size in (-1, 2**60, 2**63 - 1):
        refused(rf"{message}{size}", sizes=[10, size], device=device)
    first, second = looked_up(device)["lines"]
    for line in ([2, 2**63 - 79, 0, 0, 0], [2, -1, 0, 0, 0], [2, 0, 4, 3, 0], [2, 0, 8, 2**61, 0]):
        refused(r"out\[1\]: expected a shard with base >= 0, .* for 80 elements", lines=[first, line], device=device)
    refused(r"out\[1\]: expected a key below 2\^56", lines=[first, [2**56, 0, 0, 0, 0]], device=device)
    refused(r"out\[0\]: expected a row of control in \[0, 1\), got 1", lines=[[1, 0, 0, 0, 1], second], device=device)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"distribution": 2}, r"distribution: expected an integer in \[0, 2\), got 2"),
        ({"rule": 4}, r"rule: expected an integer in \[0, 4\), got 4"),
        ({"rule": -1}, "rule"),
        ({"directions": 3}, r"directions: expected an integer in \[0, 3\), got 3"),
        ({"directions": -1}, "directions"),
        ({"perturb": 2}, r"perturb: expected an integer in \[-1, 2\), got 2"),
        ({"perturb": -2}, "perturb"),
        ({"rule": "momentum", "directions": 1}, r"rule: expected one without state for an update .*, got 2"),
        ({"rule": "adam", "directions": 2}, r"rule: expected one without state for an update .*, got 3"),
    ],
    ids=str,
)
def test_arguments_out_of_range(step, message, device):
    refused(message, device=device, **step)


def test_control(device):
    control = looked_up(device)["control"]
    message = r"control: expected a contiguous int64 matrix \[3 \+ rows, 16 \+ 2 \* directions\], got "
    for bad in (control.int(), control[0], control[: layout.LINES], control[:, : layout.COEFFICIENTS].contiguous()):
        refused(message, control=bad, device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_mixed_devices():
    on_cpu, on_cuda = looked_up("cpu"), looked_up("cuda")
    table = torch.tensor(on_cpu["lines"])
    rest = rows_arguments(EVERYTHING)
    for changed in ("out", "ids"):
        lists = {**on_cuda, changed: on_cpu[changed]}
        with pytest.raises(RuntimeError, match=rf"{changed}\[0\]: expected a tensor on the device of control"):
            ops.pass_rows_(lists["out"], lists["ids"], [10, 10], table, on_cuda["control"], **rest)
    bits = [torch.zeros(10, dtype=torch.uint8)] * 2
    with pytest.raises(RuntimeError, match=r"bits\[0\]: expected a tensor on the device of control"):
        ops.pass_rows_(on_cuda["out"], on_cuda["ids"], [10, 10], table, on_cuda["control"], bits=bits, **rest)
