"""What pyzo's layers are measured against: the same layers in plain torch, as people write them. Nothing of pyzo."""

import torch
from torch import Tensor
from torch.nn import functional


def quick_gelu(x: Tensor) -> Tensor:
    """The line of Hugging Face's QuickGELUActivation."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh formula."""
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": functional.silu,
    "mish": functional.mish,
    "softplus": functional.softplus,
    "elu": functional.elu,
    "hardswish": functional.hardswish,
}


def hf_rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The lines of Hugging Face's LlamaRMSNorm: statistics in float32, rounded before the weight."""
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + eps)
    return weight * x.to(dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The product of a gated MLP with SiLU."""
    return functional.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """The product of a gated MLP with GELU."""
    return functional.gelu(gate) * up


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """The second half of a gated MLP."""
    return functional.linear(functional.silu(gate) * up, weight)


def gelu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The second half of an MLP."""
    return functional.linear(functional.gelu(x), weight)


def lora_linear(x: Tensor, a: Tensor, b: Tensor, *, weight: Tensor, scale: float, p: float) -> Tensor:
    """The line of PEFT's LoRA layer (arXiv 2106.09685) in training mode."""
    inner = functional.dropout(x, p) if p else x
    return functional.linear(x, weight) + functional.linear(functional.linear(inner, a), b) * scale
