"""Every method against its specification, `pyzo.reference.Method`, bit for bit over 100 steps on a transformer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from models import DECAYED, METHODS, Transformer, batch, cross_entropy, run_state, transformer
from packed import pack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from pyzo.estimators import TwoSided
from pyzo.field import tensor_key
from pyzo.masks import Bits, Random
from pyzo.optim import ZOSGD
from pyzo.optim.base import ZOOptimizer
from pyzo.reference import Method, Row, methods, passes, write_row

pytestmark = pytest.mark.usefixtures("one_thread")

SEED = 2**64 - 3
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """A method of `models.METHODS` with further arguments, and the same in the words of the specification."""

    method: str
    dtype: torch.dtype
    spec: dict[str, Any] = field(default_factory=dict)  # arguments of reference.Method
    row: dict[str, Any] = field(default_factory=dict)  # fields of reference.Row
    arguments: dict[str, Any] = field(default_factory=dict)  # of the optimizer


def decay(value: float, **arguments: Any) -> dict[str, Any]:
    return {"row": {"weight_decay": value}, "arguments": {"weight_decay": value, **arguments}}


def some_elements() -> dict[str, torch.Tensor]:
    """A mask of about half of the elements of each parameter of `transformer`."""
    generator = torch.Generator().manual_seed(8)
    return {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in transformer().named_parameters()}


MOMENTUM = {"rule": "momentum"}
ADAM = {"rule": "adam"}
BF16_STATE = {"state_dtype": BF16}
ONE_SIDED = {"estimator": "one-sided", "q": 3}
SNAPSHOT, NEAREST, SIGNS = {"store": "snapshot"}, {"rounding": "nearest"}, {"distribution": "rademacher"}
FZOO = {"estimator": "one-sided", "q": 3, "scaling": "std"} | SIGNS
ADAM_ROW = {"beta1": 0.9, "beta2": 0.999, "rule_eps": 1e-8}
ADAMW_ROW = {"beta1": 0.8, "beta2": 0.99, "rule_eps": 1e-8, "option": True}
SPLIT, SPLIT_STORE = {"split": True} | SNAPSHOT, {"master": "split"} | SNAPSHOT
BITS = {"bits": {name: pack(mask) for name, mask in some_elements().items()}}
SPLIT_BITS = {"master": "split", "mask": Bits(some_elements())} | SNAPSHOT
HEAVY_BALL_ROW, NESTEROV_ROW = {"beta1": 0.9, "dampening": 0.1}, {"beta1": 0.8, "option": True}

CASES = {
    "sgd fp32": Case("sgd", FP32, **decay(0.1)),
    "sgd bf16": Case("sgd", BF16, **decay(0.1)),
    "sgd q=2 fp16 nearest snapshot": Case(
        "sgd q=2", FP16, {"q": 2, "stochastic": False} | SNAPSHOT | SIGNS, arguments=SNAPSHOT | NEAREST | SIGNS
    ),
    "momentum fp32": Case("momentum", FP32, MOMENTUM, HEAVY_BALL_ROW | decay(0.1)["row"], decay(0.1)["arguments"]),
    "momentum bf16": Case("momentum", BF16, MOMENTUM, HEAVY_BALL_ROW),
    "nesterov bf16, bf16 state": Case("nesterov", BF16, MOMENTUM | BF16_STATE, NESTEROV_ROW, BF16_STATE),
    "sign bf16": Case("sign", BF16, {"rule": "sign"}, **decay(0.1)),
    "sign scalar fp16": Case("sign scalar", FP16, {"scaling": "sign"}),
    "adam fp32": Case("adam", FP32, ADAM, ADAM_ROW | decay(0.1)["row"], decay(0.1)["arguments"]),
    "adam bf16, bf16 state": Case("adam", BF16, ADAM | BF16_STATE, ADAM_ROW, BF16_STATE),
    "adamw fp16": Case("adamw", FP16, ADAM, ADAMW_ROW | decay(0.5)["row"], decay(0.5)["arguments"]),
    "conservative bf16": Case("conservative", BF16, {"conservative": True}),
    "conservative fp16 snapshot": Case("conservative", FP16, {"conservative": True} | SNAPSHOT, arguments=SNAPSHOT),
    "conservative one-sided fp32": Case(
        "conservative one-sided", FP32, {"conservative": True, "estimator": "one-sided"}
    ),
    "one-sided fp32": Case("one-sided", FP32, ONE_SIDED),
    "fzoo bf16": Case("fzoo", BF16, FZOO),
    "sparse adam bf16": Case("sparse adam", BF16, ADAM, ADAM_ROW | {"keep": 32768, "refresh": 2}),
    "forward fp32": Case("forward", FP32, {"estimator": "forward"}),
    "forward q=2 bf16": Case("forward", BF16, {"estimator": "forward", "q": 2}, arguments={"q": 2}),
    # Masters in two parts.
    "sgd split": Case("sgd", BF16, SPLIT, **decay(0.1, **SPLIT_STORE)),
    "momentum split": Case("momentum", BF16, MOMENTUM | SPLIT, HEAVY_BALL_ROW, SPLIT_STORE),
    "sign split": Case("sign", BF16, {"rule": "sign"} | SPLIT, **decay(0.1, **SPLIT_STORE)),
    "adam split, bf16 state": Case("adam", BF16, ADAM | BF16_STATE | SPLIT, ADAM_ROW, BF16_STATE | SPLIT_STORE),
    "conservative split": Case("conservative", BF16, {"conservative": True} | SPLIT, arguments=SPLIT_STORE),
    "sparse adam split": Case("sparse adam", BF16, ADAM | SPLIT, ADAM_ROW | {"keep": 32768, "refresh": 2}, SPLIT_STORE),
    "adam split in bits": Case("adam", BF16, ADAM | SPLIT | BITS, ADAM_ROW, SPLIT_BITS),
    "conservative split in bits": Case(
        "conservative", BF16, {"conservative": True} | SPLIT | BITS, arguments=SPLIT_BITS
    ),
    "forward split": Case("forward", BF16, {"estimator": "forward"} | SPLIT, arguments=SPLIT_STORE),
}


@pytest.fixture(autouse=True, scope="module")
def remembered_noise() -> Iterator[None]:
    """The noise of the specification is a pure function; tests of one seed need the same values again and again."""
    known: dict[Any, torch.Tensor] = {}

    def remember(function: Any) -> Any:
        def call(*arguments: Any) -> torch.Tensor:
            *scalars, index = arguments
            key = (function, *scalars, int(index[0]), len(index))  # the indices of a whole tensor
            if key not in known:
                known[key] = function(*arguments)
            return known[key]

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module in (passes, methods):
            patch.setattr(module, "draw", remember(module.draw))
        patch.setattr(passes, "random_bits", remember(passes.random_bits))
        yield


class PassThrough(TorchDispatchMode):
    """Does nothing, but under any such mode torch takes other forward-mode formulas, which round otherwise.

    pyzo has one on, which looks for operators that would drop a tangent.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **kwargs or {})


def dual_loss(model: Transformer, x: torch.Tensor, y: torch.Tensor) -> Any:
    """The closure of the specification's estimator "forward": the loss and its derivative along tangents by name."""

    def closure(tangents: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(p.detach(), tangents[n]) for n, p in model.named_parameters()}
            with PassThrough():
                loss = torch.nn.functional.cross_entropy(torch.func.functional_call(model, duals, (x,)).float(), y)
            return forward_ad.unpack_dual(loss)

    return closure


def specification(case: Case, opt: ZOOptimizer, twin: Transformer) -> Method:
    """The run of `opt` on another model, with its groups' numbers in two rows: decayed weights and the others."""
    group = opt.param_groups[0]
    row = {"lr": group["lr"], "eps": 1.0 if case.method == "forward" else group["eps"], **case.row}
    parameters = {name: p.data for name, p in twin.named_parameters()}
    return Method(
        parameters,
        {name: tensor_key(name) for name in parameters},
        [Row(**row), Row(**row | {"weight_decay": 0.0})],
        row_of={name: int(name not in DECAYED) for name in parameters},
        seed=SEED,
        **case.spec,
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_specification_bit_for_bit(case):
    x, y = batch(case.dtype)
    model, twin = transformer(case.dtype), transformer(case.dtype)
    opt = METHODS[case.method](model, seed=SEED, **{"store": "inplace", **case.arguments})
    method = specification(case, opt, twin)
    twin_loss = dual_loss(twin, x, y) if case.method == "forward" else lambda: cross_entropy(twin, x, y)
    with torch.no_grad():
        for step in range(1, 101):
            opt.step(lambda: cross_entropy(model, x, y))
            losses = method.step(twin_loss)
            if step in (1, 2, 10, 100):
                assert torch.equal(opt.last.losses, losses), step
                for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
                    assert_same_bits(p, q, f"{name} after step {step}")
                    for state, by_name in {**method.states, **({"low": method.low} if method.low else {})}.items():
                        assert_same_bits(opt.state[p][state], by_name[name], f"{state} of {name} after step {step}")
    start = transformer(case.dtype)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True))
    assert run_state(opt) == {"seed": SEED, "draw": 100, "applied": 100, "skipped": 0}


def test_groups_and_changes_between_steps_follow_the_specification():
    """Groups with their own lr, eps, decay, mask and betas; lr, eps and decay changed by hand during the run."""
    model, twin = transformer(), transformer()
    named = list(model.named_parameters())
    numbers = [
        {"lr": 1e-3, "eps": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "mask": None},
        {"lr": 3e-3, "eps": 1e-3, "weight_decay": 0.0, "betas": (0.5, 0.9), "mask": Random(0.25, refresh=3)},
        {"lr": 0.0, "eps": 2e-2, "weight_decay": 0.1, "betas": (0.0, 0.9), "mask": None},
    ]
    opt = METHODS["adam"](
        [{"params": named[g::3], **numbers[g]} for g in range(3)],
        store="inplace",
        seed=SEED,
        adam_eps=1e-6,
        decoupled=True,
        estimator=TwoSided(2),
    )

    def rows() -> list[Row]:
        return [
            Row(
                lr=group["lr"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                rule_eps=1e-6,
                option=True,
                keep=group["mask"].keep if group["mask"] else 65536,
                refresh=group["mask"].refresh if group["mask"] else 1,
            )
            for group in opt.param_groups
        ]

    parameters = {name: p.data for name, p in twin.named_parameters()}
    keys = {name: tensor_key(name) for name in parameters}
    row_of = {name: i % 3 for i, name in enumerate(parameters)}
    method = Method(parameters, keys, rows(), row_of=row_of, rule="adam", seed=SEED, q=2)
    x, y = batch()
    for step in range(12):
        if step == 4:
            opt.param_groups[0]["lr"], opt.param_groups[1]["eps"] = 5e-3, 5e-2
        if step == 8:
            opt.param_groups[2] |= {"lr": 1e-3, "mask": Random(0.5), "betas": (0.3, 0.8)}
            opt.param_groups[1]["weight_decay"], opt.param_groups[1]["mask"] = 0.3, None
        for r, row in enumerate(rows()):
            write_row(method.control, r, row)
        opt.step(lambda: cross_entropy(model, x, y))
        with torch.no_grad():
            method.step(lambda: cross_entropy(twin, x, y))
        for (name, p), q in zip(named, twin.parameters(), strict=True):
            assert_same_bits(p, q, f"{name} in step {step}")


def test_groups_with_momenta_of_their_own_follow_the_specification():
    """Heavy ball, Nesterov and none at all under one rule; a parameter group that joins at step 4 starts undamped."""
    model, twin = transformer(torch.bfloat16), transformer(torch.bfloat16)
    named = list(model.named_parameters())
    numbers = [
        {"momentum": 0.9, "dampening": 0.2, "nesterov": False},
        {"momentum": 0.8, "dampening": 0.0, "nesterov": True},
        {"momentum": 0.0, "dampening": 0.0, "nesterov": False},
        {"momentum": 0.5, "dampening": 0.7, "nesterov": False},
    ]
    common = {"lr": 3e-3, "eps": 1e-2}
    opt = ZOSGD([{"params": named[g : g + 1], **numbers[g]} for g in range(3)], store="inplace", seed=SEED, **common)
    parameters = {name: p.data for name, p in twin.named_parameters()}
    keys = {name: tensor_key(name) for name in parameters}

    def specification(groups: int, born: int) -> Method:
        names = [*list(parameters)[:3], *(list(parameters)[3:] if groups == 4 else [])]
        rows = [
            Row(**common, beta1=n["momentum"], dampening=n["dampening"], option=n["nesterov"], born=born * (g == 3))
            for g, n in enumerate(numbers[:groups])
        ]
        row_of = {name: min(i, 3) for i, name in enumerate(names)}
        return Method({n: parameters[n] for n in names}, keys, rows, row_of=row_of, rule="momentum", seed=SEED)

    before, after = specification(3, 0), specification(4, 3)
    x, y = batch(torch.bfloat16)
    for step in range(8):
        if step == 3:
            opt.add_param_group({"params": named[3:], **numbers[3]})
            after.control[0] = before.control[0]  # the run goes on
            after.states["momentum_buffer"] |= before.states["momentum_buffer"]
        opt.step(lambda: cross_entropy(model, x, y))
        with torch.no_grad():
            (before if step < 3 else after).step(lambda: cross_entropy(twin, x, y))
        for (name, p), q in zip(named, twin.parameters(), strict=True):
            assert_same_bits(p, q, f"{name} in step {step}")


@pytest.mark.parametrize("method", METHODS)
def test_learns(method):
    """300 steps lower the loss by a fifth at least: what they start from is not close to a minimum."""
    model = transformer()
    x, y = batch()
    opt = METHODS[method](model)
    with torch.no_grad():
        first = cross_entropy(model, x, y).item()
        for _ in range(300):
            opt.step(lambda: cross_entropy(model, x, y))
        assert cross_entropy(model, x, y).item() < 0.8 * first
