"""Masks: which elements of the trained tensors a step moves."""

from dataclasses import dataclass

from pyzo.control import KEEP_ALL


@dataclass(frozen=True)
class Random:
    """A Bernoulli mask, drawn from the noise field in every pass: no storage, the same in all passes of a step.

    An element outside the mask keeps its weight and its state under every rule. Source: the sparse-gradient ZO of arXiv
    2402.11592, section 5.

    Args:
        sparsity: share of the elements that stay, in [0, 1); heeded to 2^-16.
        refresh: how many steps a mask lasts, >= 1.
    """

    sparsity: float
    refresh: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, (int, float)) or not 0 <= self.sparsity < 1 or self.keep == 0:
            raise ValueError(f"sparsity: expected a number in [0, 1 - 2^-17), got {self.sparsity!r}")
        if not isinstance(self.refresh, int) or isinstance(self.refresh, bool) or self.refresh < 1:
            raise ValueError(f"refresh: expected an integer >= 1, got {self.refresh!r}")

    @property
    def keep(self) -> int:
        """How many of 65536 values of an element's mask bits let it move."""
        return round((1 - self.sparsity) * KEEP_ALL)
