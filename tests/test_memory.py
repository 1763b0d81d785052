"""What autograd keeps, as `pyzo.memory.account` counts it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyzo.memory import account

TOKENS, WIDTH, WIDE = 6, 8, 20


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDE)
        self.act = nn.GELU()
        self.leave = nn.Linear(WIDE, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(self.act(self.enter(x)))


def test_an_mlp_keeps_input_activation_and_its_input():
    model, x = MLP(), torch.randn(TOKENS, WIDTH)
    kept = account(lambda: model(x))
    assert kept.by_module() == {"act": 4 * TOKENS * WIDE, "leave": 4 * TOKENS * WIDE, "enter": 4 * TOKENS * WIDTH}
    assert kept.nbytes == 4 * TOKENS * (2 * WIDE + WIDTH)
    assert kept.units(TOKENS, WIDTH) == 2 * (2 * WIDE + WIDTH) / WIDTH
    kept.result.sum().backward()  # what was counted is what backward uses
    assert all(p.grad is not None for p in model.parameters())


def test_a_frozen_consumer_keeps_nothing_of_its_input():
    model, x = MLP().requires_grad_(False), torch.randn(TOKENS, WIDTH, requires_grad=True)
    assert set(account(lambda: model(x)).by_module()) == {"act"}


def test_a_storage_counts_once_and_names_all_who_saved_it():
    model = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("enter", "q", "k", "v")})
    x = torch.randn(2, 3, WIDTH)

    def run() -> torch.Tensor:
        hidden = model["enter"](x)
        return model["q"](hidden) + model["k"](hidden) + model["v"](hidden)

    kept = account(run, model)
    sizes = [s.nbytes for s in kept.saved]
    assert sizes == [4 * 6 * WIDTH] * 2  # x, and the hidden state that three linears save as views
    assert [s.modules for s in kept.saved] == [("enter",), ("q", "k", "v")]
    assert "shared with k, v" in str(kept)


def test_a_view_keeps_its_whole_storage():
    whole, leaf = torch.randn(TOKENS, 10 * WIDTH), torch.ones((), requires_grad=True)
    assert account(lambda: whole[:2] * leaf).nbytes == whole.nbytes
    assert account(lambda: whole[:2].exp() * leaf).nbytes == 4 * 2 * 10 * WIDTH  # a result of its own


def test_parameters_and_buffers_are_left_out():
    norm = nn.BatchNorm1d(WIDTH).eval()
    x = torch.randn(TOKENS, WIDTH)
    kept = account(lambda: norm(x))
    assert all(s.shape != (WIDTH,) for s in kept.saved)
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))  # of no module
    assert account(lambda: torch.randn(TOKENS, WIDTH, requires_grad=True) @ weight).nbytes == 0


@pytest.mark.parametrize("trained", [False, True])
def test_views_of_parameters_and_leaves_are_left_out(trained):
    weight = nn.Parameter(torch.randn(WIDE, WIDTH), requires_grad=trained)  # of no module
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    assert account(lambda: x @ weight.t()).nbytes == 0
    assert account(lambda: nn.functional.linear(x, weight)).nbytes == 0


def test_a_leaf_that_is_gone_hides_nobody():
    """Whoever gets its memory, and torch's handle on that, counts."""
    x = torch.randn(100, requires_grad=True)

    def run() -> list[torch.Tensor]:
        results = []
        for _ in range(8):
            leaf = torch.randn(100, requires_grad=True)
            leaf.square()
            del leaf
            results.append(x.exp())  # keeps its result
        return results

    assert account(run).nbytes == 8 * x.nbytes


def test_nothing_is_kept_without_a_graph():
    model, x = MLP(), torch.randn(TOKENS, WIDTH)
    with torch.no_grad():
        assert account(lambda: model(x)).nbytes == 0
    assert account(lambda: model(x).sum().item()).nbytes == 0  # the graph is gone when the function returns


def test_a_checkpointed_region_keeps_its_input_only():
    model, x = MLP(), torch.randn(TOKENS, WIDTH, requires_grad=True)
    kept = account(lambda: checkpoint(model, x * 2, use_reentrant=False))
    assert kept.nbytes == 4 * TOKENS * WIDTH
    kept.result.sum().backward()
    assert x.grad is not None


def test_hooks_are_gone_after_an_error():
    model, x = MLP(), torch.randn(TOKENS, WIDTH)
    before = len(torch.nn.modules.module._global_forward_hooks)

    class Stop(Exception):
        pass

    def fail() -> None:
        model(x)
        raise Stop

    with pytest.raises(Stop):
        account(fail)
    assert len(torch.nn.modules.module._global_forward_hooks) == before
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        model(x)
    assert packed


def test_the_table_lists_modules_by_size():
    text = str(account(lambda: MLP()(torch.randn(TOKENS, WIDTH))))
    assert text.splitlines()[0].endswith("in 3 storages")
    assert text.index("leave:") < text.index("enter:")
    assert "float32[6, 20]" in text
