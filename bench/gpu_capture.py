"""GPU stage: steps of a decoder with the shape of OPT-125M, recorded into a CUDA graph and not, in time and in bits."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from bench import gpu_stage
from bench.harness import Recorder, speedup, summary
from pyzo import estimators, optim
from pyzo.optim.base import ZOOptimizer
from pyzo.timing import Provider, interleave

LR, EPS = 1e-7, 1e-3
SHAPE = {  # by whether it is a dry run; arXiv 2205.01068, table 1
    True: {"hidden": 16, "layers": 1, "heads": 2, "vocabulary": 32, "positions": 16},
    False: {"hidden": 768, "layers": 12, "heads": 12, "vocabulary": 50272, "positions": 2050},
}
BATCH = {True: (2, 8), False: (16, 40)}
STEPS = 3  # that must end in the same bits
METHODS: dict[str, Callable[[nn.Module], ZOOptimizer]] = {
    "ZO-SGD": lambda model: optim.ZOSGD(model, lr=LR, eps=EPS),
    "ZO-SGD q=4": lambda model: optim.ZOSGD(model, lr=LR, eps=EPS, estimator=estimators.TwoSided(4)),
    "ZO-SGD-Sign": lambda model: optim.ZOSignSGD(model, lr=LR, eps=EPS),
    "ZO-SGD-MMT": lambda model: optim.ZOSGD(model, lr=LR, eps=EPS, momentum=0.9),
    "ZO-SGD-Cons": lambda model: optim.ZOConservativeSGD(model, lr=LR, eps=EPS),
    "ZO-Adam": lambda model: optim.ZOAdam(model, lr=LR, eps=EPS),
}


class Layer(nn.Module):
    """Causal self-attention and a ReLU perceptron, each behind its norm."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.projections = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(4))
        self.perceptron = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.ReLU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, hidden]."""
        h = self.norms[0](x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.projections[:3])
        h = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projections[3](h.transpose(1, 2).flatten(-2))
        return x + self.perceptron(self.norms[1](x))


class Decoder(nn.Module):
    """The shapes of OPT's parameters; embeddings and head are tied."""

    def __init__(self, *, hidden: int, layers: int, heads: int, vocabulary: int, positions: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, hidden), nn.Embedding(positions, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the next tokens of int64 [batch, length], a float32 scalar."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def main() -> None:
    """One pair of rows per method and dtype. A step that is not recorded or ends in other bits fails the stage."""
    recorder = gpu_stage.begin("capture")
    torch.manual_seed(0)
    model = Decoder(**SHAPE[recorder.dry_run]).to(recorder.device)
    found = [
        compare(recorder, copy.deepcopy(model).to(dtype), name)
        for dtype in (torch.float32, torch.bfloat16)
        for name in METHODS
    ]
    gpu_stage.end(recorder, failed=not all(found))


def compare(recorder: Recorder, model: Decoder, name: str) -> bool:
    """Adds the rows of one method; false where recorded and ordinary steps differ."""
    twin = copy.deepcopy(model)
    optimizers = [METHODS[name](module) for module in (model, twin)]
    shape = BATCH[recorder.dry_run]
    vocabulary = model.tokens.num_embeddings
    batches = [torch.randint(vocabulary, shape, device=recorder.device) for _ in range(STEPS)]
    captured = optimizers[0].capture(model, batches[0])
    losses = [
        [float(step(batch)) for batch in batches] for step in (captured, lambda b: optimizers[1].step(lambda: twin(b)))
    ]
    equal = losses[0] == losses[1] and all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
    samples = interleave(
        [
            Provider("captured", lambda: captured(batches[0])),
            Provider("step", lambda: optimizers[1].step(lambda: twin(batches[0]))),
        ],
        repeats=2 if recorder.dry_run else 20,
        device=recorder.device,
    )
    config = {"model": "OPT-125M shape", "dtype": str(model.norm.weight.dtype).removeprefix("torch.")}
    config |= {"batch": shape[0], "length": shape[1], "parameters": sum(p.numel() for p in model.parameters())}
    for provider, times in samples.items():
        numbers: dict[str, object] = summary(times)
        if provider == "captured":
            numbers["ratio"] = {"to": "step", **speedup(samples["step"], times)}
            numbers |= {"recorded": captured.graph is not None, "why": captured.reason, "equal_bits": equal}
        recorder.add(f"step {name}", provider, config, **numbers)
    return equal and (captured.graph is not None or recorder.dry_run)


if __name__ == "__main__":
    main()
