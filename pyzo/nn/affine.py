"""`merge_affine_` and `unmerge_affine_`: gamma and beta of a norm folded into every linear that reads it, and back."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyzo.nn.affine_checks import (
    Consumer,
    Matrix,
    affine_of,
    columns,
    read_consumers,
    read_norm,
    remove_affine,
    restore_affine,
    try_norm,
)

_RECORD = "_merged_affine"  # the attribute of a merged norm


@dataclass
class _Record:
    """What `unmerge_affine_` needs: the norm's own parameters and whom they went to.

    Consumers are held weakly, so that one that is replaced (by its quantised form, for one) can be freed, but copied
    and pickled with the norm: a copy of the model unmerges on its own.
    """

    parameters: dict[str, nn.Parameter]  # "weight", "bias": those that the norm had
    flags: dict[str, Any]  # the norm's affine flags
    consumers: tuple[Callable[[], nn.Module | None], ...]
    linears: tuple[Callable[[], nn.Module | None], ...]  # inside the consumers
    created: tuple[bool, ...]  # by linear: its bias is ours
    lost: str  # columns that cannot be unmerged, in words

    def find(self) -> list[nn.Module]:
        """The consumers that were merged; the linear alone where a wrapper around it is gone."""
        found = []
        for i, (consumer, linear) in enumerate(zip(self.consumers, self.linears, strict=True)):
            module = consumer() or linear()
            if module is None:
                raise ValueError(
                    f"consumers[{i}]: expected the module that was merged, got none: it was replaced since"
                )
            found.append(module)
        return found

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("consumers", "linears"):
            state[name] = tuple(reference() for reference in state[name])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in ("consumers", "linears"):
            setattr(self, name, tuple(map(_reference, state[name])))


def _none() -> None:
    return None


def _reference(module: nn.Module | None) -> Callable[[], nn.Module | None]:
    return _none if module is None else weakref.ref(module)


def merge_affine_(norm: nn.Module, consumers: Iterable[nn.Module]) -> None:
    """Folds a norm's gamma and beta into all that reads its output; the norm then only normalises.

    With x̂ the normalised input and z = gamma x̂ + beta: W z + b = (W diag(gamma)) x̂ + (b + W beta), the paper form of
    MS-LayerNorm and MS-RMSNorm (LowMemoryBP, arXiv 2406.16282). Computed in fp64 on the weight's device, each element
    rounded once to its dtype. A consumer without bias gets one where beta is not all zero, as trainable as the norm's.
    Everything is checked before anything is written.

    `consumers` must be *all* readers of the norm. Whoever else reads it (a residual after a post-norm, a router, a
    returned hidden state) reads x̂ from now on. A weight that is also used elsewhere (an output head tied to the
    embedding) changes there too: that cannot be seen from here, except between two consumers. The norm's parameters
    leave `parameters()` and the state dict (a torch or pyzo norm then holds None; one that cannot do without, like
    Hugging Face's LlamaRMSNorm, a neutral value in a buffer that is not saved); what undoes the merge stays with the
    norm through `deepcopy` and pickle, not in the state dict. Weights change in place: merge between optimizer steps,
    with gradients cleared, and give created biases to the optimizer. Training goes on in other coordinates: the
    gradient of a merged weight is that of the plain one divided by gamma, column by column.

    LoRA layers (`LoRALinear` and PEFT's, given whole, not their base layer): A <- A diag(gamma), and the constant
    scaling * B A beta of the active adapters joins the base bias. The function is unchanged at that moment, whatever
    the adapters hold; later training of A and B no longer moves that constant, and LoRA dropout, which acts on x̂ then,
    no longer drops it.
    Quantised weights are refused: merge, then quantise. A block-wise format like NF4 that takes blocks along `in` would
    mix many gammas in one block (output error 0.122 to 0.149 against 0.092 for spread gammas); quantise the transposed
    weight [in, out], whose blocks have one gamma each.

    Args:
        norm: a norm over the last dimension of size d with `weight` [d], `bias` [d] or both, in fp16, bf16, fp32 or
            fp64: torch.nn.LayerNorm, torch.nn.RMSNorm, LlamaRMSNorm, pyzo's. An attribute `weight_offset` says that it
            multiplies by weight_offset + weight (1.0 for Gemma). Both this and that the norm works without its
            parameters is tried on one row.
        consumers: torch.nn.Linear, Conv1D of transformers (weight [in, out]), PEFT LoRA layers around one, or
            `LoRALinear`.

    Raises:
        TypeError: a norm or consumer of another kind, DoRA and other LoRA variants, a quantised weight.
        ValueError: sizes that differ, tensors shared between consumers, a merged norm or adapter, gamma, beta or
            results that are not finite, an inactive adapter whose constant would be lost.
    """
    if _RECORD in getattr(norm, "__dict__", {}):
        raise ValueError("norm: expected one that is not merged, got a merged one (unmerge_affine_ undoes it)")
    parameters = read_norm(norm)
    gamma, beta = affine_of(norm, parameters)
    modules, read = read_consumers(consumers, gamma.numel())
    fold = _Fold(gamma, beta, divide=False)
    lost = "; ".join(filter(None, (fold.check(matrix) for consumer in read for matrix in consumer.matrices())))
    biases = [fold.bias(consumer) for consumer in read]
    try_norm(norm, parameters, gamma, beta)

    created = []
    for consumer, bias in zip(read, biases, strict=True):
        created.append(bias is not None and consumer.linear.bias is None)
        fold.write(consumer)
        if created[-1]:
            consumer.linear.bias = nn.Parameter(bias, requires_grad=parameters["bias"].requires_grad)
        elif bias is not None:
            consumer.linear.bias.detach().copy_(bias)
    flags = remove_affine(norm, parameters)
    for parameter in parameters.values():
        parameter.grad = None  # an optimizer that still holds it must not move it
    linears = (consumer.linear for consumer in read)
    record = _Record(
        parameters, flags, tuple(map(_reference, modules)), tuple(map(_reference, linears)), tuple(created), lost
    )
    setattr(norm, _RECORD, record)


def unmerge_affine_(norm: nn.Module, consumers: Iterable[nn.Module] | None = None) -> None:
    """Undoes `merge_affine_`: the norm gets its own parameters back, the consumers the weights that go with them.

    W <- W' / gamma and b <- b' - W beta, with W as it now rounds, in fp64, each element rounded once to its dtype; LoRA
    layers likewise, from the adapters as they are now. So the function stays what it is, trained or not. No copy of W
    is kept, so untrained weights come back up to two roundings: |error| <= 1.05 eps |W_ij|, or 2.1 eps max_i |W_ij|
    where W'_ij is subnormal, with the eps of the dtype. gamma and beta are the norm's own Parameter objects, bit for
    bit. A bias that the merge created goes again where nothing but rounding is left in it,
    |b_i| <= (2 eps + 2 d 2^-53) sum_j |W_ij beta_j|; one that was trained stays. Everything is checked before anything
    is written.

    Args:
        norm: one that `merge_affine_` merged, or a copy of it that was made together with the consumers.
        consumers: the consumers as they are now, where they were wrapped since (LoRA put around a merged linear); None:
            those that were merged.

    Raises:
        ValueError: the norm is not merged; columns whose gamma is zero, or so small that merged numbers were subnormal
            and W' / gamma was off by more than 1.5 eps max_i |W_ij| in some consumer, by number; weights that would
            not be finite; consumers that are gone or others than were merged.
        TypeError, ValueError: what `merge_affine_` refuses.
    """
    record = getattr(norm, "__dict__", {}).get(_RECORD)
    if record is None:
        raise ValueError("norm: expected one that merge_affine_ merged, got one without a record of a merge")
    gamma, beta = affine_of(norm, record.parameters)
    if record.lost:
        raise ValueError(f"norm: expected a gamma that can be divided by, got a merge that lost {record.lost}")
    if (zeros := gamma == 0).any():
        raise ValueError(f"norm: expected a gamma that can be divided by, got zero in {columns(zeros)}")
    _, read = read_consumers(record.find() if consumers is None else consumers, gamma.numel())
    position = {id(linear()): i for i, linear in enumerate(record.linears) if linear() is not None}
    if sorted(position.get(id(c.linear), -1) for c in read) != list(range(len(record.linears))):
        raise ValueError(f"consumers: expected the {len(record.linears)} linears that were merged, got others")
    fold = _Fold(gamma, beta, divide=True)
    for consumer in read:
        for matrix in consumer.matrices():
            fold.check(matrix)
    biases = [fold.bias(consumer) for consumer in read]
    left = [
        record.created[position[id(c.linear)]] and fold.only_rounding(c, b) for c, b in zip(read, biases, strict=True)
    ]

    for consumer, bias, remove in zip(read, biases, left, strict=True):
        fold.write(consumer)
        if remove:
            consumer.linear.register_parameter("bias", None)
        elif bias is not None:
            consumer.linear.bias.detach().copy_(bias)
    for parameter in record.parameters.values():
        parameter.data = parameter.data.to(read[0].linear.weight.device)  # where the model may have moved
    restore_affine(norm, record.parameters, record.flags)
    delattr(norm, _RECORD)


@dataclass(frozen=True)
class _Fold:
    """Multiplies columns by gamma and adds W beta to the bias, or divides and subtracts."""

    gamma: Tensor
    beta: Tensor
    divide: bool

    def folded(self, block: Tensor) -> Tensor:
        gamma = self.gamma.to(block.device)
        return (block.double() / gamma if self.divide else block.double() * gamma).to(block.dtype)

    def plain(self, block: Tensor) -> Tensor:
        """What goes with the norm's own gamma and beta, in fp64."""
        return (self.folded(block) if self.divide else block).double()

    def check(self, matrix: Matrix) -> str:
        """Refuses what would not be finite; returns in words which columns lose their bits."""
        largest, after, error = (torch.zeros_like(self.gamma) for _ in range(3))
        for block in matrix.blocks():
            folded = self.folded(block).double()
            largest = largest.maximum(block.abs().amax(0).to(largest))
            after = after.maximum(folded.abs().amax(0).to(after))
            if not self.divide:
                error = error.maximum((folded / self.gamma.to(block.device) - block).abs().amax(0).to(error))
        dtype = matrix.tensor.dtype
        if not (finite := after.isfinite()).all():
            how = "divided by" if self.divide else "times"
            raise ValueError(f"{matrix.name}: {how} gamma is not finite in {dtype} in {columns(~finite)}")
        # Normal numbers are off by half an eps each (one in fp64, whose quotient rounds too), subnormal ones by more.
        lost = (largest > 0) & ~(error <= 1.5 * torch.finfo(dtype).eps * largest)
        return f"{matrix.name} in {columns(lost)}" if lost.any() else ""

    def bias(self, consumer: Consumer) -> Tensor | None:
        """The bias to write: none where there is none and none is needed."""
        old, weight = consumer.linear.bias, consumer.linear.weight
        if not self.beta.any():
            return None
        shift = self._shift(consumer)
        wide = -shift if self.divide else shift
        new = (wide if old is None else old.detach().double() + wide).to(weight.dtype if old is None else old.dtype)
        if not new.isfinite().all():
            raise ValueError(
                f"{consumer.name}.bias: would not be finite in {new.dtype}, expected {new.dtype} to hold it"
            )
        return new

    def only_rounding(self, consumer: Consumer, bias: Tensor | None) -> bool:
        """Whether what is left of a created bias is within the rounding of weights and bias."""
        if bias is None:
            return False
        eps = torch.finfo(bias.dtype).eps
        magnitude = self._shift(consumer, magnitudes=True)
        return bool((bias.double().abs() <= (2 * eps + 2 * self.gamma.numel() * 2.0**-53) * magnitude).all())

    def write(self, consumer: Consumer) -> None:
        for matrix in consumer.matrices():
            for block in matrix.blocks():
                block.copy_(self.folded(block))

    def _shift(self, consumer: Consumer, magnitudes: bool = False) -> Tensor:
        """(W + sum of scaling * B A) beta in fp64; of all magnitudes: what rounding errors are relative to."""

        def wide(tensor: Tensor) -> Tensor:
            return tensor.double().abs() if magnitudes else tensor.double()

        def product(matrix: Matrix) -> Tensor:
            beta = wide(self.beta).to(matrix.tensor.device)
            return torch.cat([wide(self.plain(block)) @ beta for block in matrix.blocks()])

        total = product(consumer.weight)
        for adapter in consumer.adapters:
            part = wide(adapter.b) @ product(adapter.a) * (abs(adapter.scaling) if magnitudes else adapter.scaling)
            if adapter.active:
                total = total + part.to(total.device)
            elif part.any():
                raise ValueError(
                    f"{adapter.a.name}: expected an active adapter, or one whose B A beta is zero, got an inactive one "
                    "whose constant would be in no bias: activate it or delete it first"
                )
        return total
