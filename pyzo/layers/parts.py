"""A model taken apart into layers and what is around them, in the order in which it runs as far as structure tells."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from pyzo.layers.lists import LayerList, has_parameters, inner_lists, inside, join


@dataclass(frozen=True)
class Part:
    """What runs as one: a layer with what is attached to it, or a module or parameter outside the layers.

    Attributes:
        name: of the layer, module or parameter.
        members: names of the modules and parameters that it consists of, in the order in which they run.
        is_layer: whether it is one of the repeated layers.
    """

    name: str
    members: tuple[str, ...]
    is_layer: bool = False


def parts_of(model: nn.Module, lists: Sequence[LayerList]) -> list[Part]:
    """All parts of a model that have parameters, given its lists of layers (none of them inside a layer of another).

    Outside the layers, the outermost modules that contain none of the lists are parts, and each parameter that a module
    around a list owns itself, which runs before that module's children. Children run as they are defined; but behind
    the list are a norm of the layers' width that stands beside the list, unless another norm is defined behind it, and
    a linear map from that width to another one.
    """
    return _Walk(lists).parts("", model)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: its class, or one it derives from, has "Norm" in its name, and it owns only vectors.

    These are torch's norms and those of model libraries.
    """
    return all(p.ndim <= 1 for p in module.parameters(recurse=False)) and any(
        "Norm" in kind.__name__ for kind in type(module).__mro__
    )


class _Walk:
    def __init__(self, lists: Sequence[LayerList]):
        self._lists = {found.name: found for found in lists}

    def parts(self, name: str, module: nn.Module) -> list[Part]:
        """Parts of a module; none where it has no parameters."""
        if name in self._lists:
            return self._list_parts(self._lists[name])
        if not self._holds(name):
            return [Part(name, (name,))] if has_parameters(module) else []
        parts = _own_parts(name, module)
        for child_name, child in self._in_order(name, module):
            parts += self.parts(child_name, child)
        return parts

    def _holds(self, name: str) -> bool:
        return any(inside(found, name) for found in self._lists)

    def _in_order(self, name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """Children of a module around a list, with those put behind the list that run there."""
        children = [(join(name, child_name), child) for child_name, child in module.named_children()]
        if isinstance(module, nn.Sequential):
            return children
        place = max(i for i, (child_name, _) in enumerate(children) if self._holds(child_name))
        (holder, _), behind = children[place], children[place + 1 :]
        last = next(found for found in reversed(self._lists.values()) if inside(found.name, holder))
        width = _width(last.module.get_submodule(last.members[-1]))
        norm_moves = holder in self._lists and not any(is_norm(child) for _, child in behind)
        first, moved = [], []
        for child_name, child in children[:place]:
            is_last_norm = norm_moves and is_norm(child) and any(p.numel() == width for p in child.parameters())
            sides = [getattr(child, side, None) for side in ("in_features", "out_features")]
            is_output = None not in sides and sides[0] == width != sides[1]
            moves = (is_last_norm or is_output) and not self._holds(child_name)
            (moved if moves else first).append((child_name, child))
        return [*first, children[place], *moved, *behind]

    def _list_parts(self, found: LayerList) -> list[Part]:
        """Layers, and what else the list contains: in between, it is attached to the layer before."""
        stages = dict(zip(found.members, inner_lists(found), strict=True))
        parts = _own_parts(found.name, found.module)
        seen = 0
        for child_name, child in found.module.named_children():
            name = join(found.name, child_name)
            if child_name in stages:
                seen += 1
                parts += _layers(name, child, stages[child_name])
                continue
            others = self.parts(name, child)
            if 0 < seen < len(stages) and not self._holds(name):
                parts[-1] = _attached(parts[-1], after=[part.name for part in others])
            else:
                parts += others
        return parts


def _own_parts(name: str, module: nn.Module) -> list[Part]:
    """Parameters that a module around layers owns itself."""
    names = (join(name, own) for own, _ in module.named_parameters(recurse=False))
    return [Part(own, (own,)) for own in names]


def _layers(name: str, module: nn.Module, inner: str | None) -> list[Part]:
    """A member of a list: one layer, or a stage with a list called `inner`, its other children attached to the first or
    the last layer of the stage."""
    if inner is None:
        return [Part(name, (name,), is_layer=True)]
    inner = join(name, inner)
    children = [(join(name, child_name), child) for child_name, child in module.named_children()]
    if inner == name:
        return [Part(child_name, (child_name,), is_layer=True) for child_name, _ in children]
    names = [child_name for child_name, _ in children]
    place = names.index(inner)
    others = [has_parameters(child) for _, child in children]
    before = [part.name for part in _own_parts(name, module)]
    before += [n for n, other in zip(names[:place], others[:place], strict=True) if other]
    after = [n for n, other in zip(names[place + 1 :], others[place + 1 :], strict=True) if other]
    layers = [join(inner, child_name) for child_name, _ in children[place][1].named_children()]
    parts = [Part(layer, (layer,), is_layer=True) for layer in layers]
    parts[0] = _attached(parts[0], before=before)
    parts[-1] = _attached(parts[-1], after=after)
    return parts


def _attached(part: Part, *, before: Sequence[str] = (), after: Sequence[str] = ()) -> Part:
    return replace(part, members=(*before, *part.members, *after))


def _width(module: nn.Module) -> int | None:
    """The size that most vectors and sides of matrices have, that of the hidden state; None without any."""
    sizes = Counter(size for p in module.parameters() if p.ndim <= 2 for size in p.shape if size > 1)
    return max(sizes, key=sizes.__getitem__) if sizes else None
