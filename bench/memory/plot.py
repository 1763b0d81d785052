"""Draws memory against speed of every way, in units of eager's, from recorded rows alone.

Run: python -m bench.memory.plot bench/results/<machine>.jsonl
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.drawing import command
from bench.memory import ways
from bench.memory.rows import Found, Row, found
from bench.memory.settings import FULL, LORA

COLOURS = {
    ways.EAGER: "#1a202c",
    ways.EXACT: "#2b6cb0",
    ways.PAPER: "#7fb2e5",
    ways.CHECKPOINTING: "#2f855a",
    ways.COMPILE: "#e2b04a",
    ways.MESA: "#c05640",
    ways.LIGER: "#805ad5",
}
MARKERS = ("o", "s", "^", "D", "v")  # by family


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes one panel per training as SVG: a point per way, family and length; left and up is better.

    Raises:
        ValueError: no clean row of the case `convert` of the families that were measured by all ways.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    settings = [one for one in found(rows) if one.steps and ways.CHECKPOINTING in one.steps]
    if not settings:
        raise ValueError("rows: expected clean rows of steps of the case convert by all ways, got none")
    matplotlib.rcParams["svg.hashsalt"] = "pyzo"  # the same rows draw the same file
    families = list(dict.fromkeys(one.config["model"] for one in settings))
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
    for axes, training in zip(panels, (FULL, LORA), strict=True):
        axes.axhline(1, color="#cbd5e0", lw=0.8, zorder=0)
        axes.axvline(1, color="#cbd5e0", lw=0.8, zorder=0)
        for one in settings:
            if one.config["training"] == training:
                scatter(axes, one, MARKERS[families.index(one.config["model"]) % len(MARKERS)])
        axes.set_title(training, fontsize=9)
        axes.set_xlabel("peak above the model, of eager's", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("steps per second, of eager's", fontsize=8)
    present = [way for way in COLOURS if any(way in one.steps for one in settings)]
    handles = [Line2D([], [], marker="o", ls="", ms=5, color=COLOURS[way], label=way) for way in present]
    handles += [
        Line2D([], [], marker=MARKERS[k % len(MARKERS)], ls="", ms=5, mfc="none", color="#4a5568", label=name)
        for k, name in enumerate(families)
    ]
    figure.legend(handles=handles, fontsize=7, ncols=6, loc="outside lower center", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def scatter(axes: Any, one: Found, marker: str) -> None:
    """The points of one setting."""
    for way, colour in COLOURS.items():
        peak, speed = one.peak(way), one.speed(way)
        if peak is not None and speed is not None:
            axes.plot(peak, speed, marker=marker, ls="", ms=5, color=colour, alpha=0.8)


if __name__ == "__main__":
    command("bench.memory.plot", "convert.svg", draw)
