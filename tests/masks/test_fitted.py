"""Masks that are fitted to tensors: what they measure, list or pack, and what they refuse."""

import math

import pytest
import torch
from torch import nn

from pyzo.masks import Bits, Indices, Mask, Random, SmallMagnitude, load_mask
from pyzo.masks.bits import pack


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: scale * torch.randn(50, 40, generator=generator) for name, scale in (("a", 0.1), ("b", 1.0), ("c", 3.0))
    }


# Random, densities by magnitude ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.9])
def test_densities_are_those_of_global_magnitude_pruning(sparsity):
    tensors = weights()
    magnitudes = torch.cat([t.abs().reshape(-1) for t in tensors.values()]).sort().values
    pruned = round(sparsity * len(magnitudes))
    threshold = magnitudes[pruned - 1] if pruned else -1.0
    masks = Random(sparsity, layerwise="magnitude").fit(tensors)
    for name, t in tensors.items():
        assert masks[name].keep == round((t.abs() > threshold).double().mean().item() * 65536)
        assert masks[name].threshold == math.inf
    mean = sum(mask.keep for mask in masks.values()) / 3 / 65536
    assert abs(mean - (1 - sparsity)) < 1e-4  # the pruned share of all is the sparsity
    assert sparsity in (0.0,) or masks["a"].keep < masks["b"].keep < masks["c"].keep


def test_a_tensor_of_small_weights_may_stay_as_a_whole():
    masks = Random(0.5, layerwise="magnitude").fit({"a": torch.full((10,), 0.1), "b": torch.ones(10)})
    assert (masks["a"].keep, masks["b"].keep) == (0, 65536)


@pytest.mark.parametrize("layerwise", ["layer", None, 1])
def test_bad_layerwise(layerwise):
    with pytest.raises(ValueError, match="layerwise: expected 'uniform' or 'magnitude', got"):
        Random(0.5, layerwise=layerwise)


# SmallMagnitude -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.5, 1.0, 1])
def test_the_threshold_is_the_quantile_of_each_tensor(fraction):
    for name, mask in SmallMagnitude(fraction).fit(weights()).items():
        t = weights()[name]
        assert int((t.abs() <= mask.threshold).sum()) == max(1, round(fraction * t.numel()))
        assert (t.abs() == mask.threshold).any()


def test_ties_count_as_small():
    mask = SmallMagnitude(0.1).fit({"w": torch.ones(10)})["w"]
    assert mask.threshold == 1.0


def test_weights_that_are_not_finite_are_refused_by_name():
    with pytest.raises(ValueError, match="mask: expected finite weights to take a threshold from, got nan in w"):
        SmallMagnitude(1.0).fit({"w": torch.tensor([1.0, math.nan])})


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan, "0.5", None, True])
def test_bad_fractions(fraction):
    with pytest.raises(ValueError, match=r"fraction: expected a number in \(0, 1\], got"):
        SmallMagnitude(fraction)


# Bits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000])
def test_bits_are_packed_in_order(n, monkeypatch):
    monkeypatch.setattr("pyzo.masks.order.CHUNK", 64)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and len(packed) == (n + 7) // 8
    unpacked = (packed.unsqueeze(1) >> torch.arange(8)) & 1
    assert torch.equal(unpacked.reshape(-1)[:n].bool(), mask)
    assert not unpacked.reshape(-1)[n:].any()


def test_bits_by_name_and_by_place():
    mask = torch.tensor([[True, False], [False, True]])
    tensors = {"a": torch.zeros(2, 2), "b": torch.zeros(4)}
    by_name = Bits({"a": mask, "b": mask, "frozen": mask})
    assert all(torch.equal(m.bits, pack(mask)) for m in by_name.fit(tensors).values())
    by_place = Bits([mask, ~mask])
    fitted = by_place.fit({"#0": torch.zeros(4), "#1": torch.zeros(4)})
    assert torch.equal(fitted["#1"].bits, pack(~mask))


def test_bad_bits():
    mask = torch.ones(4, dtype=torch.bool)
    for given in (mask, 3, "a", None):
        with pytest.raises(TypeError, match="tensors: expected a mapping from parameter names"):
            Bits(given)
    with pytest.raises(TypeError, match=r"tensors\['a'\]: expected a bool tensor, got torch.uint8"):
        Bits({"a": mask.byte()})
    with pytest.raises(TypeError, match=r"tensors\['#1'\]: expected a tensor, got list"):
        Bits([mask, [True]])
    with pytest.raises(ValueError, match="tensors: expected at least one tensor, got none"):
        Bits({})
    with pytest.raises(ValueError, match="mask: expected bits for every trained parameter, got none for b"):
        Bits({"a": mask}).fit({"a": torch.zeros(4), "b": torch.zeros(4)})
    with pytest.raises(ValueError, match="mask: expected 5 bits for a, got 4"):
        Bits({"a": mask}).fit({"a": torch.zeros(5)})
    with pytest.raises(ValueError, match="mask: expected names of the optimizer's parameters, got 'x'"):
        Bits({"x": mask}).check_names(["a"])


# Indices --------------------------------------------------------------------------------------------------------------


def test_indices_are_ordered_and_missing_tensors_do_not_move():
    mask = Indices({"a": torch.tensor([[5, 1], [3, 0]], dtype=torch.int32)})
    assert len(mask) == 4
    assert mask["a"].tolist() == [0, 1, 3, 5]
    fitted = mask.fit({"a": torch.zeros(2, 3), "b": torch.zeros(2)})
    assert fitted["a"].indices.tolist() == [0, 1, 3, 5] and fitted["a"].indices.dtype == torch.int64
    assert fitted["b"].indices.tolist() == []


def test_bad_indices():
    with pytest.raises(TypeError, match=r"tensors\['a'\]: expected integer indices, got torch.float32"):
        Indices({"a": torch.ones(2)})
    with pytest.raises(TypeError, match=r"tensors\['a'\]: expected integer indices, got torch.bool"):
        Indices({"a": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"tensors\['a'\]: expected indices >= 0, got -1"):
        Indices({"a": torch.tensor([3, -1])})
    with pytest.raises(ValueError, match=r"tensors\['a'\]: expected each index once, got 3 twice"):
        Indices({"a": torch.tensor([3, 1, 3])})
    with pytest.raises(ValueError, match="mask: expected indices below 3 for a, got 3"):
        Indices({"a": torch.tensor([3])}).fit({"a": torch.zeros(3)})


class Quadratic(nn.Module):
    """Loss sum_i s_i w_i x: the gradient of w_i is s_i x."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones(3, 2))
        self.b = nn.Parameter(torch.ones(4))
        self.idle = nn.Parameter(torch.ones(5))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return x * ((self.a.reshape(-1) * scale[0]).sum() + (self.b * scale[1]).sum() + (self.frozen * 100).sum())


SCALE = (torch.tensor([1.0, -9.0, 2.0, 0.0, 3.0, 3.0]), torch.tensor([8.0, 3.0, 0.5, -7.0]))


def loss(model: nn.Module, x: float) -> torch.Tensor:
    return model(torch.tensor(x), SCALE)


@pytest.mark.parametrize(
    ("count", "a", "b"),
    [
        (1, [1], []),
        (2, [1], [0]),
        (3, [1], [0, 3]),
        (4, [1, 4], [0, 3]),
        (5, [1, 4, 5], [0, 3]),
        (9, [0, 1, 2, 4, 5], [0, 1, 2, 3]),
    ],
)
def test_top_sensitive_lists_the_largest_squared_gradients_of_the_whole_model(count, a, b):
    model = Quadratic()
    mask = Indices.top_sensitive(model, [1.0, -2.0], count / 15, loss=loss)
    assert len(mask) == count
    assert mask["a"].tolist() == a
    assert (mask["b"].tolist() if b else []) == b
    assert all(p.grad is None for p in model.parameters())


def test_weights_without_a_gradient_are_not_listed():
    mask = Indices.top_sensitive(Quadratic(), [1.0], 1.0, loss=loss)
    assert len(mask) == 9
    with pytest.raises(KeyError):
        mask["idle"]


def test_gradients_are_taken_under_no_grad_too_and_batches_may_be_keywords():
    class WithLoss(Quadratic):
        def forward(self, x: torch.Tensor):
            return type("Output", (), {"loss": super().forward(x, SCALE)})

    with torch.no_grad():
        mask = Indices.top_sensitive(WithLoss(), [{"x": torch.tensor(1.0)}], 1 / 15)
    assert mask["a"].tolist() == [1]


def test_bad_sensitivities():
    model = Quadratic()
    with pytest.raises(ValueError, match=r"fraction: expected a number in \(0, 1\], got 0"):
        Indices.top_sensitive(model, [1.0], 0, loss=loss)
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        Indices.top_sensitive(model, [], 0.1, loss=loss)
    with pytest.raises(ValueError, match="batches: expected gradients with finite squares, got others for a"):
        Indices.top_sensitive(model, [math.inf], 0.1, loss=loss)
    with pytest.raises(TypeError, match="batches: expected mappings for model"):
        Indices.top_sensitive(model, [1.0], 0.1)
    with pytest.raises(ValueError, match="model: expected parameters that require gradients, got none"):
        Indices.top_sensitive(model.requires_grad_(False), [1.0], 0.1, loss=loss)


# Saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [
        Random(0.3, 2, "magnitude"),
        SmallMagnitude(0.25),
        Bits({"a": torch.tensor([True, False])}),
        Indices({"a": torch.tensor([1])}),
    ],
    ids=lambda mask: type(mask).__name__,
)
def test_masks_survive_a_file(mask, tmp_path):
    torch.save(mask.plain(), tmp_path / "mask.pt")
    again = load_mask(torch.load(tmp_path / "mask.pt", weights_only=True))
    assert isinstance(again, type(mask)) and repr(again) == repr(mask)
    a = {"a": torch.tensor([1.0, 2.0])}
    one, other = (m.fit(a)["a"] for m in (mask, again))
    assert (one.keep, one.threshold) == (other.keep, other.threshold)
    for x, y in ((one.bits, other.bits), (one.indices, other.indices)):
        assert (x is None and y is None) or torch.equal(x, y)


def test_an_unknown_kind_is_refused():
    assert load_mask(None) is None
    with pytest.raises(
        ValueError, match="state_dict: expected a mask of kind Bits or Indices or Random or SmallMagnitude"
    ):
        load_mask({"kind": "Other"})
    assert {kind.__name__ for kind in Mask.__subclasses__()} == {"Bits", "Indices", "Random", "SmallMagnitude"}
