"""Zeroth-order optimizers: torch.optim.Optimizer subclasses whose `step` takes a closure without backward."""

from pyzo.optim.sgd import ZOSGD

__all__ = ["ZOSGD"]
