"""Every kind of pass that a step makes over a list of tensors, by name: `pyzo.bench.Passes` with all of them."""

from collections.abc import Callable

from pyzo import ops
from pyzo.bench import EPS, LR, Passes

__all__ = ["DISTRIBUTIONS", "EPS", "LR", "PassKinds"]

DISTRIBUTIONS = tuple(ops.DISTRIBUTIONS)


class PassKinds(Passes):
    """Tensors with the table, the control tensor and the state that a pass over them needs; see `pyzo.bench.Passes`."""

    def undo_perturb(self) -> None:
        """From w + eps z to w - eps z."""
        self.run(undo=0, undo_sign=-1.0, perturb=0, perturb_sign=-1.0)

    def restore(self) -> None:
        """From w - eps z back to w."""
        self.run(undo=0, undo_sign=1.0)

    def conservative(self, *, stochastic: bool) -> None:
        """The updates of a conservative step in place: to w - lr g, back, to w + lr g, back, and to the chosen one."""
        update = {"directions": self.directions, "stochastic": stochastic}
        self.run(undo=self.directions - 1, undo_sign=1.0, **update)
        self.run(update_sign=-1.0, retract=True, **update)
        self.run(update_sign=-1.0, **update)
        self.run(update_sign=1.0, retract=True, **update)
        self.run(chosen=True, **update)

    def calls(self) -> dict[str, Callable[[], None]]:
        """Every kind of pass by name; stochastic rounding only where weights have 16 bits."""
        kinds = {"perturb": self.perturb, "undo+perturb": self.undo_perturb, "restore": self.restore}
        kinds["restore+update nearest"] = lambda: self.restore_update(stochastic=False)
        if self.tensors[0].element_size() == 2:
            kinds["restore+update stochastic"] = lambda: self.restore_update(stochastic=True)
        return kinds
