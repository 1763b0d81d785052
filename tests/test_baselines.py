"""The eager baselines compute the formulas of their papers and of torch.optim, and know nothing of pyzo."""

import ast
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from pyzo import baselines

SHAPES = [(300, 40), (7,), (), (0, 3)]


def make_parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def directions(parameters: list[torch.nn.Parameter], seed: int) -> list[torch.Tensor]:
    """What torch draws from the global generator in the order of the parameters."""
    torch.manual_seed(seed)
    return [torch.normal(0.0, 1.0, p.shape, dtype=p.dtype) for p in parameters]


def assert_equal(parameters: list[torch.nn.Parameter], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(p.data, e) for p, e in zip(parameters, expected, strict=True))


def test_baselines_import_no_pyzo():
    tree = ast.parse(Path(baselines.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"collections.abc", "statistics", "typing", "numpy", "torch"}


# Sweeps over the tensors ----------------------------------------------------------------------------------------------


def test_perturb_adds_scaled_noise_of_the_seed():
    parameters = make_parameters()
    expected = [p.data + -2.0 * z * 1e-3 for p, z in zip(parameters, directions(parameters, 7), strict=True)]
    baselines.eager_perturb_(parameters, 1e-3, -2.0, 7)
    assert_equal(parameters, expected)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_noise_has_mean_0_and_variance_1(distribution: str):
    parameter = torch.nn.Parameter(torch.zeros(200_000))
    baselines.eager_perturb_([parameter], 1.0, 1.0, 3, distribution)
    n = parameter.numel()
    assert abs(parameter.mean().item()) < 5 / math.sqrt(n)
    if distribution == "normal":
        assert abs(parameter.var().item() - 1.0) < 5 * math.sqrt(2 / n)
    else:
        assert torch.equal(parameter.data.abs(), torch.ones(n))


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_update_moves_along_the_noise_of_perturb(distribution: str):
    perturbed, updated = make_parameters(), make_parameters()
    baselines.eager_perturb_(perturbed, 0.25, 1.0, 11, distribution)
    baselines.eager_update_(updated, lr=0.25, coefficients=[-1.0], seeds=[11], distribution=distribution)
    assert_equal(updated, [p.data for p in perturbed])


def test_sgd_is_mezos_line():
    parameters = make_parameters()
    pairs = list(zip(parameters, directions(parameters, 5), strict=True))
    expected = [p.data - 0.5 * (3.0 * z + 0.1 * p.data) for p, z in pairs]
    baselines.eager_update_(parameters, lr=0.5, coefficients=[3.0], seeds=[5], weight_decay=0.1)
    assert_equal(parameters, expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sign_moves_every_element_by_lr(weight_decay: float):
    parameters = make_parameters()
    pairs = list(zip(parameters, directions(parameters, 5), strict=True))
    expected = [p.data - 0.5 * (torch.sign(-3.0 * z) + weight_decay * p.data) for p, z in pairs]
    baselines.eager_update_(parameters, lr=0.5, coefficients=[-3.0], seeds=[5], rule="sign", weight_decay=weight_decay)
    assert_equal(parameters, expected)


OPTIMIZERS = {
    "momentum": ("momentum", torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3}),
    "nesterov": ("momentum", torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "adam": ("adam", torch.optim.Adam, {"betas": (0.8, 0.9)}),
    "adamw": ("adam", torch.optim.AdamW, {"betas": (0.8, 0.9)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rules_with_state_are_torchs(name: str, weight_decay: float, dtype: torch.dtype):
    """Against torch.optim fed with the materialised gradient, over steps enough for the state to matter."""
    rule, optimizer_class, options = OPTIMIZERS[name]
    ours, theirs = make_parameters(dtype=dtype), make_parameters(dtype=dtype)
    optimizer = optimizer_class(theirs, lr=0.05, weight_decay=weight_decay, foreach=False, **options)
    states: dict[torch.Tensor, dict] = {}
    for step in range(4):
        for p, z in zip(theirs, directions(theirs, step), strict=True):
            p.grad = (step - 1.5) * z
        optimizer.step()
        baselines.eager_update_(
            ours,
            lr=0.05,
            coefficients=[step - 1.5],
            seeds=[step],
            rule=rule,
            states=states,
            weight_decay=weight_decay,
            decoupled=name == "adamw",
            **options,
        )
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.data, q.data)
        kept = {key: value for key, value in states[p].items() if key != "step"}
        assert kept and all(value.dtype == dtype for value in kept.values())
        for key, value in kept.items():
            torch.testing.assert_close(value, optimizer.state[q][key])


@pytest.mark.parametrize("rule", ["sgd", "sign"])
def test_several_directions_add_up_before_the_rule(rule: str):
    parameters, coefficients, seeds = make_parameters(), [3.0, -1.0, 0.5], [5, 6, 7]
    totals = [torch.zeros_like(p) for p in parameters]
    for coefficient, seed in zip(coefficients, seeds, strict=True):
        for total, z in zip(totals, directions(parameters, seed), strict=True):
            total += coefficient * z  # noqa: PLW2901
    moved = totals if rule == "sgd" else [torch.sign(total) for total in totals]
    expected = [p.data - 0.5 * m for p, m in zip(parameters, moved, strict=True)]
    baselines.eager_update_(parameters, lr=0.5, coefficients=coefficients, seeds=seeds, rule=rule)
    assert_equal(parameters, expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_foreach_form_is_the_same_step_but_for_rounding(weight_decay: float):
    eager, foreach = make_parameters(), make_parameters()
    baselines.eager_perturb_(eager, 1e-3, -2.0, 5)
    baselines.foreach_perturb_(foreach, 1e-3, -2.0, 5)
    baselines.eager_update_(eager, lr=0.01, coefficients=[3.0], seeds=[5], weight_decay=weight_decay)
    baselines.foreach_update_(foreach, lr=0.01, coefficient=3.0, seed=5, weight_decay=weight_decay)
    for a, b in zip(eager, foreach, strict=True):
        torch.testing.assert_close(a.data, b.data, rtol=1e-5, atol=1e-6)


# Whole steps ----------------------------------------------------------------------------------------------------------


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


ESTIMATORS = {
    "two-sided": {"q": 3},
    "one-sided": {"q": 3, "one_sided": True},
    "FZOO": {"q": 3, "one_sided": True, "normalize": True, "distribution": "rademacher"},
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_on_a_linear_loss(name: str):
    """The gradient is the mean of <slope, z_k> z_k; FZOO's divides by the standard deviation of the losses, not eps."""
    eps, lr, q = 1e-3, 0.25, 3
    weights = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    slope = torch.linspace(-1, 2, 50, dtype=torch.float64)
    seen = []

    def closure() -> torch.Tensor:
        seen.append(weights.detach().clone())
        return slope @ weights

    baselines.EagerZO([weights], lr, eps=eps, seed=4, **ESTIMATORS[name]).step(closure)
    if name == "two-sided":
        assert len(seen) == 2 * q
        probes = seen[::2]
        for plus, minus in zip(probes, seen[1::2], strict=True):
            torch.testing.assert_close(minus, -plus, rtol=0, atol=1e-15)
    else:
        assert len(seen) == 1 + q and not seen[0].any()
        probes = seen[1:]
    derivatives = [(slope @ probe).item() / eps for probe in probes]
    width = statistics.stdev(eps * d for d in derivatives) / eps if name == "FZOO" else 1.0
    gradient = sum(d / (q * width) * probe / eps for d, probe in zip(derivatives, probes, strict=True))
    torch.testing.assert_close(weights.data, -lr * gradient, rtol=1e-9, atol=1e-12)
    if name == "FZOO":
        torch.testing.assert_close(probes[0].abs(), torch.full_like(slope, eps), rtol=1e-12, atol=0)


def test_normalize_needs_one_sided_probes():
    with pytest.raises(ValueError, match="normalize: expected one_sided=True and q >= 2"):
        baselines.EagerZO(make_parameters(), 0.1, normalize=True)


@pytest.mark.parametrize(("rule", "lr"), [("sgd", 0.05), ("sign", 0.02), ("momentum", 0.005), ("adam", 0.02)])
def test_steps_use_new_directions_and_minimise(rule: str, lr: float):
    parameter = torch.nn.Parameter(torch.ones(10))
    optimizer = baselines.EagerZO([parameter], lr, rule=rule, seed=1)
    losses = [optimizer.step(lambda: parameter.square().mean()).item() for _ in range(300)]
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize(
    ("start", "ahead", "behind", "choice"),
    [
        (1.0, 0.5, 2.0, 1.0),
        (1.0, 0.5, 0.5, 1.0),
        (1.0, 1.0, 1.0, 1.0),
        (1.0, 2.0, 0.5, -1.0),
        (1.0, 0.5, 0.25, -1.0),
        (1.0, 2.0, 2.0, 0.0),
        (1.0, 2.0, 1.0, 0.0),
    ],
)
def test_conservative_ends_on_the_best_of_three(start: float, ahead: float, behind: float, choice: float):
    weights = torch.nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64))
    before, seen = weights.detach().clone(), []
    script = iter([start, 3.0, 2.0, ahead, behind])

    def closure() -> torch.Tensor:
        seen.append(weights.detach().clone())
        return torch.tensor(next(script), dtype=torch.float64)

    baselines.EagerConservative([weights], 0.25, eps=0.5).step(closure)
    assert len(seen) == 5
    gradient = (3.0 - 2.0) / (2 * 0.5) * (seen[1] - before) / 0.5
    for at, multiple in zip([*seen[3:], weights.data], [1.0, -1.0, choice], strict=True):
        torch.testing.assert_close(at, before - multiple * 0.25 * gradient, rtol=0, atol=1e-14)


def test_conservative_takes_no_weight_decay():
    with pytest.raises(ValueError, match="weight_decay: expected 0"):
        baselines.EagerConservative(make_parameters(), 0.1, weight_decay=0.1)


def test_forward_grad_moves_along_z_by_the_directional_derivative():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    model[0].bias.requires_grad_(False)
    inputs, labels = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
    trained = [p for p in model.parameters() if p.requires_grad]
    value = torch.nn.functional.cross_entropy(model(inputs), labels)
    gradients = torch.autograd.grad(value, trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    loss = baselines.EagerForwardGrad(model, 0.5, weight_decay=0.1, seed=3).step(
        (inputs,), lambda outputs: torch.nn.functional.cross_entropy(outputs, labels)
    )
    torch.testing.assert_close(loss, value.detach())
    z = directions(trained, int(np.random.default_rng(3).integers(10**9)))
    derivative = sum((a * b).sum() for a, b in zip(gradients, z, strict=True))
    assert torch.equal(model[0].bias, before.pop("0.bias"))
    for p, old, direction in zip(trained, before.values(), z, strict=True):
        torch.testing.assert_close(p.data, old - 0.5 * (derivative * direction + 0.1 * old), rtol=1e-10, atol=1e-12)


def test_backprop_step_is_one_step_of_the_optimizer():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    for _ in range(2):  # a second one, to see old gradients cleared
        before = parameter.detach().clone()
        loss = baselines.backprop_step(optimizer, lambda: parameter.square().sum())
        assert torch.equal(parameter.detach(), before - 0.5 * 2 * before)
        assert loss.item() == before.square().sum().item()
