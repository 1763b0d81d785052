"""How the demo trains and measures: zeroth-order on all parameters, zeroth-order on the head alone, and backpropagation."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import pyzo
from bench.baselines import EagerMeZO, backprop_step
from bench.demo_model import Classifier, Examples


@dataclass(frozen=True)
class Settings:
    """What a run is trained with. `lr` and `eps` are the encoder's.

    The head's probe is longer than the encoder's: the loss difference that both share is then not drowned, for the head's
    few weights, in what the encoder's millions of weights add to it.
    """

    steps: int = 500
    batch_size: int = 16
    lr: float = 1e-5
    head_lr: float = 0.07
    eps: float = 1e-3
    head_eps: float = 1e-2
    distribution: str = "normal"
    store: str = "auto"
    backprop_steps: int = 60
    backprop_lr: float = 3e-5
    backprop_head_lr: float = 1e-2


@dataclass(frozen=True)
class Score:
    """Per-example results on held-out text: losses float32 [n], correct bool [n]."""

    losses: Tensor
    correct: Tensor

    @property
    def loss(self) -> float:
        return self.losses.mean().item()

    @property
    def accuracy(self) -> float:
        return self.correct.float().mean().item()


def parameter_groups(model: Classifier, settings: Settings) -> list[dict]:
    """Two groups: the encoder with small steps, the head with large ones."""
    return [
        {"params": list(model.encoder.named_parameters(prefix="encoder")), "lr": settings.lr, "eps": settings.eps},
        {"params": list(model.head.named_parameters(prefix="head")), "lr": settings.head_lr, "eps": settings.head_eps},
    ]


def train_zo(model: Classifier, train: Examples, settings: Settings, seed: int) -> list[float]:
    """Fine-tunes every parameter from forward passes alone; returns the loss of each step."""
    optimizer = pyzo.optim.ZOSGD(
        parameter_groups(model, settings), distribution=settings.distribution, store=settings.store, seed=seed
    )
    losses = []
    with tqdm(
        batches(train, settings.steps, settings.batch_size, seed), "ZO-SGD, all parameters", settings.steps
    ) as bar:
        for batch in bar:
            loss = optimizer.step(lambda batch=batch: model.loss(batch))
            losses.append(loss.item())
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
    return losses


def train_head_zo(head: nn.Module, projected: Tensor, labels: Tensor, settings: Settings, seed: int) -> list[float]:
    """Zeroth-order steps on the head alone, on features that the frozen encoder computed once."""
    optimizer = EagerMeZO(head.parameters(), settings.head_lr, eps=settings.head_eps, seed=seed)
    losses = []
    for index in tqdm(
        sampled(len(labels), settings.steps, settings.batch_size, seed), "ZO-SGD, head only", settings.steps
    ):
        loss = optimizer.step(lambda index=index: functional.cross_entropy(head(projected[index]), labels[index]))
        losses.append(loss.item())
    return losses


def train_backprop(model: Classifier, train: Examples, settings: Settings, seed: int) -> list[float]:
    """AdamW on every parameter, with gradients; as for the others, without dropout."""
    optimizer = torch.optim.AdamW(
        [
            {"params": model.encoder.parameters(), "lr": settings.backprop_lr},
            {"params": model.head.parameters(), "lr": settings.backprop_head_lr},
        ],
        weight_decay=0.0,
    )
    steps = settings.backprop_steps
    losses = []
    for batch in tqdm(batches(train, steps, settings.batch_size, seed), "backprop, AdamW", steps):
        losses.append(backprop_step(optimizer, lambda batch=batch: model.loss(batch)).item())
    return losses


def sampled(count: int, steps: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices int64 [batch_size] of each step: every example once before any comes again, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:batch_size]
        queue = queue[batch_size:]


def batches(examples: Examples, steps: int, batch_size: int, seed: int) -> Iterator[Examples]:
    """The examples that `sampled` names."""
    return (examples[index] for index in sampled(len(examples), steps, batch_size, seed))


@torch.no_grad()
def embed_all(model: Classifier, examples: Examples, description: str) -> Tensor:
    """Unit vectors of all examples, float32 [n, hidden]."""
    starts = tqdm(range(0, len(examples), 64), description)
    return torch.cat([model.embed(examples[start : start + 64]) for start in starts])


@torch.no_grad()
def score(model: Classifier, embedded: Tensor, labels: Tensor) -> Score:
    """Held-out losses and hits of the head on unit vectors [n, hidden]."""
    logits = model.head(model.project(embedded))
    return Score(functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels)
