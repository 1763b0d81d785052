"""The operators of norms: rounding error against torch's, bits of the reference, edges, autograd and tracing."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bits import assert_same_bits
from samples_norm import SAMPLES
from torch import Tensor

from pyzo import memory, reference
from pyzo.ops import norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {"layer": True, "rms": False}
layer_norm = partial(norm, eps=1e-5, centered=True)
rms_norm = partial(norm, eps=1e-5, centered=False)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(size: int, dtype: torch.dtype, centered: bool) -> list[Tensor]:
    """gamma around 1 and, of LayerNorm, beta around 0, as in trained models."""
    found = [(1 + 0.2 * random(size, seed=1)).to(dtype)]
    return [*found, (0.1 * random(size, seed=2)).to(dtype)] if centered else found


def torch_norm(x: Tensor, *affine: Tensor, centered: bool, eps: float = 1e-5) -> Tensor:
    if centered:
        return F.layer_norm(x, x.shape[-1:], *affine, eps=eps)
    return F.rms_norm(x, x.shape[-1:], *affine, eps=eps)


def results(function, x: Tensor, affine: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """The output and the gradients of x and of the parameters."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *affine)]
    y = function(*leaves)
    y.backward(gradient.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def error(a: Tensor, exact: Tensor) -> float:
    scale = exact.norm().clamp(min=1e-300)
    return float((a.double().cpu() - exact).norm() / scale)


def compare(
    x: Tensor, affine: list[Tensor], gradient: Tensor, centered: bool, *, eps: float = 1e-5, **kind: bool
) -> None:
    """Errors against fp64 at most twice those of torch in the same dtype, or of rounding the true result.

    The gradient of weight, a sum over rows of gradient * x̂, is allowed what the rounding of each x̂ to the output's
    dtype adds: independent errors of at most 2 u |gradient x̂| (u (1 + |beta/gamma|) with beta below gamma), and of u in
    1 / gamma.
    """
    wide = [x.double().cpu(), [p.double().cpu() for p in affine], gradient.double().cpu()]
    exact = results(partial(torch_norm, centered=centered, eps=eps), *wide)
    ours = results(partial(norm, eps=eps, centered=centered, **kind), x, affine, gradient)
    theirs = results(partial(torch_norm, centered=centered, eps=eps), x, affine, gradient)
    unit = torch.finfo(x.dtype).eps / 2
    terms = (wide[2] * torch_norm(wide[0], centered=centered, eps=eps)).square().sum(0).sqrt()
    for name, mine, other, true in zip(("y", "dx", "dweight", "dbias"), ours, theirs, exact, strict=False):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        allowed = 2 * max(error(other, true), error(true.to(mine.dtype), true))
        if name == "dweight":
            allowed += float(2 * unit * terms.norm() / true.norm()) + unit
        assert error(mine, true) <= allowed, (name, error(mine, true), error(other, true))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("from_input", [False, True], ids=["output", "input"])
def test_errors_are_those_of_torch(kind, dtype, from_input, device):
    for rows, size in ((50, 7), (50, 32), (70, 100), (200, 768), (9, 4096), (3, 5000), (2, 16385)):
        x, gradient = random(rows, size, dtype=dtype).to(device), random(rows, size, dtype=dtype, seed=3).to(device)
        affine = [p.to(device) for p in parameters(size, dtype, KINDS[kind])]
        compare(x, affine, gradient, KINDS[kind], from_input=from_input)
        compare(x, [], gradient, KINDS[kind], from_input=from_input)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outlier_channels(kind, dtype, device):
    x = random(64, 768)
    x[:, ::97] *= 60
    affine = [p.to(device) for p in parameters(768, dtype, KINDS[kind])]
    gradient = random(64, 768, dtype=dtype, seed=3).to(device)
    compare(x.to(device, dtype), affine, gradient, KINDS[kind])


def test_a_large_mean_costs_no_more_than_in_torch(device):
    x = random(20, 1000, dtype=torch.float32).to(device) + 3000
    compare(x, [], random(20, 1000, dtype=torch.float32, seed=3).to(device), True)


@pytest.mark.parametrize("kind", KINDS)
def test_large_eps(kind, device):
    x, gradient = random(20, 100, dtype=torch.float32).to(device), random(20, 100, dtype=torch.float32, seed=3)
    affine = [p.to(device) for p in parameters(100, torch.float32, KINDS[kind])[:1]]
    compare(x, affine, gradient.to(device), KINDS[kind], eps=1e5)


def test_constant_rows_and_a_tiny_eps(device):
    """Their normalised values are 0: the mean is mended until nothing but its own rounding is left."""
    values = torch.tensor([[0.0], [0.1], [-3.7], [1e4], [1e-20]], device=device)
    x = values.expand(5, 777).contiguous().requires_grad_()
    y = layer_norm(x, eps=1e-12)
    # What is left of the mean is at most half an ulp of it, and rstd at most 1e6.
    assert (y.abs() <= values.abs() * 2.0**-24 * 1e6 + 1e-30).all()
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert (layer_norm(torch.zeros(2, 9, device=device), eps=1e-12) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_aligned_gradients(kind, dtype, device):
    """Gradient = noise + a x̂: dx loses the aligned part, whose size is a and whose x̂ is rounded to u = eps / 2.

    The error is the rounding of x̂, relative and uniform in [-u, u] over a binade (rms of at most u / sqrt(3)), on
    a x̂ mean(x̂²) and on a mean(x̂ x̂) alike: at most 2 a u / sqrt(3), beside the rounding of dx and of the gradient.
    """
    x = random(64, 768, dtype=dtype).to(device)
    exact = torch_norm(x.double().cpu(), centered=KINDS[kind])
    unit = torch.finfo(dtype).eps / 2
    for a in (0.0, 1.0, 10.0, 100.0):
        gradient = (random(64, 768, seed=3) + a * exact).to(dtype)
        true = results(partial(torch_norm, centered=KINDS[kind]), x.double().cpu(), [], gradient.double())[1]
        output, kept = (
            error(
                results(partial(norm, eps=1e-5, centered=KINDS[kind], from_input=f), x, [], gradient.to(device))[1],
                true,
            )
            for f in (False, True)
        )
        assert output <= (2 * a / 3**0.5 + 1) * unit
        assert kept <= unit
        assert a < 100 or output > 10 * kept  # what the docstring says is seen


@pytest.mark.parametrize("name", ["norm", "norm_backward"])
def test_bits_of_the_reference_on_every_instruction_set(name, isa):
    for sample in SAMPLES[name]("cpu"):
        for mine, expected in zip(
            getattr(torch.ops.pyzo, name)(*sample), reference.OPERATORS[name](*sample), strict=True
        ):
            assert_same_bits(mine, expected, f"{name} on {isa}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("from_input", [False, True], ids=["output", "input"])
def test_bits_do_not_depend_on_threads(dtype, from_input):
    def run() -> list[Tensor]:
        x, gradient = random(999, 257, dtype=dtype), random(999, 257, dtype=dtype, seed=3)
        return results(partial(layer_norm, from_input=from_input), x, parameters(257, dtype, True), gradient)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(2)
        two = run()
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, two, strict=True):
        assert_same_bits(a, b, "threads")


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("y_dtype", DTYPES, ids=str)
def test_mixed_dtypes(x_dtype, y_dtype, device):
    """Every pair of input and output, parameters in each dtype: one rounding of what fp32 gives."""
    x = random(40, 96, dtype=x_dtype).to(device)
    gradient = random(40, 96, dtype=y_dtype, seed=3).to(device)
    for p_dtype in DTYPES:
        affine = [p.to(device) for p in parameters(96, p_dtype, True)]
        wide = results(layer_norm, x.float(), [p.float() for p in affine], gradient.float())
        got = results(partial(layer_norm, dtype=y_dtype), x, affine, gradient)
        assert [t.dtype for t in got] == [y_dtype, x_dtype, p_dtype, p_dtype]
        assert_same_bits(got[0], wide[0].to(y_dtype), "y")
        unit = max(torch.finfo(y_dtype).eps, torch.finfo(x_dtype).eps, torch.finfo(p_dtype).eps)
        for a, b in zip(got[1:], wide[1:], strict=True):
            assert error(a, b.double().cpu()) <= 2 * unit


def test_rows_of_every_length(device):
    """1 to 70 columns, unaligned beginnings: what is beyond a row counts for nothing."""
    for size in (*range(1, 71), 1023, 1025):
        store = random(4 * size + 1, dtype=torch.float32).to(device)
        x = store[1:].view(4, size)
        exact = torch_norm(x.double(), centered=True)
        scale = (x.double().var(-1, unbiased=False) + 1e-5).rsqrt().max() * x.abs().max()
        assert (layer_norm(x).double() - exact).abs().max() <= 4 * 2.0**-24 * scale + 1e-7
        assert store[0] == random(4 * size + 1, dtype=torch.float32)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, device):
    x = random(6, 5, 40, dtype=dtype).to(device)
    gradient = random(6, 5, 40, dtype=dtype, seed=3).to(device)
    weight, bias = (p.to(device) for p in parameters(80, dtype, True))
    for view in (lambda t: t.transpose(0, 1), lambda t: t[:, ::2], lambda t: t[..., 1:33], lambda t: t[..., ::2]):
        size = view(x).shape[-1]
        affine = [weight[: 2 * size : 2], bias[:size]]
        for a, b in zip(
            results(layer_norm, view(x), affine, view(gradient)),
            results(layer_norm, view(x).contiguous(), [p.contiguous() for p in affine], view(gradient).contiguous()),
            strict=True,
        ):
            assert_same_bits(a, b, "strides")


def test_no_rows(device):
    x = torch.empty(0, 9, device=device, requires_grad=True)
    weight = torch.ones(9, device=device, requires_grad=True)
    y = layer_norm(x, weight)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 9)
    assert (weight.grad == 0).all()


def test_nan_and_infinity_stay_in_their_rows(device):
    x = random(4, 50, dtype=torch.float32).to(device)
    x[1, 7], x[2, 9] = torch.nan, torch.inf
    for function in (layer_norm, rms_norm):
        y = function(x)
        assert y[1].isnan().all() and y[2].isnan().any()
        assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("from_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_gradcheck(kind, from_input, affine):
    x = random(3, 2, 37).requires_grad_()
    leaves = [p.requires_grad_() for p in parameters(37, torch.float64, KINDS[kind])] if affine else []

    def function(x: Tensor, *affine: Tensor) -> Tensor:
        return norm(x, *affine, eps=0.1, centered=KINDS[kind], from_input=from_input, weight_offset=0.5)

    assert torch.autograd.gradcheck(function, (x, *leaves))


def test_double_backward_is_refused(device):
    x = random(3, 8, dtype=torch.float32).to(device).requires_grad_()
    (dx,) = torch.autograd.grad(layer_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="norm_backward has no derivative"):
        dx.sum().backward()


def test_the_reciprocal_of_std_has_no_gradient(device):
    x = random(3, 8, dtype=torch.float32).to(device).requires_grad_()
    y, rstd = torch.ops.pyzo.norm(x, None, None, 1e-5, True, 0.0, False, torch.float32)
    assert y.requires_grad and not rstd.requires_grad


def test_only_wanted_gradients(device):
    x = random(3, 8, dtype=torch.float32).to(device)
    weight, bias = (p.to(device) for p in parameters(8, torch.float32, True))
    for wanted in ((weight,), (bias,), (weight, bias)):
        leaves = {id(w): w.clone().requires_grad_() for w in wanted}
        layer_norm(x, leaves.get(id(weight), weight), leaves.get(id(bias), bias)).square().sum().backward()
        assert all(leaf.grad.abs().sum() > 0 for leaf in leaves.values())


def test_the_output_changed_in_place_is_reported(device):
    x = random(3, 8, dtype=torch.float32).to(device).requires_grad_()
    y = layer_norm(x)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_is_kept_without_a_graph(device):
    x = random(6, 8, dtype=torch.float32).to(device)
    weight = torch.ones(8, device=device)
    assert memory.account(lambda: layer_norm(x, weight)).nbytes == 0
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        assert memory.account(lambda: layer_norm(leaf, weight)).nbytes == 0
    with torch.inference_mode():
        assert_same_bits(layer_norm(leaf, weight).clone(), layer_norm(x, weight).clone(), "inference")
    assert memory.account(lambda: layer_norm(leaf)).nbytes == 6 * (8 + 1) * 4  # the output and 1/std


@pytest.mark.parametrize("from_input", [False, True], ids=["output", "input"])
def test_checkpoint(from_input, device):
    x, gradient = random(6, 32, dtype=torch.float32), random(6, 32, dtype=torch.float32, seed=3)
    affine = [p.to(device) for p in parameters(32, torch.float32, True)]
    function = partial(layer_norm, from_input=from_input)

    def checkpointed(*tensors: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)

    for a, b in zip(
        results(function, x.to(device), affine, gradient.to(device)),
        results(checkpointed, x.to(device), affine, gradient.to(device)),
        strict=True,
    ):
        assert_same_bits(a, b, "checkpoint")


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_break(kind, device):
    x, gradient = (random(6, 32, dtype=torch.bfloat16, seed=s).to(device) for s in (0, 3))
    affine = [p.to(device) for p in parameters(32, torch.bfloat16, KINDS[kind])]
    function = partial(norm, eps=1e-5, centered=KINDS[kind])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(function, x, affine, gradient), results(compiled, x, affine, gradient), strict=True):
        assert_same_bits(a, b, "compiled")
    torch.compiler.reset()


def test_opcheck_with_gradients(device):
    for x, weight, bias, *rest in SAMPLES["norm"](device)[:3]:
        leaves = [None if t is None else t.requires_grad_() for t in (x, weight, bias)]
        torch.library.opcheck(torch.ops.pyzo.norm.default, (*leaves, *rest))


def test_errors(device):
    x = torch.zeros(3, 8, device=device)
    with pytest.raises(TypeError, match=r"x: expected a tensor of float32, .* got int64"):
        layer_norm(x.long())
    with pytest.raises(TypeError, match=r"weight: expected a tensor of .* got int32"):
        layer_norm(x, x[0].int())
    with pytest.raises(RuntimeError, match=r"weight: expected a contiguous tensor of 8 elements .* got Float\[7\]"):
        layer_norm(x, x[0, :7])
    with pytest.raises(RuntimeError, match=r"bias: expected a contiguous tensor of 8 elements .* got Float\[1, 8\]"):
        layer_norm(x, x[0], x[:1])
    with pytest.raises(RuntimeError, match=r"weight: expected Float, BFloat16 or Half, .* got Double"):
        layer_norm(x, x[0].double())
    with pytest.raises(RuntimeError, match=r"dtype: expected Float, BFloat16 or Half, .* got Int"):
        layer_norm(x, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"dtype: expected Double, .* got Float"):
        norm(torch.zeros(3, 8, dtype=torch.float64), eps=1e-5, centered=True, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="eps: expected a finite number >= 0, got -1"):
        norm(x, eps=-1.0, centered=True)
    with pytest.raises(RuntimeError, match=r"x: expected a last dimension from 1 to 2\^30, got Float\[\]"):
        layer_norm(x[0, 0])
    with pytest.raises(RuntimeError, match=r"x: expected a last dimension from 1 to 2\^30, got Float\[3, 0\]"):
        layer_norm(x[:, :0])


def test_errors_of_the_backward_operator(device):
    x, rows = torch.zeros(3, 8, device=device), torch.zeros(3, device=device)
    backward = torch.ops.pyzo.norm_backward
    rest = (None, None, True, 0.0)
    with pytest.raises(RuntimeError, match=r"saved: expected a contiguous tensor of Float .* got BFloat16"):
        backward(x, x.bfloat16(), rows, *rest, False, torch.float32, False, False)
    with pytest.raises(RuntimeError, match=r"saved: expected a contiguous tensor of Half .* got Float"):
        backward(x, x, rows, *rest, True, torch.float16, False, False)
    with pytest.raises(RuntimeError, match=r"rstd: expected a contiguous tensor of 3 elements of Float"):
        backward(x, x, rows[:2], *rest, False, torch.float32, False, False)
    with pytest.raises(RuntimeError, match="weight: expected a tensor where its gradient is wanted"):
        backward(x, x, rows, *rest, False, torch.float32, True, False)
    with pytest.raises(RuntimeError, match="bias: expected a tensor where its gradient is wanted"):
        backward(x, x, rows, *rest, False, torch.float32, False, True)
