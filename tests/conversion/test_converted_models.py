"""Converted models in company: copied, saved, adapted, checkpointed, compiled, data-parallel, changed by hand."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import conversion_ranks
import pytest
import torch
from bits import assert_same_bits
from families import batch_of, small
from test_exact import distance, gradients, loss_of
from torch import Tensor, nn

import pyzo
from pyzo.conversion.swap import Swapped
from pyzo.memory import account

ROOT = Path(__file__).parents[2]
# One of each structure: pre-norm, post-norm, gated, Conv1D, torch's own, and windows with a trained bias.
STRUCTURES = ("vit", "bert", "llama", "gpt2", "encoder-gelu", "swin")


def converted(name: str, **options: Any) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """A stock model, a converted copy, and a batch."""
    stock, batch = small(name, **options), batch_of(name)
    model = copy.deepcopy(stock)
    pyzo.convert(model, batch=batch)
    return stock, model, batch


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_same_bits(got[name], want[name], name)


@pytest.mark.parametrize("name", STRUCTURES)
def test_copies_and_pickles_are_converted_and_revert_alone(name, one_thread):
    stock, model, batch = converted(name)
    want = gradients(model, batch, torch.bfloat16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(gradients(other, batch, torch.bfloat16), want)
        pyzo.revert(other)
        assert not any(isinstance(module, Swapped) for module in other.modules())
        assert_same(gradients(other, batch), gradients(stock, batch))
    assert_same(gradients(model, batch, torch.bfloat16), want)


def test_a_part_that_is_copied_out_does_what_its_class_does():
    """As PEFT copies modules that it trains in full."""
    stock, model, _ = converted("vit")
    x = torch.randn(3, 128, requires_grad=True)
    for name in ("vit.layers.0.mlp.activation_fn", "vit.layers.0.mlp.fc2"):
        got, want = copy.deepcopy(model.get_submodule(name)), stock.get_submodule(name)
        assert_same_bits(got(x), want(x))


@pytest.mark.parametrize("name", STRUCTURES)
def test_without_a_batch_the_first_training_forward_verifies(name, one_thread):
    _, model, batch = converted(name)
    lazy = small(name)
    report = pyzo.convert(lazy)
    assert not report.verified and not report.entries and "not verified" in str(report)
    lazy.eval()(**batch)
    with torch.no_grad():
        lazy.train()(**batch)
    assert not report.verified
    torch.manual_seed(3)
    state = torch.get_rng_state()
    got = gradients(lazy, batch)
    assert_same_bits(torch.get_rng_state(), state)
    assert report.verified
    assert_same(got, gradients(model, batch))
    assert type(lazy).__name__ == type(model).__name__ and not isinstance(lazy, Swapped)


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_waiting_model_can_be_copied_and_reverted(name):
    lazy, batch = small(name), batch_of(name)
    pyzo.convert(lazy)
    other = pickle.loads(pickle.dumps(copy.deepcopy(lazy)))
    pyzo.revert(lazy)
    gradients(lazy, batch)
    assert not any(isinstance(module, Swapped) for module in lazy.modules())
    gradients(other, batch)
    assert any(isinstance(module, Swapped) for module in other.modules())


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "gpt2", "swin"])
def test_checkpointed_layers_make_the_same_gradients(name, one_thread):
    _, model, batch = converted(name)
    want = gradients(model, batch, torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kept = account(lambda: loss_of(model, batch, torch.bfloat16), model)
    assert_same(gradients(model, batch, torch.bfloat16), want)
    model.gradient_checkpointing_disable()
    assert kept.nbytes < account(lambda: loss_of(model, batch, torch.bfloat16), model).nbytes


def test_a_checkpointed_model_can_be_converted(one_thread):
    stock, model, batch = converted("llama")
    stock.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    report = pyzo.convert(stock)
    assert_same(gradients(stock, batch), gradients(model, batch))
    assert len(report.converted) == 2 * 3 + 1


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "encoder-gelu", "swin"])
def test_compiled_without_a_break(name, one_thread):
    """Values and gradients near those in eager mode; saved bytes are the partitioner's business."""
    _, model, batch = converted(name)
    want = gradients(model, batch)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(**batch)["loss"].backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert distance(got, want) < 1e-5
    torch.compiler.reset()


def test_saved_models_are_stock_models(tmp_path):
    transformers = pytest.importorskip("transformers")
    stock, model, batch = converted("llama")
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).train()
    assert not any(isinstance(module, Swapped) for module in loaded.modules())
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert_same(gradients(loaded, batch), gradients(stock, batch))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["vit", "bert", "llama", "gpt2", "swin"])
def test_lora(name, order, one_thread):
    """Adapters put on before and after conversion: gradients are those of the stock model with them."""
    peft = pytest.importorskip("peft")
    stock, batch = small(name), batch_of(name)
    model = copy.deepcopy(stock)
    targets = "all-linear"

    def adapt(m: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(m, config)

    stock = adapt(stock)
    if order == "before":
        model = adapt(model)
        report = pyzo.convert(model, batch=batch)
        assert any(entry.kind == "adapter" and not entry.skipped for entry in report.entries)
    else:
        pyzo.convert(model, batch=batch)
        model = adapt(model)
    assert distance(gradients(model, batch), gradients(stock, batch)) < 1e-5
    true = gradients(stock, batch)
    want, got = (gradients(m, batch, torch.bfloat16) for m in (stock, model))
    assert distance(got, true) <= 2 * distance(want, true)
    assert list(model.state_dict()) == list(stock.state_dict())
    saved = [account(lambda m=m: loss_of(m, batch, torch.bfloat16), m).nbytes for m in (stock, model)]
    assert saved[1] < saved[0]
    with torch.no_grad():
        model.merge_and_unload()


def test_adapters_of_another_dtype_are_computed_in_theirs(one_thread):
    """PEFT keeps adapters of 16-bit models in float32; only "low" gives that precision up, and says so."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    stock, batch = peft.get_peft_model(small("llama").bfloat16(), config), batch_of("llama")
    assert next(p for n, p in stock.named_parameters() if "lora_A" in n).dtype == torch.float32
    true, want = gradients(copy.deepcopy(stock).float(), batch), gradients(stock, batch)
    exact, low = copy.deepcopy(stock), copy.deepcopy(stock)
    assert pyzo.convert(exact, batch=batch).exact
    assert not pyzo.convert(low, {"adapter": "low"}, batch).exact
    assert distance(gradients(exact, batch), true) < 1.2 * distance(want, true)
    assert distance(gradients(low, batch), true) < 0.1
    pyzo.convert(exact, {"adapter": "fused"}, batch)
    kept = [account(lambda m=m: loss_of(m, batch), m).nbytes for m in (stock, exact, low)]
    assert kept[2] < kept[1] == kept[0]


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens(kind, one_thread):
    """A prefix comes as a cache, which a second forward pass would find filled: the first one is traced itself."""
    peft = pytest.importorskip("peft")
    batch = {**batch_of("llama"), "attention_mask": torch.ones(2, 64)}
    models = []
    for convert in (False, True):
        model = small("llama")
        torch.manual_seed(1)
        model = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
        if convert:
            report = pyzo.convert(model.get_base_model())
        models.append(model)
    for _ in range(2):  # the second pass is of the converted model
        want, got = (gradients(m, batch) for m in models)
        assert distance(got, want) < 1e-5
    assert report.verified and report.converted


def test_dropout_keeps_a_seed(one_thread):
    """On the CPU a mask has the dtype of what is dropped; there are two in each layer, and one of the embeddings."""
    stock, batch = small("bert", dropout=0.1), batch_of("bert")
    model = copy.deepcopy(stock)
    pyzo.convert(model, {"dropout": "seeded"}, batch)
    assert sum(isinstance(m, nn.Dropout) and isinstance(m, Swapped) for m in model.modules()) == 2 * 2 + 1 + 1
    before, after = (account(lambda m=m: loss_of(m, batch), m).nbytes for m in (stock, model))
    assert before - after >= 5 * (2 * 64 * 32 * 4 - 8)
    torch.manual_seed(0)
    first = gradients(model, batch)
    torch.manual_seed(0)
    assert_same(gradients(model, batch), first)


def test_two_ranks_average_their_gradients(tmp_path):
    paths = [ROOT, ROOT / "tests", ROOT / "tests" / "conversion", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "GLOO_SOCKET_IFNAME": "lo"}
    environment["OMP_NUM_THREADS"] = "1"
    processes = [
        subprocess.Popen(
            [sys.executable, conversion_ranks.__file__, str(rank), "2", str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_same(found[0], found[1])
    alone = [conversion_ranks.gradients_of(rank) for rank in range(2)]
    for name in found[0]:
        torch.testing.assert_close(found[0][name], (alone[0][name] + alone[1][name]) / 2, rtol=1e-4, atol=1e-6)


class Wrapper(nn.Module):
    """A linear with something else beside it, as adapters are put on."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x.mean(-1, keepdim=True)


def test_a_linear_that_is_wrapped_later_gets_the_activation(one_thread):
    stock, model, batch = converted("vit")
    for m in (stock, model):
        m.vit.layers[0].mlp.fc2 = Wrapper(m.vit.layers[0].mlp.fc2)
    assert distance(gradients(model, batch), gradients(stock, batch)) < 1e-5


def test_hooks_see_what_they_saw(one_thread):
    stock, model, batch = converted("vit")
    seen: list[Tensor] = []
    for m in (stock, model):
        m.vit.layers[0].mlp.fc2.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    assert distance(gradients(model, batch), gradients(stock, batch)) < 1e-5
    torch.testing.assert_close(seen[0], seen[1])


class Branching(nn.Module):
    """An MLP that may put something between activation and linear."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.outer, self.scaled = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1), False

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.inner(x))
        return self.outer(2 * y if self.scaled else y)


def test_a_dataflow_that_changes_is_an_error_and_no_wrong_number():
    model = nn.Sequential(Branching())
    x = torch.randn(3, 4)
    assert pyzo.convert(model, batch=x)["0.act"].exact
    model(x).sum().backward()
    model[0].scaled = True
    with pytest.raises(RuntimeError, match="convert the model again"):
        model(x)
    pyzo.convert(model, batch=x)
    model(x).sum().backward()
