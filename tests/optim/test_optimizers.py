"""The optimizers as torch.optim.Optimizers: what a step returns, noise by name, groups, schedulers, bad arguments."""

import copy
from typing import Any

import pytest
import torch
from compare import assert_same, copies
from models import EXACT, METHODS, batch, closure_of, cross_entropy, methods, run_state, transformer
from torch import nn

import pyzo
from pyzo import reference
from pyzo.estimators import OneSided, TwoSided
from pyzo.optim import ZOSGD, ForwardGradSGD, ZOAdam, ZOConservativeSGD, ZOSignSGD

FLAT = {"one-sided", "fzoo", "conservative", "conservative one-sided", "forward"}  # they see l(w) and return it


@methods
def test_returned_loss_and_last(method):
    model = nn.Linear(4, 1)
    x = torch.linspace(-1, 1, 8).view(2, 4)
    opt = METHODS[method](model, **EXACT)
    assert opt.last is None
    seen = []

    def closure() -> torch.Tensor:
        seen.append(model(x).pow(2).mean())
        return seen[-1]

    opt.step(lambda: model(x).pow(2).mean())
    here = model(x).pow(2).mean().detach()
    loss = opt.step(closure)
    assert len(seen) == METHODS[method].calls
    last, q = opt.last, opt.last.coefficients.shape[1]
    assert last.seeds == [reference.direction_seed(0, 2, k) for k in range(q)]
    probes = torch.stack(seen).detach().double()
    if "conservative" in method:
        order = [1, 2, 0] if method == "conservative" else [0, 1]  # l(w) is evaluated first and watched last
        assert torch.equal(last.losses, probes[order])
        assert torch.equal(last.candidates, probes[[0, -2, -1]])
        assert last.choice == [0, 1, -1][last.candidates.argmin()]
    else:
        assert (last.candidates, last.choice) == (None, None)
        assert torch.equal(last.losses[0 :: 2 if method == "forward" else 1], probes)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, here if method in FLAT else probes.mean().float())
    assert not loss.requires_grad


def test_noise_of_a_step_is_the_field():
    model = nn.Linear(5, 3, bias=False)
    start = model.weight.detach().clone()
    opt = ZOSGD(model, lr=1e-1, eps=1e-3, seed=9, **EXACT)
    opt.step(model.weight.sum)
    z = pyzo.noise((3, 5), seed=reference.direction_seed(9, 1, 0), key=pyzo.tensor_key("weight"))
    c = opt.last.coefficients[0, 0].float()
    torch.testing.assert_close(model.weight.detach(), start - 0.1 * c * z, rtol=0, atol=1e-6)


@methods
def test_order_and_wrapping_do_not_change_the_bits(method):
    a, b = transformer(), transformer()
    opt_a = METHODS[method](a.named_parameters())
    opt_b = METHODS[method]([("module._orig_mod." + n, p) for n, p in reversed(list(b.named_parameters()))])
    for _ in range(3):
        opt_a.step(closure_of(a))
        opt_b.step(closure_of(b))
    assert_same(a, b)


def test_another_seed_is_another_run():
    ends = []
    for seed in (0, 1, 2**64 - 1):
        model = transformer()
        ZOSGD(model, lr=1e-2, seed=seed).step(closure_of(model))
        ends.append(model.qkv.weight.detach().clone())
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])


def test_groups_schedulers_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].requires_grad_(False)
    start = copy.deepcopy(model.state_dict())
    opt = ZOSGD(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": [*model[1].parameters(), *model[2].parameters()]}],
        lr=0.1,
        eps=1e-3,
        **EXACT,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.0)
    closure = lambda: model(torch.ones(1, 3)).sum()  # noqa: E731
    opt.step(closure)
    scheduler.step()
    middle = copy.deepcopy(model.state_dict())
    opt.step(closure)
    after = model.state_dict()
    for name in start:
        moved = not torch.equal(start[name], middle[name])
        assert moved == name.startswith("1."), name
        assert torch.equal(middle[name], after[name]), name  # the scheduler set every lr to 0


@pytest.mark.parametrize(("estimator", "unit"), [(TwoSided(), 2.0), (OneSided(), 1.0)])
def test_eps_differs_between_groups_and_steps(estimator, unit):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    named = list(model.named_parameters())
    lengths = [1e-2, 1e-1]
    groups = [{"params": [named[i]], "eps": lengths[i]} for i in range(2)]
    opt = ZOSGD(groups, lr=0.0, estimator=estimator, **EXACT)
    start = copies(model)
    for step in range(3):
        lengths[step % 2] *= 3
        opt.param_groups[step % 2]["eps"] = lengths[step % 2]
        seen = []

        def closure(seen=seen) -> torch.Tensor:
            seen.append(copies(model))
            return model[0].weight.sum()

        opt.step(closure)
        up = seen[estimator.loss_here]
        for i, eps in enumerate(lengths):
            z = pyzo.noise((2, 2), seed=opt.last.seeds[0], key=pyzo.tensor_key(named[i][0]))
            torch.testing.assert_close(up[i] - start[i], eps * z, rtol=1e-4, atol=1e-6)
        losses = opt.last.losses
        difference = losses[1] - losses[0] if estimator.loss_here else losses[0] - losses[1]
        expected = difference / (unit * torch.tensor(lengths, dtype=torch.float64))
        torch.testing.assert_close(opt.last.coefficients[:, 0], expected, rtol=1e-15, atol=0)


@methods
def test_forwards_of_a_step_see_the_same_dropout(method):
    """And after a step torch's generator stands where one forward leaves it."""
    model = transformer(dropout=0.5).train()
    closure = closure_of(model)
    opt = METHODS[method](model, lr=0.0, eps=1e-20, weight_decay=0.0, **EXACT)
    torch.manual_seed(3)
    if method == "fzoo":
        with pytest.warns(UserWarning, match="skipped"):  # eps moves nothing, so all losses are equal
            opt.step(closure)
    else:
        opt.step(closure)
    after_step = torch.get_rng_state()
    losses = opt.last.losses[0::2] if method == "forward" else opt.last.losses
    torch.manual_seed(3)
    with torch.no_grad():
        one = closure().double().item()
    assert set(losses.tolist()) == {one}
    assert torch.equal(after_step, torch.get_rng_state())


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    opt = ZOSGD(model)
    assert list(opt.keys()) == ["0.weight"]


@pytest.mark.parametrize(
    ("optimizer", "arguments", "error", "message"),
    [
        (ZOSGD, {"lr": -1.0}, ValueError, "lr: expected a finite number >= 0, got -1.0 in parameter group 0"),
        (ZOSGD, {"lr": float("nan")}, ValueError, "lr"),
        (ZOSGD, {"eps": 0.0}, ValueError, "eps: expected a finite number > 0, got 0.0"),
        (ZOSGD, {"weight_decay": float("inf")}, ValueError, "weight_decay"),
        (ZOSGD, {"rounding": "up"}, ValueError, "rounding: expected 'stochastic' or 'nearest', got 'up'"),
        (ZOSGD, {"distribution": "cauchy"}, ValueError, "distribution: expected one of 'normal', 'rademacher'"),
        (ZOSGD, {"store": "disk"}, ValueError, "store: expected"),
        (ZOSGD, {"seed": -1}, ValueError, r"seed: expected an integer in \[0, 2\^64\), got -1"),
        (ZOSGD, {"seed": 2**64}, ValueError, "seed"),
        (ZOSGD, {"seed": 0.5}, TypeError, "seed: expected an integer, got float"),
        (ZOSGD, {"momentum": 1.0}, ValueError, "momentum: expected a finite number >= 0 and < 1, got 1.0"),
        (ZOSGD, {"momentum": -0.1}, ValueError, "momentum"),
        (ZOSGD, {"momentum": 0.9, "dampening": 1.0}, ValueError, "dampening"),
        (ZOSGD, {"nesterov": True}, ValueError, "nesterov: expected momentum > 0 and dampening = 0"),
        (ZOSGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "nesterov"),
        (ZOSGD, {"state_dtype": torch.float16}, ValueError, "state_dtype: expected torch.float32 or torch.bfloat16"),
        (ZOSGD, {"estimator": "two-sided"}, TypeError, "estimator: expected one of pyzo.estimators, got str"),
        (ZOSGD, {"mask": 0.5}, TypeError, r"mask: expected None or one of pyzo.masks, got float"),
        (ZOSignSGD, {"form": "vector"}, ValueError, "form: expected 'elementwise' or 'scalar', got 'vector'"),
        (ZOAdam, {"betas": (0.9,)}, ValueError, "betas: expected two numbers"),
        (ZOAdam, {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]: expected a finite number >= 0 and < 1, got 1.0"),
        (ZOAdam, {"adam_eps": -1e-8}, ValueError, "adam_eps"),
        (ForwardGradSGD, {"q": 0}, ValueError, "q: expected an integer >= 1, got 0"),
        (ZOConservativeSGD, {"momentum": 0.9}, TypeError, "momentum"),
    ],
)
def test_bad_arguments(optimizer, arguments, error, message):
    with pytest.raises(error, match=message):
        optimizer(nn.Linear(2, 2), **arguments)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("lr", float("nan"), ValueError),
        ("eps", -1.0, ValueError),
        ("weight_decay", -1.0, ValueError),
        ("mask", 0.5, TypeError),
        ("momentum", 0.9, ValueError),
        ("nesterov", True, ValueError),
    ],
)
def test_numbers_that_became_bad_are_named_with_their_group_before_anything_is_written(name, value, error):
    model = transformer()
    named = list(model.named_parameters())
    opt = ZOSGD([{"params": named[:3]}, {"params": named[3:]}])
    before = copies(model)
    good, opt.param_groups[1][name] = opt.param_groups[1][name], value
    with pytest.raises(error, match=f"^{name}: .* in parameter group 1"):
        opt.step(closure_of(model))
    opt.param_groups[1][name] = good
    assert_same(model, before)
    assert run_state(opt)["draw"] == 0


def test_bad_parameters_are_named():
    model = nn.Module()
    model.good = nn.Parameter(torch.zeros(4))
    model.crooked = nn.Parameter(torch.zeros(4, 3).t())
    with pytest.raises(ValueError, match=r"contiguous.*crooked"):
        ZOSGD(model)
    base = torch.zeros(8)
    with pytest.raises(ValueError, match=r"overlaps.*left.*right"):
        ZOSGD([("left", base[:5].requires_grad_()), ("right", base[4:].requires_grad_())])
    with pytest.raises(ValueError, match=r"expected contiguous float32.*float64 for 'wide': train a copy"):
        ZOSGD([("wide", torch.zeros(2, dtype=torch.float64, requires_grad=True))])
    with pytest.raises(ValueError, match="at least one parameter"):
        ZOSGD([torch.zeros(2)])
    with pytest.raises(ValueError, match="without any"):
        ZOSGD(nn.ReLU())
    with pytest.raises(TypeError, match="got a tensor"):
        ZOSGD(torch.zeros(2))


def test_parameters_that_became_unusable_are_named_before_anything_is_written():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))
    opt = ZOSGD(model)
    model[1].weight.data = torch.zeros(3, 4).t()
    before = copies(model)
    with pytest.raises(ValueError, match=r"1.weight"):
        opt.step(lambda: model(torch.ones(1, 3)).sum())
    assert_same(model, before)


@pytest.mark.parametrize("q", [0, -1, 1.5, True, "2"])
def test_bad_q(q: Any):
    with pytest.raises(ValueError, match="q: expected an integer >= 1"):
        TwoSided(q)


def test_unfreezing_and_new_groups_are_seen():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    opt = ZOSGD(model, lr=1e-2)
    closure = lambda: model(torch.ones(1, 2)).sum()  # noqa: E731
    opt.step(closure)
    draws = run_state(opt)["draw"]
    model[0].requires_grad_(True)
    before = copies(model)
    opt.step(closure)
    assert not torch.equal(before[0], model[0].weight)
    extra = nn.Parameter(torch.ones(3))
    opt.add_param_group({"params": [("extra", extra)], "lr": 1.0})
    opt.step(lambda: closure() + extra.sum())
    assert not torch.equal(extra.detach(), torch.ones(3))
    assert run_state(opt)["draw"] == draws + 2


def test_the_loss_of_a_batch_in_a_closure_with_arguments_of_its_own():
    model = transformer()
    x, y = batch()
    assert torch.isfinite(ZOSGD(model).step(lambda: cross_entropy(model, x[:4], y[:4])))


def test_an_outer_autocast_sees_the_weights_of_each_point():
    """Autocast keeps its 16-bit casts of fp32 weights, also under no_grad, and does not notice that they were moved."""
    model = torch.nn.Linear(64, 64)
    x = torch.ones(8, 64)
    opt = ZOSGD(model, lr=0.1, eps=0.1, store="inplace")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)  # fills the cache
        opt.step(lambda: model(x).float().square().mean())
        after = model(x)
    plus, minus = opt.last.losses.tolist()
    assert plus != minus
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(after, model(x))  # nor is a cast left behind of weights before the update
