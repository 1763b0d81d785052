"""Models whose gradients are compared: a pretrained encoder with a head, and a small Llama trained on the same text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.demo_data import Dataset, docstring_dataset, sst2_dataset
from bench.demo_model import COMPONENTS, Examples, load_classifier, tokenize
from bench.machine import ROOT

SST2 = ROOT.parent / "shared" / "data" / "sst2"
CHARACTERS = 128  # ASCII, all that the texts have


@dataclass(frozen=True)
class Subject:
    """A model in a state in which it might be fine-tuned.

    Attributes:
        model: in float32, all parameters trainable.
        function: name of its activation.
        attribute: under which its MLPs hold the activation, a module.
        losses: the loss of each batch.
        facts: how it came about.
    """

    name: str
    model: nn.Module
    function: str
    attribute: str
    losses: tuple[Callable[[], Tensor], ...]
    facts: dict[str, object]

    def swap(self, activation: nn.Module) -> None:
        """Gives every MLP this activation."""
        for module in self.mlps():
            setattr(module, self.attribute, activation)

    def mlps(self) -> list[nn.Module]:
        """Modules that hold an activation."""
        return [module for module in self.model.modules() if hasattr(module, self.attribute)]


def texts(dry_run: bool) -> Dataset:
    """SST-2 where this project's data folder lies beside the tree, else (and in a dry run) the demo's docstrings."""
    if dry_run:
        return docstring_dataset(train_per_class=8, held_out_per_class=1)
    return sst2_dataset(SST2) if SST2.is_dir() else docstring_dataset()


def minilm(data: Dataset, *, batches: int, batch: int = 16, probe: int = 256) -> Subject:
    """The pretrained MiniLM with the demo's head, which is fitted to `probe` texts while the encoder stands still.

    The batches are of other texts.
    """
    if len(data.train) < probe + batches * batch or probe < COMPONENTS:
        raise ValueError(f"probe: expected {COMPONENTS} to {len(data.train) - batches * batch} texts, got {probe}")
    train = tokenize(data.train[: probe + batches * batch])
    first, rest = train[:probe], train[probe:]
    model = load_classifier(len(data.labels))
    with torch.no_grad():
        embedded = model.embed(first)
        model.fit_projection(embedded)
        projected = model.project(embedded)
    fit(model.head, projected, first)
    return Subject(
        "MiniLM",
        model,
        "gelu",
        "intermediate_act_fn",
        tuple(partial(model.loss, rest[k * batch : (k + 1) * batch]) for k in range(batches)),
        {"batch": batch, "length": rest.input_ids.shape[1]},
    )


def fit(head: nn.Linear, projected: Tensor, examples: Examples) -> None:
    """Fits a head to projected features: without that, a head of zeros has no gradient to hand down."""
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(head(projected), examples.labels)
        loss.backward()
        return loss

    optimizer.step(closure)


def llama(
    data: Dataset, seed: int, *, batches: int, steps: int, batch: int = 16, length: int = 64, layers: int = 4
) -> Subject:
    """A LlamaForCausalLM of 0.4 M parameters with random weights, trained on the characters of the texts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=CHARACTERS,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )
    tokens = windows(data, batch, length, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = causal_loss(model, next(tokens))
        loss.backward()
        optimizer.step()
    return Subject(
        "Llama-shaped",
        model,
        "silu",
        "act_fn",
        tuple(partial(causal_loss, model, next(tokens)) for _ in range(batches)),
        {"batch": batch, "length": length, "hidden": 96, "layers": layers, "steps": steps},
    )


def causal_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of every next character."""
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def windows(data: Dataset, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Random pieces of the training texts in a row, int64 [batch, length] of characters."""
    text = "\n".join(text for text, _ in data.train).encode("ascii", "replace")
    characters = torch.tensor(list(text))
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(characters) - length, (batch, 1), generator=generator)
        yield characters[starts + torch.arange(length)]
