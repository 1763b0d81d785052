"""Seeded dropout: its bits, its statistics, what it saves, and whatever recomputes or rewinds it."""

import math

import pytest
import torch
from bits import assert_same_bits, weights
from samples_dropout import SAMPLES
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pyzo import ops, reference
from pyzo.memory import account
from pyzo.nn.dropout import SeededDropout
from pyzo.ops.dropouts import new_seed
from pyzo.optim import ZOSGD

LOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = (0, 1, -1, 0x0123456789ABCDEF, -(2**63))
FROZEN = ["a388eae95766f92e", "1760a10f1a718617"]
SIZES = (1, 7, 8, 63, 65, 1023, 1024, 1025, 3001)


def seed_of(value: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([value], device=device)


def kept(n: int, seed: int, p: float) -> torch.Tensor:
    return ops.dropout(torch.ones(n), p, seed_of(seed)) != 0


@pytest.mark.parametrize("dtype", [*LOW_DTYPES, torch.float64])
def test_bits_are_the_reference_s_on_every_instruction_set(dtype, isa):
    for i, n in enumerate(SIZES):
        x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
        for p in (0.1, 0.5, 1 - 2.0**-16):
            seed = seed_of(SEEDS[i % len(SEEDS)])
            assert_same_bits(ops.dropout(x, p, seed), reference.dropout(x, seed, p), f"{n} elements, p {p}")


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_bits_are_the_reference_s_on_every_device(dtype, device):
    for n in (*SIZES, 100_003):
        x = weights(n, dtype, seed=n, special=False)
        got = ops.dropout(x.to(device), 0.3, seed_of(n, device))
        assert_same_bits(got.cpu(), reference.dropout(x, seed_of(n), 0.3), f"{n} elements")


def test_mask_is_frozen_with_the_noise_version():
    """Of seed 0 and of a seed with both words, at p = 1/2: element k is bit k."""
    masks = [sum(int(bit) << k for k, bit in enumerate(kept(64, seed, 0.5))) for seed in (0, 0x0123456789ABCDEF)]
    assert [f"{mask:016x}" for mask in masks] == FROZEN


def test_stream_is_laid_out_as_that_of_masks_and_apart_from_it():
    n = 1 << 16
    index = torch.arange(n)
    drawn = reference.random_bits(5, 0, reference.DROPOUT_STREAM, index)
    assert torch.equal(kept(n, 5, 0.25), drawn < 49152)
    of_masks = reference.random_bits(5, 0, reference.MASK_STREAM, index)
    agree = ((drawn < 32768) == (of_masks < 32768)).sum().item()
    assert abs(agree - n / 2) < 5 * math.sqrt(n / 4)


def test_bits_do_not_depend_on_threads(threads):
    x = torch.randn(200_001)
    assert_same_bits(ops.dropout(x, 0.4, seed_of(3)), reference.dropout(x, seed_of(3), 0.4))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_kept_elements(p):
    """In all, at each place of a counter's eight, and of pairs at several distances, within 5 sigma."""
    n, keep = 1 << 20, round((1 - p) * 65536) / 65536
    k = kept(n, 11, p)

    def check(hits: torch.Tensor, probability: float) -> None:
        sigma = math.sqrt(hits.numel() * probability * (1 - probability))
        assert abs(hits.sum().item() - hits.numel() * probability) < 5 * sigma

    check(k, keep)
    for place in range(8):
        check(k[place::8], keep)
    for distance in (1, 2, 7, 8, 64, 1024):
        first, second = k[:-distance], k[distance:]  # pairs overlap: each is counted in one of two disjoint halves
        halves = torch.arange(n - distance) // distance % 2 == 0
        for half in (halves, ~halves):
            check((first & second)[half], keep * keep)


def test_masks_of_different_seeds_are_independent():
    n = 1 << 18
    masks = [kept(n, seed, 0.5) for seed in (1, 2, 3, 1 << 32, -1)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).sum().item() - n / 2) < 5 * math.sqrt(n / 4)


@pytest.mark.parametrize("p", [0.1, 0.37, 0.9, 2.0**-16])
def test_mean_is_preserved(p):
    """What is kept is scaled by 2^16 / keep to rounding; sums over many masks stay within 5 sigma of the input's."""
    keep = round((1 - p) * 65536) / 65536
    x = torch.linspace(0.5, 1.5, 1000, dtype=torch.float64)
    repeats = 300
    total = sum(ops.dropout(x, p, seed_of(s)) for s in range(repeats)) / repeats
    sigma = x.norm().item() * math.sqrt((1 / keep - 1) / repeats)
    assert abs((total - x).sum().item()) < 5 * sigma
    ones = ops.dropout(torch.ones(1000), p, seed_of(0))
    scale = torch.tensor(1 / keep).item()
    assert set(ones.tolist()) <= {0.0, scale} and abs(scale * keep - 1) <= 2.0**-24


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_error_is_at_most_that_of_torch_s_formula(dtype):
    x, p = torch.randn(4096, generator=torch.Generator().manual_seed(2)).to(dtype), 0.25
    mask = kept(4096, 9, p)
    exact = x.double() * mask / (1 - p)
    eager = x * (mask.to(dtype) / (1 - p))  # as F.dropout on the CPU: the scaled mask in x's dtype, then the product
    error = (ops.dropout(x, p, seed_of(9)).double() - exact).abs().max()
    assert error <= 2 * (eager.double() - exact).abs().max() and error > 0


def test_p_is_resolved_to_16_bits():
    x = torch.randn(70_000)
    state = torch.get_rng_state()
    for p in (0, 0.0, 2.0**-17, 1e-6):
        assert ops.dropout(x, p) is x
        assert_same_bits(torch.ops.pyzo.dropout(x, seed_of(1), p), x)
    assert torch.equal(torch.get_rng_state(), state)
    dropped = (ops.dropout(torch.ones(1 << 20), 2.0**-16, seed_of(1)) == 0).sum().item()
    assert abs(dropped - 16) < 5 * 4


@pytest.mark.parametrize("p", [1, 1.0, 1 - 2.0**-17, 1.5, -0.1, math.nan, math.inf, "0.5", None, True])
def test_bad_probabilities(p):
    with pytest.raises(ValueError, match=r"p: expected a number in \[0, 1 - 2\^-17\), got"):
        ops.dropout(torch.ones(3), p)
    with pytest.raises(ValueError, match="p: expected a number in"):
        SeededDropout(p)


@pytest.mark.parametrize("p", [1.0, 1 - 2.0**-17, -0.1, math.nan, math.inf])
def test_bad_probabilities_of_the_operator(p):
    with pytest.raises(RuntimeError, match=r"p: expected a number in \[0, 1 - 2\^-17\), got"):
        torch.ops.pyzo.dropout(torch.ones(3), seed_of(1), p)


@pytest.mark.parametrize(
    "seed", [torch.zeros(1), torch.zeros(2, dtype=torch.int64), torch.tensor(3), torch.zeros(1, dtype=torch.int32)]
)
def test_bad_seeds(seed):
    with pytest.raises(RuntimeError, match=r"seed: expected an int64 tensor \[1\] on the device of x, .*got"):
        ops.dropout(torch.ones(3), 0.5, seed)


def test_bad_inputs():
    with pytest.raises(TypeError, match="x: expected a tensor of float32, bfloat16, float16, float64, got int64"):
        ops.dropout(torch.ones(3, dtype=torch.int64), 0.5)
    with pytest.raises(RuntimeError, match="x: expected a contiguous tensor, got"):
        torch.ops.pyzo.dropout(torch.ones(4, 6).t(), seed_of(1), 0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_seed_on_another_device():
    with pytest.raises(RuntimeError, match="seed: expected an int64 tensor"):
        torch.ops.pyzo.dropout(torch.ones(3, device="cuda"), seed_of(1), 0.5)


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_layout_and_alignment_do_not_matter(dtype, device):
    """The logical, row-major order counts."""
    x = torch.randn(37, 53, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    seed = seed_of(8, device)
    want = ops.dropout(x, 0.5, seed)
    assert_same_bits(ops.dropout(x.t().contiguous().t(), 0.5, seed), want, "transposed")
    assert_same_bits(ops.dropout(x.view(-1), 0.5, seed).view(37, 53), want, "flat")
    room = torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:]
    assert_same_bits(ops.dropout(room.copy_(x.view(-1)), 0.5, seed).view(37, 53), want, "misaligned")
    images = torch.randn(2, 3, 5, 7, device=device).to(dtype)
    last = images.to(memory_format=torch.channels_last)
    assert_same_bits(ops.dropout(last, 0.5, seed), ops.dropout(images, 0.5, seed), "channels last")


@pytest.mark.parametrize("dtype", [*LOW_DTYPES, torch.float64])
def test_what_is_dropped_is_zero_whatever_it_was(dtype, isa):
    mask = kept(3000, 6, 0.5)
    for special in (math.nan, math.inf, -math.inf):
        y = ops.dropout(torch.full((3000,), special, dtype=dtype), 0.5, seed_of(6))
        assert_same_bits(y[~mask], torch.zeros_like(y[~mask]))
        assert torch.equal(y[mask].isnan() if math.isnan(special) else y[mask] == special, torch.ones_like(mask[mask]))


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_empty_and_scalar_shapes(shape, device):
    x = torch.ones(shape, device=device, requires_grad=True)
    y = ops.dropout(x, 0.5)
    assert y.shape == shape
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_same_bits(gradient, y)  # of ones


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_backward_is_the_same_operator(dtype, device):
    x = torch.randn(31, 65, device=device).to(dtype).requires_grad_()
    gradient, seed = torch.randn_like(x).t().contiguous().t(), seed_of(12, device)
    (got,) = torch.autograd.grad(ops.dropout(x, 0.2, seed), x, gradient)
    assert_same_bits(got, ops.dropout(gradient, 0.2, seed))


def test_gradcheck():
    x, seed = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), seed_of(3)
    assert torch.autograd.gradcheck(lambda x: ops.dropout(x, 0.3, seed), x)
    assert torch.autograd.gradgradcheck(lambda x: ops.dropout(x, 0.3, seed), x)


def test_double_backward_of_a_product_sees_the_same_mask():
    x, seed = torch.randn(500, requires_grad=True), seed_of(3)
    (first,) = torch.autograd.grad(ops.dropout(x, 0.3, seed).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    scale = ops.dropout(torch.ones(500), 0.3, seed)
    torch.testing.assert_close(second, 2 * scale * scale)


def test_only_a_seed_is_saved(device):
    x = torch.randn(64, 128, device=device, requires_grad=True)
    layer = SeededDropout(0.1)
    saved = account(lambda: layer(x)).saved
    assert [(s.shape, s.dtype, s.nbytes) for s in saved] == [((1,), torch.int64, 8)]
    assert account(lambda: nn.Dropout(0.1)(x)).nbytes >= x.numel()


def test_without_a_graph_nothing_is_saved():
    x = torch.randn(64, requires_grad=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            kept_here = account(lambda: ops.dropout(x, 0.5))
        assert kept_here.nbytes == 0 and not kept_here.result.requires_grad
    assert account(lambda: ops.dropout(x.detach(), 0.5)).nbytes == 0


def test_evaluation_and_p_0_are_the_identity():
    x, state = torch.randn(100), torch.get_rng_state()
    assert SeededDropout(0.5).eval()(x) is x
    assert SeededDropout(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_p_may_be_changed_later():
    layer, x = SeededDropout(), torch.ones(10_000)
    assert layer.p == 0.5 and repr(layer) == "SeededDropout(p=0.5)"
    layer.p = 0.9
    assert abs((layer(x) != 0).sum().item() - 1000) < 5 * math.sqrt(900)


def test_a_call_advances_torch_s_generator_by_one_seed(device):
    x = torch.ones(10_000, device=device)
    torch.manual_seed(5)
    seed = new_seed(x.device)
    after = torch.rand(3, device=device)
    torch.manual_seed(5)
    y = SeededDropout(0.5)(x)
    assert_same_bits(torch.rand(3, device=device), after)
    assert_same_bits(y, ops.dropout(x, 0.5, seed))
    assert 0 <= seed.item() < 2**63 - 1


def test_calls_differ_and_a_manual_seed_repeats_them():
    layer, x = SeededDropout(0.5), torch.ones(1000)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first) and torch.equal(layer(x), second)


class Block(nn.Module):
    """Two seeded dropouts, and two linears whose gradients depend on both masks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 24)
        self.drop, self.out = SeededDropout(0.3), SeededDropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.drop(functional.gelu(self.first(x)))))


def outcome(run, module: nn.Module, x: torch.Tensor, seed: int = 7) -> list[torch.Tensor]:
    """The output, its gradients, and what torch draws next."""
    torch.manual_seed(seed)
    y = run(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    return [y, *gradients, torch.rand(2)]


def test_checkpointing_recomputes_the_same_mask():
    block, x = Block(), torch.randn(10, 24, requires_grad=True)
    plain = outcome(block, block, x)
    again = outcome(lambda x: checkpoint(block, x, use_reentrant=False), block, x)
    for a, b in zip(plain, again, strict=True):
        assert_same_bits(a, b)


def test_compiles_whole_and_draws_as_eager_does():
    block, x = Block(), torch.randn(10, 24, requires_grad=True)
    plain = outcome(block, block, x)
    compiled = outcome(torch.compile(block, fullgraph=True, backend="aot_eager"), block, x)
    torch.compiler.reset()
    for a, b in zip(plain, compiled, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("sample", range(len(SAMPLES["dropout"]("cpu"))))
def test_opcheck(sample, device):
    torch.library.opcheck(torch.ops.pyzo.dropout.default, SAMPLES["dropout"](device)[sample])


def test_autocast_leaves_the_dtype(device):
    x = torch.randn(100, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.dropout(x, 0.5).dtype == torch.float32
        assert ops.dropout(x.bfloat16(), 0.5).dtype == torch.bfloat16


def test_the_forwards_of_a_zeroth_order_step_see_the_same_mask():
    layer, weight = SeededDropout(0.5), nn.Parameter(torch.ones(2000))
    opt, masks = ZOSGD([("w", weight)], lr=1e-3, eps=1e-3), []

    def closure() -> torch.Tensor:
        y = layer(weight)
        masks.append(y != 0)
        return y.sum()

    for _ in range(2):
        opt.step(closure)
    assert len(masks) == 4
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])
