"""Hugging Face models in the scratch store: none needs more than its modules have, embeddings only looked-up rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scratches import beside_a_snapshot, borrowed, chain_bytes
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = 50
IDS = torch.randint(3, WORDS, (2, 8), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
USUAL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**USUAL, "num_key_value_heads": 2, "head_dim": 8}


def text(name: str, head: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        made = getattr(transformers, f"{name}Config")(vocab_size=WORDS, **config)
        return getattr(transformers, name + head)(made)

    return build


def vision(name: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(transformers, f"{name}ForImageClassification")(getattr(transformers, f"{name}Config")(**config))

    return build


OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "bert": text("Bert", "ForSequenceClassification", **USUAL),
    "roberta": text("Roberta", "ForSequenceClassification", **USUAL),
    "llama": text("Llama", "ForCausalLM", **USUAL, tie_word_embeddings=True),
    "mistral": text("Mistral", "ForCausalLM", **GROUPED),
    "qwen2": text("Qwen2", "ForCausalLM", **USUAL, num_key_value_heads=2),
    "qwen3": text("Qwen3", "ForCausalLM", **GROUPED),
    "opt": text("OPT", "ForCausalLM", **OPT, max_position_embeddings=32),
    "gpt2": text("GPT2", "LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "gemma": text("Gemma", "ForCausalLM", **GROUPED),
    "mixtral": text("Mixtral", "ForCausalLM", **USUAL, num_key_value_heads=2, num_local_experts=4),
    "t5": text("T5", "ForConditionalGeneration", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
               decoder_start_token_id=0),
    "bart": text("Bart", "ForConditionalGeneration", **BART),
    "vit": vision("ViT", **USUAL, image_size=32, patch_size=8),
    "swin": vision("Swin", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
}  # fmt: skip
PAIRS = ("t5", "bart")  # of texts
PICTURES = ("vit", "swin")


def inputs(name: str) -> dict[str, Tensor]:
    if name in PICTURES:
        return {"pixel_values": PIXELS}
    return {"input_ids": IDS, "labels": IDS} if name in PAIRS else {"input_ids": IDS}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_models_run_without_fallback(name, train):
    """With dropout in training. No weight is needed longer than a call of its module, none twice."""
    opt = beside_a_snapshot(
        lambda: MODELS[name]().train(train),
        lambda model: model(**inputs(name)).logits.float().square().mean(),
        steps=2,
    )
    model = opt._module
    looked_up = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    heads = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    for weight in looked_up:
        weight.requires_grad_(any(weight is head for head in heads))  # of which no whole copy is made
    assert borrowed(opt) == {}
    assert not any(scope.keeps for scope in opt.store._scopes)
    assert 0 < opt.store.extra_bytes <= chain_bytes(model)


@pytest.mark.parametrize("kind", ["lora", "lora of all", "prefix", "prompt"])
def test_peft(kind):
    peft = pytest.importorskip("peft")
    configs = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
        "lora of all": lambda: peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }

    def build() -> nn.Module:
        model = peft.get_peft_model(MODELS["llama"](), configs[kind]())
        with torch.no_grad():  # adapters begin at zero
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn(p.shape))
        return model

    opt = beside_a_snapshot(build, lambda model: model(input_ids=IDS).logits.float().square().mean(), steps=2)
    trained = sum(p.numel() * 2 for p in opt._module.parameters() if p.requires_grad)
    assert opt.store.extra_bytes <= trained
    assert borrowed(opt).keys() <= ({"Linear"} if kind == "lora of all" else {"closure", "PeftModelForCausalLM"})
