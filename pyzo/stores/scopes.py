"""Which calls of modules need which trained tensors, and how these calls are intercepted during a step."""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Scope:
    """The calls of a module, or of the closure, and the trained tensors that must be there meanwhile.

    Attributes:
        module: None: the closure.
        needs: of each part of the sweep, places of tensors.
        keeps: whether something sees the tensors after the call (an output that is a view of one).
        lookup: (part, place) of the weight of an embedding, of which a call needs some rows; or None.
    """

    def __init__(self, module: nn.Module | None):
        self.module = module
        self.needs: dict[int, tuple[int, ...]] = {}
        self.keeps = False
        self.lookup: tuple[int, int] | None = None

    def need(self, part: int, place: int) -> None:
        self.needs[part] = tuple(sorted({*self.needs.get(part, ()), place}))


def scopes_of(root: nn.Module, places: dict[int, tuple[int, int]]) -> list[Scope]:
    """A scope for every module whose calls can be seen; `places`: (part, place) of trained tensors by their ids.

    A compiled module, whose code does not call the modules inside, needs all that they have.
    """
    scopes = []
    for module in _visible(root):
        scope = Scope(module)
        for parameter in module.parameters() if is_closed(module) else module._parameters.values():
            if id(parameter) in places:
                scope.need(*places[id(parameter)])
        if isinstance(module, nn.Embedding) and not is_closed(module) and module.max_norm is None:
            scope.lookup = places.get(id(module.weight))
        scopes.append(scope)
    return scopes


def is_closed(module: nn.Module) -> bool:
    """Whether calls of the modules inside cannot be seen: it is compiled."""
    if isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None:
        return True
    return "torch._dynamo" in sys.modules and isinstance(module, torch._dynamo.OptimizedModule)


def _visible(root: nn.Module) -> Iterable[nn.Module]:
    """The modules of a model, those inside compiled ones left out."""
    seen: set[nn.Module] = set()
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield module
        if not is_closed(module):
            waiting += [child for child in module._modules.values() if child is not None]


class Interception:
    """Has `around(scope, call)` stand for the calls of modules while it is installed.

    Args:
        around: what is called instead of `call`, which makes the call that was meant.
    """

    def __init__(self, around: Callable[[Scope, Callable[[], Any]], Any]):
        self._around = around
        self._installed: list[tuple[nn.Module, str, Any]] = []
        self._meant: dict[nn.Module, tuple[Scope, Callable[..., Any]]] = {}
        self._wrappers: dict[nn.Module, Callable[..., Any]] = {}  # the same in every step: compiled code notices others

    def install(self, scopes: Iterable[Scope]) -> None:
        for scope in scopes:
            module = scope.module
            # Calls of a module that was compiled by `module.compile()` do not come by its `forward`.
            name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
            self._meant[module] = scope, getattr(module, name)
            if module not in self._wrappers:
                self._wrappers[module] = self._wrapper(module)
            self._installed.append((module, name, module.__dict__.get(name)))
            module.__dict__[name] = self._wrappers[module]

    def remove(self) -> None:
        while self._installed:
            module, name, own = self._installed.pop()
            if own is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = own
        self._meant.clear()

    def _wrapper(self, module: nn.Module) -> Callable[..., Any]:
        around, by_module = self._around, self._meant

        @functools.wraps(by_module[module][1])
        def call(*args: Any, **kwargs: Any) -> Any:
            scope, meant = by_module[module]
            return around(scope, lambda: meant(*args, **kwargs))

        return torch._dynamo.disable(call, recursive=False) if "torch._dynamo" in sys.modules else call
