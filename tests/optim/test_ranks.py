"""Data-parallel ranks (check 8): equal bits on two gloo processes with data of their own, and as in one process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from compare import assert_same, assert_same_trees, copies, states
from models import METHODS, cross_entropy, transformer

import pyzo

WORLD = 2
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the ranks saved. They meet in a file; gloo talks over the loopback device."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = [ROOT, ROOT / "tests", ROOT / "tests" / "optim", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, ranks.__file__, str(rank), str(WORLD), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("method", ranks.SCENARIOS)
def test_check_8_ranks_stay_bit_identical(found, method):
    first, second = (own["scenarios"][method] for own in found)
    assert_same_trees(first, second)
    assert not torch.equal(first["weights"][0], transformer().enter.weight)


@pytest.mark.parametrize("method", ranks.SCENARIOS)
def test_check_8_ranks_are_one_process_that_averages_their_losses(found, method):
    """The mean is taken in float64: of two losses the same in any order."""
    model = transformer()
    opt = METHODS[method](model, seed=9, store="snapshot")
    parts = [ranks.part(rank, WORLD) for rank in range(WORLD)]
    losses = []
    for _ in range(ranks.STEPS):
        opt.step(lambda: sum(cross_entropy(model, x, y).double() for x, y in parts) / WORLD)
        losses.append(opt.last.losses)
    if method == "forward":
        # The derivatives of the parts are float32, that of the mean is summed before it is rounded: to 2^-24 of each,
        # 20 times over.
        torch.testing.assert_close(found[0]["scenarios"][method]["losses"], torch.stack(losses), rtol=1e-4, atol=1e-5)
        return
    assert torch.equal(found[0]["scenarios"][method]["losses"], torch.stack(losses))
    assert_same(found[0]["scenarios"][method]["weights"], copies(model))
    assert_same(found[0]["scenarios"][method]["states"], copies(states(opt)))


def test_hybrid_ranks_average_gradients_and_losses(found):
    """They are one process on all of the data, but for the order of sums: 20 steps of float32."""
    first, second = (own["hybrid"] for own in found)
    assert_same_trees(first, second)
    model, parts = ranks.stack(), [ranks.part(rank, WORLD) for rank in range(WORLD)]
    both = pyzo.hybrid(model, 1, {"lr": 1e-2}, lambda params: torch.optim.SGD(params, lr=0.1))
    losses = [
        both.step(lambda: sum(cross_entropy(model, x, y).double() for x, y in parts) / WORLD)
        for _ in range(ranks.STEPS)
    ]
    torch.testing.assert_close(first["losses"].double(), torch.stack(losses), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first["weights"], copies(model), rtol=1e-3, atol=1e-3)
    assert not torch.equal(first["weights"][0], ranks.stack()[0][0].weight)


def test_all_ranks_skip_where_one_loss_is_not_finite(found):
    assert_same_trees(found[0]["skip"], found[1]["skip"])
    assert found[0]["skip"]["run"] == {"seed": 9, "draw": 2, "applied": 1, "skipped": 1}


def test_ranks_that_differ_are_refused_on_every_rank(found):
    for rank, own in enumerate(found):
        assert own["seeds"].startswith("process_group: expected the same seed, step and parameters on every rank, got ")
        assert f"got [{rank}, 0, " in own["seeds"]
        assert own["names"].startswith("process_group: expected the same seed, step and parameters on every rank")


def test_without_a_process_group_a_warning_says_what_will_happen(found):
    for own in found:
        assert len(own["alone"]) == 1
        assert "process_group is None: each rank steps by its own losses" in own["alone"][0]
        assert "process_group=torch.distributed.group.WORLD" in own["alone"][0]
