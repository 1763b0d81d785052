"""Data-parallel ranks: each evaluates its own part of the batch, and all take the step of the mean loss."""

import warnings

import torch
import torch.distributed as dist


class Ranks:
    """The process group of an optimizer, or none. Ranks that see the same losses stay equal bit for bit.

    Args:
        group: a torch.distributed process group, or None for a single process.
    """

    def __init__(self, group: "dist.ProcessGroup | None"):
        self._group = group
        if group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                "torch.distributed runs several ranks, but process_group is None: each rank steps by its own losses, "
                "and their weights drift apart. Pass process_group=torch.distributed.group.WORLD to average losses.",
                stacklevel=4,
            )

    def check_equal(self, numbers: list[int], what: str, device: torch.device) -> None:
        """ValueError on every rank unless all pass the same integers (63 bits)."""
        if self._group is None:
            return
        own = torch.tensor(numbers, dtype=torch.int64, device=device)
        low, high = own.clone(), own.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=self._group)
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=self._group)
        if not torch.equal(low, high):
            raise ValueError(f"process_group: expected the same {what} on every rank, got {numbers} on this one")

    def mean_(self, losses: torch.Tensor) -> None:
        """Average float64 losses over the ranks, in place: the same bits on every rank."""
        if self._group is not None:
            dist.all_reduce(losses, group=self._group)
            losses /= dist.get_world_size(self._group)
