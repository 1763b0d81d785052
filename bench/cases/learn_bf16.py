"""ZO-SGD with weights in bfloat16, exact, as MeZO has them and in place, beside float32, at equal forwards."""

from functools import partial

from torch import Tensor

from bench.cases.learn_sparse import EPS, forwards_of, rate, sparse
from bench.demo_model import Classifier, Examples
from bench.half import halve_
from bench.harness import Recorder
from bench.laboratory import Laboratory
from bench.learning import compare, equal_forwards
from bench.trial import Method, Step
from pyzo import optim
from pyzo.baselines import EagerMeZO

EXACT, INPLACE = ("scratch", "stochastic"), ("inplace", "nearest")
SETTINGS = {"eps": EPS, "distribution": "normal", "dtype": "bfloat16", "products": "float32"}


def run(recorder: Recorder) -> None:
    """Adds the rows of all, at the rate that a search finds for float32; in place comes last, when the others ended."""
    laboratory = Laboratory(recorder)
    lr = rate(laboratory)
    for methods in ([sparse(0.0, (lr,)), half(*EXACT, lr), mezo(lr)], [half(*INPLACE, lr)]):
        compare(laboratory, methods, equal_forwards(methods, forwards_of(recorder)))


def half(store: str, rounding: str, lr: float) -> Method:
    """Two-sided ZO-SGD of a model that is bfloat16, whole."""
    settings = {**SETTINGS, "store": store, "rounding": rounding}
    return Method(f"ZO-SGD, bf16, {store}, {rounding}", settings, 2, partial(_half, store, rounding), (lr,))


def mezo(lr: float) -> Method:
    """The same as people write it in torch: z in bfloat16, in place, +eps, -2 eps, +eps, all rounded to nearest."""
    return Method("MeZO in torch, bf16", {**SETTINGS, "rounding": "nearest"}, 2, _mezo, (lr,))


def _half(store: str, rounding: str, model: Classifier, lr: float, seed: int) -> Step:
    return optim.ZOSGD(halved_(model), lr=lr, eps=EPS, store=store, rounding=rounding, seed=seed).step


def _mezo(model: Classifier, lr: float, seed: int) -> Step:
    return EagerMeZO(halved_(model).parameters(), lr, eps=EPS, seed=seed).step


def halved_(model: Classifier) -> Classifier:
    """The model in bfloat16; its logits alone are widened, so that losses are computed in float32."""
    halve_(model).register_forward_hook(_widen)
    return model


def _widen(model: Classifier, inputs: tuple[Examples], logits: Tensor) -> Tensor:
    return logits.float()
