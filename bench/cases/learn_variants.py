"""Other ways to choose what a step of ZO-SGD moves, at equal forwards: blocks at the same weights, random layers."""

from functools import partial

from bench.cases.learn_blocks import block_wise
from bench.cases.learn_sparse import EPS, forwards_of, rate, scaled, sparse
from bench.demo_model import Classifier
from bench.harness import Recorder
from bench.laboratory import Laboratory
from bench.learning import compare, equal_forwards
from bench.trial import Method, Step
from pyzo import estimators, optim

FRACTION = 0.5  # of the layers that a step of LeZO moves


def run(recorder: Recorder) -> None:
    """Adds the rows of all, ZO-SGD of the whole model among them."""
    laboratory = Laboratory(recorder)
    lr = rate(laboratory)
    methods = [sparse(0.0, (lr,)), block_wise("jacobi"), random_layers(FRACTION, (scaled(lr, FRACTION),))]
    compare(laboratory, methods, equal_forwards(methods, forwards_of(recorder)))


def random_layers(fraction: float, rates: tuple[float, ...]) -> Method:
    """A random share of the layers in every step (LeZO)."""
    settings = {"eps": EPS, "fraction": fraction, "distribution": "normal"}
    name = f"ZO-SGD, {fraction:.0%} of the layers"
    return Method(name, settings, 2, partial(_some_layers, fraction), rates)


def _some_layers(fraction: float, model: Classifier, lr: float, seed: int) -> Step:
    estimator = estimators.RandomLayers(fraction=fraction)
    return optim.ZOSGD(model, lr=lr, eps=EPS, estimator=estimator, seed=seed).step
