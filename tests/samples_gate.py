"""Arguments of the operators of gates for the registry's tests."""

from collections.abc import Callable

import torch
from samples_activation import numbers
from torch import Tensor

EXACT = True  # the reference has the bits of every operator here
SHAPES = (((3, 37), torch.float32), ((65,), torch.bfloat16), ((2, 2, 9), torch.float16), ((0, 4), torch.float32))


def rows(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, seed: int, graph: bool = False) -> Tensor:
    """Numbers in rows that lie apart, as a half of a tensor does."""
    wide = numbers((*shape[:-1], 2 * shape[-1]), dtype, device, seed=seed)
    return wide[..., : shape[-1]].requires_grad_(graph)


def _each(build: Callable[..., tuple]) -> Callable[[str], list[tuple]]:
    """Samples over shapes, dtypes and functions, with and without gaps between rows."""
    return lambda device: [
        build(*SHAPES[f % len(SHAPES)], device, f, (numbers, rows)[f // 2 % 2], (numbers, rows)[f % 2])
        for f in range(9)
    ]


def _gradients(shape, dtype, device, f, make_gate, make_up):
    return (
        numbers(shape, dtype, device, seed=f),
        make_gate(shape, dtype, device, seed=f + 20),
        make_up(shape, dtype, device, seed=f + 40),
        f,
        f % 3 != 0,
    )


SAMPLES: dict[str, Callable[[str], list[tuple]]] = {
    "gate": _each(
        lambda shape, dtype, device, f, make_gate, make_up: (
            make_gate(shape, dtype, device, seed=f, graph=True),
            make_up(shape, dtype, device, seed=f + 20, graph=True),
            f,
        )
    ),
    "gate_backward": _each(_gradients),
    "gate_backward_": _each(_gradients),
}
