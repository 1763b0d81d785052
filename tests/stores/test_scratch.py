"""The scratch store: the same bits as from a snapshot, whichever way a model comes by its weights."""

import warnings

import pytest
import torch
from bits import assert_same_bits
from scratches import beside_a_snapshot, borrowed, chain_bytes, mean_square, untouched
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import pyzo
from pyzo.estimators import BlockWise, OneSided, RandomLayers, TwoSided
from pyzo.masks import Indices, Random, SmallMagnitude
from pyzo.optim import ZOSGD, ForwardGradSGD, ZOAdam, ZOConservativeSGD

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
IDS = torch.tensor([[1, 2, 2], [6, 0, 3]])


def on_x(model: nn.Module) -> Tensor:
    return mean_square(model(X))


def square(scale: float = 0.2) -> nn.Parameter:
    return nn.Parameter(scale * torch.randn(16, 16))


def linears(count: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(16, 16) for _ in range(count)])


class Nested(nn.Module):
    """Direct parameters at two levels, one module called twice, one that is called where another one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.randn(16))
        self.pair = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.enter(self.enter(x))) + self.bias + self.pair(x)


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = square()

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        return x if depth == 0 else self(x @ self.weight, depth - 1) @ self.weight


# How weights are reached ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Nested, Recursive, lambda: nn.LSTM(16, 16, 2, batch_first=True)])
def test_each_module_has_its_weights_while_it_runs(build):
    opt = beside_a_snapshot(build, lambda model: mean_square(torch.as_tensor(model(X)[0])))
    assert borrowed(opt) == {}
    assert opt.store.extra_bytes == chain_bytes(opt._module)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("build", "needs"),
    [
        (Attention, {"train": {"MultiheadAttention": 2}, "eval": {"MultiheadAttention": 2}}),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
            {"train": {"MultiheadAttention": 4}, "eval": {"TransformerEncoderLayer": 24}},  # one operator per layer
        ),
        (
            lambda: nn.TransformerDecoderLayer(16, 2, 32, batch_first=True),
            {"train": {"MultiheadAttention": 4}, "eval": {"MultiheadAttention": 4}},
        ),
    ],
    ids=["attention", "encoder", "decoder layer"],
)
def test_weights_that_another_module_uses_are_found(build, needs, mode):
    def call(model: nn.Module) -> Tensor:
        return mean_square(model(X, X) if isinstance(model, nn.TransformerDecoderLayer) else model(X))

    assert borrowed(beside_a_snapshot(lambda: build().train(mode == "train"), call)) == needs[mode]


class Tied(nn.Module):
    """An embedding whose weight also is the head's: by a module that shares it, or by a function."""

    def __init__(self, by_module: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 16)
        self.head = nn.Linear(16, 7, bias=False) if by_module else None
        if by_module:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        return self.head(hidden) if self.head else hidden @ self.embedding.weight.t()


@pytest.mark.parametrize("by_module", [True, False])
def test_tied_weights(by_module):
    opt = beside_a_snapshot(lambda: Tied(by_module), lambda model: mean_square(model(IDS)))
    assert borrowed(opt) == ({} if by_module else {"Tied": 1})


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([square() for _ in range(3)])
        self.named = nn.ParameterDict({"bias": nn.Parameter(torch.randn(16))})

    def forward(self, x: Tensor) -> Tensor:
        for matrix in self.matrices:
            x = x @ matrix
        return x + self.named["bias"]


def test_lists_of_parameters_belong_to_who_reads_them():
    assert borrowed(beside_a_snapshot(Lists, on_x)) == {"Lists": 4}


def test_weights_that_the_closure_uses_itself_are_there_for_all_of_it():
    def call(model: nn.Module) -> Tensor:
        return mean_square(functional.linear(X, model[0].weight, model[0].bias) + model[1](X))

    assert borrowed(beside_a_snapshot(lambda: linears(2), call)) == {"closure": 2}


def test_weight_norm_old_and_new():
    new = beside_a_snapshot(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), on_x)
    assert borrowed(new) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = beside_a_snapshot(lambda: nn.utils.weight_norm(nn.Linear(16, 16)), on_x)
    assert borrowed(old) == {"closure": 2}  # a hook before the module's forward


# Views that outlive a call -------------------------------------------------------------------------------------------


class Query(nn.Module):
    def __init__(self, view: bool) -> None:
        super().__init__()
        self.query, self.view = nn.Parameter(torch.randn(1, 4, 16)), view

    def forward(self) -> Tensor:
        return self.query.expand(3, -1, -1) if self.view else self.query


class Queries(nn.Module):
    def __init__(self, view: bool) -> None:
        super().__init__()
        self.query, self.linears = Query(view), linears(2)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query()
        return (query.mean(1, keepdim=True) + self.linears(x)) * query.sum(1, keepdim=True)


@pytest.mark.parametrize("view", [True, False])
def test_an_output_that_is_a_parameter_or_a_view_of_one(view):
    opt = beside_a_snapshot(lambda: Queries(view), on_x)
    assert [type(s.module).__name__ for s in opt.store._scopes if s.keeps] == (["Query"] if view else [])
    assert borrowed(opt) == ({} if view else {"Queries": 1})


class Remembers(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.remembered = self.weight[0]
        return super().forward(x)


class ReadsLater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Remembers(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x)) + self.first.remembered
        del self.first.remembered
        return y


def test_a_view_that_is_put_aside():
    opt = beside_a_snapshot(ReadsLater, on_x)
    assert [type(s.module).__name__ for s in opt.store._scopes if s.keeps] == ["Remembers"]


# Embeddings ----------------------------------------------------------------------------------------------------------


class Positions(nn.Embedding):
    """Ids that the caller does not see, a scale on top, a look at the weight, as OPT and Gemma have them."""

    def forward(self, ids: Tensor) -> Tensor:
        assert self.weight.shape == (7, 16) and self.weight.device == ids.device
        return super().forward((ids + 1) % 7) * torch.tensor(4.0, dtype=self.weight.dtype)


class Whole(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.weight.mean(0)


@pytest.mark.parametrize("mask", [None, Random(0.5), SmallMagnitude(0.4)], ids=str)
@pytest.mark.parametrize("build", [nn.Embedding, Positions, lambda n, d: nn.Embedding(n, d, padding_idx=1)])
def test_embeddings_take_the_rows_of_a_lookup(build, mask, monkeypatch):
    wholes = []
    put = pyzo.stores.Scratch._put
    monkeypatch.setattr(pyzo.stores.Scratch, "_put", lambda self, *a: (wholes.append(a), put(self, *a))[1])
    opt = beside_a_snapshot(lambda: build(7, 16), lambda model: mean_square(model(IDS)), mask=mask)
    assert not wholes
    assert opt.store.extra_bytes == 0


@pytest.mark.parametrize(
    "ids", [IDS.int(), IDS[:0], torch.tensor(3), IDS[:, ::2]], ids=["int32", "none", "0-d", "strided"]
)
def test_lookups_of_every_shape(ids):
    beside_a_snapshot(lambda: nn.Embedding(7, 16), lambda model: model(ids).float().square().sum() + 1)


def test_an_embedding_that_does_more_than_look_up_has_the_whole_weight():
    for build in (Whole, lambda n, d: nn.Embedding(n, d, max_norm=1.0)):
        opt = beside_a_snapshot(lambda build=build: build(7, 16), lambda model: mean_square(model(IDS)))
        assert opt.store.extra_bytes == chain_bytes(opt._module)


def test_an_id_out_of_range_is_the_error_that_it_always_is():
    model = nn.Embedding(7, 16).bfloat16()
    opt = ZOSGD(model, store="scratch")
    with untouched(model), pytest.raises(IndexError, match="range"):
        opt.step(lambda: mean_square(model(torch.tensor([7]))))


# Everything else that a step may be ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator",
    [
        TwoSided(2),
        OneSided(2),
        BlockWise(),
        BlockWise(order="jacobi"),
        BlockWise("linear", reuse=False),
        BlockWise(estimator=OneSided(2)),
        RandomLayers(0.5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("optimizer", [ZOSGD, ZOAdam, ZOConservativeSGD])
def test_every_estimator(estimator, optimizer):
    beside_a_snapshot(lambda: linears(4), on_x, estimator=estimator, optimizer=optimizer, lr=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "mask",
    [Random(0.5, refresh=2), SmallMagnitude(0.3), Indices({"0.weight": torch.arange(0, 256, 3)})],
    ids=["random", "small", "listed"],
)
def test_every_mask_and_dtype(mask, dtype):
    def call(model: nn.Module) -> Tensor:
        return mean_square(model(X.to(dtype)))

    groups = {"mask": mask}
    if isinstance(mask, Indices):

        def build() -> nn.Module:
            model = linears(2)
            model[0].bias.requires_grad_(False)
            model[1].requires_grad_(False)
            return model

        beside_a_snapshot(build, call, dtype=dtype, **groups)
    else:
        beside_a_snapshot(lambda: linears(2), call, dtype=dtype, **groups)


def test_dropout_autocast_inference_mode_and_checkpointing():
    def autocast(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mean_square(model(X.float()))

    def inference(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return on_x(model)

    beside_a_snapshot(lambda: nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)), on_x)
    beside_a_snapshot(Nested, autocast, dtype=torch.float32)
    assert borrowed(beside_a_snapshot(Nested, inference)) == {}
    beside_a_snapshot(Nested, lambda model: mean_square(checkpoint(model, X, use_reentrant=False)))


def test_gradients_inside_the_closure():
    """A penalty on the slope of the input: autograd keeps weights, and reads them after their module has run."""

    def call(model: nn.Module) -> Tensor:
        x = X.clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(model(x).float().square().sum(), x)
        return mean_square(slope)

    beside_a_snapshot(lambda: linears(2), call)


def test_compiled_modules_have_all_their_weights_while_they_run():
    def compiled() -> nn.Module:
        model = Nested()
        model.pair = torch.compile(model.pair, backend="eager")
        return model

    def compiled_in_place() -> nn.Module:
        model = Nested()
        model.pair.compile(backend="eager")
        return model

    assert borrowed(beside_a_snapshot(compiled, on_x)) == {"OptimizedModule": 4}
    assert borrowed(beside_a_snapshot(compiled_in_place, on_x)) == {"Sequential": 4}
    assert borrowed(beside_a_snapshot(lambda: torch.compile(Nested(), backend="eager"), on_x)) == {"OptimizedModule": 7}


def test_a_compiled_closure():
    functions = {}

    def call(model: nn.Module) -> Tensor:
        if model not in functions:
            functions[model] = torch.compile(lambda x: mean_square(model(x)), backend="eager")
        return functions[model](X)

    beside_a_snapshot(Nested, call, steps=4)


def test_forward_gradients_need_no_buffer():
    opt = beside_a_snapshot(
        lambda: linears(2), lambda m: mean_square(m(X.float())), optimizer=ForwardGradSGD, dtype=torch.float32
    )
    assert opt.store.extra_bytes == 0


def test_a_weight_that_is_needed_later_has_the_mask_of_its_own_step():
    """Masks by magnitude follow weights that are set from outside; bits that an earlier update noted do not count."""
    ends = []
    for store in ("snapshot", "scratch"):
        torch.manual_seed(0)
        model = nn.Linear(16, 16).bfloat16()  # at first both of its tensors are needed together, later one by one
        opt = ZOSGD(model, lr=0.1, eps=1e-2, store=store, mask=SmallMagnitude(0.4))
        for step in range(6):
            if step == 3:
                with torch.no_grad():
                    model.weight.copy_(model.weight.flip(0))
            opt.step(lambda model=model, step=step: on_x(model) + (model.weight.float().mean() if step > 2 else 0))
        ends.append(model.weight)
    assert_same_bits(*ends)


# What cannot be ------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Two experts of which one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = linears(2)
        self.which = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[self.which](x)


def test_a_trained_weight_that_no_module_ran_with_is_an_error_by_name():
    model = Experts().bfloat16()
    opt = ZOSGD(model, store="scratch")
    with untouched(model), pytest.raises(RuntimeError, match=r"experts\.1\.weight, experts\.1\.bias.*unused='skip'"):
        opt.step(lambda: on_x(model))
    assert opt.last is None


def test_unused_weights_may_be_skipped():
    opt = beside_a_snapshot(Experts, on_x, unused="skip")
    opt._module.which = 1
    opt.step(lambda: on_x(opt._module))
    assert opt.skipped == 0


def test_a_new_way_to_read_a_weight_is_found():
    """First the layer's own modules run, later one operator for all of them, which reads weights that are not there."""
    runs = []
    for store in ("snapshot", "scratch"):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).bfloat16()
        opt = ZOSGD(model, lr=1e-2, store=store)
        losses = [opt.step(lambda model=model, early=early: on_x(model.train(bool(early)))) for early in (1, 1, 0, 0)]
        runs.append((losses, list(model.parameters())))
    assert borrowed(opt) == {"MultiheadAttention": 2, "TransformerEncoderLayer": 12}
    for got, want in zip(*(losses + weights for losses, weights in runs), strict=True):
        assert_same_bits(got, want)


def test_a_loss_that_is_not_finite_is_looked_at_twice():
    """Weights of which one part is read in another way from the second step on; and a loss that never is a number."""
    model = linears(2).bfloat16()
    opt = ZOSGD(model, lr=1e-2, store="scratch")
    opt.step(lambda: on_x(model))
    opt.step(lambda: on_x(model) + model[0].weight.float().mean())
    assert opt.skipped == 0
    assert borrowed(opt) == {"closure": 1}
    with untouched(model), pytest.warns(UserWarning, match="1 step"):
        opt.step(lambda: on_x(model) * float("nan"))
    assert opt.last.forwards == 3  # the first one twice
    opt.step(lambda: on_x(model))
    assert (opt.skipped, opt.last.forwards) == (1, 2)


def test_scratch_needs_a_module_that_is_not_copied():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"store: expected .* where the optimizer is given no module, got 'scratch'"):
        ZOSGD(model.parameters(), store="scratch")
    with pytest.raises(ValueError, match=r"nn\.DataParallel copies the module"):
        ZOSGD(nn.DataParallel(model), store="scratch")
    with pytest.raises(ValueError, match="unused: expected 'error' or 'skip', got 'ignore'"):
        ZOSGD(model, unused="ignore")


# Memory --------------------------------------------------------------------------------------------------------------


def test_extra_memory_is_the_largest_chain_and_one_piece_of_memory():
    opt = beside_a_snapshot(lambda: nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16), Nested()), on_x)
    want = chain_bytes(opt._module)
    assert opt.store.extra_bytes == want
    (arena,) = opt.store._arenas.values()
    assert arena.allocated_bytes == want
    before = arena._slabs[0][1].data_ptr()
    opt.step(lambda: on_x(opt._module))
    assert arena._slabs[0][1].data_ptr() == before


def test_weights_keep_their_bits_until_the_update():
    """Whatever the closure sees, the memory of the weights is not written to."""
    model = linears(2).bfloat16()
    homes = [p.detach() for p in model.parameters()]  # other tensors on the same memory
    before = [home.clone() for home in homes]
    opt = ZOSGD(model, lr=0.1, eps=1e-2, store="scratch", estimator=TwoSided(3))

    def closure() -> Tensor:
        loss = on_x(model)
        for home, value in zip(homes, before, strict=True):
            assert_same_bits(home, value)
        return loss

    opt.step(closure)
    assert any(not torch.equal(home, value) for home, value in zip(homes, before, strict=True))


def test_parameters_that_are_frozen_moved_or_cast_between_steps():
    model = linears(3).bfloat16()
    opt = ZOSGD(model, store="scratch", lr=1e-2)
    opt.step(lambda: on_x(model))
    model[1].requires_grad_(False)
    frozen = model[1].weight.detach().clone()
    opt.step(lambda: on_x(model))
    assert_same_bits(model[1].weight, frozen)
    model.float()
    opt.step(lambda: mean_square(model(X.float())))
    model[0].weight.data = model[0].weight.data.clone()
    opt.step(lambda: mean_square(model(X.float())))
    assert opt.skipped == 0
