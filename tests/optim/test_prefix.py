"""Layers before a block run once: the same losses bit for bit, how many calls that saves, and when it is given up."""

import pytest
import torch
from compare import assert_same, assert_same_trees, copies
from torch import Tensor, nn
from towers import Tower, loss_of, tower

from pyzo.estimators import BlockWise, OneSided, RandomLayers, TwoSided
from pyzo.optim import ZOSGD, ZOAdam, ZOConservativeSGD

pytestmark = pytest.mark.usefixtures("one_thread")

DEPTH = 6


def losses(
    reuse: bool, *, make=ZOSGD, kind=BlockWise, dropout: float = 0.1, steps: int = 3, **arguments: object
) -> tuple[list[Tensor], Tower, ZOSGD]:
    """All losses of some steps in training mode, the model and the optimizer after them."""
    torch.manual_seed(0)
    model = tower(depth=DEPTH, dropout=dropout)
    opt = make(model, lr=1e-2, eps=1e-2, estimator=kind(reuse=reuse, **arguments), store="snapshot")
    seen = []
    for _ in range(steps):
        opt.step(loss_of(model))
        seen.append(opt.last.losses)
    return seen, model, opt


@pytest.mark.parametrize("make", [ZOSGD, ZOAdam, ZOConservativeSGD], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "arguments",
    [
        {"order": "gauss-seidel"},
        {"order": "jacobi"},
        {"estimator": OneSided(2)},
        {"estimator": TwoSided(2), "order": "jacobi"},
        {"blocks": "linear"},
        {"blocks": ["head", "layers.3", "enter", "layers.1", "norm", "layers.0", "layers.4", "layers.2", "layers.5"]},
    ],
    ids=["gauss-seidel", "jacobi", "one-sided", "jacobi q=2", "linear", "any order"],
)
def test_losses_and_weights_are_the_same_bit_for_bit(make, arguments):
    """With dropout, whose masks in the layers that run are those of a whole forward."""
    got, model, opt = losses(True, make=make, **arguments)
    want, twin, other = losses(False, make=make, **arguments)
    assert opt.prefix.active and opt.prefix.skipped > 0
    assert other.prefix.skipped == 0
    assert_same_trees(got, want)
    assert_same(model, twin)
    assert opt.last.forwards == other.last.forwards


def test_random_layers_too():
    got, model, opt = losses(True, kind=lambda reuse: RandomLayers(0.2, reuse=reuse), steps=6)
    want, twin, _ = losses(False, kind=lambda reuse: RandomLayers(0.2, reuse=reuse), steps=6)
    assert_same_trees(got, want)
    assert_same(model, twin)
    assert opt.prefix.ran == 2 * DEPTH  # what is before the layers moves in every step


def test_about_half_of_the_calls_of_layers_are_saved():
    """Of 2 (L + 2) L calls: enter none; layer i all before i - 1, and once i - 1; norm and head as behind the last."""
    _, _, opt = losses(True)
    calls = 2 * (DEPTH + 3) * DEPTH  # enter, the layers, norm, head; two probes each
    skipped = sum([0, 0, *(max(i - 1, 0) + i for i in range(DEPTH)), DEPTH - 1 + DEPTH, 2 * DEPTH])
    assert (opt.prefix.ran + opt.prefix.skipped, opt.prefix.skipped) == (calls, skipped)
    assert 0.4 < skipped / calls < 0.5
    assert "same bit for bit" in opt.prefix.reason


def test_layers_are_untouched_outside_of_steps_and_run_whole_again():
    _, model, opt = losses(True)
    assert not any("forward" in layer.__dict__ for layer in model.layers)
    assert opt.prefix._held == []
    called = []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: called.append(1))
    loss_of(model)()
    assert len(called) == DEPTH


def test_a_forward_that_was_replaced_by_others_stays(monkeypatch):
    """accelerate puts functions in the place of forward, too."""
    model = tower()
    own = model.layers[1].forward
    calls = []

    def forward(h: Tensor) -> Tensor:
        calls.append(1)
        return own(h)

    model.layers[1].forward = forward
    opt = ZOSGD(model, estimator=BlockWise())
    opt.step(loss_of(model))
    assert model.layers[1].forward is forward
    assert calls and opt.prefix.active


def test_several_calls_of_the_model_in_one_closure():
    """Micro-batches: each call has outputs of its own."""

    def step(reuse: bool) -> tuple[list[Tensor], ZOSGD]:
        model = tower(depth=4, dropout=0.2)
        torch.manual_seed(3)
        opt = ZOSGD(model, lr=1e-2, eps=1e-2, estimator=BlockWise(reuse=reuse), store="snapshot")
        x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2))
        for _ in range(3):
            opt.step(lambda: sum(model(part).square().mean() for part in x))
        return copies(model), opt

    got, opt = step(True)
    want, _ = step(False)
    assert opt.prefix.skipped > 0
    assert_same(got, want)


class Skipping(Tower):
    """The last layer sees what the first one put out, too."""

    def forward(self, x: Tensor) -> Tensor:
        h = first = self.layers[0](self.enter(x))
        for layer in self.layers[1:-1]:
            h = layer(h)
        return self.head(self.norm(self.layers[-1](h) * first))


class InPlace(Tower):
    """What is behind the layers writes into what they put out."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h.mul_(0.5)))


class Resized(Tower):
    """Between layers the number of rows changes, so that the output of one cannot stand for that of another."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for i, layer in enumerate(self.layers):
            h = layer(h.reshape(16 >> i, -1, 8)[:, 0] if i else h)
        return self.head(self.norm(h)).repeat(16 >> 2, 1)[:16]


@pytest.mark.parametrize("kind", [Skipping, InPlace, Resized], ids=lambda kind: kind.__name__)
def test_models_that_are_no_plain_stack_run_whole(kind):
    """Found in the first step, before a wrong loss is used: the bits are those without."""

    def step(reuse: bool) -> tuple[Tower, ZOSGD]:
        model = kind()
        model.load_state_dict(tower().state_dict())
        opt = ZOSGD(model, lr=1e-2, eps=1e-2, estimator=BlockWise(reuse=reuse), store="snapshot")
        for _ in range(2):
            opt.step(loss_of(model))
        return model, opt

    with pytest.warns(UserWarning, match="block-wise steps run all layers at every point: "):
        model, opt = step(True)
    assert not opt.prefix.active
    assert any(word in opt.prefix.reason for word in ("bits", "a loss was", "written to", "raised"))
    assert_same(model, step(False)[0])


def test_reasons_against_it():
    model = tower()
    assert "reuse=False" in ZOSGD(model, estimator=BlockWise(reuse=False)).prefix.reason
    plain = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 3)})
    opt = ZOSGD(plain, estimator=BlockWise(["a", "b"]))
    assert "no stack of layers" in opt.prefix.reason and not opt.prefix.active
    opt.step(lambda: plain["b"](plain["a"](torch.ones(2, 4))).square().mean())
    model.compile()
    assert "compiled" in ZOSGD(model, estimator=BlockWise()).prefix.reason


def test_another_number_of_calls_is_an_error():
    model, calls = tower(), []
    closure = loss_of(model)
    opt = ZOSGD(model, estimator=BlockWise(), store="snapshot")
    opt.step(closure)
    before = copies(model)

    def uneven() -> Tensor:
        calls.append(1)
        return closure() + (closure() if len(calls) > 5 else 0.0)

    with pytest.raises(RuntimeError, match="closure: expected it to call the model as often at every point of a step"):
        opt.step(uneven)
    assert_same(model, before)


def test_tied_weights_reach_as_far_as_where_they_come_first():
    class Tied(Tower):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 8)
            self.out.weight = self.enter.weight

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.out(x) + x.sum())

    model = Tied()
    opt = ZOSGD([(n, p) for n, p in model.named_parameters()], estimator=BlockWise(model=model))
    reach = {run.block.name: run.block.reach for run in opt._runs}
    assert (reach["enter"], reach["layers.1"], reach["head"], reach["out"]) == (0, 1, 3, 3)
