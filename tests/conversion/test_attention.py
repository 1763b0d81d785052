"""Attention in converted models: gradients of the stock model to the bit, and what is left as it is."""

import copy
import pickle
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from families import batch_of, small
from test_exact import gradients, loss_of
from torch import Tensor, nn
from torch.nn import functional

import pyzo
from pyzo.conversion.attention import RecomputingAttention
from pyzo.memory import account

RECIPE = {"attention": "recompute"}
LOW = torch.bfloat16


def assert_same_gradients(got: nn.Module, want: nn.Module, batch: dict[str, Any]) -> None:
    """Under autocast, with the same draws of torch's generator."""
    found = []
    for model in (got, want):
        torch.manual_seed(5)
        found.append(gradients(model, batch, LOW))
    assert found[0].keys() == found[1].keys()
    for name in found[1]:
        assert_same_bits(found[0][name], found[1][name], name)


def converted(name: str, dropout: float = 0.0) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """A stock model, a copy whose attention is converted, and a batch."""
    stock, batch = small(name, dropout=dropout), batch_of(name)
    model = copy.deepcopy(stock)
    report = pyzo.convert(model, RECIPE, lambda: loss_of(model, batch, LOW))
    assert report.exact and report.converted and report.after < report.before
    assert {entry.kind for entry in report.entries} == {"attention"}
    return stock, model, batch


@pytest.mark.parametrize(("name", "dropout"), [("swin", 0.0), ("swin", 0.1), ("bert", 0.1), ("llama", 0.1)])
def test_gradients_are_those_of_the_stock_model(name, dropout, one_thread):
    stock, model, batch = converted(name, dropout)
    assert_same_gradients(model, stock, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert any(isinstance(module, RecomputingAttention) for module in other.modules())
        assert_same_gradients(other, stock, batch)
    pyzo.revert(model)
    assert_same_gradients(model, stock, batch)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpointed_layers(dropout, one_thread):
    stock, model, batch = converted("swin", dropout)
    for m in (stock, model):
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_gradients(model, stock, batch)


def test_trained_for_some_steps(one_thread):
    """With dropout: the same weights, bit for bit."""
    stock, model, batch = converted("swin", 0.1)
    for m in (stock, model):
        torch.manual_seed(2)
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(m, batch, LOW).backward()
            optimizer.step()
    for (name, got), want in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert_same_bits(got, want, name)


def test_a_bias_that_is_not_trained_leaves_torchs_kernel(one_thread):
    """As behind adapters, or where it is frozen by hand."""
    stock, batch = small("swin"), batch_of("swin")
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_("relative_position_bias" not in name)
    model = copy.deepcopy(stock)
    report = pyzo.convert(model, RECIPE, lambda: loss_of(model, batch, LOW))
    assert not report.converted and len(report.skipped) == 4
    assert all("torch has a kernel" in entry.reason for entry in report.skipped)
    assert_same_gradients(model, stock, batch)


def test_a_bias_that_is_frozen_later_leaves_torchs_kernel(one_thread):
    stock, model, batch = converted("swin")
    for m in (stock, model):
        for name, parameter in m.named_parameters():
            parameter.requires_grad_("relative_position_bias" not in name)
    assert_same_gradients(model, stock, batch)


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_beside_a_trained_bias(order, one_thread):
    peft = pytest.importorskip("peft")
    stock, batch = small("swin"), batch_of("swin")
    model = copy.deepcopy(stock)

    def adapt(m: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False)
        m = peft.get_peft_model(m, config)
        for name, parameter in m.named_parameters():
            if "relative_position_bias" in name:
                parameter.requires_grad_(True)
        return m

    stock = adapt(stock)
    if order == "before":
        model = adapt(model)
    pyzo.convert(model, RECIPE, lambda: loss_of(model, batch, LOW))
    if order == "after":
        model = adapt(model)
    assert sum(isinstance(module, RecomputingAttention) for module in model.modules()) == 4
    assert_same_gradients(model, stock, batch)
    kept = [account(lambda m=m: loss_of(m, batch, LOW), m).nbytes for m in (stock, model)]
    assert kept[1] < kept[0]


def test_float32_is_recomputed_where_it_is_named(one_thread):
    """Bert with dropout: "exact" leaves it, and so does what was converted in 16 bits and runs in float32."""
    stock, batch = small("bert", dropout=0.1), batch_of("bert")
    narrow, wide = copy.deepcopy(stock), copy.deepcopy(stock)
    report = pyzo.plan(stock, lambda: loss_of(stock, batch, None), {"attention": "narrow"})
    assert not report.converted and all("it is in float32" in entry.reason for entry in report.skipped)
    pyzo.convert(narrow, {"attention": "narrow"}, lambda: loss_of(narrow, batch, LOW))
    pyzo.convert(wide, {"attention": "recompute"}, lambda: loss_of(wide, batch, None))
    kept = [account(lambda m=m: loss_of(m, batch, None), m).nbytes for m in (stock, narrow, wide)]
    assert kept[1] == kept[0] > kept[2]
    kept = [account(lambda m=m: loss_of(m, batch, LOW), m).nbytes for m in (stock, narrow, wide)]
    assert kept[0] > kept[1] == kept[2]


def test_attention_by_hand_is_left_alone(one_thread):
    stock, batch = small("swin"), batch_of("swin")
    stock.set_attn_implementation("eager")
    model = copy.deepcopy(stock)
    report = pyzo.convert(model, RECIPE, batch)
    assert len(report.skipped) == 4 and not report.converted
    assert all("does not call torch's" in entry.reason for entry in report.skipped)
    assert_same_gradients(model, stock, batch)


def test_other_recipes_leave_attention_alone(one_thread):
    assert {e.kind for e in pyzo.plan(small("swin"), batch_of("swin"), "paper").entries} == {"norm", "activation"}


class Windowed(nn.Module):
    """Attention with a trained bias of the heads and a mask of the windows; `between` happens to their sum."""

    def __init__(self, between: Any = lambda mask, attention: mask):
        super().__init__()
        self.qkv, self.bias = nn.Linear(8, 24), nn.Parameter(torch.randn(1, 2, 16, 16))
        self.register_buffer("windows", torch.randn(3, 1, 16, 16))
        self.between, self.seen = between, []

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(3, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mask = self.between(self.bias + self.windows, self)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape)


X = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()


def stock_and_converted(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    stock = model.bfloat16()
    model = copy.deepcopy(stock)
    report = pyzo.convert(model, RECIPE, X)
    assert [entry.kind for entry in report.converted] == ["attention"]
    return stock, model


def assert_same_passes(model: nn.Module, stock: nn.Module, passes: int = 1) -> None:
    found = []
    for m in (model, stock):
        m.zero_grad()
        sum(m(X).square().sum() for _ in range(passes)).backward()
        found.append([p.grad.clone() for p in m.parameters()])
    for got, want in zip(*found, strict=True):
        assert_same_bits(got, want)


def _hooked(mask: Tensor, attention: Windowed) -> Tensor:
    if mask.requires_grad:
        mask.register_hook(lambda gradient: attention.seen.append(gradient.shape) or 2 * gradient)
    return mask


def _doubled(mask: Tensor, attention: Windowed) -> Tensor:
    with torch.no_grad():
        mask *= 2
    return mask


def _changed_addend(mask: Tensor, attention: Windowed) -> Tensor:
    attention.windows.add_(1)  # once the sum is made
    return mask


@pytest.mark.parametrize("between", [lambda mask, attention: mask + 0 * mask.sum(), _hooked, _doubled, _changed_addend])
def test_sums_that_something_happens_to(between):
    """The sum itself is kept then, or what came of it; hooks see its gradient."""
    stock, model = stock_and_converted(Windowed(between))
    stock.windows.copy_(model.windows)  # where it was changed while it was verified
    assert_same_passes(model, stock)
    assert stock.seen == model.seen


def test_a_sum_is_not_kept_but_what_was_added():
    model = stock_and_converted(Windowed())[1]
    kept = [tuple(s.shape) for s in account(lambda: model(X), model).saved]
    assert (3, 2, 16, 16) not in kept


def test_called_twice_and_hooked():
    stock, model = stock_and_converted(Windowed())
    assert_same_passes(model, stock, passes=2)
    for m in (stock, model):
        m.register_forward_hook(lambda module, args, result: 2 * result)
        m.register_full_backward_hook(lambda module, given, gradients: module.seen.append(gradients[0].shape))
    assert_same_passes(model, stock)
    assert model.seen == stock.seen and model.seen


def test_without_gradients_it_is_the_stock_module():
    stock, model = stock_and_converted(Windowed())
    with torch.no_grad():
        assert_same_bits(model(X), stock(X))
    for m in (stock, model):
        m.eval()
    assert_same_passes(model, stock)


def test_compiled():
    stock, model = stock_and_converted(Windowed())
    torch.compiler.reset()
    assert_same_passes(torch.compile(model, fullgraph=True, backend="aot_eager"), stock)
    torch.compiler.reset()


def test_attention_inside_of_attention():
    """Each call is taken once, by the module around it, whoever is converted."""

    class Outer(Windowed):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Windowed()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.inner(x)) + self.inner(x)

    stock = Outer().bfloat16()
    model = copy.deepcopy(stock)
    assert [e.name for e in pyzo.convert(model, RECIPE, X).converted] == ["", "inner"]
    assert_same_passes(model, stock)


def test_a_failing_pass_leaves_no_mode_behind():
    model = stock_and_converted(Windowed())[1]
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 16, 7))
    assert not torch.overrides._get_current_function_mode_stack()


def test_torchs_own_layers_are_named(one_thread):
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    # Its attention is a function of torch that calls the other one out of sight.
    report = pyzo.convert(model, RECIPE, torch.randn(2, 5, 8))
    assert "does not call torch's" in report["self_attn"].reason
