"""The step of all zeroth-order optimizers: probe, estimate, update, and take everything back if anything fails."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pyzo import ops
from pyzo.control import KEEP_ALL, Control, Row
from pyzo.estimators import FORWARD, Estimator, TwoSided
from pyzo.interrupts import DeferredInterrupts
from pyzo.masks import Mask, TensorMask
from pyzo.optim import saving
from pyzo.optim.params import Named, Params, check_split, named_tensors, read_params
from pyzo.optim.points import Points, warn_of_quantum
from pyzo.optim.prefix import Prefix
from pyzo.optim.ranks import Ranks
from pyzo.optim.runs import FittedMasks, Probed, RowKey, Run
from pyzo.passes import Sweep, Trained, Update
from pyzo.stores import InPlace, choose

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from pyzo.optim.graph import Captured

__all__ = ["Last", "Params", "ZOOptimizer"]


@dataclass(frozen=True)
class Last:
    """What the latest step saw. Reading waits for the device. A step with blocks has u units, one after another; else
    u = 1.

    Attributes:
        losses: float64, as the estimator took them (`pyzo.estimators`), averaged over ranks, of all units.
        coefficients: float64 [groups, u q]: c of g = sum c_k z_k, per parameter group; 0 where it has no part.
        seeds: of the directions, u q integers in [0, 2^64).
        forwards: how often the closure was called.
        candidates: float64 [3], of a conservative step: l(w), l(w - lr g), l(w + lr g); of its last block; else None.
        choice: of a conservative step: 0, 1 or -1 for the three in this order; else None.
    """

    losses: torch.Tensor
    coefficients: torch.Tensor
    seeds: list[int]
    forwards: int
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
        mask: one of `pyzo.masks`, or None: every element moves.
        distribution: "normal" or "rademacher" directions.
        store: "inplace", "scratch", "snapshot" or "auto"; what was chosen and why is in `opt.store`.
        rounding: "stochastic" or "nearest" rounding of updates of 16-bit weights and states.
        master: "split": every trained bf16 weight has a float32 master, which updates do not round: its 16 low bits
            (int16) lie in `opt.state[p]["low"]`, and the weight is the master rounded to nearest. Needs an exact store;
            fp32 weights may be trained beside. None: weights are all that there is.
        state_dtype: torch.float32 or torch.bfloat16, of what the rule keeps per weight.
        seed: of the run, in [0, 2^64). The same seed and losses give the same weights, bit for bit.
        unused: "error", or "skip" where trained weights may have no part in a loss (mixtures of experts): they get the
            estimate that they get in other stores. The scratch store alone can tell.
        process_group: of data-parallel ranks, whose losses are averaged; None: this process alone.

    Attributes:
        store: the store that was chosen; its `reason` says why.
        prefix: whether layers before a block run once for all its points, and why (`pyzo.optim.prefix`).

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
        mask: Mask | None = None,
        distribution: str = "normal",
        store: str = "auto",
        rounding: str = "stochastic",
        master: str | None = None,
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        unused: str = "error",
        process_group: "ProcessGroup | None" = None,
    ):
        if unused not in ("error", "skip"):
            raise ValueError(f"unused: expected 'error' or 'skip', got {unused!r}")
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding: expected 'stochastic' or 'nearest', got {rounding!r}")
        if master not in (None, "split"):
            raise ValueError(f"master: expected None or 'split', got {master!r}")
        if master and store == "inplace":
            raise ValueError("store: expected one that is exact with master='split', got 'inplace'")
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype: expected torch.float32 or torch.bfloat16, got {state_dtype}")
        if estimator is not None and not isinstance(estimator, Estimator):
            raise TypeError(f"estimator: expected one of pyzo.estimators, got {type(estimator).__name__}")
        ops.distribution_code(distribution)
        self._seed = ops.check_unsigned("seed", seed, 64)
        self._estimator = estimator or TwoSided()
        self._distribution = distribution
        self._stochastic = rounding == "stochastic"
        self._splits = master == "split"
        self._state_dtype = state_dtype
        self._ranks = Ranks(process_group)
        self._runs: list[Run] = []
        self._headers: dict[str, dict[str, int]] = {}  # of all blocks that there ever were, when last looked at
        self._masks = FittedMasks()
        self._ages: dict[torch.Tensor, int] = {}  # how many updates each tensor had, when last looked at
        self._born: dict[torch.Tensor, int] = {}  # updates of its block that a trained tensor had no part in
        self._block_of: dict[int, int] = {}  # id of a tensor -> number of its block
        self._steps = 0  # made so far
        self._sweep: Sweep | None = None
        self._signature: list[object] = []
        self._seen: list[Probed] = []
        self._forwards = 0
        self._warned_skips = 0
        self._warned_dtype = False
        self._mode = "live"  # or "idle", "recording": see pyzo/optim/graph.py
        given = read_params(params)
        self._module = given.module
        self._undecayed = given.undecayed
        super().__init__(given.groups, {**defaults, "eps": eps, "weight_decay": weight_decay, "mask": mask})
        self._choose_rule()
        sweep = self._prepare()
        if store == "auto" and self._estimator.kind == FORWARD and not self._splits:
            self.store = InPlace("forward-mode differentiation does not move the weights")
        else:
            self.store = choose(store, sweep, given.module, unused=unused)

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
        if group["mask"] is not None and not isinstance(group["mask"], Mask):
            raise TypeError(f"mask: expected None or one of pyzo.masks, got {type(group['mask']).__name__} {where}")
        self._check_own(group, where)

    def _row(self, key: RowKey) -> Row:
        group = self.param_groups[key.group]
        mask = group["mask"]
        drawn = KEEP_ALL if mask is None else mask.keep if key.mask is None else key.mask[0]
        # Forward-mode needs no eps; tangents are filled as perturbations of length 1.
        eps = 1.0 if self._estimator.kind == FORWARD else 0.0 if self._mode == "idle" else float(group["eps"])
        return Row(
            lr=float(group["lr"]),
            eps=eps,
            weight_decay=float(group["weight_decay"]) if key.decays else 0.0,
            born=key.born,
            keep=drawn,
            refresh=1 if mask is None else mask.refresh,
            threshold=math.inf if key.mask is None else key.mask[1],
            **self._own_row(group),
        )

    def _prepare(self) -> Sweep:
        """The sweep over what is trained now; built anew when parameters moved, froze, or groups or masks changed."""
        for index in range(len(self.param_groups)):
            self._check_group(index)
        signature: list[object] = [
            (id(p), p.device, p.dtype, p.requires_grad, index)
            for index, group in enumerate(self.param_groups)
            for p in group["params"]
        ]
        masks = [group["mask"] for group in self.param_groups]
        signature += [mask if mask is not None and mask.is_fitted else None for mask in masks]
        if self._sweep is None or signature != self._signature:
            self._sweep = self._build()
            self._signature = signature
        for run in self._runs:
            values = [self._row(key) for key in run.rows]
            for control in run.controls.values():
                control.write_rows(values)
        self._sweep.heed_masks()
        return self._sweep

    def _build(self) -> Sweep:
        named = named_tensors(self.param_groups)
        if not named:
            raise ValueError("params: expected at least one parameter that requires gradients, got none")
        if self._splits:
            check_split(named)
        known = [name for group in self.param_groups for name in group.get("param_names", ())]
        masks = self._masks.fit(self.param_groups, named, known or [n.name for n in named])
        partition = self._estimator.partition(self._module, [(n.name, n.tensor) for n in named])
        block_of = {tensor: number for number, block in enumerate(partition.blocks) for tensor in block.tensors}
        self._ages = self._ages_now()
        headers = {run.block.name: run.first.read_header() for run in self._runs}
        draw = max((header["draw"] for header in headers.values()), default=0)
        self._headers.update(headers)
        fresh = {"seed": self._seed, "applied": 0, "skipped": 0}
        self._born, runs, trained = {}, [], []
        for number, block in enumerate(partition.blocks):
            header = headers.get(block.name) or {**self._headers.get(block.name, fresh), "draw": draw}
            own = [(n, mask) for n, mask in zip(named, masks, strict=True) if block_of[id(n.tensor)] == number]
            keys = [self._row_key(n, mask, header["applied"]) for n, mask in own]
            rows = list(dict.fromkeys(keys))
            controls = {}
            for device in dict.fromkeys(n.tensor.device for n, _ in own):
                controls[device] = Control(self._estimator.q, len(rows), device, self._seed, block.first)
                controls[device].write_header(header)
            runs.append(Run(block, controls, rows))
            for (n, mask), key in zip(own, keys, strict=True):
                state = self._state_of(n, mask)
                low = state.pop("low", None)
                kept = tuple(state.values())
                trained.append(
                    Trained(n.name, n.tensor, n.key, rows.index(key), kept, number, mask or TensorMask(), low)
                )
        sweep = Sweep(
            trained,
            [run.controls for run in runs],
            distribution=self._distribution,
            rule=self.rule,
            stochastic=self._stochastic,
        )
        self._ranks.check_equal(
            [ops.signed(self._seed), draw, hash(tuple(sorted(n.key for n in named)))],
            "seed, step and parameters",
            named[0].tensor.device,
        )
        devices = {n.tensor.device for n in named}
        self.prefix = Prefix(partition.layers, devices, partition.obstacle)
        self._runs, self._block_of = runs, block_of
        return sweep

    def _row_key(self, named: Named, mask: TensorMask | None, applied: int) -> RowKey:
        tensor = named.tensor
        if self.state_names:  # else nothing depends on how many updates there were
            self._born[tensor] = applied - self._ages.setdefault(tensor, 0)
        fitted = None if mask is None else (mask.keep, mask.threshold)
        return RowKey(named.group, id(tensor) not in self._undecayed, self._born.get(tensor, 0), fitted)

    def _ages_now(self) -> dict[torch.Tensor, int]:
        """How many updates each tensor has had that was ever trained, as torch counts them. Waits for the device."""
        applied = [run.first.read_header()["applied"] for run in self._runs] if self._born else []
        return {**self._ages, **{t: applied[self._block_of[id(t)]] - born for t, born in self._born.items()}}

    def _state_dtypes(self, tensor: torch.Tensor) -> dict[str, torch.dtype]:
        """What is kept for each weight of a parameter, by name: what the rule keeps, and the low bits of a master."""
        low = {"low": torch.int16} if self._splits and tensor.dtype == torch.bfloat16 else {}
        return {**dict.fromkeys(self.state_names, self._state_dtype), **low}

    def _state_of(self, named: Named, mask: TensorMask | None) -> dict[str, torch.Tensor]:
        """The state of a parameter, made of zeros where there is none yet, on its device; of listed elements only."""
        tensor = named.tensor
        dtypes = self._state_dtypes(tensor)
        if tensor in self.state and "low" not in dtypes:
            self.state[tensor].pop("low", None)  # of a weight that is bf16 no longer
        state = self.state[tensor] if dtypes else {}
        listed = None if mask is None else mask.indices
        shape = tensor.shape if listed is None else listed.shape
        for name, dtype in dtypes.items():
            if name not in state:
                state[name] = torch.zeros(shape, dtype=dtype, device=tensor.device)
            if state[name].shape != shape:
                raise ValueError(
                    f"mask: expected one that lists as many elements of {named.name} as there is state of, "
                    f"{tuple(state[name].shape)}, got {tuple(shape)}"
                )
            state[name] = state[name].to(tensor.device)
        return {name: state[name] for name in dtypes}

    def _resume(self, headers: dict[str, dict[str, int]], ages: dict[torch.Tensor, int]) -> None:
        """Go on where another run stood: the headers of its blocks, and the ages of tensors with state."""
        self._sweep, self._ages, self._born, self._headers = None, ages, {}, {}  # rows and states are others
        for run in self._runs:
            for control in run.controls.values():
                control.write_header(headers[run.block.name])
        self._seed = next(iter(headers.values()))["seed"]
        self._prepare()
        self._steps = max(header["draw"] for header in headers.values())
        self._warned_skips = sum(header["skipped"] for header in headers.values())
        self._seen = []

    # The step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any], *, here: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """One zeroth-order step.

        Args:
            closure: evaluates the loss at the current weights and returns it, a scalar tensor or number. It is called
                several times under `torch.no_grad()`, each time with torch's generators in the same state, and must
                not call backward.
            here: l(w), where you have evaluated it already; it is not evaluated again before the first update.

        Returns:
            l(w) where the method evaluates it, else the mean of the probe losses: a scalar tensor. Nothing waits for
            the device.

        Whatever is raised inside the closure (KeyboardInterrupt too) is raised again after weights, generators and the
        step counter are back where they were; in place, blocks that were updated before it by a rule with state stay
        updated, and count. A loss that is not finite skips the update (of its block); `opt.skipped` counts.
        """
        if not callable(closure):
            raise TypeError(f"closure: expected a function that returns the loss, got {type(closure).__name__}")
        with DeferredInterrupts() as interrupts:
            sweep = self._prepare()
            with_grad = self._count_grads()
            stages = self._estimator.stages([run.block for run in self._runs], self._seed, self._steps + 1)
            points = Points(
                closure,
                sweep,
                self.store,
                interrupts,
                prefix=self.prefix,
                here=here,
                rewinds=self._mode != "recording",
            )
            self.store.open(sweep, keep_states=len(stages) > 1)  # allocates, so it may fail; nothing has begun yet
            before = [(run, control, control.remember()) for run in self._runs for control in run.controls.values()]
            seen: list[Probed] = []
            losses: list[torch.Tensor] = []
            try:
                with self.prefix.step(used=self._mode == "live"):
                    for _, control, _ in before:
                        ops.begin_step_(control.tensor)
                    for stage in stages:
                        units = []
                        for unit in stage:
                            units.append(self._probe_unit(points, unit))
                            if self._count_grads() != with_grad:
                                raise RuntimeError(
                                    "closure: expected no backward pass, but parameters have new gradients"
                                )
                            losses.append(self._estimate(units[-1]))
                        if not seen:
                            self._warn_of_quantum(units[0].losses[0])
                        self._update(points, units)
                        seen += units
                loss = self._loss(seen, losses)
                self.store.close()
                torch.clear_autocast_cache()
            except BaseException:  # the step leaves no trace: weights, generators and counters are as they were
                kept = self.store.roll_back()
                torch.clear_autocast_cache()
                points.rewind()
                stay = {sweep.parts[index].block for index in kept}
                for run, control, copy in before:
                    if self._runs.index(run) not in stay:
                        control.recall(copy)
                raise
            self._seen, self._forwards = seen, points.calls
            self._steps += 1
        if self._mode == "live" and all(run.first.device.type == "cpu" for run in self._runs):
            self._report_skips(self._read_skipped(), stacklevel=5)  # above torch's two wrappers of step
        return loss

    def _probe_unit(self, points: Points, unit: tuple[int, ...]) -> Probed:
        runs = [self._runs[number] for number in unit]
        parts, reach = self._sweep.of(unit), min(run.block.reach for run in runs)
        points.select(parts, reach)
        return Probed(runs, parts, reach, self._probe(points))

    def _probe(self, points: Points) -> list[torch.Tensor]:
        return self._estimator.probe(points)

    def _estimate(self, unit: Probed) -> torch.Tensor:
        """Coefficients into every control tensor of a unit; returns its losses in float64, averaged over ranks."""
        shared = self._share(unit.losses)
        for run in unit.runs:
            for device, control in run.controls.items():
                self._estimate_(control.tensor, shared[device])
        return next(iter(shared.values()))

    def _estimate_(self, control: torch.Tensor, losses: torch.Tensor) -> None:
        self._estimator.estimate_(control, losses)

    def _loss(self, units: list[Probed], losses: list[torch.Tensor]) -> torch.Tensor:
        """What the step reports."""
        used = losses[0][0] if self._estimator.loss_here else torch.cat(losses).mean()
        return used.to(units[0].losses[0].dtype)

    def _share(self, values: list[torch.Tensor]) -> dict[torch.device, torch.Tensor]:
        """Losses as a float64 vector on each device, averaged over the ranks."""
        devices = list(dict.fromkeys(device for run in self._runs for device in run.controls))
        first = torch.stack([value.to(device=devices[0], dtype=torch.float64) for value in values])
        if self._mode == "idle":
            first *= math.nan
        self._ranks.mean_(first)
        return {device: first.to(device) for device in devices}

    def _update(self, points: Points, units: list[Probed]) -> None:
        points.update([part for unit in units for part in unit.parts], Update(self._estimator.q))

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

    def _controls(self) -> list[Control]:
        return [control for run in self._runs for control in run.controls.values()]

    def _read_skipped(self) -> int:
        return sum(run.first.read_skipped() for run in self._runs)

    def _report_skips(self, skipped: int, stacklevel: int = 3) -> int:
        if skipped > self._warned_skips:
            warnings.warn(
                f"{skipped - self._warned_skips} step(s) skipped: a loss or a coefficient was not finite "
                f"({skipped} in all)",
                stacklevel=stacklevel,
            )
            self._warned_skips = skipped
            self.store.doubt()
        return skipped

    @property
    def skipped(self) -> int:
        """How many steps (of blocks) changed nothing because a loss or a coefficient was not finite.

        Waits for the device.
        """
        return self._report_skips(self._read_skipped())

    @property
    def last(self) -> Last | None:
        """Losses, coefficients and seeds of the latest step; None before the first one. Waits for the device."""
        if not self._seen:
            return None
        q = self._estimator.q
        groups = sorted({key.group for run in self._runs for key in run.rows})
        coefficients = torch.zeros(len(groups), len(self._seen) * q, dtype=torch.float64)
        for i, unit in enumerate(self._seen):
            for run in unit.runs:
                found = run.first.read_coefficients(q)
                for g, group in enumerate(groups):
                    row = run.row_of(group)
                    if row is not None:
                        coefficients[g, i * q : (i + 1) * q] = found[row]
        first = [unit.runs[0].first for unit in self._seen]
        losses = [control.read_losses(len(unit.losses)) for control, unit in zip(first, self._seen, strict=True)]
        seeds = [seed for control in first for seed in control.read_seeds(q)]
        return Last(torch.cat(losses), coefficients, seeds, self._forwards)

    def keys(self) -> dict[str, int]:
        """The noise key of each trained parameter by name (without a name: its position)."""
        return {named.name: named.key for named in named_tensors(self.param_groups)}

    # Saving --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Groups and state as in torch, and under "pyzo" the run: noise version, method, counters, keys, masks."""
        return saving.save(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run exactly where `state_dict` was taken: the next step draws the same seeds, bit for bit.

        Raises:
            ValueError: the state is not one of a pyzo optimizer, has another noise version, names other parameters or
                blocks, or is of another method, state dtype or shape.
        """
        saving.load(self, state_dict)


def check_number(
    name: str, value: Any, where: str, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    """ValueError unless `value` is a finite number in [low, high), or in (low, high) with `open_low`."""
    number = float(value)
    if not (math.isfinite(number) and (number > low if open_low else number >= low) and number < high):
        bound = f"{'>' if open_low else '>='} {low:g}" + (f" and < {high:g}" if high < math.inf else "")
        raise ValueError(f"{name}: expected a finite number {bound}, got {value!r} {where}")
