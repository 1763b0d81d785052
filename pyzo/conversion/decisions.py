"""What becomes of each module, decided from the dataflow of one forward pass and from what modules computed in it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .activations import HandoverBlock, Path, check_activation, function_of
from .flow import Flow, Probe
from .linears import adapted_linear, is_lora
from .norms import NormKind, is_norm, read_norm
from .report import Entry
from .swap import Swapped, foreign_forward


class Skip(Exception):
    """Raised with the reason why a module stays what it is."""


@dataclass
class Findings:
    """What probes saw while the forward pass ran: results of single modules on real inputs."""

    norms: dict[str, NormKind | str] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)
    samples: dict[str, "Sample"] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Some rows of what a module was given and what it returned, and the dtype of autocast then."""

    x: Tensor
    y: Tensor
    autocast: torch.dtype | None


@dataclass
class Decisions:
    """Swaps to make and what to report."""

    model: nn.Module
    flow: Flow
    findings: Findings
    recipe: dict[str, str | None]
    merging: bool = True  # whether norms may lose their parameters
    entries: list[Entry] = field(default_factory=list)
    swaps: dict[str, tuple[type[Swapped], dict[str, Any]]] = field(default_factory=dict)
    # By block: paths of an activation and of the linear behind it, and the function.
    pairs: dict[str, list[tuple[Path, Path, str]]] = field(default_factory=dict)
    merges: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)  # norms, and the linears behind them

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())
        self.names: dict[int, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            self.names.setdefault(id(module), []).append(name)
        self.fused = frozenset(
            name
            for name, module in self.modules.items()
            if self.recipe["adapter"] and is_lora(module) and adapted_linear(module) is not None
        )

    def swap(self, name: str, mixin: type[Swapped], **attributes: Any) -> None:
        """Notes a swap; Skip where the module cannot be swapped so."""
        if reason := self.cannot_swap(name, mixin):
            raise Skip(reason)
        self.swaps.setdefault(name, (mixin, attributes))

    def cannot_swap(self, name: str, mixin: type[Swapped]) -> str:
        if reason := foreign_forward(self.modules[name]):
            return f"{name} has {reason}"
        if name in self.pairs and mixin is not HandoverBlock:
            return f"{name} hands over activations"
        if name in self.swaps and not issubclass(self.swaps[name][0], mixin):
            return f"{name} is converted already, to {self.swaps[name][0].__name__}"
        return ""

    def report(self, name: str, kind: str, decide: Callable[[str], tuple[str, bool, str]]) -> None:
        """Adds an entry for what `decide` returns (what it became, whether exactly, a remark), or why it skipped."""
        module = type(self.modules[name]).__name__
        try:
            became, exact, remark = decide(name)
            self.entries.append(Entry(name, kind, module, became, exact, remark))
        except Skip as skipped:
            self.entries.append(Entry(name, kind, module, reason=str(skipped)))

    def parent(self, name: str) -> str:
        return name.rpartition(".")[0]

    def children(self, name: str) -> Iterator[str]:
        for child, _ in self.modules[name].named_children():
            yield f"{name}.{child}" if name else child


def probes_for(model: nn.Module, findings: Findings) -> dict[str, Probe]:
    """What is tried with each norm, activation and module around an activation while a forward pass runs, once each."""
    found: dict[str, Probe] = {}

    def once(name: str, into: dict[str, Any], look: Callable[[nn.Module, Tensor, Tensor], Any]) -> None:
        def probe(module: nn.Module, x: Tensor, y: Tensor) -> None:
            if name not in into:
                into[name] = look(module, x, y)

        found[name] = probe

    for name, module in model.named_modules():
        if is_norm(module):
            once(name, findings.norms, read_norm)
        elif (function := function_of(module)) is not None:
            once(name, findings.activations, _checks(function))
        elif sum(function_of(child) is not None for child in module.children()) == 1 and len(module._modules) == 4:
            once(name, findings.samples, _sample)
    return found


def _checks(function: str) -> Callable[[nn.Module, Tensor, Tensor], str]:
    return lambda module, x, y: check_activation(module, function, x)


def _sample(module: nn.Module, x: Tensor, y: Tensor) -> Sample | None:
    if x.dim() == 0 or y.dim() == 0:
        return None
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    rows = x.reshape(-1, x.shape[-1])[:16].clone()
    return Sample(rows, y.reshape(-1, y.shape[-1])[:16].clone(), torch.get_autocast_dtype(device) if on else None)
