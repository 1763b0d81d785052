"""Hybrid ZO-FO steps: both parts as they would be trained alone, counts, what is kept for backward, compositions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from bits import assert_same_bits
from hybrids import Layer, Net, data, loss_of, net, weights_of
from tiny import IMAGE, bart, bert, llama, lora, opt, swin, vit
from torch import Tensor, nn
from torch.nn import functional

import pyzo
from pyzo.estimators import OneSided, TwoSided
from pyzo.masks import Random
from pyzo.memory import account
from pyzo.optim import ZOSGD, ForwardGradSGD, ZOAdam, ZOConservativeSGD, ZOSignSGD
from pyzo.zo_fo import Hybrid

pytestmark = pytest.mark.usefixtures("one_thread")

# A ZO optimizer, its arguments, and how many forwards a hybrid step makes.
METHODS: dict[str, tuple[type, dict[str, Any], int]] = {
    "sgd": (ZOSGD, {}, 3),
    "sgd q=2": (ZOSGD, {"estimator": TwoSided(2)}, 5),
    "one-sided": (ZOSGD, {"estimator": OneSided(3)}, 4),
    "fzoo": (ZOSGD, {"estimator": OneSided(3, "std"), "distribution": "rademacher"}, 4),
    "momentum": (ZOSGD, {"momentum": 0.9}, 3),
    "sign": (ZOSignSGD, {}, 3),
    "adam": (ZOAdam, {"weight_decay": 0.1}, 3),
    "masked": (ZOSGD, {"mask": Random(0.5)}, 3),
    "conservative": (ZOConservativeSGD, {}, 5),
    "conservative one-sided": (ZOConservativeSGD, {"estimator": OneSided()}, 4),
    "forward": (ForwardGradSGD, {}, 2),
}
methods = pytest.mark.parametrize("method", METHODS)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def run(model: nn.Module, k: int = 2, method: str = "sgd", **changed: Any) -> Hybrid:
    optimizer, arguments, _ = METHODS[method]
    zo = {"lr": 1e-2, "eps": 1e-2, **arguments, **changed}
    if optimizer is ForwardGradSGD:
        zo.pop("eps")
    return pyzo.hybrid(model, k, zo, adamw, optimizer=optimizer)


def zo_names(model: nn.Module, k: int = 2) -> list[str]:
    return list(pyzo.layers.split(model, k).before)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert_same_bits(got[name], tensor, name)


# Each part as it would be trained alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_fo_part_is_trained_as_by_torch(k, dropout):
    """Three steps: each time the twin has the same weights, its ZO part frozen, and the same dropout."""
    model, twin = net(dropout), net(dropout)
    both = run(model, k)
    own = zo_names(model, k)
    for name, p in twin.named_parameters():
        p.requires_grad_(name not in own)
    opt = adamw([(name, p) for name, p in twin.named_parameters() if p.requires_grad])
    for seed in range(3):
        twin.load_state_dict(model.state_dict())
        torch.manual_seed(seed)
        loss = both.step(loss_of(model))
        torch.manual_seed(seed)
        want = loss_of(twin)()
        opt.zero_grad()
        want.backward()
        opt.step()
        assert_same_bits(loss, want.detach())
        got, expected = weights_of(model), weights_of(twin)
        assert_same({n: got[n] for n in got if n not in own}, {n: expected[n] for n in got if n not in own})
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) == (name in own)
            assert q.grad is None or torch.equal(p.grad, q.grad)


@methods
@pytest.mark.parametrize("store", ["inplace", "scratch", "snapshot"])
def test_the_zo_part_is_trained_as_by_its_optimizer_alone(method, store):
    """From the same weights, the FO part's among them: its update comes after the probes."""
    model, twin = net(0.2), net(0.2)
    own = zo_names(model)
    both = run(model, method=method, store=store, seed=3)
    parameters = dict(twin.named_parameters())
    optimizer, arguments, _ = METHODS[method]
    eps = {} if method == "forward" else {"eps": 1e-2}
    decay = arguments.get("weight_decay", 0.0)
    norms = [name for name in own if "norm" in name or "bias" in name]
    groups = [
        {"params": [(n, parameters[n]) for n in own if n not in norms], "weight_decay": decay},
        {"params": [(n, parameters[n]) for n in own if n in norms], "weight_decay": 0.0},
    ]
    exact = "snapshot" if store == "scratch" else store  # which needs a module, and makes the same bits
    alone = optimizer(groups, **{"lr": 1e-2, **eps, **arguments, "store": exact, "seed": 3})
    for seed in range(3):
        twin.load_state_dict(model.state_dict())
        torch.manual_seed(seed)
        both.step(loss_of(model))
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        alone.step(loss_of(twin))
        assert torch.equal(after, torch.get_rng_state())
        got, expected = weights_of(model), weights_of(twin)
        assert_same({n: got[n] for n in own}, {n: expected[n] for n in own})
        assert torch.equal(both.zo.last.losses, alone.last.losses)
    assert both.zo.store.name == store


@pytest.mark.parametrize("k", [0, 4])
def test_one_part_alone(k):
    """k = 0 is backpropagation; where nothing is left behind the last layer, the ZO optimizer steps alone."""
    model = nn.Sequential(*(Layer() for _ in range(4)))
    both = run(model, k)
    assert (both.zo is None, both.fo is None) == (k == 0, k == 4)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return model(torch.ones(2, 8)).square().mean()

    before = weights_of(model)
    loss = both.step(closure)
    assert loss.shape == () and calls == (1 if k == 0 else 2)
    assert all(not torch.equal(before[n], w) for n, w in weights_of(model).items() if "bias" not in n)
    assert both.skipped == 0
    both.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_zo_decays_neither_biases_nor_norms_and_takes_the_store_of_its_part():
    """As an optimizer does that is given the module."""
    model = net().bfloat16()
    assert run(model, 1).zo.store.name == "scratch"
    for name, p in model.named_parameters():
        p.requires_grad_("layers.0.norm" in name or "head" in name)
    both = run(model, 1, weight_decay=0.5, lr=0.5)
    assert both.zo.store.name == "snapshot"
    weight = model.layers[0].norm.weight
    before = weight.detach().clone()
    with pytest.warns(UserWarning, match="float32"):
        both.step(lambda: model(data()[0].bfloat16()).square().mean())
    assert (weight - before).abs().max() < 0.2  # decay alone would take 0.25 away


# Counts -------------------------------------------------------------------------------------------------------------


@methods
def test_forwards_and_backwards(method):
    """1 + 2 q or 1 + q forwards of every layer, one backward of each layer of the FO part, none of the others."""
    model = net()
    both = run(model, method=method)
    forwards, backwards = [0] * 4, [0] * 4

    def count(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            forwards[number] += 1
            if output.requires_grad:
                output.register_hook(lambda _: backwards.__setitem__(number, backwards[number] + 1))

        return hook

    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(count(number))
    calls = METHODS[method][2]
    for step in (1, 2):
        both.step(loss_of(model))
        assert forwards == [step * calls] * 4
        assert backwards == [0, 0, step, step]


# What is kept for the backward pass ---------------------------------------------------------------------------------


def tokens(**more: Any) -> dict[str, Any]:
    ids = torch.randint(2, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, **more}


def images() -> dict[str, Any]:
    pixels = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "OPT": (opt, lambda: tokens(labels=tokens()["input_ids"])),
    "OPT-350m": (
        lambda: opt(word_embed_proj_dim=8, do_layer_norm_before=False),
        lambda: tokens(labels=tokens()["input_ids"]),
    ),
    "LLaMA": (llama, lambda: tokens(labels=tokens()["input_ids"])),
    "BERT": (lambda: bert("BertForSequenceClassification"), lambda: tokens(labels=torch.tensor([0, 1]))),
    "ViT": (vit, images),
    "Swin": (swin, images),
    "LoRA": (lambda: lora(llama(), "q_proj", "down_proj"), lambda: tokens(labels=tokens()["input_ids"])),
}


def kept_by_layer(model: nn.Module, part: pyzo.layers.Part, saved: Any) -> list[Any]:
    return [s for s in saved if any(pyzo.layers.inside(m, member) for m in s.modules for member in part.members)]


@pytest.mark.parametrize("name", MODELS)
def test_no_activation_of_the_zo_part_is_kept(name):
    """Every storage that autograd holds when the loss is there, by the modules that saved it."""
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model, batch = build().train(), inputs()
    full = account(lambda: model(**batch).loss, model)
    found = pyzo.layers.stack(model)
    k = len(found.layers) // 2
    both = run(model, k)
    accounts = []

    def closure() -> Tensor:
        accounts.append(account(lambda: model(**batch).loss, model))
        return accounts[-1].result

    before = weights_of(model)
    loss = both.step(closure)
    assert torch.isfinite(loss) and len(accounts) == 3
    for part in (*found.front, *found.layers[:k]):
        assert kept_by_layer(model, part, full.saved) or part in found.front
        assert not kept_by_layer(model, part, accounts[0].saved)
    for i, part in enumerate(found.layers[k:]):
        own, all_of_it = (sum(s.nbytes for s in kept_by_layer(model, part, a.saved)) for a in (accounts[0], full))
        assert 0 < own <= all_of_it if i == 0 else own == all_of_it  # the first one's input needs no gradient
    assert not accounts[1].saved and not accounts[2].saved
    moved = {n for n, w in weights_of(model).items() if not torch.equal(w, before[n])}
    assert moved & set(both.split.before) and moved & set(both.split.after)
    assert moved <= {n for n, p in model.named_parameters() if p.requires_grad}


# Which weights belong where -----------------------------------------------------------------------------------------


def test_tied_weights_are_trained_by_zo_alone():
    model, batch = opt(tie_word_embeddings=True).eval(), tokens(labels=tokens()["input_ids"])
    both = run(model, 1)
    weight = model.lm_head.weight
    assert weight is model.model.decoder.embed_tokens.weight
    before = weight.detach().clone()
    both.step(lambda: model(**batch).loss)
    assert weight.grad is None and not torch.equal(weight, before)
    assert id(weight) in {id(p) for group in both.zo.param_groups for p in group["params"]}
    assert id(weight) not in {id(p) for group in both.fo.param_groups for p in group["params"]}


def test_frozen_parts_stay():
    model = net()
    frozen = [model.layers[0].up.weight, model.layers[3].up.weight, model.head.bias]
    for p in frozen:
        p.requires_grad_(False)
    before = [p.clone() for p in frozen]
    both = run(model)
    both.step(loss_of(model))
    for p, old in zip(frozen, before, strict=True):
        assert_same_bits(p, old)
        assert p.grad is None and not p.requires_grad
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        *both.state_dict()["parameters"]["zo"],
        *both.state_dict()["parameters"]["fo"],
    }


def test_a_module_that_runs_earlier_than_it_is_defined_is_named():
    """It would be in the FO part; with `front` it is in the ZO part."""

    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.scale(self.enter(x))
            for layer in self.layers:
                h = layer(h)
            return self.head(self.norm(h))

    model = Late()
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"^front: .*'layers\.0', but there do scale: pass front=\['scale'\]"):
        run(model).step(loss_of(model))
    assert_same(weights_of(model), before)
    both = pyzo.hybrid(model, 2, {"lr": 1e-2}, adamw, front=["scale"])
    both.step(loss_of(model))
    assert "scale.weight" in both.split.before and model.scale.weight.grad is None


def test_the_layers_of_a_decoder():
    """With its encoder in front, and the norm that BART defines behind the layers declared to run before them."""
    model = bart().train()
    batch = tokens(labels=tokens()["input_ids"])
    with pytest.raises(ValueError, match="expected one list of layers"):
        pyzo.hybrid(model, 1)
    both = pyzo.hybrid(model, 1, layers="decoder.layers")
    with pytest.raises(RuntimeError, match=r"^front: .* model\.decoder\.layernorm_embedding: pass front"):
        both.step(lambda: model(**batch).loss)
    both = pyzo.hybrid(model, 1, layers="decoder.layers", front=["decoder.layernorm_embedding"])
    both.step(lambda: model(**batch).loss)
    assert all(name.startswith("model.decoder.layers.1.") for name in both.split.after)


def test_inputs_that_require_gradients_are_refused():
    model = llama().train()
    model.enable_input_require_grads()
    both = run(model, 1)
    before = weights_of(model)
    batch = tokens(labels=tokens()["input_ids"])
    with pytest.raises(RuntimeError, match=r"'model\.layers\.0' require no gradients.*disable_input_require_grads"):
        both.step(lambda: model(**batch).loss)
    model.disable_input_require_grads()
    assert_same(weights_of(model), before)
    both.step(lambda: model(**batch).loss)
    model, x = net(), data()[0].requires_grad_()
    with pytest.raises(RuntimeError, match=r"inputs of the ZO layer 'layers\.0'"):
        run(model).step(lambda: model(x).square().mean())
    run(model, 0).step(lambda: model(x).square().mean())  # no ZO part


# Compositions -------------------------------------------------------------------------------------------------------


def test_low_memory_modules_keep_nothing_in_the_zo_part():
    """Shared norms, 2-bit activations and seeded dropout: both parts move, codes exist behind the cut only."""

    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = pyzo.nn.MSLayerNorm(8, affine=True)
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
            self.activation, self.dropout = pyzo.nn.ReGELU2(), pyzo.nn.SeededDropout(0.2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.dropout(self.down(self.activation(self.up(self.norm(x)))))

    model = Net()
    model.layers = nn.ModuleList(Low() for _ in range(4))
    both, before = run(model), weights_of(model)
    saved = []

    def closure() -> Tensor:
        found = account(loss_of(model), model)
        saved.append({name for name in found.by_module() if name.startswith("layers.")})
        return found.result

    torch.manual_seed(5)
    both.step(closure)
    assert {name.split(".")[1] for name in saved[0]} == {"2", "3"} and not saved[1] and not saved[2]
    assert any("activation" in name for name in saved[0])
    assert all(not torch.equal(before[name], w) for name, w in weights_of(model).items() if "weight" in name)


def test_adapters_of_the_first_layers_are_trained_by_zo():
    model = lora(llama(), "q_proj", "v_proj")
    both = run(model, 1)
    batch = tokens(labels=tokens()["input_ids"])
    parameters = both.state_dict()["parameters"]
    assert len(parameters["zo"]) == 4 and len(parameters["fo"]) == 8
    assert all(".layers.0." in name and "lora" in name for name in parameters["zo"])
    assert all("lora" in name for name in parameters["fo"])
    before = weights_of(model)
    both.step(lambda: model(**batch).loss)
    moved = {name for name, w in weights_of(model).items() if not torch.equal(w, before[name])}
    assert moved == {*parameters["zo"], *parameters["fo"]}


@contextmanager
def autocast(on: bool) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=on):
        yield


@pytest.mark.parametrize("k", [0, 2])
def test_autocast_around_the_step_is_as_inside_the_closure(k):
    """Casts of weights that were kept from before an update would show in the second step."""
    inner, outer = net(), net()
    a, b = run(inner, k), run(outer, k)
    for _ in range(3):

        def closure() -> Tensor:
            with autocast(True):
                return loss_of(inner)()

        first = a.step(closure)
    with autocast(True):
        for _ in range(3):
            second = b.step(loss_of(outer))
    assert first.dtype == torch.float32
    assert_same_bits(first, second)
    assert_same(weights_of(inner), weights_of(outer))


def checkpointed(model: Net, *, reentrant: bool) -> Callable[[], Tensor]:
    x, y = data()

    def closure() -> Tensor:
        h = model.enter(x)
        for layer in model.layers:
            h = torch.utils.checkpoint.checkpoint(layer, h, use_reentrant=reentrant)
        return functional.cross_entropy(model.head(model.norm(h)), y)

    return closure


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("store", ["inplace", "scratch"])
def test_checkpointing(store):
    """Without reentrance the same bits; reentrant checkpointing gives the FO layers no gradients, which is said."""
    model, twin = net(0.3), net(0.3)
    torch.manual_seed(2)
    run(model, store=store).step(checkpointed(model, reentrant=False))
    torch.manual_seed(2)
    run(twin, store=store).step(loss_of(twin))
    assert_same(weights_of(model), weights_of(twin))
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run(model, store=store).step(checkpointed(model, reentrant=True))
    assert_same(weights_of(model), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_checkpointing_of_transformers():
    """Version 5 makes inputs require gradients, which is refused by name; without that the bits are the same."""
    batch = tokens(labels=tokens()["input_ids"], use_cache=False)
    torch.manual_seed(0)
    model, twin = llama().train(), llama().train()
    twin.load_state_dict(model.state_dict())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    both = run(model, 1)
    with pytest.raises(RuntimeError, match="disable_input_require_grads"):
        both.step(lambda: model(**batch).loss)
    model.disable_input_require_grads()
    both.step(lambda: model(**batch).loss)
    run(twin, 1).step(lambda: twin(**batch).loss)
    assert_same(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(dtype):
    model = net().to(dtype)
    zo = {"lr": 1e-2, "eps": 1e-2, "store": "snapshot"}
    both = pyzo.hybrid(model, 2, zo, lambda params: torch.optim.SGD(params, lr=0.1))
    before, (x, y) = weights_of(model), data()
    for _ in range(2):
        loss = both.step(lambda: functional.cross_entropy(model(x.to(dtype)).float(), y))
    assert loss.dtype == torch.float32 and both.skipped == 0
    after = weights_of(model)
    assert all(w.dtype == dtype for w in after.values())
    assert all(not torch.equal(after[n], before[n]) for n in after if "norm" not in n)  # torch rounds to nearest


def test_compiled():
    """One graph with gradients behind the cut, one without any."""
    model, twin = net(), net()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    both, other, (x, y) = run(compiled), run(twin), data()
    for _ in range(2):
        loss = both.step(lambda: functional.cross_entropy(compiled(x), y))
        want = other.step(loss_of(twin))
    torch.compiler.reset()
    torch.testing.assert_close(loss, want)
    assert both.split.before == tuple(f"_orig_mod.{name}" for name in other.split.before)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_gradients_can_be_clipped_and_rates_scheduled():
    model = net()
    both = pyzo.hybrid(model, 2, {"lr": 1e-2}, lambda params: torch.optim.SGD(params, lr=1.0))
    norms = []
    own = [p for group in both.fo.param_groups for p in group["params"]]
    both.fo.register_step_pre_hook(lambda *_: norms.append(nn.utils.clip_grad_norm_(own, 1e-3)))
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (both.zo, both.fo)]
    before = weights_of(model)
    both.step(loss_of(model))
    moved = [(w - before[n]).norm() for n, w in weights_of(model).items() if n in both.split.after]
    assert norms[0] > 1e-3 and torch.stack(moved).norm() == pytest.approx(1e-3, rel=1e-3)
    for scheduler in schedulers:
        scheduler.step()
    assert [o.param_groups[0]["lr"] for o in (both.zo, both.fo)] == [5e-3, 0.5]


def test_it_learns():
    """The loss falls in both halves of the work: with the FO part alone moving, and with the ZO part alone."""
    for zo_lr, fo_lr in ((0.05, 0.0), (0.0, 0.01), (0.05, 0.01)):
        model = net()
        both = pyzo.hybrid(
            model,
            2,
            {"lr": zo_lr, "eps": 1e-3, "estimator": TwoSided(4)},
            lambda params, lr=fo_lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
        )
        losses = [both.step(loss_of(model)).item() for _ in range(40)]
        assert losses[-1] < losses[0] - 0.02
