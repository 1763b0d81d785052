"""Norms that keep what the linears behind them keep: which ones can, and what they emit."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyzo import ops
from pyzo.nn import MSLayerNorm, MSRMSNorm
from pyzo.nn.affine import _RECORD
from pyzo.nn.norm import _check_for_now, _MSNorm
from pyzo.ops.autograd import LAYER_DTYPES, autocasts

from .linears import set_twin
from .swap import Swapped

_MOST_ROWS = 64  # that a norm is tried on


@dataclass(frozen=True)
class NormKind:
    """What a norm computes, as found by running it.

    Attributes:
        centered, eps, weight_offset, affine, size: as of `pyzo.nn`'s norms.
        promotes: whether its output is of the wider of the dtypes of input and weight, not that of the input.
        widens: whether it returns float32 under autocast.
    """

    centered: bool
    eps: float
    weight_offset: float
    affine: bool
    size: int
    promotes: bool
    widens: bool


class _SharedNorm(Swapped):
    """A stock norm that keeps its output for backward. Without gradients it is the stock norm."""

    _kind: NormKind
    # "stock": the dtype that the stock norm emits; "autocast": its dtype where it is on; "twin": both, one tensor each.
    _emits: str

    def _prepare(self) -> None:
        kind = self._kind
        self._describe(kind.size, kind.eps, kind.affine, kind.weight_offset)
        self.check()
        self._checked = ()

    def forward(self, x: Tensor) -> Tensor:
        merged = self.affine != self._kind.affine
        if not merged and (not torch.is_grad_enabled() or x.dtype not in LAYER_DTYPES):
            return self._stock_forward(x)
        low = self._autocast_dtype(x)
        if self._emits != "twin" or low is None or low == self._stock_dtype(x) or torch.compiler.is_compiling():
            return _MSNorm.forward(self, x)
        if self._is_stale(x):
            self.check()
        y, twin = ops.norm_pair(
            x,
            self.weight,
            self.bias if self.centered else None,
            eps=self.eps,
            centered=self.centered,
            weight_offset=self.weight_offset,
            dtype=self._stock_dtype(x),
            low=low,
            from_input=self.saves_for(low) == "input",
        )
        set_twin(y, twin)
        return y

    def _autocast_dtype(self, x: Tensor) -> torch.dtype | None:
        if x.dtype == torch.float64 or not autocasts(x.device.type):
            return None
        return torch.get_autocast_dtype(x.device.type)

    def _stock_dtype(self, x: Tensor) -> torch.dtype:
        if self._kind.widens and self._autocast_dtype(x) is not None:
            return torch.float32
        if self._kind.promotes and self.weight is not None:
            return torch.promote_types(x.dtype, self.weight.dtype)
        return x.dtype

    def _dtype_for(self, x: Tensor) -> torch.dtype:
        low = self._autocast_dtype(x)
        return low if self._emits == "autocast" and low is not None else self._stock_dtype(x)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        record = getattr(self, _RECORD, None)
        for name, parameter in ({} if record is None else record.parameters).items():
            destination[f"{prefix}{name}"] = parameter if keep_vars else parameter.detach()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        _check_for_now(self)


class SharedLayerNorm(_SharedNorm, MSLayerNorm):
    """torch's LayerNorm, backward from its output."""


class SharedRMSNorm(_SharedNorm, MSRMSNorm):
    """An RMSNorm of torch or Hugging Face, backward from its output."""

    bias = None


def is_norm(module: nn.Module) -> bool:
    """Whether it may be a norm over the last dimension; `read_norm` finds out."""
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or _is_rms(module)


def _is_rms(module: nn.Module) -> bool:
    """An RMSNorm as Hugging Face's models define their own: by name here, by its results in `read_norm`."""
    name = type(module).__name__
    return (name.endswith("RMSNorm") or name == "T5LayerNorm") and not module._modules


def read_norm(module: nn.Module, x: Tensor, y: Tensor) -> NormKind | str:
    """What the norm computes, found by trying it on rows of its input; why it is no such norm, else."""
    size = x.shape[-1] if x.dim() else 0
    if isinstance(module, nn.LayerNorm):
        if type(module).forward is not nn.LayerNorm.forward:
            return "its class has a forward of its own"
        shape, eps, offsets, centered = module.normalized_shape, module.eps, (0.0,), True
    elif isinstance(module, nn.RMSNorm):
        if type(module).forward is not nn.RMSNorm.forward:
            return "its class has a forward of its own"
        if module.eps is None:
            return "eps is None, which means another number for each dtype"
        shape, eps, offsets, centered = module.normalized_shape, module.eps, (0.0,), False
    else:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        shape, offsets, centered = (size,), (0.0, 1.0), False
        if not isinstance(eps, float) or module._parameters.keys() - {"weight"}:
            return "it has other parameters than a weight and an eps"
    if tuple(shape) != (size,):
        return f"it is over {len(shape)} dimensions"
    parameters = [p for p in module.parameters(recurse=False)]
    if any(type(p) is not nn.Parameter or p.dtype not in LAYER_DTYPES or p.is_meta for p in parameters):
        return "its parameters are no ordinary floating-point tensors"
    if x.dtype not in LAYER_DTYPES or y.dtype not in LAYER_DTYPES:
        return f"its input is {x.dtype}"
    rows = x.reshape(-1, size)[:_MOST_ROWS]
    stock = _copy_of(module)
    with torch.autocast(x.device.type, enabled=False):
        want = stock.forward(rows.float())
        for offset in offsets:
            weight, bias = (getattr(stock, name, None) for name in ("weight", "bias"))
            got = ops.norm(rows.float(), weight, bias, eps=eps, centered=centered, weight_offset=offset)
            # Both are off by some rounding of sums of `size` numbers; a wrong formula is off by far more.
            if torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()), equal_nan=True):
                promotes = stock.forward(rows[:1].bfloat16()).dtype == torch.float32
                widens = _widens(stock, rows[:1])
                affine = bool(parameters)
                return NormKind(centered, eps, offset, affine, size, promotes, widens)
    return "its results are not those of LayerNorm or RMSNorm"


def _copy_of(module: nn.Module) -> nn.Module:
    """The norm itself, in float32, without hooks."""
    twin = type(module).__new__(type(module))
    vars(twin).update(copy.copy(vars(module)))
    twin._parameters = {
        name: None if p is None else nn.Parameter(p.detach().float(), requires_grad=False)
        for name, p in module._parameters.items()
    }
    return twin


def _widens(stock: nn.Module, row: Tensor) -> bool:
    if row.device.type not in ("cpu", "cuda"):
        return False
    low = torch.bfloat16
    with torch.autocast(row.device.type, low):
        return stock.forward(row.to(low)).dtype == torch.float32


__all__ = ["NormKind", "SharedLayerNorm", "SharedRMSNorm", "is_norm", "read_norm"]
