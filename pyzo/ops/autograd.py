"""What the operators of layers share: the error of a double backward, and when something has to be saved at all."""

import torch

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
    """TypeError that names the argument where a layer cannot take the dtype."""
    if tensor.dtype not in LAYER_DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in LAYER_DTYPES)
        raise TypeError(f"{name}: expected a tensor of {expected}, got {str(tensor.dtype).removeprefix('torch.')}")
