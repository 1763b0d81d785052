"""Which norms keep their output for backward, and in which dtype they emit it."""

from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from .decisions import Decisions, Skip
from .dropouts import FusedAdapter
from .linears import SharingAttention, SharingLinear, is_linear, is_lora
from .merging import MergedLinear, cannot_merge
from .norms import NormKind, SharedLayerNorm, SharedRMSNorm, is_norm
from .report import Entry
from .swap import Swapped


def decide_norms(decisions: Decisions) -> None:
    """Every norm of the model: shared, or as small as it can be, or skipped."""
    if decisions.recipe["norm"] is None:
        return
    for name, module in decisions.modules.items():
        if is_norm(module):
            decisions.report(name, "norm", lambda name: _decide(decisions, name))


def _decide(decisions: Decisions, name: str) -> tuple[str, bool, str]:
    module = decisions.modules[name]
    calls = decisions.flow.calls.get(name)
    if not calls:
        raise Skip("it did not run")
    kind = decisions.findings.norms[name]
    if isinstance(kind, str):
        raise Skip(kind)
    low = calls[0].autocast
    every = [decisions.flow.readers(call.result, decisions.fused, call.autocast) for call in calls]
    outputs = {call.result for call in calls}
    if any(readers.written for readers in every):
        raise Skip("its output is changed in place")
    products = tuple(dict.fromkeys(p for readers in every for p in readers.products))
    others = tuple(dict.fromkeys(o for readers in every for o in readers.others))
    moves = {move for readers in every for move in readers.moves} - {"_to_copy"}
    mixin = SharedLayerNorm if kind.centered else SharedRMSNorm
    plain = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    direct = [p for p in products if _reads(decisions, p, outputs)]
    remark = "" if not others else f"keeps its dtype, as {_shown(others)} reads it too"
    if products and not others:
        if decisions.recipe["norm"] == "merged":
            remark = _cannot_merge(decisions, name, kind, products, moves, outputs)
            if not remark:
                decisions.swap(name, mixin, _kind=kind, _emits="twin")
                for reader in products:
                    decisions.swap(reader, MergedLinear, _norm=(module,), _handover=None)
                decisions.merges.append((name, products))
                return "backward from its output, affine part merged into the linears", True, ""
        if low is not None and all(call.autocast == low for call in calls):
            if direct:
                decisions.swap(name, mixin, _kind=kind, _emits="autocast")
                return "backward from its output, which the linears keep too", True, remark
            if not plain or any(decisions.flow.dtypes[output] != low for output in outputs):
                decisions.swap(name, mixin, _kind=kind, _emits="autocast")
                return "backward from its output", True, "copied on the way to the linears, which keep the copy"
    readers = [p for p in direct if not decisions.cannot_swap(p, _twin(decisions, p))]
    if not readers and plain:
        reason = "copied on the way to the linears" if moves else "no linear keeps its output"
        raise Skip(reason + (f", read by {_shown(others)}" if others else ""))
    decisions.swap(name, mixin, _kind=kind, _emits="twin" if readers else "stock")
    for reader in readers:
        if not is_lora(decisions.modules[reader]):
            twin = _twin(decisions, reader)
            decisions.swap(reader, twin, **({"_handover": None} if twin is SharingLinear else {}))
    if not readers:
        return "backward from its output alone", True, remark
    shared = "of which the linears share one copy under autocast" if others else "which the linears keep too"
    return f"backward from its output, {shared}", True, remark


def name_fallback(entry: Entry, module: nn.Module) -> Entry:
    """Says so where a norm's parameters leave it nothing but its input to work from."""
    if entry.kind != "norm" or entry.skipped:
        return entry
    kept = [dtype for dtype in (module._own_dtype(), torch.bfloat16) if module.saves_for(dtype) == "input"]
    if not kept:
        return entry
    return replace(entry, became="backward from its input", reason=module.reason_for(kept[0]))


def _cannot_merge(
    decisions: Decisions,
    name: str,
    kind: NormKind,
    products: tuple[str, ...],
    moves: set[str],
    outputs: set[int | None],
) -> str:
    """Why the affine part stays in the norm; empty where it can go into the linears."""
    modules = decisions.modules
    if not decisions.merging:
        return "not merged: the model may look at the parameters of its norms"
    if reason := cannot_merge(modules[name], kind.weight_offset):
        return reason
    if moves:
        return "not merged: its output is copied on the way to the linears"
    parameters = [p for reader in products for p in modules[reader].parameters(recurse=False)]
    owners = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
    if any(owners[id(p)] > 1 for p in parameters):
        return "not merged: a weight behind it is used elsewhere (tied)"
    for reader in products:
        if not is_linear(modules[reader]) or not _reads(decisions, reader, outputs):
            return "not merged: not only plain linears read it"
        if decisions.cannot_swap(reader, MergedLinear) or reader in decisions.swaps:
            return "not merged: a linear behind it is converted in another way"
    return ""


def _twin(decisions: Decisions, reader: str) -> type[Swapped]:
    module = decisions.modules[reader]
    if is_lora(module):
        return FusedAdapter
    return SharingAttention if isinstance(module, nn.MultiheadAttention) else SharingLinear


def _reads(decisions: Decisions, reader: str, outputs: set[int | None]) -> bool:
    """Whether a module takes the output itself as its argument, and knows what to do with a copy of it."""
    module = decisions.modules[reader]
    known = is_linear(module) or reader in decisions.fused or type(module) is nn.MultiheadAttention
    return known and all(call.argument in outputs for call in decisions.flow.calls[reader])


def _shown(others: tuple[tuple[str, str], ...]) -> str:
    """The operators, without the modules, so that equal layers have equal lines."""
    names = sorted({operator.strip("()_") for operator, _ in others})
    return ", ".join(names[:4]) + (" and others" if len(names) > 4 else "")
