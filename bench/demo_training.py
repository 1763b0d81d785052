"""How the demo trains: zeroth-order on all parameters, zeroth-order on the head alone, backpropagation; and scores."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import pyzo
from bench.demo_check import Score
from bench.demo_model import Classifier, Examples
from pyzo.baselines import EagerMeZO, backprop_step

Item = TypeVar("Item")
FULL, HEAD, BACKPROP = "ZO-SGD, all parameters", "ZO-SGD, head only", "backprop (AdamW), all parameters"


@dataclass(frozen=True)
class Settings:
    """What a run is trained with. `lr` and `eps` are the encoder's.

    The head's probe is longer than the encoder's: both share one loss difference, in which what the head's few weights
    add would else drown in what the encoder's millions add.
    """

    steps: int = 500
    batch_size: int = 16
    lr: float = 1e-5
    head_lr: float = 0.1
    eps: float = 1e-3
    head_eps: float = 3e-2
    distribution: str = "normal"
    store: str = "auto"
    backprop_steps: int = 60
    backprop_lr: float = 3e-5
    backprop_head_lr: float = 1e-2


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
    losses: list[float] = []
    for batch in bar(batches(train, settings.steps, settings.batch_size, seed), FULL, settings.steps, losses):
        loss = optimizer.step(partial(model.loss, batch))
        losses.append(loss.item())
    return losses


def train_head_zo(head: nn.Module, projected: Tensor, labels: Tensor, settings: Settings, seed: int) -> list[float]:
    """Zeroth-order steps on the head alone, on features that the frozen encoder computed once."""
    optimizer = EagerMeZO(head.parameters(), settings.head_lr, eps=settings.head_eps, seed=seed)
    losses: list[float] = []
    for index in bar(sampled(len(labels), settings.steps, settings.batch_size, seed), HEAD, settings.steps, losses):
        loss = optimizer.step(partial(head_loss, head, projected[index], labels[index]))
        losses.append(loss.item())
    return losses


def head_loss(head: nn.Module, projected: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the head on projected features [n, COMPONENTS], a scalar."""
    return functional.cross_entropy(head(projected), labels)


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
    losses: list[float] = []
    for batch in bar(batches(train, steps, settings.batch_size, seed), BACKPROP, steps, losses):
        losses.append(backprop_step(optimizer, partial(model.loss, batch)).item())
    return losses


def bar(items: Iterable[Item], name: str, count: int, losses: list[float]) -> Iterator[Item]:
    """A progress bar over `items` that shows the mean of the latest losses."""
    with tqdm(total=count, desc=name, mininterval=0.5) as progress:
        for item in items:
            yield item
            latest = losses[-50:]
            progress.set_postfix(loss=f"{sum(latest) / len(latest):.3f}", refresh=False)
            progress.update()


def sampled(count: int, steps: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices int64 [batch_size] of each step: every example once before any comes again; has its own generator."""
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
