"""Hybrid ZO-FO: the first layers of a model by zeroth-order steps, the others by backpropagation, on one closure."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pyzo import layers as structure
from pyzo.generators import Rewound
from pyzo.interrupts import DeferredInterrupts
from pyzo.optim import ZOSGD
from pyzo.optim.base import ZOOptimizer
from pyzo.optim.params import PartOf
from pyzo.optim.ranks import Ranks

__all__ = ["Hybrid", "hybrid"]

Named = Sequence[tuple[str, nn.Parameter]]


def hybrid(
    model: nn.Module,
    zo_layers: int = 8,
    zo: Mapping[str, Any] | None = None,
    fo: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    layers: str | None = None,
    front: Sequence[str] = (),
    optimizer: Callable[..., ZOOptimizer] = ZOSGD,
) -> "Hybrid":
    """Trains what runs before layer `zo_layers` by a ZO optimizer, and the rest by backpropagation.

    No activation of the ZO part is kept for a backward pass: memory for activations, gradients and optimizer state is
    that of the FO part. Source: the hybrid training of arXiv 2402.11592, section 5, whose code was never released.

    Args:
        model: any module with a list of repeated layers (`pyzo.layers.stack`), also with adapters, tied weights and
            frozen parts. A weight that both parts use is trained by the ZO part alone.
        zo_layers: how many layers are in the ZO part, in [0, number of layers]. 0: backpropagation everywhere.
        zo: arguments of the ZO optimizer: lr, eps, estimator, mask, ...; `process_group` averages FO gradients too.
        fo: makes the optimizer of the FO part from its (name, parameter) pairs; `step` must not need a closure.
        layers: name of the list of layers where the model has several (`"decoder.layers"`).
        front: names of modules outside the layers that run before them where the order of definition says otherwise.
        optimizer: class of the ZO optimizer, one of `pyzo.optim`.

    Raises:
        ValueError: `zo_layers` is out of range; as `pyzo.layers.stack`; nothing is trained; `fo` does not train exactly
            the parameters that it was given.
        TypeError: `fo` makes no torch optimizer, or one whose `step` needs a closure.
    """
    return Hybrid(model, zo_layers, zo or {}, fo, layers=layers, front=front, optimizer=optimizer)


class Hybrid:
    """The two optimizers of a hybrid run, and the step that both take from the same weights. See `hybrid`.

    Attributes:
        zo: the ZO optimizer; None where the ZO part trains nothing.
        fo: torch's optimizer; None where the FO part trains nothing. Learning rates are set, and schedulers attached,
            at both of them; gradients can be clipped in `fo.register_step_pre_hook`.
        split: which parameters belong where (`pyzo.layers.Split`).
    """

    def __init__(
        self,
        model: nn.Module,
        zo_layers: int,
        zo: Mapping[str, Any],
        fo: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
        *,
        layers: str | None,
        front: Sequence[str],
        optimizer: Callable[..., ZOOptimizer],
    ):
        most = len(structure.stack(model, layers=layers, front=front).layers)
        if isinstance(zo_layers, bool) or not isinstance(zo_layers, int) or not 0 <= zo_layers <= most:
            raise ValueError(f"zo_layers: expected an integer in [0, {most}], got {zo_layers!r}")
        self.split = structure.split(model, zo_layers, layers=layers, front=front)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._zo: Named = [(name, trained[name]) for name in self.split.before if name in trained]
        self._fo: Named = [(name, trained[name]) for name in self.split.after if name in trained]
        if not trained:
            raise ValueError("model: expected parameters that require gradients, got none")
        group = zo.get("process_group")
        self._ranks = None if group is None else Ranks(group)
        self._devices = {p.device for p in model.parameters()}
        self._layers = [(part.name, model.get_submodule(part.name)) for part in self.split.stack.layers[:zo_layers]]
        self.zo: ZOOptimizer | None = None
        self.fo: torch.optim.Optimizer | None = None
        if self._fo:
            self.fo = _checked(fo(list(self._fo)), self._fo)
        if self._zo:
            with _frozen(self._fo):
                self.zo = optimizer(PartOf(model, tuple(name for name, _ in self._zo)), **zo)
        inner = [part.name for part in self.split.stack.layers[zo_layers:]]
        self._unreached = [p for name, p in self._fo if any(structure.inside(name, layer) for layer in inner)]
        self._skipped = 0

    def step(self, closure: Callable[[], Any]) -> torch.Tensor:
        """One step of both parts from the same weights w.

        First the closure runs once with gradients at w, the parameters of the ZO part frozen, and one backward pass
        gives the FO part its gradients, which stay in `.grad` until the next step. Then come the probes of the ZO
        optimizer under `torch.no_grad()`, with torch's generators as they were; it takes l(w) from the first forward
        where it needs it. Last both parts are updated. That is 1 + 2 q forwards with a two-sided estimator, 1 + q with
        a one-sided one, and one backward pass through the FO part.

        Args:
            closure: evaluates the loss and returns it, a scalar tensor. It must not call backward, and its loss must
                not be scaled: `torch.amp.GradScaler` is not supported.

        Returns:
            l(w); where the FO part trains nothing, what the ZO optimizer returns.

        A loss that is not finite, at w or at a probe, skips both updates; `skipped` counts. To know it, a step waits
        for the device once. Whatever is raised before the updates (KeyboardInterrupt too) is raised again after
        weights, generators and counters are back where they were, and gradients are cleared. During the updates
        interrupts wait; where `fo.step` itself raises, the ZO part has been updated.

        Raises:
            TypeError: the closure is none, or returns no real scalar tensor.
            RuntimeError: the closure called backward, or its loss does not depend on the FO part; or the input of a
                layer of the ZO part requires gradients, so that its activations would be kept.
        """
        if not callable(closure):
            raise TypeError(f"closure: expected a function that returns the loss, got {type(closure).__name__}")
        if self.fo is None:
            return self.zo.step(closure)
        with DeferredInterrupts() as interrupts:
            rewind = Rewound(self._devices)
            self.zero_grad()
            try:
                loss = self._backward(closure, interrupts)
                if self.zo is not None:
                    rewind()
                    self._step_zo(closure, loss, interrupts)
            except BaseException:
                self.zero_grad()
                rewind()
                torch.clear_autocast_cache()
                raise
            if self._is_finite(loss):
                self.fo.step()
            torch.clear_autocast_cache()
        return loss

    def _backward(self, closure: Callable[[], Any], interrupts: DeferredInterrupts) -> torch.Tensor:
        """l(w), after the gradients of the FO part were computed."""
        torch.clear_autocast_cache()  # casts of the weights as they were before the last update
        with _frozen(self._zo), torch.enable_grad():
            with self._watched(), interrupts.allowed():
                loss = closure()
            if any(p.grad is not None for _, p in self._fo):
                raise RuntimeError("closure: expected no backward pass, but parameters have new gradients")
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or loss.is_complex():
                got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
                raise TypeError(f"closure: expected it to return a real scalar tensor, got {got}")
            if not loss.requires_grad:
                raise RuntimeError(
                    "closure: expected a loss that depends on the FO part by autograd, got one that was detached or "
                    "computed without gradients"
                )
            with interrupts.allowed():
                loss.backward()
            if self._unreached and all(p.grad is None for p in self._unreached):
                raise RuntimeError(
                    "closure: expected gradients in the layers of the FO part, but none of them got any: reentrant "
                    "checkpointing does that where its inputs require none, ask for use_reentrant=False"
                )
            self._unreached = []
        loss = loss.detach().reshape(())
        if self._ranks is not None:
            loss = self._average(loss)
        return loss

    def _average(self, loss: torch.Tensor) -> torch.Tensor:
        """Gradients of the FO part and the loss averaged over the ranks, the same bits on every rank."""
        for _, p in self._fo:
            if p.grad is None:  # not used on this rank
                p.grad = torch.zeros_like(p)
            self._ranks.mean_(p.grad)
        mean = loss.double()
        self._ranks.mean_(mean)
        return mean.to(loss.dtype)

    def _step_zo(self, closure: Callable[[], Any], here: torch.Tensor, interrupts: DeferredInterrupts) -> None:
        finite = torch.isfinite(here)

        def probe() -> Any:
            with interrupts.allowed():
                loss = closure()
            # Without a host that looks at l(w): where it is not finite, no probe is either.
            return torch.where(finite, loss, math.nan) if isinstance(loss, torch.Tensor) else loss

        with _frozen(self._fo):
            self.zo.step(probe, here=here)

    def _is_finite(self, loss: torch.Tensor) -> bool:
        """Whether all losses of the step were. Waits for the device."""
        if self.zo is not None:
            before, self._skipped = self._skipped, self.zo.skipped
            return self._skipped == before
        if bool(torch.isfinite(loss)):
            return True
        self._skipped += 1
        warnings.warn(f"a step skipped: its loss was not finite ({self._skipped} in all)", stacklevel=3)
        return False

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """While a forward pass runs: RuntimeError where a layer of the ZO part would keep activations."""
        handles = []
        try:
            for name, module in self._layers:

                def check(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                    for tensor in pytree.tree_leaves((args, kwargs)):
                        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                            raise RuntimeError(self._blame(name, tensor))

                handles.append(module.register_forward_pre_hook(check, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _blame(self, layer: str, tensor: torch.Tensor) -> str:
        """Why a layer of the ZO part sees a tensor that requires gradients."""
        leaves = _leaves(tensor)
        modules = dict.fromkeys(name.rpartition(".")[0] or name for name, p in self._fo if id(p) in leaves)
        if modules:
            return (
                f"front: expected that nothing of the FO part runs before the ZO layer {layer!r}, but there do "
                f"{', '.join(modules)}: pass front={list(modules)!r}"
            )
        return (
            f"model: expected that inputs of the ZO layer {layer!r} require no gradients, got one that does although "
            "no parameter of the FO part leads to it: the activations of the ZO part would be kept. Do without "
            "enable_input_require_grads(), and pass inputs that require none"
        )

    @property
    def skipped(self) -> int:
        """How many steps (with blocks: steps of a block) changed nothing for a loss that was not finite.

        Waits for the device.
        """
        return self._skipped if self.zo is None else self.zo.skipped

    def zero_grad(self) -> None:
        """Drops the gradients of the FO part; a step begins with it."""
        if self.fo is not None:
            self.fo.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimizers, "zo" and "fo" (None where there is none), and the names of what they train."""
        return {
            "zo": None if self.zo is None else self.zo.state_dict(),
            "fo": None if self.fo is None else self.fo.state_dict(),
            "parameters": self._parameters(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            ValueError: the state is none of a hybrid run or of one that is split otherwise; or as the optimizers raise.
        """
        if set(state_dict) != {"zo", "fo", "parameters"}:
            raise ValueError(f"state_dict: expected the entries zo, fo and parameters, got {sorted(state_dict)}")
        if state_dict["parameters"] != self._parameters():
            theirs, ours = (
                {(name, part) for part, names in parameters.items() for name in names}
                for parameters in (state_dict["parameters"], self._parameters())
            )
            name, part = min(theirs ^ ours)
            whose = "the state" if (name, part) in theirs else "this run"
            raise ValueError(f"state_dict: expected one of the same split, but only {whose} trains {name!r} by {part}")
        before = None if self.zo is None else self.zo.state_dict()
        if self.zo is not None:  # first: it changes nothing where it raises
            self.zo.load_state_dict(state_dict["zo"])
        if self.fo is not None:
            try:
                self.fo.load_state_dict(state_dict["fo"])
            except Exception:
                if self.zo is not None:
                    self.zo.load_state_dict(before)
                raise
        if self.zo is not None:
            self._skipped = self.zo.skipped

    def _parameters(self) -> dict[str, list[str]]:
        return {"zo": [name for name, _ in self._zo], "fo": [name for name, _ in self._fo]}


def _checked(opt: Any, given: Named) -> torch.optim.Optimizer:
    """The optimizer of the FO part, if it trains exactly what it was given and steps without a closure."""
    if not isinstance(opt, torch.optim.Optimizer):
        raise TypeError(f"fo: expected a function that makes a torch optimizer, got {type(opt).__name__}")
    closure = inspect.signature(opt.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"fo: expected an optimizer whose step needs no closure, got {type(opt).__name__}")
    trains = {id(p) for group in opt.param_groups for p in group["params"]}
    missing = [name for name, p in given if id(p) not in trains]
    if missing or len(trains) > len(given):
        what = f"without {missing[0]!r}" if missing else f"with {len(trains) - len(given)} others"
        raise ValueError(f"fo: expected an optimizer of the {len(given)} parameters it was given, got one {what}")
    return opt


@contextmanager
def _frozen(named: Iterable[tuple[str, nn.Parameter]]) -> Iterator[None]:
    """Parameters that require no gradients meanwhile; those that required none before do so afterwards, either."""
    changed = [p for _, p in named if p.requires_grad]
    try:
        for p in changed:
            p.requires_grad_(False)
        yield
    finally:
        for p in changed:
            p.requires_grad_(True)


def _leaves(tensor: torch.Tensor) -> set[int]:
    """Ids of the leaf tensors that a tensor was computed from."""
    if tensor.grad_fn is None:
        return {id(tensor)}
    found, seen, waiting = set(), {tensor.grad_fn}, [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting += new
    return found
