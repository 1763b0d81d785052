"""What became of each module in a conversion: data, and a table to print."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One module that a recipe asks about.

    Attributes:
        name: in the model.
        kind: "norm", "activation", "gate", "dropout", "adapter" or "attention".
        module: name of its class.
        became: what it does now, in words; empty where it was skipped.
        exact: whether its gradients are those of the stock module up to rounding; None where it was skipped.
        reason: why it was skipped, or what limits the saving.
        before, after: bytes that this module keeps for backward (`pyzo.memory.account` charges each storage to the
            first module that saves it), where a batch was given.
    """

    name: str
    kind: str
    module: str
    became: str = ""
    exact: bool | None = None
    reason: str = ""
    before: int | None = None
    after: int | None = None

    @property
    def skipped(self) -> bool:
        return not self.became

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name} ({self.module}): skipped: {self.reason}"
        exact = "exact" if self.exact else "approximate"
        return f"{self.name} ({self.module}): {self.became}, {exact}" + (f" ({self.reason})" if self.reason else "")


@dataclass
class Report:
    """The result of `convert` and `plan`; printed as a table, equal lines of repeated layers together.

    Attributes:
        recipe: by kind of module.
        entries: one for each module that the recipe asks about; none before the model was verified.
        verified: whether a forward pass was traced; without a batch the first training forward does it.
        before, after: bytes that the whole model keeps for backward, where a batch was given.
    """

    recipe: dict[str, str | None]
    entries: list[Entry] = field(default_factory=list)
    verified: bool = False
    before: int | None = None
    after: int | None = None

    @property
    def converted(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.skipped]

    @property
    def skipped(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.skipped]

    @property
    def exact(self) -> bool:
        """Whether no gradient changes beyond rounding."""
        return all(entry.exact for entry in self.converted)

    def __getitem__(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.name == name)

    def __str__(self) -> str:
        asked = ", ".join(f"{kind}: {how}" for kind, how in self.recipe.items() if how is not None)
        if not self.verified:
            return f"not verified yet: the first training forward does it\nrecipe: {asked}"
        lines = [f"{len(self.converted)} modules converted, {len(self.skipped)} skipped; recipe: {asked}"]
        if self.before is not None and self.after is not None:
            share = f" ({1 - self.after / self.before:.1%} less)" if self.before else ""
            lines.append(f"kept for backward: {_mib(self.before)} before, {_mib(self.after)} after{share}")
        groups: dict[tuple[object, ...], list[Entry]] = {}
        for e in self.entries:
            groups.setdefault((_pattern(e.name), e.kind, e.module, e.became, e.exact, e.reason), []).append(e)
        for group in groups.values():
            first = group[0]
            line = (
                str(first)
                if len(group) == 1
                else f"{len(group)} x {str(first).replace(first.name, _pattern(first.name), 1)}"
            )
            if all(e.before is not None for e in group):
                line += f": {_mib(sum(e.before for e in group))} before, {_mib(sum(e.after or 0 for e in group))} after"
            lines.append(line)
        return "\n".join(lines)


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.3f} MiB"
