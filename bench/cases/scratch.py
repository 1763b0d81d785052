"""Whole ZO-SGD steps of an exact store against in place, and the memory that it takes, in float32 and bfloat16."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.cases.step import Classifier
from bench.half import dtype_name, halve_
from bench.harness import Recorder, against, speedup, summary
from bench.pass_kinds import DISTRIBUTIONS
from bench.steps import EPS, LR
from pyzo import optim
from pyzo.timing import Provider, interleave

EXACT, INPLACE, FORWARDS = "scratch", "inplace", "two forwards"
DTYPES = (torch.float32, torch.bfloat16)
MOST = 1.1  # times the in-place step (issue 6)


@dataclass(frozen=True)
class Subject:
    """A model and its loss, and how often a step of it is timed."""

    name: str
    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    rounds: int


def run(recorder: Recorder) -> None:
    """Adds the rows of all models and dtypes."""
    batch, length = (2, 8) if recorder.dry_run else (16, 32)
    torch.manual_seed(0)
    for subject in (encoder(batch, length, recorder.dry_run), decoder(batch, length, recorder.dry_run)):
        for dtype in DTYPES:
            model = subject.model.eval() if dtype == torch.float32 else halve_(subject.model)
            config = {"model": subject.name, "dtype": dtype_name(dtype), "batch": batch, "length": length}
            config |= {"parameters": sum(p.numel() for p in model.parameters()), "products": "float32"}
            compare(recorder, subject, config)


def encoder(batch: int, length: int, dry_run: bool) -> Subject:
    """The pretrained MiniLM with a head."""
    tokens, labels = torch.randint(1000, 30000, (batch, length)), torch.randint(0, 4, (batch,))
    return Subject(
        "MiniLM", Classifier(), lambda m: functional.cross_entropy(m(tokens).float(), labels), 1 if dry_run else 9
    )


def decoder(batch: int, length: int, dry_run: bool) -> Subject:
    """A decoder of the shape of OPT-125M with random weights, its head tied to its embedding."""
    from transformers import OPTConfig, OPTForCausalLM

    hidden, layers, vocabulary = (32, 2, 64) if dry_run else (768, 12, 50272)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            word_embed_proj_dim=hidden,
            ffn_dim=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 16 if dry_run else 12,
            attn_implementation="sdpa",
        )
    )
    tokens = torch.randint(4, vocabulary, (batch, length))

    def loss(model: nn.Module) -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return Subject("OPT-125M-shaped", model, loss, 1 if dry_run else 3)


def compare(recorder: Recorder, subject: Subject, config: dict[str, object]) -> None:
    """Adds the rows of one model: steps by both stores, interleaved, and what the exact one takes beside weights."""
    kinds = [(store, distribution) for distribution in DISTRIBUTIONS for store in (INPLACE, EXACT)]
    optimizers, calls = {}, {}
    for kind in kinds:
        optimizers[kind], calls[kind] = stepper(subject, *kind)
    providers = [Provider(FORWARDS, lambda: _two_forwards(subject))]
    providers += [Provider(" ".join(kind), call) for kind, call in calls.items()]
    samples = interleave(providers, repeats=subject.rounds, warmup=1)
    forwards = summary(samples[FORWARDS])
    recorder.add("step", FORWARDS, config, **forwards)
    for store, distribution in kinds:
        own = samples[f"{store} {distribution}"]
        numbers: dict[str, object] = summary(own)
        numbers["outside_forwards_s"] = numbers["median_s"] - forwards["median_s"]
        if store == EXACT:
            ratio = speedup(samples[f"{INPLACE} {distribution}"], own)
            numbers |= {"ratio": {"to": "in place", **ratio}, **against(1 / MOST, ratio["of_medians"])}
        recorder.add("step", store, {**config, "distribution": distribution}, **numbers)
    extra, chain = optimizers[EXACT, "normal"].store.extra_bytes, chain_bytes(subject.model)
    numbers = {"trained_bytes": sum(p.nbytes for p in subject.model.parameters()), "chain_bytes": chain}
    target = against(chain, extra, at_least=False)
    recorder.add("extra memory", EXACT, config, value=extra, unit="bytes", **numbers, **target)


def stepper(subject: Subject, store: str, distribution: str) -> tuple[optim.ZOSGD, Callable[[], Tensor]]:
    """The optimizer of a copy of the model, and a step of it."""
    model = copy.deepcopy(subject.model)
    optimizer = optim.ZOSGD(model, lr=LR, eps=EPS, distribution=distribution, store=store)
    return optimizer, lambda: optimizer.step(lambda: subject.loss(model))


@torch.no_grad()
def _two_forwards(subject: Subject) -> None:
    subject.loss(subject.model)
    subject.loss(subject.model)


def chain_bytes(module: nn.Module) -> int:
    """Bytes of the trained parameters that modules nested in one another hold directly, of the largest such chain."""
    own = sum(p.nbytes for p in module.parameters(recurse=False) if p.requires_grad)
    return own + max((chain_bytes(child) for child in module.children()), default=0)
