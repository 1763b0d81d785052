"""Ways to train one model with less saved for backward: what each does to the model, and how it runs then."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pyzo
from bench.memory.families import Batch
from bench.memory.mesa import Mesa

EAGER, EXACT, PAPER = "eager", "pyzo exact", "pyzo paper"
CHECKPOINTING, COMPILE, MESA, LIGER = "checkpointing", "torch.compile", "Mesa, 8 bits", "Liger"
OURS = {EXACT: "exact", PAPER: "paper"}  # recipes
ALL = (EAGER, EXACT, PAPER, CHECKPOINTING, COMPILE, MESA, LIGER)
LIGER_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")  # whose layers its kernels replace

Loss = Callable[[Batch], Tensor]


def left_out(way: str, family: str, device: str) -> str | None:
    """Why a way has no numbers here; None where it has, "" where it has nothing to do with the family."""
    if way != LIGER:
        return None
    if family not in LIGER_FAMILIES:
        return ""
    if torch.device(device).type != "cuda":
        return "its kernels need a GPU"
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        return "not installed (pip install liger-kernel)"
    return None


def prepare(way: str, model: nn.Module, *, backend: str = "inductor") -> Loss:
    """Changes the model, in place, to be trained in that way.

    Args:
        way: one of `ALL`.
        model: in training mode.
        backend: of torch.compile, which compiles every layer of the model by itself, anew for every shape.

    Returns:
        The forward pass on a batch under bfloat16 autocast, which returns the loss alone.
    """
    device = next(model.parameters()).device.type
    saving: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def loss(batch: Batch) -> Tensor:
        with saving(), torch.autocast(device, torch.bfloat16):
            return model(**batch)["loss"]

    if way in OURS:
        pyzo.convert(model, OURS[way])
    elif way == CHECKPOINTING:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif way == COMPILE:
        torch._dynamo.reset()  # all modules share the code that is compiled: others would count as its recompilations
        torch._inductor.config.compile_threads = 1  # processes of its own would take longer to start than they save
        for layer in pyzo.layers.stack(model).layers:
            model.get_submodule(layer.name).compile(backend=backend, dynamic=False, fullgraph=True)
    elif way == MESA:
        saving = Mesa
    elif way == LIGER:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model)
    elif way != EAGER:
        raise ValueError(f"way: expected one of {', '.join(map(repr, ALL))}, got {way!r}")
    return loss
