"""Linear layers behind a converted norm or activation, and what can be computed in their place."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyzo import ops
from pyzo.ops.autograd import LAYER_DTYPES, autocasts, product_dtype

from .swap import Swapped, foreign_forward

_TWIN = "_pyzo_twin"  # of a tensor: its copy in autocast's dtype, and the version that was copied


def set_twin(tensor: Tensor, twin: Tensor) -> None:
    """Notes that linears read `twin` where they are given `tensor`."""
    setattr(tensor, _TWIN, (twin, tensor._version))


def twin_of(tensor: Tensor) -> Tensor:
    """The copy that autocast would make, or the tensor itself where there is none or it was changed since."""
    twin, version = getattr(tensor, _TWIN, (None, None))
    if twin is None or tensor._version != version or product_dtype(tensor) != twin.dtype:
        return tensor
    return twin


class Handover:
    """An activation's input on its way to the linear that applies the activation to it, while their block runs."""

    def __init__(self, function: str) -> None:
        self.function = function
        self._sent: tuple[Tensor, int] | None = None

    def send(self, x: Tensor) -> Tensor:
        if self._sent is not None:
            raise RuntimeError(_CHANGED)
        self._sent = (x, x._version)
        return x

    def receive(self, x: Tensor) -> bool:
        """Whether `x` is what was sent."""
        if self._sent is None:
            return False
        (sent, version), self._sent = self._sent, None
        same = x is sent or (x.data_ptr() == sent.data_ptr() and x.numel() == sent.numel() and x.dtype == sent.dtype)
        if not same or sent._version != version:
            raise RuntimeError(_CHANGED)
        return True

    def close(self) -> None:
        if self._sent is not None:
            raise RuntimeError(_CHANGED)


_CHANGED = (
    "the output of an activation did not go straight to the linear that it went to when the model was converted: "
    "convert the model again (pyzo.convert), as its dataflow has changed"
)


class SharingLinear(Swapped):
    """A linear that reads the copy that a norm shares, and applies the activation before it where its block says so."""

    _handover: Handover | None

    def forward(self, x: Tensor) -> Tensor:
        if self._handover is not None and self._handover.receive(x):
            weight, bias = plain_linear(self)
            return ops.activation_linear(x, weight, bias, self._handover.function)
        if torch.compiler.is_compiling():
            return self._stock_forward(x)
        return self._stock_forward(twin_of(x))


class SharingAttention(Swapped):
    """nn.MultiheadAttention that reads the copy that a norm shares."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The same object where it was the same: one packed product projects all three then.
            query, key, value = twin_of(query), twin_of(key), twin_of(value)
        return self._stock_forward(query, key, value, *args, **kwargs)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a plain linear layer: nn.Linear or Hugging Face's Conv1D, with the forward of that class."""
    stock = module._stock if isinstance(module, Swapped) else type(module)
    if isinstance(module, nn.Linear):
        return stock.forward is nn.Linear.forward and _is_parametric(module)
    return _is_conv1d(stock) and _is_parametric(module)


def plain_linear(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight [out, in] and bias where nothing but these is in the way of computing a linear without calling it."""
    if not is_linear(module) or has_hooks(module) or foreign_forward(module):
        return None
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()
    return weight, module.bias


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_conv1d(cls: type) -> bool:
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in cls.__mro__)


def _is_parametric(module: nn.Module) -> bool:
    parameters = module._parameters
    if parameters.keys() - {"weight", "bias"} or module._modules or not isinstance(parameters.get("weight"), Tensor):
        return False
    return type(parameters["weight"]) is nn.Parameter and parameters["weight"].dtype in LAYER_DTYPES


@dataclass(frozen=True)
class Adapted:
    """A linear with one active LoRA adapter, as numbers."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    p: float


def is_lora(module: nn.Module) -> bool:
    """Whether it is PEFT's LoRA layer around a plain linear."""
    stock = module._stock if isinstance(module, Swapped) else type(module)
    return any(c.__name__ == "Linear" and c.__module__ == "peft.tuners.lora.layer" for c in stock.__mro__) and (
        stock.forward is next(c for c in stock.__mro__ if c.__module__ == "peft.tuners.lora.layer").forward
    )


def adapted_linear(module: nn.Module, x: Tensor | None = None) -> Adapted | None:
    """The parts of a LoRA layer of PEFT that does now what LoRA's formula says, else None: it computes itself.

    Args:
        module: any.
        x: its input, or another tensor of its dtype and device: PEFT computes a float32 adapter of a 16-bit input in
            float32 where autocast is off, which one operator in the input's dtype is not to replace, unless the layer
            was converted to ("low"). None: the dtype does not matter.
    """
    if not is_lora(module) or has_hooks(module) or foreign_forward(module):
        return None
    if module.disable_adapters or module.merged:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1 or active[0] in getattr(module, "lora_variant", {}):
        return None
    name = active[0]
    base, a, b = module.base_layer, module.lora_A[name], module.lora_B[name]
    dropout = module.lora_dropout[name]
    found = plain_linear(base)
    if found is None or any(plain_linear(part) is None or part.bias is not None for part in (a, b)):
        return None
    if not isinstance(dropout, (nn.Dropout, nn.Identity)) or has_hooks(dropout):
        return None
    low = getattr(module, "_low", False) or x is None or autocasts(x.device.type)
    if not low and any(part.weight.dtype != x.dtype for part in (a, b)):
        return None
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    if p > MOST_DROPPED:
        return None
    return Adapted(*found, a.weight, b.weight, float(module.scaling[name]), p)


MOST_DROPPED = 1 - 2.0**-16  # beyond it operators of pyzo have no mask to draw
