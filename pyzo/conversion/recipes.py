"""Recipes: what is done with each kind of module."""

from collections.abc import Mapping

Recipe = str | Mapping[str, str | None]

# By kind of module, what can be asked for. None leaves a kind alone.
CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("shared", "merged"),
    "activation": ("recompute", "output", "paper", "optimal", "derivative"),
    "gate": ("recompute", "paper", "optimal", "derivative"),
    "dropout": ("seeded",),
    "adapter": ("fused", "low"),
    "attention": ("narrow", "recompute"),
}
RECIPES: dict[str, dict[str, str | None]] = {
    "exact": {
        "norm": "shared",
        "activation": "recompute",
        "gate": "recompute",
        "dropout": "seeded",
        "adapter": "fused",
        "attention": "narrow",
    },
    "paper": {
        "norm": "merged",
        "activation": "paper",
        "gate": "paper",
        "dropout": None,
        "adapter": None,
        "attention": None,
    },
}


def read_recipe(recipe: Recipe) -> dict[str, str | None]:
    """The recipe by kind, every kind named.

    Raises:
        TypeError: neither a name nor a mapping.
        ValueError: an unknown name, kind or choice.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"recipe: expected one of {', '.join(map(repr, RECIPES))} or a dict, got {recipe!r}")
        return dict(RECIPES[recipe])
    if not isinstance(recipe, Mapping):
        raise TypeError(f"recipe: expected a name or a dict, got {type(recipe).__name__}")
    for kind, choice in recipe.items():
        if kind not in CHOICES:
            raise ValueError(f"recipe: expected kinds among {', '.join(map(repr, CHOICES))}, got {kind!r}")
        if choice is not None and choice not in CHOICES[kind]:
            expected = ", ".join(map(repr, CHOICES[kind]))
            raise ValueError(f"recipe[{kind!r}]: expected None or one of {expected}, got {choice!r}")
    return {kind: recipe.get(kind) for kind in CHOICES}
