"""The step of all zeroth-order optimizers: probe, estimate, update, and take everything back if anything fails."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pyzo import ops
from pyzo.control import Control
from pyzo.estimators import TwoSided
from pyzo.field import NOISE_VERSION
from pyzo.generators import Rewound
from pyzo.interrupts import DeferredInterrupts
from pyzo.optim.params import Params, group_params, trained_tensors
from pyzo.passes import Sweep
from pyzo.stores import choose

__all__ = ["Last", "Params", "ZOOptimizer"]


@dataclass(frozen=True)
class Last:
    """What the latest step saw. Reading waits for the device.

    Attributes:
        losses: float64 [forwards], in the order of evaluation.
        coefficients: float64 [groups, directions]: c of g = sum c_k z_k, per parameter group.
        seeds: of the directions, integers in [0, 2^64).
    """

    losses: torch.Tensor
    coefficients: torch.Tensor
    seeds: list[int]


class ZOOptimizer(torch.optim.Optimizer):
    """Base of the zeroth-order optimizers; see `ZOSGD` for arguments. `step` needs a closure that returns the loss."""

    def __init__(
        self,
        params: Params,
        defaults: dict[str, float],
        *,
        estimator: TwoSided,
        distribution: str,
        store: str,
        rounding: str,
        seed: int,
    ):
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding: expected 'stochastic' or 'nearest', got {rounding!r}")
        ops.distribution_code(distribution)
        self._seed = ops.check_unsigned("seed", seed, 64)
        self._estimator = estimator
        self._distribution = distribution
        self._stochastic = rounding == "stochastic"
        self._controls: dict[torch.device, Control] = {}
        self._sweep: Sweep | None = None
        self._signature: list[tuple[Any, ...]] = []
        self._forwards = 0
        self._warned_skips = 0
        self._warned_dtype = False
        groups, module_bytes = group_params(params)
        super().__init__(groups, defaults)
        for index in range(len(self.param_groups)):
            self._check_group(index)
        trained = trained_tensors(self.param_groups)
        self.store = choose(store, [t.tensor for t in trained], module_bytes)
        self._prepare()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, but without its wrapper against compilation, which imports torch._dynamo: tens of megabytes."""
        add = torch.optim.Optimizer.add_param_group
        getattr(add, "__wrapped__", add)(self, param_group)

    # What a step works on ------------------------------------------------------------------------------------------

    def _check_group(self, index: int) -> tuple[float, float, float]:
        group = self.param_groups[index]
        values = []
        for name, low in (("lr", 0.0), ("eps", 0.0), ("weight_decay", 0.0)):
            value = float(group[name])
            if not (math.isfinite(value) and (value > low if name == "eps" else value >= low)):
                bound = "> 0" if name == "eps" else ">= 0"
                raise ValueError(
                    f"{name}: expected a finite number {bound}, got {group[name]!r} in parameter group {index}"
                )
            values.append(value)
        return values[0], values[1], values[2]

    def _prepare(self) -> Sweep:
        """The sweep over what is trained now; built anew when parameters moved, froze, or groups were added."""
        signature = [
            (id(p), p.device, p.dtype, p.requires_grad, row)
            for row, group in enumerate(self.param_groups)
            for p in group["params"]
        ]
        rows = len(self.param_groups)
        if self._sweep is None or signature != self._signature:
            trained = trained_tensors(self.param_groups)
            if not trained:
                raise ValueError("params: expected at least one parameter that requires gradients, got none")
            header = next(iter(self._controls.values())).read_header() if self._controls else None
            controls = {}
            for device in dict.fromkeys(t.tensor.device for t in trained):
                controls[device] = Control(self._estimator.directions, rows, device, self._seed)
                if header is not None:
                    controls[device].write_header(header)
            self._sweep = Sweep(trained, controls, self._distribution, self._stochastic)
            self._controls, self._signature = controls, signature
        values = [self._check_group(index) for index in range(rows)]
        for control in self._controls.values():
            control.write_rows(values)
        return self._sweep

    def _scalar_loss(self, loss: Any) -> torch.Tensor:
        if not isinstance(loss, torch.Tensor):
            loss = torch.tensor(loss, dtype=torch.float64) if isinstance(loss, (int, float)) else loss
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or loss.is_complex():
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise TypeError(f"closure: expected it to return a real scalar loss, got {what}")
        if loss.dtype in (torch.float16, torch.bfloat16) and not self._warned_dtype:
            self._warned_dtype = True
            quantum = torch.finfo(loss.dtype).eps / 2  # of numbers in [1/2, 1)
            eps = self.param_groups[0]["eps"]
            warnings.warn(
                f"closure returns a {loss.dtype} loss: between 0.5 and 1 such losses are {quantum:.2g} apart, so "
                f"coefficients are multiples of {quantum / (2 * eps):.2g} at eps={eps:g}. Compute the loss in float32.",
                stacklevel=4,
            )
        loss = loss.detach().reshape(())
        return loss if loss.is_floating_point() else loss.double()  # a count of errors is a loss too

    # The step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> torch.Tensor:  # type: ignore[override]
        """One zeroth-order step.

        Args:
            closure: evaluates the loss at the current weights and returns it, a scalar tensor or number. It is called
                several times under `torch.no_grad()`, each time with torch's generators in the same state, and must
                not call backward.

        Returns:
            The mean of the probe losses, a scalar tensor; nothing waits for the device.

        Whatever is raised inside the closure (KeyboardInterrupt too) is raised again after weights, generators and the
        step counter are back where they were. A loss that is not finite skips the update; `opt.skipped` counts.
        """
        if not callable(closure):
            raise TypeError(f"closure: expected a function that returns the loss, got {type(closure).__name__}")
        losses: list[torch.Tensor] = []
        with DeferredInterrupts() as interrupts:
            sweep = self._prepare()
            with_grad = self._count_grads()
            rewind = Rewound(set(self._controls))
            self.store.open(sweep)  # allocates, so it may fail; nothing has begun yet
            for control in self._controls.values():
                ops.begin_step_(control.tensor)

            def loss_at(direction: int, sign: float) -> torch.Tensor:
                self.store.move(direction, sign)
                if losses:
                    rewind()
                with interrupts.allowed(), torch.no_grad():
                    loss = closure()
                losses.append(self._scalar_loss(loss))
                return losses[-1]

            try:
                self._estimator.probe(loss_at)
                if self._count_grads() != with_grad:
                    raise RuntimeError("closure: expected no backward pass, but parameters have new gradients")
                for device, control in self._controls.items():
                    own = torch.stack([loss.to(device=device, dtype=torch.float64) for loss in losses])
                    self._estimator.estimate_(control.tensor, own)
                self.store.update(self._estimator.directions)
            except BaseException:  # the step leaves no trace: weights, generators and counters are as they were
                self.store.restore()
                rewind()
                for control in self._controls.values():
                    control.take_back_draw()
                raise
            self._forwards = len(losses)
        if all(device.type == "cpu" for device in self._controls):
            self._report_skips(self._first().read_skipped())
        return torch.stack(losses).mean()

    def _count_grads(self) -> int:
        return sum(p.grad is not None for group in self.param_groups for p in group["params"])

    # What the host may look at -------------------------------------------------------------------------------------

    def _first(self) -> Control:
        return next(iter(self._controls.values()))

    def _report_skips(self, skipped: int) -> int:
        if skipped > self._warned_skips:
            warnings.warn(
                f"{skipped - self._warned_skips} step(s) skipped: a loss was not finite ({skipped} in all)",
                stacklevel=3,
            )
            self._warned_skips = skipped
        return skipped

    @property
    def skipped(self) -> int:
        """How many steps changed nothing because a loss was not finite. Waits for the device."""
        return self._report_skips(self._first().read_skipped())

    @property
    def last(self) -> Last | None:
        """Losses, coefficients and seeds of the latest step; None before the first one. Waits for the device."""
        if self._forwards == 0:
            return None
        q = self._estimator.directions
        control = self._first()
        return Last(control.read_losses(self._forwards), control.read_coefficients(q), control.read_seeds(q))

    def keys(self) -> dict[str, int]:
        """The noise key of each trained parameter by name (without a name: its position)."""
        return {t.name: t.key for t in trained_tensors(self.param_groups)}

    # Saving --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Groups and per-parameter state as in torch, and under "pyzo" the run: noise version, seed, counters, keys."""
        state = super().state_dict()
        state["pyzo"] = {"noise_version": NOISE_VERSION, "run": self._first().read_header(), "keys": self.keys()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run exactly where `state_dict` was taken: the next step draws the same seeds, bit for bit.

        Raises:
            ValueError: the state is not one of a pyzo optimizer, has another noise version, or names other parameters.
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
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "pyzo"})
        self._prepare()
        for control in self._controls.values():
            control.write_header(run["run"])
        self._seed = run["run"]["seed"]
        self._warned_skips = run["run"]["skipped"]
        self._forwards = 0
