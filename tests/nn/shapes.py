"""Hugging Face models of Llama's and ViT's shape, and the saved units of one of their layers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyzo.memory import account

LLAMA_TOKENS = 64  # per row of a batch
VIT_TOKENS = 65  # 8 x 8 patches and the class token

_ROWS = (1, 2)
_LAYERS = (1, 2)


def llama(
    layers: int, *, hidden: int = 80, intermediate: int = 216, heads: int = 1, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """A LlamaForCausalLM with random weights, all trainable; by default intermediate / hidden = 2.7, as in 13B."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        attention_dropout=0.0,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config).to(dtype).train()


def vit(
    layers: int, *, hidden: int = 128, intermediate: int = 512, heads: int = 4, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """A ViTModel with random weights, all trainable, without dropout."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=32,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return transformers.ViTModel(config, add_pooling_layer=False).to(dtype).train()


def run_llama(model: nn.Module, rows: int) -> Tensor:
    """Logits [rows, LLAMA_TOKENS, 32] of fixed tokens."""
    tokens = torch.randint(32, (rows, LLAMA_TOKENS), generator=torch.Generator().manual_seed(rows))
    return model(input_ids=tokens.to(model.device), use_cache=False).logits


def run_vit(model: nn.Module, rows: int, autocast: torch.dtype | None = None) -> Tensor:
    """The last hidden state [rows, VIT_TOKENS, hidden] of fixed images in the model's dtype."""
    images = torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(rows))
    images = images.to(model.device, model.dtype)
    with torch.autocast(model.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        return model(pixel_values=images).last_hidden_state


def units_per_layer(
    build: Callable[[int], nn.Module], run: Callable[[nn.Module, int], object], *, tokens: int, hidden: int
) -> float:
    """What one more layer keeps for one more row, in units of a [tokens, hidden] tensor of 16-bit numbers.

    The difference of two depths leaves out what a model keeps once (embeddings, rotary tables, the head), the
    difference of two batch sizes what does not depend on the batch (weights that autocast casts).

    Args:
        build: makes the model with so many layers.
        run: runs its forward pass on so many rows and returns what keeps the graph alive.
        tokens: per row.
    """

    def kept(layers: int, rows: int) -> int:
        model = build(layers)
        return account(lambda: run(model, rows), model).nbytes

    (few, many), (shallow, deep) = _ROWS, _LAYERS
    per_layer = [kept(deep, rows) - kept(shallow, rows) for rows in (few, many)]
    return (per_layer[1] - per_layer[0]) / (2 * tokens * hidden * (many - few) * (deep - shallow))
