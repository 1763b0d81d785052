"""Hybrid ZO-FO on an OPT-1.3B-shaped model against full backprop: what is kept for backward, peaks, time of a step."""

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pyzo
from bench.harness import Recorder, against, speedup, summary
from bench.processes import fresh, peak_bytes, resident_bytes
from pyzo.memory import Account, account
from pyzo.timing import Provider, interleave

LAYERS = {True: 3, False: 24}  # dry run, real; OPT-1.3B has 24
HIDDEN = {True: 32, False: 256}  # and 2048
TOKENS = 128  # per row
ROWS = {True: 2, False: 64}  # of the batch whose peak is measured
TIMED_ROWS = {True: 1, False: 8}
ROUNDS = {True: 1, False: 11}
CUTS = (0, 1, 2, 3)  # thirds of the layers that ZO trains: 0, 8, 16 and 24
SHARE = {1: 0.68}  # of full backprop at 8 of 24 layers: "about a third less" (arXiv 2402.11592), and 1 % for the rest
BACKPROP = "backprop"
Step = Callable[[Callable[[], Tensor]], object]


def run(recorder: Recorder) -> None:
    """Adds what each provider keeps for backward, its peak in a process of its own (in a dry run: of two of them), and
    the time of its steps."""
    dry, layers, hidden = recorder.dry_run, LAYERS[recorder.dry_run], HIDDEN[recorder.dry_run]
    config = {"model": "OPT-shaped", "layers": layers, "hidden": hidden, "dtype": "bfloat16", "fo": "AdamW"}
    cuts = {BACKPROP: None, **{_name(third, layers): third for third in CUTS}}
    kept: dict[str, int] = {}
    for name, third in cuts.items():
        found = saved(third, dry)
        kept[name] = found.nbytes
        units, share = found.units(2 * TOKENS, hidden), found.nbytes / kept[BACKPROP]
        target = against(SHARE[third], share, at_least=False) if third in SHARE else {}
        recorder.add("saved", name, config, value=units, unit="units", per_layer=units / layers, share=share, **target)
    arguments = ["--dry-run"] if dry else []
    above: dict[str, int] = {}
    for name, third in list(cuts.items())[: 2 if dry else None]:
        numbers = fresh("bench.cases.hybrid", str(-1 if third is None else third), *arguments)
        above[name] = numbers["peak_bytes"] - numbers["before_bytes"]
        recorder.add(
            "peak above the model",
            name,
            {**config, "tokens": ROWS[dry] * TOKENS},
            value=above[name] / above[BACKPROP],
            unit="x backprop",
            above_bytes=above[name],
            **numbers,
        )
    samples = interleave(
        [Provider(name, _timed(third, dry)) for name, third in cuts.items()], repeats=ROUNDS[dry], warmup=1
    )
    for name in cuts:
        ratio = {} if name == BACKPROP else {"ratio": {"to": BACKPROP, **speedup(samples[BACKPROP], samples[name])}}
        recorder.add("step", name, {**config, "tokens": TIMED_ROWS[dry] * TOKENS}, **summary(samples[name]), **ratio)


def saved(third: int | None, dry_run: bool) -> Account:
    """What autograd keeps of the forward pass of a step on two rows."""
    model = opt(dry_run)
    accounts: list[Account] = []

    def closure() -> Tensor:
        accounts.append(account(lambda: loss(model, 2), model))
        return accounts[-1].result

    stepper(model, third)(closure)
    return accounts[0]


def child(third: int | None, dry_run: bool) -> dict[str, int]:
    """A step in this process: its resident set before, and the largest since it started.

    A small step comes first, so that what libraries allocate once, and the states of optimizers, are there before.
    """
    model = opt(dry_run)
    step = stepper(model, third)
    step(lambda: loss(model, 1))
    before = resident_bytes()
    step(lambda: loss(model, ROWS[dry_run]))
    return {"before_bytes": before, "peak_bytes": peak_bytes()}


def opt(dry_run: bool) -> nn.Module:
    """An OPTModel with random weights, all trained, with OPT's dropout of 0.1 and proportions of OPT-1.3B."""
    from transformers import OPTConfig, OPTModel

    hidden = HIDDEN[dry_run]
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=512,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=LAYERS[dry_run],
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=TOKENS,
        attn_implementation="sdpa",
    )
    return OPTModel(config).bfloat16().train()


def loss(model: nn.Module, rows: int) -> Tensor:
    """Of the last hidden state: a head's logits would depend on the vocabulary."""
    tokens = torch.randint(2, 512, (rows, TOKENS), generator=torch.Generator().manual_seed(rows))
    return model(input_ids=tokens, use_cache=False).last_hidden_state.float().square().mean()


def stepper(model: nn.Module, third: int | None) -> Step:
    """The step of full backprop (None), or of a hybrid run with so many thirds of the layers by ZO."""
    if third is not None:
        count = len(pyzo.layers.stack(model).layers)
        return pyzo.hybrid(model, third * count // CUTS[-1], {"lr": 1e-6}, torch.optim.AdamW).step
    optimizer = torch.optim.AdamW(model.parameters())

    def step(closure: Callable[[], Tensor]) -> None:
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()

    return step


def _timed(third: int | None, dry_run: bool) -> Callable[[], object]:
    model = opt(dry_run)
    step = stepper(model, third)
    return lambda: step(lambda: loss(model, TIMED_ROWS[dry_run]))


def _name(third: int, layers: int) -> str:
    return f"hybrid, ZO {third * layers // CUTS[-1]} of {layers}"


if __name__ == "__main__":
    given = int(sys.argv[1])
    print(json.dumps(child(None if given < 0 else given, "--dry-run" in sys.argv)))
