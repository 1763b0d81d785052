"""Which store a step uses."""

import torch
from torch import nn

from pyzo.passes import Sweep
from pyzo.stores.base import Store
from pyzo.stores.in_place import InPlace
from pyzo.stores.scratch import Scratch
from pyzo.stores.snapshot import Snapshot

# A snapshot is chosen by itself for 16-bit weights when its copy takes at most this share of the module's bytes, or of
# those of the trained tensors themselves where only some elements are listed.
SNAPSHOT_SHARE = 0.1


def choose(name: str, sweep: Sweep, module: nn.Module | None, *, unused: str = "error") -> Store:
    """The store called `name`, or for "auto" the one that fits the trained tensors.

    Args:
        name: "auto", "inplace", "scratch" or "snapshot".
        sweep: over the trained tensors.
        module: that they are parameters of; None where only parameters are known.
        unused: as `Scratch` takes it.
    """
    if name == "inplace":
        return InPlace("asked for")
    if name == "snapshot":
        return Snapshot("asked for")
    if name == "scratch":
        obstacle = _obstacle(module)
        if obstacle:
            raise ValueError(f"store: expected 'auto', 'inplace' or 'snapshot' where {obstacle}, got 'scratch'")
        return Scratch("asked for", module, unused=unused)
    if name != "auto":
        raise ValueError(f"store: expected 'auto', 'inplace', 'scratch' or 'snapshot', got {name!r}")
    tensors = [t for part in sweep.parts for t in part.tensors]
    own = sum(t.numel() * t.element_size() for t in tensors)
    if any(part.indices for part in sweep.parts):
        # As copies: weights between listed ones stay where they are.
        listed = sum(
            i.numel() * t.element_size()
            for part in sweep.parts
            for t, i in zip(part.tensors, part.indices or part.tensors, strict=True)
        )
        if listed <= SNAPSHOT_SHARE * own:
            return Snapshot(f"a copy of the listed weights takes {listed} bytes, those of all weights are {own}")
    if all(t.dtype == torch.float32 for t in tensors):
        return InPlace("all trained weights are fp32, where the way back is exact to an ulp")
    if module is not None:
        total = sum(p.numel() * p.element_size() for p in module.parameters())
        if own <= SNAPSHOT_SHARE * total:
            return Snapshot(f"16-bit weights, and a copy of the trained ones takes {own} of the module's {total} bytes")
    obstacle = _obstacle(module)
    if obstacle and any(part.low for part in sweep.parts):
        return Snapshot(f"an update of masters starts from weights that have not moved, and {obstacle}")
    if obstacle:
        return InPlace(f"16-bit weights whose copy would be large, and {obstacle}: store='snapshot' has them exact")
    return Scratch("16-bit weights, which stay exact where they are never written to", module, unused=unused)


def _obstacle(module: nn.Module | None) -> str | None:
    """Why modules cannot find perturbed weights in a buffer."""
    if module is None:
        return "the optimizer is given no module"
    if any(isinstance(m, nn.DataParallel) for m in module.modules()):
        return "nn.DataParallel copies the module in every forward pass"
    return None
