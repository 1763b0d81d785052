"""The main job: fine-tunes a pretrained encoder on real text by forward passes alone; `python bench/demo.py --help`."""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, so that an installed pyzo comes first

import torch
import transformers

from bench import demo_check, demo_data, demo_memory, demo_report, demo_rows
from bench.demo_job import prepare, train_all
from bench.demo_timing import time_steps
from bench.demo_training import FULL, Settings

TIMING_ROUNDS = 8


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns 0 if the model learned (or --quick was given), 1 if not, 2 without data."""
    options = parse(arguments)
    started = time.perf_counter()
    settings = Settings(
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        head_lr=options.head_lr,
        eps=options.eps,
        head_eps=options.head_eps,
        distribution=options.distribution,
        store=options.store,
        backprop_steps=max(1, options.steps // 8),
    )
    try:
        data = load_data(options)
    except (OSError, ImportError, ValueError) as error:  # what the user can mend, said without a traceback
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    problem = prepare(data)
    demo_report.print_problem(problem)

    runs = [train_all(problem, settings, seed) for seed in range(options.seed, options.seed + options.seeds)]
    changes = [demo_check.Change.between(problem.before, run.scores[FULL]) for run in runs]
    demo_report.print_scores(problem, runs, changes)

    batch = problem.train[: settings.batch_size]
    times = time_steps(problem.model, batch, settings, rounds=1 if options.quick else TIMING_ROUNDS)
    demo_report.print_times(times, settings)
    memory = {} if options.quick else demo_memory.peaks(settings)
    demo_report.print_memory(memory)

    accuracies = [run.scores[FULL].accuracy for run in runs]
    reasons = demo_check.shortfalls(changes, accuracies, classes=len(problem.labels), majority=problem.majority)
    demo_report.save_picture(options.output / "loss.png", problem.before, runs[0])
    numbers = {
        "command": vars(options),
        "settings": asdict(settings),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        **demo_report.numbers(problem, runs, changes),
        "step_seconds": {name: asdict(measured) for name, measured in times.items()},
        "peak_bytes": memory,
        "seconds": time.perf_counter() - started,
        "shortfalls": reasons,
    }
    (options.output / "numbers.json").write_text(json.dumps(numbers, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"\n{options.output}/loss.png and numbers.json written; {numbers['seconds']:.0f} s in all.")
    if options.record:
        print(f"rows -> {demo_rows.record(numbers, problem.name)}")
    if options.quick:
        print("--quick: too few steps to learn, not checked.")
        return 0
    for reason in reasons:
        print(f"did not learn: {reason}", file=sys.stderr)
    return 1 if reasons else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; defaults of the training settings are those of `Settings`."""
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--task", choices=("docstrings", "sst2"), default="docstrings", help="what is classified")
    parser.add_argument(
        "--data", type=Path, help="folder with train.tsv and dev.tsv of --task sst2; none: Hugging Face's hub"
    )
    parser.add_argument("--steps", type=int, default=default.steps, help="zeroth-order steps")
    parser.add_argument("--seed", type=int, default=0, help="of the directions and of the order of the texts")
    parser.add_argument("--seeds", type=int, default=1, help="how many runs, with seeds from --seed on")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="texts per step")
    parser.add_argument("--eps", type=float, default=default.eps, help="probe length of the encoder")
    parser.add_argument("--head-eps", type=float, default=default.head_eps, help="probe length of the head")
    parser.add_argument("--lr", type=float, default=default.lr, help="learning rate of the encoder")
    parser.add_argument("--head-lr", type=float, default=default.head_lr, help="learning rate of the head")
    parser.add_argument(
        "--distribution", choices=("normal", "rademacher"), default=default.distribution, help="of directions"
    )
    parser.add_argument(
        "--store", choices=("auto", "inplace", "snapshot"), default=default.store, help="of perturbed weights"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder of the picture and the numbers"
    )
    parser.add_argument("--record", action="store_true", help="add rows to bench/results")
    parser.add_argument("--quick", action="store_true", help="4 steps on little text, no learning check: does it run?")
    options = parser.parse_args(arguments)
    if options.data is not None and options.task != "sst2":
        parser.error("--data: expected --task sst2 with it, got --task docstrings, which needs no data")
    for name in ("steps", "seeds", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    if options.quick and options.record:
        parser.error("--record: expected a full run, got --quick")
    if options.quick:
        options.steps = min(options.steps, 4)
    return options


def load_data(options: argparse.Namespace) -> demo_data.Dataset:
    """The texts of the chosen task; a few with --quick."""
    if options.task == "sst2":
        if options.data is not None:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        return demo_data.sst2_dataset(options.data, train_limit=64 if options.quick else 1600)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.quick:
        return demo_data.docstring_dataset(train_per_class=16, held_out_per_class=8)
    return demo_data.docstring_dataset()


if __name__ == "__main__":
    sys.exit(main())
