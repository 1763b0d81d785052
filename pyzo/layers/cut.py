"""A model as a list of layers with what runs before and behind it, and cut before one of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pyzo.layers.lists import inside, main_list, named_list
from pyzo.layers.names import Names
from pyzo.layers.parts import Part, parts_of


@dataclass(frozen=True)
class Stack:
    """A model as a list of layers; parts without parameters are left out.

    Attributes:
        name: of the list.
        front, layers, back: what runs before the layers, the layers, and what runs behind them, in this order.
    """

    name: str
    front: tuple[Part, ...]
    layers: tuple[Part, ...]
    back: tuple[Part, ...]


@dataclass(frozen=True)
class Split:
    """A model cut before one of its layers.

    Attributes:
        stack: the model.
        k: how many layers are before the cut.
        before, after: names of all parameters, frozen ones too; those that both sides use are in `before`.
    """

    stack: Stack
    k: int
    before: tuple[str, ...]
    after: tuple[str, ...]


def stack(model: nn.Module, *, layers: str | None = None, front: Sequence[str] = ()) -> Stack:
    """Finds the layers of a model, and which other modules run before and behind them.

    The list of layers is a ModuleList or Sequential (or any module whose children have numbered names) with at least
    two children of one class, the outermost one that holds the most parameters. Stages that are no repeats of each
    other but consist of layers of one class (Swin) are flattened; what is left of a stage is attached to its first or
    last layer. `pyzo.layers.parts.parts_of` says what counts as before and behind the layers.

    Args:
        model: any module.
        layers: name of the list, or its end (`"decoder.layers"`), where a model has several; None: found by the rule.
        front: names of modules or parameters that run before the layers where the rule says otherwise.

    Raises:
        ValueError: no list, several of one rank, or a name that is not in the model, is ambiguous or inside a layer.
    """
    chosen = main_list(model) if layers is None else named_list(model, layers)
    parts = parts_of(model, [chosen])
    places = [i for i, part in enumerate(parts) if part.is_layer]
    own = parts[places[0] : places[-1] + 1]
    declared = []
    if front:
        names = Names(model)
        for given in front:
            name = names.resolve("front", given)
            if any(inside(name, member) or inside(member, name) for part in own for member in part.members):
                raise ValueError(f"front: expected names outside the layers, got {given!r}")
            declared.append(Part(name, (name,)))
    return Stack(chosen.name, (*parts[: places[0]], *declared), tuple(own), tuple(parts[places[-1] + 1 :]))


def split(model: nn.Module, k: int, *, layers: str | None = None, front: Sequence[str] = ()) -> Split:
    """Cuts a model before layer k: what runs before the layers and the first k of them, and everything else.

    Args:
        model: any module.
        k: in [0, number of layers]. With k = 0 nothing is before the cut, what runs before the layers neither.
        layers, front: as `stack` takes them.

    Raises:
        ValueError: k is out of range, or as `stack`.
    """
    found = stack(model, layers=layers, front=front)
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= len(found.layers):
        raise ValueError(f"k: expected an integer in [0, {len(found.layers)}], got {k!r}")
    parts = (*found.front, *found.layers[:k]) if k else ()
    before = {name for block in Names(model).claim(parts) for name in block.parameters}
    names = [name for name, _ in model.named_parameters()]
    return Split(
        found, k, tuple(name for name in names if name in before), tuple(name for name in names if name not in before)
    )
