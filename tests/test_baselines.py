"""The eager baselines compute MeZO's formulas, and know nothing of pyzo."""

import ast
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: pyzo is the installed one

from bench import baselines

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(300, 40), (7,), (), (0, 3)]


def make_parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def directions(parameters: list[torch.nn.Parameter], seed: int) -> list[torch.Tensor]:
    """What torch draws from the global generator in the order of the parameters."""
    torch.manual_seed(seed)
    return [torch.normal(0.0, 1.0, p.shape) for p in parameters]


def test_baselines_import_no_pyzo():
    tree = ast.parse((ROOT / "bench" / "baselines.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"collections.abc", "typing", "numpy", "torch"}


def test_perturb_adds_scaled_noise_of_the_seed():
    parameters = make_parameters()
    expected = [p.data + -2.0 * z * 1e-3 for p, z in zip(parameters, directions(parameters, 7), strict=True)]
    baselines.eager_perturb_(parameters, 1e-3, -2.0, 7)
    assert all(torch.equal(p.data, e) for p, e in zip(parameters, expected, strict=True))


def test_noise_is_standard_normal():
    parameter = torch.nn.Parameter(torch.zeros(200_000))
    baselines.eager_perturb_([parameter], 1.0, 1.0, 3)
    n = parameter.numel()
    assert abs(parameter.mean().item()) < 5 / math.sqrt(n)
    assert abs(parameter.var().item() - 1.0) < 5 * math.sqrt(2 / n)


def test_update_moves_along_the_noise_of_perturb():
    perturbed, updated = make_parameters(), make_parameters()
    baselines.eager_perturb_(perturbed, 0.25, 1.0, 11)
    baselines.eager_update_(updated, lr=0.25, coefficient=-1.0, seed=11)
    assert all(torch.equal(a.data, b.data) for a, b in zip(perturbed, updated, strict=True))


def test_update_decays_weights():
    parameters = make_parameters()
    expected = [
        p.data - 0.5 * (3.0 * z + 0.1 * p.data) for p, z in zip(parameters, directions(parameters, 5), strict=True)
    ]
    baselines.eager_update_(parameters, lr=0.5, coefficient=3.0, seed=5, weight_decay=0.1)
    assert all(torch.equal(p.data, e) for p, e in zip(parameters, expected, strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_foreach_form_is_the_same_step_but_for_rounding(weight_decay: float):
    eager, foreach = make_parameters(), make_parameters()
    baselines.eager_perturb_(eager, 1e-3, -2.0, 5)
    baselines.foreach_perturb_(foreach, 1e-3, -2.0, 5)
    baselines.eager_update_(eager, lr=0.01, coefficient=3.0, seed=5, weight_decay=weight_decay)
    baselines.foreach_update_(foreach, lr=0.01, coefficient=3.0, seed=5, weight_decay=weight_decay)
    for a, b in zip(eager, foreach, strict=True):
        torch.testing.assert_close(a.data, b.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("foreach", [False, True])
def test_step_follows_the_directional_derivative_of_each_group(foreach: bool):
    """On a linear loss l+ - l- is 2 sum_g eps_g <a_g, z_g> exactly; the coefficient of group g is that over 2 eps_g."""
    first, second = (torch.nn.Parameter(torch.zeros(50, dtype=torch.float64)) for _ in range(2))
    slope = torch.linspace(-1, 1, 50, dtype=torch.float64)
    optimizer = baselines.EagerMeZO(
        [{"params": [first]}, {"params": [second], "lr": 0.5, "eps": 1e-2}], 0.25, eps=1e-3, seed=9, foreach=foreach
    )
    seen = []

    def closure() -> torch.Tensor:
        seen.append((first.detach().clone(), second.detach().clone()))
        return slope @ first - slope @ second

    loss = optimizer.step(closure)
    assert len(seen) == 2
    z_first, z_second = (plus / eps for plus, eps in zip(seen[0], (1e-3, 1e-2), strict=True))
    half_difference = 1e-3 * (slope @ z_first) - 1e-2 * (slope @ z_second)
    torch.testing.assert_close(first.data, -0.25 * half_difference / 1e-3 * z_first, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(second.data, -0.5 * half_difference / 1e-2 * z_second, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(z_first, z_second)
    assert abs(loss.item()) < 1e-12  # the mean of l+ and l-: the loss in between


def test_steps_use_new_directions_and_minimise():
    parameter = torch.nn.Parameter(torch.ones(10))
    optimizer = baselines.EagerMeZO([parameter], 0.05, seed=1)
    losses = [optimizer.step(lambda: parameter.square().mean()).item() for _ in range(300)]
    assert losses[-1] < 0.05 * losses[0]


def test_backprop_step_is_one_step_of_the_optimizer():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    for _ in range(2):  # a second one, to see old gradients cleared
        before = parameter.detach().clone()
        loss = baselines.backprop_step(optimizer, lambda: parameter.square().sum())
        assert torch.equal(parameter.detach(), before - 0.5 * 2 * before)
        assert loss.item() == before.square().sum().item()
