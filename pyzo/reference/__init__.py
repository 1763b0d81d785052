"""The specification: every operator of `csrc/ops.inc` again, in plain torch on the CPU, equal in every bit.

Written for reading and for tests, not for speed, and independent of the C++ code. Read `field` for the noise contract,
`arithmetic` for what "fma" and "round" mean, `elementary` for exp, log, tanh, erf and their kin, `control` for how
losses become a seeded gradient, `rules` and `passes` for what a pass does to a weight, `stores` and `methods` for the
steps of the optimizers; `activations`, `gates` and `norms` for layers.
Unsigned 32-bit words are int64 tensors in [0, 2^32); 64-bit seeds, keys and indices are taken modulo 2^64.
"""

from . import activations, gates, norms
from .arithmetic import divide, fma, round_nearest, round_stochastic, sqrt
from .control import ESTIMATORS, SCALINGS, Row, begin_step_, choose_, estimate_, new_control, read_row, write_row
from .dropouts import dropout
from .elementary import erf, exp, expm1, log, log1p, normal_distribution, sigmoid, tanh
from .field import (
    DISTRIBUTIONS,
    DROPOUT_STREAM,
    MASK_DIRECTION,
    MASK_STREAM,
    NOISE_VERSION,
    ROUNDING_DIRECTION,
    ROUNDING_STREAM,
    STATE_FACTORS,
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
    random_bits,
)
from .methods import Method
from .passes import join_master, mask_bits_, noise_, pass_, pass_rows_, philox_, split_master
from .rules import RULES, STATES

OPERATORS = {
    f.__name__: f
    for f in (
        *(pass_, pass_rows_, mask_bits_, noise_, philox_, begin_step_, estimate_, choose_),
        *activations.OPERATORS,
        dropout,
        *gates.OPERATORS,
        *norms.OPERATORS,
        dropout,
    )
}

__all__ = [
    "DISTRIBUTIONS",
    "DROPOUT_STREAM",
    "ESTIMATORS",
    "MASK_DIRECTION",
    "MASK_STREAM",
    "NOISE_VERSION",
    "OPERATORS",
    "ROUNDING_DIRECTION",
    "ROUNDING_STREAM",
    "RULES",
    "SCALINGS",
    "STATES",
    "STATE_FACTORS",
    "Method",
    "Row",
    "begin_step_",
    "choose_",
    "direction_of",
    "direction_seed",
    "divide",
    "dropout",
    "erf",
    "estimate_",
    "exp",
    "expm1",
    "field_words",
    "fma",
    "global_index",
    "join_master",
    "log",
    "log1p",
    "mask_bits_",
    "mix64",
    "new_control",
    "noise",
    "noise_",
    "normal",
    "normal_distribution",
    "pass_",
    "pass_rows_",
    "philox4x32",
    "philox_",
    "rademacher",
    "radius",
    "random_bits",
    "read_row",
    "round_nearest",
    "round_stochastic",
    "sigmoid",
    "split_master",
    "sqrt",
    "tanh",
    "write_row",
]
