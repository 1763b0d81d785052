"""The trained tensors of a step, grouped by device, and the passes over them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pyzo import ops
from pyzo.control import Control


@dataclass(frozen=True)
class Trained:
    """One trained tensor: its name in messages, its noise key, and the control row (parameter group) that rules it."""

    name: str
    tensor: torch.Tensor
    key: int
    row: int


@dataclass
class Part:
    """The trained tensors of one device with that device's control tensor."""

    tensors: list[torch.Tensor]
    names: list[str]
    table: torch.Tensor
    control: Control


class Sweep:
    """Passes over all trained tensors, one operator call per device.

    Args:
        trained: the tensors; none may share memory with another.
        controls: a control tensor for every device that occurs.
        distribution: "normal" or "rademacher".
        stochastic: whether updates of 16-bit weights round stochastically.

    Raises:
        ValueError: a tensor that no pass can work on, by name, before anything is written.
    """

    def __init__(
        self, trained: list[Trained], controls: dict[torch.device, Control], distribution: str, stochastic: bool
    ):
        self._distribution = ops.distribution_code(distribution)
        self._stochastic = stochastic
        self.parts: list[Part] = []
        for device, control in controls.items():
            own = [t for t in trained if t.tensor.device == device]
            lines = [(t.key, 0, 0, 0, t.row) for t in own]
            table = torch.tensor(lines, dtype=torch.int64).reshape(len(own), 5)
            self.parts.append(Part([t.tensor for t in own], [t.name for t in own], table, control))
        for index in self:
            self.run(index)  # without undo, update or perturbation: the operator's checks alone

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.parts)))

    def run(
        self,
        index: int,
        *,
        src: list[torch.Tensor] | None = None,
        undo: tuple[int, float] | None = None,
        directions: int = 0,
        perturb: tuple[int, float] | None = None,
    ) -> None:
        """One pass over part `index`. `undo` and `perturb` are (direction, sign); see `pyzo.ops.pass_`.

        Raises ValueError naming the parameter that the operator refuses; then nothing was written.
        """
        part = self.parts[index]
        undo_direction, undo_sign = undo or (-1, 0.0)
        perturb_direction, perturb_sign = perturb or (-1, 0.0)
        try:
            ops.pass_(
                src or [],
                part.tensors,
                part.table,
                part.control.tensor,
                distribution=self._distribution,
                undo=undo_direction,
                undo_sign=undo_sign,
                directions=directions,
                perturb=perturb_direction,
                perturb_sign=perturb_sign,
                stochastic=self._stochastic,
            )
        except RuntimeError as error:
            named = [f"dst[{i}] is {name}" for i, name in enumerate(part.names) if f"dst[{i}]" in str(error)]
            if not named:
                raise
            raise ValueError(f"parameters: {str(error).splitlines()[0]} ({', '.join(named)})") from error
