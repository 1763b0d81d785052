"""ZOSGD against the specification, and as a torch.optim.Optimizer: groups, schedulers, state, resume."""

import copy
import io

import pytest
import torch

import pyzo
from pyzo import reference
from pyzo.estimators import TwoSided
from pyzo.field import tensor_key
from pyzo.optim import ZOSGD

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def small_transformer(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)
    return torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.TransformerEncoder(layer, 1), torch.nn.Linear(16, 3)
    ).to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 5, 8, generator=generator)
    return x.to(dtype), x.mean(dim=(1, 2)).gt(0).long() + x[:, 0, 0].gt(0.5).long()


def loss_of(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(x).mean(1).float(), y)


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    kinds = {4: torch.int32, 2: torch.int16}
    return all(
        torch.equal(x.view(kinds[x.element_size()]), y.view(kinds[y.element_size()])) for x, y in zip(a, b, strict=True)
    )


def reference_step(
    params: dict[str, torch.Tensor], model, closure, control: torch.Tensor, q: int, stochastic: bool
) -> None:
    """One two-sided in-place step written with pyzo.reference only."""
    tensors = list(params.values())
    table = torch.tensor([[tensor_key(name), 0, 0, 0, 0] for name in params])

    nothing = {
        "undo": -1,
        "undo_sign": 0.0,
        "directions": 0,
        "perturb": -1,
        "perturb_sign": 0.0,
        "stochastic": stochastic,
    }

    def run(**arguments) -> None:
        reference.pass_([], tensors, table, control, distribution=0, **nothing | arguments)

    reference.begin_step_(control)
    losses, at = [], None
    for k in range(q):
        for sign in (1.0, -1.0):
            undo = {} if at is None else {"undo": at[0], "undo_sign": -at[1]}
            run(**undo, perturb=k, perturb_sign=sign)
            at = (k, sign)
            with torch.no_grad():
                losses.append(closure().double())
    reference.estimate_two_sided_(control, torch.stack(losses))
    run(undo=at[0], undo_sign=-at[1], directions=q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("q", "rounding", "steps"), [(1, "stochastic", 8), (3, "nearest", 3)])
def test_equals_the_reference_bit_for_bit(dtype, q, rounding, steps):
    x, y = batch(dtype)
    model, twin = small_transformer(dtype), small_transformer(dtype)
    seed, lr, eps, decay = 2**64 - 3, 3e-3, 1e-2, 0.1
    opt = ZOSGD(
        model, lr=lr, eps=eps, weight_decay=decay, estimator=TwoSided(q), store="inplace", rounding=rounding, seed=seed
    )
    control = pyzo.ops.control(q, 1)
    control[0, 4] = seed - 2**64
    control.view(torch.float64)[3, :3] = torch.tensor([lr, eps, decay], dtype=torch.float64)
    for _ in range(steps):
        opt.step(lambda: loss_of(model, x, y))
        reference_step(
            {n: p.data for n, p in twin.named_parameters()},
            twin,
            lambda: loss_of(twin, x, y),
            control,
            q,
            rounding == "stochastic",
        )
    assert same_bits(weights(model), weights(twin))
    assert not same_bits(weights(model), weights(small_transformer(dtype)))


@pytest.mark.parametrize("store", ["inplace", "snapshot"])
def test_learns(store):
    x, y = batch()
    model = small_transformer()
    opt = ZOSGD(model, lr=5e-3, eps=1e-3, store=store, estimator=TwoSided(4))
    first = loss_of(model, x, y).item()
    for _ in range(150):
        opt.step(lambda: loss_of(model, x, y))
    assert loss_of(model, x, y).item() < 0.8 * first


def test_returned_loss_and_last():
    model = torch.nn.Linear(4, 1)
    x = torch.ones(2, 4)
    opt = ZOSGD(model, lr=0.0, eps=1e-2, estimator=TwoSided(2), store="snapshot")
    assert opt.last is None
    seen = []

    def closure():
        seen.append(model(x).pow(2).mean())
        return seen[-1]

    loss = opt.step(closure)
    torch.testing.assert_close(loss, torch.stack(seen).mean())
    last = opt.last
    assert torch.equal(last.losses, torch.stack(seen).double())
    expected = (last.losses[0::2] - last.losses[1::2]) / (2 * 1e-2 * 2)
    assert torch.equal(last.coefficients[0], expected)
    assert last.seeds == [reference.direction_seed(0, 1, k) for k in range(2)]


def test_noise_of_a_step_is_the_field():
    model = torch.nn.Linear(5, 3, bias=False)
    start = model.weight.detach().clone()
    opt = ZOSGD(model, lr=1e-1, eps=1e-3, seed=9, store="snapshot")
    opt.step(model.weight.sum)
    z = pyzo.noise((3, 5), seed=reference.direction_seed(9, 1, 0), key=pyzo.tensor_key("weight"))
    c = opt.last.coefficients[0, 0].float()
    torch.testing.assert_close(model.weight.detach(), start - 0.1 * c * z, rtol=0, atol=1e-6)


def test_order_and_wrapping_do_not_change_the_noise():
    a, b = small_transformer(), small_transformer()
    opt_a = ZOSGD(a, lr=1e-2)
    opt_b = ZOSGD([("module._orig_mod." + n, p) for n, p in reversed(list(b.named_parameters()))], lr=1e-2)
    x, y = batch()
    for _ in range(3):
        opt_a.step(lambda: loss_of(a, x, y))
        opt_b.step(lambda: loss_of(b, x, y))
    assert same_bits(weights(a), weights(b))


def test_groups_schedulers_and_frozen_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[2].requires_grad_(False)
    start = copy.deepcopy(model.state_dict())
    opt = ZOSGD(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": [*model[1].parameters(), *model[2].parameters()]}],
        lr=0.1,
        eps=1e-3,
        store="snapshot",
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


def test_eps_differs_between_groups():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    named = list(model.named_parameters())
    opt = ZOSGD(
        [{"params": named[:1], "eps": 1e-2}, {"params": named[1:], "eps": 1e-1}],
        lr=0.0,
        estimator=TwoSided(1),
        store="snapshot",
    )
    start, seen = weights(model), []

    def closure():
        seen.append(weights(model))
        return model[0].weight.sum()

    opt.step(closure)
    for i, eps in enumerate((1e-2, 1e-1)):
        z = pyzo.noise((2, 2), seed=opt.last.seeds[0], key=pyzo.tensor_key(named[i][0]))
        torch.testing.assert_close(seen[0][i] - start[i], eps * z, rtol=1e-4, atol=1e-6)
    difference = opt.last.losses[0] - opt.last.losses[1]
    torch.testing.assert_close(
        opt.last.coefficients[:, 0], difference / (2 * torch.tensor([1e-2, 1e-1], dtype=torch.float64))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resume_is_exact(dtype):
    x, y = batch(dtype)

    def run(model, opt, steps):
        for _ in range(steps):
            opt.step(lambda: loss_of(model, x, y))

    whole = small_transformer(dtype)
    opt = ZOSGD(whole, lr=1e-2, eps=1e-2, seed=5)
    run(whole, opt, 8)

    first = small_transformer(dtype)
    opt = ZOSGD(first, lr=1e-2, eps=1e-2, seed=5)
    run(first, opt, 3)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = small_transformer(dtype)
    second.load_state_dict(saved["model"])
    opt = ZOSGD(second, lr=0.5, eps=1.0, seed=77)
    opt.load_state_dict(saved["opt"])
    assert opt.state_dict()["pyzo"] == saved["opt"]["pyzo"]
    run(second, opt, 5)
    assert same_bits(weights(whole), weights(second))


def test_state_of_another_run_is_refused():
    opt = ZOSGD(torch.nn.Linear(2, 2))
    other = ZOSGD(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"same trained parameters.*'0.bias'|same trained parameters"):
        opt.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="'pyzo'"):
        opt.load_state_dict(torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1.0).state_dict())
    state = opt.state_dict()
    state["pyzo"]["noise_version"] = 2
    with pytest.raises(ValueError, match="noise version 1, got 2"):
        opt.load_state_dict(state)


def test_paired_forwards_see_the_same_dropout():
    model = small_transformer(dropout=0.5).train()
    x, y = batch()
    opt = ZOSGD(model, lr=0.0, eps=1e-20, estimator=TwoSided(2), store="snapshot")
    torch.manual_seed(3)
    opt.step(lambda: loss_of(model, x, y))
    after_step = torch.get_rng_state()
    assert len(set(opt.last.losses.tolist())) == 1  # eps moves nothing, so only dropout could differ
    torch.manual_seed(3)
    with torch.no_grad():
        loss_of(model, x, y)
    assert torch.equal(after_step, torch.get_rng_state())  # where one forward leaves it


def test_tied_weights_count_once():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    opt = ZOSGD(model)
    assert list(opt.keys()) == ["0.weight"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr: expected a finite number >= 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"eps": 0.0}, ValueError, "eps: expected a finite number > 0, got 0.0"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay"),
        ({"rounding": "up"}, ValueError, "rounding: expected 'stochastic' or 'nearest', got 'up'"),
        ({"distribution": "cauchy"}, ValueError, "distribution: expected one of 'normal', 'rademacher', got 'cauchy'"),
        ({"store": "disk"}, ValueError, "store: expected"),
        ({"seed": -1}, ValueError, r"seed: expected an integer in \[0, 2\^64\), got -1"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed: expected an integer, got float"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ZOSGD(torch.nn.Linear(2, 2), **arguments)


def test_bad_parameters_are_named():
    model = torch.nn.Module()
    model.good = torch.nn.Parameter(torch.zeros(4))
    model.crooked = torch.nn.Parameter(torch.zeros(4, 3).t())
    with pytest.raises(ValueError, match=r"contiguous.*crooked"):
        ZOSGD(model)
    base = torch.zeros(8)
    with pytest.raises(ValueError, match=r"overlaps.*left.*right"):
        ZOSGD([("left", base[:5].requires_grad_()), ("right", base[4:].requires_grad_())])
    with pytest.raises(ValueError, match=r"expected a contiguous float32.*wide"):
        ZOSGD([("wide", torch.zeros(2, dtype=torch.float64, requires_grad=True))])
    with pytest.raises(ValueError, match="at least one parameter"):
        ZOSGD([torch.zeros(2)])
    with pytest.raises(ValueError, match="without any"):
        ZOSGD(torch.nn.ReLU())
    with pytest.raises(TypeError, match="got a tensor"):
        ZOSGD(torch.zeros(2))


def test_parameters_that_became_unusable_are_named_before_anything_is_written():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 4))
    opt = ZOSGD(model)
    model[1].weight.data = torch.zeros(3, 4).t()
    before = weights(model)
    with pytest.raises(ValueError, match=r"1.weight"):
        opt.step(lambda: model(torch.ones(1, 3)).sum())
    assert same_bits(before, weights(model))


@pytest.mark.parametrize("q", [0, -1, 1.5, True, "2"])
def test_bad_q(q):
    with pytest.raises(ValueError, match="q: expected an integer >= 1"):
        TwoSided(q)


def test_unfreezing_and_new_groups_are_seen():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    opt = ZOSGD(model, lr=1e-2)
    closure = lambda: model(torch.ones(1, 2)).sum()  # noqa: E731
    opt.step(closure)
    draws = opt.state_dict()["pyzo"]["run"]["draw"]
    model[0].requires_grad_(True)
    before = weights(model)
    opt.step(closure)
    assert not torch.equal(before[0], model[0].weight)
    extra = torch.nn.Parameter(torch.ones(3))
    opt.add_param_group({"params": [("extra", extra)], "lr": 1.0})
    opt.step(lambda: closure() + extra.sum())
    assert not torch.equal(extra.detach(), torch.ones(3))
    assert opt.state_dict()["pyzo"]["run"]["draw"] == draws + 2
