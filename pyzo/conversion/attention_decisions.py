"""Which attention is computed again in backward."""

from collections.abc import Iterator

from pyzo import ops

from .attention import RecomputingAttention, narrow_attention
from .decisions import Decisions, Skip
from .flow import MOVES, Flow, within

_SOFTMAX = {"_softmax", "_safe_softmax"}
_PRODUCTS = {"bmm", "baddbmm", "matmul"}  # of two activations
_DROPS = {"mul", "native_dropout"}
_WIDE = 'it is in float32, where computing it again takes time: "recompute" does so'


def decide_attention(decisions: Decisions) -> None:
    """Every module that computes attention: by torch's function, or by hand."""
    if decisions.recipe["attention"] is None:
        return
    by_hand = set(_softmaxes(decisions.flow))
    for name in decisions.modules:
        if name in decisions.flow.attention:
            decisions.report(name, "attention", lambda name: _recompute(decisions, name))
        elif name in by_hand:
            decisions.report(name, "attention", _by_hand)


def _recompute(decisions: Decisions, name: str) -> tuple[str, bool, str]:
    wide = decisions.recipe["attention"] == "recompute"
    calls = decisions.flow.attention[name]
    reasons = [reason or ("" if wide or narrow else _WIDE) for reason, narrow in calls]
    if all(reasons):
        raise Skip("; ".join(dict.fromkeys(reasons)))
    decisions.swap(name, RecomputingAttention, attend=ops.attention if wide else narrow_attention)
    return "its probabilities are computed again in backward", True, ""


def _by_hand(name: str) -> tuple[str, bool, str]:
    raise Skip("it does not call torch's scaled_dot_product_attention itself")


def _softmaxes(flow: Flow) -> Iterator[str]:
    """Modules whose softmax goes, dropped or not, into a product of two activations inside of them."""
    for event in flow.events:
        if event.operator not in _SOFTMAX:
            continue
        todo, seen = list(event.makes), set(event.makes)
        while todo:
            readers = [r for r in flow.readers_of(todo.pop()) if within(r.module, event.module)]
            if any(reader.operator in _PRODUCTS for reader in readers):
                yield event.module
                break
            new = {s for r in readers if r.operator in MOVES | _DROPS for s in r.makes} - seen
            seen |= new
            todo.extend(new)
