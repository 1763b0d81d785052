"""The paper's recipe: 2-bit activations, merged norms, state dicts of stock models."""

import copy

import pytest
import torch
from families import FAMILIES, batch_of, small
from test_exact import distance, gradients, loss_of, units_per_layer

import pyzo
from pyzo.conversion.swap import Swapped


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Gains and offsets of norms as of a trained model, so that merging has something to do."""
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if (p.dim() == 1 and "norm" in name.lower()) or ".ln_" in name:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_values_are_exact_and_the_state_dict_is_that_of_the_stock_model(name, one_thread):
    stock, batch = spread(small(name)), batch_of(name)
    model = copy.deepcopy(stock)
    report = pyzo.convert(model, "paper", batch)
    assert loss_of(model, batch).item() == pytest.approx(loss_of(stock, batch).item(), rel=1e-5)
    got, want = model.state_dict(), stock.state_dict()
    assert sorted(got) == sorted(want)
    for key in want:
        # Weights up to two roundings; biases are b + W beta - W beta, and the sums |W| |beta| are below 2 here.
        torch.testing.assert_close(got[key], want[key], rtol=2.1 * 2**-23, atol=0 if want[key].dim() > 1 else 2**-21)
    assert not report.exact or all(entry.kind == "norm" for entry in report.converted)
    pyzo.revert(model)
    assert not any(isinstance(module, Swapped) for module in model.modules())
    # Weights that are a rounding away send a few inputs of ReLU to its other side.
    assert distance(gradients(model, batch), gradients(stock, batch)) < 1e-3


def test_what_is_merged_and_what_is_coded(one_thread):
    report = pyzo.convert(small("llama"), "paper", batch_of("llama"))
    entries = {entry.name: entry for entry in report.entries}
    norm = entries["model.layers.0.input_layernorm"]
    assert "merged" in norm.became and norm.exact
    coded = entries["model.layers.0.mlp.act_fn"]
    assert coded.kind == "gate" and not coded.exact and "'paper'" in coded.became
    assert not report.exact
    bert = {e.name: e for e in pyzo.convert(small("bert"), "paper", batch_of("bert")).entries}
    post = bert["bert.encoder.layer.0.attention.output.LayerNorm"]
    assert "merged" not in post.became and "add" in post.reason


def test_trained_weights_come_back(one_thread):
    """Merged, trained, reverted: the function stays what it is."""
    model, batch = spread(small("vit")), batch_of("vit")
    pyzo.convert(model, "paper", batch)
    gradients(model, batch)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    want = loss_of(model, batch).item()
    state = model.state_dict()
    pyzo.revert(model)
    assert loss_of(model, batch).item() == pytest.approx(want, rel=1e-5)
    stock = small("vit")
    stock.load_state_dict(state)
    assert loss_of(stock, batch).item() == pytest.approx(want, rel=1e-5)


def test_nothing_is_loaded_into_merged_weights(one_thread):
    model, batch = small("vit"), batch_of("vit")
    pyzo.convert(model, "paper", batch)
    with pytest.raises((ValueError, RuntimeError), match=r"pyzo\.revert"):
        model.load_state_dict(model.state_dict())


def test_lora_after_merging_reverts(one_thread):
    peft = pytest.importorskip("peft")
    model, batch = spread(small("llama")), batch_of("llama")
    pyzo.convert(model, "paper", batch)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    want = loss_of(model, batch).item()
    pyzo.revert(model)
    assert loss_of(model, batch).item() == pytest.approx(want, rel=1e-5)


def test_tied_heads_are_not_merged(one_thread):
    report = pyzo.convert(small("gpt2"), "paper", batch_of("gpt2"))
    assert "tied" in report["transformer.ln_f"].reason


def test_saves_as_the_paper_says(one_thread):
    """Llama, full fine-tuning: 6.25 bytes per element of the gate for the exact recipe's 4."""
    stock, paper, exact = (units_per_layer(FAMILIES["llama"], recipe) for recipe in (None, "paper", "exact"))
    assert exact < paper < 0.65 * stock
    assert paper - exact == pytest.approx(2.25 / 2 * 345 / 128, rel=0.02)
