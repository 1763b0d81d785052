"""The demo's job: the same text and starting model for each of three ways to train, and what they score."""

import copy
import time
from dataclasses import dataclass

import torch

from bench.demo_check import Score
from bench.demo_data import Dataset
from bench.demo_model import Classifier, Examples, load_classifier, tokenize
from bench.demo_training import (
    BACKPROP,
    FULL,
    HEAD,
    Settings,
    embed_all,
    score,
    train_backprop,
    train_head_zo,
    train_zo,
)


@dataclass
class Run:
    """Training losses and the final held-out score of each method, for one seed."""

    seed: int
    losses: dict[str, list[float]]
    scores: dict[str, Score]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Problem:
    """The text, tokenised, and the model every run starts from; embeddings are those of the pretrained encoder."""

    name: str
    labels: tuple[str, ...]
    train: Examples
    held_out: Examples
    model: Classifier
    train_embedded: torch.Tensor
    held_out_embedded: torch.Tensor
    before: Score

    @property
    def majority(self) -> float:
        """Share of the most frequent class in the held-out text."""
        return self.held_out.labels.bincount().max().item() / len(self.held_out)


def prepare(data: Dataset) -> Problem:
    """Tokenises the text, loads the encoder, and fits the fixed projection to the training text without its labels."""
    model = load_classifier(len(data.labels))
    train, held_out = tokenize(data.train), tokenize(data.held_out)
    train_embedded = embed_all(model, train, "embed training text")
    model.fit_projection(train_embedded)
    held_out_embedded = embed_all(model, held_out, "embed held-out text")
    before = score(model, held_out_embedded, held_out.labels)
    return Problem(data.name, data.labels, train, held_out, model, train_embedded, held_out_embedded, before)


def train_all(problem: Problem, settings: Settings, seed: int) -> Run:
    """All three ways of training from the same start, and their held-out scores."""
    run = Run(seed, {}, {}, {})
    for name, train in ((FULL, train_zo), (BACKPROP, train_backprop)):
        model = copy.deepcopy(problem.model)
        started = time.perf_counter()
        run.losses[name] = train(model, problem.train, settings, seed)
        run.seconds[name] = time.perf_counter() - started
        embedded = embed_all(model, problem.held_out, "embed held-out text")
        run.scores[name] = score(model, embedded, problem.held_out.labels)
    model = copy.deepcopy(problem.model)
    projected = model.project(problem.train_embedded)
    started = time.perf_counter()
    run.losses[HEAD] = train_head_zo(model.head, projected, problem.train.labels, settings, seed)
    run.seconds[HEAD] = time.perf_counter() - started
    run.scores[HEAD] = score(model, problem.held_out_embedded, problem.held_out.labels)
    return run
