"""Gated MLPs, down(h(gate(x)) * up(x)), which keep the results of gate and up alone."""

from typing import Any

import torch
from torch import Tensor, nn

from pyzo import ops

from .linears import adapted_linear, plain_linear
from .swap import Swapped


class GatedMLP(Swapped):
    """An MLP whose down projection computes the product anew in backward.

    The children are looked at in every call: a down projection with an adapter, put there before or after, is computed
    with it; any other module gets the product, which is then kept beside gate and up. Without gradients it is the stock
    MLP.
    """

    _parts: tuple[str, str, str]  # names of gate, up and down
    _activation: str  # name of h
    _function: str

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled() or args or kwargs:
            return self._stock_forward(x, *args, **kwargs)
        gate_proj, up_proj, down_proj = (self._modules[name] for name in self._parts)
        gate, up = gate_proj(x), up_proj(x)
        if gate.dtype != up.dtype:
            return down_proj(self._modules[self._activation](gate) * up)
        if (plain := plain_linear(down_proj)) is not None:
            return ops.gate_linear(gate, up, *plain, self._function)
        if (lora := adapted_linear(down_proj, gate)) is not None:
            adapter = {"a": lora.a, "b": lora.b, "scale": lora.scale, "p": lora.p}
            return ops.gate_linear(gate, up, lora.weight, lora.bias, self._function, **adapter)
        return down_proj(ops.gate(gate, up, self._function))


def check_gate(module: nn.Module, parts: tuple[str, str, str], function: str, x: Tensor, y: Tensor) -> str:
    """Why an MLP does not compute that formula, found by trying it; empty where it does."""
    gate_proj, up_proj, down_proj = (module._modules[name] for name in parts)
    if plain_linear(down_proj) is None and adapted_linear(down_proj) is None:
        return ""  # nothing but the product is computed in its place, and the dataflow says that it is one
    rows = x.reshape(-1, x.shape[-1])[:16]
    if any(m.training and isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules()):
        return ""  # of an adapter: no two passes agree
    want = module.forward(rows)
    got = down_proj(ops.gate(gate_proj(rows), up_proj(rows), function))
    error = torch.linalg.vector_norm((got - want).double())
    # The product is rounded once instead of twice; the sum over it rounds on.
    if error <= 16 * torch.finfo(y.dtype).eps * torch.linalg.vector_norm(want.double()):
        return ""
    return "its results are not those of down(h(gate(x)) * up(x))"
