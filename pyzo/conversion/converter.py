"""`convert`, `revert` and `plan`: a model's modules swapped for ones that keep less, verified on a forward pass."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyzo.generators import Rewound
from pyzo.memory import Account, account
from pyzo.nn import merge_affine_

from .attention_decisions import decide_attention
from .decisions import Decisions, Findings, probes_for
from .dropout_decisions import decide_adapters, decide_dropouts
from .flow import no_trace_left, trace, within
from .merging import unmerge
from .mlp_decisions import decide_activations
from .norm_decisions import decide_norms, name_fallback
from .recipes import Recipe, read_recipe
from .report import Entry, Report
from .swap import Swapped, foreign_forward, swap, unswap

Batch = Any
_LARGEST_STATISTIC = 1 << 16  # elements; larger buffers hold weights or tables, which forward passes do not change


def convert(model: nn.Module, recipe: Recipe = "exact", batch: Batch = None) -> Report:
    """Swaps the modules of a model, in place, for ones that keep less for the backward pass.

    Names, parameters, buffers and `state_dict` stay; each module that changes gets a subclass of its own class. What is
    swapped follows from the dataflow of one forward pass in training mode, and from what modules computed in it: where
    sharing does not hold or a result would differ, the module stays as it is, and the report says why. Without
    gradients every module runs its stock forward. A converted model is converted anew.

    Args:
        model: any module. Convert before `torch.compile`; wrapping by PEFT or DDP may come before or after.
        recipe: "exact" (no gradient changes beyond rounding; dropout draws other masks), "paper" (LowMemoryBP, arXiv
            2406.16282: 2-bit ReGELU2 and ReSiLU2 with the published constants, norms merged into the linears behind
            them where only these read them), or a dict of the kinds that `pyzo.conversion.CHOICES` lists, of which a
            missing one, or None, stays as it is: "norm": "shared" or "merged"; "activation": "recompute", "output",
            "paper", "optimal" or "derivative"; "gate": "recompute", "paper", "optimal" or "derivative"; "dropout":
            "seeded"; "adapter": "fused", or "low" (float32 adapters of 16-bit inputs computed in 16 bits); "attention":
            "narrow" (in 16 bits) or "recompute" (in float32, too).
        batch: what the model is called with: a dict of keyword arguments, a tuple or list of positional ones, a tensor,
            or a function without arguments that runs the forward pass. Run it as training does (autocast too). Two
            forward passes with gradients on it count the bytes of the report. None: the first forward pass in training
            mode is preceded by one without gradients that verifies and completes the report; until then the model is
            as it was.

    Returns:
        A `Report`: by module what it became, exactly or not, or why it was skipped.

    Raises:
        TypeError, ValueError: a recipe that is none, a model that is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report = Report(read_recipe(recipe))
    model = getattr(model, "_orig_mod", model)
    revert(model)
    if batch is None:
        if reason := foreign_forward(model):
            raise ValueError(f"batch: expected one, as the model has {reason}, got None")
        swap(model, Pending, _pending=report)
        return report
    try:
        with _training(model), _unchanged(model):
            before = _account(model, batch)
        with _training(model), _unchanged(model), no_trace_left():
            _verify(model, report, lambda: call(model, batch))
        with _training(model), _unchanged(model):
            after = _account(model, batch)
    except BaseException:
        revert(model)
        raise
    _count(report, before, after)
    return report


def revert(model: nn.Module) -> None:
    """Undoes `convert`: every module gets its own class back, and the model is what it was, bit for bit.

    Where norms were merged the weights behind them come back up to two roundings (`pyzo.nn.unmerge_affine_`).
    """
    unmerge(model)
    for module in list(model.modules()):
        unswap(module)


def plan(model: nn.Module, batch: Batch, recipe: Recipe = "exact") -> Report:
    """The report of `convert(model, recipe, batch)`, of a model that is left as it is.

    Args:
        model, batch, recipe: as of `convert`.
    """
    if batch is None:
        raise ValueError("batch: expected what the model is called with, got None")
    if any(isinstance(module, Swapped) for module in model.modules()):
        raise ValueError("model: expected one that is not converted, got a converted one (pyzo.revert undoes it)")
    try:
        return convert(model, recipe, batch)
    finally:
        revert(model)


class Pending(Swapped):
    """A model that verifies its conversion on its first forward pass in training mode."""

    _pending: Report

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._stock_forward(*args, **kwargs)
        report = self._pending
        unswap(self)
        try:
            if not _is_plain((args, kwargs)):  # a cache, say, that a second pass would find filled
                return _verify(self, report, lambda: self.forward(*args, **kwargs), once=True)
            with _unchanged(self), no_trace_left():
                _verify(self, report, lambda: self.forward(*args, **kwargs))
        except BaseException:
            if not report.verified:
                swap(self, Pending, _pending=report)
            raise
        return self.forward(*args, **kwargs)


def call(model: nn.Module, batch: Batch) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)):
        return model(*batch)
    if callable(batch):
        return batch()
    raise TypeError(f"batch: expected a dict, tuple, list, tensor or function, got {type(batch).__name__}")


def _verify(model: nn.Module, report: Report, run: Callable[[], Any], once: bool = False) -> Any:
    """Traces a forward pass, decides, and swaps; returns what the forward pass returned.

    Args:
        model, report: what is converted, and where that is noted.
        run: the forward pass.
        once: whether it must not run again, to see whether the model can do without its norms' parameters.
    """
    findings = Findings()
    flow, result = trace(model, run, probes_for(model, findings))
    merged = report.recipe["norm"] == "merged" and not once
    decisions = _swap_all(Decisions(model, flow, findings, report.recipe, merging=merged))
    if decisions.merges:
        try:
            run()
        except (AttributeError, TypeError):  # of code that looks at norm.weight, which is None now
            revert(model)
            decisions = _swap_all(Decisions(model, flow, findings, report.recipe, merging=False))
    report.entries = decisions.entries
    report.verified = True
    return result


def _swap_all(decisions: Decisions) -> Decisions:
    with torch.no_grad():
        decide_norms(decisions)
        decide_activations(decisions)
        decide_adapters(decisions)
        decide_dropouts(decisions)
        decide_attention(decisions)
    for name, (mixin, attributes) in decisions.swaps.items():
        swap(decisions.modules[name], mixin, **attributes)
    for norm, linears in decisions.merges:
        merge_affine_(decisions.modules[norm], [decisions.modules[linear] for linear in linears])
    decisions.entries = [name_fallback(entry, decisions.modules[entry.name]) for entry in decisions.entries]
    return decisions


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode everywhere; behind it every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Behind it torch's generators and the model's buffers (running statistics) are as they were."""
    rewind = Rewound({p.device for p in model.parameters()})
    kept = [(b, b.clone()) for b in model.buffers() if b.numel() <= _LARGEST_STATISTIC and b.is_contiguous()]
    try:
        yield
    finally:
        rewind()
        with torch.no_grad():
            for buffer, values in kept:
                buffer.copy_(values)


def _is_plain(value: Any) -> bool:
    """Whether arguments are tensors, numbers and the like in lists and dicts: nothing that a forward pass fills."""
    if value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device)):
        return True
    if type(value) in (list, tuple, dict):
        return all(_is_plain(inner) for inner in (value.values() if type(value) is dict else value))
    return False


def _account(model: nn.Module, batch: Batch) -> Account:
    """What a forward pass keeps, without the graph that keeps it."""
    return replace(account(lambda: call(model, batch), model), result=None)


def _count(report: Report, before: Account, after: Account) -> None:
    """Adds what the model and each module keep."""
    report.before, report.after = before.nbytes, after.nbytes
    old, new = before.by_module(), after.by_module()
    report.entries = [replace(entry, before=_inside(old, entry), after=_inside(new, entry)) for entry in report.entries]


def _inside(charged: Mapping[str, int], entry: Entry) -> int:
    """Bytes of a module with all inside it."""
    return sum(nbytes for name, nbytes in charged.items() if within(name, entry.name))
