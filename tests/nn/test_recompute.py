"""Linear layers that recompute their input: gradients, adapters, autocast, and what they save."""

from collections.abc import Callable

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pyzo import ops
from pyzo.memory import account
from pyzo.nn.gate import SwiGLU
from pyzo.nn.recompute import ActivationLinear, GatedLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS, INNER, OUT, RANK = (3, 11), 40, 24, 4
SCALE = 0.5
NAMES = ("gate", "up", "weight", "bias", "a", "b")


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def inputs(dtype: torch.dtype, parameters: torch.dtype | None = None) -> dict[str, Tensor]:
    """gate, up, weight, bias, a, b, the numbers of one dtype also where parameters have another."""
    shapes = ((*TOKENS, INNER), (*TOKENS, INNER), (OUT, INNER), (OUT,), (RANK, INNER), (OUT, RANK))
    scales = (2.0, 2.0, INNER**-0.5, 1.0, INNER**-0.5, 1.0)
    made = {}
    for i, (name, shape, scale) in enumerate(zip(NAMES, shapes, scales, strict=True)):
        t = normal(*shape, dtype=dtype, seed=i, scale=scale)
        made[name] = t if name in ("gate", "up") else t.to(parameters or dtype)
    return made


def plain(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, a: Tensor | None = None, b: Tensor | None = None):
    product = functional.silu(gate) * up
    y = functional.linear(product, weight, bias)
    return y if a is None else y + functional.linear(functional.linear(product, a), b) * SCALE


def ours(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, a: Tensor | None = None, b: Tensor | None = None):
    return ops.gate_linear(gate, up, weight, bias, a=a, b=b, scale=SCALE)


def passes(function: Callable, tensors: dict[str, Tensor], gradient: Tensor, names=NAMES) -> dict[str, Tensor]:
    """The result, and the gradients of the tensors named; gate and up are results of the graph, as in a model."""
    leaves = {n: t.detach().clone().requires_grad_(n in names) for n, t in tensors.items()}
    y = function(**{n: t * 1.0 if n in ("gate", "up") and t.requires_grad else t for n, t in leaves.items()})
    y.backward(gradient.to(y.dtype))
    assert all(t.grad is None for n, t in leaves.items() if n not in names)
    return {"y": y.detach(), **{n: leaves[n].grad for n in tensors if n in names}}


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if n not in names}


def worst(got: Tensor, want: Tensor) -> Tensor:
    return (got.double() - want).abs().max()


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_torch_s(dtype, adapter):
    tensors = inputs(dtype) if adapter else without(inputs(dtype), "a", "b")
    gradient = normal(*TOKENS, OUT, dtype=dtype, seed=7)
    exact = passes(plain, {n: t.double() for n, t in tensors.items()}, gradient.double())
    got, by_torch = passes(ours, tensors, gradient), passes(plain, tensors, gradient)
    for name, want in exact.items():
        assert got[name].dtype == dtype and got[name].shape == want.shape
        assert worst(got[name], want) <= 2 * worst(by_torch[name], want), name


@pytest.mark.parametrize("adapter", [False, True])
def test_autocast(adapter):
    """fp32 parameters beside bfloat16 gate and up; gradients in the parameters' dtype, as torch makes them."""
    tensors = inputs(torch.bfloat16, torch.float32)
    tensors = tensors if adapter else without(tensors, "a", "b")
    gradient = normal(*TOKENS, OUT, dtype=torch.bfloat16, seed=7)

    def under(function: Callable) -> Callable:
        def run(**arguments: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return function(**arguments)

        return run

    exact = passes(plain, {n: t.double() for n, t in tensors.items()}, gradient.double())
    got, by_torch = passes(under(ours), tensors, gradient), passes(under(plain), tensors, gradient)
    assert got["y"].dtype == torch.bfloat16
    for name, want in exact.items():
        assert got[name].dtype == by_torch[name].dtype
        assert worst(got[name], want) <= 2 * worst(by_torch[name], want), name
    with torch.autocast("cpu", torch.bfloat16):
        inside = passes(ours, tensors, gradient)
    for name in exact:
        assert_same_bits(inside[name], got[name], f"{name}, backward under autocast too")
    x = normal(3, INNER, dtype=torch.float32).requires_grad_()
    layer = ActivationLinear(INNER, OUT)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("parameters", [(), ("bias",), ("a", "b"), ("bias", "a", "b")], ids=str)
@pytest.mark.parametrize("function", ["silu", "gelu_tanh"])
def test_gradcheck(function, parameters):
    shapes = {"bias": (3,), "a": (2, 4), "b": (3, 2)}
    tensors = [normal(2, 4).requires_grad_(), normal(2, 4, seed=1).requires_grad_(), normal(3, 4).requires_grad_()]
    tensors += [normal(*shapes[n], seed=i).requires_grad_() for i, n in enumerate(parameters)]

    def run(gate: Tensor, up: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        given = dict(zip(parameters, rest, strict=True))
        return ops.gate_linear(gate * 1.0, up * 1.0, weight, given.pop("bias", None), function, scale=0.7, **given)

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("function", ops.FUNCTIONS)
def test_gradcheck_of_an_activation(function):
    x, weight, bias = (normal(*s, seed=i).requires_grad_() for i, s in enumerate(((2, 3, 4), (3, 4), (3,))))
    assert torch.autograd.gradcheck(lambda *t: ops.activation_linear(*t, function), (x, weight, bias))


@pytest.mark.parametrize(
    "names",
    [
        ("gate", "up"),
        ("gate",),
        ("weight",),
        ("bias",),
        ("a",),
        ("b",),
        ("a", "b"),
        ("up", "a"),
        ("weight", "bias", "b"),
    ],
    ids=str,
)
def test_only_what_is_asked_for(names):
    """The gradients of some inputs are those of all, in every bit; the others get none."""
    gradient = normal(*TOKENS, OUT, dtype=torch.float32, seed=7)
    tensors = inputs(torch.float32)
    every, some = passes(ours, tensors, gradient), passes(ours, tensors, gradient, names)
    for name in ("y", *names):
        assert_same_bits(some[name], every[name], name)


def test_activation_linear_against_torch():
    for dtype in DTYPES:
        x, weight, bias = (inputs(dtype)[n] for n in ("gate", "weight", "bias"))
        gradient = normal(*TOKENS, OUT, dtype=dtype, seed=7)
        tensors = {"gate": x, "weight": weight, "bias": bias}

        def mine(gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return ops.activation_linear(gate, weight, bias, "gelu")

        def theirs(gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return functional.linear(functional.gelu(gate), weight, bias)

        exact = passes(theirs, {n: t.double() for n, t in tensors.items()}, gradient.double())
        got, by_torch = passes(mine, tensors, gradient), passes(theirs, tensors, gradient)
        for name, want in exact.items():
            assert worst(got[name], want) <= 2 * worst(by_torch[name], want), (dtype, name)


class MLP(nn.Module):
    """Gate and up projections, frozen and without saving anything but their input; then `down`."""

    def __init__(self, down: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDE, WIDE_INNER, bias=False, dtype=dtype) for _ in range(2))
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x), self.up(x))


WIDE, WIDE_INNER, ROWS = 16, 64, 32  # r = 4


def units(down: Callable[[Tensor, Tensor], Tensor]) -> float:
    """What an MLP saves beside its input, in units of one 16-bit [tokens, I] tensor."""
    model, x = MLP(down), torch.randn(ROWS, WIDE, dtype=torch.bfloat16)
    kept = account(lambda: model(x), model)
    return kept.units(ROWS, WIDE_INNER) - WIDE / WIDE_INNER


def linear(trainable: bool = True) -> nn.Linear:
    return nn.Linear(WIDE_INNER, WIDE, dtype=torch.bfloat16).requires_grad_(trainable)


class Gated(nn.Module):
    """A gate, then a linear."""

    def __init__(self, gate: Callable[[Tensor, Tensor], Tensor], down: nn.Linear):
        super().__init__()
        self.gate, self.down = gate, down

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down(self.gate(gate, up))


class Adapted(nn.Module):
    """The down projection with a LoRA adapter; frozen below it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = GatedLinear(WIDE_INNER, WIDE, dtype=torch.bfloat16).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(RANK, WIDE_INNER, dtype=torch.bfloat16))
        self.b = nn.Parameter(torch.zeros(WIDE, RANK, dtype=torch.bfloat16))

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.gate_linear(gate, up, self.down.weight, self.down.bias, a=self.a, b=self.b)


def test_what_is_saved():
    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    assert units(Gated(eager, linear())) == 4  # gate, silu, up, product
    assert units(Gated(eager, linear(trainable=False))) == 3
    assert units(Gated(SwiGLU(), linear())) == 3
    assert units(Gated(SwiGLU(), linear(trainable=False))) == 2
    assert units(GatedLinear(WIDE_INNER, WIDE, dtype=torch.bfloat16)) == 2
    assert units(GatedLinear(WIDE_INNER, WIDE, dtype=torch.bfloat16).requires_grad_(False)) == 2
    assert units(Adapted()) == 2 + RANK / WIDE_INNER


def test_what_is_saved_under_autocast():
    """fp32 parameters: no cast of them, nor of anything else, is kept."""
    layer = GatedLinear(WIDE_INNER, WIDE)
    gate, up = (torch.randn(ROWS, WIDE_INNER, dtype=torch.bfloat16, requires_grad=True) * 1 for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert account(lambda: layer(gate, up), layer).units(ROWS, WIDE_INNER) == 2


def test_what_an_activation_saves():
    x = torch.randn(ROWS, WIDE_INNER, dtype=torch.bfloat16, requires_grad=True) * 1
    plain = nn.Sequential(nn.GELU(), linear())
    layer = ActivationLinear(WIDE_INNER, WIDE, dtype=torch.bfloat16)
    assert account(lambda: plain(x), plain).units(ROWS, WIDE_INNER) == 2
    assert account(lambda: layer(x), layer).units(ROWS, WIDE_INNER) == 1


def test_nothing_is_saved_without_a_graph():
    tensors = {n: t.requires_grad_() for n, t in inputs(torch.float32).items()}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert account(lambda: ours(**tensors)).nbytes == 0
            assert account(lambda: ops.activation_linear(tensors["gate"], tensors["weight"])).nbytes == 0


@pytest.mark.parametrize("bias", [True, False])
def test_modules_take_the_place_of_a_linear(bias):
    torch.manual_seed(0)
    gated = GatedLinear(INNER, OUT, bias)
    torch.manual_seed(0)
    replaced = nn.Linear(INNER, OUT, bias)
    assert list(gated.state_dict()) == list(replaced.state_dict())
    assert_same_bits(gated.weight, replaced.weight)
    empty = GatedLinear(INNER, OUT, bias, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    empty.reset_parameters()
    for mine, first in zip(empty.parameters(), replaced.parameters(), strict=True):
        assert_same_bits(mine, first)
    activated = ActivationLinear(INNER, OUT, bias)
    activated.load_state_dict(replaced.state_dict())
    tensors = inputs(torch.float32)
    product = ops.gate(tensors["gate"], tensors["up"], "silu")
    assert_same_bits(gated(tensors["gate"], tensors["up"]), replaced(product))
    assert_same_bits(activated(tensors["gate"]), replaced(ops.activation(tensors["gate"], "gelu")))
    assert repr(gated) == f"GatedLinear(40, 24, bias={bias}, function='silu')"
    with pytest.raises(ValueError, match="function: expected one of"):
        GatedLinear(INNER, OUT, function="swiglu")


def test_compile():
    tensors = inputs(torch.float32)
    gradient = normal(*TOKENS, OUT, dtype=torch.float32, seed=7)
    compiled = torch.compile(lambda **t: ours(**t).sin(), fullgraph=True, backend="aot_eager")
    got, want = passes(compiled, tensors, gradient), passes(lambda **t: ours(**t).sin(), tensors, gradient)
    for name in want:
        assert_same_bits(got[name], want[name], name)
    layer = ActivationLinear(INNER, OUT)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(tensors["gate"])
        assert_same_bits(y, layer(tensors["gate"]))
    y.float().sum().backward()
    torch.compiler.reset()


def test_checkpoint():
    tensors, gradient = inputs(torch.float32), normal(*TOKENS, OUT, dtype=torch.float32, seed=7)
    got = passes(lambda **t: checkpoint(ours, use_reentrant=False, **t), tensors, gradient)
    for name, want in passes(ours, tensors, gradient).items():
        assert_same_bits(got[name], want, name)


def test_kept_graph_and_changed_layouts():
    """Halves of one tensor as gate and up; backward twice beside the saved tensors, and once over them."""
    x = normal(*TOKENS, 2 * INNER, dtype=torch.float32).requires_grad_()
    weight = inputs(torch.float32)["weight"].requires_grad_()
    loss = ops.gate_linear(*(x * 1.0).chunk(2, -1), weight).square().sum()
    gradients = [torch.autograd.grad(loss, (x, weight), retain_graph=keep) for keep in (True, True, False)]
    for other in gradients[1:]:
        for a, b in zip(other, gradients[0], strict=True):
            assert_same_bits(a, b)
    apart = [t.contiguous() for t in x.detach().chunk(2, -1)]
    turned = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in apart]
    assert_same_bits(ops.gate_linear(*turned, weight), ops.gate_linear(*apart, weight))


@pytest.mark.parametrize("rows", [(0,), (3, 0), ()])
def test_no_rows_and_one_row(rows):
    gate, up = normal(*rows, INNER).requires_grad_(), normal(*rows, INNER).requires_grad_()
    weight = normal(OUT, INNER).requires_grad_()
    y = ops.gate_linear(gate, up, weight)
    (y.sum() + ops.activation_linear(gate, weight).sum()).backward()
    assert y.shape == (*rows, OUT) and gate.grad.shape == gate.shape and weight.grad.shape == weight.shape


def test_double_backward_is_refused():
    tensors = {n: t.requires_grad_() for n, t in inputs(torch.float32).items()}
    for y in (ours(**tensors), ops.activation_linear(tensors["gate"], tensors["weight"])):
        (gradient,) = torch.autograd.grad(y.sum(), tensors["gate"], create_graph=True)
        with pytest.raises(NotImplementedError, match="has no derivative"):
            gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(OUT, INNER - 1)}, ValueError, r"weight: expected shape \[any, 40\], got \[24, 39\]"),
        ({"weight": torch.ones(OUT, INNER).half()}, TypeError, "weight: expected torch.float32, as the input is and"),
        ({"weight": torch.ones(OUT, INNER).int()}, TypeError, "weight: expected a tensor of .*got int32"),
        ({"weight": torch.ones(())}, ValueError, r"weight: expected shape \[any, 40\], got \[\]"),
        ({"gate": torch.ones(()), "up": torch.ones(())}, ValueError, r"gate: expected shape \[..., in_features\]"),
        ({"bias": torch.ones(OUT + 1)}, ValueError, r"bias: expected shape \[24\], got \[25\]"),
        (
            {"bias": torch.ones(OUT, device="meta")},
            ValueError,
            "bias: expected a tensor on cpu, as the input",
        ),
        ({"b": None}, ValueError, "b: expected a tensor, as its partner is one, got None"),
        ({"a": None}, ValueError, "a: expected a tensor, as its partner is one, got None"),
        ({"b": torch.ones(OUT, RANK + 1)}, ValueError, r"b: expected shape \[24, 4\], got \[24, 5\]"),
        ({"p": 1.0}, ValueError, r"p: expected a number in \[0, 1 - 2\^-17\), got 1.0"),
        ({"a": None, "b": None, "p": 0.5}, ValueError, "p: expected 0 without an adapter, got 0.5"),
        ({"up": torch.ones(*TOKENS, INNER).half()}, TypeError, "up: expected the dtype of gate"),
        ({"function": "swish"}, ValueError, "function: expected one of"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        ops.gate_linear(**{**inputs(torch.float32), **change})


def test_opcheck():
    tensors = {n: t.requires_grad_() for n, t in inputs(torch.float32).items()}
    rest = (None, SCALE, 0.0, ops.function_code("silu"), torch.float32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for names in (NAMES, NAMES[:3]):
        given = (tensors[n] if n in names else None for n in NAMES)
        torch.library.opcheck(torch.ops.pyzo.gate_linear.default, (*given, *rest), test_utils=tests)
    arguments = (tensors["gate"], tensors["weight"], None, 1, torch.float32)
    torch.library.opcheck(torch.ops.pyzo.activation_linear.default, arguments, test_utils=tests)


def test_dropout_before_the_adapter():
    """The mask of backward is that of forward; saved are the seed and [tokens, r] numbers, no mask and no copy."""
    tensors, gradient = inputs(torch.float32), normal(*TOKENS, OUT, dtype=torch.float32, seed=7)
    seed, p = torch.tensor([5]), 0.25

    def dropped(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        product = functional.silu(gate) * up
        low = functional.linear(torch.ops.pyzo.dropout(product, seed, p), a)
        return functional.linear(product, weight, bias) + functional.linear(low, b) * SCALE

    def fused(**given: Tensor) -> Tensor:
        return ops.gate_linear(**given, scale=SCALE, p=p, seed=seed)

    exact = passes(dropped, {n: t.double() for n, t in tensors.items()}, gradient.double())
    got, by_torch = passes(fused, tensors, gradient), passes(dropped, tensors, gradient)
    for name, want in exact.items():
        assert worst(got[name], want) <= 2 * worst(by_torch[name], want), name
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    gate, up = leaves.pop("gate") * 1, leaves.pop("up") * 1
    rows = gate.numel() // INNER
    assert account(lambda: fused(gate=gate, up=up, **leaves)).nbytes == 4 * rows * (2 * INNER + RANK) + 8
