"""Draws held-out losses over forwards, from recorded rows alone.

Run: python -m bench.plot_learning bench/results/<machine>.jsonl
"""

from collections.abc import Sequence
from pathlib import Path

from bench.drawing import command
from bench.learning_rows import Group, Mean, Row, groups


def curve(group: Group) -> tuple[list[int], list[Mean]]:
    """Forwards and the mean over seeds of the held-out loss at every checkpoint, the start included."""
    points = [(0, Mean.of([row["before"]["loss"] for row in group.rows]))]
    for at_once in zip(*(row["curve"] for row in group.rows), strict=True):
        points.append((at_once[0]["forwards"], Mean.of([point["loss"] for point in at_once])))
    forwards, losses = zip(*points, strict=True)
    return list(forwards), list(losses)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes one panel per case as SVG: a line per method, a standard error to either side.

    Raises:
        ValueError: no clean row of a final trial.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    found = groups([row for row in rows if row["clean"] and not row["dry_run"]])
    if not found:
        raise ValueError("rows: expected clean rows of final trials, got none")
    cases = list(dict.fromkeys(group.rows[0]["case"] for group in found))
    matplotlib.rcParams["svg.hashsalt"] = "pyzo"  # the same rows draw the same file
    figure, panels = pyplot.subplots(
        1, len(cases), figsize=(4.2 * len(cases), 3.4), squeeze=False, layout="constrained"
    )
    for case, axes in zip(cases, panels[0], strict=True):
        for group in found:
            if group.rows[0]["case"] == case:
                forwards, losses = curve(group)
                means, errors = [loss.mean for loss in losses], [loss.error for loss in losses]
                axes.errorbar(
                    forwards, means, errors, label=f"{group.provider}, lr {group.config['lr']:g}", lw=1.2, capsize=2
                )
        axes.set_title(case.removeprefix("learn_"), fontsize=9)
        axes.set_xlabel("forwards", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=6, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    config = found[0].config
    panels[0][0].set_ylabel(f"held-out loss, {config['model']} on {config['data']}, mean of seeds", fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    command("bench.plot_learning", "learning.svg", draw)
