"""Modules that save less for the backward pass (LowMemoryBP, arXiv 2406.16282, and exact alternatives to it)."""

from .activation import FewBitActivation, OutputActivation, ReGELU2, ReSiLU2
from .codebooks import Codebook, codebook
from .dropout import SeededDropout
from .lora import LoRALinear

__all__ = [
    "Codebook",
    "FewBitActivation",
    "LoRALinear",
    "OutputActivation",
    "ReGELU2",
    "ReSiLU2",
    "SeededDropout",
    "codebook",
]
