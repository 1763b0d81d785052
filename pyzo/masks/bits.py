"""Any fixed mask, packed to one bit per element."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pyzo.masks.base import Mask, TensorMask
from pyzo.masks.listed import Given, by_name, check_known
from pyzo.masks.order import chunks


class Bits(Mask):
    """A fixed mask of your own: the elements that are True move.

    Args:
        tensors: bool tensors of the shapes of the parameters, by parameter name or in the order of the parameters;
            one for each trained parameter. They are packed to 1 bit per element, and not kept.
    """

    def __init__(self, tensors: Given):
        named = by_name(tensors)
        for name, t in named.items():
            if t.dtype != torch.bool:
                raise TypeError(f"tensors[{name!r}]: expected a bool tensor, got {t.dtype}")
        self._packed = {name: pack(t) for name, t in named.items()}
        self._numel = {name: t.numel() for name, t in named.items()}

    def __repr__(self) -> str:
        return f"Bits({len(self._packed)} tensors, {sum(self._numel.values())} elements)"

    def check_names(self, parameters: Iterable[str]) -> None:
        check_known(self._packed, parameters)

    def fit(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorMask]:
        for name, t in tensors.items():
            if name not in self._packed:
                raise ValueError(f"mask: expected bits for every trained parameter, got none for {name}")
            if self._numel[name] != t.numel():
                raise ValueError(f"mask: expected {t.numel()} bits for {name}, got {self._numel[name]}")
        return {name: TensorMask(bits=self._packed[name].to(t.device)) for name, t in tensors.items()}

    def plain(self) -> dict[str, Any]:
        return {"kind": "Bits", "packed": dict(self._packed), "numel": dict(self._numel)}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Bits":
        mask = cls.__new__(cls)
        mask._packed, mask._numel = dict(values["packed"]), dict(values["numel"])
        return mask


def pack(mask: torch.Tensor) -> torch.Tensor:
    """A bool tensor as uint8 [ceil(n / 8)]: element 8j + k in bit k of byte j, a chunk at a time."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    pieces = []
    for chunk in chunks(mask):  # of a multiple of 8 elements, but for the last one
        padded = torch.nn.functional.pad(chunk.to(torch.uint8), (0, -len(chunk) % 8))
        pieces.append((padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8))
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.uint8, device=mask.device)
