"""Zeroth-order optimizers: torch.optim.Optimizer subclasses whose `step` takes a closure without backward."""

from pyzo.optim.adam import ZOAdam
from pyzo.optim.conservative import ZOConservativeSGD
from pyzo.optim.forward import ForwardGradSGD
from pyzo.optim.sgd import ZOSGD
from pyzo.optim.sign import ZOSignSGD

__all__ = ["ZOSGD", "ForwardGradSGD", "ZOAdam", "ZOConservativeSGD", "ZOSignSGD"]
