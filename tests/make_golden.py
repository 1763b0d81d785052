"""Writes tests/golden.txt from pyzo.reference. A noise version is frozen: only a new version changes existing lines.

Run: python tests/make_golden.py
"""

from collections.abc import Iterator

import golden

from pyzo import reference

HEAD = """\
# Golden hashes of the noise field, version 1. Written by tests/make_golden.py from pyzo.reference.
#   DISTRIBUTION DTYPE seed key base inner stride n hash                  noise, rounded to nearest in DTYPE
#   seed run step direction seed                                          direction_seed
#   pass RULE OPTION STATE KEEP DISTRIBUTION DTYPE ROUNDING run key base inner stride n hash hash ..
#                                                                         after steps: weights, states of dtype STATE
# hash = sum over i of mix64((i + 1) * 0x9E3779B97F4A7C15 ^ bits_i) mod 2^64 over the 16- or 32-bit patterns.
# A step: w = normal noise of seed 1 in DTYPE, states 0; one row lr 0.5, eps 0.01, weight decay 0.1, beta1 0.9, beta2
# 0.99, dampening 0.25, rule_eps 0.001, option OPTION, keep KEEP, refresh 1; two directions; begin_step; two-sided
# estimate of losses 1, 0.75, 0.5, 0.625; pass with undo 1 (sign +1), update by both directions, perturb 0 (sign +1),
# masked where KEEP is below 65536. A rule with states makes two steps, any other one."""

TOP64, TOP56 = 2**64 - 1, 2**56 - 1

NOISE = [  # distribution, dtype, seed, key, base, inner, stride, n
    ("normal", "float32", 0, 0, 0, 0, 0, 65537),
    ("normal", "float32", TOP64, TOP56, 0, 0, 0, 4099),
    ("normal", "float32", 0x0123456789ABCDEF, 0xFEDCBA98765432, 3, 0, 0, 4099),
    ("normal", "float32", 7, 11, 2**32 - 5, 0, 0, 4099),  # indices past 2^32
    ("normal", "float32", 7, 11, 2**34 - 5, 0, 0, 4099),  # blocks past 2^32
    ("normal", "float32", 7, 11, 2**62 + 1, 0, 0, 4099),
    ("normal", "float32", 7, 11, 1000, 77, 1000, 4099),  # columns
    ("normal", "float32", 7, 11, 2**40 + 1, 1, 3, 1025),
    ("normal", "bfloat16", 0, 0, 0, 0, 0, 65537),
    ("normal", "bfloat16", TOP64, TOP56, 5, 1027, 4096, 4099),
    ("normal", "float16", 0, 0, 0, 0, 0, 65537),
    ("normal", "float16", 7, 11, 2**34 - 6, 333, 2**33, 4099),
    ("rademacher", "float32", 0, 0, 0, 0, 0, 65537),
    ("rademacher", "float32", TOP64, TOP56, 1, 0, 0, 4099),
    ("rademacher", "float32", 7, 11, 2**39 - 129, 0, 0, 4099),  # blocks past 2^32
    ("rademacher", "bfloat16", 7, 11, 1000, 77, 1000, 4099),
    ("rademacher", "float16", 7, 11, 127, 0, 0, 4099),
]
SEEDS = [(0, 0, 0), (0, 1, 0), (0, 1, 1), (42, 1000000, 15), (TOP64, TOP64, 3), (42, 1, reference.ROUNDING_DIRECTION)]
PASSES = [  # rule, option, state dtype, keep, distribution, dtype, rounding, run, key, base, inner, stride, n
    ("sgd", 0, "-", 65536, "normal", "float32", "nearest", 42, 5, 0, 0, 0, 4099),
    ("sgd", 0, "-", 65536, "normal", "bfloat16", "nearest", 42, 5, 3, 0, 0, 4099),
    ("sgd", 0, "-", 65536, "normal", "bfloat16", "stochastic", TOP64, TOP56, 1000, 77, 1000, 4099),
    ("sgd", 0, "-", 65536, "normal", "float16", "stochastic", 42, 5, 2**34 - 5, 0, 0, 4099),
    ("sgd", 0, "-", 65536, "rademacher", "float32", "nearest", 42, 5, 2**39 - 129, 0, 0, 4099),
    ("sgd", 0, "-", 65536, "rademacher", "bfloat16", "stochastic", 42, 5, 0, 0, 0, 4099),
    ("sgd", 0, "-", 65536, "rademacher", "float16", "nearest", 42, 5, 7, 5, 9, 4099),
    ("sgd", 0, "-", 20000, "normal", "float32", "nearest", 42, 5, 2**35 + 3, 0, 0, 4099),
    ("sgd", 0, "-", 1, "rademacher", "bfloat16", "stochastic", 42, 5, 0, 0, 0, 65537),
    ("sign", 0, "-", 65536, "normal", "float32", "nearest", 42, 5, 0, 0, 0, 4099),
    ("sign", 0, "-", 65536, "rademacher", "float16", "stochastic", 42, 5, 0, 0, 0, 4099),
    ("sign", 0, "-", 50000, "normal", "bfloat16", "stochastic", 42, 5, 1000, 77, 1000, 4099),
    ("momentum", 0, "float32", 65536, "normal", "float32", "nearest", 42, 5, 0, 0, 0, 4099),
    ("momentum", 1, "float32", 65536, "rademacher", "float16", "stochastic", 42, 5, 8, 0, 0, 4099),
    ("momentum", 1, "bfloat16", 65536, "normal", "bfloat16", "stochastic", TOP64, TOP56, 2**34 - 5, 0, 0, 4099),
    ("momentum", 0, "bfloat16", 32768, "normal", "float32", "stochastic", 42, 5, 0, 0, 0, 4099),
    ("adam", 0, "float32", 65536, "normal", "float32", "nearest", 42, 5, 0, 0, 0, 4099),
    ("adam", 1, "float32", 65536, "normal", "bfloat16", "stochastic", 42, 5, 0, 0, 0, 4099),
    ("adam", 1, "bfloat16", 65536, "normal", "bfloat16", "stochastic", TOP64, TOP56, 1000, 77, 1000, 4099),
    ("adam", 0, "bfloat16", 65536, "rademacher", "float16", "nearest", 42, 5, 7, 0, 0, 4099),
    ("adam", 1, "bfloat16", 6554, "rademacher", "float32", "stochastic", 42, 5, 2**34 - 5, 0, 0, 4099),
    ("adam", 0, "float32", 60000, "normal", "float16", "stochastic", 42, 5, 0, 333, 4096, 4099),
]


def write_lines() -> Iterator[str]:
    yield HEAD
    for distribution, dtype, *numbers in NOISE:
        field = golden.Field(distribution, dtype, *numbers, hash=0)
        out = reference.noise(
            field.n,
            seed=field.seed,
            key=field.key,
            base=field.base,
            inner=field.inner,
            stride=field.stride,
            distribution=distribution,
            dtype=field.torch_dtype,
        )
        yield " ".join(map(str, (distribution, dtype, *numbers, f"{golden.hash_of(out):016x}")))
    for seed in SEEDS:
        yield " ".join(map(str, ("seed", *seed, f"{reference.direction_seed(*seed):016x}")))
    for line in PASSES:
        steps = golden.Steps.parse([*map(str, line), "0"])
        yield " ".join(map(str, ("pass", *line, *(f"{h:016x}" for h in golden.pass_hashes(reference, steps)))))


if __name__ == "__main__":
    golden.PATH.write_text("\n".join(write_lines()) + "\n")
