"""GPU stage: steps of a model with the shape of OPT-1.3B, random bfloat16 weights: ZO-SGD against eager MeZO, every
optimizer against one forward."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from bench import gpu_stage, steps
from bench.harness import Recorder, summary
from pyzo import estimators, masks, optim
from pyzo.optim.base import ZOOptimizer
from pyzo.timing import Provider, interleave

TARGET = 2.5  # least speedup at 16 x 40 tokens; DESIGN.md section 9 sets it for OPT-13B
BATCHES = {True: ((2, 8),), False: ((16, 40), (8, 512))}
COMMON = {"lr": steps.LR, "eps": steps.EPS, "store": "inplace"}
FZOO = estimators.OneSided(8, normalize="std")
OPTIMIZERS: dict[str, Callable[[nn.Module], ZOOptimizer]] = {
    "ZO-SGD": lambda model: optim.ZOSGD(model, **COMMON),
    "ZO-SGD q=4": lambda model: optim.ZOSGD(model, **COMMON, estimator=estimators.TwoSided(4)),
    "ZO-SGD one-sided": lambda model: optim.ZOSGD(model, **COMMON, estimator=estimators.OneSided()),
    "ZO-SGD masked": lambda model: optim.ZOSGD(model, **COMMON, mask=masks.Random(0.9)),
    "ZO-SGD-Sign": lambda model: optim.ZOSignSGD(model, **COMMON),
    "ZO-SGD-MMT": lambda model: optim.ZOSGD(model, **COMMON, momentum=0.9),
    "ZO-SGD-Cons": lambda model: optim.ZOConservativeSGD(model, **COMMON),
    "ZO-Adam": lambda model: optim.ZOAdam(model, **COMMON),
    "ZO-Adam bf16 state": lambda model: optim.ZOAdam(model, **COMMON, state_dtype=torch.bfloat16),
    "FZOO": lambda model: optim.ZOSGD(model, **COMMON, estimator=FZOO, distribution="rademacher"),
    "Forward-Grad": lambda model: optim.ForwardGradSGD(model, lr=steps.LR),
}


def main() -> None:
    """Adds the rows of both batch shapes, and those of all optimizers at the first."""
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

        def loss(module: nn.Module, tokens: torch.Tensor = tokens) -> torch.Tensor:
            return module(input_ids=tokens, labels=tokens).loss

        targets = {"pyzo normal": TARGET} if length == 40 else {}
        steps.compare(recorder, model, loss, config, repeats=2 if recorder.dry_run else 20, targets=targets)
        if length == BATCHES[recorder.dry_run][0][1]:
            for name in OPTIMIZERS:
                compare(recorder, name, model, loss, config)
    gpu_stage.end(recorder)


def compare(recorder: Recorder, name: str, model: nn.Module, loss: steps.Loss, config: Mapping[str, object]) -> None:
    """Adds the row of one optimizer on a copy of the model: the time of a step, and how many forwards it is worth."""
    twin = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](twin)

    def forward() -> None:
        with torch.no_grad():
            loss(twin)

    samples = interleave(
        [Provider("step", lambda: optimizer.step(lambda: loss(twin))), Provider("forward", forward)],
        repeats=2 if recorder.dry_run else 10,
        device=recorder.device,
    )
    numbers: dict[str, object] = summary(samples["step"])
    numbers["forwards_worth"] = numbers["median_s"] / summary(samples["forward"])["median_s"]
    recorder.add(f"step {name}", "pyzo", config, **numbers)


if __name__ == "__main__":
    main()
