"""Compares a whole ZO-SGD step of pyzo with MeZO's own on one model: time per step, split into forwards and passes."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

import pyzo
from bench.harness import Recorder, against, speedup, summary
from bench.pass_kinds import DISTRIBUTIONS, PassKinds
from pyzo.baselines import EagerMeZO
from pyzo.timing import Provider, interleave

LR, EPS = 1e-7, 1e-3
Loss = Callable[[nn.Module], torch.Tensor]


def compare(
    recorder: Recorder,
    model: nn.Module,
    loss: Loss,
    config: Mapping[str, object],
    *,
    repeats: int,
    targets: Mapping[str, float],
) -> None:
    """Adds one row per way to step; `targets` names the least speedup of "pyzo normal" and the like."""
    names = [f"pyzo {distribution}" for distribution in DISTRIBUTIONS]
    calls: dict[str, Callable[[], object]] = {"two forwards": lambda: _two_forwards(model, loss)}
    for name, distribution in zip(names, DISTRIBUTIONS, strict=True):
        calls[name] = _pyzo_step(copy.deepcopy(model), loss, distribution)
        calls[f"{name} passes"] = _passes(copy.deepcopy(model), distribution)
    for name, foreach in (("eager", False), ("eager foreach", True)):
        calls[name] = _eager_step(copy.deepcopy(model), loss, foreach=foreach)
    samples = interleave([Provider(*call) for call in calls.items()], repeats=repeats, device=recorder.device)
    forwards = summary(samples["two forwards"])["median_s"]
    for name in calls:
        numbers: dict[str, object] = summary(samples[name])
        if name in (*names, "eager", "eager foreach"):
            numbers["forwards_share"] = forwards / numbers["median_s"]
            numbers["outside_forwards_s"] = numbers["median_s"] - forwards
        if name in names:
            numbers["ratio"] = {"to": "eager", **speedup(samples["eager"], samples[name])}
            if name in targets:
                numbers |= against(targets[name], numbers["ratio"]["of_medians"])
        recorder.add("step", name, config, **numbers)


def _two_forwards(model: nn.Module, loss: Loss) -> None:
    with torch.no_grad():
        loss(model)
        loss(model)


def _pyzo_step(model: nn.Module, loss: Loss, distribution: str) -> Callable[[], object]:
    optimizer = pyzo.optim.ZOSGD(model.parameters(), lr=LR, eps=EPS, distribution=distribution, store="inplace")
    return lambda: optimizer.step(lambda: loss(model))


def _passes(model: nn.Module, distribution: str) -> Callable[[], object]:
    """The three passes of a step and nothing else."""
    kinds = PassKinds([parameter.data for parameter in model.parameters()], distribution=distribution)
    stochastic = kinds.tensors[0].element_size() == 2

    def passes() -> None:
        kinds.perturb()
        kinds.undo_perturb()
        kinds.restore_update(stochastic=stochastic)

    return passes


def _eager_step(model: nn.Module, loss: Loss, *, foreach: bool) -> Callable[[], object]:
    mezo = EagerMeZO(model.parameters(), LR, eps=EPS, foreach=foreach)
    return lambda: mezo.step(lambda: loss(model))
