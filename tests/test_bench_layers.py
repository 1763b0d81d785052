"""The jobs of the layer cases compute one and the same; what their numbers are made of; the likeness of gradients."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: pyzo is the installed one

from bench import layer_jobs, layers, plot_saved
from bench.cases import gradients
from bench.harness import Recorder
from bench.layer_jobs import Way


def test_every_way_of_a_job_computes_what_eager_torch_does():
    """And, where nothing is coded, its gradients."""
    torch.manual_seed(0)
    for job in layer_jobs.jobs(layer_jobs.DRY, torch.float32, "cpu"):
        if job.random:
            continue
        expected = job.eager(*job.inputs)
        gradient = torch.randn_like(expected)
        slopes = torch.autograd.grad(expected, job.inputs, gradient)
        ways = {name: Way(call) for name, call in job.others.items()} | dict(job.pyzo)
        for name, way in ways.items():
            what = f"{job.what} {name}: {{}}".format
            got = way.call(*job.inputs)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=what)
            found = torch.autograd.grad(got, job.inputs, gradient)
            assert all(torch.isfinite(slope).all() for slope in found), what("not finite")
            if not way.codes:
                torch.testing.assert_close(found, slopes, rtol=1e-5, atol=1e-6, msg=what)


def test_bytes_that_must_move():
    way = Way(torch.relu, forward=2, backward=3, codes=0.25)
    assert way.moved("forward", 2) == 4.25
    assert way.moved("backward", 2) == 6.25
    assert way.moved(layers.BOTH, 4) == 20.5
    assert Way(torch.relu).moved(layers.BOTH, 4) == 0


def test_rows_of_a_job(tmp_path):
    recorder = Recorder("layers", dry_run=True, out=tmp_path / "rows.jsonl")
    job = next(job for job in layer_jobs.activations(layer_jobs.DRY, torch.float32, "cpu") if job.what == "gelu")
    layers.compare(recorder, job, repeats=1, pages="fresh")
    parts = {(row["what"], row["provider"]): row for row in recorder.rows}
    for provider in ("eager", *(f"pyzo {name}" for name in job.pyzo)):
        for part in (layers.BOTH, "forward", "backward"):
            assert parts[f"gelu {part}", provider]["config"]["pages"] == "fresh"
    both = parts[f"gelu {layers.BOTH}", "pyzo ReGELU2"]
    assert both["ratio"]["to"] == "eager" and both["ratio_compiled"]["to"] == "torch.compile"
    share = parts["gelu copy", "torch copy_"]["median_s"] / both["median_s"] * (4 * 4 + 2 * 0.25) / (2 * 4)
    assert both["copy_share"]["of_medians"] == pytest.approx(share)


def test_a_compiler_that_fails_is_said_in_a_row(tmp_path, monkeypatch):
    def fails(*args: object) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(layers, "compiled", fails)
    recorder = Recorder("layers", dry_run=True, out=tmp_path / "rows.jsonl")
    job = next(layer_jobs.activations(layer_jobs.DRY, torch.float32, "cpu"))
    layers.compare(recorder, job, repeats=1)
    reasons = [row["reason"] for row in recorder.rows if row["provider"] == "torch.compile"]
    assert reasons == ["no compiler"]
    assert any("median_s" in row for row in recorder.rows if row["provider"] == "pyzo exact")


def test_likeness_of_gradients():
    theirs = {"model.layers.0.weight": torch.tensor([1.0, 0.0]), "lm_head.weight": torch.tensor([0.0, 2.0])}
    mine = {"model.layers.0.weight": torch.tensor([1.0, 1.0]), "lm_head.weight": torch.tensor([0.0, 4.0])}
    found = gradients.like(theirs, mine)
    assert found.by_layer == {"layer 0": pytest.approx(2**-0.5), "head": pytest.approx(1.0)}
    assert found.cosine == pytest.approx(9 / (5 * 18) ** 0.5)
    assert found.length == pytest.approx((18 / 5) ** 0.5)
    with pytest.raises(ValueError, match="lm_head"):
        gradients.like(theirs, {"model.layers.0.weight": torch.ones(2)})


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.encoder.layer.11.output.dense.weight", "layer 11"),
        ("model.layers.3.mlp.up_proj.weight", "layer 3"),
        ("encoder.embeddings.word_embeddings.weight", "embeddings"),
        ("model.embed_tokens.weight", "embeddings"),
        ("model.norm.weight", "head"),
    ],
)
def test_layer_of_a_parameter(name, layer):
    assert gradients.layer_of(name) == layer


def test_plot_of_saved_units_draws_clean_rows_only(tmp_path):
    pytest.importorskip("matplotlib")
    recorder = Recorder("activations", dry_run=True, out=tmp_path / "rows.jsonl")
    recorder.add("saved per layer", "eager", {"model": "m", "training": "full"}, value=2.5, unit="units")
    with pytest.raises(ValueError, match="expected clean rows"):
        plot_saved.draw(recorder.rows, tmp_path / "chart.svg")
    plot_saved.draw([{**recorder.rows[0], "dry_run": False, "clean": True}], tmp_path / "chart.svg")
    assert "</svg>" in (tmp_path / "chart.svg").read_text()
