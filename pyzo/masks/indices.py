"""Static sparsity: lists of the elements that move. A pass costs as much as it lists."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from pyzo.masks.base import Mask, TensorMask
from pyzo.masks.listed import Given, by_name, check_known
from pyzo.masks.order import kth_smallest, select


class Indices(Mask):
    """The listed elements move, and nothing else. Passes, copies and state cost what is listed, not what there is.

    Args:
        tensors: integer tensors of indices into the flattened parameters, by parameter name or in the order of the
            parameters; in any order, each index once. A trained parameter without a list does not move.
    """

    def __init__(self, tensors: Given):
        self._indices = {name: _checked(name, t) for name, t in by_name(tensors).items()}

    def __repr__(self) -> str:
        return f"Indices({len(self)} elements of {len(self._indices)} tensors)"

    def __len__(self) -> int:
        return sum(len(t) for t in self._indices.values())

    def __getitem__(self, name: str) -> torch.Tensor:
        """The elements of a parameter that move: int64, in order."""
        return self._indices[name]

    @classmethod
    def top_sensitive(
        cls,
        model: torch.nn.Module,
        batches: Iterable[Any],
        fraction: float,
        *,
        loss: Callable[[torch.nn.Module, Any], torch.Tensor] | None = None,
    ) -> "Indices":
        """The most sensitive weights of a whole model: those with the largest sum of squared gradients over batches.

        The diagonal of the empirical Fisher information, as in extreme static sparsity for ZO (arXiv 2406.02913). Makes
        one backward pass per batch, and keeps a gradient and a float32 sum per trainable weight meanwhile; gradients
        and parameters of the model stay as they are.

        Args:
            model: its parameters that require gradients are ranked together.
            batches: what the loss is taken of.
            fraction: share of all trainable weights to list, in (0, 1]; fewer where fewer have a gradient.
            loss: (model, batch) -> scalar; None: `model(**batch).loss`, as Hugging Face models have it.

        Raises:
            ValueError: no batches, no trainable parameters, or sums that are not finite.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected a number in (0, 1], got {fraction!r}")
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("model: expected parameters that require gradients, got none")
        scores = _squared_gradients(model, named, batches, loss or _own_loss)
        total = sum(s.numel() for s in scores)
        count = max(1, round(fraction * total))
        least = kth_smallest(scores, total - count + 1)
        left = count - sum(len(select(s, lambda x: x > least)) for s in scores)  # for those that tie with the last one
        listed = {}
        for name, s in zip(named, scores, strict=True):
            above = select(s, lambda x: x > least)
            tied = select(s, lambda x: x == least)[:left] if least > 0 else above[:0]
            left -= len(tied)
            listed[name] = torch.cat([above, tied])
        return cls({name: t for name, t in listed.items() if len(t)})

    def check_names(self, parameters: Iterable[str]) -> None:
        check_known(self._indices, parameters)

    def fit(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorMask]:
        masks = {}
        for name, t in tensors.items():
            indices = self._indices.get(name, torch.zeros(0, dtype=torch.int64))
            if len(indices) and int(indices[-1]) >= t.numel():
                raise ValueError(f"mask: expected indices below {t.numel()} for {name}, got {int(indices[-1])}")
            masks[name] = TensorMask(indices=indices.to(t.device))
        return masks

    def plain(self) -> dict[str, Any]:
        return {"kind": "Indices", "tensors": dict(self._indices)}


def _checked(name: str, indices: torch.Tensor) -> torch.Tensor:
    """Indices as int64 in order, flat."""
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"tensors[{name!r}]: expected integer indices, got {indices.dtype}")
    ordered = indices.detach().reshape(-1).long().sort().values
    if len(ordered) and int(ordered[0]) < 0:
        raise ValueError(f"tensors[{name!r}]: expected indices >= 0, got {int(ordered[0])}")
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise ValueError(f"tensors[{name!r}]: expected each index once, got {int(twice[0])} twice")
    return ordered


def _own_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batches: expected mappings for model(**batch), or the argument loss, got {type(batch).__name__}"
        )
    return model(**batch).loss


def _squared_gradients(
    model: torch.nn.Module,
    named: Mapping[str, torch.Tensor],
    batches: Iterable[Any],
    loss: Callable[[torch.nn.Module, Any], torch.Tensor],
) -> list[torch.Tensor]:
    """For each parameter, float32 sums over batches of the squares of its gradient."""
    scores = [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in named.values()]
    seen = 0
    for batch in batches:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(model, batch), list(named.values()), allow_unused=True)
        for score, gradient in zip(scores, gradients, strict=True):
            if gradient is not None:
                score.addcmul_(gradient.float(), gradient.float())
        seen += 1
    if not seen:
        raise ValueError("batches: expected at least one, got none")
    for name, score in zip(named, scores, strict=True):
        if not torch.isfinite(score).all():
            raise ValueError(f"batches: expected gradients with finite squares, got others for {name}")
    return scores
