"""Whatever happens inside a step, the weights come back: exceptions, interrupts, losses that are no numbers."""

import signal
import threading

import pytest
import torch

from pyzo.estimators import TwoSided
from pyzo.optim import ZOSGD

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def special_model(dtype: torch.dtype) -> torch.nn.Module:
    """Weights that rounding or arithmetic would change: -0.0, NaN with a payload, infinities, subnormals."""
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 7).to(dtype)
    with torch.no_grad():
        flat = model.weight.view(-1)
        flat[0], flat[1], flat[2], flat[3], flat[4] = -0.0, float("inf"), float("-inf"), float("nan"), 0.0
        codes = flat.view(BITS[dtype])
        codes[5] = {torch.float32: 0x7F812345, torch.bfloat16: 0x7F85, torch.float16: 0x7C05}[dtype]  # a signalling NaN
        codes[6] = 3  # subnormal
    return model


def bits(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone().view(BITS[p.dtype]) for p in model.parameters()]


def assert_same(model: torch.nn.Module, before: list[torch.Tensor]) -> None:
    for old, new in zip(before, bits(model), strict=True):
        assert torch.equal(old, new)


def finite_loss(model: torch.nn.Module) -> torch.Tensor:
    return model.bias.float().pow(2).sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_exception_leaves_no_trace_in_the_snapshot_store(dtype, kind, call):
    model = special_model(dtype)
    opt = ZOSGD(model, lr=1.0, eps=1e-2, estimator=TwoSided(2), store="snapshot")
    before, state, generator = bits(model), opt.state_dict(), torch.get_rng_state()
    calls = []

    def closure():
        calls.append(torch.rand(1))
        if len(calls) == call:
            raise kind("stop")
        return finite_loss(model)

    with pytest.raises(kind, match="stop"):
        opt.step(closure)
    assert_same(model, before)
    assert opt.state_dict() == state
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_exception_in_the_in_place_store_restores_in_place(call):
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 7)
    opt = ZOSGD(model, lr=1.0, eps=1e-2, estimator=TwoSided(2), store="inplace")
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def closure():
        calls.append(None)
        if len(calls) == call:
            raise ValueError("stop")
        return finite_loss(model)

    with pytest.raises(ValueError, match="stop"):
        opt.step(closure)
    # each of the (call) perturb passes and the restore rounds at most twice, at magnitudes below 1
    for old, new in zip(before, model.parameters(), strict=True):
        assert (old - new).abs().max() <= 2 * (call + 1) * 2.0**-24


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lr_zero_is_bit_identical_in_the_snapshot_store(dtype):
    model = special_model(dtype)
    before = bits(model)
    opt = ZOSGD(model, lr=0.0, eps=1e-2, store="snapshot", weight_decay=0.5)
    for _ in range(20):
        opt.step(lambda: finite_loss(model))
    assert_same(model, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("call", [0, 1, 3])
def test_a_loss_that_is_not_finite_skips_the_update(bad, call):
    model = special_model(torch.bfloat16)
    before = bits(model)
    opt = ZOSGD(model, lr=1.0, weight_decay=0.1, estimator=TwoSided(2), store="snapshot")
    calls = []

    def closure():
        calls.append(None)
        return torch.tensor(bad) if len(calls) == call + 1 else finite_loss(model)

    with pytest.warns(UserWarning, match=r"1 step.s. skipped: a loss was not finite"):
        opt.step(closure)
    assert_same(model, before)
    assert opt.skipped == 1
    run = opt.state_dict()["pyzo"]["run"]
    assert (run["draw"], run["applied"], run["skipped"]) == (1, 0, 1)
    opt.step(lambda: finite_loss(model))
    assert opt.skipped == 1
    assert any(not torch.equal(a, b) for a, b in zip(before, bits(model), strict=True))


def test_an_overflowing_coefficient_skips_too():
    model = torch.nn.Linear(3, 1)
    opt = ZOSGD(model, lr=1.0, eps=1e-30, store="snapshot")
    losses = iter([1e30, -1e30])
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(lambda: torch.tensor(next(losses), dtype=torch.float64))
    assert opt.skipped == 1


class InterruptInPass:
    """Raises SIGINT while a pass runs, by hooking the store's moves."""

    def __init__(self, opt: ZOSGD, at: int):
        self.moves, self.at, self.move = 0, at, opt.store.move
        opt.store.move = self

    def __call__(self, direction: int, sign: float) -> None:
        self.moves += 1
        if self.moves == self.at:
            signal.raise_signal(signal.SIGINT)  # before the pass, and again after it: both must wait
        self.move(direction, sign)
        if self.moves == self.at:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("store", ["inplace", "snapshot"])
@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupt_during_a_pass_waits_for_its_end(store, at):
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 7)
    opt = ZOSGD(model, lr=1.0, eps=1e-2, store=store)
    before = [p.detach().clone() for p in model.parameters()]
    hook = InterruptInPass(opt, at)
    handler = signal.getsignal(signal.SIGINT)
    calls = []

    def closure():
        calls.append(None)
        return finite_loss(model)

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert hook.moves == at and len(calls) == at - 1  # delivered at the closure's door, after the pass
    assert signal.getsignal(signal.SIGINT) is handler
    for old, new in zip(before, model.parameters(), strict=True):
        assert (old - new).abs().max() <= (0 if store == "snapshot" else 6 * 2.0**-24)


def test_an_interrupt_during_the_update_is_delivered_after_it():
    model = torch.nn.Linear(4, 2)
    opt = ZOSGD(model, lr=1e-2, store="snapshot")
    twin = torch.nn.Linear(4, 2)
    twin.load_state_dict(model.state_dict())
    other = ZOSGD(twin, lr=1e-2, store="snapshot")
    update = opt.store.update

    def interrupted(directions):
        signal.raise_signal(signal.SIGINT)
        update(directions)

    opt.store.update = interrupted
    with pytest.raises(KeyboardInterrupt):
        opt.step(lambda: finite_loss(model))
    other.step(lambda: finite_loss(twin))
    assert_same(model, bits(twin))  # the step was complete when the interrupt came through


def test_steps_work_outside_the_main_thread():
    model = torch.nn.Linear(4, 2)
    before = model.bias.detach().clone()
    opt = ZOSGD(model, lr=1e-2)
    thread = threading.Thread(target=lambda: opt.step(lambda: finite_loss(model)))
    thread.start()
    thread.join()
    assert not torch.equal(before, model.bias)


def test_bad_closures():
    model = torch.nn.Linear(4, 2)
    opt = ZOSGD(model, store="snapshot")
    before = bits(model)
    for closure, error, message in [
        (None, TypeError, "closure: expected a function"),
        (lambda: None, TypeError, "got NoneType"),
        (lambda: torch.ones(3), TypeError, r"shape \(3,\)"),
        (lambda: torch.ones((), dtype=torch.complex64), TypeError, "real scalar"),
    ]:
        with pytest.raises(error, match=message):
            opt.step(closure)
    assert_same(model, before)


def test_backward_in_the_closure_is_refused():
    model = torch.nn.Linear(4, 2)
    opt = ZOSGD(model, store="snapshot")
    before = bits(model)

    def closure():
        with torch.enable_grad():
            loss = finite_loss(model)
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="closure: expected no backward"):
        opt.step(closure)
    assert_same(model, before)
    for p in model.parameters():
        p.grad = None
    with pytest.raises(RuntimeError, match="does not require grad"):
        opt.step(lambda: finite_loss(model).backward())  # under no_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_losses_need_not_be_differentiable(dtype):
    model = torch.nn.Linear(4, 2)
    losses = iter([3, 0])
    loss = ZOSGD(model, lr=1e-3).step(lambda: torch.tensor(next(losses)).to(dtype))
    assert loss.dtype == torch.float64
    assert loss.item() == (0.5 if dtype == torch.bool else 1.5)


def test_a_store_that_cannot_open_leaves_no_trace(monkeypatch):
    model = special_model(torch.bfloat16)
    opt = ZOSGD(model, store="snapshot")
    before, state = bits(model), opt.state_dict()

    def full(sweep):
        raise MemoryError("no room for the copy")

    monkeypatch.setattr(opt.store, "open", full)
    with pytest.raises(MemoryError, match="no room"):
        opt.step(lambda: finite_loss(model))
    assert_same(model, before)
    assert opt.state_dict() == state


def test_numbers_and_16_bit_losses():
    model = torch.nn.Linear(4, 2)
    opt = ZOSGD(model, eps=1e-3)
    assert opt.step(lambda: 1.5).item() == 1.5
    with pytest.warns(
        UserWarning, match=r"bfloat16 loss: between 0.5 and 1 such losses are 0.0039 apart.*multiples of 2 at eps=0.001"
    ):
        opt.step(lambda: finite_loss(model).bfloat16())
    opt.step(lambda: finite_loss(model).bfloat16())  # one warning only; pytest turns warnings into errors
