"""The trained tensors of a step, in parts that one operator call takes, and the passes over them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from pyzo import ops
from pyzo.control import KEEP_ALL, Control
from pyzo.masks import TensorMask

BlockControls = dict[torch.device, Control]


@dataclass(frozen=True)
class Trained:
    """One trained tensor: its name in messages, its noise key, its row of the control tensor, its state, its mask.

    `low` are the low bits of its float32 master, where it has one; see `pyzo.ops.pass_`.
    """

    name: str
    tensor: torch.Tensor
    key: int
    row: int
    state: tuple[torch.Tensor, ...] = ()
    block: int = 0
    mask: TensorMask = field(default_factory=TensorMask)
    low: torch.Tensor | None = None

    @property
    def is_listed(self) -> bool:
        return self.mask.indices is not None

    @property
    def is_measured(self) -> bool:
        """Whether which elements move depends on their magnitude."""
        return self.mask.threshold < torch.inf


@dataclass(frozen=True)
class Update:
    """The update of a pass: along how many directions, with which factor of lr; see `pyzo.ops.pass_`."""

    directions: int
    sign: float = 1.0
    chosen: bool = False
    retract: bool = False


@dataclass
class Part:
    """Trained tensors of one block on one device, all with lists of indices or all without, and their control tensor.

    `bits` has one packed mask per tensor, empty for those without, or is empty itself, and so has `low` the low bits of
    masters. `measured` are the places of the tensors whose bits are made from magnitudes, by `Sweep.measure`.
    """

    block: int
    tensors: list[torch.Tensor]
    names: list[str]
    states: list[torch.Tensor]
    table: torch.Tensor
    control: Control
    bits: list[torch.Tensor]
    indices: list[torch.Tensor]
    measured: list[int]
    rows: frozenset[int]
    low: list[torch.Tensor]
    masked: bool = False

    @property
    def kept(self) -> list[torch.Tensor]:
        """What an update moves besides the weights."""
        return [*self.states, *self.low]

    def share(self, places: Sequence[int]) -> "Part":
        """Some of the tensors, as a part of their own that is read from copies: its bits note no magnitudes."""
        count = len(self.tensors)
        none = torch.empty(0, dtype=torch.uint8, device=self.tensors[0].device)
        return replace(
            self,
            tensors=[self.tensors[i] for i in places],
            names=[self.names[i] for i in places],
            states=[self.states[s + i] for s in range(0, len(self.states), count) for i in places],
            table=self.table[list(places)].contiguous(),
            bits=[none if i in self.measured else self.bits[i] for i in places] if self.bits else [],
            indices=[self.indices[i] for i in places] if self.indices else [],
            measured=[],
            low=[self.low[i] for i in places] if self.low else [],
        )

    def copies(self) -> list[torch.Tensor]:
        """Uninitialised memory for what a step may move: the listed elements, or the whole tensors."""
        if not self.indices:
            return [torch.empty_like(t, requires_grad=False) for t in self.tensors]
        return [t.new_empty(len(i), requires_grad=False) for t, i in zip(self.tensors, self.indices, strict=True)]

    def save(self, copies: list[torch.Tensor]) -> None:
        """Copies what a step may move into `copies`."""
        if not self.indices:
            torch._foreach_copy_(copies, [t.detach() for t in self.tensors])
            return
        for t, indices, copy in zip(self.tensors, self.indices, copies, strict=True):
            torch.index_select(t.detach().view(-1), 0, indices, out=copy)


class Sweep:
    """Passes over the trained tensors, one operator call for each part.

    Args:
        trained: the tensors; none may share memory with another.
        controls: for every block, a control tensor for every device on which it has tensors.
        distribution: "normal" or "rademacher".
        rule: a name of `pyzo.ops.RULES`.
        stochastic: whether updates of 16-bit weights and states round stochastically.

    Raises:
        ValueError: a tensor that no pass can work on, by name, before anything is written.
    """

    def __init__(
        self,
        trained: list[Trained],
        controls: list[BlockControls],
        *,
        distribution: str,
        rule: str,
        stochastic: bool,
    ):
        self._distribution = ops.distribution_code(distribution)
        self._rule = ops.RULES[rule]
        self._stochastic = stochastic
        self.parts: list[Part] = []
        for block, by_device in enumerate(controls):
            for device, control in by_device.items():
                for listed in (False, True):
                    own = [t for t in trained if (t.block, t.tensor.device, t.is_listed) == (block, device, listed)]
                    if own:
                        self.parts.append(_part(block, own, control, ops.STATES[rule]))
        self.has_states = any(part.kept for part in self.parts)  # which the opposite of an update does not bring back
        for index in self:
            self.run(index)  # without undo, update or perturbation: the operator's checks alone

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.parts)))

    def of(self, blocks: tuple[int, ...]) -> list[int]:
        """The parts of some blocks."""
        return [index for index in self if self.parts[index].block in blocks]

    def heed_masks(self) -> None:
        """Looks at the rows of the control tensors and at bits, whether the passes of a part need to heed masks."""
        for part in self.parts:
            rows = [part.control.row_values(row) for row in part.rows]
            part.masked = bool(part.bits) or any(row.keep < KEEP_ALL or row.threshold < torch.inf for row in rows)

    def measure(self, index: int) -> None:
        """Notes in bits which weights of a part are small now, for passes that do not read them from a copy."""
        part = self.parts[index]
        if part.measured:
            own = [part.tensors[i].detach() for i in part.measured]
            for i, t in zip(part.measured, own, strict=True):
                if not part.bits[i].numel():
                    part.bits[i] = torch.empty((t.numel() + 7) // 8, dtype=torch.uint8, device=t.device)
            bits = [part.bits[i] for i in part.measured]
            ops.mask_bits_(own, bits, part.table[part.measured].contiguous(), part.control.tensor)

    def run(
        self,
        index: int,
        *,
        share: Part | None = None,
        src: list[torch.Tensor] | None = None,
        dst: list[torch.Tensor] | None = None,
        states: list[torch.Tensor] | None = None,
        undo: tuple[int, float] | None = None,
        update: Update | None = None,
        perturb: tuple[int, float] | None = None,
        trial: bool = False,
    ) -> None:
        """A pass over part `index` or a share of it. `undo` and `perturb` are (direction, sign); see `pyzo.ops.pass_`.

        `src` (copies as `Part.copies` has them), `dst` and `states` stand for the tensors themselves and their states
        where they are not given; with another `dst` there are no states but given ones. An update also moves the low
        bits of masters, unless it is a `trial`.
        Raises ValueError naming the parameter that the operator refuses; then nothing was written.
        """
        part = share or self.parts[index]
        if states is None:
            states = part.states if dst is None else []
        undo_direction, undo_sign = undo or (-1, 0.0)
        perturb_direction, perturb_sign = perturb or (-1, 0.0)
        low = [] if (undo or perturb) and not update else part.low  # they count in updates, and are checked without
        update = update or Update(0)
        try:
            ops.pass_(
                src or [],
                dst or part.tensors,
                states,
                part.table,
                part.control.tensor,
                bits=part.bits,
                indices=part.indices,
                low=low,
                distribution=self._distribution,
                undo=undo_direction,
                undo_sign=undo_sign,
                rule=self._rule,
                directions=update.directions,
                update_sign=update.sign,
                chosen=update.chosen,
                retract=update.retract,
                perturb=perturb_direction,
                perturb_sign=perturb_sign,
                stochastic=self._stochastic,
                masked=self.parts[index].masked,
                trial=trial,
            )
        except RuntimeError as error:
            named = [f"dst[{i}] is {name}" for i, name in enumerate(part.names) if f"dst[{i}]" in str(error)]
            if not named:
                raise
            raise ValueError(f"parameters: {str(error).splitlines()[0]} ({', '.join(named)})") from error

    def take_back(self, index: int, update: Update) -> None:
        """Makes the opposite update, rounded with the complement of its bits; rules that keep state do not allow it."""
        self.run(index, update=replace(update, sign=-update.sign, retract=True))

    def run_rows(
        self,
        index: int,
        share: Part,
        out: torch.Tensor,
        ids: torch.Tensor,
        *,
        update: Update | None = None,
        perturb: tuple[int, float] | None = None,
    ) -> None:
        """What a pass from a copy does to the only tensor of a share [rows, d], on some of its rows alone.

        Args:
            out: [n, d], a copy of rows of the tensor, which is overwritten.
            ids: int64 [n], which rows they are.
        """
        direction, sign = perturb or (-1, 0.0)
        update = update or Update(0)
        ops.pass_rows_(
            [out],
            [ids],
            [share.tensors[0].shape[0]],
            share.table,
            share.control.tensor,
            bits=share.bits,
            distribution=self._distribution,
            rule=self._rule,
            directions=update.directions,
            update_sign=update.sign,
            chosen=update.chosen,
            perturb=direction,
            perturb_sign=sign,
            stochastic=self._stochastic,
            masked=self.parts[index].masked,
        )


def _part(block: int, own: list[Trained], control: Control, states: int) -> Part:
    lines = [(t.key, 0, 0, 0, t.row) for t in own]
    listed = own[0].is_listed
    measured = [] if listed else [i for i, t in enumerate(own) if t.is_measured]
    bits: list[torch.Tensor] = []
    if measured or any(t.mask.bits is not None for t in own):
        bits = [
            torch.empty(0, dtype=torch.uint8, device=t.tensor.device) if t.mask.bits is None else t.mask.bits
            for t in own
        ]
    low: list[torch.Tensor] = []
    if any(t.low is not None for t in own):
        low = [torch.empty(0, dtype=torch.int16, device=t.tensor.device) if t.low is None else t.low for t in own]
    return Part(
        block,
        [t.tensor for t in own],
        [t.name for t in own],
        [t.state[s] for s in range(states) for t in own],
        torch.tensor(lines, dtype=torch.int64).reshape(len(own), 5),
        control,
        bits,
        [t.mask.indices for t in own if t.mask.indices is not None],
        measured,
        frozenset(t.row for t in own),
        low,
    )
