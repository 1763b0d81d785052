"""Modules that save less for the backward pass (LowMemoryBP, arXiv 2406.16282, and exact alternatives to it)."""

from .activation import FewBitActivation, OutputActivation, ReGELU2, ReSiLU2
from .affine import merge_affine_, unmerge_affine_
from .codebooks import Codebook, codebook
from .dropout import SeededDropout
from .gate import GEGLU, SwiGLU
from .lora import GatedLoRALinear, LoRALinear
from .norm import MSLayerNorm, MSRMSNorm
from .recompute import ActivationLinear, GatedLinear

__all__ = [
    "GEGLU",
    "ActivationLinear",
    "Codebook",
    "FewBitActivation",
    "GatedLinear",
    "GatedLoRALinear",
    "LoRALinear",
    "MSLayerNorm",
    "MSRMSNorm",
    "OutputActivation",
    "ReGELU2",
    "ReSiLU2",
    "SeededDropout",
    "SwiGLU",
    "codebook",
    "merge_affine_",
    "unmerge_affine_",
]
