"""Refuses, by name, what would drop a tangent without a word while a closure runs under forward-mode AD."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Namespaces whose operators either have a forward-mode rule or raise because they have none (those of `prims` drop).
_TORCH_NAMESPACES = ("aten", "prim")
_APPLY = torch.autograd.Function.apply.__func__.__code__
_AUTOGRAD_KEYS = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradOther)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
)


def _tensors(*trees: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def tangent_of(tensor: torch.Tensor) -> torch.Tensor | None:
    return forward_ad.unpack_dual(tensor).tangent if _is_float(tensor) else None


def _any_tangent(tensors: list[torch.Tensor]) -> bool:
    """Whether one of them is a dual tensor; also where a dispatch mode runs, which is below autograd."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - _AUTOGRAD_KEYS):
        return any(tangent_of(t) is not None for t in tensors)


class Parameters:
    """The dual parameters, to find the autograd.Function that reads one behind forward mode's back.

    torch switches forward-mode AD off inside `Function.forward` and takes the derivative from `jvp`, which knows the
    tangents of arguments only. A parameter that `forward` takes from elsewhere (from a checkpointed module, for one)
    would count as a constant.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]):
        self._position = {id(p): i for i, p in enumerate(parameters)}

    def check(self, *trees: object) -> None:
        """Called where forward mode is off: RuntimeError naming a Function that reads a parameter it was not given."""
        for leaf in tree_leaves(trees):
            if id(leaf) in self._position:
                self._check_callers(leaf)

    def _check_callers(self, parameter: torch.Tensor) -> None:
        inner = set()
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code is _APPLY:
                cls, args = frame.f_locals["cls"], frame.f_locals["args"]
                if getattr(cls.jvp, "__code__", None) in inner:
                    return  # the rule itself, which computes with plain values
                if not any(arg is parameter for arg in args):
                    raise RuntimeError(
                        f"{cls.__module__}.{cls.__qualname__}: this torch.autograd.Function reads "
                        f"parameters[{self._position[id(parameter)]}] without taking it as an argument, so it would "
                        "silently count as a constant. If this is activation checkpointing, switch it off (forward "
                        "mode keeps no activations) or pass use_reentrant=False; else pass the parameter as an "
                        "argument, or use a finite-difference estimator (pyzo.estimators.TwoSided)."
                    )
            inner.add(frame.f_code)
            frame = frame.f_back


class EveryOperator(TorchDispatchMode):
    """Refuses operators outside torch that get a tangent and would return or write floating values without one.

    This mode stands below autograd, so what arrives has no rule left to apply: an operator with a composite kernel has
    been taken apart, an autograd.Function runs its forward with forward mode off. With neither, torch's fallback and
    torch.library.custom_op (with register_autograd too) call the kernel and return its result as a constant.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's wrapper against compilation imports torch._dynamo (70 MB); nothing is compiled here

    def __init__(self, parameters: Parameters):
        super().__init__()
        self._parameters = parameters

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not forward_ad._is_fwd_grad_enabled():
            self._parameters.check(args, kwargs)
        elif func.namespace not in _TORCH_NAMESPACES and _any_tangent(_tensors(args, kwargs)):
            return self._without_rule(func, args, kwargs)
        return func(*args, **kwargs)

    def _without_rule(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name = func.name().partition(".")[0]
        refusal = RuntimeError(
            f"{name}: this operator has no forward-mode rule, so its result would silently count as a constant. Call "
            "it from a torch.autograd.Function with a jvp, register it as CompositeImplicitAutograd, give it "
            "x.detach() where a constant is meant, or use a finite-difference estimator (pyzo.estimators.TwoSided)."
        )
        if not isinstance(func, torch._ops.OpOverload):
            raise refusal
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        aliases = {a.name: a.alias_info for a in func._schema.arguments if a.alias_info is not None}
        if any(map(_is_float, _tensors([given.get(name) for name, alias in aliases.items() if alias.is_write]))):
            raise refusal
        result = func(*args, **kwargs)
        if any(map(_is_float, _tensors(result))):
            raise refusal
        return result
