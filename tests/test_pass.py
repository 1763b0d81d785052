"""The pass against the reference, bit for bit: dtypes, sizes, shards, storage, threads, and what it folds.

With the rule sgd, whose passes have code of their own; tests/test_rules.py has the others.
"""

import itertools
import random

import pytest
import torch
from bits import assert_same_bits, weights
from sweeps import DTYPES, SHARDS, check, distributions, dtypes, each_isa, make_control, place, roundings, run

pytestmark = pytest.mark.usefixtures("one_thread")  # but where a test asks for `threads`

UPDATE = {"directions": 2, "stochastic": True}
EVERYTHING = {**UPDATE, "undo": 1, "undo_sign": 1.0, "perturb": 0, "perturb_sign": 1.0}


@dtypes
@distributions
def test_everything_a_pass_can_fold(dtype, distribution, device):
    control = make_control(3, 2, seed=1)
    w = weights(1500, dtype, seed=2)
    for undo, directions, perturb, stochastic in itertools.product((-1, 0, 2), (0, 1, 2, 3), (-1, 0, 2), (False, True)):
        step = {"undo": undo, "undo_sign": 1.0, "directions": directions, "perturb": perturb, "perturb_sign": -1.0}
        step |= {"distribution": distribution, "stochastic": stochastic}
        check([w], [(5, 1021, 0, 0, 1)], control, **step, device=device)


@dtypes
@distributions
@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 63, 64, 65, 127, 129, 1023, 1025])
def test_sizes_shards_and_misaligned_storage(dtype, distribution, n, device):
    control = make_control(2, seed=n)
    dst = [weights(n, dtype, seed=n + i) for i in range(len(SHARDS))]
    lines = [(i, *shard, 0) for i, shard in enumerate(SHARDS)]
    step = {**EVERYTHING, "undo": 0, "perturb": 1, "distribution": distribution, "stochastic": n % 2 == 0}
    check(dst, lines, control, **step, device=device)


@dtypes
@distributions
@roundings
def test_a_large_tensor(dtype, distribution, stochastic, device):
    control = make_control(1, seed=3)
    w = weights(1000003, dtype, seed=4)
    shard = (3, 0, 0) if stochastic else (2**33, 1001, 5000)
    step = {"undo": 0, "undo_sign": 1.0, "directions": 1, "distribution": distribution, "stochastic": stochastic}
    check([w], [(2**56 - 1, *shard, 0)], control, **step, device=device)


@pytest.mark.parametrize("count", [1, 2, 300, 2000])
def test_many_tensors_of_mixed_dtypes_and_rows(count, device):
    control = make_control(2, 3, seed=count)
    rng = random.Random(count)
    sizes = [40000, *(rng.choice([0, 1, 3, 5, 64, 65, 200]) for _ in range(count - 1))]
    ws = [weights(n, DTYPES[i % 3], seed=i) for i, n in enumerate(sizes)]
    lines = [(rng.randrange(2**56), *rng.choice(SHARDS), i % 3) for i in range(count)]
    check(ws[:40], lines[:40], control, **EVERYTHING, device=device)
    together, alone = ([place(w, i % 8, device) for i, w in enumerate(ws)] for _ in range(2))
    run(together, lines, control, **EVERYTHING)
    for i, (a, t) in enumerate(zip(alone, together, strict=True)):
        run([a], lines[i : i + 1], control, **EVERYTHING)
        assert_same_bits(t.cpu(), a.cpu(), f"tensor {i}")


@dtypes
@distributions
def test_numbers_of_threads(dtype, distribution, threads):
    control = make_control(2, seed=22)
    dst = [weights(n, dtype, seed=n) for n in (40000, 3, 17000, 1, 20001)]
    lines = [(i, *SHARDS[i], 0) for i in range(len(dst))]
    check(dst, lines, control, **EVERYTHING, distribution=distribution, device="cpu")


@dtypes
@pytest.mark.parametrize("directions", [1, 2, 5])
def test_numbers_of_directions(dtype, directions, device):
    control = make_control(5, seed=directions)
    w = weights(3000, dtype, seed=directions)
    for undo, perturb in ((-1, -1), (4, 4), (directions - 1, 0), (4, 0), (0, 4)):
        step = {"undo": undo, "undo_sign": -1.0, "directions": directions, "perturb": perturb, "perturb_sign": 1.0}
        check([w], [(1, 5, 0, 0, 0)], control, **step, stochastic=True, device=device)


@dtypes
@distributions
def test_source_apart_from_destination(dtype, distribution, device):
    control = make_control(2, 2, seed=6)
    sizes = (1, 64, 1025, 5000)
    src = [weights(n, dtype, seed=n) for n in sizes]
    dst = [torch.full_like(w, 7.0) for w in src]
    lines = [(k, 3, 0, 0, k % 2) for k in range(len(sizes))]
    copy = {"stochastic": True}
    for step in ({"perturb": 0, "perturb_sign": 1.0}, {**UPDATE, "undo": 0, "undo_sign": 1.0}, copy):
        check(dst, lines, control, **step, distribution=distribution, src=src, device=device)


def test_shapes_do_not_matter(device):
    control = make_control(1, seed=7)
    w = weights(2 * 3 * 5 * 7, torch.bfloat16, seed=8)
    step = {"directions": 1, "stochastic": True}
    for shape in ((210,), (2, 105), (2, 3, 5, 7), (210, 1, 1)):
        check([w.view(shape)], [(1, 9, 0, 0, 0)], control, **step, device=device)
    check([weights(1, torch.float32, seed=1).view(())], [(1, 9, 0, 0, 0)], control, **step, device=device)


@dtypes
@distributions
def test_order_of_tensors_and_company_do_not_matter(dtype, distribution, device):
    control = make_control(1, seed=9)
    ws = [weights(n, dtype, seed=n).to(device) for n in (5, 1000, 70000)]
    lines = [[k, 0, 0, 0, 0] for k in range(3)]
    together = [w.clone() for w in ws]
    step = {"directions": 1, "perturb": 0, "perturb_sign": 1.0, "stochastic": True, "distribution": distribution}
    run(together[::-1], lines[::-1], control, **step)
    for w, line, want in zip(ws, lines, together, strict=True):
        run([w], [line], control, **step)
        assert_same_bits(w, want)


@dtypes
@distributions
def test_a_shard_gets_what_the_whole_gets(dtype, distribution, device):
    control = make_control(2, seed=10)
    whole = weights(60 * 50, dtype, seed=11).view(60, 50).to(device)
    part = whole[:, 7:30].contiguous()
    run([whole], [[1, 0, 0, 0, 0]], control, **EVERYTHING, distribution=distribution)
    run([part], [[1, 7, 23, 50, 0]], control, **EVERYTHING, distribution=distribution)
    assert_same_bits(part, whole[:, 7:30].contiguous())


@dtypes
@distributions
def test_a_skipped_step_undoes_and_perturbs_but_does_not_update(dtype, distribution, device):
    control = make_control(2, 2, seed=12, ok=False)
    w = weights(3000, dtype, seed=13)
    for undo, perturb in itertools.product((-1, 0), (-1, 1)):
        step = {**UPDATE, "undo": undo, "undo_sign": 1.0, "perturb": perturb, "perturb_sign": 1.0}
        check([w], [(1, 0, 0, 0, 1)], control, **step, distribution=distribution, device=device)
    still = place(w, 0, device)
    run([still], [[1, 0, 0, 0, 1]], control, **UPDATE, distribution=distribution)
    assert_same_bits(still.cpu(), w)


@dtypes
@distributions
@roundings
def test_lr_zero_keeps_every_bit(dtype, distribution, stochastic, device):
    control = make_control(2, 2, seed=14, lr=0.0)  # row 1 has a weight decay
    w = weights(20000, dtype, seed=15)
    lines = [[1, 0, 0, 0, 0], [2, 5, 0, 0, 1]]
    for isa in each_isa(device):
        got = [place(w, 3, device), place(w, 0, device)]
        run(got, lines, control, directions=2, stochastic=stochastic, distribution=distribution)
        for g in got:
            assert_same_bits(g.cpu(), w, isa)


@dtypes
def test_infinities_and_nan_survive_a_step(dtype, device):
    w = weights(20000, dtype, seed=16)
    control = make_control(1, seed=17)
    special = ~torch.isfinite(w)
    assert special.sum() > 500
    for isa in each_isa(device):
        got = place(w, 0, device)
        run([got], [[1, 0, 0, 0, 0]], control, **{**EVERYTHING, "undo": 0, "directions": 1})
        assert_same_bits(got.cpu()[special], w[special], isa)
        assert not torch.equal(got.cpu()[~special], w[~special])


@dtypes
def test_float32_scalars_are_rounded_once_from_the_control_tensor(dtype, device):
    control = make_control(1, seed=18, lr=1 / 3, eps=1e-3 / 7, weight_decay=1 / 11)
    step = {"undo": 0, "undo_sign": 1.0, "directions": 1, "perturb": 0, "perturb_sign": -1.0}
    check([weights(5000, dtype, seed=19)], [(1, 0, 0, 0, 0)], control, **step, device=device)


@pytest.mark.parametrize("base", [2**31 - 500, 2**32 - 500, 2**34 - 500, 2**63 - 1001])
@dtypes
def test_indices_beyond_32_bits(base, dtype, device):
    control = make_control(2, seed=20)
    w = weights(1001, dtype, seed=21)
    step = {**EVERYTHING, "undo": 0, "perturb": 1}
    check([w], [(1, base, 0, 0, 0)], control, **step, device=device)
    check([w], [(1, 13, 10, base // 101, 0)], control, **step, device=device)
