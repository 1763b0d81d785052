"""Which dropouts draw their masks from seeds, and which LoRA layers of PEFT run as one operator."""

from torch import nn

from .decisions import Decisions, Skip
from .dropouts import FusedAdapter, SeededDropout
from .flow import within
from .linears import MOST_DROPPED, is_lora


def decide_adapters(decisions: Decisions) -> None:
    if decisions.recipe["adapter"] is None:
        return
    for name, module in decisions.modules.items():
        if is_lora(module):
            decisions.report(name, "adapter", lambda name: _fuse(decisions, name))


def _fuse(decisions: Decisions, name: str) -> tuple[str, bool, str]:
    if name not in decisions.fused:
        raise Skip("it has not one plain adapter on a plain linear")
    low = decisions.recipe["adapter"] == "low"
    decisions.swap(name, FusedAdapter, _low=low)
    remark = "a float32 adapter in the dtype of its input" if low else "under autocast, or where all have one dtype"
    return "keeps its input once, and no mask", not low, remark


def decide_dropouts(decisions: Decisions) -> None:
    if decisions.recipe["dropout"] is None:
        return
    for name, module in decisions.modules.items():
        inside = any(within(name, adapter) for adapter in decisions.fused)
        if type(module) is nn.Dropout and module.p > 0 and not inside:
            decisions.report(name, "dropout", lambda name: _seed(decisions, name))


def _seed(decisions: Decisions, name: str) -> tuple[str, bool, str]:
    module = decisions.modules[name]
    if name not in decisions.flow.calls:
        raise Skip("it did not run")
    if module.inplace:
        raise Skip("it works in place")
    if module.p > MOST_DROPPED:
        raise Skip("it drops everything")
    decisions.swap(name, SeededDropout)
    return "keeps a seed", True, "other masks than torch's"
