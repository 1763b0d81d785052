"""ZO-SGD of the whole model and block by block (each block updated before the next), at equal forwards."""

from functools import partial

from bench.cases.learn_sparse import EPS, forwards_of, sparse
from bench.demo_model import Classifier
from bench.harness import Recorder
from bench.laboratory import Laboratory
from bench.learning import compare, equal_forwards
from bench.trial import Method, Step
from pyzo import estimators, optim

BLOCKS = 8  # of MiniLM: embeddings, 6 layers, head
BLOCK_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)  # a block's estimate has about 1 / BLOCKS of the variance


def run(recorder: Recorder) -> None:
    """Adds the rows of both."""
    methods = [sparse(0.0), block_wise("gauss-seidel")]
    compare(Laboratory(recorder), methods, equal_forwards(methods, forwards_of(recorder)))


def block_wise(order: str) -> Method:
    """One direction per block, each probed alone; two forwards per block."""
    settings = {"eps": EPS, "blocks": "layer", "order": order, "distribution": "normal"}
    return Method(f"ZO-SGD by blocks, {order}", settings, 2 * BLOCKS, partial(_by_blocks, order), BLOCK_RATES)


def _by_blocks(order: str, model: Classifier, lr: float, seed: int) -> Step:
    estimator = estimators.BlockWise(blocks="layer", order=order)
    return optim.ZOSGD(model, lr=lr, eps=EPS, estimator=estimator, seed=seed).step
