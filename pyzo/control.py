"""The control tensor of a device: what a pass needs that changes from step to step, laid out as csrc/core/control.h."""

import torch

from pyzo import ops

LINES = 3
OK, SKIPPED, DRAW, APPLIED, RUN_SEED, ROUNDING_SEED = range(6)
LR, EPS, WEIGHT_DECAY, COEFFICIENTS = range(4)


class Control:
    """A control tensor with names for its parts. Reading waits for the device; writing and stepping do not."""

    def __init__(self, directions: int, rows: int, device: torch.device, seed: int):
        self.tensor = ops.control(directions, rows, device)
        self._doubles = self.tensor.view(torch.float64)
        self._rows: list[tuple[float, ...]] | None = None
        self.tensor[0, RUN_SEED] = ops.signed(seed)

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def write_rows(self, rows: list[tuple[float, float, float]]) -> None:
        """Set (lr, eps, weight decay) of every row; a no-op when nothing changed."""
        if rows != self._rows:
            self._doubles[LINES:, :COEFFICIENTS].copy_(torch.tensor(rows, dtype=torch.float64), non_blocking=True)
            self._rows = rows

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

    def take_back_draw(self) -> None:
        """Undo the counting of a step that was begun and failed, without waiting for the device."""
        self.tensor[0, DRAW].sub_(1)

    def read_skipped(self) -> int:
        return int(self.tensor[0, SKIPPED])

    def read_losses(self, count: int) -> torch.Tensor:
        return self._doubles[2, :count].cpu()

    def read_coefficients(self, count: int) -> torch.Tensor:
        return self._doubles[LINES:, COEFFICIENTS : COEFFICIENTS + count].cpu()

    def read_seeds(self, count: int) -> list[int]:
        return [seed % (1 << 64) for seed in self.tensor[1, :count].tolist()]
