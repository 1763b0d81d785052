"""Attention that is computed again in backward: torch's bits, what it keeps, and where it is torch's own function."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pyzo import ops
from pyzo.memory import account

B, H, L, E = 4, 3, 17, 8
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# What is added to the scores: of all kinds that torch takes, trained and not.
MASKS: dict[str, Callable[["Case"], Tensor | None]] = {
    "none": lambda case: None,
    "bool": lambda case: case.window > -1,
    "constant": lambda case: case.window,
    "trained": lambda case: case.bias,
    "sum": lambda case: case.bias + case.window,
    "infinite": lambda case: torch.where(case.window > 0, case.bias, -torch.inf),
}


BOTH = (ops.attention, functional.scaled_dot_product_attention)


class Case:
    """Inputs of an attention; the first row of a mask lets nothing through."""

    def __init__(self, dtype: torch.dtype, heads: int = H) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, of: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(of)

        self.query = random(B, L, H, E, of=dtype).transpose(1, 2).requires_grad_()
        self.key, self.value = (random(B, L, heads, E, of=dtype).transpose(1, 2).requires_grad_() for _ in range(2))
        self.window = random(B, 1, L, L, of=dtype)
        self.window[:, :, 0] = -100
        self.bias = random(1, H, L, L, of=dtype).requires_grad_()
        self.parameters = (self.query, self.key, self.value, self.bias)

    def run(self, attend: Any, mask: str, **options: Any) -> tuple[Tensor, list[Tensor | None], Tensor]:
        """Result, gradients, and the state of torch's generator behind both."""
        torch.manual_seed(3)
        given = MASKS[mask](self)
        if mask == "sum" and attend is ops.attention:
            options["addends"] = (self.bias, self.window)
        result = attend(self.query, self.key, self.value, attn_mask=given, **options)
        torch.randn(5)  # whoever draws in between
        gradient = torch.linspace(-1, 1, result.numel()).view(result.shape).to(result.dtype)
        found = torch.autograd.grad(result, self.parameters, gradient, allow_unused=True)
        return result, list(found), torch.get_rng_state()


def seeded(function: Any, *args: Any) -> Any:
    torch.manual_seed(3)
    return function(*args)


def assert_same_run(case: Case, mask: str, **options: Any) -> None:
    got, want = (case.run(attend, mask, **options) for attend in BOTH)
    assert_same_bits(got[0], want[0], "result")
    assert torch.equal(got[2], want[2])
    for name, a, b in zip(("query", "key", "value", "bias"), got[1], want[1], strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert_same_bits(a, b, name)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_torchs(dtype, mask, p, autocast):
    case = Case(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_same_run(case, mask, dropout_p=p, scale=0.3)


@pytest.mark.parametrize("options", [{"is_causal": True, "dropout_p": 0.3}, {"scale": None, "dropout_p": 0.3}])
def test_options_are_torchs(options):
    assert_same_run(Case(torch.bfloat16), "none", **options)


def test_grouped_heads():
    assert_same_run(Case(torch.bfloat16, heads=1), "trained", enable_gqa=True)


def test_numbers_that_are_none():
    case = Case(torch.bfloat16)
    with torch.no_grad():
        case.query[0, 0, 3], case.key[1, 1, 2, 0] = torch.nan, torch.inf
    assert_same_run(case, "trained")


@pytest.mark.parametrize("name", ["query", "key", "value", "bias"])
def test_what_is_frozen_gets_no_gradient(name):
    case = Case(torch.bfloat16)
    getattr(case, name).requires_grad_(False)
    case.parameters = tuple(t for t in case.parameters if t.requires_grad)
    mask, options = ("trained", {}) if name != "bias" else ("constant", {"dropout_p": 0.3})
    got, want = (case.run(attend, mask, **options) for attend in BOTH)
    for a, b in zip(got[1], want[1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("mask", ["trained", "sum", "constant"])
def test_what_is_kept(mask):
    """Query, key and value, and of the mask what is smaller: itself, or what was added."""
    case = Case(torch.bfloat16)
    q, k, v = (2 * t for t in case.parameters[:3])
    options = {"addends": (case.bias, case.window)} if mask == "sum" else {}
    options["dropout_p"] = 0.0 if mask != "constant" else 0.3
    kept = account(lambda: ops.attention(q, k, v, MASKS[mask](case), **options))
    sizes = sorted(s.nbytes for s in kept.saved)
    window = {"trained": [], "sum": [2 * B * L * L], "constant": [2 * B * L * L]}[mask]  # leaves are not counted
    assert sizes == sorted([2 * B * H * L * E] * 3 + window)
    assert kept.nbytes < account(lambda: functional.scaled_dot_product_attention(q, k, v, case.bias)).nbytes / 2


def test_reasons():
    case = Case(torch.float32)
    q, k, v, bias = case.parameters
    reason = ops.attention_reason
    assert "has a kernel" in reason(q, k, v)
    assert "has a kernel" in reason(q, k, v, case.window)
    assert "half of what torch keeps" in reason(q, k, v, bias)
    low = [t.bfloat16() for t in (q, k, v, bias)]
    assert reason(*low) == "" == reason(q, k, v, dropout_p=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert reason(q, k, v, bias) == ""
    assert "nothing of it is trained" in reason(*(t.detach() for t in low))
    with torch.no_grad():
        assert "nothing of it is trained" in reason(*low)
    assert "no plain ones" in reason(*(t.to("meta") for t in low))


def test_whatever_kernels_are_on_in_backward():
    """Torch chooses by global flags, which are others by then."""
    case = Case(torch.bfloat16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        got, want = (f(*case.parameters[:3]) for f in BOTH)
    got, want = (torch.autograd.grad(y.sum(), case.parameters[:3]) for y in (got, want))
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def test_checkpointed():
    case = Case(torch.bfloat16)

    def attend(*inputs: Tensor) -> Tensor:
        return checkpoint(lambda q, k, v, m: ops.attention(q, k, v, m, 0.3), *inputs, use_reentrant=False)

    torch.manual_seed(0)
    want = torch.autograd.grad(ops.attention(*case.parameters, 0.3).sum(), case.parameters)
    torch.manual_seed(0)
    got = torch.autograd.grad(attend(*case.parameters).sum(), case.parameters)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def test_inputs_that_change_before_backward_are_an_error():
    case = Case(torch.bfloat16)
    q, k, v = (2 * t for t in case.parameters[:3])
    result = ops.attention(q, k, v, case.bias)
    k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_differentiated_twice():
    """As for a penalty on gradients."""
    found = []
    for attend in BOTH:
        case = Case(torch.float64)
        result = seeded(attend, *case.parameters, 0.3)
        first = torch.autograd.grad(result.square().sum(), case.parameters, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), case.parameters))
    assert ops.attention_reason(*case.parameters, 0.3) == ""
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))


def test_transforms_get_torchs_function():
    q, k, v, bias = (t.detach() for t in Case(torch.bfloat16).parameters)

    def gradient(attend: Any) -> Tensor:
        return torch.func.grad(lambda bias: attend(q, k, v, bias, 0.3).float().square().sum())(bias)

    got, want = (seeded(gradient, attend) for attend in BOTH)
    assert_same_bits(got, want)


def test_tangents_get_torchs_function():
    case = Case(torch.bfloat16)

    def tangent(attend: Any) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(case.query, torch.ones_like(case.query))
            return forward_ad.unpack_dual(attend(dual, case.key, case.value, case.bias)).tangent

    got, want = (tangent(attend) for attend in BOTH)
    assert_same_bits(got, want)


@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(sizes):
    batch, tokens, width = sizes
    q, k, v = (torch.zeros(batch, 1, tokens, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, 1, tokens, tokens, dtype=torch.bfloat16, requires_grad=True)
    got, want = (f(q, k, v, bias, scale=1.0) for f in BOTH)
    assert_same_bits(got, want)


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_mask": torch.zeros(5, 5, requires_grad=True)},
        {"key": torch.zeros(B, H, L, E + 1)},
        {"value": torch.zeros(B, H, L, E, dtype=torch.float64)},
        {"attn_mask": torch.zeros(L, L, requires_grad=True), "is_causal": True},
        {"dropout_p": 1.5},
    ],
)
def test_what_torch_refuses_is_refused(arguments):
    case = Case(torch.float32)
    given = {"query": case.query, "key": case.key, "value": case.value, **arguments}
    for attend in BOTH:
        with pytest.raises(RuntimeError):
            attend(**given)
