"""The estimators that probe parts of a model apart: block by block, or a random choice of its layers."""

import hashlib
import sys
from collections.abc import Sequence
from typing import Any

import torch

from pyzo import layers
from pyzo.estimators.base import Block, Estimator, Partition, Points, Stage
from pyzo.estimators.whole import ForwardGrad, TwoSided
from pyzo.layers.names import Names

Named = Sequence[tuple[str, torch.Tensor]]


class _ByBlocks(Estimator):
    """What both share: each unit is probed by an estimator of its own, and the model is known.

    Args:
        estimator: how a unit is probed: `TwoSided` or `OneSided`.
        model: the module whose parts are meant, where the optimizer is given parameters or groups.
        reuse: compute what the layers before a unit put out once, and not again for each of its points.
    """

    def __init__(self, estimator: Estimator | None, model: torch.nn.Module | None, reuse: bool):
        estimator = TwoSided() if estimator is None else estimator
        if not isinstance(estimator, Estimator) or isinstance(estimator, (_ByBlocks, ForwardGrad)):
            raise TypeError(f"estimator: expected TwoSided or OneSided, got {type(estimator).__name__}")
        if model is not None and not isinstance(model, torch.nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.estimator, self.model, self.reuse = estimator, model, reuse
        self.q, self.kind, self.loss_here = estimator.q, estimator.kind, estimator.loss_here

    @property
    def scaling(self) -> int:
        return self.estimator.scaling

    def probe(self, points: Points) -> list[torch.Tensor]:
        return self.estimator.probe(points)

    def _model(self, module: torch.nn.Module | None) -> torch.nn.Module:
        model = self.model if self.model is not None else module
        if model is None:
            raise ValueError(
                f"estimator: expected {type(self).__name__}(..., model=) where the optimizer is given parameters, or "
                "an optimizer that is given the module"
            )
        return model

    def _partition(
        self, model: torch.nn.Module, named: Named, groups: Sequence[tuple[str, frozenset[int]]]
    ) -> Partition:
        """Blocks from (name, ids of tensors), with the stack of the model where there is one."""
        reaches, stack = _reaches(model)
        blocks = [
            Block(name, ids, self._first(number), min((reaches.get(i, 0) for i in ids), default=0))
            for number, (name, ids) in enumerate(groups)
        ]
        return Partition(blocks, stack, self._obstacle(model))

    def _first(self, number: int) -> int:
        """The first direction of a block."""
        return 0

    def _obstacle(self, model: torch.nn.Module) -> str | None:
        if not self.reuse:
            return "reuse=False"
        if "torch._dynamo" in sys.modules and any(
            isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None for m in model.modules()
        ):
            return "the model is compiled"
        return None


class BlockWise(_ByBlocks):
    """One direction for each block of the model, with a seed of its own, and an estimate of its gradient alone.

    Needs as many forwards for each block as its estimator for all: 2 q times the number of blocks. The variance of an
    estimate grows with the size of the largest block instead of the model's. In the order "gauss-seidel" a block is
    updated before the next one is probed; in "jacobi" all are probed at the same weights (one more pass over each).
    Steps, skips and Adam's counts are those of each block. Source: the block-wise ZO of arXiv 2402.11592, section 5.

    Args:
        blocks: "layer": each layer of the model's stack of layers and each module beside it; "linear": each module with
            parameters of its own; or a list whose entries are modules, names of modules or parameters, or lists of
            these. Every trained parameter must lie in exactly one block.
        order: "gauss-seidel" or "jacobi".
        estimator: how a block is probed, `TwoSided()` or `OneSided()`; `normalize="std"` is taken for each block alone.
        model: the module whose blocks are meant, where the optimizer is given parameters or groups.
        reuse: compute what the layers before a block put out once for all of its points, about half of all layer calls.
            The first step compares every loss with that of a whole forward, bit for bit, and gives it up where they
            differ; `opt.prefix` says so. Costs the memory of one layer's output.
    """

    def __init__(
        self,
        blocks: str | Sequence[Any] = "layer",
        order: str = "gauss-seidel",
        estimator: Estimator | None = None,
        model: torch.nn.Module | None = None,
        reuse: bool = True,
    ):
        super().__init__(estimator, model, reuse)
        if isinstance(blocks, str) and blocks not in ("layer", "linear"):
            raise ValueError(f"blocks: expected 'layer', 'linear' or a list of blocks, got {blocks!r}")
        if order not in ("gauss-seidel", "jacobi"):
            raise ValueError(f"order: expected 'gauss-seidel' or 'jacobi', got {order!r}")
        self.blocks, self.order = blocks, order

    def __repr__(self) -> str:
        return f"BlockWise(blocks={self.blocks!r}, order={self.order!r}, estimator={self.estimator!r})"

    def _first(self, number: int) -> int:
        return number * self.q

    def partition(self, module: torch.nn.Module | None, named: Named) -> Partition:
        model = self._model(module)
        parameters = dict(model.named_parameters())
        groups = [
            (block.name, frozenset(id(parameters[name]) for name in block.parameters))
            for block in layers.blocks(model, self.blocks)
        ]
        return self._partition(model, named, _restricted(groups, named))

    def stages(self, blocks: Sequence[Block], seed: int, step: int) -> list[Stage]:
        units = [(number,) for number in range(len(blocks))]
        return [units] if self.order == "jacobi" else [[unit] for unit in units]


class RandomLayers(_ByBlocks):
    """Each step probes and updates a random choice of the model's layers, and what lies beside them (LeZO).

    As many forwards as its estimator needs for all; passes touch what is chosen. The choice is a function of the run's
    seed, the step and the layer's name. Source: LeZO, arXiv 2410.09823.

    Args:
        fraction: share of the layers that a step moves, in (0, 1]; at least one.
        estimator: how they are probed, `TwoSided()` or `OneSided()`.
        model, reuse: as in `BlockWise`.
    """

    is_static = False

    def __init__(
        self,
        fraction: float,
        estimator: Estimator | None = None,
        model: torch.nn.Module | None = None,
        reuse: bool = True,
    ):
        super().__init__(estimator, model, reuse)
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected a number in (0, 1], got {fraction!r}")
        self.fraction = fraction

    def __repr__(self) -> str:
        return f"RandomLayers({self.fraction!r}, estimator={self.estimator!r})"

    def partition(self, module: torch.nn.Module | None, named: Named) -> Partition:
        model = self._model(module)
        names = Names(model)
        of_layers = [(layer.name, _inside(names, layer)) for layer in layers.stack(model).layers]
        beside = frozenset(id(t) for _, t in named).difference(*(own for _, own in of_layers))
        return self._partition(model, named, _restricted([*of_layers, (BESIDE, beside)], named))

    def stages(self, blocks: Sequence[Block], seed: int, step: int) -> list[Stage]:
        drawn = [n for n, block in enumerate(blocks) if block.name != BESIDE]
        drawn.sort(key=lambda n: hashlib.blake2b(f"{seed} {step} {blocks[n].name}".encode(), digest_size=8).digest())
        chosen = drawn[: max(1, round(self.fraction * len(drawn)))]
        return [[tuple(sorted([*chosen, *(n for n, block in enumerate(blocks) if block.name == BESIDE)]))]]


BESIDE = "(beside the layers)"


def _restricted(groups: Sequence[tuple[str, frozenset[int]]], named: Named) -> list[tuple[str, frozenset[int]]]:
    """The blocks with only what is trained, those without any left out; ValueError for what is in none of them."""
    trained = {id(t): name for name, t in named}
    blocks = [(name, own & trained.keys()) for name, own in groups]
    orphans = set(trained).difference(*(own for _, own in blocks))
    if orphans:
        names = sorted(trained[i] for i in orphans)
        raise ValueError(f"blocks: expected every trained parameter in a block, got none for {', '.join(names)}")
    return [(name, own) for name, own in blocks if own]


def _inside(names: Names, part: layers.Part) -> frozenset[int]:
    """Ids of the parameters of a part of the model."""
    return frozenset(id(names.parameters[name]) for member in part.members for name in names.inside(member))


def _reaches(model: torch.nn.Module) -> tuple[dict[int, int], tuple[torch.nn.Module, ...]]:
    """By id of a parameter, the first layer that it reaches, and the stack; both empty where the model has none."""
    try:
        stack = layers.stack(model)
    except ValueError:
        return {}, ()
    names, reaches = Names(model), {}
    for reach, part in [*enumerate(stack.layers), *((len(stack.layers), part) for part in stack.back)]:
        reaches.update((i, min(reach, reaches.get(i, reach))) for i in _inside(names, part))
    reaches.update((i, 0) for part in stack.front for i in _inside(names, part))  # tied ones too
    return reaches, tuple(model.get_submodule(layer.name) for layer in stack.layers)
