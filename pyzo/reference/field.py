"""The noise field, version 1: a pure function z(seed, tensor key, element index), frozen.

    words  = Philox4x32-7(counter, seed)           counter = block + 2^64 (2^8 key + stream), 128 bits
    normal       stream 0: element 4 b + k is normal k of block b, by Box-Muller on the word pairs (x, y) and (z, w)
    rademacher   stream 1: element 128 b + k is -1 where bit k % 32 of word k // 32 of block b is set, else +1
    rounding     stream 2: element 8 b + k has the 16 bits k % 2 (low half first) of word k // 2 of block b
    mask         stream 3: laid out as the rounding; an element is trained where its bits are below a threshold
    dropout      stream 4: laid out as the rounding; an element is kept where its bits are below a threshold
The element index is 64 bits, counted in the whole tensor; a shard maps its elements to it (`global_index`).
"""

import torch
from torch import Tensor

from .arithmetic import bits_of_float, float32, float_of_bits, fma, round_nearest, sqrt

NOISE_VERSION = 1
DISTRIBUTIONS = ("normal", "rademacher")  # by the number that operators take
NORMAL_STREAM, RADEMACHER_STREAM, ROUNDING_STREAM = 0, 1, 2
STATE_FACTORS = (0x9E37, 0x79B9)  # permute the rounding bits of a weight into those of its states
MASK_STREAM, DROPOUT_STREAM = 3, 4
ROUNDING_DIRECTION = 2**64 - 1  # the direction whose seed feeds the stochastic rounding of a step
MASK_DIRECTION = 2**64 - 2  # the direction whose seed draws the masks of a step

_M32, _M64 = 2**32 - 1, 2**64 - 1


def philox4x32(counter: Tensor, key: int, *, rounds: int = 7) -> Tensor:
    """Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, section 3.3).

    Args:
        counter: int64 [n, 4], words in [0, 2^32), the lowest first.
        key: 64 bits.
        rounds: 7 is what the field uses.

    Returns:
        int64 [n, 4], words in [0, 2^32).
    """
    x, y, z, w = counter.unbind(1)
    k0, k1 = key & _M32, key >> 32 & _M32
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * x, 0xCD9E8D57 * z  # 64-bit products; int64 wraps, the masks below make them unsigned
        x, y, z, w = (p1 >> 32 & _M32) ^ y ^ k0, p1 & _M32, (p0 >> 32 & _M32) ^ w ^ k1, p0 & _M32
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    return torch.stack((x, y, z, w), 1)


def field_words(seed: int, key: int, stream: int, block: Tensor) -> Tensor:
    """The four words of each block: int64 [n, 4]. `key`: 56 bits; `stream`: 8 bits; `block`: int64 [n], 64 bits."""
    high = torch.tensor([key << 8 & _M32 | stream, key >> 24 & _M32]).expand(len(block), 2)
    return philox4x32(torch.cat((torch.stack((block & _M32, block >> 32 & _M32), 1), high), 1), seed)


def mix64(x: int) -> int:
    """The 64-bit finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), a bijection."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _M64
    return x ^ x >> 31


def direction_seed(run: int, step: int, direction: int) -> int:
    """Seed of a direction of a step of a run (all 64 bits). Distinct for distinct directions of one step."""
    base = mix64((mix64(run + 0x9E3779B97F4A7C15 & _M64) + step * 0xD1B54A32D192ED03) & _M64)
    return mix64((base + direction * 0x9E3779B97F4A7C15) & _M64)


def global_index(n: int, *, base: int = 0, inner: int = 0, stride: int = 0) -> Tensor:
    """Indices in the whole tensor of the n elements of a shard: int64 [n].

    Element i of a shard is element base + (i // inner) * stride + i % inner of the whole, or base + i where inner <= 0.
    """
    i = torch.arange(n)
    return base + i if inner <= 0 else base + i // inner * stride + i % inner


def radius(a: Tensor) -> Tensor:
    """sqrt(-2 ln u), u = (a + 1/2) / 2^32, for words `a` (int64 in [0, 2^32)): float32, within 1e-5 of the ideal.

    u itself is not formed: y = u where u < 1/2 and u - 1 elsewhere comes from `a` read as a signed integer, so that all
    32 bits count near u = 0 (the tails) and near u = 1 (small radii). ln u = k ln 2 + ln(1 + f), f in [-1/2, 0).
    """
    signed = torch.where(a >= 1 << 31, a - (1 << 32), a).to(torch.float32)
    y = fma(signed, float_of_bits(torch.tensor(0x2F7FFFFF)), float32(2.0**-33))  # 2^-32 less one ulp: |y| < 1/2
    positive = y > 0
    k = torch.where(positive, (bits_of_float(y) - 0x3F000000).clamp(max=0) & -(1 << 23), 0)  # exponent, times 2^23
    f = float_of_bits(bits_of_float(y) - k) - positive.to(torch.float32)
    p = float32(1.9638747)  # -2 ln(1 + f) / f
    for coefficient in (0.99445254, 0.99253517, -0.58678675, 1.0054013, -1.9998971):
        p = fma(p, f, float32(coefficient))
    return sqrt(fma(k.to(torch.float32), float32(-1.6525917e-07), f * p))  # -2 ln 2 / 2^23


def direction_of(b: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angle of words `b` (int64 in [0, 2^32)): two float32 tensors.

    The angle is t half turns, t = (bits 1..22 of b, with a 1 for bit 0) / 2^23 - 1/2, in (-1/2, 1/2); bit 31 of b
    turns the sign of the cosine. sin = sin(pi t), cos = +-cos(pi t): uniform on 2^23 points of the circle.
    """
    t = float_of_bits(b & 0x7FFFFE | 0x3F800001) - 1.5
    square = t * t
    q = float32(-0.55463620)  # sin(pi t) / t
    for coefficient in (2.5418990, -5.1671428, 3.1415820):
        q = fma(q, square, float32(coefficient))
    p = float32(0.21969681)  # cos(pi t)
    for coefficient in (-1.3318802, 4.0584119, -4.9347929, 0.99999995):
        p = fma(p, square, float32(coefficient))
    return torch.where(b >> 31 == 1, -p, p), t * q


def normal(seed: int, key: int, index: Tensor) -> Tensor:
    """Standard normals, float32 [n], at the global indices `index` (int64 [n], 64 bits)."""
    block, where = torch.unique_consecutive(index >> 2 & (1 << 62) - 1, return_inverse=True)
    words = field_words(seed, key, NORMAL_STREAM, block)
    r, (cos, sin) = radius(words[:, 0::2]), direction_of(words[:, 1::2])  # [blocks, 2 pairs]
    return torch.stack((r * cos, r * sin), 2).view(-1, 4)[where, index & 3]


def rademacher(seed: int, key: int, index: Tensor) -> Tensor:
    """Signs, float32 [n] of +1 and -1, at the global indices `index` (int64 [n], 64 bits)."""
    block, where = torch.unique_consecutive(index >> 7 & (1 << 57) - 1, return_inverse=True)
    words = field_words(seed, key, RADEMACHER_STREAM, block)[where, index >> 5 & 3]
    return (1 - 2 * (words >> (index & 31) & 1)).to(torch.float32)


def random_bits(seed: int, key: int, stream: int, index: Tensor) -> Tensor:
    """16 bits per element, of the rounding, mask or dropout streams: int64 [n] in [0, 2^16), at `index` (int64 [n])."""
    block, where = torch.unique_consecutive(index >> 3 & (1 << 61) - 1, return_inverse=True)
    words = field_words(seed, key, stream, block)[where, index >> 1 & 3]
    return words >> 16 * (index & 1) & 0xFFFF


def draw(distribution: int, seed: int, key: int, index: Tensor) -> Tensor:
    """The field at `index`; `distribution` is a position in DISTRIBUTIONS."""
    return (normal, rademacher)[distribution](seed, key, index)


def noise(
    n: int,
    *,
    seed: int,
    key: int,
    base: int = 0,
    inner: int = 0,
    stride: int = 0,
    distribution: str = "normal",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The first n elements of a shard of the field, rounded to nearest in `dtype`: [n]."""
    index = global_index(n, base=base, inner=inner, stride=stride)
    return round_nearest(draw(DISTRIBUTIONS.index(distribution), seed, key, index), dtype).to(dtype)
