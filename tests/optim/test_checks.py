"""The eleven checks that a zeroth-order implementation can be held to, by their numbers: the list of faults of earlier
ones. Number 8 for several processes is in test_ranks.py."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from bits import assert_same_bits, weights
from compare import assert_same, copies, same, states
from models import EXACT, METHODS, STATEFUL, batch, closure_of, cross_entropy, dtypes, methods, transformer
from torch import Tensor, nn
from torch.nn import functional

import pyzo
from bench.allocations import marked, outside_closure
from pyzo import reference
from pyzo.estimators import OneSided, TwoSided
from pyzo.masks import Random
from pyzo.optim import ZOSGD, ForwardGradSGD, ZOConservativeSGD, ZOSignSGD

pytestmark = pytest.mark.usefixtures("one_thread")


def scripted(losses: list[float], watch: Callable[[], object] = lambda: None) -> Callable[[], Tensor]:
    """A closure that returns these losses in turn, over and over, and watches the weights at each."""
    turn = 0

    def closure() -> Tensor:
        nonlocal turn
        watch()
        turn += 1
        return torch.tensor(losses[(turn - 1) % len(losses)], dtype=torch.float64)

    return closure


def parameter(w: Tensor) -> tuple[str, nn.Parameter]:
    return "w", nn.Parameter(w.clone())


# 1. A step with lr = 0 leaves every weight as it is, bit for bit -----------------------------------------------------


@methods
@dtypes
def test_check_1_lr_zero_changes_no_bit(method, dtype):
    """Zeros of both signs, subnormals, infinities and NaN of every kind among the weights; the loss sees none of them.

    Under the decay that multiplies weights, the rules read them all the same.
    """
    w, seen = (nn.Parameter(weights(n, dtype, seed=n, special=n > 500)) for n in (600, 300))
    before = copies([w, seen])
    opt = METHODS[method]([("w", w), ("seen", seen)], lr=0.0, weight_decay=0.5, **EXACT)
    for _ in range(5):
        opt.step(lambda: seen.float().tanh().square().mean())
    assert_same([w, seen], before)
    assert opt.skipped == 0
    assert opt.last.coefficients.abs().max() > 0


# 2. The noise depends on seed, name and index alone ------------------------------------------------------------------


@dtypes
def test_check_2_probes_are_the_weights_plus_the_rounded_field(dtype):
    """Whatever the order and the dtype of the parameters: z is drawn in float32, the sum is rounded once."""
    start = {name: weights(n, dtype, seed=n, special=False) for name, n in (("a", 300), ("b", 77), ("c", 1))}
    for names in ("abc", "cab"):
        params = [(name, nn.Parameter(start[name].clone())) for name in names]
        seen = []
        opt = ZOSGD(params, lr=0.0, eps=1e-2, seed=5, **EXACT)
        opt.step(scripted([1.0], lambda seen=seen, params=params: seen.append(copies(p for _, p in params))))
        for sign, probe in zip((1.0, -1.0), seen, strict=True):
            for name, got in zip(names, probe, strict=True):
                key = pyzo.tensor_key(name)
                z = pyzo.noise(len(got), seed=reference.direction_seed(5, 1, 0), key=key)
                eps = torch.tensor(sign * 1e-2, dtype=torch.float64).float()
                want = reference.fma(eps, z, start[name].float()).to(dtype)
                assert_same_bits(got, want, f"{name} at {sign}")


# 3. Coefficients come from the losses themselves, in float64 ---------------------------------------------------------


@pytest.mark.parametrize("loss_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_check_3_coefficient_times_two_eps_is_the_loss_difference(loss_dtype, seed):
    model = transformer()
    x, y = batch()
    eps = 2.0**-10  # a division by 2 eps is exact
    opt = ZOSGD(model, lr=1e-2, eps=eps, seed=seed)
    for _ in range(5):
        opt.step(lambda: cross_entropy(model, x, y).to(loss_dtype) / 3)
        c, (up, down) = opt.last.coefficients[0, 0], opt.last.losses
        assert c != 0
        assert c * 2 * eps == up - down


def test_check_3_at_any_eps_it_is_the_correctly_rounded_quotient():
    opt = ZOSGD([parameter(torch.ones(3))], eps=1e-3)
    losses = [1 / 3, 1 / 7]
    opt.step(scripted(losses))
    assert opt.last.coefficients.item() == (losses[0] - losses[1]) / (2 * 1e-3)


# 4. What should be the same algorithm makes the same bits ------------------------------------------------------------

EPS = 2.0**-7
UP, DOWN = [EPS, -EPS], [-EPS, EPS]  # losses at +-eps that make the coefficients 1 and -1


def momentum_zero_beside_momentum(params: list[Any], **common: Any) -> ZOSGD:
    """The rule with momentum, in a group without any."""
    other = nn.Parameter(torch.ones(2))
    return ZOSGD([{"params": params, "momentum": 0.0}, {"params": [("other", other)], "momentum": 0.9}], **common)


VARIANTS = {
    "momentum rule": (momentum_zero_beside_momentum, UP + DOWN),
    "sign of the scalar": (partial(ZOSignSGD, form="scalar"), UP + DOWN),
    "density 1": (partial(ZOSGD, mask=Random(0.0)), UP + DOWN),
    "conservative": (ZOConservativeSGD, [0.5, *UP, 0.0, 1.0, 0.5, *DOWN, 0.0, 1.0]),
    "conservative, one-sided": (
        partial(ZOConservativeSGD, estimator=OneSided()),
        [0.0, EPS, -1.0, 1.0, 0.0, -EPS, -1.0, 1.0],
    ),
    "one-sided": (partial(ZOSGD, estimator=OneSided()), [0.0, EPS, 0.0, -EPS]),
}
SAME_PROBES = ("momentum rule", "sign of the scalar", "density 1")  # as two-sided ZO-SGD; in place they round alike


def trained(make: Callable[..., Any], losses: list[float], dtype: torch.dtype, store: str) -> list[Tensor]:
    params = [("a", nn.Parameter(weights(1500, dtype, seed=1))), ("b", nn.Parameter(weights(70, dtype, seed=2)))]
    opt = make(params, lr=0.1, eps=EPS, weight_decay=0.1, store=store, seed=7)
    closure = scripted(losses)
    for _ in range(6):
        opt.step(closure)
    assert opt.last.coefficients[0].tolist() == [-1.0]
    return copies(p for _, p in params)


@dtypes
@pytest.mark.parametrize("variant", VARIANTS)
def test_check_4_variants_of_zo_sgd_are_the_same_bits(variant, dtype):
    want = trained(ZOSGD, UP + DOWN, dtype, "snapshot")
    assert_same(trained(*VARIANTS[variant], dtype, "snapshot"), want)
    if variant in SAME_PROBES:
        assert_same(trained(*VARIANTS[variant], dtype, "inplace"), trained(ZOSGD, UP + DOWN, dtype, "inplace"))


# 5. A conservative step ends at the best of its three points ---------------------------------------------------------

NAN, INF = math.nan, math.inf
CANDIDATES = [  # l(w), l(w - lr g), l(w + lr g), choice
    (1.0, 0.5, 0.7, 1),
    (1.0, 0.7, 0.5, -1),
    (1.0, 1.5, 2.0, 0),
    (1.0, 1.0, 1.0, 1),
    (1.0, 0.5, 0.5, 1),
    (1.0, 2.0, 1.0, 0),
    (1.0, NAN, 0.5, -1),
    (1.0, -INF, 0.5, -1),
    (1.0, 0.5, NAN, 1),
    (1.0, 0.5, -INF, 1),
    (1.0, NAN, INF, 0),
]
ESTIMATORS = {"two-sided": (TwoSided(), UP), "q=2": (TwoSided(2), UP + DOWN), "one-sided": (OneSided(), [1.0 + EPS])}


@dtypes
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_check_5_a_conservative_step_ends_at_the_argmin(estimator, dtype, rounding):
    probes, losses = ESTIMATORS[estimator]
    w = nn.Parameter(weights(500, dtype, seed=3))
    opt = ZOConservativeSGD([("w", w)], lr=0.1, eps=EPS, estimator=probes, rounding=rounding, weight_decay=0.1, **EXACT)
    for here, down, up, choice in CANDIDATES:
        points, before = [], w.detach().clone()
        loss = opt.step(scripted([here, *losses, down, up], lambda points=points: points.append(w.detach().clone())))
        assert_same_bits(w.detach(), {0: before, 1: points[-2], -1: points[-1]}[choice])
        assert len({tuple(p.tolist()) for p in (before.nan_to_num(), points[-2].nan_to_num())}) == 2
        assert_same_bits(points[0], before)
        assert opt.last.choice == choice
        torch.testing.assert_close(opt.last.candidates, torch.tensor([here, down, up]).double(), equal_nan=True)
        assert loss == here


@dtypes
def test_check_5_on_a_model(dtype):
    """The loss after the step is the least of the three losses, exactly."""
    model, choices = transformer(dtype), set()
    closure, points = closure_of(model), []

    def watched() -> Tensor:
        points.append(copies(model))
        return closure()

    opt = METHODS["conservative"](model, lr=0.5, **EXACT)
    with torch.no_grad():
        for _ in range(30):
            points.clear()
            before = copies(model)
            opt.step(watched)
            best = opt.last.candidates.argmin().item()
            assert_same(model, [before, points[3], points[4]][best])
            assert closure().double() == opt.last.candidates[best]
            choices.add(opt.last.choice)
    assert choices >= {0, 1}


def test_check_5_in_place_it_ends_within_rounding_of_the_argmin():
    for here, down, up, choice in CANDIDATES[:3]:
        w, twin = (nn.Parameter(weights(500, torch.float32, seed=3, special=False).clamp(-1, 1)) for _ in range(2))
        losses = [here, *UP, down, up]
        for p, store in ((w, "inplace"), (twin, "snapshot")):
            ZOConservativeSGD([("w", p)], lr=0.1, eps=EPS, store=store).step(scripted(losses))
        difference = (w.detach() - twin.detach()).abs().max()
        assert difference <= 8 * 2.0**-24 * 2, choice  # seven passes and the last rounding, at magnitudes below 2


# 6. A mask lets the share through that it says, and the same elements in all passes ----------------------------------

COUNT = 1 << 16


def moved(p: Tensor, start: Tensor) -> Tensor:
    return (p.detach() != start).flatten()


@pytest.mark.parametrize("sparsity", [0.0, 2.0**-12, 0.01, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_check_6_the_masked_fraction_is_the_sparsity(sparsity):
    w = nn.Parameter(torch.zeros(COUNT))
    opt = ZOSGD([("w", w)], lr=1.0, eps=EPS, mask=Random(sparsity), distribution="rademacher", **EXACT)
    for step in range(3):
        with torch.no_grad():
            w.zero_()
        opt.step(scripted(UP))
        expected, deviation = COUNT * (1 - sparsity), (COUNT * sparsity * (1 - sparsity)) ** 0.5
        assert abs(moved(w, torch.zeros(COUNT)).sum().item() - expected) <= 3 * deviation, step


@methods
def test_check_6_the_mask_is_the_same_in_all_passes_and_binds_weights_and_states(method):
    """Every probe and the end of the step move the same elements; the others keep weight, decay and state out."""
    w = nn.Parameter(torch.full((4000,), 0.5))
    start, sets = w.detach().clone(), []
    common = {"mask": Random(0.3, refresh=1), "distribution": "rademacher", "weight_decay": 0.1}
    opt = METHODS[method]([("w", w)], **{"lr": 1e-2, **common}, **EXACT)

    def closure() -> Tensor:
        if not torch.equal(w.detach(), start):
            sets.append(moved(w, start))
        return (w.double() * torch.linspace(-1, 2, 4000, dtype=torch.float64)).sum()

    opt.step(closure)
    sets.append(moved(w, start))
    at_the_weights = "sided" in method or method in ("fzoo", "conservative", "forward")  # one call is for l(w)
    assert len(sets) == METHODS[method].calls - at_the_weights + 1
    for other in sets[1:]:
        assert torch.equal(other, sets[0])
    assert 0.6 < sets[0].double().mean() < 0.8
    for state in states(opt):
        assert torch.equal(state != 0, sets[0])


@pytest.mark.parametrize("method", ["sgd", *STATEFUL])
def test_check_6_elements_outside_stay_until_the_mask_is_refreshed(method):
    w = nn.Parameter(torch.full((2000,), 0.5))
    opt = METHODS[method]([("w", w)], mask=Random(0.5, refresh=3), weight_decay=0.1, distribution="rademacher", **EXACT)
    slope, masks = torch.linspace(-1, 2, 2000, dtype=torch.float64), []
    for _ in range(9):
        start = w.detach().clone()
        opt.step(lambda: slope @ w.double())
        masks.append(moved(w, start))
    for i, j in combinations(range(9), 2):
        agreement = (masks[i] == masks[j]).double().mean().item()
        if i // 3 == j // 3:
            assert agreement == 1.0
        else:  # of independent masks: 1/2 +- 5 sigma
            assert abs(agreement - 0.5) < 5 * 0.5 / 2000**0.5
    stayed = ~(masks[0] | masks[3] | masks[6])
    assert stayed.sum() > 100
    assert (w.detach()[stayed] == 0.5).all()


def test_check_6_groups_have_masks_of_their_own_and_tensors_too():
    a, b, c = (nn.Parameter(torch.zeros(4000)) for _ in range(3))
    groups = [{"params": [("a", a), ("b", b)], "mask": Random(0.5)}, {"params": [("c", c)], "mask": None}]
    opt = ZOSGD(groups, lr=1.0, eps=EPS, distribution="rademacher", **EXACT)
    opt.step(scripted(UP))
    zero = torch.zeros(4000)
    assert moved(c, zero).all()
    assert abs((moved(a, zero) == moved(b, zero)).double().mean().item() - 0.5) < 5 * 0.5 / 4000**0.5


# 7. Tensors of one shape get noise of their own ----------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_check_7_equal_shapes_get_uncorrelated_noise(distribution):
    """Across layers, directions and steps: correlations of 4,096 elements within 5 sigma, sigma = 1/64."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    opt = ZOSGD(model, lr=0.0, eps=1.0, estimator=OneSided(2), distribution=distribution, **EXACT)
    seen: list[Tensor] = []
    for _ in range(2):
        opt.step(scripted([1.0], lambda: seen.extend(p.flatten() for p in copies(model))))
    z = torch.stack([p for p in seen if p.count_nonzero()]).double()
    assert len(z) == 6 * 2 * 2
    correlation = torch.corrcoef(z) - torch.eye(len(z))
    assert correlation.abs().max() < 5 / 64


# 8. The parts of a batch make the step of the whole ------------------------------------------------------------------


@methods
def test_check_8_losses_summed_over_micro_batches_are_those_of_the_whole(method):
    """Losses that are whole numbers over 2^10: sums in any order are exact, so that the weights are equal in bits."""
    x = torch.randn(64, 30, generator=torch.Generator().manual_seed(1))

    def loss(w: Tensor, rows: Tensor) -> Tensor:  # of each row by itself, in fixed point; smooth enough for `forward`
        terms = ((rows * w).tanh() * 1024).double()
        return (terms + (terms.detach().round() - terms.detach())).sum() / 1024

    ends = []
    for size in (64, 16):
        w = nn.Parameter(torch.linspace(-1, 1, 30))
        opt = METHODS[method]([("w", w)], lr=1e-3, eps=0.1)
        for _ in range(5):
            opt.step(lambda w=w, size=size: sum(loss(w, rows) for rows in x.split(size)))
        ends.append(w.detach().clone())
    if method == "forward":  # the derivative is no fixed-point number
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)
    else:
        assert_same_bits(ends[1], ends[0])


def test_check_8_real_losses_agree_within_their_rounding():
    x, y = batch()
    ends = []
    for size in (12, 3):
        model = transformer()
        opt = ZOSGD(model, lr=1e-3, eps=1e-2)
        parts = list(zip(x.split(size), y.split(size), strict=True))

        def closure(model=model, parts=parts) -> Tensor:
            return sum(functional.cross_entropy(model(a), b, reduction="sum") for a, b in parts)

        for _ in range(5):
            opt.step(closure)
        ends.append(copies(model))
    # 5 steps; losses near 15 are off by 2^-20 each: c by 2^-19 / (2 eps), the weights by lr |c| |z| with |z| < 6.7
    for a, b in zip(*ends, strict=True):
        assert (a - b).abs().max() < 5 * 1e-3 * 2.0**-19 / 2e-2 * 6.7 + 40 * 2.0**-24


# 9. When a step returns, its update is in the weights ----------------------------------------------------------------


@pytest.mark.parametrize("store", ["inplace", "snapshot"])
def test_check_9_the_update_is_in_the_weights_when_the_step_returns(store):
    w = nn.Parameter(torch.linspace(-1, 1, 200))
    opt = ZOSGD([("w", w)], lr=1e-2, eps=1e-2, store=store)
    for _ in range(3):
        before = w.detach().clone()
        opt.step(lambda: w.sin().sum())
        c, z = opt.last.coefficients[0, 0].float(), pyzo.noise(200, seed=opt.last.seeds[0], key=pyzo.tensor_key("w"))
        want = reference.fma(torch.tensor(-1e-2), c * z, before)
        tolerance = 0 if store == "snapshot" else 4 * 2.0**-24  # four roundings below 1
        assert (w.detach() - want).abs().max() <= tolerance
        assert (w.detach() - before).abs().max() > 1e-4


@methods
def test_check_9_nothing_is_pending_after_the_last_step(method):
    """A further step with lr = 0 moves nothing: no update was put off until then."""
    model = transformer()
    opt = METHODS[method](model, **EXACT)
    closure = closure_of(model)
    for _ in range(3):
        before = copies(model)
        opt.step(closure)
        if method != "conservative":
            assert not same(model, before)
    after = copies(model)
    opt.param_groups[0]["lr"] = 0.0
    opt.step(closure)
    assert_same(model, after)


# 10. Forward passes alone, in the memory of inference ----------------------------------------------------------------


@methods
def test_check_10_no_gradients_and_no_memory_that_grows_with_the_model(method):
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    opt = METHODS[method](model, store="inplace")
    x = torch.ones(1, 256)
    closure = marked(lambda: model(x).square().mean())
    opt.step(closure)  # the store and the states are there from now on
    used = outside_closure(lambda: opt.step(closure))
    tangents = size if method == "forward" else 0  # one per weight
    assert used.total_bytes <= tangents + (64 << 10), used
    assert all(p.grad is None for p in model.parameters())


# 11. The estimate: its mean, its variance, and what it tends to ------------------------------------------------------

STEPS, SIZE = 2000, 12


def estimates(make: Callable[..., Any], closure: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """The estimates themselves: at w = 0 with lr = 1 the weights after a step are -g."""
    w = nn.Parameter(torch.zeros(SIZE))
    opt = make([("w", w)], lr=1.0, eps=2.0**-7, seed=11, **EXACT)
    for _ in range(STEPS):
        with torch.no_grad():
            w.zero_()
        opt.step(lambda: closure(w.double()))
        yield -w.detach().double()


SLOPE = torch.linspace(-1, 2, SIZE, dtype=torch.float64)
CURVATURE = torch.linspace(0.5, 3, SIZE, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "q", "distribution"),
    [
        ("two-sided", 1, "normal"),
        ("two-sided", 1, "rademacher"),
        ("two-sided", 4, "normal"),
        ("two-sided", 4, "rademacher"),
        ("one-sided", 1, "rademacher"),
        ("one-sided", 3, "normal"),
        ("forward", 1, "normal"),
        ("forward", 2, "rademacher"),
    ],
)
def test_check_11_mean_and_variance_of_the_estimate(kind, q, distribution):
    """On l(w) = a.w + 1/2 sum_i h_i w_i^2 at w = 0: E[g] = a and, within 5 sigma,

        E ||g||^2 = (d + q + 1) / q ||a||^2 for normal, (d + q - 1) / q ||a||^2 for Rademacher directions,

    since E (a.z)^2 ||z||^2 is (d + 2) ||a||^2 and d ||a||^2, and E of products of two directions is ||a||^2. Two-sided
    differences of a quadratic are exact. One-sided ones are of l(w) = a.w: what curvature adds is bias of order eps.
    """
    h = 0 * CURVATURE if kind == "one-sided" else CURVATURE
    make = {
        "two-sided": partial(ZOSGD, estimator=TwoSided(q)),
        "one-sided": partial(ZOSGD, estimator=OneSided(q)),
        "forward": partial(ForwardGradSGD, q=q),
    }[kind]
    g = torch.stack(
        list(estimates(partial(make, distribution=distribution), lambda w: SLOPE @ w + (h * w * w).sum() / 2))
    )
    norm = SLOPE @ SLOPE
    variance = (norm + SLOPE**2 if distribution == "normal" else norm - SLOPE**2) / q  # of each g_i
    assert ((g.mean(0) - SLOPE).abs() < 5 * (variance / STEPS).sqrt()).all()
    squares = (g * g).sum(1)
    expected = (SIZE + q + (1 if distribution == "normal" else -1)) / q * norm
    assert (squares.mean() - expected).abs() < 5 * squares.std() / STEPS**0.5
    assert squares.std() / STEPS**0.5 < 0.05 * expected  # the bound says something


def test_check_11_the_estimate_of_fzoo_points_along_the_gradient():
    """Normalised by the deviation of the losses, g is the one-sided estimate times a positive number per step."""
    closure = lambda w: SLOPE @ w  # noqa: E731
    common = {"distribution": "rademacher"}
    plain = estimates(partial(ZOSGD, estimator=OneSided(4), **common), closure)
    scaled = estimates(partial(ZOSGD, estimator=OneSided(4, "std"), **common), closure)
    for _ in range(50):
        a, b = next(plain), next(scaled)
        torch.testing.assert_close(b / b.norm(), a / a.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("q", [1, 3])
def test_check_11_two_sided_tends_to_the_forward_gradient(q):
    """The error of two-sided differences is eps^2/6 times a third derivative: a quarter for each halving of eps."""
    generator = torch.Generator().manual_seed(2)
    matrix, start = torch.randn(5, 40, generator=generator).double() / 6, torch.randn(40, generator=generator)

    def coefficients(make: Callable[..., Any], **common: Any) -> Tensor:
        w = nn.Parameter(start.clone())
        opt = make([("w", w)], lr=1e-3, seed=8, **common, **EXACT)
        opt.step(lambda: (matrix @ w.double()).sin().sum())
        return opt.last.coefficients[0]

    exact = coefficients(ForwardGradSGD, q=q)
    errors = [coefficients(ZOSGD, estimator=TwoSided(q), eps=2.0**-k) - exact for k in (3, 4, 5)]
    for coarse, fine in pairwise(errors):
        torch.testing.assert_close(coarse / fine, torch.full((q,), 4.0, dtype=torch.float64), rtol=0.05, atol=0)
    assert (errors[2].abs() < 0.01 * exact.abs().max()).all()
