"""What masks that name their tensors share: one entry for each parameter, by its name or by its place."""

from collections.abc import Iterable, Mapping, Sequence

import torch

Given = Mapping[str, torch.Tensor] | Sequence[torch.Tensor]


def by_name(tensors: Given) -> dict[str, torch.Tensor]:
    """The given tensors by parameter name; TypeError or ValueError where they are none."""
    if isinstance(tensors, (torch.Tensor, str)) or not isinstance(tensors, (Mapping, Sequence)):
        raise TypeError(
            "tensors: expected a mapping from parameter names to tensors, or a sequence of tensors in the order of the "
            f"optimizer's parameters, got {type(tensors).__name__}"
        )
    # An optimizer calls parameters without a name by their position.
    pairs = tensors.items() if isinstance(tensors, Mapping) else ((f"#{i}", t) for i, t in enumerate(tensors))
    named = dict(pairs)
    for name, t in named.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"tensors[{name!r}]: expected a tensor, got {type(t).__name__}")
    if not named:
        raise ValueError("tensors: expected at least one tensor, got none")
    return named


def check_known(listed: Iterable[str], parameters: Iterable[str]) -> None:
    """ValueError naming what a mask lists and the optimizer does not have."""
    unknown = sorted(set(listed).difference(parameters))
    if unknown:
        raise ValueError(
            f"mask: expected names of the optimizer's parameters, got {unknown[0]!r} and {len(unknown) - 1} more"
        )
