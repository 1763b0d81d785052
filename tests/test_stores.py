"""Stores: what "auto" chooses, passes per step, and the drift of the way back in place."""

import pytest
import torch

import pyzo.passes
from pyzo.estimators import TwoSided
from pyzo.optim import ZOSGD


def test_auto_chooses_and_says_why():
    assert ZOSGD(torch.nn.Linear(4, 4)).store.name == "inplace"
    big = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2)).bfloat16()
    assert ZOSGD(big).store.name == "inplace"
    big[0].requires_grad_(False)
    opt = ZOSGD(big)
    assert opt.store.name == "snapshot"
    assert "copy" in opt.store.reason
    assert ZOSGD(big, store="inplace").store.reason == "asked for"


@pytest.mark.parametrize("store", ["inplace", "snapshot"])
@pytest.mark.parametrize("q", [1, 3])
def test_a_step_takes_2q_plus_1_passes(store, q, monkeypatch):
    model = torch.nn.Linear(8, 8)
    opt = ZOSGD(model, store=store, estimator=TwoSided(q))
    passes = []
    run = pyzo.passes.Sweep.run
    monkeypatch.setattr(pyzo.passes.Sweep, "run", lambda self, index, **k: (passes.append(k), run(self, index, **k))[1])
    opt.step(model.weight.sum)
    assert len(passes) == 2 * q + 1


def test_drift_in_place_is_far_below_one_subtraction():
    """bf16, 200 cycles without an update: round(round(w - ez) - ez) on the way down against w - 2ez (MeZO)."""
    generator = torch.Generator().manual_seed(0)
    start = (0.02 * torch.randn(1 << 16, generator=generator)).bfloat16()
    ours, theirs = torch.nn.Parameter(start.clone()), start.clone()
    opt = ZOSGD([("w", ours)], lr=0.0, eps=1e-3, store="inplace")
    for _ in range(200):
        opt.step(lambda: 1.0)
        z = torch.randn(start.shape, generator=generator).bfloat16()
        for scale in (1, -2, 1):
            theirs = theirs + scale * z * 1e-3
    drift = [(w.detach().float() - start.float()).pow(2).mean().sqrt() for w in (ours, theirs)]
    assert drift[0] * 5 < drift[1]


def test_snapshot_survives_changes_between_steps():
    model = torch.nn.Linear(3, 3)
    opt = ZOSGD(model, lr=0.0, store="snapshot")
    opt.step(model.weight.sum)
    with torch.no_grad():
        model.weight.fill_(7.0)
    opt.step(model.weight.sum)
    assert torch.equal(model.weight, torch.full((3, 3), 7.0))
