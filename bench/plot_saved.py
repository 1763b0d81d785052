"""Draws what models keep for backward, from recorded rows alone.

Run: python -m bench.plot_saved bench/results/<machine>.jsonl
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.drawing import command

Row = dict[str, Any]
COLOURS = {"eager": "#9aa5b1", "pyzo, the paper's recipe": "#7fb2e5"}
PYZO = "#2b6cb0"


def newest(rows: Sequence[Row]) -> list[Row]:
    """The clean rows of saved units of the last recorded commit."""
    mine = [
        row
        for row in rows
        if row["case"] == "activations" and row["what"] == "saved per layer" and row["clean"] and not row["dry_run"]
    ]
    return [row for row in mine if row["commit"] == mine[-1]["commit"]]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes a bar chart of units per layer as SVG.

    Raises:
        ValueError: no clean row of the case `activations`.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    found = newest(rows)
    if not found:
        raise ValueError("rows: expected clean rows of the case activations, got none")
    matplotlib.rcParams["svg.hashsalt"] = "pyzo"  # the same rows draw the same file
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.34 * len(found)), layout="constrained")
    labels = [f"{row['config']['model']}, {row['config']['training']}: {row['provider']}" for row in found]
    values = [row["value"] for row in found]
    drawn = axes.barh(labels, values, color=[COLOURS.get(row["provider"], PYZO) for row in found])
    axes.bar_label(drawn, [f"{value:.1f}" for value in values], fontsize=7, padding=2)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_xlabel("kept per layer, in [tokens, hidden] tensors of 16-bit numbers", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    command("bench.plot_saved", "saved.svg", draw)
