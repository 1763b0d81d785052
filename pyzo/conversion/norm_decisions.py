"""Which norms keep their output for backward, and in which dtype they emit it."""

from collections import Counter

from torch import nn

from .decisions import Decisions, Skip
from .dropouts import FusedAdapter
from .linears import SharingAttention, SharingLinear, is_linear, is_lora
from .merging import MergedLinear, cannot_merge
from .norms import NormKind, SharedLayerNorm, SharedRMSNorm, is_norm
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
    every = [decisions.flow.readers(call.result, decisions.fused) for call in calls]
    outputs = {call.result for call in calls}
    if any(readers.written for readers in every):
        raise Skip("its output is changed in place")
    products = tuple(dict.fromkeys(p for readers in every for p in readers.products))
    others = tuple(dict.fromkeys(o for readers in every for o in readers.others))
    mixin = SharedLayerNorm if kind.centered else SharedRMSNorm
    if products and not others:
        remark = ""
        if decisions.recipe["norm"] == "merged":
            moves = {move for readers in every for move in readers.moves}
            remark = _cannot_merge(decisions, name, kind, products, moves, outputs)
        decisions.swap(name, mixin, _kind=kind, _emits="autocast")
        if decisions.recipe["norm"] == "merged" and not remark:
            for reader in products:
                decisions.swap(reader, MergedLinear, _norm=(module,))
            decisions.merges.append((name, products))
            return "backward from its output, affine part merged into the linears", True, ""
        if not any(call.argument in outputs for p in products for call in decisions.flow.calls.get(p, [])):
            return "backward from its output", True, "copied on the way to the linears, which keep the copy"
        return "backward from its output, which the linears keep too", True, remark
    readers = [
        p for p in products if _reads(decisions, p, outputs) and not decisions.cannot_swap(p, _twin(decisions, p))
    ]
    plain = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    if not readers and plain:
        raise Skip("no linear keeps its output" + (f", read by {_shown(others)}" if others else ""))
    decisions.swap(name, mixin, _kind=kind, _emits="twin" if readers else "stock")
    for reader in readers:
        if not is_lora(decisions.modules[reader]):
            mixin = _twin(decisions, reader)
            decisions.swap(reader, mixin, **({"_handover": None} if mixin is SharingLinear else {}))
    remark = f"keeps its dtype, as {_shown(others)} reads it too"
    if readers:
        return "backward from its output, of which the linears share one copy under autocast", True, remark
    return "backward from its output alone", True, remark


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
    if moves - {"_to_copy"}:
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
