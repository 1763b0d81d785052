"""Activations: values and slopes against fp64, codes over every 16-bit number, backward as defined, what is saved."""

import copy
import functools
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from bits import assert_same_bits
from torch import Tensor

from pyzo import memory, nn, ops, reference

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # at the end: pyzo is the installed one
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TORCH = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "elu": F.elu,
    "hardswish": F.hardswish,
}
# Largest error of the slope from the output, near the minimum, where the rounding of the output counts most.
OUTPUT_ERROR = {torch.float64: 1e-4, torch.float32: 2e-4, torch.bfloat16: 1.55e-2, torch.float16: 7.1e-3}
HARDSWISH_ERROR = {torch.bfloat16: 2.4e-2, torch.float16: 9e-3}
SIDED = ("gelu", "gelu_tanh", "quick_gelu", "silu", "mish", "hardswish")


def random(n: int, dtype: torch.dtype, device: str, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(device, dtype)


def every_16_bit_number(dtype: torch.dtype, device: str) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).to(device)


def value_and_gradient(function, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.backward(gradient)
    return y.detach(), x.grad


def error(got: Tensor, want: Tensor) -> float:
    return (got.cpu().double() - want.cpu()).abs().max().item()


@pytest.mark.parametrize("name", ops.FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_less_exact_than_torch(name, dtype, device, isa):
    x = torch.cat((random(20_001, dtype, device), torch.linspace(-30, 30, 1001).to(device, dtype)))
    x = x[x.float().abs() != 3]  # where hard-swish has two slopes
    gradient = random(len(x), dtype, device, seed=1)
    want = value_and_gradient(TORCH[name], x.cpu().double(), gradient.cpu().double())
    baseline = value_and_gradient(TORCH[name], x, gradient)
    got = value_and_gradient(lambda x: ops.activation(x, name), x, gradient)
    for g, b, w in zip(got, baseline, want, strict=True):
        assert error(g, w) <= 2 * error(b, w)


@pytest.mark.parametrize("name", ops.FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_of_every_16_bit_number(name, dtype, device, isa):
    x = every_16_bit_number(dtype, device)
    code = ops.FUNCTIONS.index(name)
    gradient = torch.ones_like(x)
    for operator, arguments in (("activation", (x, code)), ("activation_backward", (gradient, x, code))):
        got = getattr(torch.ops.pyzo, operator)(*arguments).cpu()
        want = reference.OPERATORS[operator](*(a.cpu() if isinstance(a, Tensor) else a for a in arguments))
        assert torch.equal(got.isnan(), want.isnan())
        assert_same_bits(got[~got.isnan()], want[~want.isnan()], operator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("function", "bits", "kind"),
    [
        ("gelu", 2, "paper"),
        ("silu", 2, "optimal"),
        ("mish", 3, "derivative"),
        ("elu", 1, "derivative"),
        ("gelu_tanh", 4, "optimal"),
    ],
)
def test_codes_of_every_16_bit_number(function, bits, kind, dtype, device, isa):
    """Against comparisons in float64 with the float32 thresholds; NaN has code 0."""
    x = every_16_bit_number(dtype, device)
    table = nn.codebook(function, bits, kind)
    y, codes = torch.ops.pyzo.coded_activation(x, ops.FUNCTIONS.index(function), table.thresholds, table.slopes)
    thresholds = torch.tensor(table.thresholds).double()
    want = (x.cpu().double()[:, None] > thresholds).sum(1)
    assert codes.numel() == x.numel() * bits // 8
    assert torch.equal(reference.activations.unpack(codes.cpu(), bits, x.numel()), want)
    assert_same_bits(y.cpu().nan_to_num(), ops.activation(x, function).cpu().nan_to_num())


def test_code_layout():
    """Element 4j + k in bits 2k and 2k + 1 of byte j; x equal to a threshold lies below it."""
    x = torch.tensor([-9.0, -1.0, -0.5, 1.0, 2.0])
    _, codes = torch.ops.pyzo.coded_activation(x, 0, [-1.0, 0.0, 1.0], [0.0, 1.0, 2.0, 3.0])
    assert codes.tolist() == [0b10_01_00_00, 0b11]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_of_every_size(bits, device, isa):
    """Packed and unpacked again, 0 to 1025 elements; bits beyond the last element are 0."""
    x = random(1025, torch.bfloat16, device)
    levels = [k - 2.0**bits / 2 for k in range(2**bits)]
    want = reference.activations.codes_of(x.cpu(), levels[1:])
    for n in range(1026):
        _, codes = torch.ops.pyzo.coded_activation(x[:n], 0, levels[1:], levels)
        assert torch.equal(codes.cpu(), reference.activations.pack(want[:n], bits)), n
        back = torch.ops.pyzo.coded_activation_backward(torch.ones_like(x[:n]), codes, levels)
        assert torch.equal(back.float().cpu(), want[:n] + levels[0]), n


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_backward_is_its_definition_in_every_bit(bits, device, isa):
    """gradient * slopes[code(x)], one rounding; all sizes of the tail, in vectors and tiles."""
    levels = 2**bits
    thresholds = sorted(random(levels - 1, torch.float32, "cpu", seed=5).tolist())
    slopes = random(levels, torch.float32, "cpu", seed=6).tolist()
    for dtype in DTYPES:
        for n in (*range(35), 1023, 1024, 1025, 2053):
            x = random(n, dtype, device, seed=n).requires_grad_()
            gradient = random(n, dtype, device, seed=n + 1)
            ops.coded_activation(x, "silu", thresholds, slopes).backward(gradient)
            code = (x.detach().float().cpu()[:, None] > torch.tensor(thresholds)).sum(1)
            want = (gradient.cpu().float() * torch.tensor(slopes)[code]).to(dtype)
            assert_same_bits(x.grad.cpu(), want, f"{dtype} {n}")


@pytest.mark.parametrize("name", ops.FUNCTIONS)
def test_gradcheck_of_the_exact_function(name):
    x = random(40, torch.float64, "cpu").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.activation(x, name), (x,))


@pytest.mark.parametrize("kind", ["paper", "optimal", "derivative"])
def test_gradcheck_of_the_surrogate(kind):
    """The backward pass is the derivative of the continuous function that has the slopes of the table."""
    table = nn.codebook("gelu", 2, kind)
    thresholds, slopes = torch.tensor(table.thresholds).double(), torch.tensor(table.slopes).double()
    x = random(200, torch.float64, "cpu")
    x = x[(x[:, None] - thresholds).abs().amin(1) > 1e-3].requires_grad_()

    def surrogate(x: Tensor) -> Tensor:
        bend = (x[:, None] - thresholds).clamp(min=0)
        return (bend * slopes.diff()).sum(1) + slopes[0] * x

    assert torch.autograd.gradcheck(surrogate, (x,))
    (want,) = torch.autograd.grad(surrogate(x).sum(), x)
    (got,) = torch.autograd.grad(ops.coded_activation(x, "gelu", table.thresholds, table.slopes).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ops.FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_slope_from_the_output(name, dtype, device):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    x = torch.cat((random(20_001, dtype, device), torch.linspace(-40, 40, 4001).to(device, dtype)))
    x = x[x.float().abs() != 3]
    gradient = torch.ones_like(x)
    y, got = value_and_gradient(lambda x: ops.output_activation(x, name), x, gradient)
    assert_same_bits(y.float(), ops.activation(x, name).float())
    _, want = value_and_gradient(TORCH[name], x.cpu().double(), gradient.cpu().double())
    bounds = OUTPUT_ERROR | (HARDSWISH_ERROR if name == "hardswish" else {})
    assert error(got, want) <= bounds[dtype]
    mean_square = (got.cpu().double() - want).square().mean().sqrt().item()
    assert mean_square <= {torch.bfloat16: 3e-3, torch.float16: 7e-4}.get(dtype, 4e-5)


def test_constants_of_outputs_are_what_the_fit_derives():
    pytest.importorskip("mpmath")
    pytest.importorskip("scipy")
    from bench import fit_output as fit

    header, at = (ROOT / "csrc" / "core" / "output.h").read_text(), 0
    for activation in fit.ACTIVATIONS:  # in the order of the header
        for literal in re.findall(r"-?[\d.e+-]+f", " ".join(fit.lines(activation))):
            at = header.find(literal, at)
            assert at >= 0, f"{activation.name}: {literal} is not in output.h after the constants before it"
            at += len(literal)


@pytest.mark.parametrize("name", ops.FUNCTIONS)
def test_what_is_saved(name, one_thread):
    n = 4096
    x = random(n, torch.bfloat16, "cpu").requires_grad_()
    sides = n // 8 if name in SIDED else 0
    assert memory.account(lambda: ops.activation(x * 1, name)).nbytes == 2 * n
    assert memory.account(lambda: ops.output_activation(x * 1, name)).nbytes == 2 * n + sides
    for bits in (1, 2, 3, 4) if name != "relu" else (1,):
        module = nn.FewBitActivation(name, bits)
        kept = memory.account(lambda module=module: module(x))
        assert kept.nbytes == n * bits // 8
        with torch.no_grad():
            assert memory.account(lambda module=module: module(x)).nbytes == 0
        assert memory.account(lambda module=module: module(x.detach())).nbytes == 0


def test_no_codes_without_a_graph(monkeypatch):
    monkeypatch.setattr(ops.activation.__globals__["_ops"], "coded_activation", None)
    x = random(10, torch.float32, "cpu").requires_grad_()
    with torch.no_grad():
        without = nn.ReGELU2()(x)
    with torch.inference_mode():
        assert_same_bits(nn.ReGELU2()(x), without)


MODULES = (nn.ReGELU2(), nn.ReSiLU2("derivative"), nn.FewBitActivation("mish", 3), nn.OutputActivation("gelu"))


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_strides(module, device):
    base = random(60, torch.float32, device).view(5, 12)
    for view in (base.t(), base[:, ::2], base[1:, 1:], base.expand(2, 5, 12), base[:0], base[0, 0]):
        gradient = torch.randn(view.shape[::-1], device=device).permute(tuple(range(view.dim()))[::-1])
        got = value_and_gradient(module, view, gradient)
        want = value_and_gradient(module, view.contiguous(), gradient.contiguous())
        assert got[0].shape == view.shape
        for g, w in zip(got, want, strict=True):
            assert_same_bits(g.contiguous(), w.contiguous())


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_misaligned(module, device, isa):
    for dtype in DTYPES:
        whole = random(1100, dtype, device)
        for offset in (1, 3):
            got = value_and_gradient(module, whole[offset:], torch.ones_like(whole[offset:]))
            x = whole[offset:].clone().requires_grad_()
            y = module(x)
            y.backward(torch.cat((torch.ones_like(whole[:offset]), torch.ones_like(y)))[offset:])
            assert_same_bits(got[0], y.detach())
            assert_same_bits(got[1], x.grad)


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_threads(module, threads):
    x = random(200_003, torch.bfloat16, "cpu")
    got = value_and_gradient(module, x, torch.ones_like(x))
    want = [
        torch.cat(parts)
        for parts in zip(*(value_and_gradient(module, p, torch.ones_like(p)) for p in x.split(1024)), strict=True)
    ]
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_compiled_checkpointed_autocast(module, device):
    x = random(1000, torch.float32, device).view(10, 100)
    gradient = torch.randn_like(x)
    want = value_and_gradient(module, x, gradient)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, module, use_reentrant=False)
    for function in (compiled, checkpointed):
        for g, w in zip(value_and_gradient(function, x, gradient), want, strict=True):
            assert_same_bits(g, w)
    with torch.autocast(device, torch.bfloat16):  # as torch's activations, in the dtype of the input
        assert_same_bits(value_and_gradient(module, x, gradient)[0], want[0])
    torch.compiler.reset()


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_double_backward_says_so(module):
    x = random(10, torch.float32, "cpu").requires_grad_()
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no derivative"):
        gradient.sum().backward()


def test_more_than_two_to_the_31_elements():
    """The fakes count in 64 bits; the kernels' index arithmetic is int64."""
    x = torch.empty(2**32 + 4, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y, codes = torch.ops.pyzo.coded_activation(x, 1, [0.0], [0.0, 1.0])
    assert y.numel() == 2**32 + 4 and codes.numel() == 2**29 + 1


def test_errors(device):
    x = torch.ones(3, device=device)
    with pytest.raises(TypeError, match=r"x: expected a tensor of float32.*got int64"):
        ops.activation(torch.ones(3, dtype=torch.int64, device=device), "gelu")
    with pytest.raises(TypeError, match=r"x: expected a tensor of.*got complex64"):
        nn.ReGELU2()(x.to(torch.complex64))
    with pytest.raises(ValueError, match=r"function: expected one of 'relu'.*got 'swish'"):
        ops.activation(x, "swish")
    with pytest.raises(ValueError, match=r"got 'swish'"):
        nn.OutputActivation("swish")
    with pytest.raises(ValueError, match=r"expected 'optimal' or 'derivative' for mish"):
        nn.FewBitActivation("mish", 2, "paper")
    coded = torch.ops.pyzo.coded_activation
    with pytest.raises(RuntimeError, match=r"thresholds: expected 2\^bits - 1 numbers for 1 to 4 bits, got 2"):
        coded(x, 1, [0.0, 1.0], [0.0, 1.0, 2.0])
    with pytest.raises(RuntimeError, match=r"slopes: expected 2 numbers, one more than thresholds, got 3"):
        coded(x, 1, [0.0], [0.0, 1.0, 2.0])
    with pytest.raises(RuntimeError, match=r"thresholds: expected increasing float32 numbers, got 1 before 1"):
        coded(x, 1, [0.0, 1.0, 1.0 + 1e-12], [0.0, 1.0, 2.0, 3.0])
    with pytest.raises(RuntimeError, match=r"function: expected an integer in \[0, 9\), got 9"):
        torch.ops.pyzo.activation(x, 9)
    backward = torch.ops.pyzo.coded_activation_backward
    with pytest.raises(RuntimeError, match=r"codes: expected a contiguous uint8 tensor of 1 bytes beside Float.3."):
        backward(x, torch.zeros(2, dtype=torch.uint8, device=device), [0.0, 1.0])
    with pytest.raises(RuntimeError, match=r"gradient: expected a contiguous tensor of the dtype, size"):
        torch.ops.pyzo.activation_backward(x.half(), x, 1)
    memory = torch.zeros(5, device=device)
    with pytest.raises(RuntimeError, match=r"gradient: expected memory apart from that of x, got Float.3."):
        torch.ops.pyzo.activation_backward_(memory[:3], memory[2:], 1)
    if device == "cuda":
        with pytest.raises(RuntimeError, match=r"float64 on the CPU only"):
            ops.activation(x.double(), "gelu")


def test_modules_are_of_the_function_that_they_are_named_after():
    x = random(200, torch.float32, "cpu")
    for module, function in ((nn.ReGELU2(), F.gelu), (nn.ReSiLU2(), F.silu), (nn.FewBitActivation("mish"), F.mish)):
        torch.testing.assert_close(module(x), function(x))
    assert nn.ReGELU2().codebook == nn.codebook("gelu", 2, "paper")
    assert nn.ReSiLU2().codebook == nn.codebook("silu", 2, "paper")
    assert nn.FewBitActivation("mish").codebook == nn.codebook("mish", 2, "derivative")


def test_modules_describe_themselves_and_travel():
    module = nn.FewBitActivation("elu", 3, ((-1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0), tuple(range(8))))
    assert repr(module) == "FewBitActivation('elu', bits=3, codebook='table')"
    assert repr(nn.ReGELU2("optimal")) == "ReGELU2(codebook='optimal')"
    assert not module.state_dict()
    x = random(50, torch.float32, "cpu")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for g, w in zip(*(value_and_gradient(m, x, torch.ones_like(x)) for m in (other, module)), strict=True):
            assert_same_bits(g, w)
