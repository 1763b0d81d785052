"""`account` against the paper's arithmetic of activation memory, and eager baselines on Hugging Face models.

LowMemoryBP (arXiv 2406.16282) counts in units of one [tokens, hidden] tensor of 16-bit numbers, without what is per
token only (statistics of norms and of softmax). Here every operator is an autograd.Function that saves what the paper
says it saves, and computes its gradient from that.
"""

import math

import pytest
import torch
from shapes import LLAMA_TOKENS, VIT_TOKENS, llama, run_llama, run_vit, units_per_layer, vit
from torch import Tensor, nn
from torch.autograd import Function

from pyzo.memory import Account, account

TOKENS, WIDTH = 64, 80
R = 2.7  # intermediate / hidden of LLaMA-13B: 13824 / 5120
INNER = 216  # R * WIDTH

# The paper's 2-bit codes: thresholds and slopes (its published constants).
CODES = {
    "gelu": ((-3.1858810036855245, -0.001178821281161997, 3.190832613414926), (0.0, -0.04922261, 1.04874063, 1.0)),
    "silu": ((-6.3050461001646445, -0.0008684942046214787, 6.325815242089708), (0.0, -0.04060357, 1.04032195, 1.0)),
}


def wide(x: Tensor) -> Tensor:
    """The number format of statistics: fp32, or fp64 where gradients are checked."""
    return x if x.dtype == torch.float64 else x.float()


class LinearOp(Function):
    """y = x W^T; keeps x [tokens, in]."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


def normalised_gradient(grad: Tensor, y: Tensor, rstd: Tensor, centred: bool) -> Tensor:
    """dx of y = (x - mean) * rstd from y and rstd alone: MS-LayerNorm; without mean MS-RMSNorm."""
    inner = grad - y * (grad * y).mean(-1, keepdim=True)
    return rstd * (inner - grad.mean(-1, keepdim=True) if centred else inner)


class InputNormOp(Function):
    """A norm without affine part that keeps its input in fp32 (a copy where x has 16 bits) and 1 / std."""

    @staticmethod
    def forward(ctx, x, centred, dtype):
        x = wide(x)
        centre = x - x.mean(-1, keepdim=True) if centred else x
        rstd = centre.square().mean(-1, keepdim=True).rsqrt()
        ctx.save_for_backward(x, rstd)
        ctx.centred = centred
        return (centre * rstd).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        x, rstd = ctx.saved_tensors
        y = (x - x.mean(-1, keepdim=True) if ctx.centred else x) * rstd
        return normalised_gradient(wide(grad), y, rstd, ctx.centred), None, None


class OutputNormOp(Function):
    """The same that keeps its output, which the next linear keeps too, and 1 / std."""

    @staticmethod
    def forward(ctx, x, centred, dtype):
        centre = wide(x) - wide(x).mean(-1, keepdim=True) if centred else wide(x)
        rstd = centre.square().mean(-1, keepdim=True).rsqrt()
        y = (centre * rstd).to(dtype)
        ctx.save_for_backward(y, rstd)
        ctx.centred = centred
        return y

    @staticmethod
    def backward(ctx, grad):
        y, rstd = ctx.saved_tensors
        return normalised_gradient(wide(grad), wide(y), rstd, ctx.centred), None, None


class AttentionOp(Function):
    """One head of FlashAttention: keeps q, k, v, the output, and the logarithm of each row's sum."""

    @staticmethod
    def forward(ctx, q, k, v):
        scores = wide(q) @ wide(k).t() / math.sqrt(q.shape[1])
        lse = scores.logsumexp(-1, keepdim=True)
        out = ((scores - lse).exp() @ wide(v)).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = (wide(t) for t in ctx.saved_tensors)
        grad, scale = wide(grad), 1 / math.sqrt(q.shape[1])
        p = (scale * q @ k.t() - lse).exp()
        ds = p * (grad @ v.t() - (grad * out).sum(-1, keepdim=True)) * scale
        return ds @ k, ds.t() @ q, p.t() @ grad


class ActivationOp(Function):
    """GELU or SiLU that keeps its input."""

    @staticmethod
    def forward(ctx, x, kind):
        ctx.save_for_backward(x)
        ctx.kind = kind
        return getattr(nn.functional, kind)(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if ctx.kind == "silu":
            s = x.sigmoid()
            return grad * (s + x * s * (1 - s)), None
        density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
        return grad * ((1 + (x / math.sqrt(2)).erf()) / 2 + x * density), None


class CodedActivationOp(Function):
    """ReGELU2 or ReSiLU2: keeps 2 bits per element, which of four slopes the derivative is taken as."""

    @staticmethod
    def forward(ctx, x, kind):
        thresholds, _ = CODES[kind]
        code = sum((x > c).to(torch.uint8) for c in thresholds).reshape(-1, 4)
        ctx.save_for_backward(code[:, 0] | code[:, 1] << 2 | code[:, 2] << 4 | code[:, 3] << 6)
        ctx.kind = kind
        return getattr(nn.functional, kind)(x)

    @staticmethod
    def backward(ctx, grad):
        (packed,) = ctx.saved_tensors
        code = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).reshape(grad.shape)
        return grad * torch.tensor(CODES[ctx.kind][1], dtype=grad.dtype)[code.long()], None


class ProductOp(Function):
    """The Hadamard product of a gated MLP: keeps both factors."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return grad * b, grad * a


class Op(nn.Module):
    """A Function with its constant arguments, as a module: accounts go by module."""

    def __init__(self, function: type[Function], *constants: object) -> None:
        super().__init__()
        self.function, self.constants = function, constants

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function.apply(*tensors, *self.constants)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, apart: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(outputs, inputs) / math.sqrt(inputs)).bfloat16())
        self.apart = apart  # keeps a copy of its input

    def forward(self, x: Tensor) -> Tensor:
        return LinearOp.apply(x.clone() if self.apart else x, self.weight)


class Block(nn.Module):
    """A unit model of a transformer block.

    Args:
        gated: LLaMA's (RMSNorm, SiLU and a product, 16-bit residual); else ViT's under autocast (LayerNorm, GELU, fp32
            residual).
        recipe: the paper's: norms that keep their output, 2-bit codes for the activation.
        apart: counts as the paper does, which gives the output projection an input of its own; it is the very tensor
            that attention keeps as its output.
    """

    def __init__(self, *, gated: bool, recipe: bool, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = INNER if gated else 4 * WIDTH
        norm = OutputNormOp if recipe else InputNormOp
        self.norms = nn.ModuleList(Op(norm, not gated, torch.bfloat16) for _ in range(2))
        self.q, self.k, self.v = (Linear(WIDTH, WIDTH) for _ in range(3))
        self.attention = Op(AttentionOp)
        self.proj = Linear(WIDTH, WIDTH, apart)
        self.gate = Linear(WIDTH, inner) if gated else None
        self.enter = Linear(WIDTH, inner)
        self.activation = Op(CodedActivationOp if recipe else ActivationOp, "silu" if gated else "gelu")
        self.product = Op(ProductOp)
        self.leave = Linear(inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.proj(self.attention(self.q(y), self.k(y), self.v(y)))
        y = self.norms[1](x)
        if self.gate is None:
            return x + self.leave(self.activation(self.enter(y)))
        return x + self.leave(self.product(self.activation(self.gate(y)), self.enter(y)))


def run(block: Block) -> Account:
    dtype = torch.float32 if block.gate is None else torch.bfloat16
    x = torch.randn(TOKENS, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return account(lambda: block(x.clone()), block)  # the clone is what a block before this one would have made


def units(kept: Account) -> float:
    """Without what is per token: 1 / std of two norms and the logarithms of one attention, in fp32."""
    statistics = [s.nbytes for s in kept.saved if s.shape == (TOKENS, 1)]
    assert statistics == [4 * TOKENS] * 3
    return (kept.nbytes - sum(statistics)) / (2 * TOKENS * WIDTH)


THEORY = [  # gated, apart, units, units with the recipe, percent saved
    (False, True, 19.0, 11.5, 39.47),
    (True, True, 21.8, 15.4375, 29.19),
    (False, False, 18.0, 10.5, 41.67),
    (True, False, 20.8, 14.4375, 30.59),
]


@pytest.mark.parametrize(("gated", "apart", "plain", "recipe", "percent"), THEORY)
def test_the_papers_totals(gated, apart, plain, recipe, percent):
    counted = [units(run(Block(gated=gated, recipe=r, apart=apart))) for r in (False, True)]
    assert counted == [plain, recipe]
    assert round(100 * (1 - counted[1] / counted[0]), 2) == percent


PARTS = {  # units, and the percentages of the paper's charts
    False: {"norms": (4, 21.05), "activation": (4, 21.05), "attention": (4, 21.05), "linear": (7, 36.84)},
    True: {
        "norms": (4, 18.35),
        "activation": (R, 12.39),
        "product": (2 * R, 24.77),
        "attention": (4, 18.35),
        "linear": (3 + R, 26.15),
    },
}


@pytest.mark.parametrize("gated", PARTS)
def test_the_papers_parts(gated):
    kept = run(Block(gated=gated, recipe=False, apart=True))
    parts: dict[str, int] = {}
    for s in kept.saved:
        name = s.modules[0].partition(".")[0]
        part = name if name in PARTS[True] else "linear"
        parts[part] = parts.get(part, 0) + s.nbytes * (s.shape != (TOKENS, 1))
    total = sum(parts.values())
    found = {part: (n / (2 * TOKENS * WIDTH), round(100 * n / total, 2)) for part, n in parts.items()}
    assert found.keys() == PARTS[gated].keys()
    for part, (number, percent) in PARTS[gated].items():
        assert found[part] == (pytest.approx(number, rel=1e-12), percent)


@pytest.mark.parametrize("gated", [False, True])
def test_the_recipe_shares_the_output_of_the_norm(gated):
    kept = run(Block(gated=gated, recipe=True, apart=False))
    shared = [s.modules for s in kept.saved if s.modules[0].startswith("norms") and s.shape == (TOKENS, WIDTH)]
    assert shared == [("norms.0", "q", "k", "v"), ("norms.1", "gate", "enter") if gated else ("norms.1", "enter")]


@pytest.mark.parametrize("recipe", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_what_is_counted_is_what_backward_needs(gated, recipe):
    block = Block(gated=gated, recipe=recipe, apart=False)
    run(block).result.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in block.parameters())


EXACT = {
    "linear": (LinearOp, [(5, 4), (3, 4)], ()),
    "layer norm, input": (InputNormOp, [(5, 4)], (True, torch.float64)),
    "rms norm, input": (InputNormOp, [(5, 4)], (False, torch.float64)),
    "layer norm, output": (OutputNormOp, [(5, 4)], (True, torch.float64)),
    "rms norm, output": (OutputNormOp, [(5, 4)], (False, torch.float64)),
    "attention": (AttentionOp, [(5, 4)] * 3, ()),
    "gelu": (ActivationOp, [(5, 4)], ("gelu",)),
    "silu": (ActivationOp, [(5, 4)], ("silu",)),
    "product": (ProductOp, [(5, 4)] * 2, ()),
}


@pytest.mark.parametrize("name", EXACT)
def test_gradients_of_the_unit_operators(name):
    function, shapes, constants = EXACT[name]
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(*s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *t: function.apply(*t, *constants), tensors)


@pytest.mark.parametrize("kind", CODES)
def test_the_code_picks_the_slope(kind):
    thresholds, slopes = CODES[kind]
    x = torch.tensor([-9.0, -1.0, 1.0, 9.0, thresholds[0], thresholds[1], thresholds[2], 0.0], dtype=torch.float64)
    x.requires_grad_()
    CodedActivationOp.apply(x, kind).sum().backward()
    assert x.grad.tolist() == [slopes[i] for i in (0, 1, 2, 3, 0, 1, 2, 2)]  # a threshold belongs below


BASELINES = {  # hidden states, MLP, attention and casts; row statistics come on top
    "llama, bf16": (llama, run_llama, LLAMA_TOKENS, 80, torch.bfloat16, 22.8),
    "vit, bf16": (vit, run_vit, VIT_TOKENS, 128, torch.bfloat16, 16.0),
    "vit, fp32 under autocast": (
        vit,
        lambda model, rows: run_vit(model, rows, autocast=torch.bfloat16),
        VIT_TOKENS,
        128,
        torch.float32,
        20.0,
    ),
}


@pytest.mark.parametrize("name", BASELINES)
def test_eager_baselines(name, one_thread):
    build, forward, tokens, hidden, dtype, expected = BASELINES[name]
    counted = units_per_layer(lambda layers: build(layers, dtype=dtype), forward, tokens=tokens, hidden=hidden)
    assert expected <= counted <= expected + 0.15
