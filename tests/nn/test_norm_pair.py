"""`ops.norm_pair`: a norm for residual and linears at once, whose backward works from the 16-bit copy."""

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor
from torch.nn import functional

from pyzo import ops
from pyzo.memory import account

SHAPE, LOW = (3, 5, 48), (torch.bfloat16, torch.float16)


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(SHAPE, generator=generator) + 1
    weight = 1 + 0.3 * torch.randn(SHAPE[-1], generator=generator)
    bias = 0.3 * torch.randn(SHAPE[-1], generator=generator)
    return tuple(t.requires_grad_() for t in (x, weight, bias))


def pair(x: Tensor, weight: Tensor | None, bias: Tensor | None, low: torch.dtype, **options: bool):
    return ops.norm_pair(x, weight, bias, eps=1e-5, centered=True, dtype=torch.float32, low=low, **options)


@pytest.mark.parametrize("low", LOW)
def test_values_are_those_of_the_norm_and_of_its_cast(low):
    x, weight, bias = tensors()
    y, cast = pair(x, weight, bias, low)
    want = ops.norm(x, weight, bias, eps=1e-5, centered=True)
    assert_same_bits(y, want)
    assert_same_bits(cast, want.to(low))


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("low", "bound"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_gradients_add_up(used, low, bound):
    """x̂ is off by the rounding of the copy, u of its size, and its product with a mean of g x̂ by as much; g is O(1)."""
    x, weight, bias = tensors()
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    y, cast = pair(x, weight, bias, low)
    results = [(t, g) for t, g, use in ((y, a, used[0]), (cast, b.to(low), used[1])) if use]
    got = torch.autograd.grad([t for t, _ in results], (x, weight, bias), [g for _, g in results])
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    true = functional.layer_norm(wide[0], SHAPE[-1:], wide[1], wide[2], 1e-5)
    want = torch.autograd.grad(true, wide, sum(g.double() for _, g in results))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        assert (g - w).norm() <= bound * w.norm()


def test_from_the_input_nothing_is_lost():
    x, weight, bias = tensors()
    y, _ = pair(x, weight, bias, torch.bfloat16, from_input=True)
    got = torch.autograd.grad(y.square().sum(), (x, weight, bias))
    want = torch.autograd.grad(
        functional.layer_norm(x, SHAPE[-1:], weight, bias, 1e-5).square().sum(), (x, weight, bias)
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def test_without_parameters_and_with_frozen_ones():
    x, weight, bias = tensors()
    y, cast = pair(x, None, None, torch.bfloat16)
    (y.sum() + cast.float().sum()).backward()
    assert x.grad.abs().max() < 0.1  # the sum of a normalised row does not move
    y, cast = pair(x, weight.detach(), bias, torch.bfloat16)
    (y.sum() + cast.float().sum()).backward()
    assert weight.grad is None
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 2 * SHAPE[0] * SHAPE[1]))


def test_keeps_the_copy_alone():
    x, weight, bias = tensors()
    kept = account(lambda: pair(x, weight, bias, torch.bfloat16))
    rows = SHAPE[0] * SHAPE[1]
    assert kept.nbytes == 2 * rows * SHAPE[2] + 4 * rows


def test_is_differentiated_once():
    x, weight, bias = tensors()
    y, _ = pair(x, weight, bias, torch.bfloat16)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"derivative|differentiated"):
        gradient.sum().backward()


def test_refuses_what_norms_refuse():
    x, weight, bias = tensors()
    with pytest.raises(TypeError, match="x: expected a tensor of"):
        pair(x.detach().long(), weight, bias, torch.bfloat16)
    with pytest.raises(RuntimeError, match="weight"):
        pair(x, weight[:3], bias, torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        ops.norm_pair(x, weight, bias, eps=1e-5, centered=True, dtype=torch.int32, low=torch.bfloat16)
