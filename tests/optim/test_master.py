"""Masters in two parts: as the fp32 run to the bit, what a step that fails leaves, saving, what is refused."""

import copy
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bits import assert_same_bits, bits
from compare import assert_same, assert_same_trees, copies, states
from models import METHODS, STATEFUL, Calls, closure_of, transformer
from torch import Tensor, nn
from towers import Tower, loss_of, tower

import pyzo
from pyzo import reference
from pyzo.estimators import BlockWise
from pyzo.masks import Bits, Indices, Mask, Random, SmallMagnitude
from pyzo.optim import ZOSGD, ForwardGradSGD, ZOAdam

pytestmark = pytest.mark.usefixtures("one_thread")

BF16 = torch.bfloat16
SPLIT = {"master": "split"}
METHOD_NAMES = [name for name in METHODS if name != "forward"]
methods = pytest.mark.parametrize("method", METHOD_NAMES)
stores = pytest.mark.parametrize("store", ["scratch", "snapshot"])


def half() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in transformer().named_parameters()}


MASKS: dict[str, Callable[[], Mask | None]] = {
    "none": lambda: None,
    "random": lambda: Random(0.5, refresh=2),
    "bits": lambda: Bits(half()),
    "indices": lambda: Indices({name: b.reshape(-1).nonzero() for name, b in half().items()}),
}


WITHOUT_MASK = [(method, "none") for method in METHOD_NAMES]
ONE_OF_EACH_RULE = ("sgd", "sign", "nesterov", "adamw", "conservative")
UNDER_MASKS = [(method, mask) for method in ONE_OF_EACH_RULE for mask in MASKS if mask != "none"]


def lows(opt: ZOSGD) -> list[Tensor]:
    return [opt.state[p]["low"] for group in opt.param_groups for p in group["params"]]


def joined(opt: ZOSGD) -> list[Tensor]:
    """The masters of all parameters, listed elements of which have low bits, or all."""
    masters = []
    for p in (p for group in opt.param_groups for p in group["params"]):
        low, weight = opt.state[p]["low"], p.detach()
        mask = opt.param_groups[0]["mask"]
        if isinstance(mask, Indices):
            spread = torch.zeros(p.numel(), dtype=torch.int16)
            part = opt._sweep.parts[0]
            i = next(i for i, t in enumerate(part.tensors) if t is p)
            spread[part.indices[i]] = low
            low = spread.view(p.shape)
        masters.append(reference.join_master(weight, low))
    return masters


def preset(count: int) -> Callable[[], float]:
    """A closure that returns numbers like losses, whatever the weights are."""
    losses = iter((2.0 + 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(4)).double()).tolist())
    return lambda: next(losses)


# As in fp32 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "mask"), [*WITHOUT_MASK, *UNDER_MASKS])
@stores
def test_the_master_is_the_fp32_weight_of_a_run_with_the_same_losses(method, mask, store):
    """Bit for bit, states too, after 20 steps with decay; the weight is it rounded to nearest."""
    model = transformer(BF16)
    twin = copy.deepcopy(model).float()
    common = {"weight_decay": 0.1, "store": store, "state_dtype": BF16 if "adam" in method else torch.float32}
    if mask != "none":
        common["mask"] = MASKS[mask]()
    opt, other = METHODS[method](model, **common, **SPLIT), METHODS[method](twin, **common)
    closure, same_again = preset(200), preset(200)
    for _ in range(20):
        opt.step(lambda: (closure_of(model)(), closure())[1])  # which uses the weights
        other.step(lambda: (closure_of(twin)(), same_again())[1])
    assert torch.equal(opt.last.coefficients, other.last.coefficients)
    for m, p, q in zip(joined(opt), model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(m, q.detach())
        assert ((m - p).abs() <= (m - m.to(BF16)).abs()).all()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for name in opt.state_names:
            assert_same_bits(opt.state[p][name], other.state[q][name])
    start = transformer(BF16)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True))


def test_updates_far_below_the_last_place_add_up():
    """Each 2^-12 of a quantum: nothing that rounds to nearest would see, and no noise as stochastic rounding has."""
    w = nn.Parameter(torch.ones(64, dtype=BF16))
    opt = ZOSGD([("w", w)], lr=2.0**-19, eps=0.5, distribution="rademacher", **SPLIT)
    start = w.detach().clone()
    total = torch.zeros(64)
    for _ in range(50):
        losses = iter([1.0, 0.0])  # g = z
        opt.step(lambda losses=losses: next(losses))
        total += pyzo.noise(64, seed=opt.last.seeds[0], key=pyzo.tensor_key("w"), distribution="rademacher")
    (master,) = joined(opt)
    # Below 1 quanta of fp32 are 2^-24, above 2^-23: sums of 2^-19 are exact.
    assert torch.equal(master, 1 - 2.0**-19 * total)
    assert torch.equal(w.detach(), start)


@pytest.mark.parametrize("method", ONE_OF_EACH_RULE)
def test_lists_and_bits_of_the_same_elements_make_the_same_bits(method):
    model, twin = transformer(BF16), transformer(BF16)
    opt = METHODS[method](model, mask=MASKS["indices"](), **SPLIT)
    other = METHODS[method](twin, mask=MASKS["bits"](), **SPLIT)
    for _ in range(4):
        assert_same_bits(opt.step(closure_of(model)), other.step(closure_of(twin)))
    assert_same(model, twin)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_same_bits(opt.state[p]["low"], other.state[q]["low"][half()[name]], name)
        assert not other.state[q]["low"][~half()[name]].any()


def test_a_mask_by_magnitude_sees_the_weights_themselves():
    w = nn.Parameter(torch.linspace(-1, 1, 400).to(BF16))
    opt = ZOSGD([("w", w)], lr=0.01, eps=0.1, mask=SmallMagnitude(0.5), **SPLIT)
    threshold = w.detach().float().abs().sort().values[199].item()
    for _ in range(5):
        before, (low,) = w.detach().clone(), copies(lows(opt))
        opt.step(lambda: w.float().square().sum())
        large = before.float().abs() > threshold
        assert_same_bits(w.detach()[large], before[large])
        assert_same_bits(lows(opt)[0][large], low[large])
        assert (lows(opt)[0] != low)[~large].any()


class Words(nn.Module):
    """Two layers on the mean of embeddings, of which a batch looks up a few."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.down, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self) -> Tensor:
        return self.head(self.down(self.words(torch.tensor([[3, 7, 7], [49, 0, 3]])).mean(1)).relu())


@pytest.mark.parametrize("method", ["sgd", "adam", "conservative"])
@pytest.mark.parametrize("estimator", [None, BlockWise("linear")], ids=["whole", "blocks"])
def test_both_stores_make_the_same_masters(method, estimator):
    """Of embeddings too, which the scratch store perturbs row by row but updates and tries as a whole."""
    ends = []
    for store in ("scratch", "snapshot"):
        torch.manual_seed(6)
        model = Words().to(BF16)
        opt = METHODS[method](model, store=store, estimator=estimator, **SPLIT)
        losses = [opt.step(lambda model=model: model().float().square().sum()) for _ in range(5)]
        ends.append((losses, model, opt))
    (losses, model, opt), (others, twin, other) = ends
    assert_same(losses, others)
    assert_same(model, twin)
    assert_same(states(opt), states(other))
    assert all(low.any() for low in lows(opt))


# What is left -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHOD_NAMES, "forward"])
def test_lr_0_leaves_weights_and_low_bits(method):
    model = transformer(BF16)
    opt = METHODS[method](model, **SPLIT)
    for _ in range(2):
        opt.step(closure_of(model))
    before, low = copies(model), copies(lows(opt))
    assert any(t.any() for t in low)
    opt.param_groups[0]["lr"] = 0.0
    opt.step(closure_of(model))
    assert_same(model, before)
    assert_same(lows(opt), low)


def stop(loss: Tensor) -> Tensor:
    raise KeyboardInterrupt("stop")


@pytest.mark.parametrize(
    ("method", "call"), [(name, call) for name in METHODS for call in range(1, METHODS[name].calls + 1)]
)
@stores
def test_an_exception_leaves_no_trace(method, call, store):
    """At every call, candidates included, which are tried without their low bits."""
    model = transformer(BF16)
    opt = METHODS[method](model, store=store, **SPLIT)
    opt.step(closure_of(model))
    before, kept, state = copies(model), copies(states(opt)), opt.state_dict()
    with pytest.raises(KeyboardInterrupt, match="stop"):
        opt.step(Calls(closure_of(model), call, stop))
    assert_same(model, before)
    assert_same(states(opt), kept)
    assert_same_trees(opt.state_dict(), state)


@methods
@stores
def test_a_loss_that_is_not_finite_leaves_weights_and_low_bits(method, store):
    model = transformer(BF16)
    opt = METHODS[method](model, weight_decay=0.1, store=store, **SPLIT)
    opt.step(closure_of(model))
    before, kept = copies(model), copies(states(opt))
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(lambda: closure_of(model)() * math.nan)
    assert_same(model, before)
    assert_same(states(opt), kept)


@pytest.mark.parametrize("losses", [(1.0, 2.0, 3.0), (1.0, 0.5, 0.7), (1.0, 0.7, 0.5)], ids=["stay", "down", "up"])
@stores
def test_a_conservative_step_ends_on_the_master_of_its_choice(losses, store):
    """The two attempts leave no trace: as a step of ZO-SGD with the sign of the choice, or none."""
    model, twin = transformer(BF16), transformer(BF16)
    here, down, up = losses
    opt, other = (METHODS[name](m, store=store, **SPLIT) for name, m in (("conservative", model), ("sgd", twin)))
    for _ in range(3):
        probes = [here, 1.5, 1.0]
        scripted = iter([*probes, down, up])
        opt.step(lambda scripted=scripted: (closure_of(model)(), next(scripted))[1])
        sign = 0.0 if here == min(losses) else 1.0 if down < up else -1.0
        other.param_groups[0]["lr"] = abs(sign) * opt.param_groups[0]["lr"]
        flipped = iter(probes[1:] if sign >= 0 else probes[:0:-1])
        other.step(lambda flipped=flipped: (closure_of(twin)(), next(flipped))[1])
    assert_same(model, twin)
    assert_same(lows(opt), lows(other))


def failing(model: Tower, at: int) -> Callable[[], Tensor]:
    return Calls(loss_of(model), at, stop)


@pytest.mark.parametrize("order", ["gauss-seidel", "jacobi"])
@pytest.mark.parametrize("make", [ZOSGD, ZOAdam])
@pytest.mark.parametrize("at", [1, 4, 7, 8])
@stores
def test_blocks_that_were_updated_before_an_exception_are_taken_back_with_their_low_bits(make, order, at, store):
    model, twin = tower(BF16), tower(BF16)
    common = {"lr": 1e-2, "eps": 1e-2, "store": store, **SPLIT}
    opt, other = (make(m, estimator=BlockWise("layer", order), **common) for m in (model, twin))
    for m, o in ((model, opt), (twin, other)):
        o.step(loss_of(m))
    with pytest.raises(KeyboardInterrupt):
        opt.step(failing(model, at))
    assert_same(model, twin)
    assert_same(lows(opt), lows(other))
    for m, o in ((model, opt), (twin, other)):
        o.step(loss_of(m))
    assert_same(model, twin)
    assert_same(states(opt), states(other))


# Saving --------------------------------------------------------------------------------------------------------------


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("method", "mask"), [*WITHOUT_MASK, *((name, "indices") for name in ONE_OF_EACH_RULE)])
def test_a_run_resumes_bit_for_bit_from_a_file(method, mask):
    common = SPLIT if mask == "none" else {**SPLIT, "mask": MASKS[mask]()}
    whole, second = transformer(BF16), transformer(BF16)
    opt = METHODS[method](whole, **common)
    for _ in range(3):
        opt.step(closure_of(whole))
    saved = through_a_file({"model": whole.state_dict(), "opt": opt.state_dict()})
    assert_same_trees(saved["opt"], opt.state_dict())
    second.load_state_dict(saved["model"])
    other = METHODS[method](second, **common)
    other.load_state_dict(saved["opt"])
    assert_same_trees(other.state_dict(), saved["opt"])
    assert any(low.any() for low in lows(other))
    assert not {low.data_ptr() for low in lows(other)} & {low.data_ptr() for low in lows(opt)}
    for m, o in ((whole, opt), (second, other)):
        for _ in range(3):
            o.step(closure_of(m))
    assert_same(second, whole)
    assert_same(states(other), states(opt))


def foreign() -> Iterator[tuple[str, bool, dict[str, Any], str]]:
    """(what, whether the loader splits, a state dict that it must not load, what the message says)."""
    model = transformer(BF16)
    split, plain = ZOSGD(model, **SPLIT).state_dict(), ZOSGD(model).state_dict()
    yield "of a run without", True, plain, r"expected state \['low'\], got \[\]"
    yield "of a run with", False, split, r"expected state \[\], got \['low'\]"
    yield "of another rule", True, ZOAdam(model, **SPLIT).state_dict(), "of ZOSGD, got one of ZOAdam"
    for what, low, message in (
        ("dtype", torch.zeros(8, 4, dtype=torch.int32), "low of dtype torch.int16 .*, got torch.int32"),
        ("shape", torch.zeros(4, 8, dtype=torch.int16), r"low .* shape \(8, 4\), got torch.int16 and \(4, 8\)"),
    ):
        changed = copy.deepcopy(split)
        changed["state"][0]["low"] = low
        yield what, True, changed, message
    missing = copy.deepcopy(split)
    del missing["state"][2]
    yield "one is missing", True, missing, r"expected state \['low'\], got \[\]"


@pytest.mark.parametrize("case", list(foreign()), ids=lambda case: case[0])
def test_a_foreign_state_is_refused_before_anything_changes(case):
    _, splits, state, message = case
    model = transformer(BF16)
    opt = ZOSGD(model, lr=1e-2, **(SPLIT if splits else {}))
    opt.step(closure_of(model))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert_same_trees(opt.state_dict(), before)


# What is trained -----------------------------------------------------------------------------------------------------


def mixed() -> nn.Module:
    model = transformer(BF16)
    model.norm.float()
    return model


def mixed_closure(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: sum((p.float() - 0.1).square().sum() for p in model.parameters())


@pytest.mark.parametrize("method", ["sgd", "adam", "conservative"])
def test_fp32_weights_beside_have_no_low_bits_and_move_as_ever(method):
    model, twin = mixed(), mixed()
    opt, other = METHODS[method](model, store="snapshot", **SPLIT), METHODS[method](twin, store="snapshot")
    for _ in range(3):
        losses, again = preset(10), preset(10)
        opt.step(losses)
        other.step(again)
    assert_same_bits(model.norm.weight.detach(), twin.norm.weight.detach())
    for p in model.parameters():
        assert ("low" in opt.state.get(p, {})) == (p.dtype == BF16)
    fresh = METHODS[method](mixed(), **SPLIT)
    fresh.load_state_dict(through_a_file(opt.state_dict()))
    assert_same_trees(fresh.state_dict(), opt.state_dict())


@stores
def test_low_bits_take_two_bytes_a_weight_and_a_step_no_more(store):
    """Made of zeros, so that the first master is the weight; what a store keeps is of the weights alone."""
    model, twin = transformer(BF16), transformer(BF16)
    opt, other = ZOSGD(model, store=store, **SPLIT), ZOSGD(twin, store=store)
    for p, low in zip(model.parameters(), lows(opt), strict=True):
        assert low.dtype == torch.int16 and low.shape == p.shape and not low.any()
    opt.step(closure_of(model))
    other.step(closure_of(twin))
    assert opt.store.extra_bytes == other.store.extra_bytes > 0


def test_auto_chooses_an_exact_store():
    model = transformer(BF16)
    for make in (ZOSGD, ForwardGradSGD):
        assert make(model, **SPLIT).store.name == "scratch"
        alone = make(model.named_parameters(), **SPLIT).store
        assert alone.name == "snapshot" and "masters" in alone.reason
        assert make(model.named_parameters()).store.name == "inplace"
    assert ZOSGD(model, store="snapshot", **SPLIT).store.reason == "asked for"
    assert ZOSGD([("w", model.up.weight)], store="snapshot", **SPLIT).store.is_exact


def test_what_cannot_have_masters_is_refused():
    with pytest.raises(ValueError, match="master: expected None or 'split', got 'fp32'"):
        ZOSGD(transformer(BF16), master="fp32")
    with pytest.raises(ValueError, match="master: expected bfloat16 weights with 'split', got only float32"):
        ZOSGD(transformer(), **SPLIT)
    with pytest.raises(ValueError, match=r"master: expected bfloat16 or float32 .* got float16 in enter.weight"):
        ZOSGD(transformer(torch.float16), **SPLIT)
    one = transformer(BF16)
    one.up.half()
    with pytest.raises(ValueError, match=r"master: expected bfloat16 or float32 .* got float16 in up.weight"):
        ZOSGD(one, **SPLIT)
    one.up.requires_grad_(False)  # what is not trained may be of any dtype
    ZOSGD(one, **SPLIT)
    with pytest.raises(ValueError, match="store: expected one that is exact with master='split', got 'inplace'"):
        ZOSGD(transformer(BF16), store="inplace", **SPLIT)


def test_a_model_that_changes_its_dtype_loses_its_low_bits():
    """A weight that became fp32 has none; one that becomes bf16 begins with zeros."""
    model = transformer(BF16)
    opt = METHODS["momentum"](model, **SPLIT)
    opt.step(closure_of(model))
    model.norm.float()
    closure = mixed_closure(model)
    opt.step(closure)
    assert set(opt.state[model.norm.weight]) == {"momentum_buffer"}
    model.norm.to(BF16)
    opt.param_groups[0]["lr"] = 0.0
    opt.step(closure)
    assert not opt.state[model.norm.weight]["low"].any()
    model.float()
    before = copies(model)
    with pytest.raises(ValueError, match="master: expected bfloat16 weights with 'split', got only float32"):
        opt.step(closure)
    assert_same(model, before)


def test_parameters_that_join_or_rest_keep_their_low_bits():
    model = transformer(BF16)
    model.head.requires_grad_(False)
    opt = METHODS["sgd"](model, **SPLIT)
    opt.step(closure_of(model))
    assert model.head.weight not in opt.state
    model.head.requires_grad_(True)
    opt.step(closure_of(model))
    low = opt.state[model.head.weight]["low"].clone()
    assert low.any()
    model.head.requires_grad_(False)
    opt.step(closure_of(model))
    assert_same_bits(opt.state[model.head.weight]["low"], low)
    assert bits(model.head.weight).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("method", ["sgd", *STATEFUL])
def test_low_bits_move_with_their_weights_to_another_device(method):
    model, twin = transformer(BF16), transformer(BF16)
    opt, other = (METHODS[method](m, **SPLIT) for m in (model, twin))
    for device in ("cpu", "cuda", "cpu"):
        model.to(device)
        for _ in range(2):
            opt.step(preset(10))
            other.step(preset(10))
        assert {low.device.type for low in lows(opt)} == {device}
        assert_same([p.cpu() for p in model.parameters()], twin)
        assert_same([low.cpu() for low in lows(opt)], lows(other))
