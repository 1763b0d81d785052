"""The operators of pyzo, each with a fake for torch.compile and a typed function around it; importing loads them."""

from pathlib import Path

import torch

_LIBRARY = Path(__file__).parents[1] / "_C.so"
if not _LIBRARY.exists():
    raise ImportError(
        f"{_LIBRARY} is missing: build it with `pip install .` (or `pip install -e .`) in pyzo's repository"
    )
torch.ops.load_library(_LIBRARY)

from .activation import (  # noqa: E402: what follows needs the library
    FUNCTIONS,
    activation,
    coded_activation,
)
from .steps import (  # noqa: E402
    DISTRIBUTIONS,
    DTYPES,
    RULES,
    STATES,
    begin_step_,
    check_unsigned,
    choose_,
    control,
    cuda_stream_bound,
    distribution_code,
    estimate_,
    isas,
    noise_,
    pass_,
    select_isa,
    signed,
)

__all__ = [
    "DISTRIBUTIONS",
    "DTYPES",
    "FUNCTIONS",
    "RULES",
    "STATES",
    "activation",
    "begin_step_",
    "check_unsigned",
    "choose_",
    "coded_activation",
    "control",
    "cuda_stream_bound",
    "distribution_code",
    "estimate_",
    "isas",
    "noise_",
    "pass_",
    "select_isa",
    "signed",
]
