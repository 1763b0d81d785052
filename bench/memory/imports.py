"""Imports the models of all families, which transformers does at first use, so that forked processes have them."""

import peft  # noqa: F401
from transformers import (  # noqa: F401
    BertForSequenceClassification,
    GemmaForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    OPTForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    RobertaForSequenceClassification,
    SwinForImageClassification,
    ViTForImageClassification,
)
