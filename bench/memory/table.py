"""Prints recorded rows of converted models as tables of Markdown: python -m bench.memory.table FILE"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.harness import load
from bench.memory import ways
from bench.memory.rows import Found, Row, found
from bench.memory.settings import FULL

PER_LAYER = ("model", "training", "eager", "exact", "paper", "less by", "target")
WAYS = ("model", "training", "length", "way", "kept", "peak", "speed")


def per_layer(settings: Sequence[Found]) -> str:
    """What one more layer keeps, in units; how much less the better of pyzo's ways keeps; the issue's targets."""
    lines = []
    for one in settings:
        if one.less is None:
            continue
        units = [_number(one.units(way), ".1f") for way in (ways.EAGER, ways.EXACT, ways.PAPER)]
        target = f"{one.less['target']:.0%}{'' if one.less['met'] else ', missed'}" if "target" in one.less else ""
        lines.append([one.config["model"], one.config["training"], *units, f"{one.less['value']:.1%}", target])
    return _markdown(PER_LAYER, lines)


def by_way(settings: Sequence[Found], training: str = FULL) -> str:
    """Kept bytes, peak and speed of every way in units of eager's, of the settings that were timed."""
    lines = []
    for one in settings:
        if not one.steps or one.config["training"] != training:
            continue
        for way in ways.ALL:
            if way == ways.EAGER or way not in {**one.memory, **one.steps}:
                continue
            numbers = [_number(number(way), ".2f") for number in (one.saved, one.peak, one.speed)]
            lines.append([one.config["model"], training, str(one.config["length"]), way, *numbers])
    return _markdown(WAYS, lines)


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else f"{value:{spec}}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def tables(rows: Sequence[Row]) -> str:
    """All tables: per layer, then a table of all ways per training.

    Raises:
        ValueError: no clean row of the case `convert`.
    """
    settings = found(rows)
    if not settings:
        raise ValueError("rows: expected clean rows of the case convert, got none")
    trainings = dict.fromkeys(one.config["training"] for one in settings if one.steps)
    return "\n\n".join([per_layer(settings), *(by_way(settings, training) for training in trainings)])


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables of one file."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory.table")
    parser.add_argument("rows", type=Path, help="file of JSON lines")
    print(tables(load(parser.parse_args(arguments).rows)))


if __name__ == "__main__":
    main()
