"""Whatever goes wrong in a hybrid step leaves no trace; states that continue; arguments and closures that cannot be."""

import copy
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from hybrids import Net, data, loss_of, net, weights_of
from tiny import llama
from torch import Tensor, nn

import pyzo
from pyzo.estimators import OneSided
from pyzo.optim import ZOSGD, ZOAdam
from pyzo.zo_fo import Hybrid

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def python_handles_interrupts() -> Iterator[None]:
    """Also where the tests run in the background, which a shell starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def run(model: nn.Module, k: int = 2, **changed: Any) -> Hybrid:
    return pyzo.hybrid(
        model, k, {"lr": 1e-2, "eps": 1e-2, "store": "snapshot", **changed}, adamw, optimizer=ZOAdam if k else ZOSGD
    )


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert_same_bits(got[name], tensor, name)


def numbers(state: Any) -> Any:
    """A state as something that == compares."""
    if isinstance(state, Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {key: numbers(value) for key, value in state.items()}
    return [numbers(value) for value in state] if isinstance(state, (list, tuple)) else state


class Trace:
    """What a step that fails must not change."""

    def __init__(self, model: nn.Module, both: Hybrid):
        self.model, self.both = model, both
        self.weights, self.generator = weights_of(model), torch.get_rng_state()
        self.state = copy.deepcopy(numbers(both.state_dict()))
        self.handler = signal.getsignal(signal.SIGINT)

    def check(self) -> None:
        assert_same(weights_of(self.model), self.weights)
        assert torch.equal(torch.get_rng_state(), self.generator)
        assert numbers(self.both.state_dict()) == self.state
        assert all(p.grad is None and p.requires_grad for p in self.model.parameters())
        assert signal.getsignal(signal.SIGINT) is self.handler
        assert not any(m._forward_pre_hooks for m in self.model.modules())


class At:
    """A closure that does something else with the loss of one of its calls."""

    def __init__(self, closure: Callable[[], Tensor], call: int, instead: Callable[[Tensor], Any]):
        self.closure, self.call, self.instead, self.count = closure, call, instead, 0

    def __call__(self) -> Any:
        self.count += 1
        loss = self.closure()
        return self.instead(loss) if self.count == self.call else loss


class Backward(torch.autograd.Function):
    """The same number, whose backward pass does something."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, action: Callable[[], None]) -> Tensor:
        ctx.action = action
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.action()
        return gradient, None


def stop(*_: Any) -> None:
    raise ValueError("stop")


def interrupt(loss: Tensor | None = None) -> Tensor | None:
    """Ctrl-C, while the closure or its backward pass runs."""
    signal.raise_signal(signal.SIGINT)
    return loss


# Failures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [stop, interrupt], ids=["exception", "interrupt"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_what_is_raised_in_the_closure_leaves_no_trace(call, action):
    """Weights, gradients, flags, generators, states and counters, from the first step on; the next step works."""
    model, twin = net(0.3), net(0.3)
    both, other = run(model), run(twin)
    torch.manual_seed(0)
    for _ in range(2):
        both.zero_grad()
        trace = Trace(model, both)
        closure = At(loss_of(model), call, action)
        with pytest.raises(KeyboardInterrupt if action is interrupt else ValueError):
            both.step(closure)
        assert closure.count == call
        trace.check()
        both.step(loss_of(model))
    torch.manual_seed(0)
    for _ in range(2):
        other.step(loss_of(twin))
    assert_same(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("action", [stop, interrupt], ids=["exception", "interrupt"])
def test_what_is_raised_in_the_backward_pass_leaves_no_trace(action):
    model = net(0.3)
    both = run(model)
    trace = Trace(model, both)
    with pytest.raises(KeyboardInterrupt if action is interrupt else ValueError):
        both.step(lambda: Backward.apply(loss_of(model)(), action))
    trace.check()


def test_an_interrupt_during_the_updates_waits_until_both_are_done():
    model, twin = net(), net()
    both, other = run(model), run(twin)
    update = both.zo.store.update

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        update(*arguments)

    both.zo.store.update = interrupted
    with pytest.raises(KeyboardInterrupt):
        both.step(loss_of(model))
    other.step(loss_of(twin))
    assert_same(weights_of(model), weights_of(twin))
    both = run(model)
    both.fo.register_step_pre_hook(lambda *_: interrupt())
    with pytest.raises(KeyboardInterrupt):
        both.step(loss_of(model))
    run(twin).step(loss_of(twin))
    assert_same(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", [None, OneSided(2)], ids=["two-sided", "one-sided"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_loss_that_is_not_finite_skips_both_updates(call, estimator, value):
    """Also l(w), which a two-sided estimate does not need."""
    model = net()
    both = run(model, estimator=estimator, weight_decay=0.1)
    both.step(loss_of(model))
    before, state = weights_of(model), numbers(both.state_dict())
    with pytest.warns(UserWarning, match="skipped: a loss or a coefficient was not finite"):
        both.step(At(loss_of(model), call, lambda loss: loss * 0 + value))
    assert_same(weights_of(model), before)
    after = numbers(both.state_dict())
    assert after["fo"] == state["fo"] and after["zo"]["state"] == state["zo"]["state"]
    assert both.skipped == both.zo.skipped == 1
    both.step(loss_of(model))
    assert both.skipped == 1
    assert all(not torch.equal(w, before[name]) for name, w in weights_of(model).items())


def test_without_a_zo_part_a_loss_that_is_not_finite_skips_too():
    model = net()
    both = run(model, 0)
    before = weights_of(model)
    with pytest.warns(UserWarning, match="a step skipped: its loss was not finite"):
        both.step(lambda: loss_of(model)() * math.nan)
    assert_same(weights_of(model), before)
    both.step(loss_of(model))
    assert both.skipped == 1
    assert not torch.equal(weights_of(model)["head.weight"], before["head.weight"])


def test_a_failing_fo_step_is_raised():
    model = net()
    both = run(model)
    before = weights_of(model)
    both.fo.register_step_pre_hook(stop)
    with pytest.raises(ValueError, match="stop"):
        both.step(loss_of(model))
    own = set(both.split.after)
    assert_same({n: w for n, w in weights_of(model).items() if n in own}, {n: before[n] for n in before if n in own})


@pytest.mark.parametrize(
    ("closure", "error", "message"),
    [
        (lambda model: None, TypeError, "^closure: expected a function"),
        (lambda model: lambda: 1.0, TypeError, "^closure: expected it to return a real scalar tensor, got float"),
        (lambda model: lambda: model(data()[0]), TypeError, r"^closure: .* got shape \(16, 3\)"),
        (lambda model: lambda: loss_of(model)().detach(), RuntimeError, "^closure: expected a loss that depends"),
        (lambda model: torch.no_grad()(loss_of(model)), RuntimeError, "^closure: expected a loss that depends"),
        (lambda model: model.layers[0].up.weight.sum, RuntimeError, "^closure: expected a loss that depends"),
        (lambda model: model.head.weight.sum, RuntimeError, "^closure: expected gradients in the layers"),
        (lambda model: lambda: backward(loss_of(model)()), RuntimeError, "^closure: expected no backward pass"),
    ],
)
def test_bad_closures(closure, error, message):
    model = net()
    both = run(model)
    trace = Trace(model, both)
    with pytest.raises(error, match=message):
        both.step(closure(model))
    trace.check()


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


# States -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 2])
def test_a_resumed_run_continues_bit_for_bit(k, tmp_path):
    model, twin = net(), net()
    both, other = run(model, k), run(twin, k)
    for _ in range(2):
        both.step(loss_of(model))
    torch.save(both.state_dict(), tmp_path / "state.pt")
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(2):
        both.step(loss_of(model))
        other.step(loss_of(twin))
    assert_same(weights_of(model), weights_of(twin))
    assert numbers(both.state_dict()) == numbers(other.state_dict())


def test_a_resumed_run_knows_how_many_steps_were_skipped():
    model = net()
    both, other = run(model), run(model)
    with pytest.warns(UserWarning, match="skipped"):
        both.step(lambda: loss_of(model)() * math.nan)
    other.load_state_dict(both.state_dict())
    before = weights_of(model)
    other.step(loss_of(model))
    assert other.skipped == 1
    assert not torch.equal(weights_of(model)["head.weight"], before["head.weight"])


def test_states_of_other_runs_are_refused():
    model = net()
    both = run(model)
    state = numbers(both.state_dict())
    with pytest.raises(ValueError, match=r"^state_dict: .* only the state trains 'layers\.1\.down\.bias' by fo"):
        both.load_state_dict({**both.state_dict(), "parameters": run(net(), 1).state_dict()["parameters"]})
    with pytest.raises(ValueError, match=r"^state_dict: expected the entries zo, fo and parameters, got \['state'\]"):
        both.load_state_dict({"state": {}})
    with pytest.raises(ValueError, match=r"^state_dict: expected one of ZOAdam"):
        sgd = pyzo.hybrid(net(), 2, {"lr": 1e-2})
        both.load_state_dict(sgd.state_dict())
    state_of_two_groups = both.state_dict()
    state_of_two_groups["fo"]["param_groups"] *= 2
    state_of_two_groups["zo"]["pyzo"]["runs"][""]["draw"] += 1
    with pytest.raises(ValueError, match="parameter groups"):
        both.load_state_dict(state_of_two_groups)
    assert numbers(both.state_dict()) == state


# Arguments ----------------------------------------------------------------------------------------------------------


class Own(torch.optim.SGD):
    """An optimizer that needs a closure."""

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        return super().step(closure)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"zo_layers": 5}, ValueError, r"^zo_layers: expected an integer in \[0, 4\], got 5"),
        ({"zo_layers": -1}, ValueError, r"^zo_layers: expected an integer in \[0, 4\], got -1"),
        ({"zo_layers": 1.0}, ValueError, r"^zo_layers: expected an integer in \[0, 4\], got 1\.0"),
        ({"layers": "nothing"}, ValueError, "^layers: expected a name in the model"),
        ({"front": ["layers.1"]}, ValueError, "^front: expected names outside the layers"),
        ({"zo": {"eps": 0.0}}, ValueError, "^eps: expected a finite number > 0"),
        ({"zo": {"epsilon": 0.1}}, TypeError, "epsilon"),
        ({"fo": lambda params: params}, TypeError, "^fo: expected a function that makes a torch optimizer, got list"),
        ({"fo": torch.optim.LBFGS}, TypeError, "^fo: expected an optimizer whose step needs no closure, got LBFGS"),
        ({"fo": Own}, TypeError, "^fo: expected an optimizer whose step needs no closure, got Own"),
        ({"fo": ZOSGD}, TypeError, "^fo: expected an optimizer whose step needs no closure, got ZOSGD"),
        (
            {"fo": lambda params: adamw(params[1:])},
            ValueError,
            r"^fo: .* the 16 parameters .* without 'layers\.2\.norm",
        ),
        ({"fo": lambda params: adamw(net().parameters())}, ValueError, r"^fo: .* without 'layers\.2\.norm\.weight'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    model = net()
    with pytest.raises(error, match=message):
        pyzo.hybrid(model, **{"zo_layers": 2, **arguments})
    assert all(p.requires_grad for p in model.parameters())


def test_an_optimizer_of_too_much_is_refused():
    model = net()
    with pytest.raises(
        ValueError, match=r"^fo: expected an optimizer of the 16 parameters it was given, got one with 14"
    ):
        pyzo.hybrid(model, 2, fo=lambda params: adamw(model.parameters()))


def test_models_that_cannot_be_split():
    with pytest.raises(ValueError, match=r"^model: expected parameters that require gradients"):
        run(net().requires_grad_(False))
    with pytest.raises(ValueError, match=r"^model: expected a list of layers"):
        run(nn.Linear(2, 2), 0)
    model = Net()
    model.layers = nn.ModuleList([*model.layers][:1])
    with pytest.raises(ValueError, match=r"^model: expected a list of layers"):
        run(model, 1)
    both = pyzo.hybrid(model, 1, layers="layers")
    both.step(loss_of(model))
    assert {name.split(".")[0] for name in both.split.before} == {"enter", "layers"}


def test_parameters_given_as_groups():
    """By name, without decay of norms, as users write it."""

    def groups(params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        norms = [(name, p) for name, p in params if "norm" in name]
        others = [(name, p) for name, p in params if "norm" not in name]
        return torch.optim.AdamW([{"params": norms, "weight_decay": 0.0}, {"params": others}], lr=1e-3)

    model = llama()
    both = pyzo.hybrid(model, 1, {"lr": 1e-3}, groups)
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}
    assert torch.isfinite(both.step(lambda: model(**batch).loss))
    assert [group["weight_decay"] for group in both.fo.param_groups] == [0.0, 0.01]
