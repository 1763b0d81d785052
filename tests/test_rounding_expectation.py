"""Stochastic rounding by the pass against its exact expectation, element by element: every random word, many seeds."""

import math
from functools import cache

import pytest
import torch
from bits import assert_same_bits
from sweeps import each_isa, make_control, place, run

from pyzo import control as layout
from pyzo import reference

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = 1 << 16
N, KEY, LINE = 1 << 20, 3, [(3, 0, 0, 0, 0)]  # a field in which every word occurs
DTYPES = (torch.bfloat16, torch.float16)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def still(**scalars: float) -> torch.Tensor:
    """The control tensor of a step whose estimate is 0, so that decay alone moves weights."""
    control = make_control(1, seed=5, lr=1.0, **{"weight_decay": 0.0, **scalars})
    control.view(torch.float64)[layout.LINES, layout.COEFFICIENTS] = 0.0
    return control


@cache
def every_word() -> torch.Tensor:
    """Indices at which each of the 65,536 random words of the step stands once, in order."""
    seed = int(still()[0, layout.ROUNDING_SEED]) % 2**64
    words = reference.random_bits(seed, KEY, reference.ROUNDING_STREAM, torch.arange(N))
    first = torch.full((WORDS,), -1).scatter_(0, words.flip(0), torch.arange(N).flip(0))
    assert (first >= 0).all()
    return first.sort().values


def quantum(x: float, dtype: torch.dtype) -> float:
    """The distance of neighbouring values of `dtype` at x, on the side away from zero."""
    info = torch.finfo(dtype)
    return max(2.0 ** math.floor(math.log2(abs(x))), info.smallest_normal) * info.eps


def starts(dtype: torch.dtype) -> list[float]:
    """Weights inside a binade and at both of its ends, where subnormal numbers begin and end, the largest; some < 0."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    inside = [1.0, 1.5, 2.0 - info.eps, 0.75 * 2.0**-12, 3 * 2.0**-20]
    edges = [info.smallest_normal, info.smallest_normal - tiny, 2 * info.smallest_normal, 5 * tiny, tiny]
    return [-x if i % 2 else x for i, x in enumerate((*inside, *edges, info.max, 1.0))]


# In quanta away from zero: single bits, halves, several quanta, and towards zero.
MOVES = (2.0**-16, 2.0**-9, 0.3, 0.5, 0.9, 1 - 2.0**-16, 3.7, -(2.0**-9), -0.25, -0.7)


def updated(w: float, move: float, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """A control tensor whose update moves w by about `move` quanta, and the float32 that it makes before it rounds."""
    decay = torch.tensor(-move * quantum(w, dtype) / w, dtype=torch.float64).float()
    one, weight = torch.ones(()), torch.tensor(w)
    v = reference.fma(-one, reference.fma(decay, weight, torch.zeros(())), weight)
    return still(weight_decay=decay.item()), v.item()


def assert_expected(rounded: torch.Tensor, v: float, dtype: torch.dtype, what: str) -> None:
    """Over all words v becomes one of its two neighbours, and the one away from zero as often as its fraction says.

    In expectation that is v itself, where 16 bits below the last place are all that a float32 has (bfloat16, and
    float16 where it is normal), and else less than 2^-16 of a quantum towards zero.
    """
    values, top = rounded.double(), torch.finfo(dtype).max
    if v == 0 or abs(v) >= top + quantum(top, dtype):
        assert (values == (math.copysign(math.inf, v) if v else 0.0)).all(), what
        return
    q = quantum(v, dtype)
    low = math.floor(abs(v) / q) * q
    high = low + q if low < top else math.inf
    fraction = (abs(v) - low) / q
    away = values.abs() == high
    assert (away | (values.abs() == low)).all() and (values.sign() * math.copysign(1, v) >= 0).all(), what
    assert int(away.sum()) == math.floor(fraction * WORDS), (what, v, fraction)
    if math.isfinite(high):
        bias = (abs(v) - values.abs().sum().item() / WORDS) / q
        exact = dtype == torch.bfloat16 or abs(v) >= torch.finfo(dtype).smallest_normal
        assert bias == 0 if exact else 0 <= bias < 2.0**-16, (what, v, bias)


@dtypes
def test_over_all_random_words_a_weight_becomes_the_float32_of_its_update(dtype, device):
    """By passes over a list of the places of the words: a value to each pass."""
    indices = [every_word().to(device)]
    for isa in each_isa(device):
        dst = torch.empty(N, dtype=dtype, device=device)
        for w in starts(dtype):
            src = [torch.full((WORDS,), w, dtype=dtype, device=device)]
            for move in MOVES:
                control, v = updated(w, move, dtype)
                run([dst], LINE, control, src=src, indices=indices, directions=1, stochastic=True)
                assert_expected(dst[indices[0]].cpu(), v, dtype, f"{isa}, from {w} by {move} quanta")


@dtypes
@pytest.mark.parametrize("move", [2.0**-9, 0.3, -0.25])
def test_so_it_does_in_passes_over_whole_tensors(dtype, move, device):
    """The same elements, with neighbours: those of a pass over a list, and of one that undoes and perturbs besides."""
    indices = every_word().to(device)
    for isa in each_isa(device):
        for w in (1.0, -1.5, 5 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps):
            start = torch.full((N,), w, dtype=dtype, device=device)
            control, v = updated(w, move, dtype)
            dst = torch.empty_like(start)
            run([dst], LINE, control, src=[start], directions=1, stochastic=True)
            assert_expected(dst[indices].cpu(), v, dtype, f"{isa}, from {w}")
            still_more = torch.empty_like(start)
            control.view(torch.float64)[layout.LINES, layout.EPS] = 0.0
            step = {"undo": 0, "undo_sign": 1.0, "perturb": 0, "perturb_sign": 1.0}
            run([still_more], LINE, control, src=[start], directions=1, stochastic=True, **step)
            assert_same_bits(still_more, dst, isa)


@pytest.mark.parametrize("retract", [False, True])
def test_overflow_is_as_likely_as_it_is_near(retract, device):
    """A float16 weight half way (a quarter, ..) to what would be its next value; complementary bits, too."""
    indices, top = [every_word().to(device)], torch.finfo(torch.float16).max
    for isa in each_isa(device):
        dst = torch.empty(N, dtype=torch.float16, device=device)
        src = [torch.full((WORDS,), top, dtype=torch.float16, device=device)]
        for move in (2.0**-13, 0.25, 0.5, 0.75, 1 - 2.0**-13, 1.0, 2.0):
            control, v = updated(top, move, torch.float16)
            step = {"directions": 1, "stochastic": True, "retract": retract}
            run([dst], LINE, control, src=src, indices=indices, **step)
            assert int(dst[indices[0]].isinf().sum()) == WORDS * min(move, 1.0), (isa, v)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_over_all_random_words_a_state_becomes_the_float32_of_its_update(rule, device):
    """bfloat16 states decay by a factor that is theirs alone; each meets every word, in an order of its own."""
    indices, dtype = [every_word().to(device)], torch.bfloat16
    dst = torch.zeros(N, device=device)
    for isa in each_isa(device):
        for start in (1.0, 1.5, 2.0**-130):
            for factor in (1 - 2.0**-9, 0.75, 0.3, 2.0**-15):
                control = still(beta1=factor, beta2=factor, rule_eps=1.0, age=2)
                state = [torch.full((WORDS,), start, dtype=dtype, device=device) for _ in reference.STATES[rule]]
                step = {"rule": rule, "directions": 1, "stochastic": True}
                run([dst], LINE, control, state=state, indices=indices, **step)
                kept = torch.tensor(start), torch.tensor(factor, dtype=torch.float64)
                m = reference.fma((1 - kept[1]).float(), -kept[0], kept[0])
                scaled = reference.fma(kept[1].float(), kept[0], torch.zeros(()))
                for s, v in zip(state, (scaled,) if rule == "momentum" else (m, scaled), strict=True):
                    assert_expected(s.cpu(), v.item(), dtype, f"{isa}, {rule} from {start} by {factor}")


@dtypes
def test_over_many_steps_every_element_becomes_the_float32_of_its_update_on_average(dtype, device):
    """The words that an element gets from step to step are uniform: its moves within the bound of their variance.

    By Bernstein's inequality the share of `steps` draws of probability p is off by more than t with probability at
    most 2 exp(-steps t^2 / (2 (p (1 - p) + t / 3))); t makes that 1e-6 for all elements together.
    """
    n, steps = 512, 4096
    w = torch.full((n,), 1.0, dtype=dtype, device=device)
    away = torch.zeros(n, dtype=torch.int64, device=device)
    control, v = updated(1.0, 0.3, dtype)
    out = torch.empty_like(w)
    for _ in range(steps):
        torch.ops.pyzo.begin_step_(control)
        run([out], LINE, control, src=[w], directions=1, stochastic=True)
        away += out > w
    p = (v - 1.0) / quantum(1.0, dtype)
    log = math.log(2 * n / 1e-6)
    t = log / (3 * steps) + math.sqrt((log / (3 * steps)) ** 2 + 2 * log * p * (1 - p) / steps)
    assert ((away.cpu() / steps - p).abs() <= t).all()
    # Neither do elements move together: their shares vary as much as independent ones do, within 5 sigma.
    variance = (away.cpu() / steps).double().var().item()
    assert abs(variance / (p * (1 - p) / steps) - 1) <= 5 * math.sqrt(2 / (n - 1))


@dtypes
def test_the_same_step_rounds_alike(dtype, device):
    """On every instruction set, over a list and over all, and again."""
    control, _ = updated(1.0, 0.3, dtype)
    seen = []
    for _ in each_isa(device):
        for _ in range(2):
            w = place(torch.full((5000,), 1.0, dtype=dtype), 3, device)
            run([w], LINE, control, directions=1, stochastic=True)
            seen.append(w.cpu())
        listed = torch.full((5000,), 1.0, dtype=dtype, device=device)
        run([listed], LINE, control, indices=[torch.arange(5000, device=device)], directions=1, stochastic=True)
        seen.append(listed.cpu())
    for other in seen[1:]:
        assert_same_bits(other, seen[0])
