"""Estimators: which points of a step are probed, and how losses become coefficients of the seeded gradient."""

from pyzo.estimators.base import FORWARD, Block, Estimator, Partition, Points, Stage, Unit
from pyzo.estimators.blocks import BlockWise, RandomLayers
from pyzo.estimators.whole import ForwardGrad, OneSided, TwoSided

__all__ = [
    "FORWARD",
    "Block",
    "BlockWise",
    "Estimator",
    "ForwardGrad",
    "OneSided",
    "Partition",
    "Points",
    "RandomLayers",
    "Stage",
    "TwoSided",
    "Unit",
]
