"""Weight decay: which parameters decay where a module is given, and where parameters or groups are."""

import pytest
import torch
from models import DECAYED, METHODS, transformer
from torch import nn

from pyzo.optim import ZOSGD, ForwardGradSGD


class RMSNorm(nn.Module):
    """As model libraries write their own."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class LlamaRMSNorm(RMSNorm):
    pass


class Quiet(LlamaRMSNorm):
    """A norm by what it derives from, not by its own name."""


class NormedLinear(nn.Linear):
    """No norm layer, whatever its name says: it has a matrix."""


class Gate(nn.Module):
    """Vectors that are neither a bias nor in a norm, and a matrix that is called a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.position_bias = nn.Parameter(torch.ones(4, 4))
        self.bias_k = nn.Parameter(torch.ones(4))


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv2d(2, 3, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.lstm = nn.LSTM(4, 4)
        self.layer_norm = nn.LayerNorm(4)
        self.batch_norm = nn.BatchNorm2d(3)
        self.group_norm = nn.GroupNorm(1, 3)
        self.instance_norm = nn.InstanceNorm1d(3, affine=True)
        self.rms_norm = nn.RMSNorm(4)
        self.model_norm = LlamaRMSNorm(4)  # what a name rule of "layernorm" would decay
        self.ln_f = Quiet(4)
        self.normed = NormedLinear(4, 4)
        self.gate = Gate()


ZOO_DECAYED = {
    "embedding.weight",
    "linear.weight",
    "conv.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "lstm.weight_ih_l0",
    "lstm.weight_hh_l0",
    "normed.weight",
    "gate.scale",
    "gate.position_bias",
}


def decayed_names(model: nn.Module, opt: torch.optim.Optimizer) -> set[str]:
    """Which parameters a step moves whose loss is the same everywhere: decay alone does."""
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    opt.step(lambda: 1.0)
    return {name for name, p in model.named_parameters() if not torch.equal(p, torch.full_like(p, 0.5))}


def test_norms_and_biases_of_a_module_are_left_out():
    model = Zoo()
    opt = ZOSGD(model, lr=0.1, weight_decay=0.1, store="snapshot")
    assert decayed_names(model, opt) == ZOO_DECAYED
    for name, p in model.named_parameters():
        want = 0.5 - 0.1 * 0.1 * 0.5 if name in ZOO_DECAYED else 0.5
        torch.testing.assert_close(p.detach(), torch.full_like(p, want), msg=name)


def test_a_norm_of_transformers_is_left_out():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    model = nn.Sequential(nn.Linear(4, 4, bias=False), modeling.LlamaRMSNorm(4))
    assert decayed_names(model, ZOSGD(model, lr=0.1, weight_decay=0.1, store="snapshot")) == {"0.weight"}


@pytest.mark.parametrize("given", ["parameters", "named", "groups"])
def test_all_decay_where_parameters_or_groups_are_given(given):
    model = Zoo()
    params = {
        "parameters": list(model.parameters()),
        "named": list(model.named_parameters()),
        "groups": [{"params": list(model.parameters())}],
    }[given]
    opt = ZOSGD(params, lr=0.1, weight_decay=0.1, store="snapshot")
    assert decayed_names(model, opt) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("method", ["sgd", "momentum", "sign", "adam", "adamw", "one-sided", "sparse adam"])
def test_every_rule_heeds_it(method):
    model = transformer()
    opt = METHODS[method](model, weight_decay=0.1, store="snapshot")
    assert decayed_names(model, opt) == set(DECAYED)


def test_forward_gradients_heed_it():
    model = transformer()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    opt = ForwardGradSGD(model, lr=0.1, weight_decay=0.1)
    opt.step(lambda: sum((0.0 * p).sum() for p in model.parameters()))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, torch.full_like(p, 0.5))}
    assert moved == set(DECAYED)


def test_a_tied_bias_decays_nowhere_and_a_tied_weight_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].weight = model[0].weight
    opt = ZOSGD(model, lr=0.1, weight_decay=0.1, store="snapshot")
    assert decayed_names(model, opt) == {"0.weight"}
    torch.testing.assert_close(model[0].weight.detach(), torch.full((4, 4), 0.495))


def test_a_change_between_steps_is_heeded():
    model = transformer()
    opt = ZOSGD(model, lr=0.1, store="snapshot")
    assert decayed_names(model, opt) == set()
    opt.param_groups[0]["weight_decay"] = 0.1
    assert decayed_names(model, opt) == set(DECAYED)
    opt.param_groups[0]["weight_decay"] = 0.0
    assert decayed_names(model, opt) == set()


def test_a_group_added_to_a_module_decays_whole():
    model = nn.Linear(4, 4)
    opt = ZOSGD(model, lr=0.1, weight_decay=0.1, store="snapshot")
    extra = nn.LayerNorm(4)
    opt.add_param_group({"params": [(f"extra.{n}", p) for n, p in extra.named_parameters()]})
    both = nn.ModuleDict({"model": model, "extra": extra})
    assert decayed_names(both, opt) == {"model.weight", "extra.weight", "extra.bias"}
