"""GPU stage: a ZO-SGD step of a model with the shape of OPT-1.3B, random bfloat16 weights, against eager MeZO."""

import torch

from bench import gpu_stage, steps

TARGET = 2.5  # least speedup at 16 x 40 tokens; DESIGN.md section 9 sets it for OPT-13B
BATCHES = {True: ((2, 8),), False: ((16, 40), (8, 512))}


def main() -> None:
    """Adds the rows of both batch shapes."""
    from transformers import OPTConfig, OPTForCausalLM

    recorder = gpu_stage.begin("step")
    shape = {
        "hidden_size": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 2048,
    }
    if recorder.dry_run:
        shape = {name: 2 if "num" in name else 32 for name in shape} | {"vocab_size": 64}
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**shape, dropout=0.0)).to(recorder.device, torch.bfloat16).eval()
    for batch, length in BATCHES[recorder.dry_run]:
        tokens = torch.randint(4, model.config.vocab_size, (batch, length), device=recorder.device)
        config = {"model": "OPT-1.3B shape", "dtype": "bfloat16", "batch": batch, "length": length, "store": "inplace"}
        config["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        steps.compare(
            recorder,
            model,
            lambda module, tokens=tokens: module(input_ids=tokens, labels=tokens).loss,
            config,
            repeats=2 if recorder.dry_run else 20,
            targets={"pyzo normal": TARGET} if length == 40 else {},
        )
    gpu_stage.end(recorder)


if __name__ == "__main__":
    main()
