"""`opt.capture`: recorded into a CUDA graph on a GPU, the same step with a reason elsewhere; what it refuses."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import assert_same, assert_same_trees, copies, states
from models import METHODS, Calls, batch, closure_of, cross_entropy, methods, run_state, transformer
from torch import Tensor, nn

from pyzo.optim.base import ZOOptimizer
from pyzo.optim.graph import idle

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(device: str, count: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    for _ in range(count):
        x, y = torch.randn(12, 5, 4, generator=generator), torch.randint(0, 3, (12,), generator=generator)
        yield {"x": x.to(device), "y": y.to(device)}


def loss_on(model: nn.Module) -> Any:
    return lambda batch: cross_entropy(model, batch["x"], batch["y"])


# On every device -----------------------------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_steps_are_the_steps(method, dtype, device):
    """Six steps, in bits: a graph on a GPU, no graph elsewhere; lr and eps change on the way, as a scheduler does."""
    model, twin = transformer(dtype).to(device), transformer(dtype).to(device)
    opt, other = (METHODS[method](m, seed=3, weight_decay=0.01) for m in (model, twin))
    made = [{**b, "x": b["x"].to(dtype)} for b in batches(device, 6)]
    captured = opt.capture(loss_on(model), {name: torch.zeros_like(t) for name, t in made[0].items()})
    assert_same(model, twin)
    assert run_state(opt)["draw"] == 0
    for step, own in enumerate(made):
        if step == 3:
            for o in (opt, other):
                o.param_groups[0]["lr"] *= 0.5
                o.param_groups[0]["eps"] *= 2
        loss = captured(own)
        want = other.step(lambda own=own: loss_on(twin)(own))
        assert torch.equal(loss, want), step
        assert torch.equal(opt.last.losses, other.last.losses), step
    assert (captured.graph is not None) == (device == "cuda"), captured.reason
    assert_same(model, twin)
    assert_same(states(opt), states(other))
    assert_same_trees(run_state(opt), run_state(other))


def test_a_skip_is_counted_in_a_captured_step(device):
    model = transformer().to(device)
    opt = METHODS["adam"](model, store="snapshot")
    (own,) = batches(device, 1)
    captured = opt.capture(loss_on(model), own)
    before = copies(model)
    with pytest.warns(UserWarning, match="skipped"):
        captured({**own, "x": own["x"] * math.nan})
        assert opt.skipped == 1
    assert_same(model, before)
    captured(own)
    assert run_state(opt) == {"seed": 0, "draw": 2, "applied": 1, "skipped": 1}


def test_captures_follow_parameters_that_join(device):
    model, twin = transformer().to(device), transformer().to(device)
    for m in (model, twin):
        m.head.requires_grad_(False)
    opt, other = METHODS["adam"](model), METHODS["adam"](twin)
    made = list(batches(device, 4))
    captured = opt.capture(loss_on(model), made[0])
    for step, own in enumerate(made):
        if step == 2:
            for m in (model, twin):
                m.head.requires_grad_(True)
        captured(own)
        other.step(lambda own=own: loss_on(twin)(own))
    assert (captured.graph is not None) == (device == "cuda"), captured.reason
    assert_same(model, twin)


@pytest.mark.parametrize("kind", ["dropout", "branch"])
def test_what_a_graph_cannot_hold_makes_ordinary_steps(kind, device):
    """Random numbers would repeat, and a branch on a tensor waits for it; both are the same steps all the same."""
    model, twin = (transformer(dropout=0.5 if kind == "dropout" else 0.0).to(device) for _ in range(2))
    opt, other = (METHODS["sgd"](m, store=store) for m, store in ((model, "scratch"), (twin, "snapshot")))

    def loss(m: nn.Module, own: dict[str, Tensor]) -> Tensor:
        value = loss_on(m)(own)
        return value if kind == "dropout" or value > 0 else -value

    made = list(batches(device, 3))
    torch.manual_seed(8)
    captured = opt.capture(lambda own: loss(model, own), made[0])
    for own in made:
        captured(own)
    torch.manual_seed(8)
    for own in made:
        other.step(lambda own=own: loss(twin, own))
    assert captured.graph is None
    if device == "cuda":
        assert {"dropout": "draws random numbers", "branch": "cannot be recorded"}[kind] in captured.reason
    assert_same(model, twin)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(12, 5, 4)}, "batch: expected the structure of the example"),
        ((torch.zeros(12, 5, 4), torch.zeros(12, dtype=torch.long)), "batch: expected the structure of the example"),
        (
            {"x": torch.zeros(11, 5, 4), "y": torch.zeros(12, dtype=torch.long)},
            r"batch: expected torch.float32 \(12, 5, 4\) as leaf 0, got torch.float32 \(11, 5, 4\)",
        ),
        (
            {"x": torch.zeros(12, 5, 4), "y": torch.zeros(12)},
            r"batch: expected torch.int64 \(12,\) as leaf 1, got torch.float32 \(12,\)",
        ),
        ({"x": torch.zeros(12, 5, 4), "y": 3}, r"batch: expected torch.int64 \(12,\) as leaf 1, got int"),
    ],
)
def test_bad_batches_are_refused_before_anything_is_written(wrong, message, device):
    model = transformer().to(device)
    opt = METHODS["sgd"](model)
    (own,) = batches(device, 1)
    captured = opt.capture(loss_on(model), own)
    before, example = copies(model), copies(own.values())
    with pytest.raises(ValueError, match=message):
        captured(wrong)
    assert_same(model, before)
    assert run_state(opt)["draw"] == 0
    captured(own)
    assert_same(own.values(), example)


def test_bad_closures_and_examples_are_refused():
    opt = METHODS["sgd"](transformer())
    with pytest.raises(TypeError, match="closure: expected a function of a batch, got float"):
        opt.capture(1.0, batch())
    with pytest.raises(TypeError, match="example: expected tensors as leaves, got str as leaf 1"):
        opt.capture(cross_entropy, [batch()[0], "labels"])


# Where there is no graph ---------------------------------------------------------------------------------------------


def test_on_the_cpu_it_falls_back_and_says_why():
    model = transformer()
    opt = METHODS["sgd"](model)
    seen = []

    def closure(own: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(own[0])
        return cross_entropy(model, *own)

    captured = opt.capture(closure, batch())
    assert captured.graph is None
    assert captured.reason == "the trained parameters are not on a CUDA device"
    assert captured.reason in repr(captured)
    assert not seen  # nothing to warm up
    own = batch()
    captured(own)
    assert all(x is own[0] for x in seen)


def test_errors_of_a_closure_come_through():
    model = transformer()
    opt = METHODS["adam"](model, store="snapshot")
    captured = opt.capture(lambda own: cross_entropy(model, *own)[0], batch())
    before = copies(model)
    with pytest.raises(IndexError):
        captured(batch())
    assert_same(model, before)
    assert run_state(opt)["draw"] == 0


# The idle steps that warm a capture up -------------------------------------------------------------------------------


def everything(opt: ZOOptimizer, model: nn.Module) -> dict[str, Any]:
    saved = opt.state_dict()
    return {
        "weights": copies(model),
        "states": copies(states(opt)),
        "steps": {i: s.get("step") for i, s in saved["state"].items()},
        "pyzo": saved["pyzo"],
        "last": opt.last and vars(opt.last),
    }


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("store", ["inplace", "scratch", "snapshot"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_idle_steps_change_no_bit(method, dtype, store, steps_before, recwarn):
    """Weights in place too: perturbations have length 0. Every loss counts as NaN, so that states stay as well."""
    model, twin = transformer(dtype), transformer(dtype)
    opt, other = (METHODS[method](m, store=store, weight_decay=0.1, seed=6) for m in (model, twin))
    for _ in range(steps_before):
        opt.step(closure_of(model))
        other.step(closure_of(twin))
    before = everything(opt, model)
    recwarn.clear()
    closure = Calls(closure_of(model), 0, Tensor.clone)
    with idle(opt):
        for _ in range(2):
            opt.step(closure)
    assert closure.count >= 2 * METHODS[method].calls  # all of the work is done
    assert_same_trees(everything(opt, model), before)
    assert not [str(w.message) for w in recwarn.list if issubclass(w.category, UserWarning)]
    opt.step(closure_of(model))
    other.step(closure_of(twin))
    assert_same(model, twin)
    assert_same(states(opt), states(other))
    assert run_state(opt) == run_state(other)


def test_an_idle_step_that_fails_leaves_the_optimizer_live():
    model = transformer()
    opt = METHODS["adam"](model)
    before = everything(opt, model)
    with pytest.raises(ValueError, match="stop"), idle(opt):

        def closure() -> Tensor:
            raise ValueError("stop")

        opt.step(closure)
    assert_same_trees(everything(opt, model), before)
    opt.step(closure_of(model))
    assert run_state(opt)["applied"] == 1
