"""The registry: every operator of ops.inc passes opcheck, traces under torch.compile and has a reference."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bits import assert_same_bits, weights

import pyzo
from pyzo import ops, reference

OPS_INC = Path(__file__).parents[1] / "csrc" / "ops.inc"
LINES = re.findall(r'^PYZO_(HOST_)?OP\((\w+), "(.*)"\)$', OPS_INC.read_text(), re.MULTILINE)
SCHEMAS = {name: schema for _, name, schema in LINES}
DEVICE_OPS = {name for host, name, _ in LINES if not host}
HOST_OPS = {name for host, name, _ in LINES if host}
Arguments = tuple[object, ...]


def step_control(device: str) -> torch.Tensor:
    control = torch.zeros(5, 12, dtype=torch.int64)
    control.view(torch.float64)[3:, :5] = torch.tensor([0.1, 0.01, 0.1, 1.5, -0.5], dtype=torch.float64)
    control[0, 4] = 42
    reference.begin_step_(control)
    return control.to(device)


def tensors(device: str) -> list[torch.Tensor]:
    return [
        weights(n, dtype, seed=n, special=False).to(device)
        for n, dtype in ((65, torch.float32), (7, torch.bfloat16), (130, torch.float16))
    ]


def table(device: str) -> torch.Tensor:
    return torch.tensor([[1, 0, 0, 0, 0], [2, 5, 3, 8, 1], [3, 2**34, 0, 0, 0]])


# Operator -> samples of arguments. An operator without a sample fails below.
SAMPLES: dict[str, Callable[[str], list[Arguments]]] = {
    "pass_": lambda device: [
        ([], tensors(device), table(device), step_control(device), 0, 0, 1.0, 2, 1, -1.0, True),
        (tensors(device), tensors(device), table(device), step_control(device), 1, -1, 0.0, 1, -1, 0.0, False),
        ([], [], torch.zeros(0, 5, dtype=torch.int64), step_control(device), 0, -1, 0.0, 0, 0, 1.0, False),
    ],
    "noise_": lambda device: [
        (torch.empty(100, device=device), -1, 2**56 - 1, 3, 10, 100, 0),
        (torch.empty(4, 33, dtype=torch.float16, device=device), 1, 2, 0, 0, 0, 1),
        (torch.empty(0, dtype=torch.bfloat16, device=device), 1, 2, 0, 0, 0, 0),
    ],
    "philox_": lambda device: [(torch.empty(5, 4, dtype=torch.int32, device=device), -1, 2, -3)],
    "begin_step_": lambda device: [(step_control(device),)],
    "estimate_two_sided_": lambda device: [
        (step_control(device), torch.tensor([1.0, 0.5, 2.0, 2.5], dtype=torch.float64, device=device)),
        (step_control(device), torch.tensor([1.0, torch.nan], dtype=torch.float64, device=device)),
    ],
}


def test_every_line_of_the_registry_is_seen():
    text = re.sub(r"^//.*$", "", OPS_INC.read_text(), flags=re.MULTILINE)
    assert len(LINES) == len([line for line in text.splitlines() if line.strip()])
    assert all(schema.startswith(f"{name}(") for name, schema in SCHEMAS.items())


def test_registered_schemas_are_those_of_the_registry():
    registered = {
        s.name.removeprefix("pyzo::"): s for s in torch._C._jit_get_all_schemas() if s.name.startswith("pyzo::")
    }
    assert set(registered) == set(SCHEMAS)
    for name, schema in SCHEMAS.items():
        assert str(registered[name]) == str(torch._C.parse_schema(f"pyzo::{schema}"))


def test_reference_samples_and_wrappers_name_the_same_operators():
    assert set(reference.OPERATORS) == DEVICE_OPS
    assert set(SAMPLES) == DEVICE_OPS
    assert not HOST_OPS - set(vars(ops))


@pytest.mark.parametrize("name", sorted(DEVICE_OPS))
def test_opcheck(name, device):
    """Schema (what is mutated), autograd registration, the fake kernel of pyzo.ops, and tracing with dynamic shapes."""
    for arguments in SAMPLES[name](device):
        torch.library.opcheck(getattr(torch.ops.pyzo, name).default, arguments)


def flat(arguments: Arguments) -> list[torch.Tensor]:
    return [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("name", sorted(DEVICE_OPS))
def test_compiled_bits_are_eager_bits_and_the_reference_s(name, device):
    operator = getattr(torch.ops.pyzo, name)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*arguments: object) -> None:
        operator(*arguments)

    for i in range(len(SAMPLES[name](device))):
        by_compiled, by_eager, by_reference = (SAMPLES[name](where)[i] for where in (device, device, "cpu"))
        compiled(*by_compiled)
        operator(*by_eager)
        reference.OPERATORS[name](*by_reference)
        for c, e, r in zip(flat(by_compiled), flat(by_eager), flat(by_reference), strict=True):
            assert_same_bits(c, e, f"{name}, sample {i}, compiled")
            assert_same_bits(e.cpu(), r, f"{name}, sample {i}, reference")
    torch.compiler.reset()


def test_noise_compiles_without_a_break(device):
    def draw() -> torch.Tensor:
        return pyzo.noise((3, 5), seed=1, key=2, device=device) * 2.0

    assert_same_bits(torch.compile(draw, fullgraph=True, backend="aot_eager")(), draw())
    torch.compiler.reset()


def test_instruction_sets():
    names = ops.isas()
    assert names and names[-1] == "base"
    for name in names:
        ops.select_isa(name)
        assert f"{name}*" in torch.ops.pyzo.isas().split()
    ops.select_isa("")
    assert torch.ops.pyzo.isas().split()[0] == f"{names[0]}*"
    with pytest.raises(ValueError, match=r"name: expected one of .*got 'mmx'"):
        ops.select_isa("mmx")


def test_stream_is_bound_where_torch_has_cuda():
    assert ops.cuda_stream_bound() == (torch.version.cuda is not None)
