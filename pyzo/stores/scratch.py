"""The store that never writes to the weights: each module finds its perturbed weights in a buffer while it runs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pyzo.passes import Part, Sweep, Update
from pyzo.stores.arena import Arena
from pyzo.stores.base import Store
from pyzo.stores.lookups import Lookup, leave
from pyzo.stores.scopes import Interception, Scope, scopes_of
from pyzo.stores.watch import Watch

Place = tuple[int, int]  # number of a part of the sweep, and of a tensor in it
Point = tuple[int, float] | Update  # (direction, sign), or an update to be tried or to come


@dataclass
class _Frame:
    """A call that is running: what was put there for it."""

    scope: Scope
    marks: list[tuple[Arena, int, int]]
    opened: list[Place] = field(default_factory=list)


class Scratch(Store):
    """Writes round(w + sign eps z) of a module into a reused buffer when it is called, and drops it afterwards.

    Between calls a weight that is moved is shut: in its place stands a tensor of its shape and dtype full of NaN, so a
    loss that depends on it in a way that was not seen is no number. In the first step every operator is watched: what
    reads a shut weight (`nn.MultiheadAttention` that of its `out_proj`) is given it and has it from then on, the
    innermost module that is running or, outside of all modules, the whole evaluation, which is then repeated. The watch
    comes back where a weight was not seen or a loss was not finite (on a GPU in the next step).

    Embeddings take the rows of a lookup alone.

    An update is written at the end of the step, when nothing can fail any more; blocks that are updated earlier are
    seen so by later evaluations. `extra_bytes` is the largest sum of trained weights that were needed at once.

    Args:
        reason: why this store was chosen.
        module: whose modules find their perturbed weights.
        unused: "error", or "skip" where trained weights may have no part in an evaluation (mixtures of experts).
    """

    name = "scratch"

    def __init__(self, reason: str, module: nn.Module, *, unused: str = "error"):
        super().__init__(reason)
        self._module = module
        self._unused = unused
        self._interception = Interception(self._call)
        self._sweep: Sweep | None = None

    @property
    def extra_bytes(self) -> int:
        if self._sweep is None:
            return 0
        kept = sum(b.numel() * b.element_size() for b in self._own.values())
        return kept + sum(arena.peak for arena in self._arenas.values())

    # A step --------------------------------------------------------------------------------------------------------

    def open(self, sweep: Sweep, *, keep_states: bool) -> None:
        if sweep is not self._sweep:
            self._prepare(sweep)
        self._at: list[Point | None] = [None for _ in sweep]
        self._updates: dict[int, Update] = {}
        self._written: list[int] = []
        self._moved: dict[Place, torch.Tensor] = {}
        self._repeat = False
        self._interception.install(self._scopes)

    def _prepare(self, sweep: Sweep) -> None:
        """What is the same in all steps over the same tensors."""
        self._sweep = sweep
        places = {id(t): (index, place) for index in sweep for place, t in enumerate(sweep.parts[index].tensors)}
        self._scopes = scopes_of(self._module, places)
        self._closure = Scope(None)
        self._arenas = {device: Arena(device) for device in dict.fromkeys(part.control.device for part in sweep.parts)}
        self._shut = {place: _nan_like(self._tensor(place)) for place in places.values()}
        self._shut_at = {t.untyped_storage().data_ptr(): place for place, t in self._shut.items() if t.numel()}
        self._shares: dict[tuple[int, tuple[int, ...]], Part] = {}
        self._own: dict[Place, torch.Tensor] = {}  # buffers of what modules keep
        self._watching = True

    def move(self, parts: list[int], direction: int, sign: float) -> None:
        self.home()
        for index in parts:
            self._at[index] = (direction, sign)

    def home(self) -> None:
        for index in self._sweep:
            self._at[index] = self._updates.get(index)

    def attempt(self, parts: list[int], update: Update) -> None:
        for index in parts:
            self._at[index] = update

    def update(self, parts: list[int], update: Update) -> None:
        for index in parts:
            self._at[index] = self._updates[index] = update

    def close(self) -> None:
        self._interception.remove()
        self._watching = False
        for index, update in self._updates.items():
            self._written.append(index)
            self._sweep.measure(index)
            self._sweep.run(index, update=update)

    def roll_back(self) -> set[int]:
        self._interception.remove()
        self._bring_back()
        if self._sweep.has_states:
            return set(self._written)
        while self._written:
            index = self._written.pop()
            self._sweep.take_back(index, self._updates[index])
        return set()

    def doubt(self) -> None:
        self._watching = True

    # An evaluation -------------------------------------------------------------------------------------------------

    def evaluation(self) -> AbstractContextManager[None]:
        if all(at is None for at in self._at):
            return nullcontext()
        return self._evaluation()

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        self._there: dict[Place, torch.Tensor] = {}  # buffers that parameters point to
        self._made: dict[Place, torch.Tensor] = {}  # buffers that hold to the end of the evaluation
        self._seen: set[Place] = set()
        try:
            for index in self._sweep:
                if self._at[index] is not None:
                    for place, t in enumerate(self._sweep.parts[index].tensors):
                        self._moved[index, place] = t.data
                        t.data = self._shut[index, place]
            self._frames = [self._frame(self._closure)]
            self._open(self._frames[0])
            with Watch(self._shut_at, self._found) if self._watching else nullcontext():
                yield
            self._look_for_unused()
        finally:
            self._bring_back()

    def _bring_back(self) -> None:
        """All parameters are what they were; it may be called at any point, and again."""
        leave()
        for place, home in self._moved.items():
            self._tensor(place).data = home
        self._moved = {}
        for arena in self._arenas.values():
            arena.reset()

    def _look_for_unused(self) -> None:
        """RuntimeError where a weight was moved that nothing saw; before that, a closer look."""
        probed = {index for index in self._sweep if self._at[index] is not self._updates.get(index)}
        unused = [
            self._sweep.parts[index].names[place]
            for index, place in self._moved
            if index in probed and (index, place) not in self._seen
        ]
        if not unused or self._unused == "skip":
            return
        if not self._watching:
            self._watching = self._repeat = True
            return
        raise RuntimeError(
            f"closure: expected it to use every trained parameter, but no module ran with {', '.join(unused)}: "
            "freeze what is not used (requires_grad_(False)), or pass unused='skip'"
        )

    def must_repeat(self, loss: torch.Tensor) -> bool:
        """A shut weight has other strides, for which operators may compute otherwise."""
        repeat, self._repeat = self._repeat, False
        if not self._watching and loss.device.type == "cpu" and not torch.isfinite(loss):
            repeat = self._watching = True
        return repeat

    # A call of a module --------------------------------------------------------------------------------------------

    def _call(self, scope: Scope, call: Callable[[], Any]) -> Any:
        if not self._moved or not (scope.needs or self._watching):
            return call()
        frame = self._frame(scope)
        self._frames.append(frame)
        try:
            place = scope.lookup
            if place is None or place not in self._moved or place in self._there or not self._has_rows(place):
                self._open(frame)
                return call()
            self._open(frame, besides=place)
            with Lookup(self._tensor(place), lambda ids: self._rows(place, ids), lambda: self._open(frame)):
                return call()
        finally:
            self._frames.remove(frame)
            self._shut_again(frame)

    def _frame(self, scope: Scope) -> _Frame:
        return _Frame(scope, [(arena, arena.mark(), arena.strangers()) for arena in self._arenas.values()])

    def _open(self, frame: _Frame, besides: Place | None = None) -> None:
        """Puts all there that a call needs and that is not there; `besides`: but this one."""
        for index, places in frame.scope.needs.items():
            if self._at[index] is not None:
                there = {place for part, place in [*self._there, *([besides] if besides else [])] if part == index}
                needed = tuple(place for place in places if place not in there) if there else places
                if needed:
                    self._put(frame, index, needed)

    def _found(self, place: Place, seen: torch.Tensor) -> torch.Tensor:
        """A shut weight was read, by the innermost call that is running: it needs it from now on."""
        index, number = place
        if place not in self._there:
            frame = self._frames[-1]
            frame.scope.need(index, number)
            self._put(frame, index, (number,))
            self._repeat = True
        buffer = self._there[place]
        if seen.shape != buffer.shape or seen.dtype != buffer.dtype:
            raise RuntimeError(
                f"closure: expected a view of {self._sweep.parts[index].names[number]} to be made while its module "
                "runs, got one that was made before: pass store='snapshot'"
            )
        return buffer

    def _put(self, frame: _Frame, index: int, places: tuple[int, ...]) -> None:
        """Parameters point to their perturbed weights."""
        ready = [place for place in places if (index, place) in self._made]
        fresh = tuple(place for place in places if place not in ready) if ready else places
        if fresh:
            buffers = [self._buffer(frame.scope, (index, place)) for place in fresh]
            self._write(index, fresh, buffers)
        else:
            buffers = []
        for place, buffer in [*zip(fresh, buffers, strict=True), *((p, self._made[index, p]) for p in ready)]:
            self._tensor((index, place)).data = buffer
            self._there[index, place] = buffer
            self._seen.add((index, place))
            frame.opened.append((index, place))
            if buffer is not self._own.get((index, place)):
                self._arena(index).lent += 1

    def _buffer(self, scope: Scope, place: Place) -> torch.Tensor:
        like = self._moved[place]
        if not scope.keeps:
            return self._arena(place[0]).take(place, like)
        if place not in self._own:
            self._own[place] = torch.empty_like(like, memory_format=torch.contiguous_format)
        self._made[place] = self._own[place]
        return self._own[place]

    def _write(self, index: int, places: tuple[int, ...], buffers: list[torch.Tensor]) -> None:
        share = self._share(index, places)
        home = [self._moved[index, place] for place in places]
        at = self._at[index]
        if share.indices:  # what is not listed, too
            torch._foreach_copy_(buffers, home)
            home = []
        if isinstance(at, Update):
            states = [s.clone() for s in share.states]
            self._sweep.run(index, share=share, src=home, dst=buffers, states=states, update=at, trial=True)
        else:
            self._sweep.run(index, share=share, src=home, dst=buffers, perturb=at)

    def _share(self, index: int, places: tuple[int, ...]) -> Part:
        if (index, places) not in self._shares:
            self._shares[index, places] = self._sweep.parts[index].share(places)
        return self._shares[index, places]

    def _has_rows(self, place: Place) -> bool:
        """Whether rows of a weight can be perturbed apart from the others."""
        part, at = self._sweep.parts[place[0]], self._at[place[0]]
        return not part.indices and not (isinstance(at, Update) and part.kept)

    def _rows(self, place: Place, ids: torch.Tensor) -> torch.Tensor:
        """The perturbed rows of an embedding that stand at `ids`, [*ids.shape, d]."""
        index, number = place
        at, share = self._at[index], self._share(index, (number,))
        rows = ids.reshape(-1).long()
        found = functional.embedding(rows, self._moved[place])
        to = {"update": at} if isinstance(at, Update) else {"perturb": at}
        self._sweep.run_rows(index, share, found, rows, **to)
        self._seen.add(place)
        return found.view(*ids.shape, found.shape[1])

    def _shut_again(self, frame: _Frame) -> None:
        """After a call: its buffers are free again, unless somebody has views of them."""
        for place in frame.opened:
            if place not in self._there:
                continue  # the evaluation has ended meanwhile
            buffer = self._there.pop(place)
            self._tensor(place).data = self._shut[place]
            if buffer is not self._own.get(place):
                self._arena(place[0]).lent -= 1
        for arena, mark, strangers in frame.marks:
            if frame.opened and arena.strangers() > strangers:
                frame.scope.keeps = True
                arena.hold()
            arena.release(mark)

    def _tensor(self, place: Place) -> torch.Tensor:
        return self._sweep.parts[place[0]].tensors[place[1]]

    def _arena(self, index: int) -> Arena:
        return self._arenas[self._sweep.parts[index].control.device]


def _nan_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, all NaN, that takes no memory."""
    return torch.full((), float("nan"), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
