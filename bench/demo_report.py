"""What the demo prints and saves: scores, step times, memory, the picture of the losses, every number for JSON."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.demo_check import Change, Score
from bench.demo_job import Problem, Run
from bench.demo_memory import STEPS as MEMORY_STEPS
from bench.demo_model import MAX_TOKENS
from bench.demo_timing import StepTimes
from bench.demo_training import BACKPROP, FULL, HEAD, Settings


def print_problem(problem: Problem) -> None:
    """What is classified, and what the untrained head scores."""
    size = sum(p.numel() for p in problem.model.parameters())
    print(
        f"task: {problem.name}, {len(problem.labels)} classes ({', '.join(problem.labels)}); "
        f"{len(problem.train)} texts to train on, {len(problem.held_out)} held out, at most {MAX_TOKENS} tokens each\n"
        f"model: pretrained MiniLM and a head that starts at zero, {size:,} parameters, float32, no dropout\n"
        f"held out before training: loss {problem.before.loss:.4f}, accuracy {problem.before.accuracy:.1%} "
        f"(majority class {problem.majority:.1%})"
    )


def print_scores(problem: Problem, runs: Sequence[Run], changes: Sequence[Change]) -> None:
    """Held-out loss and accuracy of each method after training, per seed."""
    print(f"\n{'held out after training':34} {'seed':>4} {'steps':>6} {'seconds':>8} {'loss':>8} {'accuracy':>9}")
    for run in runs:
        for name in (FULL, HEAD, BACKPROP):
            result = run.scores[name]
            print(
                f"{name:34} {run.seed:4} {len(run.losses[name]):6} {run.seconds[name]:8.1f} "
                f"{result.loss:8.4f} {result.accuracy:9.1%}"
            )
    for run, change in zip(runs, changes, strict=True):
        print(
            f"seed {run.seed}: ZO-SGD on all parameters changed the held-out loss by {change.mean:+.4f}, "
            f"standard error {change.error:.4f} (paired over {len(problem.held_out)} texts)"
        )
    print("head only: the encoder stays as it is and ran once over the training text, which its seconds leave out")


def print_times(times: dict[str, StepTimes], settings: Settings) -> None:
    """Median step times, split, and what pyzo's step is faster by."""
    own = times["pyzo"]
    print(
        f"\nmedian of {len(own.steps)} steps, {settings.batch_size} x {MAX_TOKENS} tokens, taking turns; "
        "passes = the step without its two forwards"
    )
    print(f"{'':20} {'step ms':>9} {'forwards':>9} {'passes':>9}   pyzo is faster by")
    for name, measured in times.items():
        row = f"{name:20} {measured.step_s * 1e3:9.1f} {measured.forwards_s * 1e3:9.1f} {measured.passes_s * 1e3:9.1f}"
        if measured is not own:
            row += f"   {measured.step_s / own.step_s:.2f} x (passes {measured.passes_s / own.passes_s:.1f} x)"
        print(row)


def print_memory(peak_bytes: dict[str, int]) -> None:
    """Peaks of fresh processes, and what each way to train adds to inference."""
    if not peak_bytes:
        print("\nmemory: not measured (--quick, or not Linux)")
        return
    print(f"\npeak resident memory of a fresh process, {MEMORY_STEPS} steps; libraries and weights are the same in all")
    for mode, peak in peak_bytes.items():
        row = f"{mode:20} {peak / 2**20:8.1f} MiB"
        if mode != "inference":
            row += f"   {(peak - peak_bytes['inference']) / 2**20:+8.1f} MiB above inference"
        print(row)


def numbers(problem: Problem, runs: Sequence[Run], changes: Sequence[Change]) -> dict[str, object]:
    """Everything about text and training as plain values."""
    return {
        "classes": problem.labels,
        "texts": {"train": len(problem.train), "held_out": len(problem.held_out)},
        "majority": problem.majority,
        "before": _plain(problem.before),
        "runs": [
            {
                "seed": run.seed,
                "held_out": {name: _plain(result) for name, result in run.scores.items()},
                "seconds": run.seconds,
                "loss_change": {"mean": change.mean, "standard_error": change.error},
                "training_losses": run.losses,
            }
            for run, change in zip(runs, changes, strict=True)
        ],
    }


def _plain(result: Score) -> dict[str, float]:
    return {"loss": result.loss, "accuracy": result.accuracy}


def save_picture(path: Path, before: Score, run: Run) -> None:
    """Draws the training losses, smoothed, and as points the held-out loss where each method started and ended."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), constrained_layout=True)
    for name, losses in run.losses.items():
        (line,) = axes.plot(range(1, len(losses) + 1), smoothed(losses), linewidth=1.5, label=name)
        axes.plot(len(losses), run.scores[name].loss, "o", color=line.get_color())
    axes.plot(0, before.loss, "o", color="black")
    axes.set(xlabel="step", ylabel="cross-entropy", title="training loss (lines), held-out loss (points)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def smoothed(losses: Sequence[float], window: int = 40) -> list[float]:
    """Mean of each loss and up to window - 1 before it."""
    return [statistics.fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]
