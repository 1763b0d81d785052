"""Peak memory of the demo's model in processes of their own: demo_memory.py inference | pyzo | eager | backprop."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

MODES = ("inference", "pyzo", "eager", "backprop")
STEPS = 3


def peaks(settings: "Settings") -> dict[str, int]:
    """Peak resident bytes of a fresh process for each mode; empty where the system does not tell them (not Linux)."""
    if not sys.platform.startswith("linux"):
        return {}
    return {mode: _fresh(mode, settings) for mode in MODES}


def _fresh(mode: str, settings: "Settings") -> int:
    command = [sys.executable, __file__, mode, json.dumps(asdict(settings))]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.splitlines()[-1])


def measure(mode: str, settings: "Settings") -> int:
    """Peak resident bytes of this process after STEPS steps (or twice as many forwards) on random tokens.

    Every mode has the same libraries and all weights in memory before it starts, so that a difference is what training
    adds: the weights are copied out of the file mapping, of which inference would touch a part only, and a torch
    optimizer is made, because the first one imports torch's compiler.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch_size, MAX_TOKENS)
    model = load_classifier(4)
    for p in model.parameters():
        p.data = p.data.clone()
    torch.optim.SGD(model.parameters(), lr=0.0)
    batch = Examples(
        torch.randint(1000, 30000, shape, generator=generator),
        torch.ones(shape, dtype=torch.int64),
        torch.randint(4, shape[:1], generator=generator),
    )
    if mode == "inference":
        with torch.no_grad():
            for _ in range(2 * STEPS):
                model.loss(batch)
    elif mode == "backprop":
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.backprop_lr)
        for _ in range(STEPS):
            backprop_step(optimizer, lambda: model.loss(batch))
    else:
        step = {"pyzo": pyzo_step, "eager": eager_step}[mode](model, settings)
        for _ in range(STEPS):
            step(lambda: model.loss(batch))
    return peak_bytes()


if __name__ == "__main__":
    import torch

    from bench.demo_model import MAX_TOKENS, Examples, load_classifier
    from bench.demo_timing import eager_step, pyzo_step
    from bench.demo_training import Settings
    from bench.processes import peak_bytes
    from pyzo.baselines import backprop_step

    print(measure(sys.argv[1], Settings(**json.loads(sys.argv[2]))))
