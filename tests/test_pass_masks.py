"""Masks of a pass: their share, what they depend on and what not, how long they last, and that they hold everything."""

import itertools
import math

import pytest
import torch
from bits import assert_same_bits, weights
from packed import pack, unpack
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

import pyzo
from pyzo import control as layout
from pyzo import ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")  # but where a test asks for `threads`

N = 200000
EVERYTHING = {"directions": 2, "undo": 1, "undo_sign": 1.0, "perturb": 0, "perturb_sign": 1.0, "stochastic": True}
KEEPS = [round(share * layout.KEEP_ALL) for share in (0.01, 0.1, 0.5, 0.9, 0.99)]
SEED, KEY = 7, 3


def moved(
    control: torch.Tensor, *, key: int = KEY, n: int = N, base: int = 0, device: str, **step: object
) -> torch.Tensor:
    """Which elements of a tensor of zeros a pass moves: a perturbation unless `step` says otherwise."""
    w = torch.zeros(n, device=device)
    step = step or {"perturb": 0, "perturb_sign": 1.0}
    run([w], [(key, base, 0, 0, 0)], control, **step, distribution=1, masked=True)
    return w.cpu() != 0


def assert_share(mask: torch.Tensor, p: float) -> None:
    """The share of a Bernoulli sample, within 5 sigma."""
    share = mask.double().mean().item()
    assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / len(mask)), (share, p)


@pytest.mark.parametrize("keep", KEEPS)
def test_share(keep, device):
    assert_share(moved(make_control(1, seed=SEED, keep=keep), device=device), keep / layout.KEEP_ALL)


def test_nothing_and_everything(device):
    control = make_control(1, seed=SEED, keep=0)
    assert not moved(control, device=device).any()
    control = make_control(1, seed=SEED, keep=layout.KEEP_ALL)
    assert moved(control, device=device).all()


def test_thresholds_have_16_bits(device):
    """A mask that keeps more keeps all that one does which keeps less; single steps of 2^-16 are heeded."""
    keeps = [1, 2, 3, 300, 30000, 30001, 65534, 65535]
    masks = [moved(make_control(1, seed=SEED, keep=keep), n=1 << 21, device=device) for keep in keeps]
    for (low, a), (high, b) in itertools.pairwise(zip(keeps, masks, strict=True)):
        assert not (a & ~b).any()
        assert_share(b & ~a, (high - low) / layout.KEEP_ALL)
    assert_share(~masks[-1], 1 / layout.KEEP_ALL)


@pytest.mark.parametrize("keep", KEEPS)
@distributions
def test_the_mask_does_not_know_the_directions(keep, distribution, device):
    """Among the elements that it keeps and among the others, the noise has its own mean and variance."""
    control = make_control(2, seed=SEED, keep=keep)
    mask = moved(control, device=device)
    for j in range(2):
        name = list(ops.DISTRIBUTIONS)[distribution]
        z = pyzo.noise(N, seed=control[1, j].item() % 2**64, key=KEY, distribution=name).double()
        fourth = 3.0 if distribution == 0 else 1.0  # E z^4
        for part in (z[mask], z[~mask]):
            assert abs(part.mean().item()) <= 5 / math.sqrt(len(part))
            assert abs((part**2).mean().item() - 1) <= 5 * math.sqrt((fourth - 1) / len(part)) + 1e-12


def test_the_mask_does_not_know_the_rounding(device):
    """Stochastic rounding moves half of what is half a quantum away from both neighbours, inside a mask of half."""
    control = make_control(1, seed=SEED, keep=layout.KEEP_ALL // 2, lr=1.0, weight_decay=0.0)
    control.view(torch.float64)[layout.LINES, layout.COEFFICIENTS] = 2.0**-8  # half a quantum of bfloat16 at 1
    w = torch.full((N,), 1.25, dtype=torch.bfloat16, device=device)
    run([w], [(KEY, 0, 0, 0, 0)], control, directions=1, distribution=1, stochastic=True, masked=True)
    mask = moved(control, device=device)
    w = w.cpu()
    assert not (w[~mask] != 1.25).any()
    assert_share(w[mask] != 1.25, 0.5)


def test_tensors_steps_runs_and_places_have_masks_of_their_own(device):
    """Independent: the share in both of two masks is the product; equal where all of seed, key and index are equal."""
    keep, p = 20000, 20000 / layout.KEEP_ALL
    control = make_control(1, seed=SEED, keep=keep)
    later = control.clone()
    torch.ops.pyzo.begin_step_(later)
    later[0, layout.OK] = 1
    first = moved(control, device=device)
    others = {
        "key": moved(control, key=KEY + 1, device=device),
        "place": moved(control, base=2**34 + 1, device=device),
        "step": moved(later, device=device),
        "run": moved(make_control(1, seed=SEED + 1, keep=keep), device=device),
    }
    for name, other in others.items():
        assert_share(other, p)
        assert_share(first & other, p * p)
        assert not torch.equal(first, other), name
    assert torch.equal(first[100:], moved(control, base=100, device=device)[: N - 100])
    assert torch.equal(first, moved(control, device=device))


def test_every_pass_of_a_step_has_the_same_mask(device):
    """A perturbation, a change of sides, an update by any rule, and the updates of a conservative step."""
    control = make_control(2, seed=SEED, keep=10000, lr=1.0, eps=1.0)
    control.view(torch.float64)[0, layout.CHOICE] = -1.0
    mask = moved(control, device=device)
    for step in (
        {"undo": 0, "undo_sign": 1.0},
        {"undo": 0, "undo_sign": 1.0, "perturb": 1, "perturb_sign": 0.5},
        {"directions": 1},
        {"directions": 2, "undo": 1, "undo_sign": 3.0},
        {"rule": "sign", "directions": 1},
        {"directions": 1, "update_sign": -1.0, "retract": True},
        {"directions": 1, "chosen": True},
    ):
        assert torch.equal(moved(control, device=device, **step), mask), step


def test_how_long_a_mask_lasts(device):
    refresh = 3
    control = make_control(1, seed=SEED, keep=30000, refresh=refresh)
    control[0, layout.DRAW] = 0
    masks = []
    for _ in range(3 * refresh + 1):
        torch.ops.pyzo.begin_step_(control)
        masks.append(moved(control, n=2000, device=device))
    for step, (a, b) in enumerate(itertools.pairwise(masks), 1):
        assert torch.equal(a, b) == (step % refresh != 0), step
    assert not torch.equal(masks[0], masks[-1])


@rules
@dtypes
def test_outside_the_mask_no_bit_changes_and_inside_it_is_not_there(rule, state_dtype, dtype, device):
    """Zeros of both signs, NaNs with payloads and infinities too, in weights and states, and for any pass."""
    n = 20000
    control = make_control(2, 2, seed=SEED, keep=30000, lr=0.5, eps=0.5)
    w, state = weights(n, dtype, seed=1), make_states(rule, [n], state_dtype, seed=2)
    step = {"rule": rule, "directions": 2, "undo": 0, "undo_sign": 1.0, "perturb": 1, "perturb_sign": 1.0}
    lines = [(KEY, 0, 0, 0, 1)]
    mask = moved(control, n=n, device=device)
    for isa in each_isa(device):
        masked, free = ([t.clone().to(device) for t in (w, *state)] for _ in range(2))
        run(masked[:1], lines, control, state=masked[1:], **step, stochastic=True, masked=True)
        run(free[:1], lines, control, state=free[1:], **step, stochastic=True)
        for before, m, f in zip((w, *state), masked, free, strict=True):
            assert_same_bits(m.cpu()[~mask], before[~mask], isa)
            assert_same_bits(m.cpu()[mask], f.cpu()[mask], isa)


@dtypes
def test_a_masked_pass_from_elsewhere_copies_what_stays(dtype, device):
    control = make_control(1, seed=SEED, keep=30000)
    w = weights(3000, dtype, seed=4)
    step = {"perturb": 0, "perturb_sign": 1.0, "masked": True}
    check([torch.full_like(w, 7.0)], [(KEY, 1, 0, 0, 0)], control, src=[w], **step, device=device)


def test_masks_of_the_rows_are_heeded_only_where_asked(device):
    control = make_control(1, 3, seed=SEED, keep=1000)
    w = [weights(3000, torch.float32, seed=5) for _ in range(3)]
    lines = [(i, 0, 0, 0, i) for i in range(3)]
    step = {"directions": 1, "perturb": 0, "perturb_sign": 1.0}
    all_kept = make_control(1, 3, seed=SEED, keep=layout.KEEP_ALL)
    for isa in each_isa(device):
        unasked, kept = ([place(t, 0, device) for t in w] for _ in range(2))
        run(unasked, lines, control, **step)
        run(kept, lines, all_kept, **step, masked=True)
        for a, b in zip(unasked, kept, strict=True):
            assert_same_bits(a, b, isa)


def test_rows_have_masks_of_their_own_share(device):
    keeps = (1000, layout.KEEP_ALL, 30000)
    control = make_control(1, 3, seed=SEED)
    control[layout.LINES :, layout.KEEP] = torch.tensor(keeps)
    w = [torch.zeros(N, device=device) for _ in keeps]
    lines = [(i, 0, 0, 0, i) for i in range(3)]
    run(w, lines, control, perturb=0, perturb_sign=1.0, distribution=1, masked=True)
    for t, keep in zip(w, keeps, strict=True):
        assert_share(t.cpu() != 0, keep / layout.KEEP_ALL)


# Packed masks and thresholds -----------------------------------------------------------------------------------------


def random_bits(n: int, share: float, *, seed: int) -> torch.Tensor:
    """A packed mask of about this share; its unused bits are set."""
    mask = torch.rand((n + 7) // 8 * 8, generator=torch.Generator().manual_seed(seed)) < share
    mask[n:] = True
    return pack(mask)


@rules
@dtypes
@distributions
@roundings
def test_packed_masks_and_thresholds(rule, state_dtype, dtype, distribution, stochastic, device):
    """Each alone and all together, in shards, from elsewhere and in place; a tensor without a mask among the others."""
    sizes = (1, 9, 1025, 3000)
    w = [weights(n, dtype, seed=n) for n in sizes]
    src = [weights(n, dtype, seed=n + 1) for n in sizes]
    state = make_states(rule, sizes, state_dtype, seed=2)
    bits = [random_bits(n, 0.5, seed=n) for n in sizes]
    bits[1] = bits[1][:0]
    lines = [(k, *SHARDS[k + 3], k % 2) for k in range(len(sizes))]
    step = {**EVERYTHING, "rule": rule, "distribution": distribution, "stochastic": stochastic, "masked": True}
    for masks, keep, threshold, source in (
        (bits, layout.KEEP_ALL, math.inf, []),
        ([], layout.KEEP_ALL, 0.01, src),
        (bits, 30000, 0.1, []),
        (bits, layout.KEEP_ALL - 1, 0.1, src),
    ):
        control = make_control(2, 2, seed=SEED, keep=keep, threshold=threshold)
        check(w, lines, control, state=state, src=source, bits=masks, **step, device=device)


@dtypes
@pytest.mark.parametrize("n", [1, 7, 8, 9, 63, 64, 65, 1023, 1025, 4100])
def test_sizes_and_shards_of_packed_masks(dtype, n, device):
    """The bits are those of the local element, wherever the shard lies."""
    control = make_control(2, seed=n, keep=layout.KEEP_ALL)
    w = [weights(n, dtype, seed=n + k) for k in range(len(SHARDS))]
    lines = [(k, *shard, 0) for k, shard in enumerate(SHARDS)]
    bits = [random_bits(n, 0.5, seed=k) for k in range(len(SHARDS))]
    check(w, lines, control, bits=bits, **EVERYTHING, masked=True, device=device)


@pytest.mark.parametrize("keep", [0, 1, 30000, 65535, layout.KEEP_ALL])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.02, 1e300, math.inf, math.nan])
def test_an_element_moves_iff_every_mask_lets_it(keep, threshold, device):
    n = 20000
    control = make_control(1, seed=SEED, keep=keep, threshold=threshold, eps=1.0)
    seed = reference.read_row(control, 0).mask_seed
    w = 0.02 * torch.randn(n, generator=torch.Generator().manual_seed(1))
    bits = random_bits(n, 0.7, seed=2)
    drawn = reference.random_bits(seed, KEY, reference.MASK_STREAM, torch.arange(n)) < keep
    here = unpack(bits, n) & drawn  # in place no magnitude counts
    want = here & (w.abs() <= torch.tensor(threshold).float())
    step = {"perturb": 0, "perturb_sign": 1.0, "distribution": 1, "masked": True, "bits": [bits.to(device)]}
    for isa in each_isa(device):
        got, in_place = torch.full_like(w, 7.0).to(device), w.clone().to(device)
        run([got], [(KEY, 0, 0, 0, 0)], control, src=[w.to(device)], **step)
        run([in_place], [(KEY, 0, 0, 0, 0)], control, **step)
        assert torch.equal(got.cpu() != w, want), isa
        assert torch.equal(in_place.cpu() != w, here), isa


@rules
@dtypes
def test_outside_packed_masks_and_thresholds_no_bit_changes(rule, state_dtype, dtype, device):
    """In weights and states; inside, all is as in a pass without a mask. A NaN is outside every finite threshold."""
    n, lines = 20000, [(KEY, 0, 0, 0, 0)]
    w, state = weights(n, dtype, seed=1), make_states(rule, [n], state_dtype, seed=2)
    bits = random_bits(n, 0.5, seed=3)
    for threshold in (0.01, math.inf):
        control = make_control(2, seed=SEED, keep=layout.KEEP_ALL, threshold=threshold, lr=0.5, eps=0.5)
        inside = unpack(bits, n) & ((w.float().abs() <= threshold) | (threshold == math.inf))
        for isa in each_isa(device):
            masked, free = ([t.clone().to(device) for t in (w, *state)] for _ in range(2))
            masks = {"bits": [bits.to(device)], "masked": True}
            run(masked[:1], lines, control, src=[w.to(device)], state=masked[1:], **masks, **EVERYTHING, rule=rule)
            run(free[:1], lines, control, state=free[1:], **EVERYTHING, rule=rule)
            for before, m, f in zip((w, *state), masked, free, strict=True):
                assert_same_bits(m.cpu()[~inside], before[~inside], isa)
                assert_same_bits(m.cpu()[inside], f.cpu()[inside], isa)


@dtypes
def test_packed_masks_and_thresholds_are_heeded_only_where_asked(dtype, device):
    w, bits = weights(3000, dtype, seed=4), torch.zeros(375, dtype=torch.uint8)
    control = make_control(2, seed=SEED, keep=0, threshold=0.0)
    check([w], [(KEY, 0, 0, 0, 0)], control, bits=[bits], **EVERYTHING, device=device)
    got = place(w, 0, device)
    run([got], [(KEY, 0, 0, 0, 0)], control, bits=[bits.to(device)], **EVERYTHING)
    assert not torch.equal(got.cpu(), w)


@dtypes
def test_from_elsewhere_the_source_is_what_a_threshold_sees(dtype, device):
    """So that all points of a step are reached from the same weights with the same mask."""
    w = weights(3000, dtype, seed=5)
    control = make_control(1, seed=SEED, keep=layout.KEEP_ALL, threshold=0.01, eps=1.0)
    for where in (torch.zeros_like(w), torch.full_like(w, 7.0)):
        got = where.to(device)
        step = {"perturb": 0, "perturb_sign": 1.0, "distribution": 1, "masked": True}
        run([got], [(KEY, 0, 0, 0, 0)], control, src=[w.to(device)], **step)
        large = ~(w.float().abs() <= torch.tensor(0.01))
        assert_same_bits(got.cpu()[large], w[large])
        assert (got.cpu()[~large] != w[~large]).all()


@dtypes
def test_packed_masks_and_numbers_of_threads(dtype, threads):
    sizes = (40000, 3, 17000, 1, 20001)
    control = make_control(2, seed=22, keep=60000, threshold=1.0)
    w, bits = [weights(n, dtype, seed=n) for n in sizes], [random_bits(n, 0.5, seed=n) for n in sizes]
    lines = [(k, *SHARDS[k], 0) for k in range(len(sizes))]
    check(w, lines, control, bits=bits, **EVERYTHING, masked=True, device="cpu")


def test_many_tensors_with_packed_masks(device):
    """More than a CUDA launch takes, of mixed dtypes."""
    control = make_control(2, 3, seed=23)
    sizes = [(0, 1, 3, 65, 200)[k % 5] for k in range(500)]
    w = [weights(n, DTYPES[k % 3], seed=k) for k, n in enumerate(sizes)]
    bits = [random_bits(n, 0.5, seed=k)[: None if k % 4 else 0] for k, n in enumerate(sizes)]
    lines = [(k, *SHARDS[k % len(SHARDS)], k % 3) for k in range(len(sizes))]
    check(w, lines, control, bits=bits, **EVERYTHING, masked=True, device=device)
