"""The registry: every operator of ops.inc passes opcheck, traces under torch.compile and has a reference."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bits import assert_same_bits, weights
from sweeps import arguments, make_control, make_states

import pyzo
from pyzo import ops, reference

OPS_INC = Path(__file__).parents[1] / "csrc" / "ops.inc"
LINES = re.findall(r'^PYZO_(HOST_)?OP\((\w+), "(.*)"\)$', OPS_INC.read_text(), re.MULTILINE)
SCHEMAS = {name: schema for _, name, schema in LINES}
DEVICE_OPS = {name for host, name, _ in LINES if not host}
HOST_OPS = {name for host, name, _ in LINES if host}
Arguments = tuple[object, ...]


def step_control(device: str) -> torch.Tensor:
    return make_control(2, 2, seed=42).to(device)


def tensors(device: str) -> list[torch.Tensor]:
    return [
        weights(n, dtype, seed=n, special=False).to(device)
        for n, dtype in ((65, torch.float32), (7, torch.bfloat16), (130, torch.float16))
    ]


def table(device: str) -> torch.Tensor:
    return torch.tensor([[1, 0, 0, 0, 0], [2, 5, 3, 8, 1], [3, 2**34, 0, 0, 0]])


def pass_sample(
    device: str, src: list[torch.Tensor], state_dtype: torch.dtype | None = None, **step: object
) -> Arguments:
    """Arguments of a pass over all of `tensors`."""
    dst = tensors(device)
    state = make_states(str(step.get("rule", "sgd")), [t.numel() for t in dst], state_dtype, seed=9)
    state = [s.to(device) for s in state]
    return (src, dst, state, table(device), step_control(device), *arguments(step).values())


EVERYTHING = {"undo": 0, "undo_sign": 1.0, "directions": 2, "perturb": 1, "perturb_sign": -1.0, "stochastic": True}
LOSSES = {  # of each kind of estimate
    0: [1.0, 0.5, 2.0, 2.5],
    1: [1.0, 0.5, 2.0],
    2: [1.0, 0.5, 1.0, -2.0],
}


def estimate_sample(device: str, losses: list[float], kind: int, q: int, scaling: int) -> Arguments:
    return (step_control(device), torch.tensor(losses, dtype=torch.float64, device=device), kind, q, scaling)


def choose_sample(device: str, losses: list[float]) -> Arguments:
    return (step_control(device), torch.tensor(losses, dtype=torch.float64, device=device))


# Operator -> samples of arguments. An operator without a sample fails below.
SAMPLES: dict[str, Callable[[str], list[Arguments]]] = {
    "pass_": lambda device: [
        pass_sample(device, [], **EVERYTHING),
        pass_sample(device, [], **EVERYTHING, rule="sign", update_sign=-1.0, chosen=True, retract=True),
        pass_sample(device, tensors(device), **EVERYTHING, rule="momentum", state_dtype=torch.float32),
        pass_sample(device, [], **EVERYTHING, rule="adam", state_dtype=torch.bfloat16, masked=True),
        pass_sample(device, tensors(device), directions=1, distribution=1),
        ([], [], [], torch.zeros(0, 5, dtype=torch.int64), step_control(device), *arguments({}).values()),
    ],
    "noise_": lambda device: [
        (torch.empty(100, device=device), -1, 2**56 - 1, 3, 10, 100, 0),
        (torch.empty(4, 33, dtype=torch.float16, device=device), 1, 2, 0, 0, 0, 1),
        (torch.empty(0, dtype=torch.bfloat16, device=device), 1, 2, 0, 0, 0, 0),
    ],
    "philox_": lambda device: [(torch.empty(5, 4, dtype=torch.int32, device=device), -1, 2, -3)],
    "begin_step_": lambda device: [(step_control(device),)],
    "estimate_": lambda device: [
        *(estimate_sample(device, losses, kind, 2, scaling) for kind, losses in LOSSES.items() for scaling in (0, 2)),
        estimate_sample(device, LOSSES[1], 1, 2, 1),
        estimate_sample(device, [1.0, torch.inf], 0, 1, 0),
    ],
    "choose_": lambda device: [choose_sample(device, [2.0, 1.0, 3.0]), choose_sample(device, [2.0, torch.nan, 1.0])],
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
    for sample in SAMPLES[name](device):
        torch.library.opcheck(getattr(torch.ops.pyzo, name).default, sample)


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
