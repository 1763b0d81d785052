"""Activations: applied by the linear behind them, which keeps their input alone, or with slopes from codes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyzo import ops
from pyzo.nn import Codebook

from .linears import Handover, SharingLinear, has_hooks, plain_linear
from .swap import Swapped

# Function of pyzo.ops by name of the class, as torch and Hugging Face name them; each is tried on real inputs.
_CLASSES = {
    "ReLU": "relu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "Mish": "mish",
    "MishActivation": "mish",
    "Softplus": "softplus",
    "ELU": "elu",
    "Hardswish": "hardswish",
}
_MOST_ELEMENTS = 1 << 16  # that an activation is tried on


class HandedOver(Swapped):
    """An activation that leaves its work to the linear behind it while their block says so."""

    _handover: Handover | None

    def forward(self, x: Tensor) -> Tensor:
        return self._stock_forward(x) if self._handover is None else self._handover.send(x)


class CodedActivation(Swapped):
    """An activation whose backward pass takes slopes from codes."""

    _function: str
    _codebook: Codebook

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._stock_forward(x)
        return ops.coded_activation(x, self._function, self._codebook.thresholds, self._codebook.slopes)


class OutputActivation(Swapped):
    """An activation whose backward pass works from its output."""

    _function: str

    def forward(self, x: Tensor) -> Tensor:
        return ops.output_activation(x, self._function) if torch.is_grad_enabled() else self._stock_forward(x)


Path = tuple[str, ...]


class HandoverBlock(Swapped):
    """The innermost module around activations and the linears that apply them.

    It lets them work together for the time of its own forward pass in training, and only where both are still what was
    converted: a linear that was wrapped since (by an adapter) gets the activation's output, as ever.
    """

    _pairs: tuple[tuple[Path, Path, str], ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._stock_forward(*args, **kwargs)
        ends: list[tuple[nn.Module, nn.Module, Handover]] = []
        for activation_path, linear_path, function in self._pairs:
            activation, linear = _at(self, activation_path), _at(self, linear_path)
            whole = isinstance(activation, HandedOver) and isinstance(linear, SharingLinear)
            if whole and not has_hooks(activation) and not has_hooks(linear):
                ends.append((activation, linear, Handover(function)))
        try:
            for activation, linear, handover in ends:
                activation._handover = linear._handover = handover
            result = self._stock_forward(*args, **kwargs)
            for _, _, handover in ends:
                handover.close()
            return result
        finally:
            for activation, linear, _ in ends:
                activation._handover = linear._handover = None


class RecomputingBlock(Swapped):
    """A layer of torch (nn.TransformerEncoderLayer), whose second linear applies the activation where it may."""

    _function: str

    def _ff_block(self, x: Tensor) -> Tensor:
        linear = plain_linear(self.linear2)
        drops = self.dropout.training and self.dropout.p > 0
        if linear is None or drops or has_hooks(self.dropout) or not torch.is_grad_enabled():
            return self._stock._ff_block(self, x)
        last = self.dropout2 if isinstance(self, nn.TransformerEncoderLayer) else self.dropout3
        return last(ops.activation_linear(self.linear1(x), *linear, self._function))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._stock_forward(*args, **kwargs)


def is_torch_layer(module: nn.Module) -> bool:
    """Whether it is a transformer layer of torch with an activation that is no module."""
    layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    known = any(isinstance(module, layer) and type(module)._ff_block is layer._ff_block for layer in layers)
    return known and module.activation in FUNCTIONALS


# Functions that layers of torch call without a module.
FUNCTIONALS = {functional.relu: "relu", functional.gelu: "gelu", functional.silu: "silu", functional.mish: "mish"}


def _at(module: nn.Module, path: Path) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path:
        found = None if found is None else found._modules.get(name)
    return found


def function_of(module: nn.Module) -> str | None:
    """The function that the class of an activation stands for; None for other modules."""
    if module._parameters or module._modules:
        return None
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _CLASSES.get(type(module).__name__)


def check_activation(module: nn.Module, function: str, x: Tensor) -> str:
    """Why an activation is not that function, found by trying it on its input; empty where it is."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"its input is {x.dtype}"
    some = x.reshape(-1)[:_MOST_ELEMENTS].float()
    with torch.autocast(x.device.type, enabled=False):
        want, got = module.forward(some.clone()), ops.activation(some, function)
    if torch.allclose(got, want, rtol=1e-5, atol=1e-5, equal_nan=True):
        return ""
    return f"its results are not those of {function!r}"
