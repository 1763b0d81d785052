"""Which attention is computed again in backward."""

from .attention import RecomputingAttention
from .decisions import Decisions, Skip


def decide_attention(decisions: Decisions) -> None:
    """Every module that computes attention: by torch's function, or by hand."""
    if decisions.recipe["attention"] is None:
        return
    by_hand = {event.module for event in decisions.flow.probabilities()}
    for name in decisions.modules:
        if name in decisions.flow.attention:
            decisions.report(name, "attention", lambda name: _recompute(decisions, name))
        elif name in by_hand:
            decisions.report(name, "attention", _by_hand)


def _recompute(decisions: Decisions, name: str) -> tuple[str, bool, str]:
    reasons = decisions.flow.attention[name]
    if all(reasons):
        raise Skip("; ".join(dict.fromkeys(reasons)))
    decisions.swap(name, RecomputingAttention)
    return "its probabilities are computed again in backward", True, ""


def _by_hand(name: str) -> tuple[str, bool, str]:
    raise Skip("it does not call torch's scaled_dot_product_attention itself")
