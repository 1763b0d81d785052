"""Hybrid ZO-FO with none, a third and two thirds of the layers by ZO, beside backprop of all or of the other layers."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

import pyzo
from bench.cases.learn_sparse import EPS, rate
from bench.demo_model import Classifier
from bench.harness import Recorder
from bench.laboratory import Laboratory
from bench.learning import compare, search
from bench.trial import Method, Step
from pyzo.baselines import backprop_step

STEPS = 360
ZO_LAYERS = (2, 4)  # of 6
FO_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


def run(recorder: Recorder) -> None:
    """Adds the rows of all splits, with the same texts in every step.

    AdamW's rate is that of backprop of all layers, everywhere, and the ZO part's that of ZO-SGD of all layers.
    """
    laboratory = Laboratory(recorder)
    steps = 1 if recorder.dry_run else STEPS
    full = backprop(0, FO_RATES)
    fo_lr = search(laboratory, [full], {full.name: steps})[full.name]
    zo_lr = rate(laboratory)
    methods = [backprop(0, (fo_lr,)), hybrid(0, fo_lr, 0.0)]
    for layers in ZO_LAYERS:
        methods += [hybrid(layers, fo_lr, zo_lr), backprop(layers, (fo_lr,))]
    compare(laboratory, methods, {method.name: steps for method in methods})


def backprop(frozen: int, rates: tuple[float, ...]) -> Method:
    """AdamW on all that lies behind the first `frozen` layers: 0, of all parameters."""
    name = f"backprop, first {frozen} of 6 layers frozen" if frozen else "backprop"
    return Method(name, {"fo": "AdamW", "frozen_layers": frozen}, 1, partial(_backprop, frozen), rates)


def hybrid(zo_layers: int, fo_lr: float, zo_lr: float) -> Method:
    """ZO-SGD on the embeddings and the first layers, AdamW behind them."""
    name = f"hybrid, {zo_layers} of 6 layers by ZO"
    settings = {"eps": EPS, "zo_layers": zo_layers, "fo": "AdamW", "fo_lr": fo_lr, "distribution": "normal"}
    return Method(name, settings, 3 if zo_layers else 1, partial(_hybrid, zo_layers, fo_lr), (zo_lr,))


def _backprop(frozen: int, model: Classifier, lr: float, seed: int) -> Step:
    if frozen:
        for module in (model.encoder.embeddings, *model.encoder.encoder.layer[:frozen]):
            module.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return partial(backprop_step, adamw(trained, lr))


def _hybrid(zo_layers: int, fo_lr: float, model: Classifier, lr: float, seed: int) -> Step:
    zo = {"lr": lr, "eps": EPS, "seed": seed}
    return pyzo.hybrid(model, zo_layers=zo_layers, zo=zo, fo=partial(adamw, lr=fo_lr)).step


def adamw(params: Iterable[Any], lr: float) -> torch.optim.AdamW:
    """As the demo's: no weight decay."""
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
