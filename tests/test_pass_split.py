"""Updates of bfloat16 weights with low bits: against the reference, and against the same pass over float32 masters."""

import itertools
import math

import pytest
import torch
from bits import assert_same_bits, bits, weights
from packed import pack
from sweeps import (
    SHARDS,
    check,
    distributions,
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

BF16 = torch.bfloat16
UPDATE = {"directions": 2, "stochastic": True}
LARGEST = 0x7F7F7FFF  # the largest master whose weight is finite


def any_bits(n: int, *, seed: int) -> torch.Tensor:
    """Low bits of every kind, whatever the weight."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(-(2**15), 2**15, (n,), generator=generator, dtype=torch.int16)
    extreme = torch.tensor([0, 1, -1, 2**15 - 1, -(2**15)], dtype=torch.int16)
    chosen = extreme[torch.randint(0, 5, (n,), generator=generator)]
    return torch.where(torch.rand(n, generator=generator) < 0.3, chosen, low)


def parts(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight, low = reference.split_master(master)
    return weight.to(BF16), low


def masters(n: int, *, seed: int) -> torch.Tensor:
    """float32 numbers of many magnitudes, zeros, subnormals and infinities among them, that have two parts."""
    m = weights(n, torch.float32, seed=seed)
    return torch.where(m.isnan() | (m.isfinite() & (m.abs() > 3e38)), torch.tensor(-0.0), m)


def floats(*codes: int) -> torch.Tensor:
    return torch.tensor([code - (code >> 31 << 32) for code in codes], dtype=torch.int32).view(torch.float32)


# The specification ----------------------------------------------------------------------------------------------------


def test_a_master_comes_back_from_its_parts():
    """Around every bfloat16 number, at every distance that matters, of both signs; weights are rounded to nearest."""
    codes = torch.arange(0x7F80)[:, None] * 65536 + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    codes = codes[codes <= LARGEST]
    for m in (codes.to(torch.int32).view(torch.float32), -codes.to(torch.int32).view(torch.float32)):
        weight, low = parts(m)
        assert_same_bits(reference.join_master(weight, low), m)
        tie = codes % 65536 == 0x8000
        assert_same_bits(weight[~tie], m.to(BF16)[~tie])
        assert (weight[tie].float().abs() > m[tie].abs()).all()
        assert (low[tie] == -(2**15)).all()


def test_parts_of_numbers_that_have_none_of_their_own():
    """Finite masters that round to infinity, infinities, NaN, and zeros whose low bits are those of another weight."""
    m = floats(0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0xFF7F8000, 0xFF7FFFFF, 0xFF800000)
    held = floats(LARGEST, LARGEST, 0x7F800000, LARGEST | 1 << 31, LARGEST | 1 << 31, 0xFF800000)
    assert_same_bits(reference.join_master(*parts(m)), held)
    special = torch.tensor([0x7F80, -0x80, 0x7FC1, 0x7F81, -1], dtype=torch.int16).view(BF16)
    for low in (0, 1, -1, 2**15 - 1, -(2**15)):
        assert_same_bits(reference.join_master(special, torch.full((5,), low, dtype=torch.int16)), special.float())
    zeros = torch.tensor([0.0, -0.0], dtype=BF16)
    assert_same_bits(reference.join_master(zeros, torch.tensor([-1, -(2**15)], dtype=torch.int16)), zeros.float())


# Against the reference ------------------------------------------------------------------------------------------------


@rules
@distributions
@roundings
def test_every_rule_distribution_and_rounding(rule, state_dtype, distribution, stochastic, device):
    """In place and from elsewhere, in shards, for good and as a trial; any low bits beside any weight."""
    sizes = (1, 9, 1025, 3000)
    control = make_control(2, 2, seed=1)
    dst, src = ([weights(n, BF16, seed=n + k) for n in sizes] for k in range(2))
    state = make_states(rule, sizes, state_dtype, seed=2)
    low = [any_bits(n, seed=n) for n in sizes]
    step = {"rule": rule, "directions": 2, "distribution": distribution, "stochastic": stochastic}
    lines = [(k, *SHARDS[k + 2], k % 2) for k in range(len(sizes))]
    for sources, trial in (([], False), (src, False), (src, True)):
        check(dst, lines, control, state=state, src=sources, low=low, **step, trial=trial, device=device)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 65, 1023, 1025])
def test_sizes_and_shards(n, device):
    control = make_control(1, seed=n)
    dst = [weights(n, BF16, seed=n + i) for i in range(len(SHARDS))]
    low = [any_bits(n, seed=i) for i in range(len(SHARDS))]
    check(dst, [(i, *shard, 0) for i, shard in enumerate(SHARDS)], control, low=low, directions=1, device=device)


def test_weights_of_other_dtypes_beside(device):
    """They have no low bits, and round as ever."""
    control, sizes = make_control(2, 2, seed=3), (100, 0, 65, 3000, 7)
    dtypes = (torch.float32, BF16, torch.float16, BF16, BF16)
    dst = [weights(n, dtype, seed=n) for n, dtype in zip(sizes, dtypes, strict=True)]
    low = [any_bits(n if dtype == BF16 else 0, seed=n) for n, dtype in zip(sizes, dtypes, strict=True)]
    lines = [(k, 0, 0, 0, k % 2) for k in range(len(sizes))]
    check(dst, lines, control, low=low, **UPDATE, update_sign=-1.0, chosen=True, device=device)


@rules
def test_masks(rule, state_dtype, device):
    """Of the field, packed, by the magnitude of the weight as it is stored, and all together."""
    n = 3000
    w, src, state = weights(n, BF16, seed=4), weights(n, BF16, seed=5), make_states(rule, [n], state_dtype, seed=6)
    packed = pack(torch.rand(n, generator=torch.Generator().manual_seed(7)) < 0.5)
    for keep, threshold, chosen, source in (
        (30000, math.inf, [], []),
        (layout.KEEP_ALL, math.inf, [packed], []),
        (layout.KEEP_ALL, 0.01, [], [src]),
        (50000, 0.1, [packed], [src]),
    ):
        control = make_control(2, 1, seed=8, keep=keep, threshold=threshold)
        step = {**UPDATE, "rule": rule, "masked": True, "low": [any_bits(n, seed=9)]}
        check([w], [(1, 77, 0, 0, 0)], control, state=state, src=source, bits=chosen, **step, device=device)


@rules
@distributions
def test_listed_elements(rule, state_dtype, distribution, device):
    """In place and from compact sources; low bits are as long as the list."""
    sizes = (1, 9, 3000)
    control = make_control(2, 2, seed=10)
    dst = [weights(n, BF16, seed=n) for n in sizes]
    shares = (1.0, 0.5, 0.6)
    indices = [
        torch.arange(n)[torch.rand(n, generator=torch.Generator().manual_seed(n)) < s]
        for n, s in zip(sizes, shares, strict=True)
    ]
    counts = [len(i) for i in indices]
    src, low = [weights(c, BF16, seed=c) for c in counts], [any_bits(c, seed=c) for c in counts]
    state = make_states(rule, counts, state_dtype, seed=11)
    step = {**UPDATE, "rule": rule, "distribution": distribution, "masked": True}
    lines = [(k, *SHARDS[k + 4], k % 2) for k in range(len(sizes))]
    for sources, trial in (([], False), (src, True)):
        check(
            dst, lines, control, state=state, src=sources, indices=indices, low=low, **step, trial=trial, device=device
        )


def test_numbers_of_threads(threads):
    sizes = (40000, 3, 17000, 1, 20001)
    control = make_control(1, seed=12)
    dst, low = [weights(n, BF16, seed=n) for n in sizes], [any_bits(n, seed=n) for n in sizes]
    check(dst, [(k, 0, 0, 0, 0) for k in range(len(sizes))], control, low=low, directions=1, device="cpu")


def test_many_tensors(device):
    """More than a CUDA launch takes."""
    sizes = [(0, 1, 3, 65, 200)[k % 5] for k in range(700)]
    control = make_control(1, seed=13)
    dst, low = [weights(n, BF16, seed=k) for k, n in enumerate(sizes)], [any_bits(n, seed=n) for n in sizes]
    check(dst, [(k, 0, 0, 0, 0) for k in range(len(sizes))], control, low=low, directions=1, device=device)


def test_low_bits_do_not_count_where_nothing_is_updated(device):
    """Perturbed, taken back and copied: as a pass without them."""
    control, w, low = make_control(2, seed=14), weights(3000, BF16, seed=15), any_bits(3000, seed=16)
    for undo, perturb in itertools.product((-1, 0), (-1, 1)):
        step = {"undo": undo, "undo_sign": 1.0, "perturb": perturb, "perturb_sign": -1.0, "src": [w.to(device)]}
        for isa in each_isa(device):
            got, want, beside = (place(t, 1, device) for t in (w, w, low))
            run([got], [(1, 0, 0, 0, 0)], control, **step, low=[beside])
            run([want], [(1, 0, 0, 0, 0)], control, **step)
            assert_same_bits(got.cpu(), want.cpu(), isa)
            assert_same_bits(beside.cpu(), low, isa)


# What two parts promise -----------------------------------------------------------------------------------------------


@rules
@distributions
def test_the_parts_move_as_a_float32_weight_does(rule, state_dtype, distribution, device):
    """Bit for bit over ten updates, under a mask, and with states that round stochastically."""
    n = 5000
    master, state = masters(n, seed=17), make_states(rule, [n], state_dtype, seed=18)
    step = {**UPDATE, "rule": rule, "distribution": distribution, "masked": True}
    for isa in each_isa(device):
        whole, weight, low = (place(t, 0, device) for t in (master, *parts(master)))
        kept, other = ([place(s, 0, device) for s in state] for _ in range(2))
        for draw in range(10):
            control = make_control(2, 1, seed=19 + draw, keep=40000, lr=1e-4)
            run([whole], [(1, 3, 0, 0, 0)], control, state=kept, **step)
            run([weight], [(1, 3, 0, 0, 0)], control, state=other, low=[low], **step)
        assert_same_bits(reference.join_master(weight.cpu(), low.cpu()), whole.cpu(), isa)
        for a, b in zip(other, kept, strict=True):
            assert_same_bits(a.cpu(), b.cpu(), isa)
        moved = bits(whole) != bits(master)
        assert moved.double().mean() > 0.5
        assert (bits(weight) == bits(parts(master)[0]))[moved].double().mean() > 0.05  # moves of the low bits alone


@rules
@roundings
def test_what_does_not_move_keeps_every_bit(rule, state_dtype, stochastic, device):
    """lr = 0, a skipped step, everything masked: any low bits beside any weight."""
    n = 20000
    w, low, state = weights(n, BF16, seed=20), any_bits(n, seed=21), make_states(rule, [n], state_dtype, seed=22)
    for scalars in ({"lr": 0.0}, {"ok": False}, {"keep": 0}):
        control = make_control(2, 2, seed=23, **scalars)
        for isa in each_isa(device):
            got, beside, *kept = (place(t, 5, device) for t in (w, low, *state))
            step = {"rule": rule, "directions": 2, "stochastic": stochastic, "masked": True}
            run([got], [(1, 0, 0, 0, 1)], control, state=kept, low=[beside], **step)
            assert_same_bits(got.cpu(), w, f"{isa} {scalars}")
            assert_same_bits(beside.cpu(), low, f"{isa} {scalars}")


def test_infinities_and_nan_keep_their_bits_and_those_beside_them(device):
    w, low = weights(20000, BF16, seed=24), any_bits(20000, seed=25)
    special = ~torch.isfinite(w)
    assert special.sum() > 500
    for isa in each_isa(device):
        got, beside = (place(t, 0, device) for t in (w, low))
        run([got], [(1, 0, 0, 0, 0)], make_control(2, seed=26), low=[beside], **UPDATE)
        assert_same_bits(got.cpu()[special], w[special], isa)
        assert_same_bits(beside.cpu()[special], low[special], isa)
        assert (beside.cpu() != low)[~special].double().mean() > 0.5


def push(weight: torch.Tensor, low: torch.Tensor, by: float) -> None:
    """Adds `by` to masters in place: decay alone, so that the noise does not matter, of rate -by / w."""
    w = reference.join_master(weight.cpu(), low.cpu())[0].item()
    control = make_control(1, seed=27, lr=1.0, weight_decay=-by / w)
    control.view(torch.float64)[layout.LINES, layout.COEFFICIENTS] = 0.0
    run([weight], [(1, 0, 0, 0, 0)], control, low=[low], directions=1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_finite_master_never_makes_an_infinite_weight(sign, device):
    """Beyond the last weight but below float32's end it is held, and comes back; beyond float32's it is infinite."""
    last, quantum = torch.finfo(BF16).max, 2.0**120
    for isa in each_isa(device):
        weight, low = (t.to(device) for t in parts(torch.full((20,), sign * last)))
        push(weight, low, sign * 0.75 * quantum)
        assert_same_bits(weight.cpu(), torch.full((20,), sign * last, dtype=BF16), isa)
        assert (low == 2**15 - 1).all()
        push(weight, low, -sign * quantum)
        assert (reference.join_master(weight.cpu(), low.cpu()).abs() < last).all()
        push(weight, low, sign * last)
        assert (weight == sign * math.inf).all() and not low.any()
        push(weight, low, -sign * last)
        assert (weight == sign * math.inf).all() and not low.any()


def test_a_weight_that_was_set_to_zero_from_outside_learns_on(device):
    """Whatever lies beside it: negative low bits, which would borrow from the sign, count as none."""
    low = torch.tensor([-5, 0, 5], dtype=torch.int16, device=device)
    for isa in each_isa(device):
        weight, beside = torch.zeros(3, dtype=BF16, device=device), low.clone()
        control = make_control(1, seed=28, lr=1.0, weight_decay=0.0)
        run([weight], [(1, 0, 0, 0, 0)], control, low=[beside], directions=1)
        assert (weight != 0).all() and weight.isfinite().all(), isa


def test_a_trial_makes_the_weights_of_the_update_and_leaves_the_low_bits(device):
    w, low = weights(3000, BF16, seed=29).to(device), any_bits(3000, seed=30).to(device)
    control = make_control(2, seed=31)
    tried, done, beside = w.clone(), w.clone(), low.clone()
    run([tried], [(1, 0, 0, 0, 0)], control, src=[w], low=[beside], trial=True, **UPDATE)
    assert_same_bits(beside, low)
    run([done], [(1, 0, 0, 0, 0)], control, src=[w], low=[beside], **UPDATE)
    assert_same_bits(tried, done)
    assert not torch.equal(beside, low)
