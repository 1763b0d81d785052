"""Architectures that conversion has no row for: what it can it converts, nothing is broken, the rest has a reason."""

import copy
from typing import Any

import pytest
import torch
from test_exact import distance
from torch import Tensor, nn

import pyzo

IDS = torch.randint(3, 32, (2, 24), generator=torch.Generator().manual_seed(0))
TEXT, CAUSAL = {"input_ids": IDS}, {"input_ids": IDS, "labels": IDS, "use_cache": False}
SIZES = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 64}
T5 = {"vocab_size": 32, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Class, options of its configuration, batch. Shared layers, sandwich and q/k norms, experts, parallel blocks, linears
# with a forward of their own, encoder and decoder, fused gate and up, convolutions.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "albert": ("AlbertModel", {**WIDE, **NO_DROPOUT, "embedding_size": 16}, TEXT),
    "gemma3": ("Gemma3ForCausalLM", {**WIDE, "num_key_value_heads": 4, "head_dim": 8}, CAUSAL),
    "mixtral": ("MixtralForCausalLM", {**WIDE, "num_key_value_heads": 4, "num_local_experts": 4}, CAUSAL),
    "falcon": ("FalconForCausalLM", SIZES, CAUSAL),
    "t5": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, {**TEXT, "labels": IDS}),
    "phi3": ("Phi3ForCausalLM", {**WIDE, "num_key_value_heads": 4, "pad_token_id": 0}, CAUSAL),
    "mamba": ("MambaForCausalLM", {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2}, CAUSAL),
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    cls, options, batch = MODELS[name]
    config = getattr(transformers, cls).config_class(**options)
    if name == "t5":
        config.decoder_start_token_id = 0
    torch.manual_seed(0)
    return getattr(transformers, cls)(config).train(), batch


def gradients(model: nn.Module, batch: dict[str, Tensor], autocast: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**batch)
    loss = out["loss"] if out.get("loss") is not None else (out["last_hidden_state"].float() + 0.1).square().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", ["exact", "paper"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_broken(name, recipe, one_thread):
    stock, batch = build(name)
    model = copy.deepcopy(stock)
    with torch.autocast("cpu", torch.bfloat16):
        report = pyzo.convert(model, recipe, batch)
    assert report.converted and report.after < report.before
    assert all(entry.reason for entry in report.skipped)
    true = gradients(stock, batch)
    if recipe == "exact":
        assert report.exact
        assert distance(gradients(model, batch), true) < 1e-5
        assert distance(gradients(model, batch, True), true) <= 2 * distance(gradients(stock, batch, True), true)
    else:
        assert model(**batch)[0].float().mean().item() == pytest.approx(stock(**batch)[0].mean().item(), abs=1e-4)
    pyzo.revert(model)
    assert distance(gradients(model, batch), true) < 1e-5
