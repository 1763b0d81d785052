"""From what users hand to an optimizer (module, parameters, names, groups) to named tensors with noise keys."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parameter import UninitializedTensorMixin
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pyzo import ops
from pyzo.field import tensor_key
from pyzo.layers import is_norm


@dataclass(frozen=True)
class PartOf:
    """Some parameters of a module, for an optimizer that is to know the module but to train no others of it."""

    module: torch.nn.Module
    names: tuple[str, ...]


Params = (
    torch.nn.Module | PartOf | Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]
)


@dataclass(frozen=True)
class Given:
    """What `params` was: the groups as torch.optim.Optimizer takes them, and what only a module tells.

    Attributes:
        groups: parameters, (name, parameter) pairs or groups.
        module: `params` itself or what it is a part of, where it was one of these.
        undecayed: ids of the parameters that weight decay leaves out.
    """

    groups: list[Any]
    module: torch.nn.Module | None = None
    undecayed: frozenset[int] = frozenset()


def read_params(params: Params) -> Given:
    """Reads the argument `params` of an optimizer; TypeError or ValueError where there is nothing to train."""
    if isinstance(params, torch.nn.Module):
        params = PartOf(params, tuple(name for name, _ in params.named_parameters()))
    if isinstance(params, PartOf):
        module, named = params.module, dict(params.module.named_parameters())
        if not params.names:
            raise ValueError(f"params: expected a module with parameters, got {type(module).__name__} without any")
        return Given([(name, named[name]) for name in params.names], module, undecayed(module))
    if isinstance(params, torch.Tensor):
        raise TypeError(
            "params: expected a module, an iterable of tensors, of (name, tensor) pairs or of groups, got a tensor"
        )
    return Given(list(params))


def undecayed(module: torch.nn.Module) -> frozenset[int]:
    """Ids of the norm weights and biases of a module, which weight decay leaves out.

    `pyzo.layers.is_norm` tells norms. A bias is a vector that its own module calls a bias.
    """
    ids = set()
    for owner in module.modules():
        norm = is_norm(owner)
        own = owner.named_parameters(recurse=False)
        ids.update(id(p) for name, p in own if norm or (p.ndim <= 1 and "bias" in name))
    return frozenset(ids)


@dataclass(frozen=True)
class Named:
    """A parameter that requires gradients: its name, its noise key and the index of its group."""

    name: str
    tensor: torch.Tensor
    key: int
    group: int


def named_tensors(param_groups: list[dict[str, Any]]) -> list[Named]:
    """The parameters that require gradients, each once, with the key of its name (without names: of its position).

    Raises:
        ValueError: two parameters whose names have the same key, or that have the same name; one that holds quantised
            numbers, or is no plain tensor.
    """
    found: list[Named] = []
    seen: set[int] = set()
    names: dict[int, str] = {}
    position = 0
    for index, group in enumerate(param_groups):
        given = group.get("param_names")
        for i, tensor in enumerate(group["params"]):
            name = given[i] if given else f"#{position}"
            position += 1
            if not tensor.requires_grad or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            _check_trainable(name, tensor)
            key = tensor_key(name)
            if key in names:
                raise ValueError(
                    f"params: expected names with keys of their own, got {name!r} and {names[key]!r} with the same"
                )
            names[key] = name
            found.append(Named(name, tensor, key, index))
    return found


def _check_trainable(name: str, tensor: torch.Tensor) -> None:
    """ValueError for weights of which a step cannot be a part of a step between two numbers, or that are no tensors."""
    if is_traceable_wrapper_subclass(tensor) or isinstance(tensor, UninitializedTensorMixin):
        raise ValueError(
            f"params: expected plain tensors, got a {type(tensor).__name__} for {name!r}: freeze it "
            "(requires_grad_(False)) and train what lies beside it, such as an adapter, or initialise it"
        )
    if tensor.dtype not in ops.DTYPES:
        advice = (
            "train a copy of one of these"
            if tensor.element_size() > 1
            else "training quantised weights themselves would need a 16-bit master beside each, or updates as coarse "
            "as their grid: train an adapter (LoRA), the scales as parameters, or a 16-bit copy"
        )
        raise ValueError(
            f"params: expected contiguous float32, bfloat16 or float16 weights, got {tensor.dtype} for {name!r}: "
            f"{advice}"
        )


def check_split(named: list[Named]) -> None:
    """ValueError unless weights can have masters in two parts: some are bfloat16, and none is float16."""
    for n in named:
        if n.tensor.dtype == torch.float16:
            raise ValueError(f"master: expected bfloat16 or float32 weights with 'split', got float16 in {n.name}")
    dtypes = sorted({str(n.tensor.dtype).removeprefix("torch.") for n in named})
    if "bfloat16" not in dtypes:
        raise ValueError(f"master: expected bfloat16 weights with 'split', got only {' and '.join(dtypes)}")
