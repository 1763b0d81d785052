"""Arguments of the operators of norms, for the tests of every operator."""

from collections.abc import Callable

import torch
from torch import Tensor

Arguments = tuple[object, ...]

# On the CPU the bits are the reference's too (tests/nn/test_norm_ops.py); on CUDA sums are taken in another order.
EXACT = False


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int, around: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * (0.2 if around else 1.0) + around).to(device, dtype)


def _norm(device: str) -> list[Arguments]:
    def sample(shape: tuple[int, ...], x: torch.dtype, y: torch.dtype, affine: str, centered: bool) -> Arguments:
        weight = _random(shape[-1:], x, device, 1, around=1.0) if "w" in affine else None
        bias = _random(shape[-1:], x, device, 2) if "b" in affine else None
        return (_random(shape, x, device, 3), weight, bias, 1e-5, centered, 0.5 if "o" in affine else 0.0, False, y)

    return [
        sample((3, 65), torch.float32, torch.float32, "wb", True),
        sample((2, 3, 32), torch.float32, torch.bfloat16, "w", False),
        sample((40, 7), torch.bfloat16, torch.bfloat16, "", True),
        sample((5, 100), torch.float16, torch.float16, "wo", False),
        sample((0, 9), torch.float32, torch.float32, "wb", True),
    ]


def _backward(device: str) -> list[Arguments]:
    def sample(
        shape: tuple[int, ...], x: torch.dtype, y: torch.dtype, affine: str, centered: bool, from_input: bool
    ) -> Arguments:
        weight = _random(shape[-1:], x, device, 1, around=1.0) if "w" in affine else None
        bias = _random(shape[-1:], x, device, 2) * 0.1 if "b" in affine else None
        rows = _random(shape[:-1], torch.float32, device, 4, around=1.0).reshape(-1)
        saved = _random(shape, x if from_input else y, device, 5)
        parameters = (weight, bias, centered, 0.5 if "o" in affine else 0.0)
        wanted = ("w" in affine, "b" in affine and not from_input)
        return (_random(shape, y, device, 3), saved, rows, *parameters, from_input, x, *wanted)

    return [
        sample((3, 65), torch.float32, torch.float32, "wb", True, False),
        sample((2, 50, 32), torch.float32, torch.bfloat16, "w", False, False),
        sample((40, 7), torch.bfloat16, torch.bfloat16, "", True, False),
        sample((70, 100), torch.float16, torch.float16, "wo", False, False),
        sample((3, 65), torch.float32, torch.float16, "wb", True, True),
        sample((3, 33), torch.bfloat16, torch.bfloat16, "", False, True),
        sample((0, 9), torch.float32, torch.float32, "wb", True, False),
    ]


SAMPLES: dict[str, Callable[[str], list[Arguments]]] = {"norm": _norm, "norm_backward": _backward}
