"""ZO-SGD with seeded random masks of growing sparsity, at equal forwards."""

from functools import partial

from bench.demo_model import Classifier
from bench.harness import Recorder
from bench.laboratory import Laboratory
from bench.learning import compare, equal_forwards
from bench.trial import Method, Step
from pyzo import masks, optim

FORWARDS = 2000
SPARSITIES = (0.0, 0.2, 0.5, 0.8)
RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)  # without a mask
EPS = 1e-3


def run(recorder: Recorder) -> None:
    """Adds the rows of all sparsities."""
    methods = [sparse(sparsity) for sparsity in SPARSITIES]
    compare(Laboratory(recorder), methods, equal_forwards(methods, 2 if recorder.dry_run else FORWARDS))


def sparse(sparsity: float) -> Method:
    """Two-sided ZO-SGD of all weights, those outside a fresh mask of every step left alone; 0: no mask at all.

    A mask that keeps a share of the elements scales the expected update by it: the rates are divided by that share, so
    that every sparsity chooses among the same expected updates.
    """
    name = f"ZO-SGD, {sparsity:.0%} masked" if sparsity else "ZO-SGD"
    settings = {"eps": EPS, "sparsity": sparsity, "distribution": "normal"}
    return Method(name, settings, 2, partial(_prepare, sparsity), rates_for(1 - sparsity))


def rates_for(share: float) -> tuple[float, ...]:
    """The rates at which steps that move this share of the elements have the same expected updates as RATES."""
    return tuple(float(f"{lr / share:.3g}") for lr in RATES)


def _prepare(sparsity: float, model: Classifier, lr: float, seed: int) -> Step:
    mask = masks.Random(sparsity) if sparsity else None
    return optim.ZOSGD(model, lr=lr, eps=EPS, mask=mask, seed=seed).step
