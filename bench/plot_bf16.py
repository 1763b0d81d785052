"""Draws how weights in bfloat16 learn beside float32, seed by seed, from recorded rows alone.

Run: python -m bench.plot_bf16 bench/results/<machine>.jsonl
"""

from collections.abc import Sequence
from pathlib import Path

from bench.cases.learn_bf16 import EXACT, INPLACE, half, mezo
from bench.drawing import command
from bench.learning_rows import Group, Row, groups
from bench.learning_table import comparable
from bench.plot_learning import curve

COLOURS = {
    "ZO-SGD": "#9aa5b1",
    half(*EXACT, 0.0).name: "#2b6cb0",
    half(*INPLACE, 0.0).name: "#7fb2e5",
    mezo(0.0).name: "#c05621",
}
LABELS = {"ZO-SGD": "ZO-SGD, fp32"}


def chosen(rows: Sequence[Row]) -> list[Group]:
    """The last group of every method that is comparable with the last one of MeZO in bf16 and had its rate.

    Raises:
        ValueError: no clean row of a final trial of MeZO in bf16.
    """
    found = groups([row for row in rows if row["clean"] and not row["dry_run"]])
    mine = [group for group in found if group.provider == mezo(0.0).name]
    if not mine:
        raise ValueError("rows: expected clean rows of final trials of the case learn_bf16, got none")
    alike = [g for g in found if comparable(g, mine[-1]) and g.config["lr"] == mine[-1].config["lr"]]
    last = {group.provider: group for group in alike}
    return [last[name] for name in COLOURS if name in last]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes two panels as SVG: losses over forwards, mean and standard error; final accuracies, a dot per seed."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    found = chosen(rows)
    matplotlib.rcParams["svg.hashsalt"] = "pyzo"  # the same rows draw the same file
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    for place, group in enumerate(found):
        colour, label = COLOURS[group.provider], LABELS.get(group.provider, group.provider)
        forwards, losses = curve(group)
        means, errors = [loss.mean for loss in losses], [loss.error for loss in losses]
        left.errorbar(forwards, means, errors, color=colour, label=label, lw=1.2, capsize=2)
        final = group.over_seeds("accuracy", times=100)
        right.barh(place, final.mean, xerr=final.error, color=colour, alpha=0.6, capsize=2)
        right.plot([100 * row["accuracy"] for row in group.rows], [place] * len(group.rows), "k.", ms=4)
    start = {100 * row["before"]["accuracy"] for group in found for row in group.rows}
    right.axvline(min(start), color="k", lw=0.8, ls=":")
    right.set_yticks(range(len(found)), [LABELS.get(group.provider, group.provider) for group in found])
    right.invert_yaxis()
    right.set_xlim(left=min(start) - 5)
    config = found[0].config
    left.set_ylabel(f"held-out loss, {config['model']} on {config['data']}", fontsize=8)
    left.set_xlabel("forwards", fontsize=8)
    right.set_xlabel("held-out accuracy at the end, %; dotted: at the start", fontsize=8)
    left.legend(fontsize=6, frameon=False)
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    command("bench.plot_bf16", "bf16.svg", draw)
