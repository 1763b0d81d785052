"""The step of every method: probe, estimate, update, as the papers say it and pass by pass, on the operators above.

A method is a choice of distribution, mask, estimator and rule (what is not named is "two-sided", q = 1, "plain"):
    ZO-SGD (MeZO, arXiv 2305.17333, algorithm 1)  rule "sgd"; q > 1: n-SPSA
    ZO-SGD, one-sided                             rule "sgd", estimator "one-sided"
    FZOO (arXiv 2506.09034)                       rule "sgd", estimator "one-sided", scaling "std", "rademacher"
    ZO-SGD-Sign (arXiv 2402.11592)                rule "sign"; with the sign of the scalar alone: "sgd", scaling "sign"
    ZO-SGD-MMT (arXiv 2402.11592)                 rule "momentum"
    ZO-SGD-Cons (arXiv 2402.11592)                rule "sgd", conservative=True
    ZO-Adam, ZO-AdamW                             rule "adam", option=False, True
    Forward-Grad (arXiv 2202.08587)               rule "sgd", estimator "forward"
    sparse gradient (arXiv 2402.11592)            any of them with keep < 65536 in its row
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .arithmetic import round_nearest
from .control import ESTIMATORS, SCALINGS, Row, begin_step_, choose_, estimate_, new_control, read_row, read_seed
from .field import DISTRIBUTIONS, draw
from .passes import packed_elements, pass_, trained_elements
from .rules import RULES, STATES
from .stores import STORES, InPlace, Snapshot

NO_PASS = {
    "undo": -1,
    "undo_sign": 0.0,
    "directions": 0,
    "update_sign": 1.0,
    "chosen": False,
    "retract": False,
    "perturb": -1,
    "perturb_sign": 0.0,
    "trial": False,
}


class Method:
    """A run of a method: named weights, changed in place, with the control tensor and the states of its steps.

    Args:
        parameters: name -> weights on the CPU, contiguous, float32, bfloat16 or float16, each a whole tensor.
        keys: name -> 56-bit tensor key.
        rows: the scalars of all tensors, or several rows; of each: lr, eps, what the rule reads, born, keep, refresh.
        row_of: name -> row; a name that it lacks has row 0.
        rule: one of RULES.
        estimator: one of ESTIMATORS.
        q: number of directions.
        scaling: one of SCALINGS.
        distribution: one of DISTRIBUTIONS.
        store: one of STORES.
        stochastic: stochastic rounding of updates of 16-bit weights and bfloat16 states.
        state_dtype: of the states, float32 or bfloat16.
        seed: of the run, 64 bits.
        conservative: end where the loss is least among w, w - lr g, w + lr g (rule "sgd" or "sign").
        split: bfloat16 weights have a float32 master (store "snapshot").
        bits: name -> packed mask, for every parameter; or none.

    Attributes:
        control: the control tensor; `control.write_row` changes scalars between steps.
        states: state name -> parameter name -> tensor of the parameter's shape, zero at first.
        low: parameter name -> low bits of the master, int16, zero at first, of the parameter's shape; with `split`.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        keys: dict[str, int],
        rows: Row | Sequence[Row],
        *,
        row_of: dict[str, int] | None = None,
        rule: str = "sgd",
        estimator: str = "two-sided",
        q: int = 1,
        scaling: str = "plain",
        distribution: str = "normal",
        store: str = "inplace",
        stochastic: bool = True,
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        conservative: bool = False,
        split: bool = False,
        bits: dict[str, Tensor] | None = None,
    ):
        self.parameters = parameters
        self.control = new_control(q, [rows] if isinstance(rows, Row) else list(rows), seed)
        self.states = {
            state: {name: torch.zeros_like(w, dtype=state_dtype) for name, w in parameters.items()}
            for state in STATES[rule]
        }
        self.low = {
            name: torch.zeros(w.shape if w.dtype == torch.bfloat16 else 0, dtype=torch.int16)
            for name, w in parameters.items()
            if split
        }
        self._bits = bits
        self._table = torch.tensor([[keys[name], 0, 0, 0, (row_of or {}).get(name, 0)] for name in parameters])
        self._rule, self._estimator, self._q, self._scaling = rule, estimator, q, scaling
        self._distribution, self._stochastic = DISTRIBUTIONS.index(distribution), stochastic
        self._store, self._conservative = STORES[store], conservative

    def step(self, closure: Callable[..., Any]) -> Tensor:
        """One step.

        Args:
            closure: returns the loss at the current weights, a scalar. Estimator "forward": takes the tangents
                (name -> tensor) and returns the loss and its derivative along them.

        Returns:
            float64: the losses as `estimate_` takes them.
        """
        begin_step_(self.control)
        weights = self._store(self._sweep, list(self.parameters.values()))
        losses = torch.tensor(self._probe(closure, weights), dtype=torch.float64)
        estimate_(self.control, losses, ESTIMATORS.index(self._estimator), self._q, SCALINGS.index(self._scaling))
        if self._conservative:
            candidates = [float(losses[-1 if self._estimator == "two-sided" else 0])]
            for sign in (1.0, -1.0):
                weights.candidate(self._q, sign)
                candidates.append(float(closure()))
            choose_(self.control, torch.tensor(candidates, dtype=torch.float64))
            weights.update_chosen(self._q)
        else:
            weights.update(self._q)
        return losses

    def _probe(self, closure: Callable[..., Any], weights: InPlace | Snapshot) -> list[float]:
        """The losses that the estimator asks for; a conservative two-sided step adds l(w), seen before all others."""

        def loss() -> float:
            return float(closure())

        def loss_at(k: int, sign: float) -> float:
            weights.move(k, sign)
            return loss()

        directions = range(self._q)
        if self._estimator == "forward":
            return [float(x) for k in directions for x in closure(self._tangents(k))]
        if self._estimator == "one-sided":
            weights.base()
            return [loss(), *(loss_at(k, 1.0) for k in directions)]
        at_base = []
        if self._conservative:
            weights.base()
            at_base = [loss()]
        return [loss_at(k, sign) for k in directions for sign in (1.0, -1.0)] + at_base

    def _tangents(self, k: int) -> dict[str, Tensor]:
        """Direction k as tensors like the weights, zero where the mask keeps a weight."""
        tangents = {}
        for (name, w), (key, *_, r) in zip(self.parameters.items(), self._table.tolist(), strict=True):
            index, row = torch.arange(w.numel()), read_row(self.control, r)
            z = draw(self._distribution, read_seed(self.control, k), key, index)
            trained = trained_elements(row, key, index, w.reshape(-1).to(torch.float32))
            if self._bits is not None:
                trained &= packed_elements(self._bits[name], index)
            z = torch.where(trained, z, 0.0)
            tangents[name] = round_nearest(z, w.dtype).to(w.dtype).view(w.shape)
        return tangents

    def _sweep(self, src: Sequence[Tensor] = (), **arguments: Any) -> None:
        """One pass over all weights."""
        pass_(
            list(src),
            list(self.parameters.values()),
            [state for by_name in self.states.values() for state in by_name.values()],
            [] if self._bits is None else [self._bits[name] for name in self.parameters],
            [],
            list(self.low.values()),
            self._table,
            self.control,
            distribution=self._distribution,
            rule=RULES.index(self._rule),
            stochastic=self._stochastic,
            masked=True,
            **NO_PASS | arguments,
        )
