"""ZO-SGD with weights in bfloat16, exact, in place and as MeZO has them, beside float32, at equal forwards."""

from functools import partial

from torch import Tensor

from bench.cases.learn_sparse import EPS, sparse
from bench.demo_model import Classifier, Examples
from bench.half import halve_
from bench.harness import Recorder
from bench.laboratory import Laboratory
from bench.learning import compare, equal_forwards, search
from bench.trial import Method, Step
from pyzo import optim
from pyzo.baselines import EagerMeZO

FORWARDS = 800  # MeZO's own passes cost three times as much as all else in a step
RATES = (1e-5, 3e-5, 1e-4)  # of those of the other cases, the ones that ever won, and one more
EXACT = "scratch"
HALF = {"eps": EPS, "distribution": "normal", "dtype": "bfloat16", "products": "float32"}


def run(recorder: Recorder) -> None:
    """Adds the rows of all.

    Exact bf16 weights take the rate that a search finds for float32, MeZO in bf16 the one for in place in bf16.
    """
    laboratory = Laboratory(recorder)
    forwards = 2 if recorder.dry_run else FORWARDS
    searched = [sparse(0.0, RATES), half("inplace", "nearest", RATES)]
    single, nearest = search(laboratory, searched, equal_forwards(searched, forwards)).values()
    methods = [
        sparse(0.0, (single,)),
        half(EXACT, "stochastic", (single,)),
        half("inplace", "nearest", (nearest,)),
        mezo((nearest,)),
    ]
    compare(laboratory, methods, equal_forwards(methods, forwards))


def half(store: str, rounding: str, rates: tuple[float, ...]) -> Method:
    """Two-sided ZO-SGD of a model that is bfloat16 whole."""
    settings = {**HALF, "store": store, "rounding": rounding}
    return Method(f"ZO-SGD, bf16, {store}, {rounding}", settings, 2, partial(_half, store, rounding), rates)


def mezo(rates: tuple[float, ...]) -> Method:
    """The same as people write it in torch: z in bfloat16, in place, +eps, -2 eps, +eps, to nearest."""
    return Method("MeZO in torch, bf16", {**HALF, "rounding": "nearest"}, 2, _mezo, rates)


def _half(store: str, rounding: str, model: Classifier, lr: float, seed: int) -> Step:
    return optim.ZOSGD(halved_(model), lr=lr, eps=EPS, store=store, rounding=rounding, seed=seed).step


def _mezo(model: Classifier, lr: float, seed: int) -> Step:
    return EagerMeZO(halved_(model).parameters(), lr, eps=EPS, seed=seed).step


def halved_(model: Classifier) -> Classifier:
    """The model in bfloat16, whole; only its logits are widened, so that the loss is float32."""
    halve_(model).register_forward_hook(_widen)
    return model


def _widen(model: Classifier, inputs: tuple[Examples], logits: Tensor) -> Tensor:
    return logits.float()
