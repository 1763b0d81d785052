"""The step of all zeroth-order optimizers: probe, estimate, update, and take everything back if anything fails."""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from pyzo import ops
from pyzo.control import KEEP_ALL, Control, Row
from pyzo.estimators import FORWARD, Estimator, TwoSided
from pyzo.field import NOISE_VERSION
from pyzo.interrupts import DeferredInterrupts
from pyzo.masks import Random
from pyzo.optim.params import Params, named_tensors, read_params
from pyzo.optim.points import Points, warn_of_quantum
from pyzo.optim.ranks import Ranks
from pyzo.passes import Sweep, Trained, Update
from pyzo.stores import InPlace, choose

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from pyzo.optim.graph import Captured

__all__ = ["Last", "Params", "ZOOptimizer"]

RowKey = tuple[int, bool, int]  # group, whether its weights decay, how many updates were applied before they joined


@dataclass(frozen=True)
class Last:
    """What the latest step saw. Reading waits for the device.

    Attributes:
        losses: float64, as the estimator took them (`pyzo.estimators`), averaged over ranks.
        coefficients: float64 [groups, q]: c of g = sum c_k z_k, per parameter group.
        seeds: of the directions, integers in [0, 2^64).
        candidates: float64 [3], of a conservative step: l(w), l(w - lr g), l(w + lr g); else None.
        choice: of a conservative step: 0, 1 or -1 for the three in this order; else None.
    """

    losses: torch.Tensor
    coefficients: torch.Tensor
    seeds: list[int]
    candidates: torch.Tensor | None = None
    choice: int | None = None


class ZOOptimizer(torch.optim.Optimizer):
    """Base of the zeroth-order optimizers. `step` needs a closure that returns the loss; there is no backward pass.

    Args:
        params: a module (its parameters that require gradients), parameters, (name, parameter) pairs or parameter
            groups. Names (a module has them) make the noise independent of the order of parameters.
        defaults: what the method keeps per parameter group, `lr` among it.
        eps: length of the probe; 1e-3 for full weights, 1e-2 for LoRA, 1e-1 for prefixes (arXiv 2305.17333).
        weight_decay: of all trained weights, but not of biases and norm weights where `params` is a module.
        estimator: one of `pyzo.estimators`; None: TwoSided(q=1).
        mask: `pyzo.masks.Random`, or None: every element moves.
        distribution: "normal" or "rademacher" directions.
        store: "inplace", "snapshot" or "auto"; what was chosen and why is in `opt.store`.
        rounding: "stochastic" or "nearest" rounding of updates of 16-bit weights and states.
        state_dtype: torch.float32 or torch.bfloat16, of what the rule keeps per weight.
        seed: of the run, in [0, 2^64). The same seed and losses give the same weights, bit for bit.
        process_group: of data-parallel ranks, whose losses are averaged; None: this process alone.

    `lr`, `eps`, `weight_decay`, `mask` and the method's own numbers may be set per group, and changed between steps by
    hand or by a scheduler.
    """

    rule: str = "sgd"  # of pyzo.ops.RULES
    state_names: tuple[str, ...] = ()

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        estimator: Estimator | None = None,
        mask: Random | None = None,
        distribution: str = "normal",
        store: str = "auto",
        rounding: str = "stochastic",
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        process_group: "ProcessGroup | None" = None,
    ):
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding: expected 'stochastic' or 'nearest', got {rounding!r}")
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype: expected torch.float32 or torch.bfloat16, got {state_dtype}")
        if estimator is not None and not isinstance(estimator, Estimator):
            raise TypeError(f"estimator: expected one of pyzo.estimators, got {type(estimator).__name__}")
        ops.distribution_code(distribution)
        self._seed = ops.check_unsigned("seed", seed, 64)
        self._estimator = estimator or TwoSided()
        self._distribution = distribution
        self._stochastic = rounding == "stochastic"
        self._state_dtype = state_dtype
        self._ranks = Ranks(process_group)
        self._controls: dict[torch.device, Control] = {}
        self._rows: list[RowKey] = []
        self._born: dict[torch.Tensor, int] = {}  # how many applied updates a tensor had no part in
        self._paused: dict[torch.Tensor, int] = {}  # how many were applied before a tensor was frozen
        self._sweep: Sweep | None = None
        self._signature: list[tuple[Any, ...]] = []
        self._losses_seen = 0
        self._warned_skips = 0
        self._warned_dtype = False
        self._mode = "live"  # or "idle", "recording": see pyzo/optim/graph.py
        given = read_params(params)
        self._undecayed = given.undecayed
        super().__init__(given.groups, {**defaults, "eps": eps, "weight_decay": weight_decay, "mask": mask})
        self._choose_rule()
        for index in range(len(self.param_groups)):
            self._check_group(index)
        tensors = [named.tensor for named in named_tensors(self.param_groups)]
        if store == "auto" and self._estimator.kind == FORWARD:
            self.store = InPlace("forward-mode differentiation does not move the weights")
        else:
            self.store = choose(store, tensors, given.module_bytes)
        self._prepare()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, but without its wrapper against compilation, which imports torch._dynamo: tens of megabytes."""
        add = torch.optim.Optimizer.add_param_group
        getattr(add, "__wrapped__", add)(self, param_group)

    # What a step works on ------------------------------------------------------------------------------------------

    def _choose_rule(self) -> None:
        """Sets `rule` and `state_names` where they depend on the groups."""

    def _own_row(self, group: dict[str, Any]) -> dict[str, float]:
        """The method's own entries of a row (`pyzo.control.Row`) from a parameter group."""
        return {}

    def _check_own(self, group: dict[str, Any], where: str) -> None:
        """ValueError for a number of the method that cannot be, naming it and `where` it stands."""

    def _check_group(self, index: int) -> None:
        group, where = self.param_groups[index], f"in parameter group {index}"
        for name in ("lr", "weight_decay"):
            check_number(name, group[name], where, 0.0)
        check_number("eps", group["eps"], where, 0.0, open_low=True)
        if group["mask"] is not None and not isinstance(group["mask"], Random):
            raise TypeError(f"mask: expected None or pyzo.masks.Random, got {type(group['mask']).__name__} {where}")
        self._check_own(group, where)

    def _row(self, key: RowKey) -> Row:
        index, decays, born = key
        group = self.param_groups[index]
        mask = group["mask"]
        # Forward-mode needs no eps; tangents are filled as perturbations of length 1.
        eps = 1.0 if self._estimator.kind == FORWARD else 0.0 if self._mode == "idle" else float(group["eps"])
        return Row(
            lr=float(group["lr"]),
            eps=eps,
            weight_decay=float(group["weight_decay"]) if decays else 0.0,
            born=born,
            keep=KEEP_ALL if mask is None else mask.keep,
            refresh=1 if mask is None else mask.refresh,
            **self._own_row(group),
        )

    def _prepare(self) -> Sweep:
        """The sweep over what is trained now; built anew when parameters moved, froze, or groups were added."""
        signature = [
            (id(p), p.device, p.dtype, p.requires_grad, index)
            for index, group in enumerate(self.param_groups)
            for p in group["params"]
        ]
        if self._sweep is None or signature != self._signature:
            named = named_tensors(self.param_groups)
            if not named:
                raise ValueError("params: expected at least one parameter that requires gradients, got none")
            header = self._first().read_header() if self._controls else None
            self._count_joining([n.tensor for n in named], header["applied"] if header else 0)
            keys = [(n.group, id(n.tensor) not in self._undecayed, self._born.get(n.tensor, 0)) for n in named]
            rows = list(dict.fromkeys(keys))
            controls = {}
            for device in dict.fromkeys(n.tensor.device for n in named):
                controls[device] = Control(self._estimator.q, len(rows), device, self._seed)
                if header is not None:
                    controls[device].write_header(header)
            trained = [
                Trained(n.name, n.tensor, n.key, rows.index(key), self._state_of(n.tensor))
                for n, key in zip(named, keys, strict=True)
            ]
            sweep = Sweep(
                trained, controls, distribution=self._distribution, rule=self.rule, stochastic=self._stochastic
            )
            self._ranks.check_equal(
                [ops.signed(self._seed), header["draw"] if header else 0, hash(tuple(sorted(n.key for n in named)))],
                "seed, step and parameters",
                next(iter(controls)),
            )
            self._sweep, self._controls, self._rows, self._signature = sweep, controls, rows, signature
        for index in range(len(self.param_groups)):
            self._check_group(index)
        self._sweep.masked = any(group["mask"] is not None for group in self.param_groups)
        values = [self._row(key) for key in self._rows]
        for control in self._controls.values():
            control.write_rows(values)
        return self._sweep

    def _count_joining(self, tensors: list[torch.Tensor], applied: int) -> None:
        """Notes which tensors join, leave or come back after `applied` updates: each counts its own, as in torch."""
        if not self.state_names:
            return
        for tensor in set(self._born).difference(tensors):
            self._paused.setdefault(tensor, applied)
        for tensor in tensors:
            self._born.setdefault(tensor, applied)
            self._born[tensor] += applied - self._paused.pop(tensor, applied)

    def _state_of(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The state of a parameter, made of zeros where there is none yet, on the parameter's device."""
        state = self.state[tensor] if self.state_names else {}
        for name in self.state_names:
            if name not in state:
                state[name] = torch.zeros(tensor.shape, dtype=self._state_dtype, device=tensor.device)
            state[name] = state[name].to(tensor.device)
        return tuple(state[name] for name in self.state_names)

    # The step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any], *, here: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """One zeroth-order step.

        Args:
            closure: evaluates the loss at the current weights and returns it, a scalar tensor or number. It is called
                several times under `torch.no_grad()`, each time with torch's generators in the same state, and must
                not call backward.
            here: l(w), where you have evaluated it already; it is not evaluated again.

        Returns:
            l(w) where the method evaluates it, else the mean of the probe losses: a scalar tensor. Nothing waits for
            the device.

        Whatever is raised inside the closure (KeyboardInterrupt too) is raised again after weights, generators and the
        step counter are back where they were. A loss that is not finite skips the update; `opt.skipped` counts.
        """
        if not callable(closure):
            raise TypeError(f"closure: expected a function that returns the loss, got {type(closure).__name__}")
        with DeferredInterrupts() as interrupts:
            sweep = self._prepare()
            with_grad = self._count_grads()
            points = Points(
                closure,
                sweep,
                self.store,
                interrupts,
                here=here,
                rewinds=self._mode != "recording",
            )
            self.store.open(sweep)  # allocates, so it may fail; nothing has begun yet
            before = [control.remember() for control in self._controls.values()]
            try:
                for control in self._controls.values():
                    ops.begin_step_(control.tensor)
                values = self._probe(points)
                self._warn_of_quantum(values[0])
                if self._count_grads() != with_grad:
                    raise RuntimeError("closure: expected no backward pass, but parameters have new gradients")
                loss = self._estimate(values)
                self._update(points, values)
                torch.clear_autocast_cache()
            except BaseException:  # the step leaves no trace: weights, generators and counters are as they were
                self.store.restore()
                torch.clear_autocast_cache()
                points.rewind()
                for control, copy in zip(self._controls.values(), before, strict=True):
                    control.recall(copy)
                raise
            self._losses_seen = len(values)
        if self._mode == "live" and all(device.type == "cpu" for device in self._controls):
            self._report_skips(self._first().read_skipped(), stacklevel=5)  # above torch's two wrappers of step
        return loss

    def _probe(self, points: Points) -> list[torch.Tensor]:
        return self._estimator.probe(points)

    def _estimate(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Coefficients into every control tensor; returns the loss that the step reports."""
        losses = self._share(values)
        for own in losses:
            self._estimate_(self._controls[own.device].tensor, own)
        first = losses[0]
        used = first[0] if self._estimator.loss_here else first.mean()
        return used.to(values[0].dtype)

    def _estimate_(self, control: torch.Tensor, losses: torch.Tensor) -> None:
        self._estimator.estimate_(control, losses)

    def _share(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Losses as float64 vectors, one on each device, averaged over the ranks."""
        devices = list(self._controls)
        first = torch.stack([value.to(device=devices[0], dtype=torch.float64) for value in values])
        if self._mode == "idle":
            first *= math.nan
        self._ranks.mean_(first)
        return [first.to(device) for device in devices]

    def _update(self, points: Points, values: list[torch.Tensor]) -> None:
        self.store.update(Update(self._estimator.q))

    def _warn_of_quantum(self, loss: torch.Tensor) -> None:
        if loss.dtype in (torch.float16, torch.bfloat16) and not self._warned_dtype:
            self._warned_dtype = True
            if self._estimator.kind != FORWARD:
                warn_of_quantum(loss, self.param_groups[0]["eps"])

    def _count_grads(self) -> int:
        return sum(p.grad is not None for group in self.param_groups for p in group["params"])

    def capture(self, closure: Callable[..., Any], example: Any) -> "Captured":
        """A whole step on batches of one shape, recorded into a CUDA graph; elsewhere the same step, with the reason.

        Args:
            closure: takes a batch like `example` and returns the loss.
            example: a tensor on the device, or a dict, list or tuple of such; its values do not matter.

        Returns:
            `captured`, to be called with a batch: `loss = captured(batch)` copies the batch into place and replays.
            `captured.graph` is None where it falls back to `step`, and `captured.reason` says why. The loss tensor is
            overwritten by the next call. lr, eps and the other numbers of groups may change between calls.
        """
        from pyzo.optim.graph import Captured

        return Captured(self, closure, example)

    # What the host may look at -------------------------------------------------------------------------------------

    def _first(self) -> Control:
        return next(iter(self._controls.values()))

    def _report_skips(self, skipped: int, stacklevel: int = 3) -> int:
        if skipped > self._warned_skips:
            warnings.warn(
                f"{skipped - self._warned_skips} step(s) skipped: a loss or a coefficient was not finite "
                f"({skipped} in all)",
                stacklevel=stacklevel,
            )
            self._warned_skips = skipped
        return skipped

    @property
    def skipped(self) -> int:
        """How many steps changed nothing because a loss or a coefficient was not finite. Waits for the device."""
        return self._report_skips(self._first().read_skipped())

    @property
    def last(self) -> Last | None:
        """Losses, coefficients and seeds of the latest step; None before the first one. Waits for the device."""
        if self._losses_seen == 0:
            return None
        q, control = self._estimator.q, self._first()
        groups = [key[0] for key in self._rows]
        rows = [groups.index(g) for g in sorted(set(groups))]
        return Last(control.read_losses(self._losses_seen), control.read_coefficients(q)[rows], control.read_seeds(q))

    def keys(self) -> dict[str, int]:
        """The noise key of each trained parameter by name (without a name: its position)."""
        return {named.name: named.key for named in named_tensors(self.param_groups)}

    # Saving --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Groups and state as in torch, and under "pyzo" the run: noise version, method, seed, counters, keys."""
        whole = torch.optim.Optimizer.state_dict
        saved = getattr(whole, "__wrapped__", whole)(self)  # see add_param_group
        run = self._first().read_header()
        for index, tensor in enumerate(p for group in self.param_groups for p in group["params"]):
            if tensor in self._born:
                saved["state"][index] = {
                    **saved["state"][index],
                    "step": self._paused.get(tensor, run["applied"]) - self._born[tensor],
                }
        for group in saved["param_groups"]:  # as plain values, which torch.load takes with weights_only
            group["mask"] = None if group["mask"] is None else asdict(group["mask"])
        saved["pyzo"] = {
            "noise_version": NOISE_VERSION,
            "method": type(self).__name__,
            "run": run,
            "keys": self.keys(),
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run exactly where `state_dict` was taken: the next step draws the same seeds, bit for bit.

        Raises:
            ValueError: the state is not one of a pyzo optimizer, has another noise version, names other parameters, or
                is of another method, state dtype or shape.
        """
        run = state_dict.get("pyzo")
        if run is None:
            raise ValueError("state_dict: expected one of a pyzo optimizer, got one without the entry 'pyzo'")
        if run["noise_version"] != NOISE_VERSION:
            raise ValueError(f"state_dict: expected noise version {NOISE_VERSION}, got {run['noise_version']}")
        if run["keys"] != self.keys():
            other = sorted(set(run["keys"].items()) ^ set(self.keys().items()))
            raise ValueError(
                f"state_dict: expected the same trained parameters, got others, the first being {other[0][0]!r}"
            )
        pairs = zip(self.param_groups, state_dict["param_groups"], strict=False)
        if run["method"] != type(self).__name__ or any(set(own) != set(saved) for own, saved in pairs):
            raise ValueError(f"state_dict: expected one of {type(self).__name__}, got one of {run['method']}")
        tensors = [p for group in self.param_groups for p in group["params"]]
        states = {tensors[index]: state for index, state in state_dict["state"].items()}
        trained = [named.tensor for named in named_tensors(self.param_groups)] if self.state_names else []
        for tensor in dict.fromkeys([*trained, *states]):
            self._check_state(tensor, states.get(tensor, {}))
        # Without the state: torch would cast it to the dtype of the parameter.
        groups = [
            {**group, "mask": None if group["mask"] is None else Random(**group["mask"])}
            for group in state_dict["param_groups"]
        ]
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.clear()
        self._born.clear()
        self._paused.clear()
        for tensor, state in states.items():
            self.state[tensor] = {name: state[name].clone().to(tensor.device) for name in self.state_names}
            self._born[tensor] = run["run"]["applied"] - state["step"]
        self._sweep = None  # rows and states are others
        self._seed = run["run"]["seed"]
        for control in self._controls.values():
            control.write_header(run["run"])
        self._prepare()
        self._warned_skips = run["run"]["skipped"]
        self._losses_seen = 0

    def _check_state(self, tensor: torch.Tensor, state: dict[str, Any]) -> None:
        expected = {*self.state_names, "step"} if self.state_names else set()
        if set(state) != expected:
            raise ValueError(f"state_dict: expected state {sorted(expected)}, got {sorted(state)}")
        for name in self.state_names:
            if state[name].dtype != self._state_dtype or state[name].shape != tensor.shape:
                raise ValueError(
                    f"state_dict: expected {name} of dtype {self._state_dtype} and shape {tuple(tensor.shape)}, got "
                    f"{state[name].dtype} and {tuple(state[name].shape)}"
                )


def check_number(
    name: str, value: Any, where: str, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    """ValueError unless `value` is a finite number in [low, high), or in (low, high) with `open_low`."""
    number = float(value)
    if not (math.isfinite(number) and (number > low if open_low else number >= low) and number < high):
        bound = f"{'>' if open_low else '>='} {low:g}" + (f" and < {high:g}" if high < math.inf else "")
        raise ValueError(f"{name}: expected a finite number {bound}, got {value!r} {where}")
