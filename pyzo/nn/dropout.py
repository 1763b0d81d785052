"""`SeededDropout`: dropout that saves a seed of 8 bytes instead of a mask."""

from torch import Tensor, nn

from pyzo.ops.dropouts import check_probability, dropout


class SeededDropout(nn.Module):
    """`nn.Dropout` whose mask is drawn again in backward from a seed, so nothing of the input's size is saved.

    Each call in training mode draws one seed from torch's default generator of the input's device, as `nn.Dropout`
    draws its mask: `torch.manual_seed` governs it, checkpointing recomputes the same mask, and the paired forwards of a
    zeroth-order step see the same one. The masks themselves are not those of `nn.Dropout`. `inplace` is not offered.

    Args:
        p: probability that an element is zeroed, in [0, 1 - 2^-17), resolved to 2^-16. The others are scaled by the
            inverse of the share that is kept, so the expectation stays.

    Shapes: any, to the same. Dtypes: float32, bfloat16, float16 (float64 on the CPU).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_probability(p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x

    def extra_repr(self) -> str:
        return f"p={self.p}"
