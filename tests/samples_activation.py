"""Arguments of the operators of activations for the registry's tests."""

from collections.abc import Callable

import torch
from torch import Tensor

EXACT = True  # the reference has the bits of every operator here
THRESHOLDS, SLOPES = [-3.0, 0.0, 1.5], [0.0, -0.25, 1.125, 1.0]
SHAPES = (((3, 37), torch.float32), ((65,), torch.bfloat16), ((2, 2, 9), torch.float16), ((0, 4), torch.float32))


def numbers(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, seed: int, graph: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4
    return x.to(device, dtype).requires_grad_(graph)


def _codes(shape: tuple[int, ...], bits: int, device: str) -> Tensor:
    count = (torch.Size(shape).numel() * bits + 7) // 8
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(3)).to(device, torch.uint8)


def _each(build: Callable[[tuple[int, ...], torch.dtype, str, int], tuple]) -> Callable[[str], list[tuple]]:
    """Samples over shapes, dtypes and functions."""
    return lambda device: [build(*SHAPES[f % len(SHAPES)], device, f) for f in range(9)]


def _backward(shape: tuple[int, ...], dtype: torch.dtype, device: str, f: int) -> tuple[Tensor, Tensor, int]:
    return numbers(shape, dtype, device, seed=f), numbers(shape, dtype, device, seed=f + 20), f


SAMPLES: dict[str, Callable[[str], list[tuple]]] = {
    "activation": _each(lambda shape, dtype, device, f: (numbers(shape, dtype, device, seed=f, graph=True), f)),
    "activation_backward": _each(_backward),
    "activation_backward_": _each(_backward),
    "coded_activation": _each(
        lambda shape, dtype, device, f: (
            numbers(shape, dtype, device, seed=f, graph=True),
            f,
            THRESHOLDS[: 1 + 2 * (f % 2)],
            SLOPES[: 2 + 2 * (f % 2)],
        )
    ),
    "coded_activation_backward": lambda device: [
        (numbers(shape, dtype, device, seed=bits), _codes(shape, bits, device), [0.5 * k for k in range(2**bits)])
        for shape, dtype in SHAPES
        for bits in (1, 2, 3, 4)
    ],
    "output_activation": _each(lambda shape, dtype, device, f: (numbers(shape, dtype, device, seed=f, graph=True), f)),
    "output_activation_backward": _each(
        lambda shape, dtype, device, f: (
            numbers(shape, dtype, device, seed=f),
            numbers(shape, dtype, device, seed=f + 20),
            _codes(shape, 1, device),
            f,
        )
    ),
}
