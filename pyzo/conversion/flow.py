"""The dataflow of one forward pass: which operators and modules read what a module returned, by storage."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.nn.modules import module as torch_modules
from torch.utils._python_dispatch import TorchDispatchMode

from pyzo import ops
from pyzo.ops.autograd import autocasts

from .attention import AttentionCalls, is_narrow

# Operators whose inputs autocast casts to its dtype.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "matmul", "linear", "mkldnn_linear"}
# Operators that copy numbers to other places, or to another dtype, and compute nothing.
MOVES = {"_to_copy", "clone", "contiguous", "roll", "constant_pad_nd", "index", "index_select", "gather", "repeat"}
_MOST_DEPTH = 6  # of containers in which tensors are looked for


@dataclass(frozen=True)
class Event:
    """One call of an operator; tensors that share a storage have one number."""

    operator: str
    module: str  # the innermost one that ran
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    writes: tuple[int, ...]  # changed in place


@dataclass(frozen=True)
class Call:
    """One call of a module: the storages of its first tensor argument and result, and autocast's dtype meanwhile."""

    argument: int | None
    result: int | None
    autocast: torch.dtype | None


@dataclass(frozen=True)
class Readers:
    """Who reads a tensor, through views and copies of it.

    Attributes:
        products: modules in which a matrix product reads it.
        others: operators that are none, with their modules; "(output)" where the model returns it.
        moves: operators that copy it on its way to them.
        written: whether something changes it in place.
    """

    products: tuple[str, ...]
    others: tuple[tuple[str, str], ...]
    moves: tuple[str, ...]
    written: bool


class Flow:
    """What one forward pass did."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.calls: dict[str, list[Call]] = {}
        self.outputs: set[int] = set()
        self.dtypes: dict[int, torch.dtype] = {}  # by storage, of the tensor that it was made for
        # By module that calls torch's attention: of each call why it is not worth computing again, or nothing, and
        # whether it is in 16 bits.
        self.attention: dict[str, list[tuple[str, bool]]] = {}
        self._readers: dict[int, list[Event]] | None = None

    def readers_of(self, storage: int) -> list[Event]:
        """Operators that read it and are no views of it."""
        if self._readers is None:
            self._readers = {}
            for event in self.events:
                for read in set(event.reads):
                    self._readers.setdefault(read, []).append(event)
        return self._readers.get(storage, [])

    def readers(self, storage: int, absorbed: frozenset[str] = frozenset(), low: torch.dtype | None = None) -> Readers:
        """Follows a tensor.

        Args:
            storage: of the tensor.
            absorbed: modules of which all that happens inside counts as one product there.
            low: autocast's dtype, where it was on: products of another dtype, which ran outside of it, count as others.
        """
        products: list[str] = []
        others: list[tuple[str, str]] = []
        moves: list[str] = []
        written = False
        todo, seen = [storage], {storage}
        while todo:
            current = todo.pop()
            if current in self.outputs:
                others.append(("(output)", ""))
            for event in self.readers_of(current):
                written = written or current in event.writes
                inside = next((name for name in absorbed if within(event.module, name)), None)
                if inside is not None:
                    products.append(inside)
                elif event.operator in _PRODUCTS and low in (None, self.dtypes[current]):
                    products.append(event.module)
                elif event.operator in MOVES:
                    moves.append(event.operator)
                    new = [s for s in event.makes if s not in seen]
                    seen.update(new)
                    todo.extend(new)
                else:
                    others.append((event.operator, event.module))
        products, others, moves = (tuple(dict.fromkeys(found)) for found in (products, others, moves))
        return Readers(products, others, moves, written)

    def comes_from(self, storage: int, sources: set[int]) -> bool:
        """Whether something in it was computed from one of the sources, in what was noted so far."""
        wanted = {storage}
        for event in reversed(self.events):
            if not wanted.isdisjoint((*event.makes, *event.writes)):
                wanted.update(event.reads)
        return not wanted.isdisjoint(sources)


def within(name: str, ancestor: str) -> bool:
    """Whether a module is another one or inside it."""
    return not ancestor or name == ancestor or name.startswith(f"{ancestor}.")


Probe = Callable[[nn.Module, Tensor, Tensor], None]


class _Tracer(TorchDispatchMode):
    """Numbers storages. It holds them weakly: their data is freed, but their addresses are not used again."""

    def __init__(self, names: Mapping[int, str], probes: Mapping[str, Probe], trained: set[int]) -> None:
        super().__init__()
        self.flow = Flow()
        self._trained = trained
        self._names = names
        self._probes = probes
        self._running: list[str] = []
        self._numbers: dict[int, int] = {}
        self._held: list[StorageWeakRef] = []
        self._paused = False
        self._arguments: list[int | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        given = [t for t in _tensors((args, kwargs))]
        reads = tuple(self._number(t) for t in given)
        written = tuple(self._number(t) for t in _written(func, args, kwargs))
        result = func(*args, **kwargs)
        results = list(_tensors(result))
        makes = [self._new(t) for t in results if _storage(t) not in self._numbers]
        if makes or written or not results:  # else a view
            name = func._schema.name.partition("::")[2]
            self.flow.events.append(Event(name, self.running, reads, tuple(makes), written))
        return result

    @property
    def running(self) -> str:
        return self._running[-1] if self._running else ""

    def enter(self, module: nn.Module, args: Any) -> None:
        outer = self.running
        self._running.append(self._names.get(id(module), outer))
        self._arguments.append(next((self._number(t) for t in _tensors(args)), None))

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self._running.pop()
        argument = self._arguments.pop()
        name = self._names.get(id(module))
        if name is None or result is None:
            return
        first = next(iter(_tensors(result)), None)
        dtype = None if first is None else autocast_dtype(first)
        call = Call(argument, None if first is None else self._number(first), dtype)
        self.flow.calls.setdefault(name, []).append(call)
        probe = self._probes.get(name)
        given = next(iter(_tensors(args)), None)
        if probe is not None and given is not None and first is not None:
            self._paused = True
            try:
                with torch.no_grad():
                    probe(module, given.detach(), first.detach())
            finally:
                self._paused = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Torch's attention, and a note what `pyzo.ops.attention` would do with gradients; it is told the addends."""
        addends = kwargs.pop("addends")
        self._paused = True
        try:
            with torch.enable_grad():
                twins = [t.detach().requires_grad_() for t in (query, key, value)]
                rest = [self._as_trained(value) for value in args]
                named = {name: self._as_trained(value) for name, value in kwargs.items()}
                smaller = tuple(self._as_trained(t) for t in addends)
                reason = ops.attention_reason(*twins, *rest, **named, addends=smaller)
        finally:
            self._paused = False
        self.flow.attention.setdefault(self.running, []).append((reason, is_narrow(query)))
        return functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    def _as_trained(self, value: Any) -> Any:
        """A tensor as autograd would see it, though the pass has no gradients."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        sources = {self._numbers[storage] for storage in self._trained if storage in self._numbers}
        return value.detach().requires_grad_(self.flow.comes_from(self._number(value), sources))

    def finish(self, result: Any) -> Flow:
        self.flow.outputs = {self._number(t) for t in _tensors(result)}
        return self.flow

    def _number(self, tensor: Tensor) -> int:
        found = self._numbers.get(_storage(tensor))
        return self._new(tensor) if found is None else found

    def _new(self, tensor: Tensor) -> int:
        self._held.append(StorageWeakRef(tensor.untyped_storage()))
        self._numbers[_storage(tensor)] = len(self._held)
        self.flow.dtypes[len(self._held)] = tensor.dtype
        return len(self._held)


def trace(model: nn.Module, run: Callable[[], Any], probes: Mapping[str, Probe]) -> tuple[Flow, Any]:
    """Runs a forward pass of `model` and notes its dataflow; no tensor is held.

    Args:
        model: whose names modules get.
        run: runs the forward pass and returns what the model returns.
        probes: by name of a module, what is called with it, its argument and its result, behind each call of it.
    """
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        names.setdefault(id(module), name)
    tracer = _Tracer(names, probes, {_storage(p) for p in model.parameters() if p.requires_grad})
    with ExitStack() as stack:
        for handle in (
            torch_modules.register_module_forward_pre_hook(tracer.enter),
            torch_modules.register_module_forward_hook(tracer.leave, always_call=True),
        ):
            stack.callback(handle.remove)
        stack.enter_context(AttentionCalls(tracer.attend))
        stack.enter_context(tracer)
        result = run()
    return tracer.finish(result), result


@contextmanager
def no_trace_left() -> Iterator[None]:
    """For a forward pass without gradients inside autocast, whose cache would keep weights that have no graph."""
    torch.clear_autocast_cache()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What products of such tensors are computed in where autocast is on, else None."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if autocasts(device) else None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[i] if i < len(args) else kwargs.get(argument.name))


def _tensors(value: Any, depth: int = _MOST_DEPTH) -> Iterator[Tensor]:
    """All tensors in nested containers, dataclasses and mappings."""
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            yield value
    elif depth == 0:
        return
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner, depth - 1)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner, depth - 1)
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from _tensors(getattr(value, f.name), depth - 1)
