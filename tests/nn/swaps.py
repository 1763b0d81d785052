"""Puts layers of pyzo, or LoRA layers of plain torch, into the Hugging Face models of `shapes`."""

import torch
from shapes import llama, vit
from torch import Tensor, nn

import pyzo

RANK, ALPHA = 4, 8


class EagerLoRA(nn.Module):
    """A frozen linear with an adapter as PEFT computes it."""

    def __init__(self, base: nn.Linear, dropout: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        dtype = base.weight.dtype
        self.a = nn.Linear(base.in_features, RANK, bias=False, dtype=dtype)
        self.b = nn.Linear(RANK, base.out_features, bias=False, dtype=dtype)
        nn.init.normal_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(self.dropout(x))) * (ALPHA / RANK)


class GatedMLP(nn.Module):
    """Llama's MLP whose down projection recomputes the product."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module):
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x), self.up(x))


class PaperMLP(nn.Module):
    """Llama's MLP with ReSiLU2 in the place of SiLU, as LowMemoryBP has it."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp, self.activation = mlp, pyzo.nn.ReSiLU2()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp.down_proj(self.activation(self.mlp.gate_proj(x)) * self.mlp.up_proj(x))


def _own_lora(base: nn.Linear, dropout: float) -> nn.Module:
    return pyzo.nn.LoRALinear(base, RANK, ALPHA, dropout).to(base.weight.dtype)


def _down(linear: nn.Linear, dropout: float | None) -> nn.Module:
    if dropout is not None:
        return pyzo.nn.GatedLoRALinear(linear, RANK, ALPHA, dropout)
    out, inner = linear.weight.shape
    down = pyzo.nn.GatedLinear(inner, out, linear.bias is not None, dtype=linear.weight.dtype)
    down.load_state_dict(linear.state_dict())
    return down


def _adapt(module: nn.Module, dropout: float, lora: type | object) -> None:
    """Puts an adapter on every linear inside."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, lora(child, dropout))
        elif not isinstance(child, pyzo.nn.LoRALinear):
            _adapt(child, dropout, lora)


def eager_lora_llama(layers: int, dropout: float) -> nn.Module:
    model = llama(layers).requires_grad_(False)
    for layer in model.model.layers:
        _adapt(layer, dropout, EagerLoRA)
    return model


def paper_llama(layers: int) -> nn.Module:
    """ReSiLU2 and norms without affine, whose gain is merged into the linears."""
    model = llama(layers)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        consumers = {
            "input_layernorm": (attention.q_proj, attention.k_proj, attention.v_proj),
            "post_attention_layernorm": (mlp.gate_proj, mlp.up_proj),
        }
        for name, linears in consumers.items():
            norm = low_memory_rms(getattr(layer, name))
            setattr(layer, name, norm)
            pyzo.nn.merge_affine_(norm, linears)
        layer.mlp = PaperMLP(mlp)
    return model


def low_memory_llama(layers: int, dropout: float | None = None, *, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Exact: shared norms and a down projection that recomputes; `dropout`: with adapters on every linear."""
    model = llama(layers, dtype=dtype)
    if dropout is not None:
        model.requires_grad_(False)
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, low_memory_rms(getattr(layer, name)))
        layer.mlp = GatedMLP(layer.mlp.gate_proj, layer.mlp.up_proj, _down(layer.mlp.down_proj, dropout))
        if dropout is not None:
            _adapt(layer, dropout, _own_lora)
    return model


def low_memory_vit(layers: int, *, dtype: torch.dtype) -> nn.Module:
    """Shared norms, and 2 bits for GELU."""
    model = vit(layers, dtype=dtype)
    for layer in model.layers:
        for name in ("layernorm_before", "layernorm_after"):
            old = getattr(layer, name)
            norm = pyzo.nn.MSLayerNorm(old.normalized_shape, eps=old.eps, affine=True).to(dtype)
            norm.load_state_dict(old.state_dict())
            setattr(layer, name, norm)
        layer.mlp.activation_fn = pyzo.nn.ReGELU2()
    return model


def low_memory_rms(old: nn.Module) -> nn.Module:
    weight = old.weight
    norm = pyzo.nn.MSRMSNorm(weight.numel(), eps=old.variance_epsilon, affine=True).to(weight.dtype)
    norm.load_state_dict(old.state_dict())
    return norm.requires_grad_(weight.requires_grad)
