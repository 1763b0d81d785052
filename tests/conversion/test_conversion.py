"""`convert`, `plan`, recipes and reports themselves, on small modules of every kind of dataflow."""

import copy
import gc
import weakref

import pytest
import torch
from bits import assert_same_bits
from families import batch_of, small
from torch import Tensor, nn
from torch.nn import functional

import pyzo
from pyzo.conversion.flow import trace
from pyzo.conversion.swap import Swapped


def is_swapped(model: nn.Module) -> bool:
    return any(isinstance(module, Swapped) for module in model.modules())


class Block(nn.Module):
    """Norm, linear, activation, linear; `between` is what happens to the output of norm and activation."""

    def __init__(self, between=lambda x: x, activation: nn.Module | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.act = nn.GELU() if activation is None else activation
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.norm(x))
        return x + self.second(self.between(self.act(self.first(y))))


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    model.zero_grad()
    (model(x) ** 2).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_converts_exactly(block: nn.Module, **reasons: str) -> pyzo.conversion.Report:
    """Converted, it makes the gradients that it made; `reasons` are of what is skipped."""
    want = gradients(block)
    report = pyzo.convert(block, batch=X)
    for got, expected in zip(gradients(block), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert {e.name: e.reason for e in report.skipped}.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in report[name].reason
    return report


def test_a_plain_block():
    report = assert_converts_exactly(Block())
    assert report.exact and [e.name for e in report.converted] == ["norm", "act"]
    assert report.after < report.before


def test_views_are_no_readers():
    assert_converts_exactly(Block(lambda x: x.view(-1, x.shape[-1]).view(x.shape)))


def test_moved_rows():
    """A copy on the way is in the way of sharing; under autocast the norm emits its dtype, as it would be cast to."""
    moved = Block(lambda x: x.roll(1, 1))
    assert_converts_exactly(moved, act="copied on the way", norm="copied on the way")
    with torch.autocast("cpu", torch.bfloat16):
        report = pyzo.convert(moved, batch=X)
        assert moved.norm(X).dtype == torch.bfloat16
    assert "copied on the way" in report["norm"].reason and report["norm"].exact


def test_a_linear_outside_of_autocast_gets_what_it_got():
    """As routers and heads that are computed in float32."""

    class Island(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            with torch.autocast("cpu", enabled=False):
                z = self.second(self.act(self.first(y.float())))
            return x + self.third(y) + z

    torch.manual_seed(0)
    stock = Island()
    stock.third = nn.Linear(8, 8)
    for inside in (True, False):
        model = copy.deepcopy(stock)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            assert pyzo.convert(model, batch=X)["norm"].became
        with torch.autocast("cpu", torch.bfloat16):
            want, got = stock(X), model(X)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("between", [lambda x: 2 * x, lambda x: x + 1, lambda x: x.softmax(-1)])
def test_results_that_others_read(between):
    assert_converts_exactly(Block(between), norm="no linear keeps its output", act="not read by one linear alone")


def test_results_that_are_changed_in_place():
    block = Block(lambda x: x.mul_(2) if x.shape[-1] == 8 else x.add_(1))
    assert_converts_exactly(block, norm="in place", act="in place")


def test_results_that_are_returned():
    class Two(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.norm(x)
            z = self.act(self.first(y))
            return self.second(z), y, z

    block = Two()
    report = pyzo.convert(block, batch=X)
    assert "output" in report["norm"].reason and report["norm"].became
    assert report["act"].skipped
    with torch.autocast("cpu", torch.bfloat16):
        assert block(X)[1].dtype == torch.float32


def test_frozen_linears_keep_nothing():
    block = Block()
    block.second.requires_grad_(False)
    report = pyzo.convert(block, batch=X)
    assert "frozen" in report["act"].reason


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LayerNorm((5, 8)), "over 2 dimensions"),
        (nn.RMSNorm(8), "eps is None"),
    ],
)
def test_norms_of_another_kind(module, reason):
    block = Block()
    block.norm = module
    assert_converts_exactly(block, norm=reason)


def test_a_norm_that_only_has_the_name():
    class FalseRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + self.eps)

    block = Block()
    block.norm = FalseRMSNorm()
    assert_converts_exactly(block, norm="results are not those")


def test_an_activation_that_only_has_the_name():
    class SiLU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(1.1 * x)

    assert_converts_exactly(Block(activation=SiLU()), act="results are not those")


class Gated(nn.Module):
    def __init__(self, twist: str = ""):
        super().__init__()
        self.a, self.b, self.c, self.h = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8), nn.SiLU()
        self.twist = twist

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.a(x), self.b(x + 1 if self.twist == "input" else x)
        product = self.h(gate) * up
        if self.twist == "product":
            product = product + 1
        result = self.c(product)
        return result + gate.sum() if self.twist == "gate" else result


def test_a_gated_mlp_is_found_by_its_dataflow():
    report = assert_converts_exactly(nn.Sequential(Gated()))
    assert report["0"].kind == "gate"


@pytest.mark.parametrize("twist", ["input", "gate"])
def test_what_is_not_quite_a_gated_mlp(twist):
    assert_converts_exactly(nn.Sequential(Gated(twist)), **{"0": ""})


def test_a_product_that_is_changed_is_none():
    assert_converts_exactly(nn.Sequential(Gated("product")), **{"0.h": "not read by one linear alone"})


def test_shared_modules_stay_right():
    """One activation in two places, and one block that runs twice."""
    act = nn.GELU()
    blocks = nn.Sequential(Block(activation=act), Block(activation=act))
    assert_converts_exactly(blocks, **{"0.act": "several modules share it"})
    block = Block()
    assert_converts_exactly(nn.Sequential(block, block), **{"0.act": "several modules share it"})


def test_instances_with_a_forward_of_their_own_are_left_alone():
    """As accelerate's offloading puts them."""
    block = Block()
    norm = block.norm
    norm.forward = lambda x: functional.layer_norm(x, (8,), norm.weight, norm.bias)
    assert_converts_exactly(block, norm="forward of the instance")


def test_what_it_cannot_know_is_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5), nn.ReLU(), nn.LSTM(8, 8, batch_first=True))
    stock = copy.deepcopy(model)
    report = pyzo.convert(model, batch=X)
    assert not report.converted
    for key, value in stock.state_dict().items():  # running statistics too
        assert_same_bits(model[:3].state_dict().get(key, value), value, key)


def test_a_tensor_from_outside_is_not_taken_for_one_that_was_freed():
    """Lists as indices become tensors that no operator makes; their memory may be that of a tensor before."""

    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(50):
                y = self.linear(self.norm(x))
                del x
                x = y[:, [0, 1, 2]] * 2
            return x

    model = Indexed()
    with torch.no_grad():
        flow, _ = trace(model, lambda: model(torch.randn(2, 3, 8)), {})
    for call in flow.calls["norm"]:
        assert flow.readers(call.result).others == ()


def test_a_plan_leaves_the_model_alone(one_thread):
    model, batch = small("bert"), batch_of("bert")
    model.eval()
    stock = copy.deepcopy(model)
    state = torch.get_rng_state()
    report = pyzo.plan(model, batch)
    assert_same_bits(torch.get_rng_state(), state)
    assert report.verified and report.converted and report.after < report.before
    assert not is_swapped(model)
    for got, want in zip(model.modules(), stock.modules(), strict=True):
        assert vars(got).keys() == vars(want).keys() and got.training is want.training
    assert str(report) == str(pyzo.convert(model, batch=batch))
    with pytest.raises(ValueError, match="not converted"):
        pyzo.plan(model, batch)


def test_a_norm_that_needs_its_input_says_so():
    block = Block()
    with torch.no_grad():
        block.norm.weight[3] = 0
    report = assert_converts_exactly(block)
    assert report["norm"].became == "backward from its input" and "column 3" in report["norm"].reason


def test_a_shared_copy_lives_no_longer_than_the_graph():
    model, batch = small("bert"), batch_of("bert")
    pyzo.convert(model, batch=batch)
    seen: list[weakref.ref[Tensor]] = []
    norm = model.bert.embeddings.LayerNorm
    norm.register_forward_hook(lambda module, args, y: seen.append(weakref.ref(y._pyzo_twin[0])))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch)["loss"]
    assert seen[0]() is not None
    loss.backward()
    del loss
    gc.collect()
    assert seen[0]() is None


def test_converting_again_starts_anew():
    block = Block()
    pyzo.convert(block, {"activation": "derivative"}, X)
    report = pyzo.convert(block, batch=X)
    assert report.exact and report["act"].became.startswith("applied by")


def test_mixtures_by_name():
    block = Block()
    report = pyzo.convert(block, {"activation": "output"}, X)
    assert [e.name for e in report.entries] == ["act"]
    assert report["act"].exact is False and "near-exact" in report["act"].reason
    assert type(block.norm) is nn.LayerNorm
    assert "gelu and silu at 2 bits" in pyzo.convert(Block(activation=nn.Mish()), "paper", X)["act"].reason


def test_the_report_is_a_table():
    text = str(pyzo.plan(nn.Sequential(Block(), Block()), X))
    lines = text.splitlines()
    assert lines[0].startswith("4 modules converted, 0 skipped")
    assert "% less" in lines[1]
    assert lines[2].startswith("2 x *.norm (LayerNorm): backward from its output, which the linears keep too, exact")


@pytest.mark.parametrize("batch", [X, (X,), [X], {"input": X}, lambda: MODEL(X)])
def test_batches(batch):
    assert len(pyzo.plan(MODEL, batch).converted) == 2


MODEL = nn.Sequential(Block())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("exakt",), ValueError, "recipe: expected one of 'exact', 'paper'"),
        ((3,), TypeError, "recipe: expected a name or a dict, got int"),
        (({"norms": "shared"},), ValueError, "recipe: expected kinds among"),
        (({"norm": "fast"},), ValueError, r"recipe\['norm'\]: expected None or one of 'shared', 'merged', got 'fast'"),
        (("exact", 3), TypeError, "batch: expected a dict, tuple, list, tensor or function, got int"),
    ],
)
def test_what_is_refused(arguments, error, message):
    model = nn.Sequential(Block())
    with pytest.raises(error, match=message):
        pyzo.convert(model, *arguments)
    assert not is_swapped(model)


def test_models_only():
    with pytest.raises(TypeError, match="model: expected a torch"):
        pyzo.convert([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="batch: expected what the model is called with"):
        pyzo.plan(nn.Linear(2, 2), None)


def test_a_failing_first_forward_changes_nothing():
    model = nn.Sequential(Block())
    report = pyzo.convert(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 7))
    assert not report.verified
    model(X).sum().backward()
    assert report.verified and report.converted
