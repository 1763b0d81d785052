"""Gated linears with an adapter: the eager formula, what is frozen, evaluated, compiled, and what is saved."""

import pytest
import torch
from bits import assert_same_bits
from test_lora import IN, OUT, RANK, TOKENS, hidden, trained
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pyzo import ops
from pyzo.memory import account
from pyzo.nn.lora import GatedLoRALinear


def gated(dropout: float = 0.5) -> GatedLoRALinear:
    torch.manual_seed(0)
    layer = GatedLoRALinear(nn.Linear(IN, OUT), RANK, 8, dropout, "gelu")
    nn.init.normal_(layer.lora_B.weight)
    return layer


def eager_gated(layer: GatedLoRALinear, gate: Tensor, up: Tensor, p: float) -> Tensor:
    """The formula in plain torch, with a mask drawn as the layer draws it."""
    product = functional.gelu(gate) * up
    return layer.base(product) + layer.scaling * layer.lora_B(layer.lora_A(ops.dropout(product, p)))


@pytest.mark.parametrize("wanted", range(1, 64))
def test_a_gated_layer_with_any_of_its_tensors_frozen(wanted):
    """Gradients of those that are not are the eager formula's; gate and up are results of the graph."""
    layer = gated()
    tensors = [hidden().detach(), hidden().detach() / 2 + 1, *layer.parameters()]
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(bool(wanted >> i & 1))
    chosen = [t for t in tensors if t.requires_grad]

    def gradients(run) -> tuple[Tensor, ...]:
        torch.manual_seed(9)
        return torch.autograd.grad(run(*(t * 1 for t in tensors[:2])).square().sum(), chosen)

    want = gradients(lambda gate, up: eager_gated(layer, gate, up, 0.5))
    for got, w in zip(gradients(layer), want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-4, atol=1e-4 * w.abs().max().item())


def test_a_gated_layer_in_evaluation_draws_nothing():
    layer, gate, up = gated().eval(), hidden(), hidden() + 1
    state = torch.get_rng_state()
    torch.testing.assert_close(layer(gate, up), eager_gated(layer, gate, up, 0.0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_gated_layer_checkpointed_and_compiled(autocast):
    layer, gate = gated(), hidden()

    def run(called) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return trained(lambda x: called(x, x + 1), layer, gate)

    plain = run(layer)
    for other in (
        lambda *x: checkpoint(layer, *x, use_reentrant=False),
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
    ):
        for got, want in zip(run(other), plain, strict=True):
            assert_same_bits(got, want)
    torch.compiler.reset()


def test_float32_adapters_on_a_16_bit_base(one_thread):
    """float32 adapters on a bfloat16 base, masks from torch's generator, none in eval mode, little saved."""
    gate = hidden(torch.bfloat16).detach().requires_grad_()
    up = (gate.detach() / 2 + 1).requires_grad_()
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    module = GatedLoRALinear(base, RANK, alpha=8, dropout=0.5)
    torch.testing.assert_close(module.eval()(gate, up), base(ops.gate(gate, up, "silu")))  # B is 0
    nn.init.normal_(module.lora_B.weight)

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        y = module.train()(gate, up)
        trained = [p for p in module.parameters() if p.requires_grad]
        return y.detach(), *torch.autograd.grad(y.float().sum(), (gate, up, *trained))

    torch.manual_seed(1)
    seed = torch.randint(2**63 - 1, (1,))
    adapter = {"a": module.lora_A.weight, "b": module.lora_B.weight, "scale": 2.0, "p": 0.5, "seed": seed}
    want = ops.gate_linear(gate, up, base.weight, base.bias, **adapter)
    for got, again in zip(run(), run(), strict=True):
        assert_same_bits(got, again)
    assert_same_bits(run()[0], want.detach())
    assert run()[4].dtype == torch.float32 and not torch.equal(module(gate, up), module(gate, up))
    kept = account(lambda: module(gate * 1, up * 1), module).nbytes
    assert kept == 2 * gate.nbytes + 2 * TOKENS * RANK + 8
    with pytest.raises(ValueError, match="function: expected one of"):
        GatedLoRALinear(base, RANK, function="swish")
