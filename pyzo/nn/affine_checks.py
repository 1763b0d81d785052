"""What `merge_affine_` works on: a norm's affine part and the linears that read it, checked before use."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyzo.nn.lora import GatedLoRALinear, LoRALinear

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Parts of the names of linears with quantised weights: bitsandbytes, GPTQ, AWQ, HQQ, EETQ, AQLM.
_QUANTISED = ("Linear4bit", "Linear8bitLt", "QuantLinear", "WQLinear", "HQQLinear", "EetqLinear", "QuantizedLinear")
# Attributes of PEFT's LoRA layers that change what an adapter computes: DoRA and other variants, embeddings.
_VARIANTS = ("lora_magnitude_vector", "lora_variant", "lora_embedding_A", "lora_embedding_B")
_BLOCK = 1 << 22  # elements that are in fp64 at a time
_NAMED = 8  # columns that an error lists


@dataclass(frozen=True)
class Matrix:
    """A weight as [out, in], whatever its layout: what multiplies the output of the norm."""

    name: str
    tensor: Tensor

    def blocks(self) -> tuple[Tensor, ...]:
        """Views of some rows each, so that work in fp64 takes little memory."""
        return self.tensor.split(max(1, _BLOCK // max(1, self.tensor.shape[1])))


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: adds scaling * B A to its linear while it is active."""

    a: Matrix
    b: Tensor
    scaling: float
    active: bool


@dataclass(frozen=True)
class Consumer:
    """A linear that reads the norm, with the adapters around it."""

    name: str
    linear: nn.Module
    weight: Matrix
    adapters: tuple[Adapter, ...]

    def matrices(self) -> Iterator[Matrix]:
        yield self.weight
        yield from (adapter.a for adapter in self.adapters)

    def written(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors that a merge changes."""
        yield from ((matrix.name, matrix.tensor) for matrix in self.matrices())
        if self.linear.bias is not None:
            yield f"{self.name}.bias", self.linear.bias


def columns(where: Tensor) -> str:
    found = where.nonzero().flatten().tolist()
    return f"columns {found[:_NAMED]}" + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")


def read_norm(norm: nn.Module) -> dict[str, nn.Parameter]:
    """The norm's parameters, checked."""
    if not isinstance(norm, nn.Module) or isinstance(norm, nn.modules.batchnorm._NormBase | nn.GroupNorm):
        raise TypeError(f"norm: expected a norm over the last dimension, got {type(norm).__name__}")
    found = {}
    for name in ("weight", "bias"):
        value = getattr(norm, name, None)
        if value is None:
            continue
        _check_parameter(f"norm.{name}", norm, name)
        if value.dim() != 1:
            raise ValueError(f"norm.{name}: expected one dimension, got {list(value.shape)}")
        found[name] = value
    if not found:
        raise ValueError("norm: expected weight, bias or both, got neither: there is nothing to merge")
    if len({value.numel() for value in found.values()}) > 1:
        raise ValueError(f"norm.bias: expected {list(norm.weight.shape)} like weight, got {list(norm.bias.shape)}")
    return found


def affine_of(norm: nn.Module, parameters: dict[str, nn.Parameter]) -> tuple[Tensor, Tensor]:
    """gamma and beta, finite, in fp64."""
    some = next(iter(parameters.values())).detach().double()
    gamma, beta = torch.ones_like(some), torch.zeros_like(some)
    if "weight" in parameters:
        gamma = getattr(norm, "weight_offset", 0.0) + parameters["weight"].detach().double()
    if "bias" in parameters:
        beta = parameters["bias"].detach().double()
    for name, value in (("gamma", gamma), ("beta", beta)):
        if not (finite := value.isfinite()).all():
            raise ValueError(f"norm: expected a finite {name}, got other values in {columns(~finite)}")
    return gamma, beta


def remove_affine(norm: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, Any]:
    """Leaves the norm affine-free; returns the flags that said it was not."""
    flags = {flag: getattr(norm, flag) for flag in ("elementwise_affine", "affine") if hasattr(norm, flag)}
    for flag in flags:  # a class that has one works without parameters
        setattr(norm, flag, False)
    for name, parameter in parameters.items():
        if flags:
            norm.register_parameter(name, None)
        else:
            neutral = 1.0 - getattr(norm, "weight_offset", 0.0) if name == "weight" else 0.0
            delattr(norm, name)  # one element of the same dtype, so that the output keeps the dtype it had
            norm.register_buffer(name, torch.full_like(parameter.detach()[:1], neutral), persistent=False)
    return flags


def restore_affine(norm: nn.Module, parameters: dict[str, nn.Parameter], flags: dict[str, Any]) -> None:
    for flag, value in flags.items():
        setattr(norm, flag, value)
    for name, parameter in parameters.items():
        if not flags:
            delattr(norm, name)
        norm.register_parameter(name, parameter)


@torch.no_grad()
def try_norm(norm: nn.Module, parameters: dict[str, nn.Parameter], gamma: Tensor, beta: Tensor) -> None:
    """Runs one row with and without the affine part, which must differ by gamma and beta as they were read."""
    some = next(iter(parameters.values()))
    steps = torch.arange(some.numel(), device=some.device)
    row = ((1 - 2 * (steps % 2)) * (1 + steps / some.numel())).to(some.dtype)[None]  # far from zero everywhere
    with torch.autocast(some.device.type, enabled=False):
        affine = norm.forward(row).double()
        flags = remove_affine(norm, parameters)
        try:
            normalised = norm.forward(row)
        except (TypeError, AttributeError, RuntimeError) as error:
            raise TypeError(
                f"norm: expected one that works without its parameters, got {type(norm).__name__}"
            ) from error
        finally:
            restore_affine(norm, parameters, flags)
    finfo = torch.finfo(normalised.dtype)
    eps = max(finfo.eps, torch.finfo(torch.float32).eps)  # many a norm computes in fp32
    normalised = normalised.double()
    allowed = 8 * eps * (gamma.abs() * normalised.abs().amax() + beta.abs()) + finfo.smallest_normal
    if not ((affine - (gamma * normalised + beta)).abs() <= allowed).all():
        raise ValueError(
            f"norm: expected one that multiplies by weight_offset + weight with weight_offset = "
            f"{getattr(norm, 'weight_offset', 0.0)} and adds bias, got other results from {type(norm).__name__} (set "
            "norm.weight_offset = 1.0 where it multiplies by 1 + weight, as Gemma's does)"
        )


def read_consumers(consumers: Iterable[nn.Module], size: int) -> tuple[list[nn.Module], list[Consumer]]:
    """The consumers as they came and as they are, of `size` inputs, checked one by one and against each other."""
    if isinstance(consumers, nn.Module) and not isinstance(consumers, nn.ModuleList):
        raise TypeError(f"consumers: expected several modules, got one {type(consumers).__name__}")
    modules = list(consumers)
    if not modules:
        raise ValueError("consumers: expected all readers of the norm, got none")
    read = []
    owners: dict[int, str] = {}
    for i, module in enumerate(modules):
        if any(module is earlier for earlier in modules[:i]):
            raise ValueError(f"consumers[{i}]: expected every consumer once, got one twice")
        read.append(_read_consumer(f"consumers[{i}]", module, size))
        for name, tensor in read[-1].written():
            owner = owners.setdefault(tensor.untyped_storage()._cdata, name)
            if owner != name:
                raise ValueError(
                    f"{name}: expected memory of its own, got memory shared with {owner}: it would change twice"
                )
    return modules, read


def _read_consumer(name: str, module: nn.Module, size: int) -> Consumer:
    if isinstance(module, LoRALinear) and not isinstance(module, GatedLoRALinear):  # whose input is no norm's output
        weight = _read_linear(f"{name}.base", module.base, size)
        a = _read_linear(f"{name}.lora_A", module.lora_A, size)
        b = _read_linear(f"{name}.lora_B", module.lora_B, a.tensor.shape[0])
        return Consumer(f"{name}.base", module.base, weight, (Adapter(a, b.tensor, float(module.scaling), True),))
    adapted = all(isinstance(getattr(module, part, None), nn.ModuleDict) for part in ("lora_A", "lora_B"))
    if not adapted:
        return Consumer(name, module, _read_linear(name, module, size), ())
    if variants := [part for part in _VARIANTS if getattr(module, part, None)]:
        raise TypeError(
            f"{name}: expected plain LoRA, got a variant ({', '.join(variants)}): its output is not W x + s B A x"
        )
    if getattr(module, "merged", False):
        raise ValueError(f"{name}: expected an adapter that is not merged, got a merged one: unmerge the adapter first")
    base = module.base_layer
    weight = _read_linear(f"{name}.base_layer", base, size)
    active = () if getattr(module, "disable_adapters", False) else getattr(module, "active_adapters", module.lora_A)
    adapters = []
    for key, down in module.lora_A.items():
        a = _read_linear(f"{name}.lora_A[{key!r}]", down, size)
        b = _read_linear(f"{name}.lora_B[{key!r}]", module.lora_B[key], a.tensor.shape[0])
        adapters.append(Adapter(a, b.tensor, float(module.scaling[key]), key in active))
    return Consumer(f"{name}.base_layer", base, weight, tuple(adapters))


def _read_linear(name: str, module: nn.Module, size: int) -> Matrix:
    classes = [cls.__name__ for cls in type(module).__mro__]
    weight = getattr(module, "weight", None)
    if hasattr(module, "qweight") or any(part in cls for cls in classes for part in _QUANTISED):
        raise TypeError(f"{name}: {_quantised(type(module).__name__)}")
    transposed = "Conv1D" in classes and hasattr(module, "nf")
    if not (transposed or isinstance(module, nn.Linear)) or not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected torch.nn.Linear, Conv1D or a LoRA layer, got {type(module).__name__}")
    if more := [*(module._parameters.keys() - {"weight", "bias"}), *module._modules]:
        raise TypeError(
            f"{name}: expected weight and bias alone, got {', '.join(sorted(more))} in {type(module).__name__}"
        )
    for part in ("weight", "bias"):
        if getattr(module, part, None) is not None:
            _check_parameter(f"{name}.{part}", module, part)
    matrix = weight.detach().t() if transposed else weight.detach()
    if matrix.dim() != 2 or matrix.shape[1] != size:
        raise ValueError(f"{name}.weight: expected {size} input features, got {list(weight.shape)}")
    return Matrix(f"{name}.weight", matrix)


def _check_parameter(name: str, module: nn.Module, part: str) -> None:
    """A plain parameter of the module itself, in a dtype that rounding is defined for."""
    value = getattr(module, part)
    if module._parameters.get(part) is not value:
        raise TypeError(f"{name}: expected a parameter of the module, got a computed tensor (parametrised?)")
    if value.dtype not in _DTYPES or type(value) is not nn.Parameter:
        raise TypeError(f"{name}: {_quantised(f'{type(value).__name__} of {value.dtype}')}")
    if value.is_meta:
        raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")


def _quantised(what: str) -> str:
    return (
        f"expected an ordinary fp16, bf16, fp32 or fp64 tensor, got {what}: gamma cannot be folded into a quantised or "
        "sharded weight. Merge first, then quantise (of the transposed weight, [in, out], where a format takes blocks "
        "along rows: no block then mixes several gammas)"
    )
