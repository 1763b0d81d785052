"""Fine-tune large models in the memory of inference.

Without torch only what needs none can be used: `pyzo._host`. With torch, `import pyzo` loads the operators
`torch.ops.pyzo.*`; everything else is imported when it is first named.
"""

import importlib
import importlib.metadata
import importlib.util

# Public name -> the module that it is, or that defines it.
_NAMES = {
    "convert": "pyzo.conversion",
    "estimators": "pyzo.estimators",
    "hybrid": "pyzo.zo_fo",
    "layers": "pyzo.layers",
    "masks": "pyzo.masks",
    "memory": "pyzo.memory",
    "nn": "pyzo.nn",
    "noise": "pyzo.field",
    "ops": "pyzo.ops",
    "optim": "pyzo.optim",
    "plan": "pyzo.conversion",
    "reference": "pyzo.reference",
    "revert": "pyzo.conversion",
    "tensor_key": "pyzo.field",
}

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> object:
    if name == "__version__":
        try:
            return importlib.metadata.version("pyzo")
        except importlib.metadata.PackageNotFoundError as error:
            raise AttributeError("pyzo.__version__ is in the metadata that pip writes: pip install .") from error
    if name not in _NAMES:
        raise AttributeError(f"module 'pyzo' has no attribute {name!r}")
    module = importlib.import_module(_NAMES[name])
    value = module if module.__name__ == f"pyzo.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if importlib.util.find_spec("torch") is not None:
    importlib.import_module("pyzo.ops")  # loads the operators
