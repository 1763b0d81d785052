"""The structure of a model: its list of repeated layers, a cut before a layer, and blocks that are trained in turn.

Layers are found by the repeated-module rule (`pyzo.layers.lists`), never by the names of architectures. Parameters go
by the names that `model.named_parameters()` gives them, tied ones by the first of these.
"""

from pyzo.layers.blocks import Block, blocks
from pyzo.layers.cut import Split, Stack, split, stack
from pyzo.layers.lists import inside
from pyzo.layers.parts import Part, is_norm

__all__ = ["Block", "Part", "Split", "Stack", "blocks", "inside", "is_norm", "split", "stack"]
