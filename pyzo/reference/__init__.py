"""The specification: every operator of `csrc/ops.inc` again, in plain torch on the CPU, equal in every bit.

Written for reading and for tests, not for speed, and independent of the C++ code. Read `field` for the noise contract,
`arithmetic` for what "fma" and "round" mean, `passes` for what an optimizer step does to a weight.
Unsigned 32-bit words are int64 tensors in [0, 2^32); 64-bit seeds, keys and indices are taken modulo 2^64.
"""

from .arithmetic import fma, round_nearest, round_stochastic
from .field import (
    DISTRIBUTIONS,
    NOISE_VERSION,
    ROUNDING_DIRECTION,
    direction_of,
    direction_seed,
    field_words,
    global_index,
    mix64,
    noise,
    normal,
    philox4x32,
    rademacher,
    radius,
    rounding_bits,
)
from .passes import begin_step_, estimate_two_sided_, noise_, pass_, philox_

OPERATORS = {f.__name__: f for f in (pass_, noise_, philox_, begin_step_, estimate_two_sided_)}

__all__ = [
    "DISTRIBUTIONS",
    "NOISE_VERSION",
    "OPERATORS",
    "ROUNDING_DIRECTION",
    "begin_step_",
    "direction_of",
    "direction_seed",
    "estimate_two_sided_",
    "field_words",
    "fma",
    "global_index",
    "mix64",
    "noise",
    "noise_",
    "normal",
    "pass_",
    "philox4x32",
    "philox_",
    "rademacher",
    "radius",
    "round_nearest",
    "round_stochastic",
    "rounding_bits",
]
