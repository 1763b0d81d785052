"""Stores: what "auto" chooses, where the weights stand at every point of a step, drift, and attempts taken back."""

import pytest
import torch
from bits import assert_same_bits, weights
from torch import Tensor, nn

import pyzo
import pyzo.passes
from pyzo import reference
from pyzo.estimators import OneSided, TwoSided
from pyzo.optim import ZOSGD, ForwardGradSGD, ZOConservativeSGD

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_auto_chooses_and_says_why():
    assert ZOSGD(nn.Linear(4, 4)).store.name == "inplace"
    big = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)).bfloat16()
    assert ZOSGD(big).store.name == "scratch"
    assert "16-bit weights" in ZOSGD(big).store.reason
    copied = ZOSGD(nn.DataParallel(big)).store
    assert copied.name == "inplace"
    assert "DataParallel" in copied.reason
    big[0].requires_grad_(False)
    opt = ZOSGD(big)
    assert opt.store.name == "snapshot"
    assert "copy" in opt.store.reason
    for store in ("inplace", "scratch", "snapshot"):
        assert (ZOSGD(big, store=store).store.name, ZOSGD(big, store=store).store.reason) == (store, "asked for")
    alone = ZOSGD(big.parameters()).store
    assert alone.name == "inplace"
    assert "no module" in alone.reason
    forward = ForwardGradSGD(big)
    assert forward.store.name == "inplace"
    assert "does not move the weights" in forward.store.reason


@pytest.mark.parametrize("store", ["inplace", "snapshot"])
@pytest.mark.parametrize("q", [1, 3])
def test_a_step_takes_2q_plus_1_passes(store, q, monkeypatch):
    model = nn.Linear(8, 8)
    opt = ZOSGD(model, store=store, estimator=TwoSided(q))
    passes = []
    run = pyzo.passes.Sweep.run
    monkeypatch.setattr(pyzo.passes.Sweep, "run", lambda self, index, **k: (passes.append(k), run(self, index, **k))[1])
    opt.step(model.weight.sum)
    assert len(passes) == 2 * q + 1


def moved(w: Tensor, z: Tensor, scale: float) -> Tensor:
    """round(w + scale z), one addition of a pass."""
    return reference.fma(torch.tensor(scale, dtype=torch.float64).float(), z, w.float()).to(w.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", [TwoSided(2), OneSided(2)], ids=["two-sided", "one-sided"])
@pytest.mark.parametrize("store", ["inplace", "snapshot"])
def test_weights_at_every_point(store, estimator, dtype):
    """In place each addition rounds and is taken back by an addition that rounds; from a snapshot each is the first."""
    n, eps, start = 300, 1e-2, weights(300, dtype, seed=1, special=False)
    w, seen = nn.Parameter(start.clone()), []
    opt = ZOSGD([("w", w)], lr=0.0, eps=eps, seed=2, store=store, estimator=estimator)

    def closure() -> float:
        seen.append(w.detach().clone())
        return float(len(seen))

    opt.step(closure)
    z = [pyzo.noise(n, seed=reference.direction_seed(2, 1, k), key=pyzo.tensor_key("w")) for k in range(2)]
    here, want = start, []
    signs = (1.0, -1.0) if estimator == TwoSided(2) else (1.0,)
    for k in range(2):
        for sign in signs:
            want.append(moved(here, z[k], sign * eps))
            here = moved(want[-1], z[k], -sign * eps) if store == "inplace" else start
    want = want if estimator == TwoSided(2) else [start, *want]
    for i, (a, b) in enumerate(zip(seen, want, strict=True)):
        assert_same_bits(a, b, f"point {i}")
    assert_same_bits(w.detach(), here, "after the step")


def test_drift_in_place_is_far_below_one_subtraction():
    """bf16, 200 cycles without an update: round(round(w - ez) - ez) on the way down against w - 2ez (MeZO)."""
    generator = torch.Generator().manual_seed(0)
    start = (0.02 * torch.randn(1 << 16, generator=generator)).bfloat16()
    ours, theirs = nn.Parameter(start.clone()), start.clone()
    opt = ZOSGD([("w", ours)], lr=0.0, eps=1e-3, store="inplace")
    for _ in range(200):
        opt.step(lambda: 1.0)
        z = torch.randn(start.shape, generator=generator).bfloat16()
        for scale in (1, -2, 1):
            theirs = theirs + scale * z * 1e-3
    drift = [(w.detach().float() - start.float()).pow(2).mean().sqrt() for w in (ours, theirs)]
    assert drift[0] * 5 < drift[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("losses", [(1.0, 2.0, 3.0), (1.0, 0.5, 0.7), (1.0, 0.7, 0.5)], ids=["stay", "down", "up"])
def test_in_place_an_attempt_of_16_bit_weights_is_taken_back_exactly(losses, dtype):
    """Between two powers of two: what remains of a step is the way to the probe and back, and the chosen update."""
    start = (1.2 + 0.6 * torch.rand(5000, generator=torch.Generator().manual_seed(3))).to(dtype)
    here, down, up = losses

    def end(lr: float, make: type[ZOSGD] | type[ZOConservativeSGD], scripted: list[float], sign: float = 1.0) -> Tensor:
        w, turns = nn.Parameter(start.clone()), iter(scripted)
        opt = make([("w", w)], lr=lr, eps=2.0**-8, seed=4, store="inplace", distribution="rademacher")
        opt.step(lambda: sign * next(turns))
        return w.detach()

    probes = [2.0**-8, -(2.0**-8)]  # so that g = z, and steps are of +-lr
    got = end(0.1, ZOConservativeSGD, [here, *probes, down, up])
    if losses.index(min(losses)) == 0:
        want = end(0.0, ZOSGD, probes)
    else:
        want = end(0.1, ZOSGD, probes, sign=1.0 if down < up else -1.0)
    assert_same_bits(got, want)


def test_snapshot_survives_changes_between_steps():
    model = nn.Linear(3, 3)
    opt = ZOSGD(model, lr=0.0, store="snapshot")
    opt.step(model.weight.sum)
    with torch.no_grad():
        model.weight.fill_(7.0)
    opt.step(model.weight.sum)
    assert torch.equal(model.weight, torch.full((3, 3), 7.0))


def test_snapshot_makes_its_copy_once():
    model = nn.Linear(64, 64)
    opt = ZOSGD(model, store="snapshot")
    opt.step(model.weight.sum)
    first = [copy.data_ptr() for own in opt.store._copies for copy in own]
    opt.step(model.weight.sum)
    assert first == [copy.data_ptr() for own in opt.store._copies for copy in own]
    assert not any(copy.requires_grad for own in opt.store._copies for copy in own)
