"""Blocks of trained parameters: by layer, by the module that owns them, or as the user lists them."""

from collections.abc import Sequence

from torch import nn

from pyzo.layers.lists import layer_lists, main_lists
from pyzo.layers.names import Block, Names
from pyzo.layers.parts import Part, parts_of

__all__ = ["Block", "blocks"]


def blocks(model: nn.Module, by: str | Sequence[object] = "layer") -> list[Block]:
    """Divides the parameters that require gradients into blocks, each parameter into exactly one, tied ones once.

    Args:
        model: any module.
        by: "layer": each layer with what is attached to it, and each outermost module or parameter outside the layers
            (`pyzo.layers.parts`), in the order in which they run; all lists of layers of one rank are taken apart.
            "linear": each module that owns trained parameters itself: linear layers, norms, embeddings.
            A list: one block for each entry, which is a module, the name (or its end) of a module or parameter, or a
            list of these. A tied parameter belongs to the first entry that has it.

    Raises:
        ValueError: no layers are found; an entry is not in the model or trains nothing; a parameter is in no block or
            in two of them; nothing requires gradients.
    """
    names = Names(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model: expected parameters that require gradients, got none")
    if isinstance(by, (list, tuple)):
        parts = _given(names, by)
    elif by == "layer":
        parts = parts_of(model, main_lists(model))
    elif by == "linear":
        parts = _owners(names, parts_of(model, main_lists(model) if layer_lists(model) else []))
    else:
        raise ValueError(f"blocks: expected 'layer', 'linear' or a list, got {by!r}")
    found = [block for block in names.claim(parts, trained=True) if block.parameters]
    claimed = {name for block in found for name in block.parameters}
    orphans = [name for name in trained if name not in claimed]
    if orphans:
        more = f" and {len(orphans) - 8} more" if len(orphans) > 8 else ""
        listed = ", ".join(map(repr, orphans[:8])) + more
        raise ValueError(f"blocks: expected every trained parameter in a block, got none for {listed}")
    return found


def _owners(names: Names, parts: Sequence[Part]) -> list[Part]:
    """The modules inside parts that own parameters themselves."""
    found: dict[str, list[str]] = {}
    for name in (name for part in parts for member in part.members for name in names.inside(member)):
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return [Part(owner, tuple(owned)) for owner, owned in found.items()]


def _given(names: Names, entries: Sequence[object]) -> list[Part]:
    """One part for each entry of the user's list."""
    parts: list[Part] = []
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        members = _members(names, entry, index)
        title = ", ".join(names.shown(member) for member in members)
        owned = [name for member in members for name in names.inside(member)]
        if not any(names.parameters[name].requires_grad for name in owned):
            raise ValueError(f"blocks: expected trained parameters in every entry, got none in {title!r}")
        for name in owned:
            if seen.setdefault(name, index) != index and names.parameters[name].requires_grad:
                other = parts[seen[name]].name
                raise ValueError(f"blocks: expected {name!r} in one block, got it in {other!r} and {title!r}")
        parts.append(Part(title, tuple(members)))
    return parts


def _members(names: Names, entry: object, index: int) -> list[str]:
    """Names of modules and parameters that an entry of the user's list stands for."""
    if isinstance(entry, str):
        return [names.resolve("blocks", entry)]
    if isinstance(entry, nn.Module):
        name = next((name for name, module in names.modules.items() if module is entry), None)
        if name is None:
            raise ValueError(f"blocks: expected modules of the model, got another {type(entry).__name__}")
        return [name]
    if isinstance(entry, (list, tuple)):
        return [member for inner in entry for member in _members(names, inner, index)]
    raise TypeError(
        f"blocks: expected modules, names, or lists of these, got {type(entry).__name__} at position {index}"
    )
