"""Calls pyzo's pass on a list of tensors the way its optimizer does, without the optimizer around it."""

from collections.abc import Callable, Sequence

import torch

from pyzo import control, ops

DISTRIBUTIONS = tuple(ops.DISTRIBUTIONS)
LR, EPS = 1e-6, 1e-3


class PassKinds:
    """Tensors with the table and the control tensor that a pass over them needs.

    Args:
        tensors: contiguous tensors of one dtype on one device, changed in place.
        distribution: "normal" or "rademacher".
        directions: how many directions an update sums.
        seed: of the run, from which the directions' seeds are drawn.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], *, distribution: str, directions: int = 1, seed: int = 1
    ) -> None:
        self.tensors = list(tensors)
        self.distribution = ops.distribution_code(distribution)
        self.directions = directions
        self.table = torch.tensor([[1 + key, 0, 0, 0, 0] for key in range(len(self.tensors))], dtype=torch.int64)
        state = control.Control(directions, 1, self.tensors[0].device, seed)
        state.write_rows([(LR, EPS, 0.0)])
        ops.begin_step_(state.tensor)
        coefficients = slice(control.COEFFICIENTS, control.COEFFICIENTS + directions)
        values = torch.linspace(-1.0, 2.0, directions, dtype=torch.float64)  # of both signs
        state.tensor.view(torch.float64)[control.LINES, coefficients] = values.to(state.device)
        self.control = state.tensor

    def perturb(self) -> None:
        """w + eps z."""
        self._pass(perturb=0, perturb_sign=1.0)

    def undo_perturb(self) -> None:
        """From w + eps z to w - eps z."""
        self._pass(undo=0, undo_sign=-1.0, perturb=0, perturb_sign=-1.0)

    def restore(self) -> None:
        """From w - eps z back to w."""
        self._pass(undo=0, undo_sign=1.0)

    def restore_update(self, *, stochastic: bool) -> None:
        """From w - eps z of the last direction back to w, then the SGD step along all directions."""
        self._pass(undo=self.directions - 1, undo_sign=1.0, directions=self.directions, stochastic=stochastic)

    def calls(self) -> dict[str, Callable[[], None]]:
        """Every kind of pass by name; stochastic rounding only where weights have 16 bits."""
        kinds = {"perturb": self.perturb, "undo+perturb": self.undo_perturb, "restore": self.restore}
        kinds["restore+update nearest"] = lambda: self.restore_update(stochastic=False)
        if self.tensors[0].element_size() == 2:
            kinds["restore+update stochastic"] = lambda: self.restore_update(stochastic=True)
        return kinds

    def _pass(self, **what: float) -> None:
        ops.pass_([], self.tensors, self.table, self.control, distribution=self.distribution, **what)
