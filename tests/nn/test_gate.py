"""Gates: values and gradients, every layout and dtype, and what composes with them."""

import pytest
import torch
from bits import assert_same_bits, weights
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pyzo import ops, reference
from pyzo.memory import account
from pyzo.nn.gate import GEGLU, SwiGLU
from pyzo.ops.gates import as_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TORCH = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "mish": functional.mish,
    "softplus": functional.softplus,
    "elu": functional.elu,
    "hardswish": functional.hardswish,
}
SIZES = (1, 7, 8, 17, 1023, 1024, 1025, 3001)  # around vectors and tiles


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, graph: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    return x.to(dtype).requires_grad_(graph)


def both_passes(function, gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The product, and the gradients of gate and up."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    product = function(gate, up)
    product.backward(gradient)
    return product.detach(), gate.grad, up.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ops.FUNCTIONS)
def test_error_is_at_most_twice_torch_s(name, dtype):
    gate, up, gradient = (normal(4099, dtype=dtype, seed=k) for k in range(3))
    ours = both_passes(lambda g, u: ops.gate(g, u, name), gate, up, gradient)
    plain = both_passes(lambda g, u: TORCH[name](g) * u, gate, up, gradient)
    exact = both_passes(lambda g, u: TORCH[name](g) * u, *(t.double() for t in (gate, up, gradient)))
    for got, by_torch, want in zip(ours, plain, exact, strict=True):
        assert got.dtype == dtype
        error, allowed = (got - want).abs(), (by_torch - want).abs()
        assert error.max() <= 2 * allowed.max()
        assert error.square().mean() <= 4 * allowed.square().mean()


def assert_same_numbers(got: Tensor, want: Tensor, what: str) -> None:
    """Equal bits, but for those of a NaN."""
    assert torch.equal(got.isnan(), want.isnan()), what
    assert_same_bits(got[~got.isnan()], want[~want.isnan()], what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_every_instruction_set_are_the_reference_s(dtype, isa):
    """Infinities, NaN and subnormals too."""
    for function, name in enumerate(ops.FUNCTIONS):
        n = SIZES[function % len(SIZES)]
        gate, up, gradient = (weights(n, dtype, seed=n + k) for k in range(3))
        want = reference.OPERATORS["gate_backward"](gradient, gate, up, function, True)
        got = torch.ops.pyzo.gate_backward(gradient, gate, up, function, True)
        product = torch.ops.pyzo.gate(gate, up, function)
        torch.ops.pyzo.gate_backward_(gradient, gate, up, function, True)
        for part, a, b, in_place in zip(("gate", "up", "product"), got, want, (gate, up, gradient), strict=True):
            assert_same_numbers(a, b, f"{name}, {part}")
            assert_same_numbers(in_place, b, f"{name}, {part} in place")
        assert_same_numbers(product, want[2], f"{name}, forward")


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_misaligned_views(size, isa):
    gate, up, gradient = (normal(size + 3, dtype=torch.bfloat16, seed=size + k)[3:] for k in range(3))
    want = both_passes(lambda g, u: ops.gate(g, u, "silu"), *(t.clone() for t in (gate, up, gradient)))
    for got, expected in zip(both_passes(lambda g, u: ops.gate(g, u, "silu"), gate, up, gradient), want, strict=True):
        assert_same_bits(got, expected)
    assert_same_bits(want[0], reference.OPERATORS["gate"](gate, up, ops.function_code("silu")))


LAYOUTS = {  # how a [3, 5, 12] tensor may lie, and whether it is taken as it lies
    "contiguous": (lambda: normal(3, 5, 12), True),
    "half": (lambda: normal(3, 5, 24)[..., :12], True),
    "other half": (lambda: normal(3, 5, 24)[..., 12:], True),
    "some rows": (lambda: normal(3, 10, 12)[:, ::2], True),
    "one row each": (lambda: normal(5, 3, 12).transpose(0, 1), False),
    "cut rows": (lambda: normal(3, 7, 12)[:, :5], False),
    "transposed": (lambda: normal(3, 12, 5).transpose(1, 2), False),
    "expanded": (lambda: normal(3, 1, 12).expand(3, 5, 12), False),
    "every other": (lambda: normal(3, 5, 24)[..., ::2], False),
}


@pytest.mark.parametrize("up_layout", LAYOUTS)
@pytest.mark.parametrize("gate_layout", LAYOUTS)
def test_layouts(gate_layout, up_layout):
    gate, up = LAYOUTS[gate_layout][0](), LAYOUTS[up_layout][0]()
    gradient = normal(3, 12, 5, seed=9).transpose(1, 2)
    got = both_passes(lambda g, u: ops.gate(g, u, "gelu"), gate, up, gradient)
    want = both_passes(lambda g, u: ops.gate(g, u, "gelu"), *(t.contiguous() for t in (gate, up, gradient)))
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    assert got[0].is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_copied_only_where_they_must(layout):
    x, taken = LAYOUTS[layout][0](), LAYOUTS[layout][1]
    assert (as_rows(x) is x) == taken
    if not taken:
        with pytest.raises(RuntimeError, match="gate: expected rows of contiguous elements, got"):
            torch.ops.pyzo.gate(x, x, 0)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 6), ()])
def test_empty_and_scalar(shape):
    gate, up = normal(*shape, graph=True), normal(*shape, seed=1, graph=True)
    product = ops.gate(gate, up, "silu")
    product.sum().backward()
    assert product.shape == gate.grad.shape == up.grad.shape == torch.Size(shape)
    if shape and shape[-1] % 2 == 0:
        assert SwiGLU()(normal(*shape, graph=True)).shape == (*shape[:-1], shape[-1] // 2)


@pytest.mark.parametrize("name", ops.FUNCTIONS)
def test_gradcheck(name):
    gate, up = normal(3, 4, dtype=torch.float64, graph=True), normal(3, 4, dtype=torch.float64, seed=1, graph=True)
    assert torch.autograd.gradcheck(lambda g, u: ops.gate(g, u, name), (gate, up))
    both = normal(3, 8, dtype=torch.float64, graph=True)
    assert torch.autograd.gradcheck(lambda x: ops.gate(*(x * 1.0).chunk(2, -1), name), (both,))


def test_bits_do_not_depend_on_threads(threads):
    gate, up, gradient = (normal(70, 2100, dtype=torch.bfloat16, seed=k) for k in range(3))
    gate, up = gate[:, :2050], up[:, 50:]
    want = reference.OPERATORS["gate_backward"](gradient[:, :2050].contiguous(), gate, up, 4, True)
    got = torch.ops.pyzo.gate_backward(gradient[:, :2050].contiguous(), gate, up, 4, True)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def test_the_gradient_of_one_input_alone():
    gate, up = normal(5), normal(5, seed=1)
    want = both_passes(lambda g, u: ops.gate(g, u, "silu"), gate, up, torch.ones(5))
    for which in (0, 1):
        pair = [gate.clone(), up.clone()]
        pair[which].requires_grad_()
        ops.gate(*pair, "silu").sum().backward()
        assert_same_bits(pair[which].grad, want[1 + which])
        assert pair[1 - which].grad is None


def test_modules():
    gate, up = normal(4, 6), normal(4, 6, seed=1)
    for module, name in ((SwiGLU(), "silu"), (GEGLU(), "gelu"), (GEGLU("tanh"), "gelu_tanh")):
        assert_same_bits(module(gate, up), ops.gate(gate, up, name))
        assert_same_bits(module(torch.cat([gate, up], -1)), ops.gate(gate, up, name))
    with pytest.raises(ValueError, match=r"approximate: expected 'none' or 'tanh', got 'erf'"):
        GEGLU("erf")
    with pytest.raises(ValueError, match=r"gate: expected an even last dimension.*got shape \[4, 5\]"):
        SwiGLU()(normal(4, 5))


@pytest.mark.parametrize(
    ("gate", "up", "function", "error", "message"),
    [
        (torch.ones(2, dtype=torch.int32), torch.ones(2), "silu", TypeError, "gate: expected a tensor of .*got int32"),
        (torch.ones(2), torch.ones(2).half(), "silu", TypeError, "up: expected the dtype of gate, torch.float32, got"),
        (torch.ones(2, 3), torch.ones(3), "silu", ValueError, r"up: expected the shape of gate, \[2, 3\], got \[3\]"),
        (torch.ones(2), torch.ones(2, device="meta"), "silu", ValueError, "up: expected the device of gate, cpu, got"),
        (torch.ones(2), torch.ones(2), "swish", ValueError, "function: expected one of 'relu', .*got 'swish'"),
    ],
)
def test_errors(gate, up, function, error, message):
    with pytest.raises(error, match=message):
        ops.gate(gate, up, function)


def test_errors_of_operators():
    x = normal(4, 6)
    operators = torch.ops.pyzo
    with pytest.raises(RuntimeError, match=r"up: expected rows of .* which is Float\[4, 6\] on cpu, got Float\[4, 3\]"):
        operators.gate(x, x[:, :3], 0)
    with pytest.raises(RuntimeError, match="function: expected an integer in"):
        operators.gate(x, x, 9)
    with pytest.raises(RuntimeError, match=r"gradient: expected a contiguous tensor of .*got Double\[24\]"):
        operators.gate_backward(x.double().flatten(), x, x, 0, False)
    for other in (x, x.flatten()[1:].as_strided((4, 5), (6, 1))):
        gate = x.as_strided(other.shape, (6, 1))
        with pytest.raises(RuntimeError, match="up: expected memory apart from that of gate"):
            operators.gate_backward_(torch.ones(other.shape), gate, other, 0, False)
    with pytest.raises(RuntimeError, match="gradient: expected memory apart from that of gate and up"):
        operators.gate_backward_(x, x, normal(4, 6, seed=1), 0, False)
    assert_same_bits(x, normal(4, 6))


def test_nothing_is_saved_without_a_graph():
    gate, up = normal(4, 6, graph=True), normal(4, 6, graph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert account(lambda: ops.gate(gate * 1.0, up * 1.0, "silu")).nbytes == 0
    assert account(lambda: ops.gate(gate.detach(), up.detach(), "silu")).nbytes == 0


def test_halves_of_one_tensor_are_saved_once():
    layer = nn.Linear(4, 12, bias=False)
    x = normal(5, 4)
    saved = account(lambda: SwiGLU()(layer(x))).saved
    assert [s.nbytes for s in saved if s.modules != ("Linear",)] == [5 * 12 * 4]


def test_compile():
    def run(gate: Tensor, up: Tensor) -> Tensor:
        return ops.gate(gate * 2, (up * 2).t().contiguous().t(), "silu").sin()

    gate, up, gradient = (normal(4, 6, seed=k) for k in range(3))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(both_passes(compiled, gate, up, gradient), both_passes(run, gate, up, gradient), strict=True):
        assert_same_bits(a, b)
    halves = torch.compile(SwiGLU(), fullgraph=True, backend="aot_eager", dynamic=True)
    x, y = normal(4, 12, graph=True), normal(4, 12, graph=True)
    halves(x).sum().backward()
    SwiGLU()(y).sum().backward()
    assert_same_bits(x.grad, y.grad)
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    gate, up, gradient = (normal(4, 6, seed=k) for k in range(3))

    def run(g: Tensor, u: Tensor) -> Tensor:
        return ops.gate(g * 2, u * 3, "silu")

    got = both_passes(lambda g, u: checkpoint(run, g, u, use_reentrant=reentrant), gate, up, gradient)
    for a, b in zip(got, both_passes(run, gate, up, gradient), strict=True):
        assert_same_bits(a, b)


def test_autocast():
    enter, x = nn.Linear(6, 8), normal(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        product = SwiGLU()(enter(x))
    assert product.dtype == torch.bfloat16
    product.float().sum().backward()
    assert enter.weight.grad.dtype == torch.float32


def test_double_backward_is_refused():
    gate, up = normal(3, graph=True), normal(3, graph=True)
    (gradient,) = torch.autograd.grad(ops.gate(gate, up, "silu").sum(), gate, create_graph=True)
    with pytest.raises(NotImplementedError, match="gate_backward has no derivative"):
        gradient.sum().backward()
