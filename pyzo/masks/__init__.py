"""Masks: which elements of the trained tensors a step moves. One file each; `base` says what all of them are."""

from pyzo.masks.base import Mask, TensorMask, load_mask
from pyzo.masks.bernoulli import Random
from pyzo.masks.bits import Bits
from pyzo.masks.indices import Indices
from pyzo.masks.magnitude import SmallMagnitude

__all__ = ["Bits", "Indices", "Mask", "Random", "SmallMagnitude", "TensorMask", "load_mask"]
