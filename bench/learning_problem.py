"""The problem of the learning cases: SST-2 in three parts and the model that every trial starts from."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.demo_check import Score
from bench.demo_data import docstring_dataset, sst2_dataset
from bench.demo_model import Classifier, Examples, load_classifier, tokenize
from bench.gradient_models import SST2

SCORED_AT_ONCE = 64


@dataclass(frozen=True)
class Sizes:
    """How many texts: `shots` of each class fit the head, `validation` choose rates, all others train."""

    texts: int = 6920
    shots: int = 16
    validation: int = 512


@dataclass(frozen=True)
class Problem:
    """What every trial shares. The parts have no text in common; nothing but a final score ever sees `held_out`.

    Attributes:
        model: the pretrained encoder with a head fitted to a few texts; float32, in eval mode (no dropout).
        facts: how it came about, for the rows.
    """

    model: Classifier
    train: Examples
    validation: Examples
    held_out: Examples
    facts: dict[str, object]


def prepare(*, dry_run: bool = False) -> Problem:
    """SST-2 and MiniLM; a dry run takes a few docstrings instead, and needs no data folder.

    Raises:
        FileNotFoundError: no SST-2 beside the tree.
    """
    sizes = Sizes(texts=32, shots=2, validation=8) if dry_run else Sizes()
    data = (
        docstring_dataset(train_per_class=8, held_out_per_class=1)
        if dry_run
        else sst2_dataset(SST2, train_limit=sizes.texts)
    )
    texts, held_out = tokenize(data.train), tokenize(data.held_out)
    classes = len(data.labels)
    first = torch.cat([(texts.labels == label).nonzero().flatten()[: sizes.shots] for label in range(classes)])
    others = torch.ones(len(texts), dtype=torch.bool)
    others[first] = False
    rest = texts[others.nonzero().flatten()]
    model = load_classifier(classes)
    fit_head(model, texts[first], classes)
    facts = {
        "model": "MiniLM",
        "data": data.name,
        "shots": sizes.shots,
        "train": len(rest) - sizes.validation,
        "validation": sizes.validation,
        "held_out": len(held_out),
        "length": texts.input_ids.shape[1],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": "float32",
    }
    return Problem(model, rest[sizes.validation :], rest[: sizes.validation], held_out, facts)


def fit_head(model: Classifier, examples: Examples, classes: int, *, decay: float = 1e-3) -> None:
    """Gives the model a head on all features, fitted to the examples while the encoder stands still.

    A head of zeros has no gradient to hand down; without the decay, few texts in many dimensions have no best head.

    Args:
        decay: weight of the squared length of the head beside the mean cross-entropy.
    """
    with torch.no_grad():
        embedded = model.embed(examples)
    model.components = torch.eye(embedded.shape[1])
    model.center.copy_(embedded.mean(0))
    model.head = nn.Linear(embedded.shape[1], classes)
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)
    projected = model.project(embedded)
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=200)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model.head(projected), examples.labels)
        loss = loss + decay * model.head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def score(model: Classifier, examples: Examples) -> Score:
    """Losses and hits of all examples."""
    parts = range(0, len(examples), SCORED_AT_ONCE)
    logits = torch.cat([model(examples[start : start + SCORED_AT_ONCE]) for start in parts])
    losses = functional.cross_entropy(logits, examples.labels, reduction="none")
    return Score(losses, logits.argmax(1) == examples.labels)
