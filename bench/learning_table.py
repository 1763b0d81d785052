"""Prints recorded trials as a table, means and standard errors over seeds: python -m bench.learning_table FILE"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.harness import load
from bench.learning_rows import Group, Row, groups
from bench.trial import FINAL, SEARCH

COLUMNS = ("method", "rate", "steps", "forwards", "seeds", "held-out accuracy, %", "held-out loss", "loss less {}'s")
FIELDS = ("data", "train", "length", "batch", "threads")  # of config; groups that share them had the same problem


def table(rows: Sequence[Row], against: str) -> str:
    """Markdown; the last column is the mean of differences paired by seed.

    Args:
        against: a method, whose group with as many forwards or as many steps is what others are compared with.
    """
    found = groups(rows)
    lines = [[*COLUMNS[:-1], COLUMNS[-1].format(against)], ["---"] * len(COLUMNS)]
    for group in found:
        baselines = [other for other in found if other.provider == against and comparable(group, other)]
        less = group.minus(baselines[-1]) if baselines and group not in baselines else None
        lines.append(
            [
                group.provider,
                f"{group.config['lr']:g}",
                str(group.config["steps"]),
                str(group.forwards),
                str(len(group.rows)),
                f"{group.over_seeds('accuracy', times=100):.2f}",
                f"{group.over_seeds('value'):.4f}",
                f"{less:+.4f}" if less else "",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparable(one: Group, other: Group) -> bool:
    """Whether two groups had the same problem and as many forwards or as many steps."""
    same = all(one.config[name] == other.config[name] for name in FIELDS)
    return same and (one.config["steps"] == other.config["steps"] or one.forwards == other.forwards)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table, what all started from, and how long the trials computed."""
    parser = argparse.ArgumentParser(prog="python -m bench.learning_table")
    parser.add_argument("rows", type=Path, help="file of JSON lines")
    parser.add_argument("--against", default="ZO-SGD", help="method that others are compared with (%(default)s)")
    options = parser.parse_args(arguments)
    rows = [row for row in load(options.rows) if row["what"] in (SEARCH, FINAL)]
    print(table(rows, options.against))
    for loss, accuracy in dict.fromkeys((r["before"]["loss"], r["before"]["accuracy"]) for r in rows if "before" in r):
        print(f"\nBefore: held-out accuracy {accuracy:.2%}, held-out loss {loss:.4f}.")
    print(f"{len(rows)} trials, {sum(row['cpu_s'] for row in rows) / 3600:.2f} CPU-hours.")


if __name__ == "__main__":
    main()
