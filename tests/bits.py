"""Tensors by their bits: comparison, and weights of every kind to test with."""

import torch

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SPECIAL = {  # zeros, smallest, largest, infinities, quiet and signalling NaNs with payloads
    torch.float32: (0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7FC01234, 0x7F801234),
    torch.bfloat16: (0, 1, 0x7F, 0x80, 0x7F7F, 0x7F80, 0x7FD5, 0x7F95),
    torch.float16: (0, 1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0x7E55, 0x7D55),
}


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a tensor, as integers on the CPU."""
    return x.detach().cpu().contiguous().view(_INTEGER[x.element_size()])


def assert_same_bits(got: torch.Tensor, want: torch.Tensor, what: str = "") -> None:
    """Fails with the first element whose bits differ."""
    assert got.dtype == want.dtype and got.shape == want.shape, (what, got.dtype, got.shape, want.dtype, want.shape)
    a, b = bits(got).reshape(-1), bits(want).reshape(-1)
    if not torch.equal(a, b):
        different = (a != b).nonzero().reshape(-1)
        i = int(different[0])
        mask = (1 << 8 * got.element_size()) - 1
        raise AssertionError(
            f"{what}: {len(different)} of {len(a)} elements differ, first {i}: got {int(a[i]) & mask:#x} "
            f"({got.reshape(-1)[i].item()}), expected {int(b[i]) & mask:#x} ({want.reshape(-1)[i].item()})"
        )


def signed(code: int, width: int) -> int:
    """The integer of `width` bits, two's complement, with the bits of `code`."""
    return code - (1 << width) if code >> (width - 1) else code


def weights(n: int, dtype: torch.dtype, *, seed: int, special: bool = True) -> torch.Tensor:
    """Weights of many magnitudes; `special`: a sixth of them zeros, subnormals, infinities or NaN of both signs."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-20, 8, (n,), generator=generator).double()
    w = (torch.randn(n, generator=generator, dtype=torch.float64) * exponents.exp2()).to(dtype)
    if special:
        width = 8 * w.element_size()
        codes = [signed(code | sign << (width - 1), width) for code in _SPECIAL[dtype] for sign in (0, 1)]
        chosen = torch.tensor(codes)[torch.randint(0, len(codes), (n,), generator=generator)]
        where = torch.rand(n, generator=generator) < 1 / 6
        integers = w.view(_INTEGER[w.element_size()])
        integers[where] = chosen[where].to(integers.dtype)
    return w
