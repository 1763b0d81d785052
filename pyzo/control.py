"""The control tensor of a device: what a pass needs that changes from step to step, laid out as csrc/core/control.h."""

import math
from typing import NamedTuple

import torch

from pyzo import ops
from pyzo.ops.steps import KEEP_ALL

LINES = 3
OK, SKIPPED, DRAW, APPLIED, RUN_SEED, ROUNDING_SEED, CHOICE, FIRST = range(8)
LR, EPS, WEIGHT_DECAY, BETA1, BETA2, DAMPENING, RULE_EPS, OPTION = range(8)  # float64
BORN, AGE, CORRECTION1, CORRECTION2, KEEP, REFRESH, MASK_SEED, THRESHOLD = range(8, 16)
COEFFICIENTS = 16


class Row(NamedTuple):
    """What the host sets of a row: the scalars that some tensors share."""

    lr: float
    eps: float
    weight_decay: float = 0.0
    beta1: float = 0.0  # also: momentum
    beta2: float = 0.0
    dampening: float = 0.0
    rule_eps: float = 0.0
    option: float = 0.0  # Nesterov; decoupled decay
    born: int = 0  # how many updates were applied before the row's tensors joined
    keep: int = KEEP_ALL  # of 65536: how much a mask keeps
    refresh: int = 1  # steps that a mask lasts
    threshold: float = math.inf  # of the magnitudes that a mask keeps


class Control:
    """A control tensor with names for its parts. Reading waits for the device; writing and stepping do not."""

    def __init__(self, directions: int, rows: int, device: torch.device, seed: int, first: int = 0):
        """`first`: which of the step's directions is the first here, and so which seeds are drawn."""
        self.tensor = ops.control(directions, rows, device)
        self._doubles = self.tensor.view(torch.float64)
        self._directions = directions
        self._rows: list[Row] | None = None
        self.tensor[0, RUN_SEED] = ops.signed(seed)
        self.tensor[0, FIRST] = first

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def write_rows(self, rows: list[Row]) -> None:
        """Set the scalars of every row; a no-op when nothing changed."""
        if rows == self._rows:
            return
        words = torch.zeros(len(rows), MASK_SEED, dtype=torch.int64)
        words.view(torch.float64)[:, :BORN] = torch.tensor([row[:BORN] for row in rows], dtype=torch.float64)
        words[:, BORN] = torch.tensor([row.born for row in rows])
        words[:, KEEP:] = torch.tensor([(row.keep, row.refresh) for row in rows])
        thresholds = torch.tensor([row.threshold for row in rows], dtype=torch.float64)
        self.tensor[LINES:, :MASK_SEED].copy_(words, non_blocking=True)
        self._doubles[LINES:, THRESHOLD].copy_(thresholds, non_blocking=True)
        self._rows = list(rows)

    def row_values(self, row: int) -> Row:
        """What `write_rows` wrote last into a row."""
        return self._rows[row]

    def remember(self) -> torch.Tensor:
        """A copy on the device, for `recall`."""
        return self.tensor.clone()

    def recall(self, copy: torch.Tensor) -> None:
        """Undo what a step wrote that failed (counters, seeds, losses), without waiting for the device."""
        self.tensor.copy_(copy)

    def read_header(self) -> dict[str, int]:
        """Run seed and counters, as `write_header` takes them."""
        line = self.tensor[0].tolist()
        return {
            "seed": line[RUN_SEED] % (1 << 64),
            "draw": line[DRAW],
            "applied": line[APPLIED],
            "skipped": line[SKIPPED],
        }

    def write_header(self, header: dict[str, int]) -> None:
        for word, name in ((RUN_SEED, "seed"), (DRAW, "draw"), (APPLIED, "applied"), (SKIPPED, "skipped")):
            self.tensor[0, word] = ops.signed(header[name])

    def read_skipped(self) -> int:
        return int(self.tensor[0, SKIPPED])

    def read_choice(self) -> int:
        return int(self._doubles[0, CHOICE])

    def read_losses(self, count: int) -> torch.Tensor:
        return self._doubles[2, :count].cpu()

    def read_candidates(self) -> torch.Tensor:
        first = 2 * self._directions + 1
        return self._doubles[2, first : first + 3].cpu()

    def read_coefficients(self, count: int) -> torch.Tensor:
        return self._doubles[LINES:, COEFFICIENTS : COEFFICIENTS + count].cpu()

    def read_seeds(self, count: int) -> list[int]:
        return [seed % (1 << 64) for seed in self.tensor[1, :count].tolist()]
