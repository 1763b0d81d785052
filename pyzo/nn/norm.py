"""MSLayerNorm and MSRMSNorm: norms that keep for backward what the next linear keeps anyway, their output."""

from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pyzo import ops
from pyzo.ops.autograd import LAYER_DTYPES, check_float, product_dtype

WORST_ERROR = 1 / 32  # of a normalised value that is recovered from the output
SMALLEST_GAMMA, LARGEST_GAMMA = 2.0**-120, 2.0**120  # whose reciprocals are normal float32 numbers
CHECK_EVERY = 256  # changes of a parameter in place


class _MSNorm(nn.Module):
    """What both norms share: parameters, the dtype of the output, and the choice of what is kept.

    Attributes:
        eps, affine, weight_offset: as given; `merge_affine_` sets `affine` to False and the parameters to None.
        output_dtype: dtype of the output: "autocast" (the dtype of an enabled autocast of the input's device, as that
            of the linear behind the norm, else that of the input), None (always that of the input), or a torch.dtype.
    """

    centered: bool

    def __init__(self, size: int, eps: float, affine: bool, weight_offset: float, bias: bool, **factory: Any) -> None:
        super().__init__()
        self._describe(size, eps, affine, weight_offset)
        for name, wanted in (("weight", affine), ("bias", affine and bias)):
            self.register_parameter(name, nn.Parameter(torch.empty(size, **factory)) if wanted else None)
        self.reset_parameters()
        self.register_load_state_dict_post_hook(_check_for_now)

    def _describe(self, size: int, eps: float, affine: bool, weight_offset: float) -> None:
        """Sets all but parameters and hooks; `pyzo.conversion` describes norms of other classes so."""
        self.eps = eps
        self.affine = affine
        self.weight_offset = weight_offset
        self.output_dtype: Literal["autocast"] | torch.dtype | None = "autocast"
        self._size = size
        self._errors: dict[torch.dtype, tuple[float, int]] | None = None  # by dtype: the worst error, and its column
        self._saves: dict[torch.dtype, Literal["output", "input"]] = {}  # all that compiled code depends on
        self._checked: tuple[tuple[int, int], ...] = ()  # where the parameters lay then, and their versions

    def reset_parameters(self) -> None:
        """gamma becomes 1 and beta 0."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        _check_for_now(self)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] of the input's or the output's dtype (`output_dtype`), contiguous."""
        if x.shape[-1:] != (self._size,):
            raise ValueError(f"x: expected a last dimension of {self._size}, got shape {list(x.shape)}")
        check_float("x", x)
        dtype = self._dtype_for(x)
        if not torch.compiler.is_compiling() and self._is_stale(x):
            self.check()
        return ops.norm(
            x,
            self.weight,
            self.bias,
            eps=self.eps,
            centered=self.centered,
            weight_offset=self.weight_offset,
            dtype=dtype,
            from_input=self.saves_for(dtype) == "input",
        )

    def check(self) -> None:
        """Looks at the parameters and decides anew what is kept for backward; waits for the device once.

        Called by the constructor, by `load_state_dict`, by the first forward pass after these that will have a backward
        one, and by the first such pass after a parameter was replaced, moved or changed in place 256 times; never under
        `torch.compile` or while a CUDA graph is captured, where the last decision stands. Call it yourself after other
        changes that make a gamma tiny or a beta large at once (`nn.init`, or any by way of `.data`, which cannot be
        seen), and before a compiled or captured forward pass after any change but by `load_state_dict`.
        """
        parameters = [p for p in (self.weight, self.bias) if p is not None]
        if not all(_is_readable(p) for p in parameters):
            self._errors, self._saves = None, {}
            return
        self._errors = self._worst_errors() if parameters else {}
        self._saves = {d: "output" if e <= WORST_ERROR else "input" for d, (e, _) in self._errors.items()}
        self._checked = self._state()

    @property
    def saves(self) -> Literal["output", "input"]:
        """What the backward pass of an output in the parameters' dtype works from; see `saves_for`."""
        return self.saves_for(self._own_dtype())

    @property
    def reason(self) -> str:
        """Why; of an output in the parameters' dtype."""
        return self.reason_for(self._own_dtype())

    def saves_for(self, dtype: torch.dtype) -> Literal["output", "input"]:
        """What backward works from where the output has this dtype, as last checked.

        "output" unless some column's gamma is so small, or its beta so large beside it, that the normalised value
        cannot be recovered from the rounded output to 1/32: u (1 + |beta/gamma|) + s/|gamma| with the unit roundoff u
        of the dtype and s half its smallest subnormal.
        """
        if self.weight is None and self.bias is None:
            return "output"
        return self._saves.get(dtype, "input")

    def reason_for(self, dtype: torch.dtype) -> str:
        """`saves_for` in words."""
        if self.weight is None and self.bias is None:
            return "no parameters: the output is the normalised value"
        if self._errors is None:
            return "the parameters were not looked at yet: check() does"
        error, column = self._errors[dtype]
        name = str(dtype).removeprefix("torch.")
        return f"normalised values come back from {name} to {error:.2g} at worst (column {column}; allowed: 1/32)"

    def extra_repr(self) -> str:
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return f"{self._size}, eps={self.eps}, affine={self.affine}{offset}"

    def _own_dtype(self) -> torch.dtype:
        return next((p.dtype for p in (self.weight, self.bias) if p is not None), torch.float32)

    def _dtype_for(self, x: Tensor) -> torch.dtype:
        if self.output_dtype == "autocast":
            return product_dtype(x)
        if self.output_dtype is not None and self.output_dtype not in LAYER_DTYPES:
            raise TypeError(f"output_dtype: expected 'autocast', None or a dtype of layers, got {self.output_dtype!r}")
        return x.dtype if self.output_dtype is None else self.output_dtype

    def _state(self) -> tuple[tuple[int, int], ...]:
        parameters = (p for p in (self.weight, self.bias) if p is not None)
        return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)

    def _is_stale(self, x: Tensor) -> bool:
        """Whether a backward pass will come and the parameters have moved or changed much; asks the host only."""
        parameters = [p for p in (self.weight, self.bias) if p is not None]
        if not parameters or not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *parameters)):
            return False
        if not all(_is_readable(t) for t in (x, *parameters)):
            return False
        if parameters[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        state = self._state()
        return len(state) != len(self._checked) or any(
            now[0] != then[0] or not 0 <= now[1] - then[1] < CHECK_EVERY
            for now, then in zip(state, self._checked, strict=True)
        )

    @torch.no_grad()
    def _worst_errors(self) -> dict[torch.dtype, tuple[float, int]]:
        some = next(p for p in (self.weight, self.bias) if p is not None).detach()
        if self.weight is None:
            gamma = torch.ones_like(some, dtype=torch.float64)
        else:  # rounded to float32 as the operator rounds it
            gamma = (self.weight_offset + some.to(torch.promote_types(some.dtype, torch.float32))).double().abs()
        beta = torch.zeros_like(gamma) if self.bias is None else self.bias.detach().double().abs()
        invertible = (gamma >= SMALLEST_GAMMA) & (gamma <= LARGEST_GAMMA)
        found = []
        for dtype in LAYER_DTYPES:
            finfo = torch.finfo(dtype)
            unit, tiny = finfo.eps / 2, finfo.smallest_normal * finfo.eps / 2
            error = unit * (1 + beta / gamma) + tiny / gamma
            found += error.where(invertible & error.isfinite(), torch.inf).max(0)
        numbers = torch.stack([number.double() for number in found]).tolist()  # waits for the device once
        return {d: (numbers[2 * i], int(numbers[2 * i + 1])) for i, d in enumerate(LAYER_DTYPES)}


def _is_readable(tensor: Tensor) -> bool:
    """Whether its numbers are all here; not those of meta and fake tensors, and of shards (DTensor)."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(tensor))


def _check_for_now(module: _MSNorm, _: object = None) -> None:
    """For code that never checks; the first forward pass looks again, as parameters are often changed until then."""
    module.check()
    module._checked = ()


class MSLayerNorm(_MSNorm):
    """LayerNorm over the last dimension that keeps its output and 1/std for backward, not its input.

    The output is the very storage that the linears behind it keep too, so the norm costs 4 bytes a row. Exact: see
    `pyzo.ops.norm` for formulas and rounding errors. Statistics are fp32, the result is rounded once, as in
    torch.nn.LayerNorm; with `affine` the state dict is that of torch.nn.LayerNorm, without (the paper's form) gamma and
    beta belong in the linears (`pyzo.nn.merge_affine_`).

    Under autocast torch's own LayerNorm returns fp32, which each linear casts and keeps for itself; this one returns
    the autocast dtype (`output_dtype`). Where a residual also reads the output (post-norm), set `output_dtype` to None.

    Where some column's gamma is too small for x̂ to be recovered from the output the input is kept instead; `saves` says
    which, `reason` why. Under a dtype that differs from the parameters' ask `saves_for`.

    Numerics: where the gradient is noise + a x̂, the relative error of dx is about a 2^-9 in bf16, against 1.7e-3 of a
    norm that keeps its input; gradients of losses behind linears have a below 1.

    Args:
        normalized_shape: D, or a tuple or list of D alone.
        eps: added to the variance.
        affine: with parameters weight [D] and bias [D].
        bias: False leaves the bias away.
        device, dtype: of the parameters.

    Shapes: [..., D] to [..., D], float32, bfloat16, float16 (float64 on the CPU).

    Source: MS-LayerNorm of LowMemoryBP, arXiv 2406.16282.
    """

    centered = True

    def __init__(
        self,
        normalized_shape: int | tuple[int] | list[int],
        eps: float = 1e-5,
        affine: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            _one_size("normalized_shape", normalized_shape), eps, affine, 0.0, bias, device=device, dtype=dtype
        )


class MSRMSNorm(_MSNorm):
    """RMSNorm over the last dimension that keeps its output and 1/rms for backward, not its input.

    As MSLayerNorm, without mean and bias; with `affine` the state dict is that of torch.nn.RMSNorm and of Hugging
    Face's RMSNorms. Rounds once, like torch.nn.RMSNorm: weight * x̂ in fp32, then the output's dtype. Hugging Face's
    LlamaRMSNorm rounds x̂ to the input's dtype first and multiplies then, which differs by that one rounding in 16 bits;
    its Gemma norms round once, like this one, with `weight_offset` 1.

    Args:
        dim: D, or a tuple or list of D alone.
        eps: added to the mean square.
        affine: with a parameter weight [D].
        weight_offset: added to weight: 1.0 for Gemma's norms, whose weight starts at 0.
        device, dtype: of the parameter.

    Shapes: [..., D] to [..., D], float32, bfloat16, float16 (float64 on the CPU).

    Source: MS-RMSNorm of LowMemoryBP, arXiv 2406.16282.
    """

    centered = False

    def __init__(
        self,
        dim: int | tuple[int] | list[int],
        eps: float = 1e-6,
        affine: bool = False,
        weight_offset: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(_one_size("dim", dim), eps, affine, weight_offset, False, device=device, dtype=dtype)


def _one_size(name: str, shape: int | tuple[int] | list[int]) -> int:
    sizes = (shape,) if isinstance(shape, Integral) else tuple(shape)
    if len(sizes) != 1:
        raise ValueError(f"{name}: expected one dimension, the last, got {sizes}")
    if sizes[0] < 1:
        raise ValueError(f"{name}: expected at least 1, got {sizes[0]}")
    return int(sizes[0])
