"""Samples of arguments of the operator of dropout, for what is tested of every operator."""

from collections.abc import Callable

import torch

EXACT = True  # the reference has the bits


def _dropout(device: str) -> list[tuple]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for n, dtype, seed, p in (
        (65, torch.float32, 0, 0.5),
        (2000, torch.bfloat16, -1, 0.1),
        (130, torch.float16, 2**63 - 1, 0.999),
        (0, torch.float32, 1, 0.3),
        (33, torch.float32, 7, 0.0),
    ):
        x = torch.randn(n, generator=generator).to(device, dtype).requires_grad_()
        samples.append((x, torch.tensor([seed], device=device), p))
    return samples


SAMPLES: dict[str, Callable[[str], list[tuple]]] = {"dropout": _dropout}
