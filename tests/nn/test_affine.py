"""gamma and beta folded into linears: the function stays, the way back is bounded, a refusal changes nothing."""

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pyzo.nn import affine_checks
from pyzo.nn.affine import merge_affine_, unmerge_affine_
from pyzo.nn.lora import GatedLoRALinear, LoRALinear

D, OUT, ROWS, RANK = 48, 40, 9, 4
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class PythonRMSNorm(nn.Module):
    """As Hugging Face's models write it: the weight is part of every forward."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(D))
        self.offset = offset  # not called weight_offset: the user sets that

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (self.offset + self.weight) * normalised.to(x.dtype)


class Conv1D(nn.Module):
    """As in transformers: a linear whose weight is [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = OUT
        self.weight = nn.Parameter(torch.randn(D, OUT) / 7)
        self.bias = nn.Parameter(torch.randn(OUT))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class LoRA(nn.Module):
    """As PEFT's LoRA layer: a base and adapters of which some are active."""

    def __init__(self, base: nn.Module, scaling: dict[str, float], trained: bool = True) -> None:
        super().__init__()
        self.base_layer = base
        self.scaling = scaling
        self.active_adapters = list(scaling)
        self.disable_adapters = False
        self.merged = False
        self.lora_A = nn.ModuleDict({key: nn.Linear(D, RANK, bias=False) for key in scaling})
        self.lora_B = nn.ModuleDict({key: nn.Linear(RANK, OUT, bias=False) for key in scaling})
        self.lora_magnitude_vector = nn.ModuleDict()
        self.lora_embedding_A = nn.ParameterDict()
        for b in self.lora_B.values():
            nn.init.normal_(b.weight, std=float(trained))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        for key in () if self.disable_adapters else self.active_adapters:
            y = y + self.scaling[key] * self.lora_B[key](self.lora_A[key](x))
        return y


class Readers(nn.Module):
    """A norm and all that reads it."""

    def __init__(self, norm: nn.Module, *consumers: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.consumers = nn.ModuleList(consumers)

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.norm(x)
        return [consumer(z) for consumer in self.consumers]

    def merge(self) -> None:
        merge_affine_(self.norm, self.consumers)


def with_affine(norm: nn.Module) -> nn.Module:
    for name, parameter in norm.named_parameters():
        nn.init.normal_(parameter, mean=float(name == "weight"), std=0.3)
    return norm


def own_lora(base: nn.Linear) -> LoRALinear:
    layer = LoRALinear(base, RANK, alpha=6)
    nn.init.normal_(layer.lora_B.weight)
    return layer


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(D),
    "layer without bias": lambda: nn.LayerNorm(D, bias=False),
    "rms": lambda: nn.RMSNorm(D, eps=1e-6),
    "python": PythonRMSNorm,
}
CONSUMERS: dict[str, Callable[[], Iterable[nn.Module]]] = {
    "linear": lambda: (nn.Linear(D, OUT), nn.Linear(D, OUT, bias=False), nn.Linear(D, 3)),
    "conv1d": lambda: (Conv1D(),),
    "lora": lambda: (
        LoRA(nn.Linear(D, OUT, bias=False), {"one": 0.5, "two": 2.0}),
        LoRA(Conv1D(), {"fresh": 1.5}, trained=False),
    ),
    "LoRALinear": lambda: (own_lora(nn.Linear(D, OUT, bias=False)), own_lora(nn.Linear(D, OUT))),
}


@pytest.fixture(params=NORMS)
def norm(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(1)
    return with_affine(NORMS[request.param]())


@pytest.fixture(params=CONSUMERS)
def model(request: pytest.FixtureRequest, norm: nn.Module) -> Readers:
    torch.manual_seed(2)
    return Readers(norm, *CONSUMERS[request.param]())


def readers(*consumers: nn.Module, norm: nn.Module | None = None) -> Readers:
    torch.manual_seed(3)
    return Readers(norm or with_affine(nn.LayerNorm(D)), *(consumers or (nn.Linear(D, OUT), nn.Linear(D, OUT))))


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(4)).to(device, dtype)


def magnitudes(model: Readers, x: Tensor) -> list[Tensor]:
    """Sums of the magnitudes of all terms that a consumer adds up, in fp64: what its roundings are relative to."""
    wide = copy.deepcopy(model).double()
    norm = copy.deepcopy(wide.norm)
    for parameter in norm.parameters():
        parameter.data = parameter.data.abs()
    if isinstance(norm, nn.LayerNorm):
        plain = nn.functional.layer_norm(x.double(), (D,), eps=norm.eps)
        bias = 0.0 if norm.bias is None else norm.bias
        terms = plain.abs() * norm.weight + bias
    else:
        terms = norm(x.double()).abs()
    for parameter in wide.consumers.parameters():
        parameter.data = parameter.data.abs()
    return [consumer(terms) for consumer in wide.consumers]


def assert_close_to(model: Readers, x: Tensor, expected: list[Tensor], scale: list[Tensor], eps: float) -> None:
    """Of a sum of terms: the norm's output rounds, so do merged weight, A x, bias, parts and result, half an eps each.

    What is fp32 inside a 16-bit or fp32 sum (statistics, products, D + RANK additions) adds as many eps of fp32.
    """
    inner = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    for got, want, size in zip(model(x), expected, scale, strict=True):
        bound = (4 * eps + (D + RANK + 10) * inner) * size + 1e-6 * (x.dtype == torch.float16)
        assert got.dtype == x.dtype
        assert ((got.double() - want).abs() <= bound).all()


def error_of(model: Readers, x: Tensor, expected: list[Tensor]) -> float:
    return sum((got.double() - want).square().sum().item() for got, want in zip(model(x), expected, strict=True)) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_function_stays(model, dtype, device):
    model = model.to(device, dtype)
    x = inputs(dtype, device)
    expected, scale = copy.deepcopy(model).double()(x.double()), magnitudes(model, x)
    plain_error = error_of(model, x, expected)
    model.merge()
    if dtype != torch.float64:  # which the expectation is in
        assert error_of(model, x, expected) <= 2 * plain_error
    assert not list(model.norm.parameters())
    assert not getattr(model.norm, "elementwise_affine", False)
    assert_close_to(model, x, expected, scale, torch.finfo(dtype).eps)
    unmerge_affine_(model.norm)
    assert_close_to(model, x, expected, scale, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_way_back_is_within_two_roundings(model, dtype, device):
    model = model.to(device, dtype)
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.norm.named_parameters())
    beta = before.get("norm.bias", torch.zeros(D)).to(device).double().abs()
    magnitude = {
        name: (value if value.shape[1] == D else value.t()).double().abs() @ beta
        for name, value in before.items()
        if value.dim() == 2 and D in value.shape
    }
    model.merge()
    merged = copy.deepcopy(model.state_dict())
    unmerge_affine_(model.norm)
    after = model.state_dict()
    assert list(after) == list(before)  # created biases are gone, the order is what it was
    eps = torch.finfo(dtype).eps
    changed = 0
    for name, value in before.items():
        if "lora_B" in name or name.startswith("norm"):
            assert torch.equal(after[name], value)
        elif name.endswith("weight"):
            changed += not torch.equal(merged[name], value)
            largest = value.double().abs().amax(0 if value.shape[1] == D else 1, keepdim=True)
            normal = merged[name].double().abs() >= torch.finfo(dtype).smallest_normal
            bound = torch.where(normal, 1.05 * eps * value.double().abs(), 2.1 * eps * largest)
            assert ((after[name].double() - value.double()).abs() <= bound).all()
        elif (weight := name.removesuffix("bias") + "weight") in magnitude and not name.endswith(
            ("consumers.0.base_layer.bias", ".base.bias")
        ):
            # b + W beta rounds (half an eps of it), so does b at the end, and W beta comes from another W (one eps)
            bound = 0.5 * eps * (value.double().abs() + magnitude[weight]) * 2 + 1.05 * eps * magnitude[weight]
            assert ((after[name].double() - value.double()).abs() <= bound + 1e-14).all()
    assert changed
    for name, parameter in parameters.items():
        assert getattr(model.norm, name) is parameter
    if hasattr(model.norm, "elementwise_affine"):
        assert model.norm.elementwise_affine


def test_created_biases():
    model = readers(nn.Linear(D, OUT, bias=False), nn.Linear(D, OUT))
    old = model.consumers[1].bias
    model.norm.bias.requires_grad_(False)
    model.merge()
    created = model.consumers[0].bias
    assert isinstance(created, nn.Parameter) and not created.requires_grad
    assert model.consumers[1].bias is old and old.requires_grad

    model = readers(nn.Linear(D, OUT, bias=False))
    with torch.no_grad():
        model.norm.bias.zero_()
    model.merge()
    assert model.consumers[0].bias is None


def test_fresh_and_trained_adapters():
    lora = LoRA(nn.Linear(D, OUT, bias=False).double(), {"fresh": 3.0}, trained=False).double()
    plain = nn.Linear(D, OUT, bias=False).double()
    plain.weight.data.copy_(lora.base_layer.weight)
    model = readers(lora, plain, norm=with_affine(nn.LayerNorm(D)).double())
    gamma, beta = model.norm.weight.detach().clone(), model.norm.bias.detach().clone()
    a = lora.lora_A["fresh"].weight.detach().clone()
    model.merge()
    assert torch.equal(lora.base_layer.bias, plain.bias)  # B = 0 adds nothing
    assert torch.equal(lora.lora_A["fresh"].weight, a * gamma)
    unmerge_affine_(model.norm)
    b = nn.init.normal_(lora.lora_B["fresh"].weight)
    lora.lora_A["fresh"].weight.data.copy_(a)
    model.merge()
    torch.testing.assert_close(lora.base_layer.bias - plain.bias, 3.0 * b @ a @ beta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deactivate", [{"active_adapters": ["one"]}, {"disable_adapters": True}])
def test_an_inactive_adapter_has_no_constant(deactivate):
    model = readers(LoRA(nn.Linear(D, OUT), {"one": 1.0, "two": 2.0}))
    for name, value in deactivate.items():
        setattr(model.consumers[0], name, value)
    assert_refused(model, ValueError, r"consumers\[0\].lora_A\['(one|two)'\].weight: expected an active adapter")
    for b in model.consumers[0].lora_B.values():
        nn.init.zeros_(b.weight)
    x = inputs()
    expected, scale = copy.deepcopy(model).double()(x.double()), magnitudes(model, x)
    model.merge()
    assert_close_to(model, x, expected, scale, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_offset(dtype):
    norm = PythonRMSNorm(offset=1.0).to(dtype)
    nn.init.normal_(norm.weight, std=0.2)
    model = readers(norm=norm).to(dtype)
    assert_refused(model, ValueError, "weight_offset = 0.0.*set norm.weight_offset = 1.0")
    norm.weight_offset = 1.0
    x = inputs(dtype)
    expected, scale = copy.deepcopy(model).double()(x.double()), magnitudes(model, x)
    model.merge()
    assert_close_to(model, x, expected, scale, torch.finfo(dtype).eps)
    unmerge_affine_(norm)
    assert_close_to(model, x, expected, scale, torch.finfo(dtype).eps)


def test_a_norm_that_reads_its_weight_keeps_its_output_dtype():
    norm = with_affine(PythonRMSNorm())
    x = inputs(torch.bfloat16)
    assert norm(x).dtype == torch.float32
    merge_affine_(norm, [nn.Linear(D, OUT)])
    assert norm(x).dtype == torch.float32
    assert not norm.state_dict() and not list(norm.parameters())


def test_the_state_dict_of_a_merged_model(model):
    plain = copy.deepcopy(model.state_dict())
    model.merge()
    assert not [name for name in model.state_dict() if name.startswith("norm")]
    with pytest.raises(RuntimeError, match=r"norm\.weight"):  # never read as merged weights
        model.load_state_dict(plain)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_a_copy_unmerges_on_its_own(model, copied):
    model.merge()
    merged = copy.deepcopy(model.state_dict())
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    unmerge_affine_(other.norm)
    assert_same_state(model.state_dict(), merged)
    unmerge_affine_(model.norm)
    assert_same_state(other.state_dict(), model.state_dict())


def test_consumers_are_not_kept_alive():
    model = readers()
    model.merge()
    alone = copy.deepcopy(model.norm)
    with pytest.raises(ValueError, match=r"consumers\[0\]: expected the module that was merged, got none"):
        unmerge_affine_(alone)
    replaced = weakref.ref(model.consumers[1])
    model.consumers[1] = nn.Linear(D, OUT)
    gc.collect()
    assert replaced() is None
    before = state_of(model)
    with pytest.raises(ValueError, match=r"consumers\[1\]: expected the module that was merged"):
        unmerge_affine_(model.norm)
    assert_same_state(state_of(model), before)


def test_consumers_that_were_wrapped_or_unwrapped_since():
    model = readers(norm=with_affine(nn.RMSNorm(D)))
    x = inputs()
    model.merge()
    model.consumers[0] = LoRA(model.consumers[0], {"one": 1.0})  # an adapter that was trained on the merged form
    expected, scale = copy.deepcopy(model).double()(x.double()), magnitudes(model, x)
    with pytest.raises(ValueError, match="consumers: expected the 2 linears that were merged"):
        unmerge_affine_(model.norm, [model.consumers[0]])
    unmerge_affine_(model.norm, model.consumers)
    assert_close_to(model, x, expected, scale, 2 * torch.finfo(torch.float32).eps)

    model.merge()
    lora, base = model.consumers[0], model.consumers[0].base_layer
    base.weight.data += lora.lora_B["one"].weight @ lora.lora_A["one"].weight  # PEFT's merge_and_unload
    model.consumers[0] = base
    del lora
    gc.collect()
    unmerge_affine_(model.norm)
    assert_close_to(model, x, expected, scale, 4 * torch.finfo(torch.float32).eps)


def test_what_was_trained_since_stays():
    model = readers(nn.Linear(D, OUT, bias=False), nn.Linear(D, OUT))
    model.merge()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = inputs()
    expected = copy.deepcopy(model).double()(x.double())
    unmerge_affine_(model.norm)
    assert model.consumers[0].bias is not None
    assert_close_to(model, x, expected, magnitudes(model, x), torch.finfo(torch.float32).eps)


def test_a_created_bias_goes_though_all_roundings_add_up():
    """Equal columns whose weight comes back off by as much as bf16 allows: 2 d times half an eps in the bias."""
    grid = 1 + torch.arange(128) / 128
    w, gamma = (grid.bfloat16()[:, None], grid.bfloat16()[None])
    off = ((w.double() * gamma.double()).bfloat16().double() / gamma.double()).bfloat16().double() - w.double()
    row, column = divmod(int((off.abs() / w.double()).argmax()), 128)
    assert off[row, column].abs() > 0.7 * 2**-7 * grid[row]
    model = readers(nn.Linear(D, OUT, bias=False)).bfloat16()
    with torch.no_grad():
        model.norm.weight.fill_(grid[column])
        model.norm.bias.fill_(1)
        model.consumers[0].weight.fill_(grid[row])
    model.merge()
    unmerge_affine_(model.norm)
    assert (model.consumers[0].weight != grid[row]).all()
    assert model.consumers[0].bias is None


def test_merged_parameters_are_out_of_reach_of_an_optimizer():
    model = readers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sum(y.sum() for y in model(inputs())).backward()
    gamma = model.norm.weight.detach().clone()
    model.merge()
    optimizer.step()
    unmerge_affine_(model.norm)
    assert torch.equal(model.norm.weight, gamma)


def test_small_blocks_give_the_same_bits(model, monkeypatch):
    other = copy.deepcopy(model)
    model.merge()
    monkeypatch.setattr(affine_checks, "_BLOCK", 3 * D)
    other.merge()
    weights = [name for name in model.state_dict() if name.endswith("weight")]
    assert all(torch.equal(model.state_dict()[name], other.state_dict()[name]) for name in weights)


@pytest.mark.parametrize(("value", "lost"), [(0.0, True), (3e-6, True), (2e-2, False), (1.0, False)])
def test_columns_that_cannot_be_divided_back(value, lost):
    """With |W| near 0.1, 3e-6 takes a column to a few steps of 6e-8, 2e-2 only its small elements below 6.1e-5."""
    model = readers(nn.Linear(D, OUT), nn.Linear(D, OUT)).to(torch.float16)
    with torch.no_grad():
        model.norm.weight[[5, 7]] = value
    plain = copy.deepcopy(model.consumers[1].weight.detach()).double()
    model.merge()
    merged = state_of(model)
    if lost:
        with pytest.raises(
            ValueError, match=r"lost consumers\[0\].weight in columns \[5, 7\]; consumers\[1\].weight in"
        ):
            unmerge_affine_(model.norm)
        assert_same_state(state_of(model), merged)
        return
    if value < 1:
        assert (model.consumers[1].weight[:, 5].abs() < torch.finfo(torch.float16).smallest_normal).any()
    unmerge_affine_(model.norm)
    error = (model.consumers[1].weight.double() - plain).abs().amax(0)
    assert (error <= 2.1 * torch.finfo(torch.float16).eps * plain.abs().amax(0)).all()


def test_a_zero_gamma_over_a_zero_column():
    model = readers()
    with torch.no_grad():
        model.norm.weight[3] = 0
        for consumer in model.consumers:
            consumer.weight[:, 3] = 0
    model.merge()
    with pytest.raises(ValueError, match=r"got zero in columns \[3\]"):
        unmerge_affine_(model.norm)


def test_trained_weights_that_would_overflow():
    model = readers(nn.Linear(D, OUT)).to(torch.float16)
    with torch.no_grad():
        model.norm.weight[2] = 1e-3
    model.merge()
    with torch.no_grad():
        model.consumers[0].weight[1, 2] = 100
    before = state_of(model)
    with pytest.raises(ValueError, match=r"divided by gamma is not finite in torch.float16 in columns \[2\]"):
        unmerge_affine_(model.norm)
    assert_same_state(state_of(model), before)


def state_of(model: Readers) -> dict[str, Tensor]:
    """Every tensor of a model and what else a refusal could have changed."""
    state = {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    more = [
        (type(m).__name__, sorted(k for k in vars(m) if k != "training"), list(m._parameters)) for m in model.modules()
    ]
    return state | {f"{more} {getattr(model.norm, 'elementwise_affine', None)}": torch.zeros(0)}


def assert_same_state(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        if not value.is_meta:
            assert torch.equal(got[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name


def assert_refused(model: Readers, error: type[Exception], match: str) -> None:
    before = state_of(model)
    with pytest.raises(error, match=match):
        model.merge()
    assert_same_state(state_of(model), before)


class Linear4bit(nn.Linear):
    """Named as in bitsandbytes."""


class Dequantised(Tensor):
    """A tensor subclass, as torchao's."""


def lora(**attributes: object) -> LoRA:
    layer = LoRA(nn.Linear(D, OUT), {"one": 1.0})
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(D, OUT)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def tied() -> tuple[nn.Module, nn.Module]:
    first, second = nn.Linear(D, OUT), nn.Linear(D, OUT)
    second.weight = first.weight
    return first, second


def twice() -> tuple[nn.Module, nn.Module]:
    first = nn.Linear(D, OUT)
    return first, first


def overflowing() -> nn.Module:
    return linear(torch.full((OUT, D), 3e38))


def overflowing_bias() -> nn.Module:
    layer = nn.Linear(D, OUT)
    nn.init.constant_(layer.weight, 1e37)
    layer.bias = nn.Parameter(torch.tensor([3.4e38, -3.4e38]).repeat(OUT // 2))  # whatever the sign of W beta
    return layer


def with_extra() -> nn.Module:
    layer = nn.Linear(D, OUT)
    layer.lora_A = nn.Parameter(torch.zeros(RANK, D))
    return layer


REFUSED_CONSUMERS = {
    "twice": (twice, ValueError, r"consumers\[2\]: expected every consumer once"),
    "tied": (tied, ValueError, r"consumers\[2\].weight: expected memory of its own.*consumers\[1\].weight"),
    "size": (lambda: [nn.Linear(D + 1, OUT)], ValueError, rf"consumers\[1\].weight: expected {D} input features"),
    "kind": (lambda: [nn.Conv1d(D, OUT, 1)], TypeError, "expected torch.nn.Linear, Conv1D or a LoRA layer, got Conv1d"),
    "unlike a linear": (lambda: [with_extra()], TypeError, "expected weight and bias alone, got lora_A in Linear"),
    "parametrised": (
        lambda: [parametrizations.weight_norm(nn.Linear(D, OUT))],
        TypeError,
        "expected weight and bias alone, got parametrizations",
    ),
    "bitsandbytes": (lambda: [Linear4bit(D, OUT)], TypeError, "got Linear4bit: .*Merge first, then quantise"),
    "integers": (lambda: [linear(torch.ones(OUT, D, dtype=torch.uint8))], TypeError, "uint8: .*then quantise"),
    "fp8": (lambda: [linear(torch.ones(OUT, D).to(torch.float8_e4m3fn))], TypeError, "float8.*then quantise"),
    "subclass": (lambda: [linear(torch.randn(OUT, D).as_subclass(Dequantised))], TypeError, "Dequantised.*quantise"),
    "meta": (lambda: [nn.Linear(D, OUT, device="meta")], ValueError, "expected a tensor with values"),
    "overflow": (
        lambda: [overflowing()],
        ValueError,
        r"consumers\[1\].weight: times gamma is not finite in torch.float32",
    ),
    "overflow of the bias": (lambda: [overflowing_bias()], ValueError, r"consumers\[1\].bias: would not be finite"),
    "merged adapter": (lambda: [lora(merged=True)], ValueError, "unmerge the adapter first"),
    "dora": (
        lambda: [lora(lora_magnitude_vector=nn.ModuleDict({"one": nn.Identity()}))],
        TypeError,
        "magnitude_vector",
    ),
    "variant": (lambda: [lora(lora_variant={"one": object()})], TypeError, "expected plain LoRA, got a variant"),
    "embedding": (
        lambda: [lora(lora_embedding_A=nn.ParameterDict({"one": nn.Parameter(torch.zeros(1))}))],
        TypeError,
        "lora_embedding_A",
    ),
    "reader of gate and up": (
        lambda: [GatedLoRALinear(nn.Linear(D, OUT), RANK)],
        TypeError,
        "expected torch.nn.Linear, Conv1D or a LoRA layer, got GatedLoRALinear",
    ),
    "quantised base": (lambda: [lora(base_layer=Linear4bit(D, OUT))], TypeError, "base_layer: .*Merge first"),
    "adapter size": (
        lambda: [lora(lora_A=nn.ModuleDict({"one": nn.Linear(D - 1, RANK, bias=False)}))],
        ValueError,
        r"lora_A\['one'\].weight: expected 48 input features",
    ),
}


@pytest.mark.parametrize("case", REFUSED_CONSUMERS)
def test_refused_consumers(case):
    make, error, match = REFUSED_CONSUMERS[case]
    torch.manual_seed(5)
    assert_refused(readers(nn.Linear(D, OUT), *make()), error, match)


@pytest.mark.parametrize(
    ("consumers", "error", "match"),
    [((), ValueError, "expected all readers of the norm, got none"), (nn.Linear(D, OUT), TypeError, "got one Linear")],
)
def test_refused_collections(consumers, error, match):
    norm = nn.LayerNorm(D)
    with pytest.raises(error, match=f"consumers: .*{match}"):
        merge_affine_(norm, consumers)
    assert norm.weight is not None


def filled(name: str, value: float) -> nn.Module:
    norm = with_affine(nn.LayerNorm(D))
    with torch.no_grad():
        getattr(norm, name)[[1, 4]] = value
    return norm


class Multiplied(nn.LayerNorm):
    """Does more than its parameters say."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


class Needy(nn.Module):
    """Says that it works without a weight, and does not."""

    def __init__(self) -> None:
        super().__init__()
        self.elementwise_affine = True
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (D,)) * self.weight


REFUSED_NORMS = {
    "no affine": (lambda: nn.LayerNorm(D, elementwise_affine=False), ValueError, "norm: expected weight, bias or both"),
    "batch": (lambda: nn.BatchNorm1d(D), TypeError, "norm: expected a norm over the last dimension, got BatchNorm1d"),
    "group": (lambda: nn.GroupNorm(1, D), TypeError, "norm: expected a norm over the last dimension, got GroupNorm"),
    "two dimensions": (lambda: nn.LayerNorm((2, D)), ValueError, r"norm.weight: expected one dimension, got \[2, 48\]"),
    "parametrised": (
        lambda: parametrizations.weight_norm(nn.LayerNorm(D), dim=None),
        TypeError,
        "norm.weight: .*computed",
    ),
    "infinite gamma": (lambda: filled("weight", float("inf")), ValueError, r"finite gamma, .* columns \[1, 4\]"),
    "nan beta": (lambda: filled("bias", float("nan")), ValueError, r"finite beta, .* columns \[1, 4\]"),
    "other formula": (lambda: with_affine(Multiplied(D)), ValueError, "from Multiplied"),
    "needs its weight": (Needy, TypeError, "norm: expected one that works without its parameters, got Needy"),
}


@pytest.mark.parametrize("case", REFUSED_NORMS)
def test_refused_norms(case):
    make, error, match = REFUSED_NORMS[case]
    assert_refused(readers(norm=make()), error, match)


def test_merging_and_unmerging_twice():
    model = readers()
    with pytest.raises(ValueError, match="norm: expected one that merge_affine_ merged"):
        unmerge_affine_(model.norm)
    model.merge()
    assert_refused(model, ValueError, "norm: expected one that is not merged")
    unmerge_affine_(model.norm)
    model.merge()


def test_an_adapter_merged_since_is_refused():
    model = readers(LoRA(nn.Linear(D, OUT), {"one": 1.0}))
    model.merge()
    model.consumers[0].merged = True
    before = state_of(model)
    with pytest.raises(ValueError, match="unmerge the adapter first"):
        unmerge_affine_(model.norm)
    assert_same_state(state_of(model), before)


def test_the_norms_and_linears_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    for norm in (llama.LlamaRMSNorm(D), gemma.GemmaRMSNorm(D)):
        offset = float(isinstance(norm, gemma.GemmaRMSNorm))
        nn.init.normal_(norm.weight, mean=1 - offset, std=0.3)
        norm.weight_offset = offset
        model, x = readers(nn.Linear(D, OUT), conv1d(OUT, D), norm=norm), inputs()
        expected = model(x)
        model.merge()
        for got, want in zip(model(x), expected, strict=True):  # D + 12 roundings of fp32 on sums near 10
            torch.testing.assert_close(got, want, rtol=0, atol=60 * 1.2e-7 * 10)
        unmerge_affine_(norm)
        assert norm.weight.shape == (D,)
