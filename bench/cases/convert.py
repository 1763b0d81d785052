"""Whole models converted, beside eager torch, checkpointing, compilation and 8-bit activations: memory and steps."""

from bench.memory.record import run

__all__ = ["run"]
