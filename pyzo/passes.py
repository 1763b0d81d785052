"""The trained tensors of a step, grouped by device, and the passes over them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pyzo import ops
from pyzo.control import Control


@dataclass(frozen=True)
class Trained:
    """One trained tensor: its name in messages, its noise key, its row of the control tensor, its state."""

    name: str
    tensor: torch.Tensor
    key: int
    row: int
    state: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Update:
    """The update of a pass: along how many directions, with which factor of lr; see `pyzo.ops.pass_`."""

    directions: int
    sign: float = 1.0
    chosen: bool = False
    retract: bool = False


@dataclass
class Part:
    """The trained tensors of one device with that device's control tensor."""

    tensors: list[torch.Tensor]
    names: list[str]
    states: list[torch.Tensor]
    table: torch.Tensor
    control: Control


class Sweep:
    """Passes over all trained tensors, one operator call per device.

    Args:
        trained: the tensors; none may share memory with another.
        controls: a control tensor for every device that occurs.
        distribution: "normal" or "rademacher".
        rule: a name of `pyzo.ops.RULES`.
        stochastic: whether updates of 16-bit weights and states round stochastically.

    `masked`: whether passes heed the masks of the rows.

    Raises:
        ValueError: a tensor that no pass can work on, by name, before anything is written.
    """

    def __init__(
        self,
        trained: list[Trained],
        controls: dict[torch.device, Control],
        *,
        distribution: str,
        rule: str,
        stochastic: bool,
    ):
        self._distribution = ops.distribution_code(distribution)
        self._rule = ops.RULES[rule]
        self._stochastic = stochastic
        self.masked = False
        self.parts: list[Part] = []
        for device, control in controls.items():
            own = [t for t in trained if t.tensor.device == device]
            lines = [(t.key, 0, 0, 0, t.row) for t in own]
            table = torch.tensor(lines, dtype=torch.int64).reshape(len(own), 5)
            states = [t.state[s] for s in range(ops.STATES[rule]) for t in own]
            self.parts.append(Part([t.tensor for t in own], [t.name for t in own], states, table, control))
        for index in self:
            self.run(index)  # without undo, update or perturbation: the operator's checks alone

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.parts)))

    def run(
        self,
        index: int,
        *,
        src: list[torch.Tensor] | None = None,
        dst: list[torch.Tensor] | None = None,
        undo: tuple[int, float] | None = None,
        update: Update | None = None,
        perturb: tuple[int, float] | None = None,
    ) -> None:
        """One pass over part `index`. `undo` and `perturb` are (direction, sign); see `pyzo.ops.pass_`.

        `src` and `dst` stand for the tensors themselves where they are not given. Raises ValueError naming the
        parameter that the operator refuses; then nothing was written.
        """
        part = self.parts[index]
        undo_direction, undo_sign = undo or (-1, 0.0)
        perturb_direction, perturb_sign = perturb or (-1, 0.0)
        update = update or Update(0)
        try:
            ops.pass_(
                src or [],
                dst or part.tensors,
                part.states if dst is None else [],
                part.table,
                part.control.tensor,
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
                masked=self.masked,
            )
        except RuntimeError as error:
            named = [f"dst[{i}] is {name}" for i, name in enumerate(part.names) if f"dst[{i}]" in str(error)]
            if not named:
                raise
            raise ValueError(f"parameters: {str(error).splitlines()[0]} ({', '.join(named)})") from error
