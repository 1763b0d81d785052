"""Block-wise steps: against the specification, block by block; what a block touches, counts, skips and saves."""

import copy
import math
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from compare import assert_same, assert_same_trees, copies, same, states
from models import METHODS, Calls, closure_of, transformer
from torch import Tensor, nn
from towers import BLOCKS, Tower, loss_of, tower

import pyzo
import pyzo.passes
from pyzo import control as layout
from pyzo import layers
from pyzo.estimators import BlockWise, ForwardGrad, OneSided, RandomLayers, TwoSided
from pyzo.masks import Bits, Indices, Random, SmallMagnitude
from pyzo.optim import ZOSGD, ZOAdam, ZOConservativeSGD
from pyzo.reference import Method, Row

pytestmark = pytest.mark.usefixtures("one_thread")

orders = pytest.mark.parametrize("order", ["gauss-seidel", "jacobi"])
stores = pytest.mark.parametrize("store", ["inplace", "snapshot"])
WHOLE = [name for name, recipe in METHODS.items() if name != "forward"]


def specification(model: Tower, store: str, spec: dict[str, Any], row: dict[str, Any]) -> list[Method]:
    """For each block a run of its own over the block's tensors, whose first direction is the block's number times q."""
    methods = []
    parameters = dict(model.named_parameters())
    for number, block in enumerate(layers.blocks(model, "layer")):
        own = {name: parameters[name].data for name in block.parameters}
        keys = {name: pyzo.tensor_key(name) for name in own}
        method = Method(own, keys, [Row(**row)], seed=7, store=store, **spec)
        method.control[0, layout.FIRST] = number * spec.get("q", 1)
        methods.append(method)
    return methods


@orders
@stores
@pytest.mark.parametrize(
    ("make", "arguments", "spec", "row"),
    [
        (ZOSGD, {}, {}, {}),
        (ZOSGD, {"estimator": TwoSided(2)}, {"q": 2}, {}),
        (ZOSGD, {"estimator": OneSided(2)}, {"q": 2, "estimator": "one-sided"}, {}),
        (ZOAdam, {}, {"rule": "adam"}, {"beta1": 0.9, "beta2": 0.999, "rule_eps": 1e-8}),
        (ZOSGD, {"mask": Random(0.3, 2)}, {}, {"keep": 45875, "refresh": 2}),
    ],
    ids=["sgd", "q=2", "one-sided", "adam", "sparse"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_specification_bit_for_bit(make, arguments, spec, row, store, order, dtype):
    if spec.get("estimator") == "one-sided" and order == "jacobi" and store == "inplace":
        pytest.skip("one l(w) for all blocks is taken before their probes round the weights, the specification's after")
    model, twin = tower(dtype), tower(dtype)
    common = dict(arguments)
    estimator = BlockWise("layer", order, common.pop("estimator", None))
    opt = make(model, lr=1e-2, eps=1e-2, estimator=estimator, store=store, seed=7, **common)
    methods = specification(twin, store, spec, {"lr": 1e-2, "eps": 1e-2, **row})
    assert [run.block.name for run in opt._runs] == BLOCKS
    for step in range(3):
        opt.step(loss_of(model))
        if order == "gauss-seidel":
            for method in methods:
                method.step(loss_of(twin))
        else:  # all from where the probes leave the weights, in place within rounding of where they were
            ends = []
            for method in methods:
                home = idle(method, loss_of(twin))
                method.step(loss_of(twin))
                ends.append(copies(method.parameters.values()))
                put(method, home)
            for method, end in zip(methods, ends, strict=True):
                put(method, end)
        assert_same(model, twin, f"step {step}")


def put(method: Method, weights: list[Tensor]) -> None:
    for p, w in zip(method.parameters.values(), weights, strict=True):
        p.copy_(w)


def idle(method: Method, closure: Any) -> list[Tensor]:
    """Where the probes of a step leave the weights: the end of a step with lr = 0 and the same seeds."""
    before, control = copies(method.parameters.values()), method.control.clone()
    of_states = [{name: t.clone() for name, t in own.items()} for own in method.states.values()]
    method.control.view(torch.float64)[layout.LINES :, layout.LR] = 0.0
    method.step(closure)
    home = copies(method.parameters.values())
    put(method, before)
    method.control.copy_(control)
    for own, saved in zip(method.states.values(), of_states, strict=True):
        for name, t in saved.items():
            own[name].copy_(t)
    return home


@pytest.mark.parametrize("method", WHOLE)
@orders
@stores
def test_one_block_makes_the_bits_of_the_whole(method, order, store):
    """Invariant 7, for all methods, and the reports are the same."""
    model, twin = transformer(), transformer()
    arguments = dict(METHODS[method].arguments)
    estimator = BlockWise([model], order, arguments.get("estimator"))
    opt, other = METHODS[method](model, estimator=estimator, store=store), METHODS[method](twin, store=store)
    for _ in range(4):
        loss, want = opt.step(closure_of(model)), other.step(closure_of(twin))
        assert_same_bits(loss, want)
        assert_same(model, twin)
        assert_same(states(opt), states(other))
        assert opt.last.losses.tolist() == other.last.losses.tolist()
        assert opt.last.coefficients.tolist() == other.last.coefficients.tolist()
        assert (opt.last.seeds, opt.last.choice) == (other.last.seeds, other.last.choice)
        assert opt.last.forwards == other.last.forwards == METHODS[method].calls


@orders
@pytest.mark.parametrize(
    ("estimator", "per_block", "shared"),
    [(TwoSided(), 2, 0), (TwoSided(3), 6, 0), (OneSided(), 1, 1), (OneSided(3), 3, 1)],
    ids=["two-sided", "q=3", "one-sided", "one-sided q=3"],
)
def test_forwards_are_counted(order, estimator, per_block, shared):
    """l(w) is evaluated once for all blocks where all are probed at the same weights, else once for each."""
    model = tower()
    opt = ZOSGD(model, estimator=BlockWise("layer", order, estimator, reuse=False))
    closure = Calls(loss_of(model), 0, lambda loss: loss)
    opt.step(closure)
    want = len(BLOCKS) * per_block + shared * (1 if order == "jacobi" else len(BLOCKS))
    assert closure.count == opt.last.forwards == want
    assert len(opt.last.seeds) == len(set(opt.last.seeds)) == len(BLOCKS) * estimator.q
    assert opt.last.coefficients.shape == (1, len(BLOCKS) * estimator.q)


@orders
@stores
def test_passes_touch_the_tensors_of_the_block_alone(order, store, monkeypatch):
    """At every evaluation only the block that is probed stands elsewhere than where it begins or ends in this step."""
    model = tower()
    opt = ZOSGD(model, lr=1e-2, eps=1e-2, estimator=BlockWise("layer", order), store=store)
    opt.step(loss_of(model))  # the first step computes losses twice
    written = []
    run = pyzo.passes.Sweep.run
    monkeypatch.setattr(
        pyzo.passes.Sweep, "run", lambda self, index, **k: (written.append(self.parts[index]), run(self, index, **k))[1]
    )
    start, seen = copies(model), []
    closure = loss_of(model)

    def watched() -> Tensor:
        seen.append(copies(model))
        return closure()

    opt.step(watched)
    names = [name for name, _ in model.named_parameters()]
    owner = [next(b for b in BLOCKS if name.startswith(b)) for name in names]
    for number, block in enumerate(BLOCKS):
        for at in seen[2 * number : 2 * number + 2]:
            for i, (tensor, begin) in enumerate(zip(at, start, strict=True)):
                later = BLOCKS.index(owner[i]) > number
                if owner[i] == block:
                    assert not torch.equal(tensor, begin)
                elif later or (order == "jacobi" and store == "snapshot"):
                    assert torch.equal(tensor, begin), (block, names[i])
    passes = 3 * len(BLOCKS) if order == "gauss-seidel" else 4 * len(BLOCKS) - 1  # the last one is still to go home
    assert len(written) == passes
    for part in written:
        assert len({next(b for b in BLOCKS if name.startswith(b)) for name in part.names}) == 1


def test_blocks_learn_and_masks_compose():
    for mask in (None, Random(0.2), Random(0.2, layerwise="magnitude"), SmallMagnitude(0.7)):
        model = tower()
        opt = ZOAdam(model, lr=1e-2, eps=1e-3, estimator=BlockWise(), mask=mask)
        losses = [opt.step(loss_of(model)).item() for _ in range(30)]
        assert losses[-1] < 0.7 * losses[0], mask


@orders
@pytest.mark.parametrize("mask", [None, Random(0.5), SmallMagnitude(0.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lr_zero_changes_no_bit(mask, order, dtype):
    """Invariant 2, with weights that arithmetic could change: zeros of both signs."""
    model = tower(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[::5] = -0.0
    before = copies(model)
    opt = ZOAdam(
        model, lr=0.0, eps=1e-2, weight_decay=0.1, estimator=BlockWise("layer", order), mask=mask, store="snapshot"
    )
    for _ in range(2):
        opt.step(loss_of(model))
    assert_same(model, before)


# Failures -------------------------------------------------------------------------------------------------------------


def failing(model: nn.Module, at: int) -> Calls:
    def stop(loss: Tensor) -> Tensor:
        raise KeyboardInterrupt

    return Calls(loss_of(model), at, stop)


@orders
@pytest.mark.parametrize("make", [ZOSGD, ZOAdam, ZOConservativeSGD], ids=lambda make: make.__name__)
@pytest.mark.parametrize("at", [1, 2, 5, 12])
def test_an_exception_leaves_no_trace_under_an_exact_store(make, order, at):
    model, twin = tower(torch.bfloat16, dropout=0.1), tower(torch.bfloat16, dropout=0.1)
    opt, other = (
        make(m, lr=1e-2, eps=1e-2, estimator=BlockWise("layer", order), store="snapshot") for m in (model, twin)
    )
    for m, o in ((model, opt), (twin, other)):
        torch.manual_seed(3)
        o.step(loss_of(m))
    torch.manual_seed(4)
    generator = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        opt.step(failing(model, at))
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same(model, twin)
    assert_same(states(opt), states(other))
    assert_same_trees(opt.state_dict(), other.state_dict())
    assert not any("forward" in layer.__dict__ for layer in model.layers)
    for m, o in ((model, opt), (twin, other)):
        torch.manual_seed(5)
        o.step(loss_of(m))
    assert_same(model, twin)


@pytest.mark.parametrize("at", [3, 12])
def test_in_place_updates_of_blocks_are_taken_back_within_rounding(at):
    model = tower()
    opt = ZOSGD(model, lr=1e-2, eps=1e-2, estimator=BlockWise(reuse=False), store="inplace")
    before, state = copies(model), opt.state_dict()
    with pytest.raises(KeyboardInterrupt):
        opt.step(failing(model, at))
    for p, b in zip(model.parameters(), before, strict=True):  # 4 roundings of numbers below 2
        torch.testing.assert_close(p.detach(), b, rtol=0, atol=4 * 2.0**-24 * 2)
    assert_same_trees(opt.state_dict(), state)


def test_in_place_blocks_that_a_rule_with_state_has_updated_stay_updated_and_count():
    model, twin = tower(), tower()
    opt, other = (
        ZOAdam(m, lr=1e-2, eps=1e-2, estimator=BlockWise(reuse=False), store="inplace") for m in (model, twin)
    )
    with pytest.raises(KeyboardInterrupt):
        opt.step(failing(model, 6))  # the second probe of the third block
    other.step(loss_of(twin))
    done = {name for name, _ in model.named_parameters() if name.startswith(("enter", "layers.0"))}
    start = dict(tower().named_parameters())
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name in done:
            assert_same_bits(p.detach(), q.detach(), name)
        else:
            torch.testing.assert_close(p.detach(), start[name].detach(), rtol=0, atol=4 * 2.0**-24 * 2)
    applied = {name: header["applied"] for name, header in opt.state_dict()["pyzo"]["runs"].items()}
    assert applied == {name: int(name in ("enter", "layers.0")) for name in BLOCKS}


@stores
def test_a_loss_that_is_not_finite_skips_its_block_alone(store):
    model, twin = tower(), tower()
    estimator = BlockWise(reuse=False)
    opt, other = (ZOAdam(m, lr=1e-2, eps=1e-2, estimator=estimator, store=store) for m in (model, twin))
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(Calls(loss_of(model), 4, lambda loss: loss * math.nan))  # of the second block
    for name, p in twin.named_parameters():
        p.requires_grad_(not name.startswith("layers.0"))
    frozen = ZOAdam(twin, lr=1e-2, eps=1e-2, estimator=BlockWise([*BLOCKS[:1], *BLOCKS[2:]], reuse=False), store=store)
    for number, run in enumerate(frozen._runs):  # the directions of blocks among all six
        for control in run.controls.values():
            control.tensor[0, layout.FIRST] = (0, 2, 3, 4, 5)[number]
    frozen.step(loss_of(twin))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if store == "snapshot" or not name.startswith("layers.0"):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=0 if store == "snapshot" else 1e-6)
    assert opt.skipped == 1
    headers = opt.state_dict()["pyzo"]["runs"]
    assert {name for name, header in headers.items() if header["skipped"]} == {"layers.0"}
    assert other.skipped == 0


# Saving ---------------------------------------------------------------------------------------------------------------


@orders
@pytest.mark.parametrize("make", [ZOSGD, ZOAdam], ids=lambda make: make.__name__)
def test_a_run_resumes_bit_for_bit(make, order, tmp_path):
    model = tower(torch.bfloat16)
    opt = make(model, lr=1e-2, eps=1e-2, estimator=BlockWise("linear", order), mask=Random(0.4, 3, "magnitude"))
    for _ in range(2):
        opt.step(loss_of(model))
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    again = tower(torch.bfloat16)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    other = make(again, lr=1e-2, eps=1e-2, estimator=BlockWise("linear", order), mask=Random(0.4, 3, "magnitude"))
    other.load_state_dict(saved["opt"])
    for m, o in ((model, opt), (again, other)):
        for _ in range(2):
            o.step(loss_of(m))
    assert_same(model, again)
    assert_same_trees(opt.state_dict(), other.state_dict())


def test_the_state_of_other_blocks_is_refused():
    opt = ZOSGD(tower(), estimator=BlockWise("layer"))
    for estimator in (BlockWise("linear"), TwoSided()):
        with pytest.raises(ValueError, match=r"state_dict: expected runs of .* blocks, got"):
            ZOSGD(tower(), estimator=estimator).load_state_dict(opt.state_dict())


def test_freezing_a_block_takes_it_out_and_it_comes_back_with_its_own_count():
    model = tower()
    opt = ZOAdam(model, lr=1e-2, eps=1e-2, estimator=BlockWise("layer"))
    steps = {"layers.1": 0, "head": 0}
    for frozen in (False, True, True, False):
        model.layers[1].requires_grad_(not frozen)
        before = copies(model.layers[1])
        opt.step(loss_of(model))
        steps["layers.1"] += not frozen
        steps["head"] += 1
        assert same(model.layers[1], before) == frozen
        if frozen:
            assert len(opt._runs) == len(BLOCKS) - 1
    state = opt.state_dict()["state"]
    names = [name for name, _ in model.named_parameters()]
    for block, count in steps.items():
        assert state[names.index(f"{block}.up.weight" if "." in block else f"{block}.weight")]["step"] == count


# RandomLayers ---------------------------------------------------------------------------------------------------------


@stores
@pytest.mark.parametrize("make", [ZOSGD, ZOAdam, ZOConservativeSGD], ids=lambda make: make.__name__)
def test_all_layers_make_the_bits_of_the_whole(make, store):
    model, twin = tower(), tower()
    opt = make(model, lr=1e-2, eps=1e-2, estimator=RandomLayers(1.0), store=store)
    other = make(twin, lr=1e-2, eps=1e-2, store=store)
    for _ in range(4):
        assert_same_bits(opt.step(loss_of(model)), other.step(loss_of(twin)))
        assert_same(model, twin)


def test_a_step_moves_the_chosen_layers_and_what_is_beside_them():
    model = tower(depth=10)
    opt = ZOSGD(model, lr=1e-2, eps=1e-2, estimator=RandomLayers(0.3), store="snapshot", seed=1)
    chosen = []
    for _ in range(40):
        before = copies(model), [copies(layer) for layer in model.layers]
        closure = Calls(loss_of(model), 0, lambda loss: loss)
        opt.step(closure)
        moved = [not same(layer, own) for layer, own in zip(model.layers, before[1], strict=True)]
        chosen.append(tuple(i for i, m in enumerate(moved) if m))
        assert len(chosen[-1]) == 3
        assert not same(model.head, before[0][-2:])
        assert closure.count == 2 or len(chosen) == 1
    counts = torch.bincount(torch.tensor(chosen).reshape(-1), minlength=10)
    deviation = (40 * 0.3 * 0.7) ** 0.5
    assert (counts - 12).abs().max() < 4 * deviation  # of ten binomials
    assert len(set(chosen)) > 20
    again = ZOSGD(tower(depth=10), estimator=RandomLayers(0.3), seed=1)
    picked = [again._estimator.stages([run.block for run in again._runs], 1, step)[0][0][:-1] for step in range(1, 41)]
    assert picked == chosen  # a function of seed, step and name
    other = [again._estimator.stages([run.block for run in again._runs], 2, step)[0][0][:-1] for step in range(1, 41)]
    assert other != chosen


def test_layers_resume_where_they_were(tmp_path):
    model, again = tower(depth=6), tower(depth=6)
    opt, other = (ZOAdam(m, lr=1e-2, eps=1e-2, estimator=RandomLayers(0.5)) for m in (model, again))
    for _ in range(3):
        opt.step(loss_of(model))
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for m, o in ((model, opt), (again, other)):
        for _ in range(3):
            o.step(loss_of(m))
    assert_same(model, again)
    applied = {name: header["applied"] for name, header in opt.state_dict()["pyzo"]["runs"].items()}
    assert sum(applied[f"layers.{i}"] for i in range(6)) == 6 * 3  # each layer counts its own updates
    assert applied["(beside the layers)"] == 6


# Arguments ------------------------------------------------------------------------------------------------------------


def test_parameters_and_groups_need_the_model():
    model = tower()
    groups = [
        {"params": list(model.layers.named_parameters(prefix="layers")), "lr": 1e-2},
        {"params": [(n, p) for n, p in model.named_parameters() if not n.startswith("layers")], "lr": 1e-3},
    ]
    for estimator in (BlockWise(), RandomLayers(0.5)):
        with pytest.raises(ValueError, match=r"estimator: expected .*\(\.\.\., model=\) where the optimizer is given"):
            ZOSGD(groups, estimator=estimator)
    opt = ZOSGD(groups, estimator=BlockWise(model=model))
    opt.step(loss_of(model))
    assert opt.last.coefficients.shape == (2, len(BLOCKS))
    of_layers = [name.startswith("layers") for name in BLOCKS]
    assert (opt.last.coefficients[0] != 0).tolist() == of_layers
    assert (opt.last.coefficients[1] == 0).tolist() == of_layers


def test_trained_parameters_outside_all_blocks_are_named():
    model, other = tower(), nn.Linear(2, 2)
    pairs = [*model.named_parameters(), *other.named_parameters(prefix="other")]
    with pytest.raises(
        ValueError, match=r"expected every trained parameter in a block, got none for other.bias, other"
    ):
        ZOSGD(pairs, estimator=BlockWise(model=model))
    with pytest.raises(
        ValueError, match=r"blocks: expected every trained parameter in a block, got none for 'norm\.weight"
    ):
        ZOSGD(model, estimator=BlockWise(["enter", "layers", "head"]))
    with pytest.raises(ValueError, match=r"blocks: expected 'layers\.0\.up\.weight' in one block"):
        ZOSGD(model, estimator=BlockWise(["enter", "layers", "layers.0", "norm", "head"]))


def test_bad_arguments():
    with pytest.raises(ValueError, match="blocks: expected 'layer', 'linear' or a list of blocks, got 'layers'"):
        BlockWise("layers")
    with pytest.raises(ValueError, match="order: expected 'gauss-seidel' or 'jacobi', got 'sor'"):
        BlockWise(order="sor")
    for estimator in (ForwardGrad(), BlockWise(), "two-sided"):
        with pytest.raises(TypeError, match="estimator: expected TwoSided or OneSided, got"):
            BlockWise(estimator=estimator)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        RandomLayers(0.5, model=[])
    for fraction in (0, 0.0, 1.5, -1, math.nan, None, "1", True):
        with pytest.raises(ValueError, match=r"fraction: expected a number in \(0, 1\], got"):
            RandomLayers(fraction)
    with pytest.raises(ValueError, match="model: expected a list of layers"):
        ZOSGD(nn.Linear(2, 2), estimator=BlockWise())


def test_masks_that_list_elements_compose_with_blocks():
    """Bits and lists move the same elements to the same bits."""
    bits = {
        n: torch.rand(p.shape, generator=torch.Generator().manual_seed(5)) < 0.3 for n, p in tower().named_parameters()
    }
    listed = Indices({name: b.reshape(-1).nonzero() for name, b in bits.items()})
    ends = []
    for mask in (Bits(bits), listed):
        model = tower(torch.bfloat16)
        opt = ZOAdam(model, lr=1e-2, eps=1e-2, estimator=BlockWise(), mask=mask, store="snapshot")
        for _ in range(3):
            opt.step(loss_of(model))
        ends.append(copies(model))
    for name, a, b, start in zip(bits, *ends, tower(torch.bfloat16).parameters(), strict=True):
        assert_same_bits(a, b, name)
        assert torch.equal(a[~bits[name]], start.detach()[~bits[name]])
