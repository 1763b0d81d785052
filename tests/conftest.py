"""What tests run on: every device and instruction set of this machine, numbers of threads."""

from collections.abc import Iterator
from contextlib import contextmanager

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
def isa(request: pytest.FixtureRequest) -> str:
    """Selects one instruction set of the CPU bodies for a test."""
    ops.select_isa(request.param)
    return request.param


@pytest.fixture(autouse=True)
def best_isa_after() -> Iterator[None]:
    """Whatever instruction set a test selects, the next one starts with the best."""
    yield
    ops.select_isa("")


@contextmanager
def _threads(count: int) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[int]:
    """For tests of many small tensor operations, which two threads only slow down."""
    with _threads(1) as count:
        yield count


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs a test with 1, 2 and 3 threads of torch."""
    with _threads(request.param) as count:
        yield count
