"""Frozen linears with a low-rank adapter, whose dropout keeps neither a mask nor a copy."""

import math

import torch
from torch import Tensor, nn

from pyzo.ops.activations import function_code
from pyzo.ops.autograd import check_float
from pyzo.ops.dropouts import check_probability
from pyzo.ops.linear import gate_linear
from pyzo.ops.lora import lora_linear


class LoRALinear(nn.Module):
    """base(x) + alpha / r B A dropout(x) (LoRA, arXiv 2106.09685), saving x once, [tokens, r] numbers and a seed.

    The input is saved as it came, so several of these on one input, and whoever else saves it, share one storage; eager
    layers with dropout keep a mask and a dropped copy each. A is drawn as PEFT draws it (`kaiming_uniform_`, a =
    sqrt(5)), B is 0: at first the layer computes what its base does. Parameters are named `base.weight`, `base.bias`,
    `lora_A.weight` [r, in] and `lora_B.weight` [out, r]; `base`, `lora_A` and `lora_B` are not called as modules, so
    hooks on them do not run.

    Args:
        base: the linear to adapt; its parameters are frozen. Not one whose weight is quantised.
        r: rank, >= 1.
        alpha: the adapter is scaled by alpha / r; None: alpha = r.
        dropout: probability in [0, 1 - 2^-17) with which elements of the adapter's input are zeroed while training,
            resolved to 2^-16.

    The adapter is float32 where the base is of 16 bits (as in PEFT), else of its dtype, on its device. Without autocast
    everything is computed in the dtype of x, under autocast in its dtype (`pyzo.ops.lora_linear`).

    Shapes: [..., in] to [..., out].
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear) or type(base).forward is not nn.Linear.forward:
            raise TypeError(
                f"base: expected a torch.nn.Linear, or a subclass with its forward, got {type(base).__name__}"
            )
        check_float("base.weight", base.weight)
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"r: expected an integer >= 1, got {r!r}")
        check_probability(dropout)
        self.base = base.requires_grad_(False)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=device, dtype=dtype)
        self.scaling = (r if alpha is None else alpha) / r
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws A anew and sets B to 0."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        base = self.base
        return lora_linear(x, base.weight, base.bias, self.lora_A.weight, self.lora_B.weight, self.scaling, p)

    def extra_repr(self) -> str:
        return f"scaling={self.scaling}, dropout={self.dropout}"


class GatedLoRALinear(LoRALinear):
    """A `LoRALinear` of h(gate) * up: the down projection of a gated MLP with an adapter, saving gate and up alone.

    4 bytes per element of 16-bit `gate`, and [tokens, r] numbers and a seed; plain torch with dropout keeps 9 (10 on
    the CPU, whose masks are of the input's dtype). Without autocast the base has the dtype of `gate`.

    Args:
        base, r, alpha, dropout: as of `LoRALinear`.
        function: h; as `FewBitActivation` takes it.

    Shapes: `gate` and `up` [..., in] of one dtype, to [..., out].
    """

    def __init__(
        self, base: nn.Linear, r: int, alpha: float | None = None, dropout: float = 0.0, function: str = "silu"
    ) -> None:
        super().__init__(base, r, alpha, dropout)
        function_code(function)
        self.function = function

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        base = self.base
        adapter = {"a": self.lora_A.weight, "b": self.lora_B.weight, "scale": self.scaling}
        p = self.dropout if self.training else 0.0
        return gate_linear(gate, up, base.weight, base.bias, self.function, **adapter, p=p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, function={self.function!r}"
