"""What the operators of layers share: what they refuse, when something has to be saved at all, and autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import forward_ad

# Dtypes of layers; float64 is for torch.autograd.gradcheck, on the CPU only.
LAYER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def once_differentiable(name: str) -> None:
    """Makes the operator of a backward pass raise where its own gradient is asked for."""

    def backward(ctx: object, *gradients: torch.Tensor) -> None:
        raise NotImplementedError(
            f"pyzo::{name} has no derivative: layers of pyzo are differentiated once, without create_graph=True"
        )

    torch.library.register_autograd(f"pyzo::{name}", backward)


def needs_graph(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will want a backward pass of something computed from these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_float(name: str, tensor: torch.Tensor) -> None:
    """TypeError where a layer cannot take the dtype, NotImplementedError for a dual tensor; they name the argument.

    Without the second, torch would drop a tangent without a word where nothing requires a gradient (`torch.func.jvp`).
    """
    if tensor.dtype not in LAYER_DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in LAYER_DTYPES)
        raise TypeError(f"{name}: expected a tensor of {expected}, got {str(tensor.dtype).removeprefix('torch.')}")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"{name}: expected a tensor without a tangent, got a dual tensor: the operators pyzo::* of layers have no "
            "forward-mode rule"
        )


def autocasts(device: str) -> bool:
    """Whether autocast is on; never on a device that has none, as meta."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """What matrix products of x are computed in: autocast's dtype where it is on, but for float64, which it leaves."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if x.dtype != torch.float64 and autocasts(device) else x.dtype


def without_autocast(device: str) -> AbstractContextManager[object]:
    """For backward passes, whose dtypes are those of the forward pass."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
