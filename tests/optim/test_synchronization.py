"""No step waits for its device: whole steps run on torch's meta device, whose tensors have no data to wait for.

There every shape, dtype and device is what it would be on a GPU, and whatever needs a value on the host (`.item()`,
`.tolist()`, `.cpu()`, a branch on a tensor, `nonzero`) raises. Only the rewinding of CUDA generators is not run here;
their states are host memory. Steps recorded into real graphs are in test_capture.py.
"""

import pytest
import torch
from models import METHODS, cross_entropy, methods, transformer
from torch import Tensor, nn

from pyzo.optim import ZOSGD, points
from pyzo.optim.graph import idle


def on_meta(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    x, y = torch.empty(12, 5, 4, dtype=dtype, device="meta"), torch.empty(12, dtype=torch.long, device="meta")
    return transformer(dtype).to("meta"), x, y


@pytest.fixture(autouse=True)
def tangents_without_storages(monkeypatch):
    """pyzo tells storages apart by their addresses, which meta tensors do not have."""
    monkeypatch.setattr(points, "new_tangents", lambda tensors: [torch.zeros_like(t) for t in tensors])


# torch's rules of forward mode mix dtypes on meta tensors of 16 bits: layer_norm
SIXTEEN_BIT = [(name, dtype) for name in METHODS if name != "forward" for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("method", "dtype"), [*((name, torch.float32) for name in METHODS), *SIXTEEN_BIT], ids=str)
@pytest.mark.parametrize("store", ["inplace", "snapshot"])
def test_a_step_reads_nothing_back(method, dtype, store):
    model, x, y = on_meta(dtype)
    opt = METHODS[method](model, store=store)
    for lr in (1e-2, 1e-2, 1e-3):  # the first step, a usual one, and one after a scheduler's
        opt.param_groups[0]["lr"] = lr
        loss = opt.step(lambda: cross_entropy(model, x, y))
        assert (loss.device.type, loss.dtype, loss.shape) == ("meta", torch.float32, ())


@methods
def test_what_a_capture_runs_reads_nothing_back(method):
    """The idle steps that warm up, and the step that is recorded."""
    model, x, y = on_meta()
    opt = METHODS[method](model)
    with idle(opt):
        opt.step(lambda: cross_entropy(model, x, y))
    opt._mode = "recording"
    opt.step(lambda: cross_entropy(model, x, y))


@methods
def test_taking_a_failed_step_back_reads_nothing_either(method):
    model, x, y = on_meta()
    opt = METHODS[method](model)
    calls = []

    def closure() -> Tensor:
        calls.append(None)
        if len(calls) == METHODS[method].calls:
            raise ValueError("stop")
        return cross_entropy(model, x, y)

    with pytest.raises(ValueError, match="stop"):
        opt.step(closure)


def test_the_trap_is_sharp():
    """What does wait for the device raises here."""
    model, x, y = on_meta()
    opt = ZOSGD(model)
    opt.step(lambda: cross_entropy(model, x, y))
    for wait in (
        lambda: opt.skipped,
        lambda: opt.last,
        opt.state_dict,
        lambda: opt.step(lambda: cross_entropy(model, x, y).item()),
        lambda: opt.step(lambda: cross_entropy(model, x, y) if x.sum() > 0 else 0.0),
        lambda: opt.step(lambda: x.masked_select(x > 0).mean() + y.sum()),
        lambda: opt.step(lambda: x.sum().cpu()),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()
