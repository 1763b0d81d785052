"""What Hugging Face models keep for backward, eager and with pyzo: saved units per layer, peaks of fresh processes."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bench.harness import Recorder, against
from bench.machine import ROOT
from bench.processes import fresh, peak_bytes, resident_bytes

sys.path.append(str(ROOT / "tests" / "nn"))  # the models that the tests measure

import shapes
import swaps

DEPTH = {True: 2, False: 8}  # layers of the model whose peak is measured; dry run, real
ROWS = {True: 2, False: 128}
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Setup:
    """A model with layers of pyzo or without, and how it is trained.

    Attributes:
        model, training: for the row.
        build: makes it with so many layers.
        run: its forward pass on so many rows.
        tokens: per row.
        most: units per layer that the issue allows.
    """

    model: str
    training: str
    provider: str
    build: Callable[[int], nn.Module]
    run: Callable[[nn.Module, int], Tensor]
    tokens: int
    most: float | None = None


def _llama(training: str, provider: str, build: Callable[[int], nn.Module], most: float | None = None) -> Setup:
    return Setup("Llama-shaped", training, provider, build, shapes.run_llama, shapes.LLAMA_TOKENS, most)


def _vit(training: str, provider: str, build: Callable[[int], nn.Module], most: float | None = None) -> Setup:
    run = partial(shapes.run_vit, autocast=BF16)
    return Setup("ViT-shaped", training, provider, build, run, shapes.VIT_TOKENS, most)


SETUPS = (
    _llama("full", "eager", shapes.llama),
    _llama("full", "pyzo, the paper's recipe", swaps.paper_llama),
    _llama("full", "pyzo, exact", swaps.low_memory_llama, 11.5),
    _llama("LoRA, dropout 0.1", "eager", partial(swaps.eager_lora_llama, dropout=0.1)),
    _llama("LoRA, dropout 0.1", "pyzo, exact", partial(swaps.low_memory_llama, dropout=0.1), 15.0),
    _vit("full, autocast", "eager", partial(shapes.vit, dtype=torch.float32)),
    _vit("full, autocast", "pyzo, 2-bit GELU", partial(swaps.low_memory_vit, dtype=torch.float32), 10.6),
)


def run(recorder: Recorder) -> None:
    """Adds two rows of every setup; in a dry run the first one alone gets a process."""
    eager_peaks: dict[tuple[str, str], int] = {}
    for number, setup in enumerate(SETUPS):
        hidden = setup.build(1).config.hidden_size
        config = {"model": setup.model, "training": setup.training, "hidden": hidden, "dtype": "bfloat16"}
        units = shapes.units_per_layer(setup.build, setup.run, tokens=setup.tokens, hidden=hidden)
        target = against(setup.most, round(units, 1), at_least=False) if setup.most else {}
        recorder.add("saved per layer", setup.provider, config, value=units, unit="units", **target)
        if recorder.dry_run and number:
            continue
        numbers = fresh("bench.cases.activations", str(number), *(["--dry-run"] if recorder.dry_run else []))
        above = numbers["peak_bytes"] - numbers["before_bytes"]
        eager = eager_peaks.setdefault((setup.model, setup.training), above)
        recorder.add(
            "peak above the model",
            setup.provider,
            {**config, "layers": DEPTH[recorder.dry_run], "tokens": setup.tokens * ROWS[recorder.dry_run]},
            value=above / eager,
            unit="x eager",
            above_bytes=above,
            **numbers,
        )


def child(number: int, dry_run: bool) -> dict[str, int]:
    """One forward and one backward pass in this process: its resident set before, and the largest since it started.

    A small one comes first, so that what libraries allocate once is there before.
    """
    setup = SETUPS[number]
    model = setup.build(DEPTH[dry_run])
    step(setup, model, 1)
    before = resident_bytes()
    step(setup, model, ROWS[dry_run])
    return {"before_bytes": before, "peak_bytes": peak_bytes()}


def step(setup: Setup, model: nn.Module, rows: int) -> None:
    """Forward and backward; the gradients stay, as an optimizer would find them."""
    setup.run(model, rows).float().square().mean().backward()


if __name__ == "__main__":
    print(json.dumps(child(int(sys.argv[1]), "--dry-run" in sys.argv)))
