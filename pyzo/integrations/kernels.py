"""The activations as layers of the package `kernels`, which transformers replaces forward passes by.

```python
import kernels
from pyzo.integrations.kernels import kernel_mapping

with kernels.use_kernel_mapping(kernel_mapping("paper")):
    kernels.kernelize(model.train(), mode=kernels.Mode.TRAINING)
```

Nothing is downloaded: the repository is `FOLDER`, inside the installed package. Without gradients the layers compute
the stock function and make no codes. `pyzo.convert` needs no `kernels`, verifies, and saves more: it knows the modules
around an activation, which a mapping by name cannot.
"""

from pathlib import Path

from kernels import LocalLayerRepository, Mode

from pyzo.integrations.kernel_layers import CHOICES, FUNCTIONS, exists, layer_name

FOLDER = Path(__file__).parent / "hub"
DEVICES = ("cpu", "cuda")

Mapping = dict[str, dict[str, dict[Mode, LocalLayerRepository]]]


def kernel_mapping(activation: str) -> Mapping:
    """The mapping for `kernels.use_kernel_mapping` and `kernels.register_kernel_mapping`.

    Args:
        activation: "paper" (ReGELU2 and ReSiLU2 with the constants of LowMemoryBP, arXiv 2406.16282; other GELUs are
            left alone), "optimal" or "derivative" (2 bits, see `pyzo.nn.FewBitActivation`), or "output" (near-exact,
            see `pyzo.nn.OutputActivation`). All approximate the gradient, and none is a default.

    Returns:
        By transformers' names of layers (GeLU, GeluTanh, NewGELU, FastGELU, QuickGELU, SiLU) and devices, for training
        with and without torch.compile.

    Raises:
        ValueError: another choice.
    """
    if activation not in CHOICES:
        raise ValueError(f"activation: expected one of {', '.join(map(repr, CHOICES))}, got {activation!r}")
    return {
        name: {device: _for_training(layer_name(function, activation)) for device in DEVICES}
        for name, function in FUNCTIONS.items()
        if exists(function, activation)
    }


def _for_training(layer: str) -> dict[Mode, LocalLayerRepository]:
    return {Mode.TRAINING | Mode.TORCH_COMPILE: LocalLayerRepository(FOLDER, layer_name=layer)}


__all__ = ["FOLDER", "kernel_mapping"]
