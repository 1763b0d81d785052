"""Whether a backward pass may write its gradients over the tensors that it saved."""

import itertools
import sys
from typing import Any

import torch
from torch import Tensor

_storage_uses = getattr(torch._C, "_storage_Use_Count", None)
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
_wrapped = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", None)  # by torch.func.vmap
_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)  # by is_grads_batched
_COUNTS_EXIST = None not in (_storage_uses, _keeps_graph, _wrapped, _batched) and hasattr(Tensor, "_use_count")


def unpack(ctx: Any, gradient: Tensor | None) -> tuple[tuple[Tensor, ...], bool]:
    """The tensors saved in `ctx`, and whether the first two, gate and up, may be overwritten by what `gradient` makes.

    They may where nobody can look at them any more: the graph is not kept, and both are results of the graph (no
    leaves) whose storage and Python object have no owner but the node that saved them; of halves of one tensor the
    same holds for that tensor. Owners are counted and compared with the counts of tensors that certainly have
    no other owner. What saved-tensor hooks made, subclasses, memory shared with other processes, overlapping views,
    what is traced or captured in a CUDA graph, a batch of gradients by vmap (`is_grads_batched`: they would all be
    written over one tensor), and all tensors of a torch without the counters are never written over. Not seen is work
    on another CUDA stream that reads a tensor after its last reference is gone (`Tensor.record_stream` protects from
    the allocator only).
    """
    saved, owners = _unpack(ctx)
    first = saved[:2]
    may = (
        _COUNTS_EXIST
        and is_plain(gradient)
        and not _keeps_graph()
        and all(type(t) is Tensor and t.requires_grad and not t.is_leaf for t in first)
        and not any(t._base is not None and t._base.is_leaf for t in first)
        and not any(_is_foreign(t) for t in first)
        and not (first[0].is_cuda and torch.cuda.is_current_stream_capturing())
        and owners == _SOLE_OWNERS.get(_kind(*first), ())
        and _apart(*first)
    )
    return saved, may


def is_plain(tensor: Tensor | None) -> bool:
    """Whether nothing traces, differentiates or batches what a backward pass does to a tensor that it made itself."""
    return (
        None not in (_wrapped, _batched)
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(tensor) is Tensor
        and not _wrapped(tensor)
        and not _batched(tensor)
    )


def release(tensor: Tensor) -> Tensor:
    """A saved tensor that now holds a gradient: without its graph, and marked as changed for whoever saved it."""
    torch.autograd.graph.increment_version(tensor)
    return tensor.detach()


def _is_foreign(tensor: Tensor) -> bool:
    """Whether its memory may be somebody else's too: NumPy's for one, or another process's."""
    storage = tensor.untyped_storage()
    return not storage.resizable() or (tensor.device.type == "cpu" and storage.is_shared())


def _apart(gate: Tensor, up: Tensor) -> bool:
    """Whether two tensors of one shape, in rows as operators of gates take them, have certainly no element in common.

    They lie in different tensors, one behind the other, or side by side in equally long rows.
    """
    if gate._base is None or gate._base is not up._base:
        return True
    first, second = sorted((gate, up), key=Tensor.storage_offset)
    shift = second.storage_offset() - first.storage_offset()
    sizes, strides = first.shape, first.stride()
    if shift > sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)):
        return True
    rows = [stride for size, stride in zip(sizes[:-1], strides[:-1], strict=True) if size != 1]
    return bool(rows) and strides == second.stride() and sizes[-1] <= shift % min(rows) <= min(rows) - sizes[-1]


def _kind(gate: Tensor, up: Tensor) -> tuple[bool, bool, bool]:
    """Whether each is a view, and whether both are views of one tensor."""
    return gate._base is not None, up._base is not None, gate._base is not None and gate._base is up._base


def _unpack(ctx: Any) -> tuple[tuple[Tensor, ...], tuple[tuple[int, ...], ...] | None]:
    """The saved tensors and how many owners the first two have, counted while they are held exactly as here."""
    saved = ctx.saved_tensors
    if not _COUNTS_EXIST or not all(type(t) is Tensor for t in saved[:2]):
        return saved, None
    return saved, (_owners(saved[0]), _owners(saved[1]))


def _owners(tensor: Tensor) -> tuple[int, ...]:
    """References to the tensor, its storage and what it is a view of, in C++ and in Python."""
    storage, base = tensor.untyped_storage(), tensor._base
    counts = (_storage_uses(storage._cdata), sys.getrefcount(storage), tensor._use_count(), sys.getrefcount(tensor))
    return counts if base is None else (*counts, base._use_count(), sys.getrefcount(base))


_HALVES = (True, True, True)  # the kind of two halves of one tensor


class _Probe(torch.autograd.Function):
    """Saves two tensors, as a gate does."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.zeros_like(gate)


def _sole_owners() -> dict[tuple[bool, bool, bool], Any]:
    """What `_owners` says of two saved tensors that nobody else owns, by `_kind`."""
    found = {}
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros(4, requires_grad=True, device="cpu")
        result = _Probe.apply(leaf, leaf)  # held: torch 2.11 frees what is saved together with the result
        if result.grad_fn.saved_tensors[0] is not leaf:
            return found  # imported under saved-tensor hooks, which own what they make
        for gate_is_view, up_is_view, halves in (*itertools.product((False, True), (False, True), (False,)), _HALVES):
            if halves:
                result = _Probe.apply(*(leaf * 1.0).chunk(2))
            else:
                views = (gate_is_view, up_is_view)
                result = _Probe.apply(*((leaf * 1.0).view(4) if view else leaf * 1.0 for view in views))
            found[gate_is_view, up_is_view, halves] = _unpack(result.grad_fn)[1]
    return found


_SOLE_OWNERS = _sole_owners()
