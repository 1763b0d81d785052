"""Passes over listed elements: against the reference, and against the dense pass whose packed mask says the same."""

import itertools

import pytest
import torch
from bits import assert_same_bits, weights
from packed import pack
from sweeps import (
    DTYPES,
    SHARDS,
    check,
    distributions,
    dtypes,
    each_isa,
    make_control,
    make_states,
    place,
    roundings,
    rules,
    run,
)

from pyzo import control as layout
from pyzo import reference

pytestmark = pytest.mark.usefixtures("one_thread")  # but where a test asks for `threads`

UPDATE = {"directions": 2, "stochastic": True}
EVERYTHING = {**UPDATE, "undo": 1, "undo_sign": 1.0, "perturb": 0, "perturb_sign": 1.0}
NONE = torch.empty(0, dtype=torch.int64)


def listed(n: int, share: float, *, seed: int) -> torch.Tensor:
    """A random list of about this share of n elements, in order."""
    return (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share).nonzero().reshape(-1)


def outside(n: int, indices: torch.Tensor) -> torch.Tensor:
    kept = torch.ones(n, dtype=torch.bool)
    kept[indices] = False
    return kept


@rules
@dtypes
@distributions
@roundings
def test_every_rule_dtype_distribution_and_rounding(rule, state_dtype, dtype, distribution, stochastic, device):
    sizes = (1, 9, 1025, 3000)
    control = make_control(2, 2, seed=1)
    indices = [listed(n, share, seed=n) for n, share in zip(sizes, (1.0, 0.5, 1.0, 0.3), strict=True)]
    dst = [weights(n, dtype, seed=n) for n in sizes]
    state = make_states(rule, [len(i) for i in indices], state_dtype, seed=2)
    step = {**EVERYTHING, "rule": rule, "distribution": distribution, "stochastic": stochastic}
    lines = [(k, *SHARDS[k], k % 2) for k in range(len(sizes))]
    check(dst, lines, control, state=state, indices=indices, **step, device=device)


@dtypes
@distributions
def test_everything_a_pass_can_fold(dtype, distribution, device):
    control = make_control(3, 2, seed=3)
    w, indices = weights(1500, dtype, seed=4), listed(1500, 0.2, seed=5)
    for undo, directions, perturb, stochastic in itertools.product((-1, 0, 2), (0, 1, 3), (-1, 0, 2), (False, True)):
        step = {"undo": undo, "undo_sign": 1.0, "directions": directions, "perturb": perturb, "perturb_sign": -1.0}
        step |= {"distribution": distribution, "stochastic": stochastic}
        check([w], [(5, 1021, 0, 0, 1)], control, indices=[indices], **step, device=device)


@dtypes
@distributions
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 15, 16, 17, 1023, 1024, 1025, 2049])
def test_lengths_of_lists_and_shards(dtype, distribution, count, device):
    """Neighbours, elements far apart, the first and the last; in every shard."""
    n = 5000
    spread = torch.randperm(n, generator=torch.Generator().manual_seed(count))[:count].sort().values
    lists = [spread, torch.arange(count), torch.arange(n - count, n)]
    control = make_control(2, seed=count)
    dst = [weights(n, dtype, seed=i) for i in range(len(SHARDS))]
    lines = [(i, *shard, 0) for i, shard in enumerate(SHARDS)]
    indices = [lists[i % 3] for i in range(len(SHARDS))]
    step = {**EVERYTHING, "undo": 0, "perturb": 1, "distribution": distribution, "stochastic": count % 2 == 0}
    check(dst, lines, control, indices=indices, **step, device=device)


@dtypes
@distributions
@pytest.mark.parametrize("base", [2**31 - 500, 2**32 - 500, 2**34 - 500, 2**39 - 500, 2**63 - 1001])
def test_global_indices_beyond_32_bits(base, dtype, distribution, device):
    control = make_control(2, seed=6)
    w, indices = weights(1001, dtype, seed=7), listed(1001, 0.5, seed=8)
    step = {**EVERYTHING, "undo": 0, "perturb": 1, "distribution": distribution}
    check([w], [(1, base, 0, 0, 0)], control, indices=[indices], **step, device=device)
    check([w], [(2**56 - 1, 13, 10, base // 101, 0)], control, indices=[indices], **step, device=device)


@rules
@dtypes
@roundings
def test_is_the_dense_pass_with_the_same_elements_in_a_packed_mask(rule, state_dtype, dtype, stochastic, device):
    """Weights and states, bit for bit; what is not listed keeps every bit (payloads of NaN, -0.0)."""
    n, count = 5000, 2
    control = make_control(2, 2, seed=9, keep=layout.KEEP_ALL)
    lines = [(3, *SHARDS[4], 0), (4, *SHARDS[5], 1)]
    w = [weights(n, dtype, seed=10 + i) for i in range(count)]
    indices = [listed(n, 0.25, seed=12 + i) for i in range(count)]
    state = make_states(rule, [n] * count, state_dtype, seed=14)
    step = {**EVERYTHING, "rule": rule, "stochastic": stochastic, "masked": True}
    for isa in each_isa(device):
        dense, dense_state = ([t.clone().to(device) for t in ts] for ts in (w, state))
        bits = [pack(~outside(n, i)).to(device) for i in indices]
        run(dense, lines, control, state=dense_state, bits=bits, **step)
        got = [t.clone().to(device) for t in w]
        compact = [s[indices[k % count]].to(device) for k, s in enumerate(state)]
        run(got, lines, control, state=compact, indices=[i.to(device) for i in indices], **step)
        for g, d, before, i in zip(got, dense, w, indices, strict=True):
            assert_same_bits(g.cpu(), d.cpu(), isa)
            assert_same_bits(g.cpu()[outside(n, i)], before[outside(n, i)], isa)
            assert not torch.equal(g.cpu()[i], before[i])
        for k, (c, s) in enumerate(zip(compact, dense_state, strict=True)):
            assert_same_bits(c.cpu(), s.cpu()[indices[k % count]], isa)


@dtypes
@distributions
def test_masks_of_the_rows_are_heeded_too(dtype, distribution, device):
    """keep and threshold, alone and together; only where asked."""
    w, indices = weights(4000, dtype, seed=15), listed(4000, 0.5, seed=16)
    src = weights(len(indices), dtype, seed=17)
    for keep, threshold, masked in itertools.product((0, 30000, layout.KEEP_ALL), (0.01, torch.inf), (False, True)):
        control = make_control(2, 1, seed=18, keep=keep, threshold=threshold)
        step = {**EVERYTHING, "distribution": distribution, "masked": masked}
        for sources in ([], [src]):
            check([w], [(1, 3, 0, 0, 0)], control, src=sources, indices=[indices], **step, device=device)


@rules
def test_a_mask_keeps_states_of_listed_elements(rule, state_dtype, device):
    n = 3000
    indices = listed(n, 0.5, seed=19)
    control = make_control(2, 1, seed=20, keep=20000, threshold=0.1)
    w = weights(n, torch.bfloat16, seed=21)
    state = make_states(rule, [len(indices)], state_dtype, seed=22)
    step = {**EVERYTHING, "rule": rule, "masked": True}
    check([w], [(1, 0, 0, 0, 0)], control, state=state, indices=[indices], **step, device=device)


@dtypes
@distributions
def test_compact_sources(dtype, distribution, device):
    """The listed elements come from the source alone, whatever dst holds there; the others stay."""
    control = make_control(2, 2, seed=23)
    sizes = (1, 64, 1025, 5000)
    indices = [listed(n, 0.4, seed=n) for n in sizes]
    src = [weights(len(i), dtype, seed=24) for i in indices]
    dst = [weights(n, dtype, seed=25) for n in sizes]
    lines = [(k, 3, 0, 0, k % 2) for k in range(len(sizes))]
    for step in ({"perturb": 0, "perturb_sign": 1.0}, {**UPDATE, "undo": 0, "undo_sign": 1.0}):
        check(dst, lines, control, src=src, indices=indices, distribution=distribution, **step, device=device)


@dtypes
def test_a_pass_that_does_nothing_copies_the_source(dtype, device):
    """What restores listed elements from a copy of them, bits of NaN included, with a mask or without."""
    n = 3000
    w, indices = weights(n, dtype, seed=26), listed(n, 0.4, seed=27)
    control = make_control(1, seed=28, keep=100, threshold=1e-3)
    for isa, masked in itertools.product(each_isa(device), (False, True)):
        dst = torch.full_like(w, 7.0).to(device)
        lists = {"src": [w[indices].to(device)], "indices": [indices.to(device)]}
        run([dst], [(1, 0, 0, 0, 0)], control, **lists, masked=masked)
        assert_same_bits(dst.cpu()[indices], w[indices], isa)
        assert (dst.cpu()[outside(n, indices)] == 7.0).all()


@rules
def test_empty_lists_move_nothing(rule, state_dtype, device):
    control = make_control(2, seed=29)
    w = [weights(100, dtype, seed=30) for dtype in DTYPES]
    lines = [(k, 0, 0, 0, 0) for k in range(3)]
    lists = [NONE, torch.tensor([7]), NONE]
    state = make_states(rule, [0, 1, 0], state_dtype, seed=31)
    check(w, lines, control, state=state, indices=lists, **EVERYTHING, rule=rule, device=device)
    got = [place(t, 1, device) for t in w]
    state = [s.to(device) for s in make_states(rule, [0, 0, 0], state_dtype, seed=31)]
    run(got, lines, control, state=state, indices=[NONE.to(device)] * 3, **EVERYTHING, rule=rule)
    for g, t in zip(got, w, strict=True):
        assert_same_bits(g.cpu(), t)


def test_many_tensors_of_one_call(device):
    """More than a CUDA launch takes, of mixed dtypes, with empty tensors among them."""
    control = make_control(2, 3, seed=32)
    sizes = [(0, 1, 3, 65, 200)[k % 5] for k in range(700)]
    w = [weights(n, DTYPES[k % 3], seed=k) for k, n in enumerate(sizes)]
    indices = [listed(n, 0.3, seed=k) for k, n in enumerate(sizes)]
    lines = [(k, *SHARDS[k % len(SHARDS)], k % 3) for k in range(len(sizes))]
    check(w, lines, control, indices=indices, **EVERYTHING, device=device)


@dtypes
@rules
def test_numbers_of_threads(rule, state_dtype, dtype, threads):
    control = make_control(2, seed=33)
    sizes = (40000, 3, 17000)
    indices = [listed(n, 0.5, seed=n) for n in sizes]
    state = make_states(rule, [len(i) for i in indices], state_dtype, seed=34)
    dst = [weights(n, dtype, seed=n) for n in sizes]
    lines = [(k, *SHARDS[k], 0) for k in range(len(dst))]
    check(dst, lines, control, state=state, indices=indices, **EVERYTHING, rule=rule, device="cpu")


def test_a_skipped_step_undoes_and_perturbs_but_does_not_update(device):
    control = make_control(2, 2, seed=35, ok=False)
    w, indices = weights(3000, torch.bfloat16, seed=36), listed(3000, 0.3, seed=37)
    state = make_states("adam", [len(indices)], torch.float32, seed=38)
    check([w], [(1, 0, 0, 0, 1)], control, state=state, indices=[indices], **EVERYTHING, rule="adam", device=device)
    still, kept = place(w, 0, device), [s.clone().to(device) for s in state]
    lists = {"state": kept, "indices": [indices.to(device)]}
    run([still], [(1, 0, 0, 0, 1)], control, **lists, **UPDATE, rule="adam")
    for got, before in zip((still, *kept), (w, *state), strict=True):
        assert_same_bits(got.cpu(), before)


@dtypes
def test_steps_over_a_list_return_to_the_weights(dtype, device):
    """lr 0: perturb, change sides, restore and update leave what a dense step with the same mask leaves."""
    n = 3000
    control = make_control(1, seed=39, lr=0.0, eps=1e-3, keep=layout.KEEP_ALL)
    w, indices = weights(n, dtype, seed=40), listed(n, 0.3, seed=41)
    bits = [pack(~outside(n, indices)).to(device)]
    got, dense = (w.clone().to(device) for _ in range(2))
    for step in (
        {"perturb": 0, "perturb_sign": 1.0},
        {"undo": 0, "undo_sign": -1.0, "perturb": 0, "perturb_sign": -1.0},
        {"undo": 0, "undo_sign": 1.0, "directions": 1},
    ):
        run([got], [(1, 0, 0, 0, 0)], control, indices=[indices.to(device)], **step)
        run([dense], [(1, 0, 0, 0, 0)], control, bits=bits, **step, masked=True)
        assert_same_bits(got, dense)


@pytest.mark.parametrize("retract", [False, True])
@pytest.mark.parametrize("rule", ["sgd", "sign"])
def test_factors_of_the_update(rule, retract, device):
    control = make_control(2, 2, seed=42)
    control.view(torch.float64)[0, layout.CHOICE] = -1.0
    w, indices = weights(2000, torch.float16, seed=43), listed(2000, 0.3, seed=44)
    for chosen, sign in itertools.product((False, True), (1.0, -0.5)):
        step = {"rule": rule, "update_sign": sign, "chosen": chosen, "retract": retract, **UPDATE}
        check([w], [(1, 3, 0, 0, 1)], control, indices=[indices], **step, device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_passes_over_indices_outside_the_tensor():
    """They cannot be read before the kernel runs; it skips them, weights and states, and touches nothing else."""
    control = make_control(2, seed=45)
    memory = torch.ones(300, device="cuda")
    indices = torch.tensor([-(2**62), -101, -1, 3, 100, 199, 2**40], device="cuda")
    state = torch.ones(len(indices), device="cuda")
    step = {**EVERYTHING, "rule": "momentum"}
    run([memory[100:200]], [(1, 0, 0, 0, 0)], control, state=[state], indices=[indices], **step)
    assert (memory != 1.0).nonzero().reshape(-1).tolist() == [103]
    assert (state != 1.0).nonzero().reshape(-1).tolist() == [3]


def test_the_reference_lists_elements_of_the_dense_field():
    """The specification itself: a listed element has the noise, rounding bits and mask bits of its place."""
    n = 500
    control = make_control(1, seed=46, keep=30000)
    w, indices = weights(n, torch.bfloat16, seed=47, special=False), listed(n, 0.4, seed=48)
    table = torch.tensor([[1, 77, 10, 33, 0]])
    rest = (0, -1, 0.0, 0, 1, 1.0, False, False, 0, 1.0, True, True, False)
    dense, got = w.clone(), w.clone()
    reference.pass_([], [dense], [], [], [], [], table, control, *rest)
    reference.pass_([], [got], [], [], [indices], [], table, control, *rest)
    assert_same_bits(got[indices], dense[indices])
    assert_same_bits(got[outside(n, indices)], w[outside(n, indices)])
