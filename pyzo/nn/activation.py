"""Activation modules with exact forward passes that save a few bits per element, or nothing beside their output."""

from collections.abc import Sequence

from torch import Tensor, nn

from pyzo import ops

from .codebooks import Codebook
from .codebooks import codebook as make_codebook

Table = str | Codebook | tuple[Sequence[float], Sequence[float]]


class FewBitActivation(nn.Module):
    """h(x), exact; in backward a step function of x stands for h', of which `bits` bits per element are saved.

    Where the next linear does not keep the output (frozen weights without an adapter), this takes the place of the
    input that torch would save: `bits` / 16 of it in 16-bit precision. The gradient is an approximation (but for
    ReLU); "derivative" is the closest to the true one (`pyzo.nn.codebooks`). A NaN in x passes forward; its gradient is
    that of the first segment.

    Args:
        function: "gelu" (with erf), "gelu_tanh", "quick_gelu", "silu", "mish", "softplus", "elu", "hardswish" or
            "relu", which 1 bit represents exactly.
        bits: 1 to 4.
        codebook: "derivative" (least squared error of h'; Few-Bit Backward, arXiv 2202.00441), "optimal" (least squared
            error of h: the objective of LowMemoryBP, arXiv 2406.16282, solved exactly), "paper" (that paper's
            constants), or a table: a Codebook or (thresholds, slopes).

    Shape: any; float32, bfloat16 or float16 (float64 on the CPU).
    """

    def __init__(self, function: str, bits: int = 2, codebook: Table = "derivative"):
        super().__init__()
        ops.function_code(function)
        self.function = function
        self.kind = codebook if isinstance(codebook, str) else "table"
        self.codebook = make_codebook(function, bits, codebook)

    def forward(self, x: Tensor) -> Tensor:
        return ops.coded_activation(x, self.function, self.codebook.thresholds, self.codebook.slopes)

    def extra_repr(self) -> str:
        return f"{self.function!r}, bits={self.codebook.bits}, codebook={self.kind!r}"


class ReGELU2(FewBitActivation):
    """GELU (with erf) whose backward pass needs 2 bits per element (LowMemoryBP, arXiv 2406.16282, Eq. 13).

    Args:
        codebook: "paper" (the published constants), "optimal" or "derivative", or a table; see `FewBitActivation`.
    """

    def __init__(self, codebook: Table = "paper"):
        super().__init__("gelu", 2, codebook)

    def extra_repr(self) -> str:
        return f"codebook={self.kind!r}"


class ReSiLU2(FewBitActivation):
    """SiLU whose backward pass needs 2 bits per element (LowMemoryBP, arXiv 2406.16282, Eq. 14).

    In a gated MLP, `ReSiLU2()(gate) * up`, it keeps the output, `up` and the product beside the codes: 6.25 bytes per
    element in 16-bit precision, where the exact `SwiGLU` keeps 6 and the exact `GatedLinear` 4.

    Args:
        codebook: "paper" (the published constants), "optimal" or "derivative", or a table; see `FewBitActivation`.
    """

    def __init__(self, codebook: Table = "paper"):
        super().__init__("silu", 2, codebook)

    def extra_repr(self) -> str:
        return f"codebook={self.kind!r}"


class OutputActivation(nn.Module):
    """h(x), exact; backward takes h' from the output and one bit per element (which side of the minimum x lay on).

    Where the next linear keeps the output anyway (trainable weights, or an adapter), this adds 1/8 byte per element to
    it, and nothing for "relu", "softplus" and "elu". Near-exact: see `pyzo.ops.output_activation` for the error.

    Args:
        function: as `FewBitActivation` takes it.
    """

    def __init__(self, function: str):
        super().__init__()
        ops.function_code(function)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return ops.output_activation(x, self.function)

    def extra_repr(self) -> str:
        return repr(self.function)


__all__ = ["FewBitActivation", "OutputActivation", "ReGELU2", "ReSiLU2"]
