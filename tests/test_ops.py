"""The registry: every operator of ops.inc passes opcheck, traces under torch.compile and has a reference.

Arguments come from the `samples_*.py` beside this file: `SAMPLES` from an operator's name to a function of the device
that makes a list of arguments, and `EXACT`, whether the reference promises the bits.
"""

import importlib
import re
from pathlib import Path

import pytest
import torch
from bits import assert_same_bits

import pyzo
from pyzo import ops, reference

OPS_INC = Path(__file__).parents[1] / "csrc" / "ops.inc"
LINES = re.findall(r'^PYZO_(HOST_)?OP\((\w+), "(.*)"\)$', OPS_INC.read_text(), re.MULTILINE)
SCHEMAS = {name: schema for _, name, schema in LINES}
COMPOSITES = {"activation_linear", "gate_linear", "lora_linear", "lora_linear_backward"}  # made of others, in Python
DEVICE_OPS = {name for host, name, _ in LINES if not host}
HOST_OPS = {name for host, name, _ in LINES if host}
FAMILIES = [importlib.import_module(file.stem) for file in sorted(Path(__file__).parent.glob("samples_*.py"))]
SAMPLES = {name: make for family in FAMILIES for name, make in family.SAMPLES.items()}
EXACT = {name: family.EXACT for family in FAMILIES for name in family.SAMPLES}


def test_every_line_of_the_registry_is_seen():
    text = re.sub(r"^//.*$", "", OPS_INC.read_text(), flags=re.MULTILINE)
    assert len(LINES) == len([line for line in text.splitlines() if line.strip()])
    assert all(schema.startswith(f"{name}(") for name, schema in SCHEMAS.items())


def test_registered_schemas_are_those_of_the_registry():
    registered = {
        s.name.removeprefix("pyzo::"): s for s in torch._C._jit_get_all_schemas() if s.name.startswith("pyzo::")
    }
    assert set(registered) == set(SCHEMAS) | COMPOSITES
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


def flat(*arguments: object) -> list[torch.Tensor]:
    """All tensors: of lists and tuples too."""
    leaves = torch.utils._pytree.tree_leaves(arguments)
    return [t.detach() for t in leaves if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("name", sorted(DEVICE_OPS))
def test_compiled_bits_are_eager_bits_and_the_reference_s(name, device):
    operator = getattr(torch.ops.pyzo, name)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*arguments: object) -> object:
        return operator(*arguments)

    for i in range(len(SAMPLES[name](device))):
        torch.compiler.reset()
        by_compiled, by_eager, by_reference = (SAMPLES[name](where)[i] for where in (device, device, "cpu"))
        with torch.no_grad():
            compiled_results = flat(compiled(*by_compiled), by_compiled)
            results = flat(operator(*by_eager), by_eager)
            expected = flat(reference.OPERATORS[name](*by_reference), by_reference)
        for c, e, r in zip(compiled_results, results, expected, strict=True):
            assert_same_bits(c, e, f"{name}, sample {i}, compiled")
            if EXACT[name]:
                assert_same_bits(e.cpu(), r, f"{name}, sample {i}, reference")
            else:
                torch.testing.assert_close(e.cpu(), r, msg=lambda m, i=i: f"{name}, sample {i}, reference: {m}")
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
