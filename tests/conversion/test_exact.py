"""The exact recipe: models of every family train as stock ones do, save less, and come back bit for bit."""

import copy
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from families import FAMILIES, Family, batch_of, small
from torch import Tensor, nn

import pyzo
from pyzo.memory import account

STEPS = {None: 100, torch.bfloat16: 20}


def loss_of(model: nn.Module, batch: dict[str, Any], autocast: torch.dtype | None = None) -> Tensor:
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        return model(**batch)["loss"]


def gradients(model: nn.Module, batch: dict[str, Any], autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, batch, autocast).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of all gradients together, relative to b."""
    assert a.keys() == b.keys()
    square = sum((a[name].double() - b[name].double()).square().sum() for name in b)
    return float((square / sum(g.double().square().sum() for g in b.values())).sqrt())


def rounded(model: nn.Module, eps: float) -> nn.Module:
    """A copy whose weights are off by half an eps, up or down at random."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(p * eps * (torch.randint(0, 2, p.shape, generator=generator) - 0.5))
    return other


def train(model: nn.Module, batches: list[dict[str, Any]], steps: int, autocast: torch.dtype | None) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batches[step % len(batches)], autocast)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", FAMILIES)
def test_trains_as_the_stock_model(name, autocast, one_thread):
    """First gradients equal to rounding, and one loss curve to what roundings grow to over the steps.

    How far that is, the stock model says: trained from weights that are one rounding away.

    Under autocast both models are as far from the float32 gradients as bfloat16 leaves them: this one at most twice as
    far as the stock model, by the rule for all layers of pyzo.
    """
    stock, batch = small(name), batch_of(name)
    model = copy.deepcopy(stock)
    report = pyzo.convert(model, "exact", lambda: loss_of(model, batch, autocast))
    assert report.exact and report.verified and report.converted
    want, got = gradients(stock, batch, autocast), gradients(model, batch, autocast)
    if autocast is None:
        assert distance(got, want) < 1e-5
    else:
        true = gradients(stock, batch)
        assert distance(got, true) <= 2 * distance(want, true)
    batches = [batch_of(name, rows) for rows in (2, 3)]
    stock = small(name, layers=1)
    model, other = copy.deepcopy(stock), rounded(stock, torch.finfo(autocast or torch.float32).eps)
    pyzo.convert(model)
    curve, got, control = (train(m, batches, STEPS[autocast], autocast) for m in (stock, model, other))
    allowed = 4 * max(abs(c - w) for c, w in zip(control, curve, strict=True)) + 1e-6
    assert max(abs(g - w) for g, w in zip(got, curve, strict=True)) <= allowed


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_in_16_bits(name, one_thread):
    """Weights in bfloat16, no autocast: as far from the float32 gradients at the same weights as the stock model."""
    stock, batch = small(name).bfloat16(), batch_of(name)
    batch = {key: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for key, v in batch.items()}
    model, true = copy.deepcopy(stock), copy.deepcopy(stock).float()
    assert pyzo.convert(model, batch=batch).converted
    wide = {key: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for key, v in batch.items()}
    want, got, true = gradients(stock, batch), gradients(model, batch), gradients(true, wide)
    assert distance(got, true) <= 2 * distance(want, true)


@pytest.mark.parametrize("name", FAMILIES)
def test_state_dict_and_evaluation_are_those_of_the_stock_model(name, one_thread):
    stock, batch = small(name), batch_of(name)
    model = copy.deepcopy(stock)
    pyzo.convert(model, batch=batch)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in stock.named_parameters()]
    gradients(model, batch)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    stock.load_state_dict(model.state_dict())
    for mode in (True, False):
        with torch.no_grad():
            got, want = (m.train(mode)(**batch) for m in (model, stock))
        assert_same_bits(got["loss"], want["loss"])


@pytest.mark.parametrize("name", FAMILIES)
def test_revert_gives_back_the_stock_model(name, one_thread):
    stock, batch = small(name), batch_of(name)
    model = copy.deepcopy(stock)
    pyzo.convert(model, batch=batch)
    pyzo.revert(model)
    pairs = list(zip(model.modules(), stock.modules(), strict=True))
    for got, want in pairs:
        assert type(got) is type(want)
        assert vars(got).keys() == vars(want).keys()
        assert got.training is want.training
    got, want = gradients(model, batch), gradients(stock, batch)
    for parameter in want:
        assert_same_bits(got[parameter], want[parameter], parameter)


def kept(family: Family, layers: int, rows: int, recipe: str | None, lora: float | None) -> int:
    model = family.build(layers)
    if lora is not None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=lora, target_modules="all-linear")
        model = peft.get_peft_model(model, config)

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**family.batch(rows))

    if recipe is not None:
        pyzo.convert(model, recipe, run)
    return account(run, model).nbytes


def units_per_layer(family: Family, recipe: str | None, lora: float | None = None) -> float:
    """What one more layer keeps for one more row; differences leave out what a model or a batch keeps once.

    Args:
        family, recipe: what is built, and converted where there is a recipe.
        lora: dropout of adapters on all linears; None: all weights are trained.
    """
    few, many = (kept(family, 2, rows, recipe, lora) - kept(family, 1, rows, recipe, lora) for rows in (2, 3))
    return (many - few) / (2 * family.tokens * family.hidden)


@pytest.mark.parametrize("name", FAMILIES)
def test_saves_at_least(name, one_thread):
    family = FAMILIES[name]
    stock, exact = (units_per_layer(family, recipe) for recipe in (None, "exact"))
    assert exact <= (1 - family.minimum) * stock, f"{stock:.2f} -> {exact:.2f}"


@pytest.mark.parametrize(("name", "minimum"), [("llama", 0.7), ("vit", 0.6)])
def test_adapters_with_dropout_save_at_least(name, minimum, one_thread):
    """On the CPU a mask is as wide as what it is for; where it is a byte, plain torch keeps a little less."""
    stock, exact = (units_per_layer(FAMILIES[name], recipe, lora=0.1) for recipe in (None, "exact"))
    assert exact <= (1 - minimum) * stock, f"{stock:.2f} -> {exact:.2f}"
