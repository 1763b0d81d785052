"""What a mask is to an optimizer: something that is fitted to the trained tensors once and then lies beside them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pyzo.control import KEEP_ALL


@dataclass(frozen=True, eq=False)
class TensorMask:
    """A mask as the passes take it, of one tensor. An element moves where all of these let it.

    Attributes:
        keep: an element moves where its 16 mask bits of the field are below; 65536: all do.
        threshold: an element moves where its magnitude at the beginning of the step is not above.
        bits: uint8 [ceil(n / 8)], element 8j + k in bit k of byte j; None: all move.
        indices: int64, the elements that move, in order; None: all do.
    """

    keep: int = KEEP_ALL
    threshold: float = math.inf
    bits: torch.Tensor | None = None
    indices: torch.Tensor | None = None


class Mask:
    """Base of the masks of `pyzo.masks`. An element outside the mask keeps weight and state under every rule."""

    refresh: int = 1  # how many steps the drawn part of a mask lasts
    is_fitted: ClassVar[bool] = True  # whether it depends on the tensors: then `fit` is called, else `keep` is read

    def check_names(self, parameters: Iterable[str]) -> None:
        """ValueError where the mask names a parameter that is not among all those of the optimizer."""

    def fit(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorMask]:
        """The mask of each named tensor, from the weights as they are. ValueError naming a tensor it cannot be for."""
        raise NotImplementedError

    def plain(self) -> dict[str, Any]:
        """Plain values and tensors from which `load_mask` makes the mask again."""
        raise NotImplementedError

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Mask":
        return cls(**values)


def load_mask(saved: dict[str, Any] | None) -> Mask | None:
    """The mask that a state dict describes; ValueError where it describes none of this version."""
    if saved is None:
        return None
    kinds = {kind.__name__: kind for kind in Mask.__subclasses__()}
    values = dict(saved)
    kind = values.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"state_dict: expected a mask of kind {' or '.join(sorted(kinds))}, got {kind!r}")
    return kinds[kind].from_plain(values)
