"""ZO-SGD with seeded random masks of growing sparsity, at equal forwards."""

from functools import partial

from bench.demo_model import Classifier
from bench.harness import Recorder
from bench.laboratory import Laboratory
from bench.learning import compare, equal_forwards, search
from bench.trial import Method, Step
from pyzo import masks, optim

FORWARDS = 2000
SPARSITIES = (0.0, 0.2, 0.5, 0.8)
RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)  # without a mask
EPS = 1e-3


def run(recorder: Recorder) -> None:
    """Adds the rows of all sparsities."""
    laboratory = Laboratory(recorder)
    lr = rate(laboratory)
    methods = [sparse(sparsity, (scaled(lr, 1 - sparsity),)) for sparsity in SPARSITIES]
    compare(laboratory, methods, equal_forwards(methods, forwards_of(recorder)))


def forwards_of(recorder: Recorder) -> int:
    """Of a training."""
    return 2 if recorder.dry_run else FORWARDS


def rate(laboratory: Laboratory) -> float:
    """The rate of ZO-SGD without a mask that a search over whole trainings chooses."""
    whole = sparse(0.0)
    return search(laboratory, [whole], equal_forwards([whole], forwards_of(laboratory.recorder)))[whole.name]


def scaled(lr: float, share: float) -> float:
    """The rate at which steps that move this share of the elements have the same expected updates."""
    return float(f"{lr / share:.3g}")


def sparse(sparsity: float, rates: tuple[float, ...] = RATES) -> Method:
    """Two-sided ZO-SGD of all weights, those outside a fresh mask of every step left alone; 0: no mask at all."""
    name = f"ZO-SGD, {sparsity:.0%} masked" if sparsity else "ZO-SGD"
    settings = {"eps": EPS, "sparsity": sparsity, "distribution": "normal"}
    return Method(name, settings, 2, partial(_prepare, sparsity), rates)


def _prepare(sparsity: float, model: Classifier, lr: float, seed: int) -> Step:
    mask = masks.Random(sparsity) if sparsity else None
    return optim.ZOSGD(model, lr=lr, eps=EPS, mask=mask, seed=seed).step
