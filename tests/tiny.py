"""Tiny models of Hugging Face with random weights, and such as people write them."""

from typing import Any

import pytest
from torch import nn

HIDDEN, IMAGE = 16, 16
SIZES = {"vocab_size": 32, "hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 2}
OPT = {**SIZES, "ffn_dim": 32, "max_position_embeddings": 16, "word_embed_proj_dim": HIDDEN}


def tiny(architecture: str, config: str, **sizes: Any) -> nn.Module:
    """A model of Hugging Face with random weights, by the names of its class and of its configuration's."""
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, architecture)(getattr(transformers, config)(**sizes))


def opt(architecture: str = "OPTForCausalLM", **changed: Any) -> nn.Module:
    return tiny(architecture, "OPTConfig", **{**OPT, **changed})


def llama(architecture: str = "LlamaForCausalLM", config: str = "LlamaConfig", **changed: Any) -> nn.Module:
    return tiny(architecture, config, **{**SIZES, "intermediate_size": 32, "num_key_value_heads": 2, **changed})


def bert(architecture: str, config: str = "BertConfig", **changed: Any) -> nn.Module:
    return tiny(architecture, config, **{**SIZES, "intermediate_size": 32, **changed})


def vit() -> nn.Module:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    return tiny("ViTForImageClassification", "ViTConfig", **sizes, intermediate_size=32, image_size=IMAGE, patch_size=4)


def swin() -> nn.Module:
    sizes = {"embed_dim": 8, "depths": [2, 2, 4], "num_heads": [1, 2, 2], "window_size": 2}
    return tiny("SwinForImageClassification", "SwinConfig", image_size=IMAGE, patch_size=2, **sizes)


def t5() -> nn.Module:
    return tiny("T5ForConditionalGeneration", "T5Config", vocab_size=32, d_model=HIDDEN, d_kv=8, d_ff=32, num_layers=2)


def bart() -> nn.Module:
    sides = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sides |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 16}
    return tiny("BartForConditionalGeneration", "BartConfig", vocab_size=32, d_model=HIDDEN, **sides)


def lora(model: nn.Module, *targets: str, **arguments: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets), **arguments))


class Block(nn.Module):
    """A layer as people write it: a mixer, then an MLP in a Sequential, of which a list would have two linears."""

    def __init__(self, size: int = 8, experts: int = 0):
        super().__init__()
        self.mix = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))
        if experts:
            self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(size, 32), nn.Linear(32, size)) for _ in range(experts))


class Tower(nn.Module):
    """An embedding, blocks in a container of any kind, and whatever else."""

    def __init__(self, blocks: nn.Module, **more: nn.Module):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = blocks
        for name, module in more.items():
            self.add_module(name, module)


def lists(count: int, **arguments: Any) -> nn.ModuleList:
    return nn.ModuleList(Block(**arguments) for _ in range(count))
