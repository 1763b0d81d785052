"""What the operators of layers share: what they refuse, when something has to be saved at all, and autocast."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad

from .library import operators

# Dtypes of layers; float64 is for torch.autograd.gradcheck, on the CPU only.
LAYER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Asked once, as torch.compile of torch 2.11 cannot ask.
_AUTOCAST_DEVICES = tuple(d for d in ("cpu", "cuda") if torch.amp.is_autocast_available(d))


def differentiable(
    name: str,
    backward: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    kernel: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers the autograd formula of an operator; returns a function of its arguments that is quicker to call.

    torch.library's own way to a formula costs some 40 microseconds more than torch.autograd.Function, which is taken
    in eager mode; whatever traces or transforms a program sees the operator.

    Args:
        name: of the operator.
        backward, save: as torch.library.register_autograd takes them (`save` is its setup_context).
        kernel: what the operator calls, where it is written in Python.
    """
    torch.library.register_autograd(f"pyzo::{name}", backward, setup_context=save)
    operator = getattr(operators, name).default
    run = kernel or operator

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = run(*inputs)
            save(ctx, inputs, output)
            return output

    Eager.__name__ = Eager.__qualname__ = f"pyzo::{name}"
    Eager.backward = staticmethod(backward)

    def call(*inputs: Any) -> Any:
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
        if traced or not needs_graph(*(i for i in inputs if isinstance(i, torch.Tensor))):
            return operator(*inputs)
        return Eager.apply(*inputs)

    return call


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
    return device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """What matrix products of x are computed in: autocast's dtype where it is on, but for float64, which it leaves."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if x.dtype != torch.float64 and autocasts(device) else x.dtype


def without_autocast(device: str) -> AbstractContextManager[object]:
    """For backward passes, whose dtypes are those of the forward pass."""
    return torch.autocast(device, enabled=False) if device in _AUTOCAST_DEVICES else nullcontext()
