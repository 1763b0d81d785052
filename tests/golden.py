"""The golden hashes of tests/golden.txt: parsing, and the hash, for everything that can be seen as a NumPy array."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

PATH = Path(__file__).with_name("golden.txt")


@dataclass(frozen=True)
class Field:
    """A shard of noise, or of a step on it, and the hash of its bits."""

    distribution: str
    dtype: str
    seed: int
    key: int
    base: int
    inner: int
    stride: int
    n: int
    hash: int
    rounding: str | None = None  # of the lines of a pass

    @classmethod
    def parse(cls, words: list[str], rounding: str | None = None) -> "Field":
        return cls(*words[:2], *(int(word) for word in words[2:8]), int(words[8], 16), rounding)

    def __str__(self) -> str:
        name = f"{self.distribution}-{self.dtype}" + (f"-{self.rounding}" if self.rounding else "")
        return f"{name}-{self.seed:x}-{self.key:x}-{self.base}+{self.inner}x{self.stride}-{self.n}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def lines() -> list[list[str]]:
    """The words of every line but comments."""
    return [line.split() for line in PATH.read_text().splitlines() if line and not line.startswith("#")]


def noise_lines() -> list[Field]:
    return [Field.parse(words) for words in lines() if words[0] not in ("seed", "pass")]


def pass_lines() -> list[Field]:
    return [Field.parse(words[1:3] + words[4:], words[3]) for words in lines() if words[0] == "pass"]


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


def pass_step(ops: object, field: Field, device: str = "cpu") -> torch.Tensor:
    """The weights after the step that golden.txt documents, by `ops`: pyzo.reference or torch.ops.pyzo."""
    shard = (field.base, field.inner, field.stride)
    weights = torch.empty(field.n, dtype=field.torch_dtype, device=device)
    ops.noise_(weights, 1, field.key, *shard, 0)
    control = torch.zeros(4, 12, dtype=torch.int64, device=device)
    control[0, 4] = np.array(field.seed, np.uint64).astype(np.int64).item()
    control.view(torch.float64)[3, :3] = torch.tensor([0.5, 0.01, 0.1], dtype=torch.float64)
    ops.begin_step_(control)
    ops.estimate_two_sided_(control, torch.tensor([1.0, 0.75, 0.5, 0.625], dtype=torch.float64, device=device))
    table = torch.tensor([[field.key, *shard, 0]])
    distribution = ("normal", "rademacher").index(field.distribution)
    ops.pass_([], [weights], table, control, distribution, 1, 1.0, 2, 0, 1.0, field.rounding == "stochastic")
    return weights
