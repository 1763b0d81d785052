"""MSLayerNorm and MSRMSNorm: what is kept and shared, when the input is kept instead, state dicts, autocast."""

import copy
import pickle

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pyzo import memory
from pyzo.nn.affine import merge_affine_, unmerge_affine_
from pyzo.nn.norm import CHECK_EVERY, MSLayerNorm, MSRMSNorm

TOKENS, HIDDEN = 48, 64
ROWS = 4 * TOKENS  # bytes of 1/std
BYTES = 2 * TOKENS * HIDDEN  # of one unit
NORMS = {
    "layer": lambda **kw: MSLayerNorm(HIDDEN, affine=True, **kw),
    "rms": lambda **kw: MSRMSNorm(HIDDEN, affine=True, **kw),
}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Readers(nn.Module):
    """A norm and the linears that read its output, as q, k and v do."""

    def __init__(self, norm: nn.Module, sizes: tuple[int, ...] = (HIDDEN,) * 3, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.norm = norm
        self.linears = nn.ModuleList(nn.Linear(HIDDEN, size, dtype=dtype) for size in sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        z = self.norm(x)
        return tuple(linear(z) for linear in self.linears)


def kept(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> int:
    def run() -> tuple[Tensor, ...]:
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None, cache_enabled=True):
            return model(x)

    account = memory.account(run, model)
    # Casts of weights under autocast belong to the linears alone, whatever the norm.
    casts = [s for s in account.saved if autocast and s.dtype == autocast and s.shape[0] != TOKENS]
    return account.nbytes - sum(s.nbytes for s in casts)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_one_unit_is_kept_in_bf16(kind, affine, frozen, device):
    norm = NORMS[kind]() if affine else (MSLayerNorm if kind == "layer" else MSRMSNorm)(HIDDEN)
    model = Readers(norm, dtype=torch.bfloat16).to(device, torch.bfloat16)
    for linear in model.linears:
        linear.requires_grad_(not frozen)
    x = random(TOKENS, HIDDEN, dtype=torch.bfloat16).to(device).requires_grad_()
    assert kept(model, x) == BYTES + ROWS


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_one_unit_is_kept_under_autocast(kind, autocast, frozen, device):
    model = Readers(NORMS[kind]()).to(device)
    for linear in model.linears:
        linear.requires_grad_(not frozen)
    x = random(TOKENS, HIDDEN).to(device).requires_grad_()
    assert kept(model, x, autocast) == BYTES + ROWS


def test_torch_s_layer_norm_keeps_five_units_under_autocast(device):
    """What the sharing is measured against: the fp32 input, a cast for each linear, and statistics."""
    model = Readers(nn.LayerNorm(HIDDEN)).to(device)
    x = random(TOKENS, HIDDEN).to(device).requires_grad_()
    assert kept(model, x + 0, torch.bfloat16) == 5 * BYTES + 2 * ROWS


def test_a_llama_block_s_norms_share_one_storage_each(device):
    attention = Readers(NORMS["rms"](), (HIDDEN, HIDDEN // 2, HIDDEN // 2)).to(device, torch.bfloat16)
    mlp = Readers(NORMS["rms"](), (4 * HIDDEN, 4 * HIDDEN)).to(device, torch.bfloat16)
    x = random(2, TOKENS // 2, HIDDEN, dtype=torch.bfloat16).to(device).requires_grad_()
    account = memory.account(lambda: (attention(x), mlp(x)))
    assert account.nbytes == 2 * (BYTES + ROWS)
    assert [len(s.modules) for s in account.saved if s.dtype == torch.bfloat16] == [4, 3]


@pytest.mark.parametrize("kind", NORMS)
def test_state_dicts_are_torch_s(kind, device):
    ours = NORMS[kind]().to(device)
    theirs = (nn.LayerNorm(HIDDEN) if kind == "layer" else nn.RMSNorm(HIDDEN, eps=1e-6)).to(device)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        for i, p in enumerate(theirs.parameters()):
            p.copy_(1 + 0.1 * random(HIDDEN, seed=i))
    ours.load_state_dict(theirs.state_dict())
    x = random(TOKENS, HIDDEN).to(device)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_bias_and_offset(device):
    assert MSLayerNorm(8).weight is None and MSLayerNorm(8).bias is None
    assert set(dict(MSLayerNorm((8,), affine=True, bias=False).named_parameters())) == {"weight"}
    gemma = MSRMSNorm(HIDDEN, affine=True, weight_offset=1.0).to(device)
    assert (gemma.weight == 0).all() and gemma.saves == "output"
    x = random(TOKENS, HIDDEN).to(device)
    assert_same_bits(gemma(x).detach(), MSRMSNorm(HIDDEN)(x), "gamma of 1")


def test_dtype_of_the_output(device):
    norm = MSLayerNorm(HIDDEN, affine=True).to(device)
    x = random(TOKENS, HIDDEN).to(device)
    for autocast in (torch.bfloat16, torch.float16):
        with torch.autocast(x.device.type, autocast):
            assert norm(x).dtype == autocast
            assert_same_bits(norm(x).detach(), MSLayerNorm(HIDDEN)(x), "parameters of 1 and 0")
            norm.output_dtype = None
            assert norm(x).dtype == torch.float32
            norm.output_dtype = "autocast"
    assert norm(x).dtype == torch.float32
    norm.output_dtype = torch.float16
    assert norm(x).dtype == torch.float16
    double = MSLayerNorm(HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        assert double(random(2, HIDDEN).double()).dtype == torch.float64


def test_gradients_under_autocast(device):
    """fp32 parameters and input, bf16 output: against fp64 within the rounding of the output and its gradient."""
    norm = MSLayerNorm(HIDDEN, affine=True).to(device)
    x = random(TOKENS, HIDDEN).to(device).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        y = norm(x)
    gradient = random(TOKENS, HIDDEN, seed=3).to(device, torch.bfloat16)
    y.backward(gradient)
    wide = x.detach().double().requires_grad_()
    exact = nn.LayerNorm(HIDDEN).to(device, torch.float64)
    exact(wide).backward(gradient.double())
    for mine, true in ((x.grad, wide.grad), (norm.weight.grad, exact.weight.grad), (norm.bias.grad, exact.bias.grad)):
        assert mine.dtype == torch.float32
        assert (mine.double() - true).norm() <= 2 * 2.0**-8 * true.norm()


def unsafe(norm: nn.Module, how: str) -> None:
    with torch.no_grad():
        norm.weight.copy_(1 + 0.1 * random(HIDDEN, seed=5))
        if how == "zero":
            norm.weight[3] = 0
        elif how == "tiny":
            norm.weight[3] = 1e-38
        elif how == "nan":
            norm.weight[3] = torch.nan
        elif how == "beta":
            norm.bias[3] = 100 * norm.weight[3]


def gradients(norm: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    norm.zero_grad()
    norm(x).backward(random(TOKENS, HIDDEN, seed=7).to(x))
    return [x.grad, *(p.grad.clone() for p in norm.parameters())]


@pytest.mark.parametrize("how", ["zero", "tiny", "beta"])
@pytest.mark.parametrize("load", [False, True], ids=["first forward", "load_state_dict"])
def test_the_input_is_kept_where_the_output_does_not_tell(how, load, device):
    """gamma of 0 or nearly, or beta much larger: the fallback is chosen and its gradients are torch's."""
    dtype = torch.bfloat16
    norm, source = (NORMS["layer"](dtype=dtype).to(device) for _ in range(2))
    if load:
        unsafe(source, how)
        assert norm.saves == "output"
        norm.load_state_dict(source.state_dict())
        assert norm.saves == "input" and "column 3" in norm.reason
    else:
        norm = NORMS["layer"](dtype=dtype).to(device)
        norm.check()
        norm.weight = nn.Parameter(norm.weight.detach().clone())  # another place: looked at by the next forward pass
        unsafe(norm, how)
    exact = nn.LayerNorm(HIDDEN).to(device, torch.float64)
    exact.load_state_dict(norm.state_dict())
    x = random(TOKENS, HIDDEN, dtype=dtype).to(device)
    for mine, true in zip(gradients(norm, x), gradients(exact, x.double()), strict=True):
        assert (mine.double() - true).norm() <= 2.0**-8 * true.norm()
    assert norm.saves == "input"
    account = memory.account(lambda: norm(x))
    assert {s.modules for s in account.saved} == {("MSLayerNorm",)}
    assert account.nbytes == BYTES + ROWS


def test_a_negative_gamma_is_as_good_as_a_positive_one(device):
    norm = NORMS["layer"]().to(device)
    with torch.no_grad():
        norm.weight.neg_()
    exact = nn.LayerNorm(HIDDEN).to(device, torch.float64)
    exact.load_state_dict(norm.state_dict())
    norm.check()
    assert norm.saves == "output"
    x = random(TOKENS, HIDDEN).to(device)
    for mine, true in zip(gradients(norm, x), gradients(exact, x.double()), strict=True):
        assert (mine.double() - true).norm() <= 8 * 2.0**-24 * true.norm() + 1e-30


def test_the_choice_depends_on_the_dtype_of_the_output(device):
    """beta of 100 gamma: 2^-24 * 101 in fp32 is nothing, 2^-8 * 101 in bf16 is too much."""
    norm = NORMS["layer"]().to(device)
    with torch.no_grad():
        norm.bias.fill_(100.0)
    norm.check()
    assert [norm.saves_for(d) for d in (torch.float32, torch.float16, torch.bfloat16)] == ["output", "input", "input"]
    assert norm.saves == "output" and norm.reason.startswith("normalised values come back from float32 to 6e-06")
    x = random(TOKENS, HIDDEN).to(device).requires_grad_()
    norm.output_dtype = torch.bfloat16
    assert memory.account(lambda: norm(x)).nbytes == ROWS  # x, a leaf, is kept; the output is not
    norm.output_dtype = None
    assert memory.account(lambda: norm(x)).nbytes == 2 * BYTES + ROWS


@pytest.mark.parametrize(
    ("gamma", "saved"),
    [  # by float32, float16, bfloat16
        (1e-6, ("output", "output", "output")),
        (5e-7, ("output", "input", "output")),  # half of float16's smallest number, 2^-25, is more than gamma / 32
        (2.0**121, ("input", "input", "input")),  # its reciprocal is nearly a subnormal number
    ],
)
def test_gammas_at_the_ends_of_a_dtype_s_range(gamma, saved, device):
    norm = NORMS["rms"]().to(device)
    with torch.no_grad():
        norm.weight[3] = gamma
    norm.check()
    assert tuple(norm.saves_for(d) for d in (torch.float32, torch.float16, torch.bfloat16)) == saved


@pytest.mark.parametrize("how", ["zero", "nan"])
def test_parameters_are_looked_at_again_after_many_changes(how, device, monkeypatch):
    norm = NORMS["layer"]().to(device)
    x = random(TOKENS, HIDDEN).to(device).requires_grad_()
    norm(x)
    calls = []
    check = norm.check
    monkeypatch.setattr(norm, "check", lambda: (calls.append(1), check()))
    unsafe(norm, how)
    version = norm.weight._version
    norm(x)
    assert not calls and norm.saves == "output"
    with torch.no_grad():
        while norm.weight._version < version + CHECK_EVERY:
            norm.weight.mul_(1.0)
        norm(x)
        assert not calls  # no backward pass will come
    norm(x)
    norm(x)
    assert len(calls) == 1 and norm.saves == "input"


@pytest.mark.parametrize("load", [False, True], ids=["constructor", "load_state_dict"])
def test_gammas_initialised_to_zero(load, device):
    """Between the constructor, or load_state_dict, and the first step: one change, which is seen."""
    norm = NORMS["layer"]().to(device)
    if load:
        norm(random(3, HIDDEN).to(device))
        norm.load_state_dict(norm.state_dict())
    nn.init.zeros_(norm.weight)
    exact = nn.LayerNorm(HIDDEN).to(device, torch.float64)
    exact.load_state_dict(norm.state_dict())
    x = random(TOKENS, HIDDEN).to(device)
    for mine, true in zip(gradients(norm, x), gradients(exact, x.double()), strict=True):
        assert (mine.double() - true).norm() <= 8 * 2.0**-24 * true.norm()
    assert norm.saves == "input"


def test_another_parameter_in_the_same_place(device):
    norm = NORMS["layer"]().to(device)
    unsafe(norm, "safe")
    x = random(TOKENS, HIDDEN).to(device).requires_grad_()
    norm(x)
    place, version = norm.weight.data_ptr(), norm.weight._version
    norm.weight = nn.Parameter(norm.weight.data.zero_())
    assert norm.weight.data_ptr() == place and norm.weight._version < version
    norm(x)
    assert norm.saves == "input"


def test_gamma_is_taken_as_the_operator_rounds_it(device):
    """0.1 - float32(0.1) is 1.5e-9, but 0 in the operator's float32."""
    norm = MSRMSNorm(HIDDEN, affine=True, weight_offset=0.1).to(device)
    nn.init.constant_(norm.weight, -0.1)
    assert all(g.isfinite().all() for g in gradients(norm, random(TOKENS, HIDDEN).to(device)))
    assert norm.saves == "input"


def test_a_steady_state_asks_the_device_for_nothing(device, monkeypatch):
    norm = NORMS["layer"]().to(device)
    x = random(TOKENS, HIDDEN).to(device).requires_grad_()
    norm(x)

    def refuse(*_: object) -> None:
        raise AssertionError("a number was read from the device")

    for name in ("item", "tolist", "__bool__", "__float__"):
        monkeypatch.setattr(Tensor, name, refuse)
    for _ in range(3):
        norm(x).sum().backward()
        with torch.no_grad():
            norm.weight.add_(0.0)


def test_parameters_that_do_not_exist_yet(device):
    norm = NORMS["layer"](device="meta")
    assert norm.saves == "input" and "not looked at yet" in norm.reason
    norm.to_empty(device=device)
    norm.load_state_dict(NORMS["layer"]().state_dict())
    assert norm.saves == "output"
    other = NORMS["layer"](device="meta").to_empty(device=device)
    other.reset_parameters()
    assert other.saves == "output"


def test_parameters_without_versions(device):
    """Made in inference mode: usable there, and later for inputs that want a gradient."""
    with torch.inference_mode():
        norm = NORMS["layer"]().to(device)
        x = random(3, HIDDEN).to(device)
        assert_same_bits(norm(x), NORMS["layer"]().to(device)(x))
    assert norm.saves == "output" and norm.weight.is_inference()


def test_shapes_alone():
    """On meta, and in a mode of fake tensors, with fake parameters and with real ones."""
    norm = NORMS["layer"](device="meta")
    x = torch.empty(3, HIDDEN, device="meta", requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.shape == (3, HIDDEN) and norm.weight.grad.shape == (HIDDEN,)
    real = NORMS["layer"]()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for norm in (NORMS["layer"](), real):
            x = torch.empty(3, HIDDEN, requires_grad=True)
            assert norm(x).shape == (3, HIDDEN)


def test_sharded_parameters(tmp_path):
    """FSDP2: load_state_dict sees shards, from which nothing is decided, and forward the whole parameters."""
    exact, x = nn.LayerNorm(HIDDEN), random(TOKENS, HIDDEN)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        norm = fully_shard(NORMS["layer"](), mesh=init_device_mesh("cpu", (1,)))
        norm.load_state_dict(norm.state_dict())
        assert norm.saves == "input" and "not looked at yet" in norm.reason
        norm(x).square().sum().backward()
        exact(x).square().sum().backward()
        assert norm.saves == "output"
        for mine, plain in zip(norm.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.full_tensor(), plain.grad, rtol=1e-4, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


def test_a_gamma_whose_reciprocal_overflows(device):
    """Its column would come back from fp32 by the rounding of the output, but not by a finite factor."""
    norm = NORMS["rms"]().to(device)
    with torch.no_grad():
        norm.weight[3] = 2.0**-130
    x = random(TOKENS, HIDDEN).to(device)
    norm.check()
    assert norm.saves == "input"
    assert all(g.isfinite().all() for g in gradients(norm, x))
    with torch.no_grad():
        norm.weight[3] = 2.0**-119
    norm.check()
    assert norm.saves == "output"
    assert all(g.isfinite().all() for g in gradients(norm, x))


def test_copies(device):
    norm = NORMS["layer"]().to(device)
    unsafe(norm, "zero")
    norm.check()
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert copied.saves == "input"
        assert_same_bits(copied(random(3, HIDDEN).to(device)), norm(random(3, HIDDEN).to(device)), "copy")


def test_without_parameters_after_a_merge(device):
    """As merge_affine_ leaves a norm: the parameters None. gamma is 1 then, whatever the offset."""
    for norm in (MSLayerNorm(HIDDEN, affine=True), MSRMSNorm(HIDDEN, affine=True, weight_offset=1.0)):
        norm.to(device)
        norm.affine = False
        norm.register_parameter("weight", None)
        norm.register_parameter("bias", None)
        x = random(TOKENS, HIDDEN).to(device).requires_grad_()
        assert_same_bits(norm(x), type(norm)(HIDDEN)(x), "merged")
        assert norm.saves == "output" and "no parameters" in norm.reason
        assert memory.account(lambda norm=norm, x=x: norm(x)).nbytes == 2 * BYTES + ROWS


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_merging_into_the_readers_and_back(offset, device):
    norm = MSRMSNorm(HIDDEN, affine=True, weight_offset=offset).to(device)
    unsafe(norm, "safe")
    model = Readers(norm).to(device)
    x = random(TOKENS, HIDDEN).to(device)
    before = [y.detach() for y in model(x)]
    merge_affine_(norm, model.linears)
    assert norm.weight is None and norm.saves == "output"
    torch.testing.assert_close([y.detach() for y in model(x)], before, rtol=1e-5, atol=1e-5)
    unmerge_affine_(norm)
    assert norm.weight is not None and norm.saves == "output"
    torch.testing.assert_close([y.detach() for y in model(x)], before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_compiles_without_a_break(kind, autocast, device):
    norm = NORMS[kind]().to(device)
    unsafe(norm, "safe")
    x = random(TOKENS, HIDDEN).to(device)

    def function(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            return norm(x)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, function):
        leaf = x.clone().requires_grad_()
        norm.zero_grad()
        y = run(leaf)
        y.backward(random(TOKENS, HIDDEN, seed=7).to(device, y.dtype))
        found.append([y.detach(), leaf.grad, *(p.grad for p in norm.parameters())])
    assert found[0][0].dtype == (torch.bfloat16 if autocast else torch.float32)
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b, "compiled")
    torch.compiler.reset()


def test_other_parameters_compile_nothing_anew(device):
    norm, counter = NORMS["layer"]().to(device), CompileCounter()
    compiled = torch.compile(norm, backend=counter)
    x = random(TOKENS, HIDDEN).to(device).requires_grad_()
    for seed in range(3):
        norm.load_state_dict({"weight": 2 + 0.1 * random(HIDDEN, seed=seed), "bias": random(HIDDEN, seed=seed)})
        compiled(x)
    assert counter.frame_count == 1
    unsafe(norm, "zero")
    norm.check()
    compiled(x)
    assert counter.frame_count == 2  # the input is kept now
    torch.compiler.reset()


def test_checkpointed_readers_keep_their_input_alone(device):
    model = Readers(NORMS["rms"](), dtype=torch.bfloat16).to(device, torch.bfloat16)
    x = random(TOKENS, HIDDEN, dtype=torch.bfloat16).to(device).requires_grad_()

    def checkpointed() -> tuple[Tensor, ...]:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    found = []
    for run in (lambda: model(x), checkpointed):
        x.grad = None
        model.zero_grad()
        torch.cat(run(), -1).float().square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b, "checkpoint")


def test_training_follows_torch_s_norm(device):
    """30 steps of AdamW in fp32: losses agree to rounding, and the choice stays."""
    losses = []
    for norm in (nn.LayerNorm(HIDDEN), MSLayerNorm(HIDDEN, affine=True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), norm, nn.Linear(HIDDEN, 1)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        x, target = random(TOKENS, HIDDEN).to(device), random(TOKENS, 1, seed=9).to(device)
        losses.append([])
        for _ in range(30):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.5 * losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


def test_errors():
    with pytest.raises(ValueError, match=r"normalized_shape: expected one dimension, the last, got \(2, 3\)"):
        MSLayerNorm((2, 3))
    with pytest.raises(ValueError, match=r"dim: expected one dimension, the last, got \(\)"):
        MSRMSNorm(())
    with pytest.raises(ValueError, match="dim: expected at least 1, got 0"):
        MSRMSNorm(0)
    with pytest.raises(ValueError, match=r"x: expected a last dimension of 8, got shape \[3, 7\]"):
        MSLayerNorm(8)(torch.zeros(3, 7))
    with pytest.raises(TypeError, match=r"x: expected a tensor of .* got int64"):
        MSLayerNorm(8)(torch.zeros(3, 8, dtype=torch.int64))
    norm = MSLayerNorm(8)
    norm.output_dtype = torch.int8
    with pytest.raises(
        TypeError, match=r"output_dtype: expected 'autocast', None or a dtype of layers, got torch.int8"
    ):
        norm(torch.zeros(3, 8))
