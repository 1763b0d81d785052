"""LoRA linears: the eager formula with the operator's mask, what is saved, and what casts, compiles or recomputes."""

import math

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pyzo import ops
from pyzo.memory import account
from pyzo.nn.lora import LoRALinear

TOKENS, IN, OUT, RANK, SCALE = 48, 40, 56, 4, 2.0
NAMES = ("x", "weight", "bias", "a", "b")


def tensors(
    dtype: torch.dtype = torch.float32, device: str = "cpu", shape: tuple[int, ...] = (TOKENS,)
) -> list[Tensor]:
    """x, weight, bias, a, b, all with gradients."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((*shape, IN), (OUT, IN), (OUT,), (RANK, IN), (OUT, RANK))
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) / math.sqrt(s[-1]) for s in shapes]
    return [t.to(device, dtype).requires_grad_() for t in drawn]


def eager(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, p: float, seed: Tensor) -> Tensor:
    """As PEFT computes it, but with the mask of pyzo's operator."""
    return functional.linear(x, weight, bias) + SCALE * functional.linear(
        functional.linear(ops.dropout(x, p, seed), a), b
    )


def ours(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, p: float, seed: Tensor) -> Tensor:
    return ops.lora_linear(x, weight, bias, a, b, SCALE, p, seed)


def outcome(run, arguments: list[Tensor], p: float, seed: Tensor) -> list[Tensor]:
    """The output and the gradients of all arguments."""
    y = run(*arguments, p, seed)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)
    return [y, *torch.autograd.grad(y, arguments, gradient)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_values_and_gradients_are_those_of_the_eager_formula(dtype, p, device):
    """Against fp64 no further off than twice torch's own error."""
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 is for the CPU")
    seed, arguments = torch.tensor([5], device=device), tensors(dtype, device, (3, 16))
    # dropout in fp64 of the same numbers has the same mask
    exact = outcome(eager, [t.detach().double().cpu().requires_grad_() for t in arguments], p, seed.cpu())
    for name, e, by_eager, got in zip(
        ("y", *NAMES), exact, outcome(eager, arguments, p, seed), outcome(ours, arguments, p, seed), strict=True
    ):
        assert got.dtype == dtype and got.shape == by_eager.shape
        assert (got.cpu() - e).norm() <= 2 * (by_eager.cpu() - e).norm() + 1e-14 * e.norm(), name


def test_gradcheck():
    seed = torch.tensor([2])
    drawn = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 6), (5, 6), (5,), (2, 6), (5, 2))]
    x, weight, _, a, b = drawn
    for p in (0.0, 0.4):
        assert torch.autograd.gradcheck(lambda *t, p=p: ours(*t, p, seed), drawn)
    assert torch.autograd.gradcheck(lambda x, w, a, b: ours(x, w, None, a, b, 0.4, seed), (x, weight, a, b))


@pytest.mark.parametrize("wanted", range(1, 32))
def test_only_the_gradients_that_are_asked_for(wanted):
    """Any set of tensors may be frozen; the other gradients keep their bits."""
    seed, arguments = torch.tensor([5]), tensors()
    full = outcome(ours, arguments, 0.25, seed)[1:]
    chosen = [i for i in range(5) if wanted >> i & 1]
    some = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(arguments)]
    y = ours(*some, 0.25, seed)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    for i, got in zip(chosen, torch.autograd.grad(y, [some[i] for i in chosen], gradient), strict=True):
        assert_same_bits(got, full[i], NAMES[i])


def saved_bytes(frozen: str, p: float) -> int:
    """What a call keeps besides its parameters; x is inside a graph, or frozen too."""
    drawn = dict(zip(NAMES, tensors(), strict=True))
    x = drawn.pop("x")
    x = x.detach() if "x" in frozen.split() else x * 1
    parameters = nn.ParameterDict({n: nn.Parameter(t.detach(), n not in frozen.split()) for n, t in drawn.items()})
    return account(lambda: ops.lora_linear(x, **parameters, scale=SCALE, p=p), parameters).nbytes


X, T, SEED = 4 * TOKENS * IN, 4 * TOKENS * RANK, 8


@pytest.mark.parametrize(
    ("frozen", "p", "nbytes"),
    [
        ("weight bias", 0.1, X + T + SEED),
        ("weight bias", 0.0, X + T),
        ("", 0.1, X + T + SEED),
        ("x weight bias", 0.1, X + T + SEED),
        ("x weight bias", 0.0, X + T),
        ("weight bias b", 0.1, X + SEED),
        ("weight bias a", 0.1, T + SEED),
        ("weight bias a b", 0.1, SEED),
        ("x weight a", 0.1, T),
        ("x weight a b", 0.1, 0),
    ],
)
def test_what_is_saved_is_what_gradients_need(frozen, p, nbytes):
    assert saved_bytes(frozen, p) == nbytes


def layers(count: int, dropout: float, dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    torch.manual_seed(0)
    made = nn.ModuleList(LoRALinear(nn.Linear(IN, OUT, dtype=dtype), RANK, 8, dropout) for _ in range(count))
    for layer in made:
        nn.init.normal_(layer.lora_B.weight)
    return made


def hidden(dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor inside a graph that saves nothing itself."""
    torch.manual_seed(1)
    return torch.randn(TOKENS, IN, dtype=dtype, requires_grad=True) * 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_layers_on_one_input_keep_it_once(dtype):
    model, x = layers(3, 0.1), hidden(dtype)
    kept = account(lambda: [layer(x) for layer in model], model)
    unit, t = x.nbytes, TOKENS * RANK * x.element_size()
    assert kept.nbytes == unit + 3 * (t + SEED)
    assert [s.modules for s in kept.saved if s.nbytes == unit] == [("0", "1", "2")]


def test_saved_bytes_beside_the_eager_layer():
    """Dropout, then A, then B, beside a frozen base: mask (of x's dtype on the CPU), dropped copy, t."""
    (layer,), x = layers(1, 0.1), hidden()
    drop = nn.Dropout(0.1)
    plain = account(lambda: layer.base(x) + 2.0 * layer.lora_B(layer.lora_A(drop(x))), layer)
    assert account(lambda: layer(x), layer).nbytes == X + T + SEED
    assert plain.nbytes >= 1.25 * X + T  # where masks are bool; 2 X + T with torch 2.13


def test_compiled_layers_save_no_copy_either():
    """Also where the compiler chooses what to save (the partition that its default backend uses)."""
    model, x = layers(3, 0.1), hidden()
    run = torch.compile(lambda x: [layer(x) for layer in model], fullgraph=True, backend="aot_eager_decomp_partition")
    kept = account(lambda: run(x), model)
    torch.compiler.reset()
    assert kept.nbytes <= X + 3 * (T + SEED)


def test_without_a_graph_nothing_is_saved():
    (layer,), x = layers(1, 0.1), hidden()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            kept = account(lambda: layer(x), layer)
        assert kept.nbytes == 0 and not kept.result.requires_grad


def trained(run, layer: LoRALinear, x: Tensor) -> list[Tensor]:
    torch.manual_seed(9)
    y = run(x)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters]), torch.rand(2)]


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_recomputes_the_same_mask(autocast):
    (layer,), x = layers(1, 0.3), hidden()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = trained(layer, layer, x)
        again = trained(lambda x: checkpoint(layer, x, use_reentrant=False), layer, x)
    for a, b in zip(plain, again, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole_and_draws_as_eager_does(autocast):
    (layer,), x = layers(1, 0.3), hidden()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = trained(layer, layer, x)
        compiled = trained(torch.compile(layer, fullgraph=True, backend="aot_eager"), layer, x)
    torch.compiler.reset()
    for a, b in zip(plain, compiled, strict=True):
        assert_same_bits(a, b)


def test_autocast_computes_in_its_dtype_and_saves_no_cast_copy():
    """fp32 x, base and adapters; gradients come in fp32, with the error of bf16 arithmetic."""
    arguments, seed = tensors(), torch.tensor([5])
    exact = outcome(eager, [t.detach().double().requires_grad_() for t in arguments], 0.25, seed)
    with torch.autocast("cpu", torch.bfloat16):
        by_eager = outcome(eager, arguments, 0.25, seed)
        got = outcome(ours, arguments, 0.25, seed)
        x = hidden()
        (layer,) = layers(1, 0.1)
        assert account(lambda: layer(x), layer).nbytes == X + T // 2 + SEED  # x as it came, t in bf16
    assert got[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in got[1:])
    for name, e, plain, g in zip(("y", *NAMES), exact, by_eager, got, strict=True):
        assert (g - e).norm() <= 2 * (plain - e).norm(), name


def test_backward_under_autocast_computes_as_forward_did():
    """Where only backward runs inside the region, everything stays float32."""
    arguments, seed = tensors(), torch.tensor([5])
    want = outcome(ours, arguments, 0.25, seed)
    y = ours(*arguments, 0.25, seed)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, arguments, gradient)
    for g, w in zip(got, want[1:], strict=True):
        assert_same_bits(g, w)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(*tensors(torch.float64), 0.25, torch.tensor([5])).dtype == torch.float64


def test_fp32_adapters_on_a_16_bit_base():
    (layer,), x = layers(1, 0.25, torch.bfloat16), hidden(torch.bfloat16)
    assert layer.base.weight.dtype == torch.bfloat16 and layer.lora_A.weight.dtype == torch.float32
    y, of_x, of_a, of_b, _ = trained(layer, layer, x)
    assert (y.dtype, of_x.dtype, of_a.dtype, of_b.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2


def test_a_layer_is_the_eager_formula_with_the_mask_of_its_seed():
    (layer,), x = layers(1, 0.25), hidden()
    torch.manual_seed(6)
    y = layer(x)
    torch.manual_seed(6)
    dropped = ops.dropout(x, 0.25)
    torch.testing.assert_close(y, layer.base(x) + 2.0 * layer.lora_B(layer.lora_A(dropped)))


def test_evaluation_and_dropout_0_draw_nothing():
    (layer,), x, state = layers(1, 0.5), hidden(), torch.get_rng_state()
    state = torch.get_rng_state()
    want = layer.base(x) + 2.0 * layer.lora_B(layer.lora_A(x))
    torch.testing.assert_close(layer.eval()(x), want)
    layer.train().dropout = 0.0
    torch.testing.assert_close(layer(x), want)
    assert torch.equal(torch.get_rng_state(), state)
    layer.dropout = 0.5
    assert not torch.equal(layer(x), layer(x))


def test_a_new_layer_computes_what_its_base_does():
    base = nn.Linear(IN, OUT)
    layer, x = LoRALinear(base, 8, dropout=0.5), hidden()
    torch.testing.assert_close(layer(x), base(x))
    assert layer.scaling == 1.0 and LoRALinear(base, 8, alpha=16).scaling == 2.0
    assert {n: tuple(p.shape) for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.weight": (8, IN),
        "lora_B.weight": (OUT, 8),
    }
    assert list(layer.state_dict()) == ["base.weight", "base.bias", "lora_A.weight", "lora_B.weight"]
    assert not base.weight.requires_grad and not base.bias.requires_grad
    bound = 1 / math.sqrt(IN)  # kaiming_uniform with a = sqrt(5)
    a = layer.lora_A.weight.detach()
    assert a.abs().max() <= bound and abs(a.std().item() - bound / math.sqrt(3)) < 5 * bound / math.sqrt(a.numel())


def test_layout_and_empty_inputs():
    seed = torch.tensor([5])
    x, *rest = tensors(shape=(4, 12))
    want = outcome(ours, [x, *rest], 0.25, seed)
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for got, w in zip(outcome(ours, [turned, *rest], 0.25, seed), want, strict=True):
        assert_same_bits(got, w)
    one = tensors(shape=())
    assert outcome(ours, one, 0.25, seed)[0].shape == (OUT,)
    for got in outcome(ours, tensors(shape=(0,)), 0.25, seed)[2:]:
        assert torch.equal(got, torch.zeros_like(got))


def test_double_backward_is_refused():
    arguments = tensors()
    y = ours(*arguments, 0.25, torch.tensor([5]))
    (gradient,) = torch.autograd.grad(y.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"pyzo::lora_linear_backward has no derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.ones(3, IN + 1)},
            ValueError,
            rf"x: expected \[\.\.\., {IN}\], as weight is .*got \[3, {IN + 1}\]",
        ),
        ({"weight": torch.ones(OUT)}, ValueError, r"weight: expected a matrix \[out, in\], got"),
        ({"bias": torch.ones(OUT + 1)}, ValueError, rf"bias: expected \[{OUT}\], as weight is"),
        ({"a": torch.ones(RANK, IN + 1)}, ValueError, rf"a: expected \[r, {IN}\], as weight is"),
        ({"b": torch.ones(OUT, RANK + 1)}, ValueError, rf"b: expected \[{OUT}, {RANK}\], as weight and a say"),
        ({"x": torch.ones(3, IN, dtype=torch.int64)}, TypeError, "x: expected a tensor of float32"),
        ({"weight": torch.ones(OUT, IN, dtype=torch.int8)}, TypeError, "weight: expected a tensor of float32"),
        ({"b": torch.ones(OUT, RANK, device="meta")}, ValueError, "b: expected a tensor on cpu, as x, got meta"),
        ({"p": 1.0}, ValueError, "p: expected a number in"),
        ({"seed": torch.ones(1)}, RuntimeError, "seed: expected an int64 tensor"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {**dict(zip(NAMES, tensors(), strict=True)), "scale": 1.0, "p": 0.5, "seed": torch.tensor([1])}
    with pytest.raises(error, match=message):
        ops.lora_linear(**{**arguments, **change})


class Doubled(nn.Linear):
    """Computes something else than its weight says, which an adapter around the weight would lose."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def quantised() -> nn.Linear:
    linear = nn.Linear(3, 3)
    linear.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Doubled(3, 3), 4), TypeError, "base: expected a torch.nn.Linear, or a subclass with its forward, got Double"),
        ((quantised(), 4), TypeError, "base.weight: expected a tensor of float32, .* got int8"),
        ((nn.Identity(), 4), TypeError, "base: expected a torch.nn.Linear, .*, got Identity"),
        ((nn.Linear(3, 3), 0), ValueError, "r: expected an integer >= 1, got 0"),
        ((nn.Linear(3, 3), 1.5), ValueError, "r: expected an integer >= 1, got 1.5"),
        ((nn.Linear(3, 3), 4, None, 1.0), ValueError, "p: expected a number in"),
    ],
)
def test_bad_layers(arguments, error, message):
    with pytest.raises(error, match=message):
        LoRALinear(*arguments)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(p, device):
    x, weight, bias, a, b = tensors(device=device, shape=(2, 3))
    seed = torch.tensor([7], device=device) if p else None
    for arguments in (
        (x, weight, bias, a, b, seed, 2.0, p, torch.float32),
        (x, weight.detach(), None, a, b, seed, 2.0, p, torch.bfloat16),
    ):
        torch.library.opcheck(torch.ops.pyzo.lora_linear.default, arguments)
    y, t = torch.ops.pyzo.lora_linear(*arguments)
    gradient = torch.randn_like(y).detach()
    saved = (x.detach(), weight.detach(), a.detach(), b.detach(), t.detach())
    for needs in ([True] * 5, [True, False, False, True, True]):
        torch.library.opcheck(torch.ops.pyzo.lora_linear_backward.default, (gradient, *saved, seed, 2.0, p, needs))
