"""Draws the README's picture from recorded rows alone: python -m bench.plot bench/results/<machine>.jsonl"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.drawing import command

Row = dict[str, Any]
DTYPES = ("float32", "bfloat16", "float16")
BARS = (  # legend, provider, what, colour
    ("MeZO's eager line", "eager", "perturb", "#9aa5b1"),
    ("pyzo, normal", "pyzo normal", "perturb", "#2b6cb0"),
    ("pyzo, normal, stochastic update", "pyzo normal", "restore+update stochastic", "#7fb2e5"),
    ("pyzo, Rademacher", "pyzo rademacher", "perturb", "#2f855a"),
    ("pyzo, Rademacher, stochastic update", "pyzo rademacher", "restore+update stochastic", "#8fd3a8"),
    ("add a constant (the memory's limit)", "torch add_", "ceiling", "#e2b04a"),
)


def newest(rows: Sequence[Row], tensors: str) -> dict[tuple[str, str, str], Row]:
    """The last clean row of each (provider, what, dtype) over one list of tensors, all of the last recorded commit."""
    mine = [
        row
        for row in rows
        if row["case"] == "passes" and row["clean"] and not row["dry_run"] and row["config"]["tensors"] == tensors
    ]
    last = [row for row in mine if row["commit"] == mine[-1]["commit"]]
    return {(row["provider"], row["what"], row["config"]["dtype"]): row for row in last}


def draw(rows: Sequence[Row], path: Path, *, tensors: str = "one tensor") -> None:
    """Writes a bar chart of elements per second, with the range from p20 to p80, as SVG.

    Raises:
        ValueError: no clean row of the case `passes` over these tensors.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    found = newest(rows, tensors)
    if not found:
        raise ValueError(f"rows: expected clean rows of the case passes over {tensors!r}, got none")
    matplotlib.rcParams["svg.hashsalt"] = "pyzo"  # the same rows draw the same file
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.8 / len(BARS)
    for k, (label, provider, what, colour) in enumerate(BARS):
        bars = [(i, found[provider, what, dtype]) for i, dtype in enumerate(DTYPES) if (provider, what, dtype) in found]
        rates = [row["elements_per_s"] * 1e-9 for _, row in bars]
        slow = [
            rate - row["config"]["elements"] / row["p80_s"] * 1e-9 for rate, (_, row) in zip(rates, bars, strict=True)
        ]
        fast = [
            row["config"]["elements"] / row["p20_s"] * 1e-9 - rate for rate, (_, row) in zip(rates, bars, strict=True)
        ]
        places = [i + (k - (len(BARS) - 1) / 2) * width for i, _ in bars]
        drawn = axes.bar(places, rates, width, yerr=[slow, fast], label=label, color=colour, error_kw={"lw": 0.8})
        axes.bar_label(drawn, [f"{rate:.2g}" for rate in rates], fontsize=7, padding=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(DTYPES)), DTYPES)
    axes.set_ylabel("10⁹ weights / s")
    axes.spines[["top", "right"]].set_visible(False)
    row = next(iter(found.values()))
    place = row["machine"]
    conditions = f"{place.get('gpu', place['cpu'])}, {place['threads']} threads, torch {row['versions']['torch']}"
    size = f"{row['config']['elements'] / 1e6:.0f} M weights in {row['config']['count']} tensor(s)"
    axes.set_title(f"{size}; {conditions}; commit {row['commit'][:10]}", fontsize=9)
    axes.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.12), frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    command("bench.plot", "throughput.svg", draw)
