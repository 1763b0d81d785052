"""Masks under every method and store: what moves is the mask's, in every pass of a step; saving, changing, costs."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from bits import assert_same_bits
from compare import assert_same, assert_same_trees, copies, states
from models import METHODS, STATEFUL, closure_of, dtypes, transformer
from torch import Tensor, nn

import pyzo
import pyzo.passes
from pyzo.masks import Bits, Indices, Mask, Random, SmallMagnitude
from pyzo.optim import ZOSGD, ZOAdam

pytestmark = pytest.mark.usefixtures("one_thread")

N = 4000
stores = pytest.mark.parametrize("store", ["inplace", "snapshot"])
methods = pytest.mark.parametrize("method", METHODS)


def own_bits(n: int = N) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(2)) < 0.4


# Name -> the mask of a tensor of N elements called w, and which of its elements may move given its weights.
MASKS: dict[str, tuple[Callable[[], Mask], Callable[[Tensor], Tensor] | None]] = {
    "random": (lambda: Random(0.6), None),
    "magnitude": (lambda: Random(0.6, layerwise="magnitude"), None),
    "small": (lambda: SmallMagnitude(0.5), lambda w: w.abs() <= start().abs().sort().values[N // 2 - 1]),
    "bits": (lambda: Bits({"w": own_bits()}), lambda w: own_bits()),
    "indices": (lambda: Indices({"w": own_bits().nonzero()}), lambda w: own_bits()),
}
masks = pytest.mark.parametrize("name", MASKS)


def start() -> Tensor:
    """Magnitudes of which half are small, and near enough to the others for a probe to cross the threshold."""
    return torch.linspace(-1.0, 2.0, N)[torch.randperm(N, generator=torch.Generator().manual_seed(3))]


def loss_of(w: Tensor) -> Tensor:
    return (w.double() * torch.linspace(-1, 2, N, dtype=torch.float64)).sum()


@methods
@masks
@stores
def test_every_pass_of_a_step_moves_the_same_elements_and_no_others(method, name, store):
    """At every probe that is where the mask says, and at the end; nothing outside it differs in one bit, ever."""
    make, allowed = MASKS[name]
    w = nn.Parameter(start())
    begin, seen = start(), []
    common = {"mask": make(), "distribution": "rademacher", "weight_decay": 0.1, "eps": 0.25, "lr": 1e-2}
    opt = METHODS[method]([("w", w)], **common, store=store)

    def closure() -> Tensor:
        seen.append(w.detach().clone())
        return loss_of(w)

    for _ in range(3):
        begin, seen[:] = w.detach().clone(), []
        opt.step(closure)
        moved = [at != begin for at in (*seen, w.detach())]
        probed = max(moved, key=lambda m: int(m.sum()))
        expected = probed if allowed is None else allowed(begin)
        assert torch.equal(moved[-1] | probed, probed)
        assert torch.equal(probed, expected)
        for at, m in zip(seen, moved, strict=False):
            if store == "snapshot" and m.any():
                assert torch.equal(m, expected)
            assert_same_bits(at[~expected], begin[~expected])
        assert_same_bits(w.detach()[~expected], begin[~expected])
        if allowed is None:
            assert abs(expected.double().mean().item() - 0.4) < 4 * (0.24 / N) ** 0.5


@masks
@stores
@pytest.mark.parametrize("method", ["sgd", "sign", "momentum", "adam", "adamw", "conservative"])
def test_masked_elements_never_move(method, name, store):
    """Over 20 steps with decay; of random masks those that no step drew (refresh: one mask for all steps)."""
    make, allowed = MASKS[name]
    mask = Random(0.6, 50, "uniform" if name == "random" else "magnitude") if allowed is None else make()
    w = nn.Parameter(start())
    opt = METHODS[method]([("w", w)], mask=mask, weight_decay=0.1, store=store)
    ever = torch.zeros(N, dtype=torch.bool)
    for _ in range(20):
        before = w.detach().clone()
        opt.step(lambda: loss_of(w))
        ever |= w.detach() != before
        if allowed is not None:
            assert not ever[~allowed(before) & ~ever].any()
    stayed = ~ever
    assert 0.3 < stayed.double().mean() < 0.7
    assert_same_bits(w.detach()[stayed], start()[stayed])


@dtypes
@pytest.mark.parametrize(
    "method", ["sgd", "sgd q=2", "fzoo", "sign", "nesterov", "adam", "adamw", "conservative", "forward"]
)
@stores
def test_lists_and_bits_of_the_same_elements_make_the_same_bits(method, store, dtype):
    """Weights, losses, and the state of the elements that move; a list keeps no other state."""
    bits = {
        n: torch.rand(p.shape, generator=torch.Generator().manual_seed(5)) < 0.3
        for n, p in transformer().named_parameters()
    }
    listed = {name: b.reshape(-1).nonzero() for name, b in bits.items()}
    model, twin = transformer(dtype), transformer(dtype)
    opt = METHODS[method](model, mask=Indices(listed), store=store, weight_decay=0.1)
    other = METHODS[method](twin, mask=Bits(bits), store=store, weight_decay=0.1)
    for _ in range(4):
        assert_same_bits(opt.step(closure_of(model)), other.step(closure_of(twin)))
        assert_same(model, twin)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        for key in opt.state_names:
            assert opt.state[p][key].shape == (int(bits[name].sum()),)
            assert_same_bits(opt.state[p][key], other.state[q][key][bits[name]], name)


def test_a_mask_of_everything_makes_the_bits_without_one():
    everything = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in transformer().named_parameters()}
    whole = {n: torch.arange(p.numel()) for n, p in transformer().named_parameters()}
    ends = []
    for mask in (
        None,
        Random(0),
        Random(0, layerwise="magnitude"),
        SmallMagnitude(1),
        Bits(everything),
        Indices(whole),
    ):
        model = transformer(torch.bfloat16)
        opt = METHODS["adam"](model, mask=mask, store="snapshot")
        opt.step(closure_of(model))  # after one step weights have crossed the threshold of SmallMagnitude(1)
        ends.append(copies(model))
    for end in ends[1:]:
        assert_same(end, ends[0])


# The trap of Sparse-MeZO ----------------------------------------------------------------------------------------------


@dtypes
def test_small_weights_are_those_of_the_beginning_of_the_step(dtype):
    """In place and from a copy alike, though every probe carries weights over the threshold."""
    ends = []
    for store in ("inplace", "snapshot"):
        w = nn.Parameter(start().to(dtype))
        opt = ZOSGD([("w", w)], lr=0.1, eps=0.5, mask=SmallMagnitude(0.5), store=store, distribution="rademacher")
        threshold = w.detach().float().abs().sort().values[N // 2 - 1].item()
        for _ in range(4):
            before = w.detach().clone()
            opt.step(lambda w=w: loss_of(w))
            assert torch.equal(w.detach() != before, before.float().abs() <= threshold)
        ends.append(opt)
    bits = ends[0]._sweep.parts[0].bits
    assert [b.numel() for b in bits] == [N // 8]  # one bit per weight in place
    assert ends[1]._sweep.parts[0].bits[0].numel() == 0  # none from a copy
    assert ends[0]._sweep.parts[0].masked and ends[1]._sweep.parts[0].masked


def test_thresholds_stay_when_weights_move_and_join_with_tensors():
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False))
    model[1].requires_grad_(False)
    opt = ZOSGD(model, lr=0.1, eps=0.1, mask=SmallMagnitude(0.5), store="snapshot")
    first = model[0].weight.detach().abs().reshape(-1).sort().values[199].item()
    opt.step(lambda: model[0].weight.double().sum())
    with torch.no_grad():
        model[1].weight.mul_(3)
    second = model[1].weight.detach().abs().reshape(-1).sort().values[199].item()
    model[1].requires_grad_(True)
    before = copies(model)
    opt.step(lambda: model[0].weight.double().sum() + model[1].weight.double().sum())
    for p, b, threshold in zip(model.parameters(), before, (first, second), strict=True):
        assert torch.equal(p.detach() != b, b.abs() <= threshold)


# Saving and changing --------------------------------------------------------------------------------------------------


@masks
@pytest.mark.parametrize("method", ["sgd", *STATEFUL[:1], "adam"])
def test_a_run_resumes_bit_for_bit(method, name, tmp_path):
    """What was measured of the weights at the beginning is not measured again of others."""

    def run(w: nn.Parameter, mask: Mask) -> ZOSGD:
        return METHODS[method]([("w", w)], mask=mask, lr=0.05, eps=0.25)

    w = nn.Parameter(start())
    opt = run(w, MASKS[name][0]())
    for _ in range(3):
        opt.step(lambda: loss_of(w))
    torch.save({"w": w.detach(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    again = nn.Parameter(saved["w"].clone())
    other = run(again, MASKS[name][0]())
    other.load_state_dict(saved["opt"])
    for x, o in ((w, opt), (again, other)):
        for _ in range(3):
            o.step(lambda x=x: loss_of(x))
    assert_same_bits(again.detach(), w.detach())
    assert_same_trees(other.state_dict(), opt.state_dict())
    assert_same(states(other), states(opt))


def test_masks_may_be_changed_between_steps():
    w = nn.Parameter(start())
    opt = ZOAdam([("w", w)], lr=0.05, eps=0.25, store="snapshot")
    for name in (None, "bits", "small", "magnitude", None, "random"):
        opt.param_groups[0]["mask"] = MASKS[name][0]() if name else None
        before = w.detach().clone()
        opt.step(lambda: loss_of(w))
        moved = w.detach() != before
        if name in (None, "bits"):
            assert torch.equal(moved, own_bits() if name else torch.ones(N, dtype=torch.bool))
        elif name == "small":  # by the weights as they are when the mask comes
            assert torch.equal(moved, before.abs() <= before.abs().sort().values[N // 2 - 1])
        else:
            assert 0.3 < moved.double().mean() < 0.5
    assert opt.state_dict()["state"][0]["step"] == 6
    opt.param_groups[0]["mask"] = MASKS["indices"][0]()
    with pytest.raises(ValueError, match=r"mask: expected one that lists as many elements of w as there is state of"):
        opt.step(lambda: loss_of(w))


def test_groups_have_masks_of_their_own_kind():
    a, b, c = (nn.Parameter(start()) for _ in range(3))
    groups = [
        {"params": [("a", a)], "mask": Bits({"a": own_bits()})},
        {"params": [("b", b)], "mask": Indices({"b": torch.tensor([7])})},
        {"params": [("c", c)]},
    ]
    opt = ZOSGD(groups, lr=0.1, eps=0.1, mask=SmallMagnitude(0.5), store="snapshot")
    opt.step(lambda: loss_of(a) + loss_of(b) + loss_of(c))
    assert torch.equal(a.detach() != start(), own_bits())
    assert (b.detach() != start()).nonzero().tolist() == [[7]]
    assert torch.equal(c.detach() != start(), MASKS["small"][1](start()))


def test_a_mask_that_groups_share_is_fitted_to_all_of_them():
    small, large = nn.Parameter(0.1 * start()), nn.Parameter(10 * start())
    mask = Random(0.5, layerwise="magnitude")
    opt = ZOSGD([{"params": [("s", small)]}, {"params": [("l", large)]}], mask=mask, store="snapshot")
    keeps = [row.mask[0] for row in opt._runs[0].rows]
    assert keeps[0] < 0.1 * 65536 and keeps[1] > 0.9 * 65536
    assert abs(sum(keeps) - 65536) <= 2


def test_tensors_without_names_are_masked_by_their_place():
    a, b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    opt = ZOSGD([a, b], lr=1.0, eps=1.0, mask=Indices([torch.tensor([0]), torch.tensor([2, 3])]))
    opt.step(lambda: a.double().sum() + b.double().sum())
    assert (a.detach() != 0).tolist() == [True, False, False, False]
    assert (b.detach() != 0).tolist() == [False, False, True, True]


# Arguments and costs --------------------------------------------------------------------------------------------------


def test_names_that_the_optimizer_does_not_have_are_refused():
    model = nn.Linear(3, 3)
    for mask in (Indices({"weigth": torch.tensor([1])}), Bits({"weigth": torch.ones(9, dtype=torch.bool)})):
        with pytest.raises(ValueError, match="mask: expected names of the optimizer's parameters, got 'weigth'"):
            ZOSGD(model, mask=mask)
    model.bias.requires_grad_(False)
    ZOSGD(model, mask=Indices({"weight": torch.tensor([1]), "bias": torch.tensor([0])}))  # frozen for now


def test_a_mask_under_which_nothing_moves_is_a_step_all_the_same():
    model = nn.Linear(3, 3)
    before = copies(model)
    opt = ZOSGD(model, lr=1.0, mask=Indices({"weight": torch.zeros(0, dtype=torch.int64)}))
    opt.step(lambda: model.weight.double().sum())
    assert_same(model, before)
    assert opt.skipped == 0


def test_lists_take_a_copy_of_what_they_list():
    """Of 16-bit and fp32 weights alike: exact, and a thousandth of the weights."""
    w = nn.Parameter(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    mask = Indices({"w": torch.arange(0, 100_000, 1000)})
    opt = ZOAdam([("w", w)], mask=mask)
    assert opt.store.name == "snapshot" and "listed" in opt.store.reason
    opt.step(lambda: w.double().sum())
    assert [c.numel() for own in opt.store._copies for c in own] == [100]
    assert [s.numel() for s in states(opt)] == [100, 100]
    dense = ZOAdam([("w", w)], mask=Indices({"w": torch.arange(50_000)}))
    assert dense.store.name == "inplace"


@masks
def test_forward_gradients_see_the_masked_direction(name):
    """The derivative is that along z where the mask lets it, which is what the update takes."""
    make, allowed = MASKS[name]
    w = nn.Parameter(start())
    opt = METHODS["forward"]([("w", w)], lr=1.0, mask=make(), store="snapshot", seed=3)
    opt.step(lambda: loss_of(w))
    moved = w.detach() != start()
    z = pyzo.noise(N, seed=opt.last.seeds[0], key=pyzo.tensor_key("w")).double()
    slope = torch.linspace(-1, 2, N, dtype=torch.float64)
    assert opt.last.coefficients.item() == pytest.approx((slope * z)[moved].sum().item(), rel=1e-5)
    if allowed is not None:
        assert torch.equal(moved, allowed(start()))


def test_weights_that_are_not_finite_have_no_threshold():
    w = nn.Parameter(torch.tensor([math.nan, 1.0]))
    with pytest.raises(ValueError, match="mask: expected finite weights to take a threshold from, got nan in w"):
        ZOSGD([("w", w)], mask=SmallMagnitude(1.0))


def test_a_failed_step_leaves_the_mask_as_it_was():
    w = nn.Parameter(start())
    opt = ZOAdam([("w", w)], lr=0.1, eps=0.25, mask=SmallMagnitude(0.5), store="snapshot")
    opt.step(lambda: loss_of(w))
    before, state = w.detach().clone(), copy.deepcopy(opt.state_dict())
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert_same_bits(w.detach(), before)
    assert_same_trees(opt.state_dict(), state)
