"""Whatever happens inside a step of any method, it comes back: exceptions, interrupts, losses that are no numbers."""

import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from bits import weights
from compare import assert_same, assert_same_trees, copies, same, states
from models import DTYPES, EXACT, METHODS, Calls, closure_of, dtypes, methods, run_state, transformer
from torch import Tensor, nn

from pyzo.estimators import TwoSided
from pyzo.optim import ZOSGD, ForwardGradSGD

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_CALL = [(name, call) for name, recipe in METHODS.items() for call in range(1, recipe.calls + 1)]
CANDIDATES = {name: recipe.calls - 1 for name, recipe in METHODS.items() if "conservative" in name}  # the first one
PROBES = [(name, call) for name, call in EVERY_CALL if call < CANDIDATES.get(name, math.inf)]
every_call = pytest.mark.parametrize(("method", "call"), EVERY_CALL)


@pytest.fixture(autouse=True)
def python_handles_interrupts() -> Iterator[None]:
    """Also where the tests run in the background, which a shell starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Pair(nn.Module):
    """Weights that rounding or arithmetic would change (-0.0, NaN with payloads, infinities, subnormals), which the
    loss does not see, and others, which it does."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.special = nn.Parameter(weights(300, dtype, seed=1))
        self.seen = nn.Parameter(weights(100, dtype, seed=2, special=False).clamp(-1, 1))

    def loss(self) -> Tensor:
        return self.seen.float().sin().sum() + torch.rand(()) / 100


def assert_close(got: nn.Module, want: list[Tensor], passes: int) -> None:
    """Weights of magnitude below 2 that went through `passes` passes and their ways back, in float32."""
    for p, w in zip(got.parameters(), want, strict=True):
        assert (p.detach() - w).abs().max() <= 2 * (passes + 1) * 2.0**-23


def stop(kind: type[BaseException]) -> Callable[[Tensor], Tensor]:
    def raise_(loss: Tensor) -> Tensor:
        raise kind("stop")

    return raise_


def interrupt(loss: Tensor) -> Tensor:
    """Ctrl-C while the closure runs."""
    signal.raise_signal(signal.SIGINT)
    return loss


# Exceptions ----------------------------------------------------------------------------------------------------------


@every_call
def test_an_exception_leaves_no_trace_under_an_exact_store(method, call):
    """At every call of every method, candidates included: weights, states, generators and counters, bit for bit."""
    kind = (ValueError, KeyboardInterrupt, SystemExit)[call % 3]
    for dtype in DTYPES:
        model = Pair(dtype)
        opt = METHODS[method](model, **EXACT)
        opt.step(model.loss)
        before, state, generator = copies(model), opt.state_dict(), torch.get_rng_state()
        kept, last = copies(states(opt)), vars(opt.last)
        closure = Calls(model.loss, call, stop(kind))
        with pytest.raises(kind, match="stop"):
            opt.step(closure)
        assert closure.count == call
        assert_same(model, before)
        assert_same(states(opt), kept)
        assert_same_trees(opt.state_dict(), state)
        assert_same_trees(vars(opt.last), last)
        assert torch.equal(generator, torch.get_rng_state())


@every_call
def test_an_exception_is_taken_back_within_rounding_in_place(method, call):
    model = transformer()
    closure = closure_of(model)
    opt = METHODS[method](model, store="inplace")
    opt.step(closure)
    before, state, kept = copies(model), run_state(opt), copies(states(opt))
    with pytest.raises(ValueError, match="stop"):
        opt.step(Calls(closure, call, stop(ValueError)))
    assert_close(model, before, passes=2 * call)
    assert_same(states(opt), kept)
    assert run_state(opt) == state


@every_call
def test_an_interrupt_inside_the_closure_is_delivered_there(method, call):
    model = Pair()
    opt = METHODS[method](model, **EXACT)
    opt.step(model.loss)
    before, state, handler = copies(model), run_state(opt), signal.getsignal(signal.SIGINT)
    closure = Calls(model.loss, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert closure.count == call
    assert_same(model, before)
    assert run_state(opt) == state
    assert signal.getsignal(signal.SIGINT) is handler


@methods
def test_the_step_after_a_failed_one_is_the_one_that_failed(method):
    """Same seeds, same generators: a run with failures in between is the run without."""
    model, twin = transformer(), transformer()
    opt, other = (METHODS[method](m, **EXACT) for m in (model, twin))
    for call in range(1, METHODS[method].calls + 1):
        with pytest.raises(ValueError, match="stop"):
            opt.step(Calls(closure_of(model), call, stop(ValueError)))
        opt.step(closure_of(model))
        other.step(closure_of(twin))
    assert_same(model, twin)
    assert_same(states(opt), states(other))


# Losses that are not finite ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "call"), PROBES)
def test_a_loss_that_is_not_finite_freezes_everything(method, call):
    """Weights, decay, momentum, m, v and the number of updates stay; only draw and skipped count."""
    model, bad = Pair((torch.float32, torch.bfloat16)[call % 2]), (math.nan, math.inf, -math.inf)
    opt = METHODS[method](model, weight_decay=0.1, **EXACT)
    for _ in range(2):
        opt.step(model.loss)
    before, kept, saved = copies(model), copies(states(opt)), opt.state_dict()["state"]
    for skipped, value in enumerate(bad, 1):
        with pytest.warns(UserWarning, match=r"1 step\(s\) skipped: a loss or a coefficient was not finite"):
            opt.step(Calls(model.loss, call, lambda loss, value=value: loss * 0 + value))
        assert_same(model, before)
        assert_same(states(opt), kept)
        assert_same_trees(opt.state_dict()["state"], saved)
        assert run_state(opt) == {"seed": 0, "draw": 2 + skipped, "applied": 2, "skipped": skipped}
        assert opt.skipped == skipped
    opt.step(model.loss)
    assert run_state(opt)["applied"] == 3
    assert not same([model.seen], before[1:])


@methods
def test_steps_after_a_skip_count_on_from_before_it(method):
    """Ages, and with them bias corrections, are those of a run that drew the same seeds for its updates alone."""
    model, twin = transformer(), transformer()
    opt, other = (METHODS[method](m, **EXACT) for m in (model, twin))
    for step in range(4):
        if step == 2:
            with pytest.warns(UserWarning, match="skipped"):
                opt.step(Calls(closure_of(model), 1, lambda loss: loss * math.nan))
            state = other.state_dict()
            state["pyzo"]["runs"][""]["draw"] += 1
            other.load_state_dict(state)
        opt.step(closure_of(model))
        other.step(closure_of(twin))
    assert_same(model, twin)
    assert_same(states(opt), states(other))


@pytest.mark.parametrize("method", CANDIDATES)
def test_candidates_that_are_not_finite_are_not_chosen_and_the_step_counts(method):
    model = transformer()
    opt = METHODS[method](model, **EXACT)
    before = copies(model)
    calls = iter(range(1, 100))

    def closure() -> Tensor:
        return torch.tensor(math.nan) if next(calls) >= CANDIDATES[method] else closure_of(model)()

    opt.step(closure)
    assert_same(model, before)
    assert (opt.last.choice, opt.skipped, run_state(opt)["applied"]) == (0, 0, 1)


def test_a_conservative_step_that_skips_ends_where_it_began_whatever_its_candidates():
    model = transformer()
    opt = METHODS["conservative"](model, **EXACT)
    before, losses = copies(model), iter([1.0, math.nan, 1.0, 0.0, 0.0])
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(lambda: next(losses))
    assert_same(model, before)
    assert opt.last.choice == 0


def test_an_overflowing_coefficient_skips_too():
    model = nn.Linear(3, 1)
    opt = ZOSGD(model, lr=1.0, eps=1e-30, **EXACT)
    before, losses = copies(model), iter([1e30, -1e30])
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(lambda: torch.tensor(next(losses), dtype=torch.float64))
    assert opt.skipped == 1
    assert_same(model, before)


def test_a_derivative_that_is_not_finite_skips_too():
    w = nn.Parameter(torch.zeros(3))
    opt = ForwardGradSGD([("w", w)], lr=1.0, weight_decay=0.1)
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(lambda: w.sqrt().sum())
    assert opt.skipped == 1
    assert opt.last.losses[0] == 0
    assert_same([w], [torch.zeros(3)])


def test_losses_without_spread_skip_a_normalised_step():
    model = nn.Linear(3, 1)
    opt = METHODS["fzoo"](model)
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(lambda: 1.0)
    assert opt.skipped == 1


# Interrupts while weights are written --------------------------------------------------------------------------------


class InterruptAround:
    """Raises SIGINT before and again after the n-th of a store's moves or attempts: both must wait."""

    def __init__(self, opt: ZOSGD, at: int):
        self.moves, self.at = 0, at
        for name in ("move", "attempt"):
            setattr(opt.store, name, self.hook(getattr(opt.store, name)))

    def hook(self, function: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: object) -> None:
            self.moves += 1
            now = self.moves == self.at
            if now:
                signal.raise_signal(signal.SIGINT)
            function(*arguments)
            if now:
                signal.raise_signal(signal.SIGINT)

        return run


@pytest.mark.parametrize("store", ["inplace", "snapshot"])
@pytest.mark.parametrize(("method", "at"), [("momentum", 1), ("adam", 2), *(("conservative", i) for i in range(1, 5))])
def test_an_interrupt_during_a_pass_waits_for_its_end(method, store, at):
    model = transformer()
    opt = METHODS[method](model, store=store)
    before, handler = copies(model), signal.getsignal(signal.SIGINT)
    hook = InterruptAround(opt, at)
    closure = Calls(closure_of(model), 0, stop(AssertionError))
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert hook.moves == at
    assert closure.count == at - (method != "conservative")  # delivered at the closure's door, after the pass
    assert signal.getsignal(signal.SIGINT) is handler
    assert_close(model, before, passes=0 if store == "snapshot" else 2 * at)
    if store == "snapshot":
        assert_same(model, before)


@pytest.mark.parametrize("method", ["sgd", "adam", "conservative"])
def test_an_interrupt_during_the_update_is_delivered_after_it(method):
    model, twin = transformer(), transformer()
    opt, other = (METHODS[method](m, **EXACT) for m in (model, twin))
    update = opt.store.update

    def interrupted(*what: object) -> None:
        signal.raise_signal(signal.SIGINT)
        update(*what)

    opt.store.update = interrupted
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure_of(model))
    other.step(closure_of(twin))
    assert_same(model, twin)  # the step was complete when the interrupt came through
    assert_same_trees(opt.state_dict(), other.state_dict())


def test_steps_work_outside_the_main_thread():
    model = Pair()
    before = copies(model)
    opt = ZOSGD(model, lr=1e-2)
    thread = threading.Thread(target=lambda: opt.step(model.loss))
    thread.start()
    thread.join()
    assert not same([model.seen], before[1:])


# Closures and stores that cannot be used -----------------------------------------------------------------------------


@methods
def test_bad_closures(method):
    model = Pair()
    opt = METHODS[method](model, **EXACT)
    before = copies(model)
    for closure, error, message in [
        (None, TypeError, "closure: expected a function"),
        (lambda: None, TypeError, "got NoneType"),
        (lambda: torch.ones(3), TypeError, r"shape \(3,\)"),
        (lambda: torch.ones((), dtype=torch.complex64), TypeError, "complex|real scalar"),
    ]:
        with pytest.raises(error, match=message):
            opt.step(closure)
    assert_same(model, before)
    assert run_state(opt)["draw"] == 0


@methods
def test_backward_in_the_closure_is_refused(method):
    model = transformer()
    opt = METHODS[method](model, **EXACT)
    before = copies(model)

    def closure() -> Tensor:
        with torch.enable_grad():
            loss = closure_of(model)()
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="closure: expected no backward"):
        opt.step(closure)
    assert_same(model, before)
    for p in model.parameters():
        p.grad = None
    with pytest.raises(RuntimeError, match="does not require grad"):
        opt.step(lambda: closure_of(model)().backward())  # under no_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_losses_need_not_be_differentiable(dtype):
    losses = iter([3, 0])
    loss = ZOSGD(nn.Linear(4, 2), lr=1e-3).step(lambda: torch.tensor(next(losses)).to(dtype))
    assert loss.dtype == torch.float64
    assert loss.item() == (0.5 if dtype == torch.bool else 1.5)


def test_a_store_that_cannot_open_leaves_no_trace(monkeypatch):
    model = Pair(torch.bfloat16)
    opt = ZOSGD(model, **EXACT)
    before, state = copies(model), run_state(opt)

    def full(*_: object, **__: object) -> None:
        raise MemoryError("no room for the copy")

    monkeypatch.setattr(opt.store, "open", full)
    with pytest.raises(MemoryError, match="no room"):
        opt.step(model.loss)
    assert_same(model, before)
    assert run_state(opt) == state


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_numbers_are_losses(no_warnings):
    assert ZOSGD(nn.Linear(4, 2)).step(lambda: 1.5).item() == 1.5


@dtypes
def test_16_bit_losses_get_one_warning(dtype, no_warnings):
    opt = ZOSGD(nn.Linear(4, 2), eps=1e-3)
    losses = iter([0.5, 1.0, 0.75, 1.0])
    closure = lambda: torch.tensor(next(losses), dtype=dtype)  # noqa: E731
    if dtype == torch.float32:
        opt.step(closure)
    else:
        apart, coarse = {torch.bfloat16: ("0.0039", "2"), torch.float16: ("0.00049", "0.24")}[dtype]
        message = f"{dtype} loss: between 0.5 and 1 such losses are {apart} apart.*multiples of {coarse} at eps=0.001"
        with pytest.warns(UserWarning, match=message):
            opt.step(closure)
    opt.step(closure)  # no second one


def test_16_bit_losses_are_subtracted_in_float64():
    opt = ZOSGD(nn.Linear(4, 2), eps=0.5, estimator=TwoSided())
    losses = iter([torch.tensor(1.0, dtype=torch.float16), torch.tensor(2.0**-11, dtype=torch.float16)])
    with pytest.warns(UserWarning, match="float16 loss"):
        opt.step(lambda: next(losses))
    assert opt.last.coefficients.item() == 1.0 - 2.0**-11  # in float16 the difference would be 1
