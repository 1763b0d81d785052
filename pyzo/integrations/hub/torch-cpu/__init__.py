"""What `kernels` imports from this folder."""

from pyzo.integrations.kernel_layers import layers

__all__ = ["layers"]
