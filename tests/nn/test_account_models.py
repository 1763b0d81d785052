"""Saved units per layer of Hugging Face models with layers of pyzo, beside eager torch (research, table 4.3)."""

from functools import partial

import pytest
import torch
from shapes import LLAMA_TOKENS, VIT_TOKENS, llama, run_llama, run_vit, units_per_layer, vit
from swaps import eager_lora_llama, low_memory_llama, low_memory_vit, paper_llama

LLAMA_HIDDEN, VIT_HIDDEN = 80, 128
llama_units = partial(units_per_layer, run=run_llama, tokens=LLAMA_TOKENS, hidden=LLAMA_HIDDEN)
vit_units = partial(units_per_layer, tokens=VIT_TOKENS, hidden=VIT_HIDDEN)


def test_llama_full(one_thread):
    """22.8 eager, 14.5 with the paper's recipe, 11.5 exact."""
    eager, paper, exact = map(llama_units, (llama, paper_llama, low_memory_llama))
    print(eager, paper, exact)
    assert eager == pytest.approx(22.8, abs=0.15)
    assert paper == pytest.approx(14.5, abs=0.15)
    assert exact <= 11.5


@pytest.mark.parametrize(("dropout", "eager_units", "most"), [(0.0, 20.9, 12.0), (0.1, 33.6, 12.0)])
def test_llama_with_adapters(dropout, eager_units, most, one_thread):
    """LoRA on every linear: the target with dropout is 15. Each adapter adds its rank to a layer's units."""
    eager = llama_units(partial(eager_lora_llama, dropout=dropout))
    exact = llama_units(partial(low_memory_llama, dropout=dropout))
    print(eager, exact)
    assert eager == pytest.approx(eager_units, abs=0.5)
    assert exact <= most


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_vit(autocast, one_thread):
    """16.1 eager in bf16 and 20.1 under autocast; 10.6 with shared norms and 2 bits for GELU in both."""
    dtype = torch.float32 if autocast else torch.bfloat16
    run = partial(run_vit, autocast=autocast)
    eager = vit_units(partial(vit, dtype=dtype), run)
    shared = vit_units(partial(low_memory_vit, dtype=dtype), run)
    print(eager, shared)
    assert eager == pytest.approx(20.1 if autocast else 16.1, abs=0.15)
    assert shared <= 10.65  # 10.5 and the norms' 1 / std


def test_exact_layers_do_not_change_the_model(one_thread):
    """Logits and gradients in float32, against float64: errors within twice those of the model as it was."""

    def results(model: torch.nn.Module) -> list[torch.Tensor]:
        logits = run_llama(model, 2)
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad for p in model.parameters())]

    want = results(llama(2, dtype=torch.float64))
    errors = [
        [(g - w).norm() / w.norm() for g, w in zip(results(model), want, strict=True)]
        for model in (low_memory_llama(2, dtype=torch.float32), llama(2, dtype=torch.float32))
    ]
    assert all(own <= 2 * eager for own, eager in zip(*errors, strict=True))
