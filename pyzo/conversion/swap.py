"""A module's behaviour swapped in place: its class becomes a subclass of its own class, everything else stays."""

import functools
from typing import Any

from torch import nn

_RECORD = "_pyzo_swapped"  # what a swapped module remembers: attributes that were added, and what others were


class Swapped:
    """What all swapped classes inherit first; a mixin of this kind comes before the class of the module.

    Parameters, buffers, children, hooks and their names are the module's own, so `state_dict`, optimizers, wrappers and
    `isinstance` see what they saw. The class keeps the name of the stock class, as wrapping policies and Hugging Face
    go by it; `repr` shows what the module has become. Copies and pickles keep the swap.
    """

    _stock: type[nn.Module]  # the class that the module had
    _mixin: type["Swapped"]

    def _stock_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module did before; hooks do not run twice."""
        return self._stock.forward(self, *args, **kwargs)

    def _get_name(self) -> str:
        return f"{self._stock.__name__}[{self._mixin.__name__}]"

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return (_empty, (self._mixin, self._stock), *super().__reduce_ex__(protocol)[2:])


def swap(module: nn.Module, mixin: type[Swapped], **attributes: Any) -> None:
    """Puts `mixin` before the module's class, and sets attributes, which `unswap` takes away again.

    Raises:
        ValueError: the module is swapped already, or its `forward` is not its class's.
    """
    if isinstance(module, Swapped):
        raise ValueError(f"module: expected one that is not swapped, got {module._get_name()}")
    if reason := foreign_forward(module):
        raise ValueError(f"module: expected a forward of its class, got {reason}")
    before = dict(vars(module))
    module.__class__ = swapped_class(mixin, type(module))
    vars(module).update(attributes)
    if (prepare := getattr(module, "_prepare", None)) is not None:
        prepare()
    added = [name for name in vars(module) if name not in before]
    changed = {name: value for name, value in before.items() if vars(module)[name] is not value}
    vars(module)[_RECORD] = (added, changed)


def unswap(module: nn.Module) -> bool:
    """Undoes `swap`; returns whether there was anything to undo."""
    if not isinstance(module, Swapped):
        return False
    added, changed = vars(module).pop(_RECORD)
    for name in added:
        vars(module).pop(name, None)
    vars(module).update(changed)
    module.__class__ = module._stock
    return True


def foreign_forward(module: nn.Module) -> str:
    """Why a module's class cannot be swapped; empty where it can."""
    if "forward" in vars(module):  # of accelerate's offloading, for one
        return "a forward of the instance, which replaces that of its class"
    return ""


@functools.cache
def swapped_class(mixin: type[Swapped], stock: type[nn.Module]) -> type[nn.Module]:
    """The class of modules of `stock` that behave as `mixin` says."""

    # The signature stays, as Hugging Face's Trainer and generation look at it.
    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    namespace = {"_stock": stock, "_mixin": mixin, "forward": forward, "__doc__": stock.__doc__}
    namespace |= {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock)(stock.__name__, (mixin, stock), namespace)


def _empty(mixin: type[Swapped], stock: type[nn.Module]) -> nn.Module:
    cls = swapped_class(mixin, stock)
    return cls.__new__(cls)
