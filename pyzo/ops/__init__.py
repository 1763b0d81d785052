"""The operators of pyzo, each with a fake for torch.compile and a typed function around it; importing loads them."""

from .activations import (
    FUNCTIONS,
    activation,
    coded_activation,
    function_code,
    output_activation,
)
from .attention import attention, attention_reason
from .dropouts import dropout
from .gates import gate
from .linear import activation_linear, gate_linear
from .lora import lora_linear
from .norms import norm, norm_pair
from .steps import (
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
    mask_bits_,
    noise_,
    pass_,
    pass_rows_,
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
    "activation_linear",
    "attention",
    "attention_reason",
    "begin_step_",
    "check_unsigned",
    "choose_",
    "coded_activation",
    "control",
    "cuda_stream_bound",
    "distribution_code",
    "dropout",
    "estimate_",
    "function_code",
    "gate",
    "gate_linear",
    "isas",
    "lora_linear",
    "mask_bits_",
    "noise_",
    "norm",
    "norm_pair",
    "output_activation",
    "pass_",
    "pass_rows_",
    "select_isa",
    "signed",
]
