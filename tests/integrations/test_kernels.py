"""The mapping for the package `kernels`: transformers' own activation modules, replaced from the installed package."""

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import activations

import pyzo
from pyzo import memory
from pyzo.integrations.kernel_layers import CHOICES, FUNCTIONS
from pyzo.nn import FewBitActivation, OutputActivation

kernels = pytest.importorskip("kernels")
mapping = pytest.importorskip("pyzo.integrations.kernels").kernel_mapping

pytestmark = pytest.mark.usefixtures("one_thread")

STOCK = {
    "GeLU": activations.GELUActivation,
    "GeluTanh": activations.GELUTanh,
    "NewGELU": activations.NewGELUActivation,
    "FastGELU": activations.FastGELUActivation,
    "QuickGELU": activations.QuickGELUActivation,
    "SiLU": activations.SiLUActivation,
}
PAPER = ("GeLU", "SiLU")


@pytest.fixture(autouse=True)
def extensible(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes are marked as transformers marks them where it accepts the version of `kernels` that there is."""
    for name, stock in STOCK.items():
        if not hasattr(stock, "kernel_layer_name"):
            monkeypatch.setattr(stock, "kernel_layer_name", name, raising=False)
            monkeypatch.setattr(stock, "kernel_condition", staticmethod(lambda module: True), raising=False)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach the hub fails the test."""
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", None)
    monkeypatch.setattr("huggingface_hub.HfApi.snapshot_download", None)


def replaced(model: nn.Module, choice: str, mode: "kernels.Mode" = kernels.Mode.TRAINING) -> nn.Module:
    """The model, kernelized; what cannot be loaded is an error."""
    with kernels.use_kernel_mapping(mapping(choice)):
        return kernels.kernelize(model, mode=mode, device="cpu")


def expected(name: str, choice: str) -> nn.Module:
    function = FUNCTIONS[name]
    return OutputActivation(function) if choice == "output" else FewBitActivation(function, 2, choice)


def gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return out.detach(), x.grad


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("choice", CHOICES)
def test_equals_the_module_bit_for_bit(name, choice):
    """Every layer of transformers, in every dtype, and through a view."""
    stock = replaced(STOCK[name](), choice)
    if choice == "paper" and name not in PAPER:
        assert stock.forward.__func__ is STOCK[name].forward
        return
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for x in (torch.randn(33, 65).to(dtype) * 3, torch.randn(65, 33).to(dtype).T):
            for got, want in zip(gradient(stock, x), gradient(expected(name, choice), x), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("name", STOCK)
def test_inference_computes_the_stock_function(name):
    """`kernels` lets a layer for training stand in: its forward pass is the function, exactly rounded or nearly so."""
    torch.manual_seed(0)
    x = torch.randn(1000)
    want = STOCK[name]()(x)
    for choice in CHOICES:
        with torch.no_grad():
            torch.testing.assert_close(replaced(STOCK[name](), choice, kernels.Mode.INFERENCE)(x), want)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config).train()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config).train()


IDS = torch.arange(64).view(2, 32)


def saved(model: nn.Module) -> int:
    return memory.account(lambda: model(input_ids=IDS, labels=IDS).loss, model).nbytes


def by_hand(model: nn.Module) -> nn.Module:
    """The model with pyzo's modules in the places of its activations."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(type(child), "kernel_layer_name") and type(child).kernel_layer_name in STOCK:
                setattr(parent, name, expected(type(child).kernel_layer_name, "derivative"))
    return model


@pytest.mark.parametrize(("build", "width"), [(llama, 2 * 256), (bert, 2 * 256 + 64)])
def test_models(build, width):
    """A 2-bit code in the place of each float32 input: 1/16 of its bytes. Gradients are those of pyzo's modules."""
    model, other = replaced(build(), "derivative"), by_hand(build())
    inputs = IDS.numel() * width * 4  # of two layers, and of BERT's head
    assert saved(build()) - saved(model) == inputs - inputs // 16
    assert list(model.state_dict()) == list(other.state_dict())
    for m in (model, other):
        m(input_ids=IDS, labels=IDS).loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_under_compile():
    model = nn.Sequential(nn.Linear(16, 16), STOCK["SiLU"](), nn.Linear(16, 16))
    replaced(model, "paper", kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE)
    assert model[1].forward.__func__ is not STOCK["SiLU"].forward
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    for got, want in zip(gradient(torch.compile(model, fullgraph=True), x), gradient(model, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_after_convert():
    """A mapping goes by class, and a converted module is one of transformers' still: what was last, counts."""
    model = bert()
    pyzo.convert(model, {"activation": "paper"})
    replaced(model, "derivative")
    replaced(other := bert(), "derivative")
    for m in (model, other):
        m(input_ids=IDS, labels=IDS).loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("bad", ["exact", "", None, 2])
def test_unknown_choice(bad):
    with pytest.raises(ValueError, match="activation: expected one of 'paper'"):
        mapping(bad)
