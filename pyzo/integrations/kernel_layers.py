"""Activations in the form that the package `kernels` takes: no state, a `forward`, nothing else.

What they compute is `pyzo.nn.FewBitActivation` (2 bits) and `pyzo.nn.OutputActivation`.
"""

from types import SimpleNamespace

from torch import Tensor, nn

from pyzo import ops
from pyzo.nn.codebooks import PUBLISHED, codebook

# Names of layers in transformers -> what they compute.
FUNCTIONS = {
    "GeLU": "gelu",
    "GeluTanh": "gelu_tanh",
    "NewGELU": "gelu_tanh",
    "FastGELU": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
}
CHOICES = ("paper", "optimal", "derivative", "output")


def layer_name(function: str, choice: str) -> str:
    return f"{function}_{choice}"


def exists(function: str, choice: str) -> bool:
    """The paper has codebooks of GELU and SiLU only."""
    return choice != "paper" or function in PUBLISHED


def _coded(function: str, choice: str) -> type[nn.Module]:
    table = codebook(function, 2, choice)

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        return ops.coded_activation(input, function, table.thresholds, table.slopes)

    return _layer(function, choice, forward)


def _from_output(function: str) -> type[nn.Module]:
    def forward(self: nn.Module, input: Tensor) -> Tensor:
        return ops.output_activation(input, function)

    return _layer(function, "output", forward)


def _layer(function: str, choice: str, forward: object) -> type[nn.Module]:
    members = {"forward": forward, "has_backward": True, "can_torch_compile": True}
    return type(layer_name(function, choice), (nn.Module,), members)


# What a repository calls its `layers`.
layers = SimpleNamespace(
    **{
        layer_name(function, choice): _from_output(function) if choice == "output" else _coded(function, choice)
        for function in sorted(set(FUNCTIONS.values()))
        for choice in CHOICES
        if exists(function, choice)
    }
)
