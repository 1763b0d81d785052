"""`pyzo.forward`: equals <grad, z> by backpropagation, leaves no trace, and refuses what would drop a tangent."""

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pyzo
from pyzo.forward import directional_derivative, new_tangents

pytestmark = pytest.mark.usefixtures("one_thread")


def direction(parameters: Sequence[torch.Tensor], seed: int = 5) -> list[torch.Tensor]:
    tangents = new_tangents(parameters)
    for key, (p, tangent) in enumerate(zip(parameters, tangents, strict=True), 1):
        tangent.copy_(pyzo.noise(p.shape, seed=seed, key=key, dtype=p.dtype, device=p.device))
    return tangents


def agrees(closure: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor], **arguments: bool) -> float:
    """Asserts that the derivative is <grad, z> by backpropagation; returns the derivative.

    Both ways add the same products g_i z_i along chains of about 1000 rounded operations (two layers, inner sizes up to
    64 there and back, a loss over 50 classes). Their relative errors, at most u = 2^-24 in fp32, have random signs:
    sqrt(1000) u of sum |g_i z_i| for each way, 64 u for both.
    """
    tangents = direction(parameters)
    torch.manual_seed(3)
    loss, derivative = directional_derivative(closure, parameters, tangents, **arguments)
    torch.manual_seed(3)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected_loss = closure()
    gradients = torch.autograd.grad(expected_loss, parameters, allow_unused=True)
    terms = torch.cat([(g * z).flatten() for g, z in zip(gradients, tangents, strict=True) if g is not None])
    unit = torch.finfo(parameters[0].dtype).eps / 2
    assert abs(derivative.item() - terms.sum().item()) <= 64 * unit * terms.abs().sum().item()
    assert 64 * unit * terms.abs().sum().item() < 0.05 * terms.norm()  # of which the derivative is a sample
    assert abs(loss.item() - expected_loss.item()) <= 64 * unit * abs(expected_loss.item())
    assert loss.shape == derivative.shape == () and loss.dtype == derivative.dtype == expected_loss.dtype
    assert not loss.requires_grad and not derivative.requires_grad
    return derivative.item()


# The derivative ------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Two layers of self-attention with a tied head, on token ids."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.attention = nn.ModuleList(nn.MultiheadAttention(32, 4, dropout, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(dropout), nn.Linear(64, 32)) for _ in range(2)
        )
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for attention, norm, mlp in zip(self.attention, self.norms, self.mlps, strict=True):
            x = x + attention(x, x, x, need_weights=False)[0]
            x = x + mlp(norm(x))
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), ids.flatten())


@pytest.fixture
def ids(device: str) -> torch.Tensor:
    return torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture
def tiny(device: str) -> Tiny:
    torch.manual_seed(0)
    return Tiny().to(device)


@pytest.mark.parametrize("training", [False, True])
def test_transformer_with_tied_embedding(tiny, ids, training):
    tiny.train(training)  # in eval mode, without gradients, nn.MultiheadAttention would take its fused path
    agrees(lambda: tiny(ids), list(tiny.parameters()))


def test_dropout_draws_what_a_plain_forward_draws(ids):
    torch.manual_seed(0)
    model = Tiny(dropout=0.3).to(ids.device)
    agrees(lambda: model(ids), list(model.parameters()))


def test_some_parameters_and_unused_ones(tiny, ids):
    unused = torch.randn(7, device=ids.device, requires_grad=True)
    head = [tiny.norms[1].weight, tiny.head.weight]
    alone = agrees(lambda: tiny(ids), head)
    assert agrees(lambda: tiny(ids), [*head, unused]) == alone


def hugging_face(architecture: str, attention: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 32, "attn_implementation": attention}
    torch.manual_seed(0)
    if architecture == "bert":
        config = transformers.BertConfig(intermediate_size=64, **sizes)
        return transformers.BertForMaskedLM(config).to(dtype)
    if architecture == "opt":
        config = transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **sizes)
        return transformers.OPTForCausalLM(config).to(dtype)
    config = transformers.LlamaConfig(intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    return transformers.LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["bert", "opt", "llama"])
def test_hugging_face_models(architecture, attention, ids):
    model = hugging_face(architecture, attention).to(ids.device).train()  # in train mode: dropout
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    agrees(
        lambda: model(input_ids=ids, attention_mask=mask, labels=ids).loss,
        list(model.parameters()),
    )


def test_bfloat16_model(ids):
    """Against the same weights in fp32: a chain of about 30 activations rounded to bf16 disturbs the derivative by at
    most 30 u, u = 2^-9, of its standard deviation over directions, the norm of (g_i z_i)."""
    model, exact = (hugging_face("llama", "sdpa", dtype).to(ids.device) for dtype in (torch.bfloat16, torch.float32))
    exact.load_state_dict(model.state_dict())
    parameters = list(model.parameters())
    tangents = direction(parameters)
    _, derivative = directional_derivative(lambda: model(input_ids=ids, labels=ids).loss, parameters, tangents)
    gradients = torch.autograd.grad(exact(input_ids=ids, labels=ids).loss, list(exact.parameters()))
    terms = torch.cat([(g * z.float()).flatten() for g, z in zip(gradients, tangents, strict=True)])
    assert abs(derivative.item() - terms.sum().item()) <= 30 * 2**-9 * terms.norm().item()


def test_lora(ids):
    peft = pytest.importorskip("peft")
    model = hugging_face("opt", "sdpa").to(ids.device).eval()
    model = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    agrees(lambda: model(input_ids=ids, labels=ids).loss, trained)


def test_no_float64_appears(tiny, ids):
    """Double-precision arithmetic is 64 times slower on most GPUs."""
    seen = set()

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() > 0:
                seen.add(result.dtype)
            return result

    def closure():
        with Dtypes():
            return tiny(ids)

    parameters = list(tiny.parameters())
    directional_derivative(closure, parameters, direction(parameters))
    assert torch.float32 in seen and torch.float64 not in seen


# How parameters become dual ------------------------------------------------------------------------------------------


def test_tangents_are_the_callers_tensors_also_in_a_flat_buffer():
    flat = torch.randn(40)
    parameters = [nn.Parameter(flat[:12].view(3, 4)), nn.Parameter(flat[12:32]), nn.Parameter(torch.randn(2, 3))]
    tangents = direction(parameters)
    assert tangents[0].untyped_storage().data_ptr() == tangents[1].untyped_storage().data_ptr()

    def closure():
        for p, t in zip(parameters, tangents, strict=True):
            held = forward_ad.unpack_dual(p).tangent
            assert held.data_ptr() == t.data_ptr()
        return sum(p.square().sum() for p in parameters)

    agrees_with = 2 * sum((p * t).sum().item() for p, t in zip(parameters, tangents, strict=True))
    _, derivative = directional_derivative(closure, parameters, tangents)
    assert derivative.item() == pytest.approx(agrees_with, rel=1e-5)


def test_views_in_both_directions():
    weight = nn.Parameter(torch.randn(4, 3))
    with torch.no_grad():
        earlier = weight.t()[1:]
    tangents = direction([weight])
    _, derivative = directional_derivative(earlier.sum, [weight], tangents)
    assert derivative.item() == pytest.approx(tangents[0][:, 1:].sum().item(), rel=1e-5)

    base = torch.randn(20)
    views = [base[:8].view(2, 4).requires_grad_(), base[8:15].requires_grad_()]
    tangents = direction(views)
    _, derivative = directional_derivative(lambda: base.sum() + 2 * views[1].sum(), views, tangents)
    assert derivative.item() == pytest.approx(tangents[0].sum().item() + 3 * tangents[1].sum().item(), rel=1e-5)


def test_results_alias_neither_parameter_nor_tangent():
    scale = torch.tensor(2.0, requires_grad=True)
    tangent = torch.tensor(0.5)
    loss, derivative = directional_derivative(lambda: scale, [scale], [tangent])
    tangent.zero_()
    with torch.no_grad():
        scale.zero_()
    assert (loss.item(), derivative.item()) == (2.0, 0.5)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_trace_is_left(error, dtype):
    special = torch.tensor([-0.0, float("inf"), 1.0, float("nan")], dtype=dtype)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    special.view(integers)[3] |= 5  # a NaN with a payload
    linear = nn.Linear(4, 2).to(dtype)
    with torch.no_grad():
        linear.weight[0] = special
    linear.bias.requires_grad_(False)
    parameters = list(linear.parameters())
    tangents = direction(parameters)
    before = [p.detach().clone().view(integers) for p in parameters]
    versions = [p._version for p in parameters]
    addresses = [p.data_ptr() for p in parameters]
    directions = [t.clone() for t in tangents]

    def closure():
        assert linear.weight is parameters[0] and linear.weight.requires_grad and not linear.bias.requires_grad
        loss = linear(torch.ones(3, 4, dtype=dtype)).sum()
        if error is not None:
            raise error("inside")
        return loss

    flags = global_flags()
    if error is None:
        directional_derivative(closure, parameters, tangents)
    else:
        with pytest.raises(error, match="inside"):
            directional_derivative(closure, parameters, tangents)
    assert linear.weight is parameters[0] and linear.bias is parameters[1]
    for p, bits in zip(parameters, before, strict=True):
        assert torch.equal(p.detach().view(integers), bits)
        assert p.is_leaf and p.grad is None and p.grad_fn is None
    assert [p.requires_grad for p in parameters] == [True, False]
    assert [p._version for p in parameters] == versions and [p.data_ptr() for p in parameters] == addresses
    assert all(map(torch.equal, tangents, directions))
    with forward_ad.dual_level():
        assert all(forward_ad.unpack_dual(p).tangent is None for p in parameters)
    assert global_flags() == flags
    linear(torch.ones(3, 4, dtype=dtype)).sum().backward()  # and backpropagation works as before
    assert linear.weight.grad is not None


# Settings around the closure -----------------------------------------------------------------------------------------


def global_flags() -> tuple[object, ...]:
    cuda = torch.backends.cuda
    attention = (cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled())
    return (*attention, cuda.cudnn_sdp_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled())


def test_attention_is_math_and_gradients_are_off():
    weight = torch.ones(3, requires_grad=True)
    seen = []

    def closure():
        seen.append(global_flags())
        return weight.sum()

    directional_derivative(closure, [weight], direction([weight]))
    assert seen == [(True, False, False, False, False, False)]


def test_casts_that_an_outer_autocast_cached_are_not_used():
    linear = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    parameters = list(linear.parameters())

    def closure():
        return linear(x).float().sum()

    tangents = direction(parameters)
    with torch.autocast("cpu", torch.bfloat16):
        _, fresh = directional_derivative(closure, parameters, tangents)
        closure()  # caches bf16 casts of the parameters, without tangents
        _, again = directional_derivative(closure, parameters, tangents)
        _, third = directional_derivative(closure, parameters, [-t for t in tangents])
        with torch.no_grad():
            linear.bias.zero_()
            linear.weight.zero_()
            assert closure() == 0  # nor are its own casts left behind
    assert fresh.item() != 0 and again.item() == fresh.item() == -third.item()


def test_compiled_functions_run_eagerly():
    def refuse(graph, example):
        raise AssertionError("compiled under forward-mode AD")

    linear = nn.Linear(4, 1)
    compiled = torch.compile(linear, backend=refuse)
    agrees_with = directional_derivative(lambda: linear(torch.ones(1, 4)), [linear.weight], direction([linear.weight]))
    arguments = [linear.weight], direction([linear.weight])
    assert directional_derivative(lambda: compiled(torch.ones(1, 4)), *arguments) == agrees_with


def test_torch_dynamo_is_not_imported():
    """It costs 70 MB; torch wraps the dispatch modes of others so that their first operator imports it."""
    code = """
        import sys, torch
        from pyzo.forward import directional_derivative
        weight = torch.ones(3, requires_grad=True)
        directional_derivative(lambda: weight.square().sum(), [weight], [torch.ones(3)])
        assert "torch._dynamo" not in sys.modules
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


# What would drop a tangent -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Iterator[torch.library.Library]:
    """Operators of the namespace pyzo_test that torch's forward-mode AD drops tangents in, or does not."""
    with torch.library._scoped_library("pyzo_test", "FRAGMENT") as library:
        library.define("kernel(Tensor x) -> Tensor")
        library.define("kernels(Tensor[] x, *, Tensor? scale=None) -> Tensor[]")
        library.define("write_(Tensor(a!) x, Tensor y) -> ()")
        library.define("composite(Tensor x) -> Tensor")
        library.define("around(Tensor x) -> Tensor")
        library.define("index(Tensor x) -> Tensor")
        for device in ("CPU", "CUDA"):
            library.impl("kernel", double, device)
            library.impl("kernels", lambda x, scale=None: [double(t) for t in x], device)
            library.impl("write_", lambda x, y: x.copy_(y).shape and None, device)
            library.impl("index", lambda x: x.argmax(), device)
        library.impl("composite", lambda x: x * 2, "CompositeImplicitAutograd")
        library.impl("around", lambda x: torch.ops.pyzo_test.kernel(x * 2), "CompositeImplicitAutograd")
        yield library


def double(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.detach().cpu().numpy() * 2).to(x.device)


@pytest.fixture(scope="module")
def custom_op() -> Callable[[torch.Tensor], torch.Tensor]:
    @torch.library.custom_op("pyzo_test::custom", mutates_args=())
    def custom(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    custom.register_autograd(lambda ctx, gradient: gradient * 2)
    return custom


@pytest.fixture
def weight(device: str) -> torch.Tensor:
    return torch.randn(5, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()


def derive(closure: Callable[[], torch.Tensor], weight: torch.Tensor) -> float:
    return directional_derivative(closure, [weight], direction([weight]))[1].item()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("kernel", lambda w: torch.ops.pyzo_test.kernel(w).exp()),
        ("kernel", lambda w: torch.ops.pyzo_test.kernel.default(w * 3)),
        ("kernels", lambda w: torch.ops.pyzo_test.kernels([torch.ones_like(w), w])[1]),
        ("kernels", lambda w: torch.ops.pyzo_test.kernels([torch.ones_like(w)], scale=w)[0]),
        ("write_", lambda w: torch.ops.pyzo_test.write_(torch.zeros_like(w), w) or w),
        ("kernel", lambda w: torch.ops.pyzo_test.around(w) + w),
    ],
)
def test_operators_without_a_rule_are_refused_by_name(library, weight, name, call):
    with pytest.raises(RuntimeError, match=rf"^pyzo_test::{name}: this operator has no forward-mode rule"):
        derive(lambda: call(weight).sum() + weight.sum(), weight)


class Twice(torch._ops.HigherOrderOperator):
    def __call__(self, x):
        return super().__call__(x)


def test_higher_order_operators_are_refused_by_name(weight):
    twice = Twice("pyzo_test_twice")
    twice.py_impl(torch._C.DispatchKey.CompositeExplicitAutograd)(lambda x: x * 2)
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA):
        twice.fallthrough(key)
    with pytest.raises(RuntimeError, match=r"^pyzo_test_twice: this operator has no forward-mode rule"):
        derive(lambda: twice(weight).sum() + weight.sum(), weight)
    value = derive(lambda: twice(torch.ones(5, device=weight.device)).sum() + weight.sum(), weight)
    assert value == pytest.approx(direction([weight])[0].sum().item(), rel=1e-5)


def test_custom_op_with_register_autograd_is_refused_by_name(custom_op, weight):
    with forward_ad.dual_level(), torch.no_grad():  # why: torch drops it silently
        dual = forward_ad.make_dual(weight, weight.detach())
        assert forward_ad.unpack_dual(custom_op(dual)).tangent is None
    with pytest.raises(RuntimeError, match=r"^pyzo_test::custom: this operator has no forward-mode rule"):
        derive(lambda: custom_op(weight).sum() + weight.sum(), weight)


def test_operators_of_pyzo_are_refused_too(weight):
    def closure():
        y = weight * 2
        pyzo.ops.noise_(y, seed=1, key=1, base=0, inner=0, stride=0, distribution=0)
        return y.sum()

    with pytest.raises(RuntimeError, match=r"^pyzo::noise_: this operator has no forward-mode rule"):
        derive(closure, weight)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_operators_that_cpp_calls_are_refused_by_name(custom_op, weight):
    @torch.jit.script
    def scripted(x: torch.Tensor) -> torch.Tensor:  # TorchScript's interpreter calls the operator from C++
        return torch.ops.pyzo_test.custom(x)

    with pytest.raises(RuntimeError, match="pyzo_test::custom: this operator has no forward-mode rule"):
        derive(lambda: scripted(weight).sum() + weight.sum(), weight)


def test_what_keeps_tangents_passes(library, custom_op, weight):
    total = direction([weight])[0].sum().item()

    def closure():
        constant = torch.ops.pyzo_test.kernel(torch.ones(5, device=weight.device)) + custom_op(
            weight.detach()
        )  # no tangent goes in
        position = torch.ops.pyzo_test.index(weight)  # an integer comes out
        buffer = torch.zeros(5, device=weight.device)
        torch.ops.pyzo_test.write_(buffer, constant)
        return torch.ops.pyzo_test.composite(weight).sum() + 0 * (buffer.sum() + position)

    assert derive(closure, weight) == pytest.approx(2 * total, rel=1e-5)


class Ruled(torch.autograd.Function):
    """An operator without a rule inside a Function that has one, written with a context."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_forward(x, w)
        return x * w + torch.ops.pyzo_test.kernel(w)

    @staticmethod
    def jvp(ctx, dx, dw):
        x, w = ctx.saved_tensors
        return (0 if dx is None else dx * w) + x * dw + 2 * dw


class ReadsInRule(torch.autograd.Function):
    """Gets a view of the parameter; the rule takes the parameter itself, as a plain value, from elsewhere."""

    @staticmethod
    def forward(ctx, view, read):
        ctx.read = read
        return view.square()

    @staticmethod
    def jvp(ctx, tangent, nothing):
        return 2 * ctx.read() * tangent


def test_a_function_with_a_rule_passes(library, weight):
    tangent = direction([weight])[0]
    value = derive(lambda: Ruled.apply(torch.full((5,), 3.0, device=weight.device), weight).sum(), weight)
    assert value == pytest.approx(5 * tangent.sum().item(), rel=1e-5)
    value = derive(lambda: ReadsInRule.apply(weight[:], lambda: weight * 1).sum(), weight)
    assert value == pytest.approx(2 * (tangent * weight).sum().item(), rel=1e-5)


class Unruled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, read=lambda x: x):
        return read(x) * 2


def test_a_function_without_a_rule_raises_torchs_error(weight):
    with pytest.raises(NotImplementedError, match="must implement the jvp function"):
        derive(lambda: Unruled.apply(weight).sum(), weight)


def test_a_function_that_reads_a_parameter_it_was_not_given_is_refused(weight):
    with pytest.raises(RuntimeError, match=r"Unruled: this torch.autograd.Function reads parameters\[0\]"):
        derive(
            lambda: Unruled.apply(torch.ones(5, device=weight.device), lambda x: x * weight).sum() + weight.sum(),
            weight,
        )


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing(weight):
    """Under frozen embeddings nothing that enters the first block carries a tangent: torch itself would not object."""
    block = nn.Linear(5, 5, device=weight.device)
    block.weight.requires_grad_(False)

    def closure(reentrant):
        out = torch.utils.checkpoint.checkpoint(
            lambda x: block(x) * weight, torch.ones(2, 5, device=weight.device), use_reentrant=reentrant
        )
        return out.sum() + weight.sum()

    with pytest.raises(
        RuntimeError, match=r"^torch\.utils\.checkpoint\.CheckpointFunction: .* pass use_reentrant=False"
    ):
        derive(lambda: closure(True), weight)
    agrees(lambda: closure(False), [weight])


@pytest.mark.parametrize(
    "loss", [lambda w: w.detach().sum(), lambda w: torch.ones_like(w).sum(), lambda w: w.data.sum()]
)
def test_a_loss_without_a_tangent_is_an_error(weight, loss):
    with pytest.raises(RuntimeError, match="closure: the loss carries no derivative"):
        derive(lambda: loss(weight), weight)


def test_a_derivative_of_zero_is_no_error(weight):
    assert derive(lambda: weight.round().sum(), weight) == 0.0
    assert derive(lambda: 0 * weight.sum(), weight) == 0.0


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "tangents", "message"),
    [
        ([], [], "at least one, got 0 and 0"),
        ([torch.ones(2)], [], "got 1 and 0"),
        ([torch.ones(2)], [torch.ones(3)], r"tangents\[0\]: expected .* of parameters\[0\]"),
        ([torch.ones(2)], [torch.ones(2, dtype=torch.bfloat16)], r"tangents\[0\]: .*bfloat16"),
        ([torch.ones(2, 3)], [torch.ones(3, 2).t()], r"tangents\[0\]: .*\(1, 2\)"),
        ([nn.Parameter(torch.ones(9)[3:])], [torch.ones(6)], r"storage offset.*new_tangents"),
        ([torch.ones(2, dtype=torch.int64)], [torch.ones(2)], r"parameters\[0\]: expected a floating-point tensor"),
    ],
)
def test_bad_parameters_and_tangents(parameters, tangents, message):
    with pytest.raises(ValueError, match=message):
        directional_derivative(lambda: pytest.fail("called"), parameters, tangents)


def test_a_parameter_twice(weight):
    with pytest.raises(ValueError, match="each tensor once"):
        directional_derivative(lambda: pytest.fail("called"), [weight, weight], direction([weight, weight]))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda w: 1.0, "got float"),
        (lambda w: w * 2, r"got torch.float32, shape \(5,\)"),
        (lambda w: w.argmax(), "got torch.int64"),
    ],
)
def test_bad_losses(weight, loss, message):
    with pytest.raises(TypeError, match=f"closure: expected it to return a floating-point tensor.*{message}"):
        derive(lambda: loss(weight), weight)
