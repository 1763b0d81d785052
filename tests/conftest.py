"""What tests run on: every device and instruction set of this machine, numbers of threads."""

from collections.abc import Iterator

import pytest
import torch

from pyzo import ops

_NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def devices() -> list[object]:
    """Parameters for `device`: cpu, and cuda (skipped with a reason where there is none)."""
    return ["cpu", pytest.param("cuda", marks=_NO_CUDA)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices())
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", ops.isas(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Selects one instruction set of the CPU bodies for a test."""
    ops.select_isa(request.param)
    yield request.param
    ops.select_isa("")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs a test with 1, 2 and 3 threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
