"""What the tests of passes share: one pass by the operator, on every instruction set, against the reference."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from bits import assert_same_bits, weights

from pyzo import control as layout
from pyzo import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARDS = [
    (0, 0, 0),
    (1, 0, 0),
    (1021, 0, 0),
    (2**34 - 7, 0, 0),
    (2**39 - 131, 0, 0),
    (3, 1, 2),
    (1000, 77, 1000),
    (2**40 + 1, 333, 4096),
]
NOT_OF_ROWS = ("undo", "undo_sign", "retract", "trial")  # arguments of `pass_`
APPLIED = 7  # updates of the run, the one at hand included

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
distributions = pytest.mark.parametrize("distribution", [0, 1], ids=["normal", "rademacher"])
roundings = pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
# Every rule with every dtype that its states may have.
rules = pytest.mark.parametrize(
    ("rule", "state_dtype"),
    [
        ("sgd", None),
        ("sign", None),
        ("momentum", torch.float32),
        ("momentum", torch.bfloat16),
        ("adam", torch.float32),
        ("adam", torch.bfloat16),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value).removeprefix("torch."),
)


def arguments(step: dict[str, object]) -> dict[str, object]:
    """All arguments of the operator after `control`: those of `step`, its rule by name, and what means "nothing"."""
    nothing = {
        "distribution": 0,
        "undo": -1,
        "undo_sign": 0.0,
        "rule": "sgd",
        "directions": 0,
        "update_sign": 1.0,
        "chosen": False,
        "retract": False,
        "perturb": -1,
        "perturb_sign": 0.0,
        "stochastic": False,
        "masked": False,
        "trial": False,
    }
    assert step.keys() <= nothing.keys(), step.keys()
    filled = {**nothing, **step}
    return {**filled, "rule": ops.RULES.get(filled["rule"], filled["rule"])}


def rows_arguments(step: dict[str, object]) -> dict[str, object]:
    """The same for `pass_rows_`."""
    return {name: value for name, value in arguments(step).items() if name not in NOT_OF_ROWS}


def make_control(directions: int, rows: int = 1, *, seed: int, ok: bool = True, **scalars: object) -> torch.Tensor:
    """The control tensor of a step whose losses are in.

    Every row is different: lr, eps, decay (none in every second one), dampening, option, mask, and the number of its
    update (1, 2, 3, ..). `scalars` are the same in all rows: fields of `reference.Row`, or `age`.
    """
    age = scalars.pop("age", None)
    made = [
        replace(
            reference.Row(
                lr=0.1 / (r + 1),
                eps=1e-2 * (r + 1),
                weight_decay=0.1 * (r % 2),
                beta1=0.9 - 0.2 * r,
                beta2=0.99,
                dampening=0.3 * ((r + 1) % 2),
                rule_eps=1e-3,
                option=r % 3 == 1,
                born=APPLIED - (r + 1 if age is None else age),
                keep=(20000, 50000, layout.KEEP_ALL)[r % 3],
            ),
            **scalars,
        )
        for r in range(rows)
    ]
    control = reference.new_control(directions, made, seed * 0x1234567)
    reference.begin_step_(control)
    control[0, layout.APPLIED] = APPLIED - 1
    slopes = torch.randn(2 * directions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    reference.estimate_(control, directions * slopes, reference.ESTIMATORS.index("forward"), directions, 0)
    control[0, layout.OK] = int(ok)
    return control


def make_states(rule: str, sizes: Sequence[int], dtype: torch.dtype | None, *, seed: int) -> list[torch.Tensor]:
    """The states of tensors of these sizes as a pass takes them: of many magnitudes, special ones among them.

    The second moments of Adam are not negative.
    """
    made = []
    for s, name in enumerate(reference.STATES[rule]):
        for i, n in enumerate(sizes):
            values = weights(n, dtype, seed=seed + 100 * s + i)
            made.append(values.abs() if name == "exp_avg_sq" else values)
    return made


def place(w: torch.Tensor, offset: int, device: str = "cpu") -> torch.Tensor:
    """A copy of `w` that begins `offset` elements into its storage."""
    storage = torch.zeros(w.numel() + offset + 8, dtype=w.dtype, device=device)
    view = storage[offset : offset + w.numel()].view(w.shape)
    return view.copy_(w)


def each_isa(device: str) -> Iterator[str]:
    """Once for every instruction set of the CPU, selected; once for another device."""
    for name in ops.isas() if device == "cpu" else [""]:
        ops.select_isa(name)
        yield name


def check(
    dst: Sequence[torch.Tensor],
    lines: Sequence[Sequence[int]],
    control: torch.Tensor,
    *,
    device: str,
    state: Sequence[torch.Tensor] = (),
    src: Sequence[torch.Tensor] = (),
    bits: Sequence[torch.Tensor] = (),
    indices: Sequence[torch.Tensor] = (),
    low: Sequence[torch.Tensor] = (),
    **step: object,
) -> None:
    """Runs the pass by the reference and, on every instruction set, by the operator, and compares what they wrote.

    The tensors lie 0 to 7 elements off alignment.
    """
    table = torch.tensor(lines, dtype=torch.int64).view(-1, 5)
    want, want_state, want_low = ([t.clone() for t in tensors] for tensors in (dst, state, low))
    chosen = (list(bits), list(indices))
    reference.pass_(list(src), want, want_state, *chosen, want_low, table, control, **arguments(step))
    chosen = tuple([t.to(device) for t in tensors] for tensors in chosen)
    for isa in each_isa(device):
        got = [place(w, i % 8, device) for i, w in enumerate(dst)]
        got_state = [place(s, (5 * i + 2) % 8, device) for i, s in enumerate(state)]
        got_low = [place(w, (7 * i + 3) % 8, device) for i, w in enumerate(low)]
        sources = [place(w, (3 * i + 1) % 8, device) for i, w in enumerate(src)]
        torch.ops.pyzo.pass_(sources, got, got_state, *chosen, got_low, table, control.to(device), **arguments(step))
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_same_bits(g.cpu(), w, f"{isa or device}, tensor {i}, {step}")
        for i, (g, s) in enumerate(zip(got_state, want_state, strict=True)):
            assert_same_bits(g.cpu(), s, f"{isa or device}, state {i}, {step}")
        for i, (g, w) in enumerate(zip(got_low, want_low, strict=True)):
            assert_same_bits(g.cpu(), w, f"{isa or device}, low bits {i}, {step}")
        for i, (s, w) in enumerate(zip(sources, src, strict=True)):
            assert_same_bits(s.cpu(), w, f"source {i}")


def run(
    dst: Sequence[torch.Tensor],
    lines: Sequence[Sequence[int]],
    control: torch.Tensor,
    *,
    state: Sequence[torch.Tensor] = (),
    src: Sequence[torch.Tensor] = (),
    bits: Sequence[torch.Tensor] = (),
    indices: Sequence[torch.Tensor] = (),
    low: Sequence[torch.Tensor] = (),
    **step: object,
) -> None:
    """One pass by the operator over tensors where they lie."""
    table = torch.tensor(lines, dtype=torch.int64).view(-1, 5)
    control = control.to(dst[0].device)
    lists = (list(tensors) for tensors in (src, dst, state, bits, indices, low))
    torch.ops.pyzo.pass_(*lists, table, control, **arguments(step))
