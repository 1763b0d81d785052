"""Linear layers, exact, that do not save their input but what it is recomputed from."""

import torch
from torch import Tensor, nn

from pyzo import ops


class _Recomputing(nn.Module):
    """The parameters of `nn.Linear` (names, shapes, first values); its input is a function of what `forward` gets."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        function: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        ops.function_code(function)
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self.in_features, self.out_features, self.function = in_features, out_features, function
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def reset_parameters(self) -> None:
        """First values, as of `nn.Linear`."""
        nn.Linear.reset_parameters(self)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, function={self.function!r}"


class GatedLinear(_Recomputing):
    """A linear layer of h(gate) * up: gate and down projection of a gated MLP in one, which saves gate and up alone.

    4 bytes per element of 16-bit `gate`, where plain torch keeps 8 and `SwiGLU` before an `nn.Linear` 6. The state dict
    is that of the `nn.Linear` in its place.

    Args:
        in_features: I.
        out_features, bias, device, dtype: as of `nn.Linear`.
        function: h; as `FewBitActivation` takes it.

    Shape: `gate` and `up` [..., I] of one dtype; the result is [..., out].
    """

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.gate_linear(gate, up, self.weight, self.bias, self.function)


class ActivationLinear(_Recomputing):
    """A linear layer of h(x): activation and second linear of an MLP in one, which saves x alone.

    2 bytes per element of 16-bit `x`, where plain torch keeps 4. The state dict is that of the `nn.Linear` in its
    place.

    Args:
        in_features: I.
        out_features, bias, device, dtype: as of `nn.Linear`.
        function: h; as `FewBitActivation` takes it.

    Shape: `x` [..., I]; the result is [..., out].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        function: str = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, function, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.activation_linear(x, self.weight, self.bias, self.function)


__all__ = ["ActivationLinear", "GatedLinear"]
