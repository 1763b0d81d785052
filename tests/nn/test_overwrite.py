"""Gradients over the saved gate and up: only where nobody can see those any more, and then backward needs no memory."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from bits import assert_same_bits
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from pyzo import ops
from pyzo.memory import account
from pyzo.ops import overwrite

SHAPE = (5, 8)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed)).requires_grad_()


class Watch:
    """Notes where gate lay and where its gradient lies, without a reference to either."""

    def __init__(self) -> None:
        self.places: list[int] = []

    def __call__(self, gate: Tensor) -> Tensor:
        self.gate = gate.data_ptr()
        if gate.requires_grad:  # not in the first run of a checkpoint
            gate.register_hook(lambda gradient: self.places.append(gradient.data_ptr()))
        return gate

    @property
    def overwritten(self) -> bool:
        assert len(self.places) == 1
        return self.places[0] == self.gate


def chunked(x: Tensor, watch: Watch) -> Tensor:
    gate, up = x.chunk(2, -1)
    return ops.gate(watch(gate), up, "silu")


def later_user(x: Tensor, watch: Watch) -> Tensor:
    gate = watch(x * 2)
    product = ops.gate(gate, x * 3, "silu")
    return gate.square() + product


LATER = "saved by what has run backward before"
WEIGHT = leaf(8, 8, seed=1)
BIAS = leaf(8, seed=2)

ALONE: dict[str, Callable[[Tensor, Watch], Tensor]] = {
    "results": lambda x, watch: ops.gate(watch(x * 2), x * 3, "silu"),
    "linear": lambda x, watch: ops.gate(watch(x @ WEIGHT), x @ WEIGHT, "silu"),
    "views": lambda x, watch: ops.gate(watch((x * 2).view(8, 5)), (x * 3).view(8, 5), "silu"),
    "one view": lambda x, watch: ops.gate(watch(x * 2), (x * 3).view(*SHAPE), "silu"),
    "batched linear with bias": lambda x, watch: ops.gate(
        watch(nn.functional.linear(x[None], WEIGHT, BIAS)), x[None] * 2, "silu"
    ),
    "halves": lambda x, watch: chunked(x @ WEIGHT, watch),
    "down projection": lambda x, watch: ops.gate_linear(watch(x * 2), x * 3, WEIGHT, BIAS),
    LATER: later_user,
    "reentrant checkpoint": lambda x, watch: checkpoint(
        lambda x: ops.gate(watch(x * 2), x * 3, "silu"), x, use_reentrant=True
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_alone(name):
    """Twice: the second time the graph is new, and memory has been used before."""
    for seed in (3, 4):
        watch, x = Watch(), leaf(seed=seed)
        ALONE[name](x, watch).sum().backward()
        again = leaf(seed=seed)
        ALONE[name](again, Watch()).sum().backward(retain_graph=True)
        assert_same_bits(x.grad, again.grad, "over the saved tensors, and beside them")
    if name != LATER:  # where the gradient that is seen is a sum
        assert watch.overwritten


# Each keeps something alive by which gate or up can be seen; returns the product and that.
SEEN: dict[str, Callable[[Tensor, Watch], tuple[Tensor, Any]]] = {
    "gate": lambda x, watch: (lambda g: (ops.gate(watch(g), x * 3, "silu"), g))(x * 2),
    "up": lambda x, watch: (lambda u: (ops.gate(watch(x * 2), u, "silu"), u))(x * 3),
    "detached": lambda x, watch: (lambda g: (ops.gate(watch(g), x * 3, "silu"), g.detach()))(x * 2),
    "a part": lambda x, watch: (lambda g: (ops.gate(watch(g), x * 3, "silu"), g[:1]))(x * 2),
    "the storage": lambda x, watch: (lambda g: (ops.gate(watch(g), x * 3, "silu"), g.untyped_storage()))(x * 2),
    "a NumPy array": lambda x, watch: (lambda g: (ops.gate(watch(g), x * 3, "silu"), g.detach().numpy()))(x * 2),
    "a DLPack capsule": lambda x, watch: (
        lambda g: (ops.gate(watch(g), x * 3, "silu"), torch.utils.dlpack.to_dlpack(g.detach()))
    )(x * 2),
    "what both are halves of": lambda x, watch: (lambda h: (chunked(h, watch), h))(x * 2),
    "a leaf": lambda x, watch: (ops.gate(watch(x), x * 3, "silu"), None),
    "a view of a leaf": lambda x, watch: (ops.gate(watch(x.view(8, 5)), (x * 3).view(8, 5), "silu"), None),
    "one tensor twice": lambda x, watch: (lambda g: (ops.gate(watch(g), g, "silu"), None))(x * 2),
    "a constant": lambda x, watch: (ops.gate(watch(x * 2), torch.ones(SHAPE), "silu"), None),
    "a node that runs backward later": lambda x, watch: (
        lambda g: (g.square() + ops.gate(watch(g), x * 3, "silu"), None)
    )(x * 2),
    "down projection": lambda x, watch: (lambda g: (ops.gate_linear(watch(g), x * 3, WEIGHT), g))(x * 2),
    "views with elements in common": lambda x, watch: (
        (lambda h: ops.gate(watch(h[:, :5]), h[:, 3:], "silu"))(x * 2),
        None,
    ),
    "equal views": lambda x, watch: ((lambda h: ops.gate(watch(h.view(8, 5)), h.view(8, 5), "silu"))(x * 2), None),
    "shared memory": lambda x, watch: (ops.gate(watch((x * 2).share_memory_()), x * 3, "silu"), None),
    "a node that saved its output": lambda x, watch: (ops.gate(watch(x.exp()), x * 3, "silu"), None),
}


@pytest.mark.parametrize("name", SEEN)
def test_whoever_still_sees_the_inputs_sees_them_unchanged(name):
    watch, x = Watch(), leaf()
    product, seen = SEEN[name](x, watch)
    as_tensor = {Tensor: lambda: seen.detach().clone(), numpy.ndarray: lambda: torch.from_numpy(seen.copy())}
    before = as_tensor.get(type(seen), lambda: torch.zeros(0))()
    product.sum().backward()
    assert not watch.overwritten
    assert_same_bits(as_tensor.get(type(seen), lambda: torch.zeros(0))(), before)
    again = leaf()
    SEEN[name](again, Watch())[0].sum().backward(retain_graph=True)
    assert_same_bits(x.grad, again.grad)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (3, 2, 6), (2, 1, 3, 4)])
def test_views_apart(shape):
    """Against the elements themselves, for every pair of beginnings in rows of every length."""
    seen = set()
    for row in range(shape[-1], 2 * shape[-1] + 2):
        strides = [1, row]
        for size in reversed(shape[1:-1]):
            strides.append(strides[-1] * size)
        layout = (shape, strides[: len(shape)][::-1])
        base = torch.arange(3 * row * torch.Size(shape[:-1]).numel())
        room = len(base) - base.as_strided(*layout, 0).max().item()
        for first, second in itertools.product(range(min(room, 2 * row)), range(room)):
            views = [base.as_strided(*layout, at) for at in (first, second)]
            apart = not set(views[0].flatten().tolist()) & set(views[1].flatten().tolist())
            assert overwrite._apart(*views) == apart
            seen.add(apart)
    assert seen == {False, True}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "function",
    [
        lambda g, u: ops.gate(g, u, "silu"),
        lambda g, u: ops.gate_linear(g, u, WEIGHT),
        lambda g, u: ops.activation_linear(g * u, WEIGHT.clone().requires_grad_()),
    ],
)
def test_a_batch_of_gradients(function):
    """Its gradients would all be written over one tensor."""
    x, gradients = leaf(), torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5))
    want = [torch.autograd.grad(function(x * 2, x * 3), x, gradient)[0] for gradient in gradients]
    (got,) = torch.autograd.grad(function(x * 2, x * 3), x, gradients, is_grads_batched=True)
    assert_same_bits(got, torch.stack(want))
    product = function(x * 2, x * 3)
    got = torch.func.vmap(lambda gradient: torch.autograd.grad(product, x, gradient)[0])(gradients)
    assert_same_bits(got, torch.stack(want))


def test_a_gradient_of_a_subclass():
    """Its operators may run more than once, as those of these pairs do."""
    x = leaf()
    product = ops.gate(x * 2, x * 3, "silu")
    (got,) = torch.autograd.grad(product, x, TwoTensor(torch.ones(SHAPE), torch.full(SHAPE, 2.0)))
    for gradient, part in ((1.0, got.a), (2.0, got.b)):
        (want,) = torch.autograd.grad(ops.gate(x * 2, x * 3, "silu"), x, torch.full(SHAPE, gradient))
        assert_same_bits(part, want)


def test_a_derivative_of_the_gradient_is_refused_where_the_graph_is_not_kept():
    x = leaf()
    product = ops.gate(x * 2, x * 3, "silu").sum()
    (gradient,) = torch.autograd.grad(product, x, create_graph=True, retain_graph=False)
    with pytest.raises(NotImplementedError, match="gate_backward has no derivative"):
        gradient.sum().backward()


def test_nothing_is_taken_for_alone_where_hooks_ran_at_import():
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert overwrite._sole_owners() == {}


def test_memory_of_numpy_is_not_overwritten():
    array = numpy.ones(SHAPE, dtype=numpy.float32)
    gate = torch.from_numpy(array)
    gate.mul_(leaf().square() + 1)  # now a result of the graph, in NumPy's memory
    before = array.copy()
    product = ops.gate(gate, leaf() * 3, "silu")
    del gate
    product.sum().backward()
    assert (array == before).all()


def test_kept_graph():
    x = leaf()
    product = ops.gate(x * 2, x * 3, "silu").sum()
    gradients = [torch.autograd.grad(product, x, retain_graph=True)[0] for _ in range(2)]
    gradients += torch.autograd.grad(product, x)
    for gradient in gradients[1:]:
        assert_same_bits(gradient, gradients[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        product.backward()


def test_saved_tensor_hooks_see_what_they_saved():
    watch, x = Watch(), leaf()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        product = ops.gate(watch(x * 2), x * 3, "silu")
    before = [t.detach().clone() for t in kept]
    product.sum().backward()
    assert not watch.overwritten
    for t, was in zip(kept, before, strict=True):
        assert_same_bits(t, was)


def test_account_changes_no_gradient():
    gradients = []
    for run in (lambda f: f(), lambda f: account(f).result):
        x = leaf()
        run(lambda x=x: ops.gate(x * 2, x * 3, "silu")).sum().backward()
        gradients.append(x.grad)
    assert_same_bits(*gradients)


def test_without_the_counters(monkeypatch):
    monkeypatch.setattr(overwrite, "_COUNTS_EXIST", False)
    watch, x = Watch(), leaf()
    ops.gate(watch(x * 2), x * 3, "silu").sum().backward()
    assert not watch.overwritten


def test_overwritten_tensors_are_marked_as_changed():
    x = leaf()
    gate, up = x * 2, x * 3
    version = gate._version
    assert overwrite.release(gate)._version == version + 1 and up._version == 0
    assert not overwrite.release(up).requires_grad


def peak(run: Callable[[], object]) -> int:
    """The most bytes of the CPU that were allocated during a run, above what was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(("linear", "saving"), [(False, 2), (True, 3)])
def test_peak_memory(linear, saving):
    """Backward of a gate allocates two tensors less; with the down projection three: the product needs none either."""
    weight = leaf(4, 512, seed=1)

    def backward(retain_graph: bool) -> int:
        gate, up = leaf(256, 512) * 2, leaf(256, 512) * 3
        edges = [torch.autograd.graph.get_gradient_edge(t) for t in (gate, up)]
        loss = (ops.gate_linear(gate, up, weight) if linear else ops.gate(gate, up, "silu")).sum()
        del gate, up
        return peak(lambda: torch.autograd.grad(loss, edges, retain_graph=retain_graph))

    assert backward(True) - backward(False) == pytest.approx(saving * 4 * 256 * 512, rel=0.02)
