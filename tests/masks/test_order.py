"""Order statistics of magnitudes without concatenating: against sorting, over chunks, dtypes, ties and NaN."""

import pytest
import torch

from pyzo.masks import order


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(order, "CHUNK", 64)


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(n, generator=generator) * scale for n, scale in ((1, 1.0), (200, 1e-30), (64, 1e30), (131, 1.0))
    ]
    return [*(t.to(dtype) for t in made), torch.zeros(0, dtype=dtype), torch.zeros(3, dtype=dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kth_smallest_is_that_of_the_sorted_magnitudes(dtype):
    """Subnormals, infinities (fp16 has them here) and zeros of both signs included."""
    given = tensors(dtype)
    ordered = torch.cat([t.float().abs() for t in given]).sort().values
    for k in (1, 2, 3, 4, 5, 100, 203, 204, 205, 398, len(ordered) - 1, len(ordered)):
        assert order.kth_smallest(given, k) == ordered[k - 1].item(), k


def test_ties_and_nan():
    given = [torch.tensor([2.0, -2.0, 2.0, float("nan"), -1.0])]
    assert [order.kth_smallest(given, k) for k in (1, 2, 3, 4)] == [1.0, 2.0, 2.0, 2.0]
    assert order.kth_smallest(given, 5) != order.kth_smallest(given, 5)  # NaN is the largest


@pytest.mark.parametrize("k", [0, -1, 6])
def test_bad_k(k):
    with pytest.raises(ValueError, match=r"k: expected an integer in \[1, 5\]"):
        order.kth_smallest([torch.ones(2), torch.ones(3)], k)


def test_strided_and_matrix_tensors_are_read_in_their_order():
    matrix = torch.randn(30, 20, generator=torch.Generator().manual_seed(1)).t()
    flat = matrix.reshape(-1)
    assert order.kth_smallest([matrix], 77) == flat.abs().sort().values[76].item()
    assert torch.equal(order.select(matrix, lambda x: x > 0.5), (flat > 0.5).nonzero().squeeze(1))
    assert order.count_at_most(matrix, 0.5) == int((flat.abs() <= 0.5).sum())


def test_counting_leaves_nan_out():
    assert order.count_at_most(torch.tensor([float("nan"), 1.0, -2.0]), 2.0) == 2
    assert order.count_at_most(torch.zeros(0), 1.0) == 0


def test_memory_is_a_chunk_and_not_the_model(monkeypatch):
    """The largest tensor that is made while looking for an order statistic does not grow with the tensors."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            if "split" not in str(func) and "view" not in str(func) and "detach" not in str(func):
                self.numel = max([self.numel, *(t.numel() for t in made)])
            return out

    given = [torch.randn(1 << 20)]
    monkeypatch.setattr(order, "CHUNK", 1 << 16)
    with Largest() as seen:
        order.kth_smallest(given, 1000)
        order.count_at_most(given[0], 1.0)
    assert seen.numel == 1 << 16
