"""What the benchmark reads from the names of CUDA kernels, and that it compiles all of them."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # at the end: pyzo is the installed one

from bench import toolkit  # noqa: E402

# Names that nvcc 13.0 made.
KERNELS = [
    (
        "_ZN4pyzo4cuda11pass_kernelILNS_5DtypeE2ELS2_0ELi1ELb0ELi8ELi3EEEvNS0_6LaunchE",
        "pass_kernel fp16 rademacher nearest general adam state fp32",
        2 + 2 * 4,
    ),
    (
        "_ZN4pyzo4cuda11pass_kernelILNS_5DtypeE0ELS2_1ELi0ELb1ELi8ELi2EEEvNS0_6LaunchE",
        "pass_kernel fp32 normal stochastic general momentum state bf16",
        4 + 2,
    ),
    (
        "_ZN4pyzo4cuda11pass_kernelILNS_5DtypeE1ELS2_0ELi0ELb1ELi6ELi0EEEvNS0_6LaunchE",
        "pass_kernel bf16 normal stochastic undo+update sgd",
        2,
    ),
    (
        "_ZN4pyzo4cuda43_GLOBAL__N__618bbb7b_10_kernels_cu_c0c6baae12noise_kernelILNS_5DtypeE1ELi1EEEvNS_6SourceE",
        "noise_kernel bf16 rademacher",
        2,
    ),
    (
        "_ZN4pyzo4cuda43_GLOBAL__N__618bbb7b_10_kernels_cu_c0c6baae13choose_kernelENS_7ControlEPKd",
        "choose_kernel",
        4,
    ),
]


@pytest.mark.parametrize(("mangled", "name", "stored_bytes"), KERNELS)
def test_kernels_by_name(mangled, name, stored_bytes):
    assert toolkit.short_name(mangled) == name
    assert toolkit.Kernel.parse(mangled).stored_bytes == stored_bytes


def test_every_cuda_source_is_compiled():
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cu")}
    assert set(toolkit.CUDA_SOURCES) == found
    assert len(found) > 1
