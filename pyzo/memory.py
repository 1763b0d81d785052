"""`pyzo.memory.account`: what a forward pass keeps for its backward pass, by module, each storage counted once."""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules import module as torch_modules


@dataclass(frozen=True)
class Saved:
    """One storage that autograd keeps.

    Attributes:
        modules: names of the modules that saved it, in order of saving; the first one is charged for it.
        shape, dtype: of the tensor that was saved first.
        nbytes: of the whole storage, which is what stays allocated.
        device: where.
    """

    modules: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    device: torch.device


@dataclass(frozen=True)
class Account:
    """Everything that is kept between forward and backward; `print` shows a table by module.

    Attributes:
        saved: one entry per storage, in order of saving.
        result: what the function returned.
    """

    saved: tuple[Saved, ...]
    result: Any

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.saved)

    def by_module(self) -> dict[str, int]:
        """Bytes that each module is charged for, the largest first; whoever saved a storage first is charged."""
        charged: dict[str, int] = {}
        for s in self.saved:
            charged[s.modules[0]] = charged.get(s.modules[0], 0) + s.nbytes
        return dict(sorted(charged.items(), key=lambda item: -item[1]))

    def units(self, tokens: int, hidden: int) -> float:
        """All bytes in units of one [tokens, hidden] tensor of 16-bit numbers."""
        return self.nbytes / (2 * tokens * hidden)

    def __str__(self) -> str:
        lines = [f"{self.nbytes / 2**20:10.3f} MiB  in {len(self.saved)} storages"]
        for name, nbytes in self.by_module().items():
            own = [s for s in self.saved if s.modules[0] == name]
            tensors = ", ".join(
                f"{str(s.dtype).removeprefix('torch.')}{list(s.shape)}"
                + (f" shared with {', '.join(dict.fromkeys(s.modules[1:]))}" if set(s.modules[1:]) - {name} else "")
                for s in own
            )
            lines.append(f"{nbytes / 2**20:10.3f} MiB  {name or '(outside modules)'}: {tensors}")
        return "\n".join(lines)


class _Kept:
    """What autograd holds instead of a saved tensor; it dies with the node that holds it."""

    def __init__(self, tensor: torch.Tensor, module: str):
        self.tensor = tensor
        self.module = module


class _Recorder:
    """Hooks that note which module runs and what is saved meanwhile."""

    def __init__(self) -> None:
        self.kept: list[weakref.ref[_Kept]] = []
        # Storages of parameters, buffers and leaves, held so that no other can take the place of one that is freed.
        self.owned: dict[int, torch.UntypedStorage] = {}
        self._names: dict[int, str] = {}
        self._running: list[str] = []

    def adopt(self, module: torch.nn.Module) -> None:
        """Names a module and all inside it, and leaves out what they own."""
        for name, inner in module.named_modules():
            self._names.setdefault(id(inner), name or type(module).__name__)
        for tensor in (*module.parameters(), *module.buffers()):
            self._own(tensor)

    def enter(self, module: torch.nn.Module, args: Any) -> None:
        if id(module) not in self._names:  # a module that no module seen so far contains
            self.adopt(module)
        self._running.append(self._names[id(module)])

    def leave(self, module: torch.nn.Module, args: Any, result: Any) -> None:
        self._running.pop()

    def pack(self, tensor: torch.Tensor) -> _Kept:
        whole = tensor if tensor._base is None else tensor._base
        if isinstance(whole, torch.nn.Parameter) or (whole.is_leaf and whole.requires_grad):
            self._own(whole)
        kept = _Kept(tensor, self._running[-1] if self._running else "")
        self.kept.append(weakref.ref(kept))
        return kept

    def _own(self, tensor: torch.Tensor) -> None:
        self.owned[_storage(tensor)] = tensor.untyped_storage()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def account(fn: Callable[[], Any], model: torch.nn.Module | None = None) -> Account:
    """Counts what autograd keeps when `fn` returns: the memory that a backward pass waits for.

    Each storage counts once, whole, however many tensors and modules saved it; parameters, buffers and other leaves
    that require gradients are left out, views of them too, and so is what was saved for a graph that is gone by then (a
    checkpointed region, for one). Not seen are tensors that a node holds outside `save_for_backward`, and those that
    saved-tensor hooks inside `fn` took (`torch.autograd.graph.save_on_cpu`).

    Args:
        fn: runs a forward pass and returns what keeps its graph alive: the loss, or the outputs.
        model: whose names modules get; None: those inside the outermost module that is called.

    Returns:
        An `Account`; its `result` is what `fn` returned, so that backward can follow.
    """
    recorder = _Recorder()
    if model is not None:
        recorder.adopt(model)
    with ExitStack() as stack:
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda kept: kept.tensor))
        for handle in (
            torch_modules.register_module_forward_pre_hook(recorder.enter),
            torch_modules.register_module_forward_hook(recorder.leave, always_call=True),
        ):
            stack.callback(handle.remove)
        result = fn()
    found: dict[int, list[_Kept]] = {}
    for kept in (reference() for reference in recorder.kept):
        if kept is not None and _storage(kept.tensor) not in recorder.owned:
            found.setdefault(_storage(kept.tensor), []).append(kept)
    saved = tuple(
        Saved(
            tuple(kept.module for kept in group),
            tuple(group[0].tensor.shape),
            group[0].tensor.dtype,
            group[0].tensor.untyped_storage().nbytes(),
            group[0].tensor.device,
        )
        for group in found.values()
    )
    return Account(saved, result)
