"""From what users hand to an optimizer (module, parameters, names, groups) to trained tensors with noise keys."""

from collections.abc import Iterable
from typing import Any

import torch

from pyzo.field import tensor_key
from pyzo.passes import Trained

Params = torch.nn.Module | Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]


def group_params(params: Params) -> tuple[list[Any], int | None]:
    """What torch.optim.Optimizer takes, and the bytes of all parameters of the module (None if `params` is none)."""
    if isinstance(params, torch.nn.Module):
        named = list(params.named_parameters())
        if not named:
            raise ValueError(f"params: expected a module with parameters, got {type(params).__name__} without any")
        return named, sum(p.numel() * p.element_size() for _, p in named)
    if isinstance(params, torch.Tensor):
        raise TypeError(
            "params: expected a module, an iterable of tensors, of (name, tensor) pairs or of groups, got a tensor"
        )
    return list(params), None


def trained_tensors(param_groups: list[dict[str, Any]]) -> list[Trained]:
    """The parameters that require gradients, each once, with the key of its name (without names: of its position).

    Raises:
        ValueError: two parameters whose names have the same key, or that have the same name.
    """
    trained: list[Trained] = []
    seen: dict[int, str] = {}
    names: dict[int, str] = {}
    position = 0
    for row, group in enumerate(param_groups):
        given = group.get("param_names")
        for i, tensor in enumerate(group["params"]):
            name = given[i] if given else f"#{position}"
            position += 1
            if not tensor.requires_grad or id(tensor) in seen:
                continue
            seen[id(tensor)] = name
            key = tensor_key(name)
            if key in names:
                raise ValueError(
                    f"params: expected names with keys of their own, got {name!r} and {names[key]!r} with the same"
                )
            names[key] = name
            trained.append(Trained(name, tensor, key, row))
    return trained
