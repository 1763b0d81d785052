"""What tests of the scratch store share: a step beside one from a snapshot, and what must be as it was after a step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bits import assert_same_bits
from torch import Tensor, nn

from pyzo.optim import ZOSGD
from pyzo.stores import Scratch

ALIGNMENT = 64  # bytes, of every buffer
INTERCEPTED = ("forward", "_compiled_call_impl")  # attributes of modules


def mean_square(out: Tensor) -> Tensor:
    return out.float().square().mean()


def beside_a_snapshot(
    build: Callable[[], nn.Module],
    call: Callable[[nn.Module], Tensor],
    *,
    optimizer: Callable[..., ZOSGD] = ZOSGD,
    dtype: torch.dtype = torch.bfloat16,
    steps: int = 3,
    **arguments: Any,
) -> ZOSGD:
    """Trains by both stores; fails unless all losses and weights have the same bits. Returns the one with scratch."""
    seen = []
    for store in ("snapshot", "scratch"):
        torch.manual_seed(1)
        model = build().to(dtype)
        opt = optimizer(model, **{"lr": 1e-2, "eps": 1e-2, "store": store, **arguments})
        torch.manual_seed(2)
        with untouched(model, but_for="values"):
            losses = [opt.step(lambda model=model: call(model)) for _ in range(steps)]
        assert opt.skipped == 0
        assert all(torch.isfinite(loss) for loss in losses)
        seen.append(([*losses, opt.last.losses], list(model.parameters()), opt))
    (losses, weights, _), (got_losses, got, opt) = seen
    for i, (a, b) in enumerate(zip(got_losses, losses, strict=True)):
        assert_same_bits(a, b, f"loss {i}")
    for i, (a, b) in enumerate(zip(got, weights, strict=True)):
        assert_same_bits(a, b, f"parameter {i}")
    return opt


@contextmanager
def untouched(model: nn.Module, but_for: str = "") -> Iterator[None]:
    """Fails unless parameters lie where they lay, modules have the attributes that they had and, without
    `but_for="values"`, weights have the bits that they had."""
    before = [(p, p.data_ptr(), p.stride(), p.requires_grad, p.detach().clone()) for p in model.parameters()]
    attributes = {module: dict(module.__dict__) for module in model.modules()}
    try:
        yield
    finally:
        for i, (p, pointer, stride, requires_grad, value) in enumerate(before):
            assert (p.data_ptr(), p.stride(), p.requires_grad) == (pointer, stride, requires_grad), i
            if but_for != "values":
                assert_same_bits(p, value, f"parameter {i}")
        for module, own in attributes.items():
            assert [module.__dict__.get(name) for name in INTERCEPTED] == [own.get(name) for name in INTERCEPTED]


def borrowed(opt: ZOSGD) -> dict[str, int]:
    """By the class of a module ("closure" for none), how many weights of others it was found to need."""
    assert isinstance(opt.store, Scratch)
    found: dict[str, int] = {}
    for scope in (*opt.store._scopes, opt.store._closure):
        own = 0 if scope.module is None else sum(p is not None for p in scope.module._parameters.values())
        others = sum(len(places) for places in scope.needs.values()) - own
        if others > 0:
            name = "closure" if scope.module is None else type(scope.module).__name__
            found[name] = found.get(name, 0) + others
    return found


def chain_bytes(module: nn.Module) -> int:
    """The largest sum of trained parameters that modules inside each other have themselves, buffers aligned."""
    own = [p for p in module.parameters(recurse=False) if p.requires_grad]
    inside = max((chain_bytes(child) for child in module.children()), default=0)
    return sum(-(-p.numel() * p.element_size() // ALIGNMENT) * ALIGNMENT for p in own) + inside
