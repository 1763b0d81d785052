"""The golden hashes of tests/golden.txt: parsing, and the hash, for everything that can be seen as a NumPy array."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pyzo import reference

PATH = Path(__file__).with_name("golden.txt")


@dataclass(frozen=True)
class Field:
    """A shard of noise, and the hash of its bits."""

    distribution: str
    dtype: str
    seed: int
    key: int
    base: int
    inner: int
    stride: int
    n: int
    hash: int

    @classmethod
    def parse(cls, words: list[str]) -> "Field":
        return cls(*words[:2], *(int(word) for word in words[2:8]), int(words[8], 16))

    def __str__(self) -> str:
        place = f"{self.base}+{self.inner}x{self.stride}"
        return f"{self.distribution}-{self.dtype}-{self.seed:x}-{self.key:x}-{place}-{self.n}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Steps:
    """The first steps of a rule on a shard of weights, and the hashes of weights and states after them.

    The seed of the field is that of the run.
    """

    rule: str
    option: int
    state_dtype: str  # "-" of a rule without state
    keep: int
    rounding: str
    field: Field
    hashes: tuple[int, ...]

    @classmethod
    def parse(cls, words: list[str]) -> "Steps":
        rule, option, state_dtype, keep, distribution, dtype, rounding, *rest = words
        field = Field.parse([distribution, dtype, *rest[:7]])
        return cls(rule, int(option), state_dtype, int(keep), rounding, field, tuple(int(h, 16) for h in rest[6:]))

    def __str__(self) -> str:
        return f"{self.rule}-{self.option}-{self.state_dtype}-{self.keep}-{self.rounding}-{self.field}"


def lines() -> list[list[str]]:
    """The words of every line but comments."""
    return [line.split() for line in PATH.read_text().splitlines() if line and not line.startswith("#")]


def noise_lines() -> list[Field]:
    return [Field.parse(words) for words in lines() if words[0] not in ("seed", "pass")]


def pass_lines() -> list[Steps]:
    return [Steps.parse(words[1:]) for words in lines() if words[0] == "pass"]


def seed_lines() -> list[tuple[int, int, int, int]]:
    """(run, step, direction, seed)"""
    return [(int(a), int(b), int(c), int(d, 16)) for kind, a, b, c, d in (w for w in lines() if w[0] == "seed")]


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of csrc/core/field.h on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_of(values: np.ndarray | torch.Tensor) -> int:
    """Sum over i of mix64((i + 1) * 0x9E3779B97F4A7C15 ^ bits_i), modulo 2^64, over the 16- or 32-bit patterns."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().reshape(-1)
        values = values.view(torch.int32 if values.element_size() == 4 else torch.int16).numpy()
    patterns = values.reshape(-1).view({2: np.uint16, 4: np.uint32}[values.itemsize]).astype(np.uint64)
    index = np.arange(1, len(patterns) + 1, dtype=np.uint64)
    return int(mix64(index * np.uint64(0x9E3779B97F4A7C15) ^ patterns).sum(dtype=np.uint64))


def pass_hashes(ops: object, steps: Steps, device: str = "cpu") -> tuple[int, ...]:
    """Hashes of the weights and states after the steps that golden.txt documents.

    `ops` makes them: pyzo.reference or torch.ops.pyzo.
    """
    field = steps.field
    shard = (field.base, field.inner, field.stride)
    weights = torch.empty(field.n, dtype=field.torch_dtype, device=device)
    ops.noise_(weights, 1, field.key, *shard, 0)
    names = reference.STATES[steps.rule]
    states = [torch.zeros(field.n, dtype=getattr(torch, steps.state_dtype), device=device) for _ in names]
    row = reference.Row(
        lr=0.5,
        eps=0.01,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.99,
        dampening=0.25,
        rule_eps=1e-3,
        option=bool(steps.option),
        keep=steps.keep,
    )
    control = reference.new_control(2, [row], field.seed).to(device)
    losses = torch.tensor([1.0, 0.75, 0.5, 0.625], dtype=torch.float64, device=device)
    update = (reference.RULES.index(steps.rule), 2, 1.0, False, False)
    how = (steps.rounding == "stochastic", steps.keep < 65536, False)
    for _ in range(2 if states else 1):
        ops.begin_step_(control)
        ops.estimate_(control, losses, 0, 2, 0)
        distribution = reference.DISTRIBUTIONS.index(field.distribution)
        table = torch.tensor([[field.key, *shard, 0]])
        ops.pass_([], [weights], states, [], [], [], table, control, distribution, 1, 1.0, *update, 0, 1.0, *how)
    return tuple(hash_of(t) for t in (weights, *states))
