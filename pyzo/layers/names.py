"""From parts of a model to the names of their parameters, each parameter in one of them."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from pyzo.layers.lists import resolve
from pyzo.layers.parts import Part


@dataclass(frozen=True)
class Block:
    """Parameters that belong together: the name of the block and theirs, as `named_parameters` gives them."""

    name: str
    parameters: tuple[str, ...]


class Names:
    """Modules and parameters of a model under every name that they have."""

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self._first: dict[int, str] = {}
        for name, parameter in self.parameters.items():
            self._first.setdefault(id(parameter), name)

    def resolve(self, argument: str, given: str) -> str:
        return resolve(argument, given, [*self.modules, *self.parameters])

    def shown(self, name: str) -> str:
        """A name for people: the model itself goes by its class."""
        return name or type(self.modules[""]).__name__

    def inside(self, member: str) -> list[str]:
        """All parameters of the module, or the parameter, that is called `member`."""
        if member in self.parameters:
            return [member]
        return [name for name, _ in self.modules[member].named_parameters(prefix=member, remove_duplicate=False)]

    def claim(self, parts: Iterable[Part], *, trained: bool = False) -> list[Block]:
        """The parameters of each part but those of parts before it; with `trained` those that require gradients."""
        taken: set[str] = set()
        found = []
        for part in parts:
            inside = [self._first[id(self.parameters[name])] for member in part.members for name in self.inside(member)]
            own = [name for name in dict.fromkeys(inside) if name not in taken]
            own = [name for name in own if self.parameters[name].requires_grad or not trained]
            taken.update(own)
            found.append(Block(self.shown(part.name), tuple(own)))
        return found
