"""A small model of each family, with random weights and without dropout, and batches for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TOKENS = 64
HIDDEN = 128


@dataclass(frozen=True)
class Family:
    """How to build a model with so many layers and dropout, and what it is called with.

    Attributes:
        build: (layers, dropout, width) -> model; width None: HIDDEN.
        batch: rows -> keyword arguments.
        minimum: share of the saved bytes per layer that conversion has to save under autocast.
        tokens, hidden: of one row and layer, the unit of saved numbers.
    """

    build: Callable[..., nn.Module]
    batch: Callable[[int], dict[str, Any]]
    minimum: float
    wide: bool = False  # whether batches depend on the width
    tokens: int = TOKENS
    hidden: int = HIDDEN


def _text(rows: int, vocabulary: int = 32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows)
    return {"input_ids": torch.randint(3, vocabulary, (rows, TOKENS), generator=generator)}


def _causal(rows: int) -> dict[str, Any]:
    batch = _text(rows)
    return {**batch, "labels": batch["input_ids"], "use_cache": False}


def _labelled(rows: int) -> dict[str, Any]:
    return {**_text(rows), "labels": torch.arange(rows) % 2}


def _images(rows: int, size: int = 32) -> dict[str, Any]:
    pixels = torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(rows))
    return {"pixel_values": pixels, "labels": torch.arange(rows) % 2}


def _llama_like(name: str, ratio: float = 2.7, head_dim: bool = False) -> Callable[..., nn.Module]:
    def build(layers: int, dropout: float = 0.0, width: int = HIDDEN) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(
            vocab_size=32,
            hidden_size=width,
            intermediate_size=int(ratio * width),
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            attention_dropout=dropout,
            attn_implementation="sdpa",
            pad_token_id=0,
            **({"head_dim": width // 4} if head_dim else {}),
        )
        return getattr(transformers, f"{name}ForCausalLM")(config).train()

    return build


def _bert_like(name: str) -> Callable[..., nn.Module]:
    def build(layers: int, dropout: float = 0.0, width: int = HIDDEN) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(
            vocab_size=32,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=TOKENS + 4,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            attn_implementation="sdpa",
            pad_token_id=1,
        )
        return getattr(transformers, f"{name}ForSequenceClassification")(config).train()

    return build


def _vit(layers: int, dropout: float = 0.0, width: int = HIDDEN) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=32,
        patch_size=4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="sdpa",
    )
    return transformers.ViTForImageClassification(config).train()


def _swin(layers: int, dropout: float = 0.0, width: int = 96) -> nn.Module:
    """One stage of `layers` pairs of layers, the second of each with shifted windows."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=56,
        patch_size=4,
        embed_dim=width,
        depths=[2 * layers],
        num_heads=[width // 32],
        window_size=7,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        drop_path_rate=dropout,
        attn_implementation="sdpa",
    )
    return transformers.SwinForImageClassification(config).train()


def _gpt2(layers: int, dropout: float = 0.0, width: int = HIDDEN) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        n_positions=TOKENS,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).train()


def _opt(layers: int, dropout: float = 0.0, width: int = HIDDEN) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=32,
        hidden_size=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        word_embed_proj_dim=width,
        dropout=dropout,
        attention_dropout=dropout,
        attn_implementation="sdpa",
    )
    return transformers.OPTForCausalLM(config).train()


class Encoder(nn.Module):
    """nn.TransformerEncoder with a loss, called as Hugging Face's models are."""

    def __init__(self, layers: int, dropout: float, width: int, **options: Any):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout, **options)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)
        self.batch_first = options.get("batch_first", False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.layers(x if self.batch_first else x.transpose(0, 1))
        logits = self.head(y[:, 0] if self.batch_first else y[0])
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def _encoder(**options: Any) -> Callable[..., nn.Module]:
    def build(layers: int, dropout: float = 0.0, width: int = HIDDEN) -> nn.Module:
        torch.manual_seed(0)
        return Encoder(layers, dropout, width, **options).train()

    return build


def _vectors(rows: int, width: int = HIDDEN) -> dict[str, Any]:
    x = torch.randn(rows, TOKENS, width, generator=torch.Generator().manual_seed(rows))
    return {"x": x, "labels": torch.arange(rows) % 2}


WIDTH = 32  # of models that are trained


def small(name: str, layers: int = 2, dropout: float = 0.0) -> nn.Module:
    """A narrow model of a family."""
    return FAMILIES[name].build(layers, dropout, 64 if name == "swin" else WIDTH)


def batch_of(name: str, rows: int = 2) -> dict[str, Any]:
    """Keyword arguments for a narrow model, a loss among its results."""
    family = FAMILIES[name]
    return family.batch(rows, WIDTH) if family.wide else family.batch(rows)


FAMILIES = {
    "vit": Family(_vit, _images, 0.35, tokens=65),
    "bert": Family(_bert_like("Bert"), _labelled, 0.35),
    "roberta": Family(_bert_like("Roberta"), _labelled, 0.35),
    "llama": Family(_llama_like("Llama"), _causal, 0.45),
    "mistral": Family(_llama_like("Mistral"), _causal, 0.45),
    "qwen2": Family(_llama_like("Qwen2"), _causal, 0.45),
    "qwen3": Family(_llama_like("Qwen3", head_dim=True), _causal, 0.45),
    "gemma": Family(_llama_like("Gemma", ratio=4, head_dim=True), _causal, 0.20),
    "gpt2": Family(_gpt2, _causal, 0.20),
    "opt": Family(_opt, _causal, 0.20),
    "swin": Family(_swin, lambda rows: _images(rows, 56), 0.45, tokens=2 * 196, hidden=96),
    "encoder": Family(_encoder(), _vectors, 0.20, wide=True),
    "encoder-gelu": Family(_encoder(activation="gelu", batch_first=True), _vectors, 0.20, wide=True),
    "encoder-pre": Family(_encoder(activation="gelu", batch_first=True, norm_first=True), _vectors, 0.20, wide=True),
}
