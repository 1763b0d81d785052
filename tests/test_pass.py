"""The pass against the reference, bit for bit: dtypes, sizes, shards, storage, what it folds, and what it refuses."""

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from bits import assert_same_bits, weights

from pyzo import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARDS = [
    (0, 0, 0),
    (1, 0, 0),
    (1021, 0, 0),
    (2**34 - 7, 0, 0),
    (2**39 - 131, 0, 0),
    (3, 1, 2),
    (1000, 77, 1000),
    (2**40 + 1, 333, 4096),
]
pytestmark = pytest.mark.usefixtures("one_thread")  # but where a test asks for `threads`
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
distributions = pytest.mark.parametrize("distribution", [0, 1], ids=["normal", "rademacher"])


def make_control(directions: int, rows: int, *, seed: int, ok: bool = True) -> torch.Tensor:
    """Seeds of a step, and rows with different lr, eps and weight decay (0 in every second one) and coefficients."""
    generator = torch.Generator().manual_seed(seed)
    control = torch.zeros(3 + rows, 8 + 2 * directions, dtype=torch.int64)
    control[0, 4] = seed * 0x1234567
    reference.begin_step_(control)
    doubles = control.view(torch.float64)
    for row in range(rows):
        doubles[3 + row, :3] = torch.tensor([0.1 / (row + 1), 1e-2 * (row + 1), 0.1 * (row % 2)], dtype=torch.float64)
    doubles[3:, 3 : 3 + directions] = torch.randn(rows, directions, generator=generator, dtype=torch.float64)
    control[0, 0] = int(ok)
    return control


def check(dst, lines, control, *step, src=(), device):
    """Runs the pass by the reference and, on every instruction set, by the operator, and compares all destinations."""
    table = torch.tensor(lines, dtype=torch.int64).view(-1, 5)
    want = [w.clone() for w in dst]
    reference.pass_(list(src), want, table, control, *step)
    for _ in each_isa(device):
        got = [place(w, i % 8, device) for i, w in enumerate(dst)]  # 0 to 7 elements off alignment
        sources = [place(w, (3 * i + 1) % 8, device) for i, w in enumerate(src)]
        torch.ops.pyzo.pass_(sources, got, table, control.to(device), *step)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_same_bits(g.cpu(), w, f"{torch.ops.pyzo.isas()}, tensor {i}, {step}")
        for i, (s, w) in enumerate(zip(sources, src, strict=True)):
            assert_same_bits(s.cpu(), w, f"source {i}")


def each_isa(device: str) -> Iterator[None]:
    """Once for every instruction set of the CPU, selected; once for another device."""
    for name in ops.isas() if device == "cpu" else [""]:
        ops.select_isa(name)
        yield


def place(w: torch.Tensor, offset: int, device: str = "cpu") -> torch.Tensor:
    """A copy of `w` that begins `offset` elements into its storage."""
    storage = torch.zeros(w.numel() + offset + 8, dtype=w.dtype, device=device)
    view = storage[offset : offset + w.numel()].view(w.shape)
    return view.copy_(w)


@dtypes
@distributions
def test_everything_a_pass_can_fold(dtype, distribution, device):
    control = make_control(3, 2, seed=1)
    w = weights(1500, dtype, seed=2)
    for undo, directions, perturb, stochastic in itertools.product((-1, 0, 2), (0, 1, 2, 3), (-1, 0, 2), (False, True)):
        step = (distribution, undo, 1.0, directions, perturb, -1.0, stochastic)
        check([w], [(5, 1021, 0, 0, 1)], control, *step, device=device)


@dtypes
@distributions
@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 63, 64, 65, 127, 129, 1023, 1025])
def test_sizes_shards_and_misaligned_storage(dtype, distribution, n, device):
    control = make_control(2, 1, seed=n)
    dst = [weights(n, dtype, seed=n + i) for i in range(len(SHARDS))]
    lines = [(i, *shard, 0) for i, shard in enumerate(SHARDS)]
    check(dst, lines, control, distribution, 0, 1.0, 2, 1, 1.0, n % 2 == 0, device=device)


@dtypes
@distributions
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_a_large_tensor(dtype, distribution, stochastic, device):
    control = make_control(1, 1, seed=3)
    w = weights(1000003, dtype, seed=4)
    shard = (3, 0, 0) if stochastic else (2**33, 1001, 5000)
    check([w], [(2**56 - 1, *shard, 0)], control, distribution, 0, 1.0, 1, -1, 1.0, stochastic, device=device)


@pytest.mark.parametrize("count", [1, 2, 300, 2000])
def test_many_tensors_of_mixed_dtypes_and_rows(count, device):
    control = make_control(2, 3, seed=count)
    rng = random.Random(count)
    sizes = [40000, *(rng.choice([0, 1, 3, 5, 64, 65, 200]) for _ in range(count - 1))]
    ws = [weights(n, DTYPES[i % 3], seed=i) for i, n in enumerate(sizes)]
    lines = [(rng.randrange(2**56), *rng.choice(SHARDS), i % 3) for i in range(count)]
    step = (0, 1, 1.0, 2, 0, 1.0, True)
    check(ws[:40], lines[:40], control, *step, device=device)
    together, alone = ([place(w, i % 8, device) for i, w in enumerate(ws)] for _ in range(2))
    torch.ops.pyzo.pass_([], together, torch.tensor(lines), control.to(device), *step)
    for i, (a, t) in enumerate(zip(alone, together, strict=True)):
        torch.ops.pyzo.pass_([], [a], torch.tensor(lines[i : i + 1]), control.to(device), *step)
        assert_same_bits(t.cpu(), a.cpu(), f"tensor {i}")


@dtypes
@distributions
def test_numbers_of_threads(dtype, distribution, threads):
    control = make_control(2, 1, seed=22)
    dst = [weights(n, dtype, seed=n) for n in (40000, 3, 17000, 1, 20001)]
    lines = [(i, *SHARDS[i], 0) for i in range(len(dst))]
    check(dst, lines, control, distribution, 1, 1.0, 2, 0, 1.0, True, device="cpu")


@dtypes
@pytest.mark.parametrize("directions", [1, 2, 5])
def test_numbers_of_directions(dtype, directions, device):
    control = make_control(5, 1, seed=directions)
    w = weights(3000, dtype, seed=directions)
    for undo, perturb in ((-1, -1), (4, 4), (directions - 1, 0), (4, 0), (0, 4)):
        check([w], [(1, 5, 0, 0, 0)], control, 0, undo, -1.0, directions, perturb, 1.0, True, device=device)


@dtypes
@distributions
def test_source_apart_from_destination(dtype, distribution, device):
    control = make_control(2, 2, seed=6)
    sizes = (1, 64, 1025, 5000)
    src = [weights(n, dtype, seed=n) for n in sizes]
    dst = [torch.full_like(w, 7.0) for w in src]
    lines = [(k, 3, 0, 0, k % 2) for k in range(len(sizes))]
    for step in ((-1, 1.0, 0, 0, 1.0), (0, 1.0, 2, -1, 0.0), (-1, 0.0, 0, -1, 0.0)):  # the last one copies
        check(dst, lines, control, distribution, *step, True, src=src, device=device)


def test_shapes_do_not_matter(device):
    control = make_control(1, 1, seed=7)
    w = weights(2 * 3 * 5 * 7, torch.bfloat16, seed=8)
    step = (0, -1, 0.0, 1, -1, 0.0, True)
    for shape in ((210,), (2, 105), (2, 3, 5, 7), (210, 1, 1)):
        check([w.view(shape)], [(1, 9, 0, 0, 0)], control, *step, device=device)
    check([weights(1, torch.float32, seed=1).view(())], [(1, 9, 0, 0, 0)], control, *step, device=device)


@dtypes
@distributions
def test_order_of_tensors_and_company_do_not_matter(dtype, distribution, device):
    control = make_control(1, 1, seed=9).to(device)
    ws = [weights(n, dtype, seed=n).to(device) for n in (5, 1000, 70000)]
    lines = [[k, 0, 0, 0, 0] for k in range(3)]
    together = [w.clone() for w in ws]
    step = (distribution, -1, 0.0, 1, 0, 1.0, True)
    torch.ops.pyzo.pass_([], together[::-1], torch.tensor(lines[::-1]), control, *step)
    for w, line, want in zip(ws, lines, together, strict=True):
        torch.ops.pyzo.pass_([], [w], torch.tensor([line]), control, *step)
        assert_same_bits(w, want)


@dtypes
@distributions
def test_a_shard_gets_what_the_whole_gets(dtype, distribution, device):
    control = make_control(2, 1, seed=10).to(device)
    whole = weights(60 * 50, dtype, seed=11).view(60, 50).to(device)
    part = whole[:, 7:30].contiguous()
    step = (distribution, 1, 1.0, 2, 0, 1.0, True)
    torch.ops.pyzo.pass_([], [whole], torch.tensor([[1, 0, 0, 0, 0]]), control, *step)
    torch.ops.pyzo.pass_([], [part], torch.tensor([[1, 7, 23, 50, 0]]), control, *step)
    assert_same_bits(part, whole[:, 7:30].contiguous())


@dtypes
@distributions
def test_a_skipped_step_undoes_and_perturbs_but_does_not_update(dtype, distribution, device):
    control = make_control(2, 2, seed=12, ok=False)
    w = weights(3000, dtype, seed=13)
    for undo, perturb in itertools.product((-1, 0), (-1, 1)):
        check([w], [(1, 0, 0, 0, 1)], control, distribution, undo, 1.0, 2, perturb, 1.0, True, device=device)
    still = place(w, 0, device)
    torch.ops.pyzo.pass_(
        [], [still], torch.tensor([[1, 0, 0, 0, 1]]), control.to(device), distribution, -1, 0.0, 2, -1, 0.0, True
    )
    assert_same_bits(still.cpu(), w)


@dtypes
@distributions
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_lr_zero_keeps_every_bit(dtype, distribution, stochastic, device):
    control = make_control(2, 2, seed=14)
    control.view(torch.float64)[3:, 0] = 0.0  # row 1 has a weight decay
    w = weights(20000, dtype, seed=15)
    table = torch.tensor([[1, 0, 0, 0, 0], [2, 5, 0, 0, 1]])
    for _ in each_isa(device):
        got = [place(w, 3, device), place(w, 0, device)]
        torch.ops.pyzo.pass_([], got, table, control.to(device), distribution, -1, 0.0, 2, -1, 0.0, stochastic)
        for g in got:
            assert_same_bits(g.cpu(), w)


@dtypes
def test_infinities_and_nan_survive_a_step(dtype, device):
    w = weights(20000, dtype, seed=16)
    control = make_control(1, 1, seed=17).to(device)
    special = ~torch.isfinite(w)
    assert special.sum() > 500
    for _ in each_isa(device):
        got = place(w, 0, device)
        torch.ops.pyzo.pass_([], [got], torch.tensor([[1, 0, 0, 0, 0]]), control, 0, 0, 1.0, 1, 0, 1.0, True)
        assert_same_bits(got.cpu()[special], w[special])
        assert not torch.equal(got.cpu()[~special], w[~special])


@dtypes
def test_float32_scalars_are_rounded_once_from_the_control_tensor(dtype, device):
    control = make_control(1, 1, seed=18)
    control.view(torch.float64)[3, :4] = torch.tensor([1 / 3, 1e-3 / 7, 1 / 11, 1 + 2.0**-30], dtype=torch.float64)
    check([weights(5000, dtype, seed=19)], [(1, 0, 0, 0, 0)], control, 0, 0, 1.0, 1, 0, -1.0, False, device=device)


@pytest.mark.parametrize("base", [2**31 - 500, 2**32 - 500, 2**34 - 500, 2**63 - 1001])
@dtypes
def test_indices_beyond_32_bits(base, dtype, device):
    control = make_control(2, 1, seed=20)
    w = weights(1001, dtype, seed=21)
    step = (0, 0, 1.0, 2, 1, 1.0, True)
    check([w], [(1, base, 0, 0, 0)], control, *step, device=device)
    check([w], [(1, 13, 10, base // 101, 0)], control, *step, device=device)
