"""Forward-mode AD for Forward-Grad: the directional derivative of a closure's loss.

Tangents are attached to the parameters themselves. In torch a tensor whose view gets a tangent gets it too (the note
Forward Grad View/inplace in torch/csrc/autograd/autograd_meta.cpp). So an autograd.Function that returns a view of the
parameter, with the caller's tensor for its tangent, makes the parameter a dual tensor; nothing is written, copied,
swapped or replaced, and leaving the dual level undoes it. Whatever reads the parameter meanwhile is differentiated:
tied weights, views made earlier, any object that holds it.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyzo.forward_checks import EveryOperator, Parameters, tangent_of


def new_tangents(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Uninitialised tensors that can be the tangents of `parameters`, one for each.

    A tangent has its parameter's shape, dtype, device, strides and place in a storage of the same size: torch copies
    any other one. Parameters that share a storage (slices of a flat buffer) therefore get tangents that share one.
    """
    storages: dict[tuple[int, torch.dtype, torch.device], torch.Tensor] = {}
    tangents = []
    for p in parameters:
        key = (p.untyped_storage().data_ptr(), p.dtype, p.device)
        if key not in storages:
            storages[key] = torch.empty(_storage_numel(p), dtype=p.dtype, device=p.device)
        tangents.append(storages[key].as_strided(p.shape, p.stride(), p.storage_offset()))
    return tangents


def _storage_numel(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.itemsize


class _Attach(torch.autograd.Function):
    """Gives a tensor the tangent of another one: the result is a view of it, and its base receives the tangent too."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, carrier: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)  # else the parameter gets a tangent of zeros first
        return parameter.view_as(parameter)

    @staticmethod
    def jvp(ctx: Any, nothing: None, tangent: torch.Tensor) -> torch.Tensor:
        return tangent


def _attach(parameters: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor]) -> None:
    for parameter, tangent in zip(parameters, tangents, strict=True):
        held = tangent_of(parameter) if parameter._is_view() else None
        if held is None:
            _Attach.apply(parameter, forward_ad.make_dual(parameter.detach(), tangent))
        else:  # another view of the same base came before
            held.copy_(tangent)
    if tangent_of(parameters[-1]) is None:
        raise RuntimeError(f"torch {torch.__version__}: expected the base of a view to get its tangent, got none")


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention in plain operators, which have forward-mode rules where fused kernels have none; nothing compiled."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # An outer autocast keeps casts of the parameters: those made before have no tangent, and those made here must
        # not outlive the update that follows.
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        yield


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    placement = (tensor.stride(), tensor.storage_offset(), _storage_numel(tensor))
    return (tensor.dtype, tensor.device, tuple(tensor.shape), *placement)


def _check(parameters: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor]) -> None:
    if len(parameters) != len(tangents) or not parameters:
        raise ValueError(
            "parameters, tangents: expected as many of each and at least one, "
            f"got {len(parameters)} and {len(tangents)}"
        )
    if len({id(p) for p in parameters}) != len(parameters):
        raise ValueError("parameters: expected each tensor once, got one twice")
    for i, (p, t) in enumerate(zip(parameters, tangents, strict=True)):
        if not p.is_floating_point():
            raise ValueError(f"parameters[{i}]: expected a floating-point tensor, got {p.dtype}")
        if _layout(p) != _layout(t):
            names = "dtype, device, shape, strides, storage offset, elements in storage"
            raise ValueError(
                f"tangents[{i}]: expected ({names}) of parameters[{i}], {_layout(p)}, got {_layout(t)}; "
                "pyzo.forward.new_tangents allocates what is needed"
            )


def directional_derivative(
    closure: Callable[[], torch.Tensor],
    parameters: Sequence[torch.Tensor],
    tangents: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a closure and its derivative along `tangents`, <grad, z>, by one forward pass with dual numbers.

    Exact up to rounding (no step size), and nothing is kept for a backward pass. Source: Baydin et al., "Gradients
    without Backpropagation", arXiv 2202.08587.

    The closure is called once, under `torch.no_grad()`, with attention in plain operators (`SDPBackend.MATH`) and
    compiled functions run eagerly. It may use any model in any way; only the loss it returns is differentiated, and
    parameters that it does not use contribute 0. Nothing is written to parameters or tangents, and no memory in
    proportion to the model is allocated, except where a parameter is a view of another tensor (`_is_view()`): that
    tensor then gets a tangent, zero outside the parameters.

    Args:
        closure: evaluates the loss and returns it, a floating-point tensor with one element.
        parameters: leaf tensors, each once.
        tangents: one per parameter, of the same dtype, device, shape and layout; `new_tangents` allocates them.

    Returns:
        (loss, derivative): new tensors of shape () in the loss's dtype, without gradient; nothing waits for the device.

    Raises:
        ValueError, TypeError: the arguments or the closure's result, by name.
        RuntimeError: something would drop a tangent: an operator outside torch without a rule, by name; an
            autograd.Function that reads a parameter it was not given, by name; a loss that carries no tangent at all.
        NotImplementedError: from torch, for its own operators and autograd.Functions without a forward-mode rule.
        Anything that the closure raises. After any of these, parameters are as they were.

    What torch cannot see counts as a constant: `.detach()`, `.data`, NumPy, kernels that read a tensor's memory without
    being a torch operator (functions of a pybind11 extension, Triton kernels launched directly), and activations that
    a torch.autograd.Function reads without taking them as arguments.
    """
    _check(parameters, tangents)
    check = EveryOperator(Parameters(parameters))  # costs the host some 10 us per operator
    with torch.no_grad(), _unfused(), forward_ad.dual_level():
        _attach(parameters, tangents)
        with check:
            loss = closure()
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            kind = f"{loss.dtype}, shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise TypeError(f"closure: expected it to return a floating-point tensor with one element, got {kind}")
        value, derivative = forward_ad.unpack_dual(loss)
        if derivative is None:  # 0 would look like a stationary point
            raise RuntimeError(
                "closure: the loss carries no derivative along the parameters. Either it does not depend on them, or "
                "everything between them and the loss passes what torch cannot differentiate: .item(), .detach(), "
                ".data, NumPy, inference mode, a kernel that is no torch operator"
            )
        return value.reshape(()).clone(), derivative.reshape(()).clone()  # they may be a parameter and its tangent
