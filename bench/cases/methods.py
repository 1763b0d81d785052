"""A whole step of every method on MiniLM, against the same method in eager torch, and first-order steps beside them."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases.step import Classifier
from bench.harness import Recorder, speedup, summary
from pyzo import baselines, estimators, optim
from pyzo.timing import Provider, interleave

LR, EPS = 1e-7, 1e-3
PROBES = 8  # of FZOO
Step = Callable[[], object]
Loss = Callable[[nn.Module], torch.Tensor]


def run(recorder: Recorder) -> None:
    """Adds the rows of all methods."""
    batch, length = (2, 8) if recorder.dry_run else (16, 32)
    torch.manual_seed(0)
    model = Classifier().to(recorder.device).eval()
    tokens = torch.randint(1000, 30000, (batch, length), device=recorder.device)
    labels = torch.randint(0, 4, (batch,), device=recorder.device)
    config: dict[str, object] = {"model": "MiniLM", "dtype": "float32", "batch": batch, "length": length}
    config["parameters"] = sum(parameter.numel() for parameter in model.parameters())

    def loss(module: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(module(tokens), labels)

    for name, (ours, theirs) in methods(model, tokens, labels, loss).items():
        fused, eager = ours(copy.deepcopy(model)), theirs(copy.deepcopy(model))
        samples = interleave(
            [
                Provider("pyzo", fused),
                Provider("eager", eager),
                Provider("one forward", lambda: _forward(model, loss)),
            ],
            repeats=1 if recorder.dry_run else 11,
            warmup=1,
            device=recorder.device,
        )
        forward = summary(samples["one forward"])["median_s"]
        for provider in ("eager", "pyzo"):
            numbers: dict[str, object] = summary(samples[provider])
            numbers["forwards_worth"] = numbers["median_s"] / forward
            if provider == "pyzo":
                numbers["ratio"] = {"to": "eager", **speedup(samples["eager"], samples["pyzo"])}
            recorder.add(f"step {name}", provider, config, **numbers)
    for name, kind in {"FO-SGD": torch.optim.SGD, "FO-Adam": torch.optim.Adam}.items():
        twin = copy.deepcopy(model)
        samples = interleave(
            [
                Provider(name, _backprop(kind(twin.parameters(), lr=LR), twin, loss)),
                Provider("one forward", lambda: _forward(model, loss)),
            ],
            repeats=1 if recorder.dry_run else 11,
            warmup=1,
            device=recorder.device,
        )
        numbers = summary(samples[name])
        numbers["forwards_worth"] = numbers["median_s"] / summary(samples["one forward"])["median_s"]
        recorder.add(f"step {name}", "torch", config, **numbers)


def methods(
    model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor, loss: Loss
) -> dict[str, tuple[Callable[[nn.Module], Step], Callable[[nn.Module], Step]]]:
    """Each method by name: what makes a step of pyzo's, and of the eager one, from a model."""

    def pair(
        kind: type[optim.ZOSGD], eager: type[baselines.EagerZO], own: dict[str, object], theirs: dict[str, object]
    ) -> tuple[Callable[[nn.Module], Step], Callable[[nn.Module], Step]]:
        def ours(module: nn.Module) -> Step:
            optimizer = kind(module, lr=LR, eps=EPS, **own)
            return lambda: optimizer.step(lambda: loss(module))

        def other(module: nn.Module) -> Step:
            optimizer = eager(module.parameters(), lr=LR, eps=EPS, **theirs)
            return lambda: optimizer.step(lambda: loss(module))

        return ours, other

    fzoo = {"distribution": "rademacher"}
    return {
        "ZO-SGD": pair(optim.ZOSGD, baselines.EagerZO, {}, {}),
        "ZO-SGD one-sided": pair(
            optim.ZOSGD, baselines.EagerZO, {"estimator": estimators.OneSided()}, {"one_sided": True}
        ),
        "ZO-SGD-Sign": pair(optim.ZOSignSGD, baselines.EagerZO, {}, {"rule": "sign"}),
        "ZO-SGD-MMT": pair(optim.ZOSGD, baselines.EagerZO, {"momentum": 0.9}, {"rule": "momentum"}),
        "ZO-SGD-Cons": pair(optim.ZOConservativeSGD, baselines.EagerConservative, {}, {}),
        "ZO-Adam": pair(optim.ZOAdam, baselines.EagerZO, {}, {"rule": "adam"}),
        "FZOO": pair(
            optim.ZOSGD,
            baselines.EagerZO,
            {**fzoo, "estimator": estimators.OneSided(PROBES, normalize="std")},
            {**fzoo, "q": PROBES, "one_sided": True, "normalize": True},
        ),
        "Forward-Grad": (
            lambda module: _forward_grad(module, loss),
            lambda module: _eager_forward_grad(module, tokens, labels),
        ),
    }


def _forward(model: nn.Module, loss: Loss) -> None:
    with torch.no_grad():
        loss(model)


def _forward_grad(model: nn.Module, loss: Loss) -> Step:
    optimizer = optim.ForwardGradSGD(model, lr=LR)
    return lambda: optimizer.step(lambda: loss(model))


def _eager_forward_grad(model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> Step:
    optimizer = baselines.EagerForwardGrad(model, LR)

    def step() -> None:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode rule
            optimizer.step((tokens,), lambda logits: nn.functional.cross_entropy(logits, labels))

    return step


def _backprop(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Loss) -> Step:
    return lambda: baselines.backprop_step(optimizer, lambda: loss(model))
