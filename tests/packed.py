"""Packed masks as NumPy packs them, independently of pyzo: element 8 j + k in bit k of byte j."""

import numpy as np
import torch


def pack(mask: torch.Tensor) -> torch.Tensor:
    """The bytes of a boolean mask: uint8 [ceil(n / 8)]."""
    return torch.from_numpy(np.packbits(mask.cpu().reshape(-1).numpy(), bitorder="little"))


def unpack(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The boolean mask [n] of its bytes."""
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=n, bitorder="little")).bool()
