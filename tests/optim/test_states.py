"""States of the optimizers: saving, exact resume, what is refused, parameters that join late or change their dtype."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from compare import assert_same, assert_same_trees, copies, same, states
from models import METHODS, closure_of, dtypes, methods, run_state, stateful, transformer
from torch import Tensor, nn

import pyzo
from pyzo.masks import Random
from pyzo.optim import ZOSGD, ZOAdam

pytestmark = pytest.mark.usefixtures("one_thread")


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def steps(model: nn.Module, opt: torch.optim.Optimizer, count: int) -> None:
    closure = closure_of(model)
    for _ in range(count):
        opt.step(closure)


# Saving and resuming -------------------------------------------------------------------------------------------------


@methods
@dtypes
def test_a_run_resumes_bit_for_bit_from_a_file(method, dtype):
    """Into an optimizer that was made with other numbers: those of the file win."""
    whole, first, second = (transformer(dtype) for _ in range(3))
    common = {"seed": 2**64 - 5, "store": "inplace", "weight_decay": 0.01}
    opt = METHODS[method](whole, **common)
    steps(whole, opt, 7)

    before = METHODS[method](first, **common)
    steps(first, before, 3)
    saved = through_a_file({"model": first.state_dict(), "opt": before.state_dict()})
    assert_same_trees(saved["opt"], before.state_dict())
    second.load_state_dict(saved["model"])
    after = METHODS[method](second, **common | {"lr": 0.5, "eps": 1.0, "seed": 77, "mask": Random(0.9)})
    steps(second, after, 1)
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["opt"])
    assert_same_trees(after.state_dict(), saved["opt"])
    assert after.last is None
    steps(second, after, 4)
    assert_same(second, whole)
    assert_same(states(after), states(opt))
    assert run_state(after) == run_state(opt) == {"seed": 2**64 - 5, "draw": 7, "applied": 7, "skipped": 0}


@stateful
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_keep_their_dtype_beside_16_bit_weights(method, state_dtype):
    model, twin = transformer(torch.bfloat16), transformer(torch.bfloat16)
    opt, other = (METHODS[method](m, state_dtype=state_dtype) for m in (model, twin))
    steps(model, opt, 3)
    other.load_state_dict(through_a_file(opt.state_dict()))
    for a, b in zip(states(opt), states(other), strict=True):
        assert a.dtype == state_dtype
        assert a.any()
        assert_same_bits(b, a)
        assert a.data_ptr() != b.data_ptr()


@stateful
def test_a_loaded_state_is_a_copy(method):
    model, twin = transformer(), transformer()
    opt, other = (METHODS[method](m) for m in (model, twin))
    steps(model, opt, 2)
    kept = copies(states(opt))
    other.load_state_dict(opt.state_dict())
    steps(twin, other, 2)
    assert_same(states(opt), kept)
    assert not same(states(other), kept)


@stateful
def test_a_saved_state_is_torchs_form_and_does_not_change_the_optimizer(method):
    model = transformer()
    opt = METHODS[method](model)
    steps(model, opt, 2)
    names = set(opt.state_names)
    saved = opt.state_dict()
    assert set(saved) == {"state", "param_groups", "pyzo"}
    for state in saved["state"].values():
        assert set(state) == {*names, "step"}
        assert state["step"] == 2
    for p in model.parameters():
        assert set(opt.state[p]) == names  # what is only saved stays out of the state
    assert isinstance(opt.param_groups[0]["mask"], Random | None)


@methods
def test_deep_copies_and_hooks_of_torch_work(method):
    """copy.deepcopy of a state dict is a state dict; torch's load and step hooks are called."""
    model = transformer()
    opt = METHODS[method](model)
    steps(model, opt, 1)
    called = []
    opt.register_step_post_hook(lambda *_: called.append("step"))
    opt.register_load_state_dict_post_hook(lambda *_: called.append("load"))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    steps(model, opt, 1)
    assert called == ["load", "step"]


def test_skips_of_the_past_are_not_reported_again(recwarn):
    model = nn.Linear(2, 2)
    opt = ZOSGD(model)
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(lambda: float("nan"))
    other = ZOSGD(nn.Linear(2, 2))
    other.load_state_dict(opt.state_dict())
    recwarn.clear()
    other.step(lambda: 1.0)
    assert other.skipped == 1
    assert not recwarn.list


# What is refused -----------------------------------------------------------------------------------------------------


def change(saved: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    """A deep copy of a state dict, in which the state of the parameter 0 has another entry."""
    saved = copy.deepcopy(saved)
    saved["state"][0][where] = value
    return saved


def foreign_states() -> dict[str, tuple[dict[str, Any], str]]:
    """What an Adam on `transformer()` must not load, and what the message says."""
    model = transformer()
    adam = ZOAdam(model).state_dict()
    version, unnamed = copy.deepcopy(adam), copy.deepcopy(adam)
    version["pyzo"]["noise_version"] = 2
    del unnamed["state"][0]
    names = [(f"other.{n}", p) for n, p in model.named_parameters()]
    two_groups = [{"params": [p]} for p in model.named_parameters()]
    shape = torch.zeros(4, 8)
    return {
        "torch": (torch.optim.Adam(model.parameters()).state_dict(), "'pyzo'"),
        "noise version": (version, "noise version 1, got 2"),
        "names": (ZOAdam(names).state_dict(), "same trained parameters"),
        "groups": (ZOAdam(two_groups).state_dict(), "parameter group"),
        "without state": (ZOSGD(model).state_dict(), "state"),
        "momentum": (ZOSGD(model, momentum=0.9).state_dict(), "state_dict: expected"),
        "state dtype": (ZOAdam(model, state_dtype=torch.bfloat16).state_dict(), "exp_avg of dtype torch.float32"),
        "shape": (change(adam, "exp_avg_sq", shape), r"exp_avg_sq .* shape \(8, 4\), got torch.float32 and \(4, 8\)"),
        "surplus": (change(adam, "max_exp_avg_sq", shape), "max_exp_avg_sq"),
        "a state is missing": (unnamed, "state"),
    }


@pytest.mark.parametrize("kind", foreign_states())
def test_a_foreign_state_is_refused_before_anything_changes(kind):
    state, message = foreign_states()[kind]
    model, twin = transformer(), transformer()
    opt, other = ZOAdam(model, lr=1e-3, seed=3), ZOAdam(twin, lr=1e-3, seed=3)
    steps(model, opt, 2)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert_same_trees(opt.state_dict(), before)
    steps(model, opt, 1)  # and the run goes on as if nothing had been tried
    steps(twin, other, 3)
    assert_same(model, twin)


@pytest.mark.parametrize(
    ("saver", "loader"),
    [
        ("adam", "sgd"),
        ("momentum", "sgd"),
        ("sgd", "momentum"),
        ("sgd", "sign"),
        ("sign", "sgd"),
        ("sign", "conservative"),
    ],
)
def test_the_state_of_another_method_is_refused_before_anything_changes(saver, loader):
    model = transformer()
    opt = METHODS[loader](model)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="state_dict"):
        opt.load_state_dict(METHODS[saver](transformer()).state_dict())
    assert_same_trees(opt.state_dict(), before)


# Parameters that join late -------------------------------------------------------------------------------------------


def slopes(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """A loss that is linear in both tensors."""
    return lambda: (a * torch.linspace(-1, 1, a.numel())).sum() + (b * torch.linspace(2, 1, b.numel())).sum()


def estimate(opt: ZOSGD, name: str, n: int) -> Tensor:
    """g of the latest step, of a parameter in the last group."""
    c = opt.last.coefficients[-1, 0].float()
    return c * pyzo.noise(n, seed=opt.last.seeds[0], key=pyzo.tensor_key(name))


@pytest.mark.parametrize("how", ["unfrozen", "added"])
@pytest.mark.parametrize(
    ("own", "theirs", "arguments"),
    [
        (ZOAdam, torch.optim.Adam, {"betas": (0.8, 0.9)}),
        (ZOSGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    ],
    ids=["adam", "momentum"],
)
def test_late_parameters_count_their_own_updates_as_in_torch(own, theirs, arguments, how):
    """Adam's bias correction and the undamped first update start when a tensor joins; a skip before that counts not."""
    a, b = nn.Parameter(torch.ones(20)), nn.Parameter(torch.ones(30))
    want = {"a": torch.ones(20), "b": torch.ones(30)}
    late = [theirs([want[n]], lr=1e-2, **arguments) for n in ("a", "b")]
    b.requires_grad_(False)
    groups = [("a", a)] if how == "added" else [("a", a), ("b", b)]
    opt = own(groups, lr=1e-2, eps=1e-2, store="snapshot", **arguments)
    for step in range(9):
        if step == 3:
            with pytest.warns(UserWarning, match="skipped"):
                opt.step(lambda: float("nan"))
        if step == 4:
            b.requires_grad_(True)
            if how == "added":
                opt.add_param_group({"params": [("b", b)]})
        opt.step(slopes(a, b))
        for name, optimizer in zip("ab", late, strict=True):
            if name == "a" or step >= 4:
                want[name].grad = estimate(opt, name, want[name].numel())
                optimizer.step()
        torch.testing.assert_close(a.detach(), want["a"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(b.detach(), want["b"], rtol=1e-5, atol=1e-6)
    saved = opt.state_dict()["state"]
    assert [saved[i]["step"] for i in range(2)] == [9, 5]


@stateful
def test_late_parameters_resume_bit_for_bit(method):
    def train(first: int, second: int, *, resume: bool) -> tuple[list[Tensor], dict[str, Any]]:
        model = transformer()
        model.head.requires_grad_(False)
        opt = METHODS[method](model)
        steps(model, opt, first)
        model.head.requires_grad_(True)
        steps(model, opt, 2)
        if resume:
            saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
            model = transformer()
            model.load_state_dict(saved["model"])
            opt = METHODS[method](model)
            opt.load_state_dict(saved["opt"])
        steps(model, opt, second)
        return copies(model), opt.state_dict()

    (weights, state), (resumed, again) = (train(3, 3, resume=resume) for resume in (False, True))
    assert_same(resumed, weights)
    assert_same_trees(again, state)
    assert {entry["step"] for entry in state["state"].values()} == {8, 5}


def test_a_parameter_that_was_frozen_for_a_while_counts_its_own_updates():
    """As torch.optim: an update that a parameter did not take part in is none of its updates."""
    a, b = nn.Parameter(torch.ones(20)), nn.Parameter(torch.ones(30))
    want = torch.ones(30)
    theirs = torch.optim.Adam([want], lr=1e-2, betas=(0.8, 0.9))
    opt = ZOAdam([("a", a), ("b", b)], lr=1e-2, eps=1e-2, betas=(0.8, 0.9), store="snapshot")
    for step in range(8):
        b.requires_grad_(not 2 <= step < 6)
        opt.step(slopes(a, b))
        if b.requires_grad:
            want.grad = estimate(opt, "b", 30)
            theirs.step()
        torch.testing.assert_close(b.detach(), want, rtol=1e-5, atol=1e-6)


# Parameters that change under the optimizer --------------------------------------------------------------------------


@stateful
def test_a_model_may_change_its_dtype_between_steps(method):
    """The state stays what it is; the run goes on as one that was loaded into a model of the new dtype."""
    model = transformer()
    opt = METHODS[method](model, store="snapshot")
    steps(model, opt, 3)
    saved = through_a_file(opt.state_dict())
    model.to(torch.bfloat16)
    twin = transformer().to(torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    other = METHODS[method](twin, store="snapshot")
    other.load_state_dict(saved)
    steps(model, opt, 3)
    steps(twin, other, 3)
    assert_same(model, twin)
    assert_same(states(opt), states(other))
    assert {s.dtype for s in states(opt)} == {torch.float32}
    assert run_state(opt)["applied"] == 6


@methods
@pytest.mark.parametrize("store", ["inplace", "snapshot"])
def test_data_may_be_swapped_between_steps(method, store):
    model, twin = transformer(), transformer()
    opt, other = (METHODS[method](m, store=store) for m in (model, twin))
    steps(model, opt, 2)
    steps(twin, other, 2)
    old = [p.data for p in model.parameters()]
    before = copies(old)
    for p in model.parameters():
        p.data = p.data.clone()
    steps(model, opt, 2)
    steps(twin, other, 2)
    assert_same(model, twin)
    assert_same(old, before)  # nothing is written where the weights were


@stateful
def test_data_of_another_shape_is_refused_with_the_name(method):
    model = transformer()
    opt = METHODS[method](model)
    steps(model, opt, 1)
    model.up.weight.data = torch.zeros(3, 8)
    before, kept = copies(model), copies(states(opt))
    with pytest.raises(ValueError, match=r"up\.weight"):
        opt.step(lambda: 1.0)
    assert_same(model, before)
    assert_same(states(opt), kept)


@methods
def test_freezing_takes_a_parameter_out(method):
    model = transformer()
    opt = METHODS[method](model, weight_decay=0.1)
    steps(model, opt, 2)
    model.qkv.requires_grad_(False)
    before = copies([model.qkv.weight])
    steps(model, opt, 2)
    assert_same([model.qkv.weight], before)
    model.qkv.requires_grad_(True)
    steps(model, opt, 1)
    assert not same([model.qkv.weight], before) or "conservative" in method
