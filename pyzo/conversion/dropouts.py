"""Dropout whose mask is drawn again in backward, and PEFT's LoRA layers computed as one operator."""

from typing import Any

import torch
from torch import Tensor

from pyzo import ops

from .linears import MOST_DROPPED, adapted_linear, twin_of
from .swap import Swapped


class SeededDropout(Swapped):
    """nn.Dropout that keeps a seed; its masks are others than those of nn.Dropout."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not torch.is_grad_enabled() or self.inplace or not 0 < self.p <= MOST_DROPPED:
            return self._stock_forward(x)
        return ops.dropout(x, self.p)


class FusedAdapter(Swapped):
    """A LoRA layer of PEFT that keeps its input once, in the dtype in which its neighbours keep it, and no mask."""

    _low: bool  # whether a float32 adapter may be computed in 16 bits without autocast

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lora = adapted_linear(self, x) if torch.is_grad_enabled() and not args and not kwargs else None
        if lora is None:
            return self._stock_forward(x, *args, **kwargs)
        if not torch.compiler.is_compiling():
            x = twin_of(x)
        return ops.lora_linear(x, lora.weight, lora.bias, lora.a, lora.b, lora.scale, lora.p)
