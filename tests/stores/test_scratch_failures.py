"""Wherever a step in the scratch store is stopped, weights, modules, states and generators are as they were."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bits import weights
from compare import assert_same, assert_same_trees, copies, states
from scratches import untouched
from torch import Tensor, nn

import pyzo
from pyzo.estimators import BlockWise
from pyzo.optim import ZOSGD, ZOAdam, ZOConservativeSGD, ZOSignSGD
from pyzo.passes import Sweep

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = torch.tensor([[1, 2, 2], [6, 0, 3]])
FILES = ("scratch.py", "arena.py", "scopes.py", "lookups.py", "watch.py")


@pytest.fixture(autouse=True)
def python_handles_interrupts() -> Iterator[None]:
    """Also where the tests run in the background, which a shell starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Special(nn.Module):
    """Weights of every kind (-0.0, NaN with payloads, infinities), of which the loss sees no value."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights(300, dtype, seed=1))

    def forward(self) -> Tensor:
        return self.weight[:0].float().sum()


class Model(nn.Module):
    """A lookup, a head tied to it, a module called twice, a borrowed weight, dropout, and special weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 8)
        self.twice = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.to(dtype)
        self.special = Special(dtype)

    def forward(self) -> Tensor:
        h = self.twice(self.dropout(self.twice(self.embedding(IDS))))
        return self.head(self.attention(h, h, h)[0]).float().square().mean() + self.special()


RECIPES: dict[str, Callable[..., ZOSGD]] = {
    "sgd": ZOSGD,
    "adam": ZOAdam,
    "conservative": ZOConservativeSGD,
    "blocks": lambda model, **k: ZOAdam(model, estimator=BlockWise("linear"), **k),
}
recipes = pytest.mark.parametrize("recipe", RECIPES)


@contextmanager
def no_trace(model: nn.Module, opt: ZOSGD) -> Iterator[None]:
    before, state, generator = copies(states(opt)), opt.state_dict(), torch.get_rng_state()
    with untouched(model):
        yield
    assert_same(states(opt), before)
    assert_same_trees(opt.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), generator)


def fresh(recipe: str, dtype: torch.dtype, steps: int) -> tuple[Model, ZOSGD]:
    """A model and its optimizer after some steps: before the first one, all operators are still to be watched."""
    model = Model(dtype)
    opt = RECIPES[recipe](model, lr=1e-2, eps=1e-2, store="scratch", weight_decay=0.1)
    for _ in range(steps):
        opt.step(model)
    return model, opt


class Bomb:
    """Stops at one of its calls, and counts them."""

    def __init__(self, at: int, kind: type[BaseException]) -> None:
        self.at, self.kind, self.count = at, kind, 0

    def __call__(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.at:
            raise self.kind("stop")


def kinds(at: int) -> type[BaseException]:
    return (ValueError, KeyboardInterrupt, SystemExit)[at % 3]


@recipes
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_stopped_at_every_hook(recipe, steps, register):
    for dtype in DTYPES if recipe == "sgd" else DTYPES[1:2]:
        model, opt = fresh(recipe, dtype, steps)
        count = Bomb(0, ValueError)
        twin, other = fresh(recipe, dtype, steps)
        for module in twin.modules():
            getattr(module, register)(count)
        torch.manual_seed(5)  # of dropout
        other.step(twin)
        assert count.count > 10
        for at in range(1, count.count + 1):
            if steps == 0:  # what a step has found out stays known
                model, opt = fresh(recipe, dtype, steps)
            bomb = Bomb(at, kinds(at))
            handles = [getattr(module, register)(bomb) for module in model.modules()]
            with no_trace(model, opt), pytest.raises(kinds(at), match="stop"):
                opt.step(model)
            for handle in handles:
                handle.remove()
        torch.manual_seed(5)
        opt.step(model)
        assert_same(model, twin)  # as if nothing had happened


@recipes
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_stopped_at_every_pass(recipe, steps, after, monkeypatch):
    """All but those of the last update, which are written when nothing else is left to do; see the next test."""
    model, opt = fresh(recipe, torch.bfloat16, steps)
    run, run_rows = Sweep.run, Sweep.run_rows

    def with_bomb(bomb: Bomb) -> None:
        def wrapped(original: Callable[..., None]) -> Callable[..., None]:
            def call(self: Sweep, *args: Any, **kwargs: Any) -> None:
                if "dst" in kwargs or original is run_rows:
                    if not after:
                        bomb()
                    original(self, *args, **kwargs)
                    if after:
                        bomb()
                else:
                    original(self, *args, **kwargs)

            return call

        monkeypatch.setattr(Sweep, "run", wrapped(run))
        monkeypatch.setattr(Sweep, "run_rows", wrapped(run_rows))

    count = Bomb(0, ValueError)
    with_bomb(count)
    twin, other = fresh(recipe, torch.bfloat16, steps)
    count.count = 0
    torch.manual_seed(5)  # of dropout
    other.step(twin)
    assert count.count >= 10
    for at in range(1, count.count + 1):
        if steps == 0:  # what a step has found out stays known
            with_bomb(Bomb(0, ValueError))
            model, opt = fresh(recipe, torch.bfloat16, steps)
        with_bomb(Bomb(at, kinds(at)))
        with no_trace(model, opt), pytest.raises(kinds(at), match="stop"):
            opt.step(model)
    with_bomb(Bomb(0, ValueError))
    torch.manual_seed(5)
    opt.step(model)
    assert_same(model, twin)


def test_stopped_before_the_update(monkeypatch):
    model, opt = fresh("sgd", torch.bfloat16, 1)
    run = Sweep.run

    def stops(self: Sweep, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("update") is not None and "dst" not in kwargs:
            raise ValueError("stop")
        run(self, *args, **kwargs)

    monkeypatch.setattr(Sweep, "run", stops)
    with untouched(model), pytest.raises(ValueError, match="stop"):
        opt.step(model)


@pytest.mark.parametrize("steps", [0, 1])
def test_interrupted_at_every_line_of_the_store(steps):
    """Ctrl-C as Python delivers it, at each line that the store executes, in the first and in a later step."""
    model, opt = fresh("sgd", torch.bfloat16, steps)
    folder = pyzo.stores.__path__[0]

    def traced(at: int) -> int:
        """One step with an interrupt at line number `at` of the store; returns how many there were."""
        count = 0

        def line(frame: Any, event: str, _: Any) -> Any:
            nonlocal count
            if event == "line":
                count += 1
                if count == at:
                    signal.raise_signal(signal.SIGINT)
            return line

        def call(frame: Any, event: str, _: Any) -> Any:
            name = frame.f_code.co_filename
            return line if name.startswith(folder) and name.endswith(FILES) else None

        before = sys.gettrace()
        sys.settrace(call)
        try:
            opt.step(model)
        finally:
            sys.settrace(before)
        return count

    twin, other = fresh("sgd", torch.bfloat16, steps)
    keep, opt, model, state = (model, opt), other, twin, other.state_dict()
    lines = traced(0)
    model, opt = keep
    assert lines > 200 and state is not None
    interrupted = 0
    for at in range(1, lines + 1, 1 if steps else 11):
        if steps == 0 or opt._steps > steps:  # it was delivered when the step was done, or the step has found out much
            model, opt = fresh("sgd", torch.bfloat16, steps)
        before = copies(model)
        pointers = [p.data_ptr() for p in model.parameters()]
        with pytest.raises(KeyboardInterrupt):
            traced(at)
        assert not torch.overrides._get_current_function_mode_stack(), at
        assert [p.data_ptr() for p in model.parameters()] == pointers, at
        assert not any("forward" in module.__dict__ for module in model.modules()), at
        if opt._steps == steps:
            interrupted += 1
            assert_same(model, before, f"line {at}:")
    assert interrupted > lines / (2 if steps else 22)


class Few(nn.Module):
    """As little as a step can have to do, so that many can be made."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.special, self.seen = Special(dtype), nn.Linear(4, 1, bias=False, dtype=dtype)

    def forward(self) -> Tensor:
        return self.special() + self.seen(torch.ones(4, dtype=self.seen.weight.dtype)).sum().float()


RULES = {
    "sgd": ZOSGD,
    "momentum": lambda model, **k: ZOSGD(model, momentum=0.9, **k),
    "sign": ZOSignSGD,
    "adam": ZOAdam,
    "conservative": ZOConservativeSGD,
}


@pytest.mark.parametrize("store", ["scratch", "snapshot"])
@pytest.mark.parametrize("rule", RULES)
def test_nothing_moves_in_1000_steps_at_rate_0(store, rule):
    """Under every rule, in every dtype, NaN and infinities among the weights."""
    for dtype in DTYPES:
        model = Few(dtype)
        opt = RULES[rule](model, lr=0.0, eps=1e-2, store=store)
        with untouched(model):
            for _ in range(1000):
                opt.step(model)
        assert opt.skipped == 0
        assert opt.state_dict()["pyzo"]["runs"][""]["applied"] == 1000
