"""Norms whose affine part goes into the linears behind them, as the paper has it, and state dicts that hide it."""

from typing import Any

import torch
from torch import nn

from pyzo.nn import unmerge_affine_
from pyzo.nn.affine import _RECORD, _Fold
from pyzo.nn.affine_checks import affine_of, read_consumers

from .linears import SharingLinear


class MergedLinear(SharingLinear):
    """A linear that holds W diag(gamma) and b + W beta, and saves W and b."""

    _norm: tuple[nn.Module]  # in a tuple, as it is no child

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        record = getattr(self._norm[0], _RECORD, None)
        if record is None:
            return
        gamma, beta = affine_of(self._norm[0], record.parameters)
        fold = _Fold(gamma, beta, divide=True)
        (consumer,) = read_consumers([self], gamma.numel())[1]
        blocks = [fold.folded(block) for block in consumer.weight.blocks()]
        weight = torch.cat(blocks)
        destination[f"{prefix}weight"] = weight if isinstance(self, nn.Linear) else weight.t().contiguous()
        position = next(i for i, linear in enumerate(record.linears) if linear() is self)
        bias = fold.bias(consumer)
        if record.created[position] and fold.only_rounding(consumer, bias):
            del destination[f"{prefix}bias"]
        elif bias is not None:
            destination[f"{prefix}bias"] = bias

    def _load_from_state_dict(self, *args: Any) -> None:
        raise ValueError(_NO_LOADING)


_NO_LOADING = (
    "state_dict: expected a model whose norms are not merged, got one that was converted with merged norms: "
    "pyzo.revert it, load, and convert it again"
)


def unmerge(model: nn.Module) -> None:
    """Gives every merged norm its parameters back, from whatever is around its linears now."""
    merged = [module for module in model.modules() if hasattr(module, _RECORD)]
    if not merged:
        return
    around = {id(module.base_layer): module for module in model.modules() if hasattr(module, "lora_A")}
    for norm in merged:
        consumers = getattr(norm, _RECORD).find()
        unmerge_affine_(norm, [around.get(id(consumer), consumer) for consumer in consumers])


def cannot_merge(norm: nn.Module, weight_offset: float) -> str:
    """Why a norm stays affine; empty where it can be merged and unmerged again."""
    if not list(norm.parameters(recurse=False)):
        return "nothing to merge"
    weight = getattr(norm, "weight", None)
    if weight is not None and not (weight_offset + weight.detach().float()).all():
        return "not merged: gamma is zero somewhere"
    return ""
