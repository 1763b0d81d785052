"""Gated products, exact, of which only gate and up are saved."""

from torch import Tensor, nn

from pyzo import ops


class _Gate(nn.Module):
    function: str

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """h(gate) * up; without `up`, `gate` holds both along the last dimension: gate first, then up."""
        if up is None:
            if gate.dim() == 0 or gate.shape[-1] % 2:
                raise ValueError(f"gate: expected an even last dimension, as up is in it, got shape {list(gate.shape)}")
            gate, up = gate.chunk(2, -1)
        return ops.gate(gate, up, self.function)


class SwiGLU(_Gate):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202), exact; saves gate and up, from which backward recomputes silu.

    In 16-bit precision that is 4 bytes per element where plain torch keeps 6, and 2 more of either for the linear after
    it, which `GatedLinear` does without. `ReSiLU2()(gate) * up`, the gate of LowMemoryBP (arXiv 2406.16282), is the
    larger one, 6.25 bytes with the linear's input against 6 here and 4 there, and an approximation.

    Shape: `gate` and `up` [..., I], or one tensor [..., 2 I], gate first, then up; the result is [..., I].
    float32, bfloat16 or float16 (float64 on the CPU).
    """

    function = "silu"


class GEGLU(_Gate):
    """gelu(gate) * up (Shazeer 2020, arXiv 2002.05202), exact; what is saved is what `SwiGLU` saves.

    Args:
        approximate: "none" (GELU with erf) or "tanh", as `nn.GELU` has it.

    Shape: as of `SwiGLU`.
    """

    def __init__(self, approximate: str = "none"):
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
        self.approximate = approximate
        self.function = "gelu" if approximate == "none" else "gelu_tanh"

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


__all__ = ["GEGLU", "SwiGLU"]
