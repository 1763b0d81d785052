"""Models of every family that conversion has a target for, from their configurations, and batches for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How large a model and a row are.

    Attributes:
        width, heads: of a layer; Swin's heads follow from its width.
        length: of a row: tokens, or pixels of the side of an image.
        inner: of an MLP; None: the family's ratio to the width.
        patch: pixels of the side of a patch; Swin's are 4.
        vocabulary: small, as it is the layers that are asked about.
    """

    width: int
    heads: int
    length: int
    inner: int | None = None
    patch: int = 16
    vocabulary: int = 32


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        title: as tables have it.
        build: (layers, size, dropout) -> model in training mode, random weights.
        batch: (rows, size) -> keyword arguments; a loss is among the results.
        minimum: share of the saved bytes per layer that conversion has to save under autocast (issue 7).
        tokens: of a row, by size, in units of [tokens, width] tensors that one more layer works on.
        adapted: what PEFT adapts.
    """

    title: str
    build: Callable[[int, Size, float], nn.Module]
    batch: Callable[[int, Size], Batch]
    minimum: float
    tokens: Callable[[Size], int] = lambda size: size.length
    adapted: str | Sequence[str] = "all-linear"

    def rows(self, size: Size, tokens: int) -> int:
        """How many rows have about so many tokens together."""
        return max(1, round(tokens / self.tokens(size)))


def _generator(rows: int) -> torch.Generator:
    return torch.Generator().manual_seed(rows)


def _ids(rows: int, size: Size) -> Tensor:
    return torch.randint(3, size.vocabulary, (rows, size.length), generator=_generator(rows))


def _causal(rows: int, size: Size) -> Batch:
    ids = _ids(rows, size)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def _labelled(rows: int, size: Size) -> Batch:
    return {"input_ids": _ids(rows, size), "labels": torch.arange(rows) % 2}


def _images(rows: int, size: Size) -> Batch:
    pixels = torch.randn(rows, 3, size.length, size.length, generator=_generator(rows))
    return {"pixel_values": pixels, "labels": torch.arange(rows) % 2}


def _vectors(rows: int, size: Size) -> Batch:
    x = torch.randn(rows, size.length, size.width, generator=_generator(rows))
    return {"x": x, "labels": torch.arange(rows) % 2}


def _of_transformers(config: str, model: str, **options: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, config)(**options, attn_implementation="sdpa")
    return getattr(transformers, model)(made).train()


def _llama_like(name: str, ratio: float = 2.7, head_dim: bool = False) -> Callable[[int, Size, float], nn.Module]:
    def build(layers: int, size: Size, dropout: float) -> nn.Module:
        return _of_transformers(
            f"{name}Config",
            f"{name}ForCausalLM",
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.inner or int(ratio * size.width),
            num_hidden_layers=layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            attention_dropout=dropout,
            pad_token_id=0,
            **({"head_dim": size.width // size.heads} if head_dim else {}),
        )

    return build


def _bert_like(name: str) -> Callable[[int, Size, float], nn.Module]:
    def build(layers: int, size: Size, dropout: float) -> nn.Module:
        return _of_transformers(
            f"{name}Config",
            f"{name}ForSequenceClassification",
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.inner or 4 * size.width,
            num_hidden_layers=layers,
            num_attention_heads=size.heads,
            max_position_embeddings=size.length + 4,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            pad_token_id=1,
        )

    return build


def _vit(layers: int, size: Size, dropout: float) -> nn.Module:
    return _of_transformers(
        "ViTConfig",
        "ViTForImageClassification",
        hidden_size=size.width,
        intermediate_size=size.inner or 4 * size.width,
        num_hidden_layers=layers,
        num_attention_heads=size.heads,
        image_size=size.length,
        patch_size=size.patch,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def _swin(layers: int, size: Size, dropout: float) -> nn.Module:
    """One stage of `layers` pairs of layers, the second of each with shifted windows."""
    return _of_transformers(
        "SwinConfig",
        "SwinForImageClassification",
        image_size=size.length,
        patch_size=4,
        embed_dim=size.width,
        depths=[2 * layers],
        num_heads=[size.width // 32],
        window_size=7,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        drop_path_rate=dropout,
    )


def _gpt2(layers: int, size: Size, dropout: float) -> nn.Module:
    return _of_transformers(
        "GPT2Config",
        "GPT2LMHeadModel",
        vocab_size=size.vocabulary,
        n_embd=size.width,
        n_inner=size.inner,
        n_layer=layers,
        n_head=size.heads,
        n_positions=size.length,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )


def _opt(layers: int, size: Size, dropout: float) -> nn.Module:
    return _of_transformers(
        "OPTConfig",
        "OPTForCausalLM",
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        ffn_dim=size.inner or 4 * size.width,
        num_hidden_layers=layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.length,
        word_embed_proj_dim=size.width,
        dropout=dropout,
        attention_dropout=dropout,
    )


class Encoder(nn.Module):
    """nn.TransformerEncoder with a loss, called as Hugging Face's models are."""

    def __init__(self, layers: int, size: Size, dropout: float, **options: Any):
        super().__init__()
        layer = nn.TransformerEncoderLayer(size.width, size.heads, size.inner or 4 * size.width, dropout, **options)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(size.width, 2)
        self.batch_first = options.get("batch_first", False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.layers(x if self.batch_first else x.transpose(0, 1))
        logits = self.head(y[:, 0] if self.batch_first else y[0])
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def _encoder(title: str, **options: Any) -> Family:
    def build(layers: int, size: Size, dropout: float) -> nn.Module:
        torch.manual_seed(0)
        return Encoder(layers, size, dropout, **options).train()

    # Its attention takes the weights of the linears inside itself, without calling them.
    return Family(title, build, _vectors, 0.20, adapted=("linear1", "linear2"))


FAMILIES = {
    "vit": Family("ViT", _vit, _images, 0.35, lambda size: (size.length // size.patch) ** 2 + 1),
    "bert": Family("BERT", _bert_like("Bert"), _labelled, 0.35),
    "roberta": Family("RoBERTa", _bert_like("Roberta"), _labelled, 0.35),
    "llama": Family("LLaMA", _llama_like("Llama"), _causal, 0.45),
    "mistral": Family("Mistral", _llama_like("Mistral"), _causal, 0.45),
    "qwen2": Family("Qwen2", _llama_like("Qwen2"), _causal, 0.45),
    "qwen3": Family("Qwen3", _llama_like("Qwen3", head_dim=True), _causal, 0.45),
    "gemma": Family("Gemma", _llama_like("Gemma", ratio=4, head_dim=True), _causal, 0.20),
    "gpt2": Family("GPT-2", _gpt2, _causal, 0.20),
    "opt": Family("OPT", _opt, _causal, 0.20),
    "swin": Family("Swin", _swin, _images, 0.30, lambda size: 2 * (size.length // 4) ** 2),
    "encoder": _encoder("nn.TransformerEncoder"),
    "encoder-gelu": _encoder("nn.TransformerEncoder, GELU", activation="gelu", batch_first=True),
    "encoder-pre": _encoder(
        "nn.TransformerEncoder, GELU, pre-norm", activation="gelu", batch_first=True, norm_first=True
    ),
}


def move(batch: Batch, device: str) -> Batch:
    """The batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
