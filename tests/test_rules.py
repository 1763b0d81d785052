"""Updates by every rule against the reference, bit for bit, and what holds for any of them.

Skips, first updates, lr = 0, shards, threads, moments at the ends of the range, updates that are taken back.
"""

import itertools

import pytest
import torch
from bits import assert_same_bits, bits, weights
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

pytestmark = pytest.mark.usefixtures("one_thread")  # but where a test asks for `threads`

stateless = pytest.mark.parametrize("rule", ["sgd", "sign"])
stateful = pytest.mark.parametrize("rule", ["momentum", "adam"])
half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@rules
@dtypes
@distributions
def test_updates(rule, state_dtype, dtype, distribution, device):
    """First and later updates, with and without decay, option, mask, undo and perturbation, one direction and three."""
    control = make_control(3, 3, seed=1)
    n = 1500
    w, state = weights(n, dtype, seed=2), make_states(rule, [n], state_dtype, seed=3)
    turn = itertools.cycle(itertools.product((-1, 2, 0), (0, 1, 2)))  # perturb, row
    for stochastic, undo, directions, masked in itertools.product((False, True), (-1, 2), (1, 3), (False, True)):
        perturb, row = next(turn)
        step = {"rule": rule, "directions": directions, "stochastic": stochastic, "masked": masked}
        step |= {"undo": undo, "undo_sign": 1.0, "perturb": perturb, "perturb_sign": -1.0}
        lines = [(5, 1021, 0, 0, row)]
        check([w], lines, control, state=state, **step, distribution=distribution, device=device)


@rules
@dtypes
@roundings
def test_undo_and_update_alone_in_every_row(rule, state_dtype, dtype, stochastic, device):
    """The passes that most steps end with, which have code of their own."""
    control = make_control(1, 6, seed=4)
    sizes = [1100] * 6
    dst, state = [weights(n, dtype, seed=i) for i, n in enumerate(sizes)], make_states(rule, sizes, state_dtype, seed=5)
    lines = [(i, 3 * i, 0, 0, i) for i in range(6)]
    for undo in (-1, 0):
        step = {"rule": rule, "directions": 1, "undo": undo, "undo_sign": 1.0, "stochastic": stochastic}
        check(dst, lines, control, state=state, **step, device=device)


@rules
@dtypes
@pytest.mark.parametrize("n", [1, 65, 1025])
def test_sizes_shards_and_misaligned_storage(rule, state_dtype, dtype, n, device):
    control = make_control(2, 2, seed=n)
    dst = [weights(n, dtype, seed=n + i) for i in range(len(SHARDS))]
    state = make_states(rule, [n] * len(SHARDS), state_dtype, seed=n)
    lines = [(i, *shard, i % 2) for i, shard in enumerate(SHARDS)]
    step = {"rule": rule, "directions": 2, "undo": 0, "undo_sign": 1.0, "stochastic": True, "masked": n % 2 == 0}
    check(dst, lines, control, state=state, **step, distribution=n % 3 % 2, device=device)


@stateful
def test_states_stand_in_the_order_of_the_operator(rule, device):
    """The first state of all tensors before the second, whatever the dtypes and sizes of the weights."""
    control = make_control(1, 3, seed=6)
    sizes = [700, 0, 65, 3, 2050]
    dst = [weights(n, DTYPES[i % 3], seed=i) for i, n in enumerate(sizes)]
    state = make_states(rule, sizes, torch.bfloat16, seed=7)
    lines = [(i, 5 * i, 0, 0, i % 3) for i in range(len(sizes))]
    check(dst, lines, control, state=state, rule=rule, directions=1, stochastic=True, masked=True, device=device)


@pytest.mark.parametrize(("rule", "state_dtype"), [("momentum", torch.bfloat16), ("adam", torch.float32)])
def test_numbers_of_threads(rule, state_dtype, threads):
    control = make_control(2, 1, seed=8)
    sizes = (40000, 3, 20001)
    dst, state = [weights(n, torch.bfloat16, seed=n) for n in sizes], make_states(rule, sizes, state_dtype, seed=9)
    lines = [(i, *SHARDS[2 * i + 1], 0) for i in range(len(sizes))]
    step = {"rule": rule, "directions": 2, "stochastic": True, "masked": True}
    check(dst, lines, control, state=state, **step, device="cpu")


@rules
@roundings
def test_a_shard_gets_what_the_whole_gets(rule, state_dtype, stochastic, device):
    control = make_control(2, 2, seed=10)
    whole = [weights(60 * 50, torch.bfloat16, seed=11), *make_states(rule, [60 * 50], state_dtype, seed=12)]
    whole = [t.view(60, 50).to(device) for t in whole]
    part = [t[:, 7:30].contiguous() for t in whole]
    step = {"rule": rule, "directions": 2, "undo": 1, "undo_sign": 1.0, "stochastic": stochastic, "masked": True}
    run(whole[:1], [[1, 0, 0, 0, 1]], control, state=whole[1:], **step)
    run(part[:1], [[1, 7, 23, 50, 1]], control, state=part[1:], **step)
    for p, t in zip(part, whole, strict=True):
        assert_same_bits(p, t[:, 7:30].contiguous(), rule)


@rules
@dtypes
@pytest.mark.parametrize("directions", [1, 3])
def test_a_skipped_step_keeps_every_bit_of_weights_and_states(rule, state_dtype, dtype, directions, device):
    control = make_control(3, 1, seed=13, ok=False)
    w, state = weights(3000, dtype, seed=14), make_states(rule, [3000], state_dtype, seed=15)
    for isa in each_isa(device):
        got, after = place(w, 1, device), [place(s, 0, device) for s in state]
        step = {"rule": rule, "directions": directions, "stochastic": True, "masked": directions == 3}
        run([got], [(1, 0, 0, 0, 0)], control, state=after, **step)
        assert_same_bits(got.cpu(), w, isa)
        for a, s in zip(after, state, strict=True):
            assert_same_bits(a.cpu(), s, isa)


@rules
@dtypes
@roundings
def test_lr_zero_moves_states_but_no_bit_of_a_weight(rule, state_dtype, dtype, stochastic, device):
    control = make_control(1, 2, seed=16, lr=0.0)  # row 1 decays and has the option
    w = weights(5000, dtype, seed=17)
    state = make_states(rule, [5000, 5000], state_dtype, seed=18)
    step = {"rule": rule, "directions": 1, "stochastic": stochastic}
    lines = [(1, 0, 0, 0, 0), (2, 5, 0, 0, 1)]
    check([w, w], lines, control, state=state, **step, device=device)
    got, after = [w.clone().to(device) for _ in range(2)], [s.clone().to(device) for s in state]
    run(got, lines, control, state=after, **step)
    for g in got:
        assert_same_bits(g.cpu(), w)
    for a, s in zip(after, state, strict=True):
        assert (bits(a) != bits(s)).float().mean() > 0.5


def test_the_first_update_forgets_the_buffer_and_is_not_dampened(device):
    n, line = 3000, [(1, 0, 0, 0, 0)]
    buffers = {"zero": torch.zeros(n), "noise": torch.randn(n, generator=torch.Generator().manual_seed(19))}
    after = {}
    for age, dampening, start in itertools.product((1, 2), (0.0, 0.5), buffers):
        w, b = torch.zeros(n, device=device), buffers[start].clone().to(device)
        control = make_control(1, 1, seed=20, age=age, dampening=dampening, weight_decay=0.0)
        run([w], line, control, state=[b], rule="momentum", directions=1)
        after[age, dampening, start] = b.cpu()
    first = after[1, 0.0, "zero"]
    for dampening, start in itertools.product((0.0, 0.5), buffers):
        assert_same_bits(after[1, dampening, start], first)
    assert_same_bits(after[2, 0.5, "zero"], 0.5 * first)
    assert not torch.equal(after[2, 0.0, "noise"], after[2, 0.0, "zero"])


def test_the_first_step_of_adam_is_lr_long(device):
    """m / (1 - beta1) over the root of v / (1 - beta2) is the sign of g, whatever its size and the betas."""
    n = 3000
    control = make_control(1, 1, seed=21, age=1, lr=0.125, weight_decay=0.0, rule_eps=0.0)
    w, m, v = (torch.zeros(n, device=device) for _ in range(3))
    run([w], [(1, 0, 0, 0, 0)], control, state=[m, v], rule="adam", directions=1)
    # Roundings on the way: of m, of g^2 (twice), of the root, the quotient and four scalars, half an ulp each.
    assert (w.cpu().abs() - 0.125).abs().max() <= 0.125 * 10 * 2.0**-24
    assert torch.equal(torch.sign(w), -torch.sign(m))


@pytest.mark.parametrize(("m", "v"), [(0.0, 0.0), (1.0, 0.0), (1.0, 2.0**-149), (-1.0, 2.0**-140), (2.0**-149, 1.0)])
@pytest.mark.parametrize("rule_eps", [0.0, 1e-8])
def test_moments_at_the_ends_of_the_range(m, v, rule_eps, device):
    """Subnormal and zero second moments: roots and quotients are exact there too, on every instruction set."""
    n = 67
    dst = [weights(n, dtype, seed=22) for dtype in DTYPES]
    control = make_control(1, 1, seed=23, rule_eps=rule_eps, weight_decay=0.0)
    control.view(torch.float64)[layout.LINES, layout.COEFFICIENTS] = 0.0  # g = 0: the moments only decay
    state = [torch.full((n,), value) for value in (m, v) for _ in dst]
    lines = [(i, 0, 0, 0, 0) for i in range(len(dst))]
    check(dst, lines, control, state=state, rule="adam", directions=1, device=device)


@dtypes
def test_scalars_are_derived_in_float64_and_rounded_once(dtype, device):
    """1 - beta1, 1 - beta2, lr / correction1 and the like would round differently in float32."""
    scalars = {
        "lr": 1 / 3,
        "weight_decay": 1 / 11,
        "beta1": 1 - 1e-9 / 3,
        "beta2": 1 - 1e-11 / 7,
        "rule_eps": 1e-9 / 13,
    }
    for rule, option in itertools.product(("momentum", "adam"), (False, True)):
        control = make_control(1, 1, seed=24, age=3, dampening=1 - 1e-9 / 7, option=option, **scalars)
        w, state = weights(2000, dtype, seed=25), make_states(rule, [2000], torch.float32, seed=26)
        check([w], [(1, 0, 0, 0, 0)], control, state=state, rule=rule, directions=1, device=device)


@dtypes
@roundings
def test_sign_moves_every_weight_by_lr_or_not_at_all(dtype, stochastic, device):
    """Coefficients of any size and sign; a g of 0 or NaN moves nothing."""
    w = torch.ones(2000, dtype=dtype)
    step = {"rule": "sign", "directions": 1, "stochastic": stochastic}
    for c, moves in ((1e30, True), (-1e-30, True), (0.0, False), (-0.0, False), (torch.nan, False)):
        control = make_control(1, 1, seed=27, lr=0.25, weight_decay=0.0)
        control.view(torch.float64)[layout.LINES, layout.COEFFICIENTS] = c
        got = w.clone().to(device)
        run([got], [(1, 0, 0, 0, 0)], control, **step)
        assert set(got.tolist()) == ({0.75, 1.25} if moves else {1.0})
        check([w], [(1, 0, 0, 0, 0)], control, **step, device=device)


@stateless
@dtypes
@distributions
def test_factors_of_the_update(rule, dtype, distribution, device):
    """update_sign and, where asked, the choice of a conservative step multiply lr; a choice of 0 keeps every bit."""
    control = make_control(2, 2, seed=28)
    w = weights(1500, dtype, seed=29)
    line = [(1, 3, 0, 0, 1)]
    for choice, chosen, sign, stochastic in itertools.product(
        (1.0, -1.0, 0.0), (False, True), (1.0, -1.0), (False, True)
    ):
        control.view(torch.float64)[0, layout.CHOICE] = choice
        step = {"rule": rule, "directions": 2, "update_sign": sign, "chosen": chosen, "stochastic": stochastic}
        check([w], line, control, **step, distribution=distribution, retract=sign < 0, device=device)
        if chosen and choice == 0.0:
            got = w.clone().to(device)
            run([got], line, control, **step, distribution=distribution)
            assert_same_bits(got.cpu(), w)


@half_types
@stateless
@distributions
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_retract_takes_back_a_stochastic_update(dtype, rule, distribution, sign, device):
    """Exactly, where weight and result lie between the same powers of two."""
    n, line = 1 << 19, [(1, 5, 0, 0, 0)]  # bits that are off by one show in 2^-16 of the elements
    generator = torch.Generator().manual_seed(30)
    start = 1.3 + 0.4 * torch.rand(n, generator=generator)  # lr |g| below 0.3
    w = torch.where(torch.rand(n, generator=generator) < 0.5, -start, start).to(dtype)
    control = make_control(1, 1, seed=31, lr=0.0356, weight_decay=0.0)  # between quanta of both types
    control.view(torch.float64)[layout.LINES, layout.COEFFICIENTS] = 1.0
    step = {"rule": rule, "directions": 1, "distribution": distribution, "stochastic": True}
    for isa in each_isa(device):
        moved = w.clone().to(device)
        run([moved], line, control, **step, update_sign=sign)
        assert (moved.cpu() != w).float().mean() > 0.8
        back, forth = moved.clone(), moved.clone()
        run([back], line, control, **step, update_sign=-sign, retract=True)
        assert_same_bits(back.cpu(), w, isa)
        run([forth], line, control, **step, update_sign=-sign)
        assert (forth.cpu() != w).float().mean() > 0.1  # the same bits twice do not take back


@half_types
def test_retract_rounds_with_the_complement(dtype, device):
    w = weights(1 << 19, dtype, seed=34)  # as above
    step = {"directions": 1, "update_sign": -1.0, "retract": True, "stochastic": True, "distribution": 1}
    check([w], [(1, 5, 0, 0, 0)], make_control(1, 1, seed=35, lr=1e-3), **step, device=device)


@stateless
def test_retract_says_nothing_where_rounding_is_to_nearest(rule, device):
    control = make_control(1, 1, seed=32)
    for dtype, stochastic in ((torch.float32, True), (torch.bfloat16, False)):
        w = weights(2000, dtype, seed=33)
        results = [w.clone().to(device) for _ in range(2)]
        for got, retract in zip(results, (False, True), strict=True):
            step = {"rule": rule, "directions": 1, "stochastic": stochastic, "update_sign": -1.0}
            run([got], [(1, 0, 0, 0, 0)], control, **step, retract=retract)
        assert_same_bits(*results)
