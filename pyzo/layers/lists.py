"""The repeated-module rule: which containers of a model are its lists of layers."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

# Lists that hold this share of the largest one's parameters are of its rank: encoder and decoder, for one.
RIVAL = 0.1
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_NUMBERED = re.compile(r"(.*?)\d+")


@dataclass(frozen=True)
class LayerList:
    """A container of layers.

    Attributes:
        name, module: of the container.
        members: names of the children that are layers or stages of layers, relative to it.
        size: how many numbers their parameters have.
        composite: whether they consist of modules.
    """

    name: str
    module: nn.Module
    members: tuple[str, ...]
    size: int
    composite: bool

    def __str__(self) -> str:
        return f"{self.name!r} ({len(self.members)} layers, {self.size} parameters)"


def layer_lists(model: nn.Module) -> list[LayerList]:
    """All containers of repeated layers that are not inside a layer of another one, in the order of definition.

    A container is a ModuleList, a Sequential or a module whose children have numbered names; at least two of its
    children that have parameters are of one class. Single modules (an MLP) count only outside every ModuleList, whose
    children are layers even where none repeats.
    """
    found = []

    def visit(name: str, module: nn.Module, in_list: bool) -> None:
        members = _members(module)
        if members:
            own = _layer_list(name, module, members)
            if own.composite or not in_list:
                found.append(own)
        in_list = in_list or isinstance(module, nn.ModuleList)
        for child_name, child in module.named_children():
            if child_name not in members:
                visit(join(name, child_name), child, in_list)

    visit("", model, in_list=False)
    return found


def main_lists(model: nn.Module) -> list[LayerList]:
    """The list with the most parameters, and those of its rank; layers of modules go before single modules.

    Raises:
        ValueError: the model has no list of layers.
    """
    lists = layer_lists(model)
    if not lists:
        raise ValueError(
            "model: expected a list of layers, that is a ModuleList, a Sequential or a module of numbered children, "
            f"with at least two children of one class, found none in {type(model).__name__}"
        )
    lists = [found for found in lists if found.composite] or lists
    largest = max(found.size for found in lists)
    return [found for found in lists if found.size >= RIVAL * largest]


def main_list(model: nn.Module) -> LayerList:
    """The one list of layers; ValueError where there is none or several are of one rank."""
    lists = main_lists(model)
    if len(lists) > 1:
        found = " and ".join(map(str, lists))
        raise ValueError(f"layers: expected one list of layers, found {found}: name one, layers={lists[-1].name!r}")
    return lists[0]


def named_list(model: nn.Module, given: str) -> LayerList:
    """The list with that name or end of a name; ValueError where it is none. It may have a single layer."""
    modules = dict(model.named_modules())
    name = resolve("layers", given, modules)
    module = modules[name]
    members = _members(module)
    if not members and isinstance(module, _CONTAINERS):  # on the caller's word: one layer, or layers of many classes
        members = tuple(child_name for child_name, child in module.named_children() if has_parameters(child))
    if not members:
        raise ValueError(f"layers: expected the name of a list of layers, got {given!r}, a {type(module).__name__}")
    return _layer_list(name, module, members)


def inner_lists(found: LayerList) -> list[str | None]:
    """Where the members of a list are stages: the name of the list of layers in each, relative to it; else Nones.

    Stages are no repeats of each other, and each has its layers in a container of its own (or is one), all of one class
    that consists of modules. That leaves out the experts inside a layer, and adapters that only some layers have.
    """
    stages = [found.module.get_submodule(member) for member in found.members]
    nothing: list[str | None] = [None] * len(stages)
    if any(_alike(one, other) for one, other in pairwise(stages)):
        return nothing
    lists = [_homogeneous(stage) for stage in stages]
    shared = [kind for kind in lists[0] if all(kind in own for own in lists)]
    return [own[shared[0]] for own in lists] if shared else nothing


def join(*names: str) -> str:
    return ".".join(name for name in names if name)


def inside(name: str, outer: str) -> bool:
    """Whether a module or parameter is, or belongs to, the module called `outer`."""
    return outer in ("", name) or name.startswith(f"{outer}.")


def resolve(argument: str, given: str, names: Iterable[str]) -> str:
    """The one of `names` that was given in full or by its end; ValueError, naming the argument, where there is none."""
    names = list(names)
    if given in names:
        return given
    found = [name for name in names if name.endswith(f".{given}")]
    if len(found) != 1:
        what = f"one of {', '.join(map(repr, found[:8]))}" if found else "a name in the model"
        raise ValueError(f"{argument}: expected {what}, got {given!r}")
    return found[0]


def has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _members(module: nn.Module) -> tuple[str, ...]:
    """Names of the children that repeat; empty where none do."""
    children = {name: child for name, child in module.named_children() if has_parameters(child)}
    groups: dict[object, list[str]] = {}
    for name, child in children.items():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            groups.setdefault(_kind(child), []).append(name)
        elif (match := _NUMBERED.fullmatch(name)) and _is_composite(child):
            groups.setdefault((match[1], _kind(child)), []).append(name)
    repeated = [names for names in groups.values() if len(names) > 1]
    if not repeated:
        return ()
    if isinstance(module, nn.ModuleList):  # whose children play one role, even where their classes take turns
        return tuple(children)
    return tuple(max(repeated, key=lambda names: _size(children[name] for name in names)))


def _layer_list(name: str, module: nn.Module, members: Sequence[str]) -> LayerList:
    layers = [module.get_submodule(member) for member in members]
    return LayerList(name, module, tuple(members), _size(layers), any(map(_is_composite, layers)))


def _size(modules: Iterable[nn.Module]) -> int:
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def _is_composite(module: nn.Module) -> bool:
    return any(map(has_parameters, module.children()))


def _kind(module: nn.Module) -> object:
    """What repeats: the class; of containers together with what they contain."""
    if isinstance(module, _CONTAINERS):
        return type(module), frozenset(_kind(child) for child in module.children() if has_parameters(child))
    return type(module)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether at least half of their numbers are in parameters of equal shapes."""
    ours, theirs = (Counter(p.shape for p in module.parameters()) for module in (one, other))
    common, largest = _numbers(ours & theirs), max(_numbers(ours), _numbers(theirs))
    return 2 * common >= largest


def _numbers(shapes: Counter) -> int:
    return sum(count * shape.numel() for shape, count in shapes.items())


def _homogeneous(stage: nn.Module) -> dict[object, str]:
    """Containers of a stage ("": itself) whose children are all of one class that consists of modules, by class."""
    found: dict[object, str] = {}
    for name, module in (("", stage), *stage.named_children()):
        children = list(module.children())
        kinds = {_kind(child) for child in children}
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
        if is_list and len(kinds) == 1 and all(map(_is_composite, children)):
            found.setdefault(kinds.pop(), name)
    return found
