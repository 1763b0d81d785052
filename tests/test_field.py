"""`pyzo.noise` and parameter keys: arguments, shards, dtypes; the bits are tested in test_noise.py."""

import pytest
import torch

import pyzo
from pyzo.field import tensor_key


def test_keys_ignore_wrappers():
    key = tensor_key("model.layers.0.mlp.weight")
    for name in (
        "module.model.layers.0.mlp.weight",
        "_orig_mod.model.layers.0.mlp.weight",
        "model.layers._orig_mod.0.mlp.weight",
    ):
        assert tensor_key(name) == key
    assert tensor_key("base_model.model.module.x") == tensor_key("x")
    assert tensor_key("x.module.y") != tensor_key("x.y")  # only in front: a submodule may be called so
    assert 0 <= key < 1 << 56
    assert tensor_key("weight") == 0x52F3C0F40C56CE  # frozen with noise version 1


def test_columns_and_rows_are_rectangles_of_the_whole():
    whole = pyzo.noise((6, 40), seed=3, key=4)
    columns = pyzo.noise((6, 13), seed=3, key=4, offset=5, inner=13, stride=40)
    rows = pyzo.noise((2, 40), seed=3, key=4, offset=80)
    assert torch.equal(columns, whole[:, 5:18])
    assert torch.equal(rows, whole[2:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_dtypes_are_the_field_rounded(dtype, distribution):
    arguments = {"seed": 2**64 - 1, "key": 2**56 - 1, "offset": 2**40 + 3, "distribution": distribution}
    exact = pyzo.noise(1000, **arguments)
    assert torch.equal(pyzo.noise(1000, dtype=dtype, **arguments), exact.to(dtype))


def test_empty_and_scalar_shapes():
    assert pyzo.noise((0, 3), seed=1, key=1).shape == (0, 3)
    assert torch.equal(pyzo.noise((), seed=1, key=1), pyzo.noise(1, seed=1, key=1)[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": 2**64}, ValueError, r"seed: expected an integer in \[0, 2\^64\)"),
        ({"seed": "1"}, TypeError, "seed: expected an integer, got str"),
        ({"key": 2**56}, ValueError, "key"),
        ({"offset": -1}, ValueError, "offset"),
        ({"inner": 3}, ValueError, "expected both or neither"),
        ({"inner": 3, "stride": 2}, ValueError, "inner <= stride"),
        ({"dtype": torch.float64}, ValueError, "dtype: expected one of torch.float32"),
        ({"distribution": "uniform"}, ValueError, "distribution"),
        ({"offset": 2**63 - 2}, RuntimeError, r"indices below 2\^63"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        pyzo.noise(4, **{"seed": 1, "key": 1, **arguments})
