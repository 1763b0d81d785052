"""Quantised weights: what lies beside them is trained under every store, they themselves are refused by name."""

import warnings
from collections.abc import Callable

import pytest
import torch
from compare import assert_same
from torch import Tensor, nn

from pyzo.optim import ZOSGD

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
stores = pytest.mark.parametrize("store", ["inplace", "scratch", "snapshot", "auto"])


class Scaled(nn.Module):
    """An int8 weight with a scale for each row, which is trained (as in QZO)."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(64, 64)
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.scale = nn.Parameter(scale.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def bitsandbytes_linear(kind: str) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    # Without biases: the first forward pass replaces one that is no bfloat16.
    if kind == "4 bit":
        return bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    return bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu")


def torchao_linear() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model[0]


BASES: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes, 4 bit": lambda: bitsandbytes_linear("4 bit"),
    "bitsandbytes, 8 bit": lambda: bitsandbytes_linear("8 bit"),
    "torchao, 8 bit": torchao_linear,
    "scales": Scaled,
}


def quantised(model: nn.Module) -> list[Tensor]:
    """The numbers of a base that is not trained."""
    base = model[0].weight
    return [t.clone() for t in ([base.qdata, base.scale] if hasattr(base, "qdata") else [base.detach()])]


@stores
@pytest.mark.parametrize("base", BASES)
def test_what_lies_beside_quantised_weights_is_trained(base, store):
    torch.manual_seed(0)
    model = nn.Sequential(BASES[base](), nn.Linear(64, 64).bfloat16())
    before = quantised(model)
    opt = ZOSGD(model, lr=1e-5, eps=1e-3, store=store)
    trained = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    for _ in range(3):
        opt.step(lambda: model(X).float().square().mean())
    assert opt.skipped == 0
    assert_same(quantised(model), before)
    assert any(
        not torch.equal(a, b) for a, b in zip(trained, (p for p in model.parameters() if p.requires_grad), strict=True)
    )
    assert (opt.store.name == "inplace") == (store == "inplace")


@stores
@pytest.mark.parametrize("kind", ["4 bit", "8 bit"])
def test_lora_over_a_quantised_base(kind, store):
    """The adapters of PEFT alone are trained, the same way under every exact store."""
    peft = pytest.importorskip("peft")
    losses = []
    for each in (store, "snapshot"):
        torch.manual_seed(0)
        model = nn.Sequential(bitsandbytes_linear(kind), nn.Linear(64, 8).bfloat16())
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        ).bfloat16()
        opt = ZOSGD(model, lr=1e-2, eps=1e-2, store=each)
        assert all("lora" in name for name in list(opt.keys()))
        losses.append([opt.step(lambda model=model: model(X).float().square().mean()).item() for _ in range(3)])
        assert opt.skipped == 0
    assert losses[0] == losses[1] or store == "inplace"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_of_8_bits_are_refused_by_name(dtype):
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.randn(4, 4).to(dtype))
    with pytest.raises(ValueError, match=rf"got {dtype} for 'weight'.* train an adapter"):
        ZOSGD(model)
    model.weight.requires_grad_(False)
    assert list(ZOSGD(model).keys()) == ["bias"]


def test_quantised_tensors_that_ask_for_gradients_are_refused_by_name():
    model = nn.Sequential(torchao_linear())
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"got a Int8Tensor for '0.weight': freeze it"):
        ZOSGD(model)


def test_weights_without_values_are_refused_by_name():
    with pytest.raises(ValueError, match=r"got a UninitializedParameter for 'weight': .* or initialise it"):
        ZOSGD(nn.LazyLinear(3))
