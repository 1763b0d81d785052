"""What the operators refuse: every message names the argument, and nothing is written before it is raised."""

import pytest
import torch
from sweeps import arguments

from pyzo import control as layout
from pyzo import ops, reference

TABLE = [[1, 0, 0, 0, 0], [2, 0, 0, 0, 0]]
STEP = {"directions": 1, "perturb": 0, "perturb_sign": 1.0}
stateful = pytest.mark.parametrize(("rule", "states"), [("momentum", 1), ("adam", 2)])


def control(device: str = "cpu") -> torch.Tensor:
    """Two directions, one row, coefficients 1."""
    c = reference.new_control(2, [reference.Row(lr=0.1, eps=0.1, beta1=0.9, beta2=0.9, rule_eps=1e-8)], 1)
    reference.estimate_(c, torch.tensor([0.4, 0.0, 0.4, 0.0], dtype=torch.float64), 0, 2, 0)
    return c.to(device)


def ones(count: int = 2, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    return [torch.ones(8, dtype=dtype, device=device) for _ in range(count)]


def pass_(dst, *, src=(), state=(), bits=(), indices=(), low=(), table=TABLE, control_=None, **step):
    table = torch.tensor(table) if isinstance(table, list) else table
    control_ = control(dst[0].device) if control_ is None else control_
    lists = (list(tensors) for tensors in (src, dst, state, bits, indices, low))
    torch.ops.pyzo.pass_(*lists, table, control_, **arguments({**STEP, **step}))


def refused(message, *, dst=None, state=(), low=(), control_=None, device="cpu", **rest):
    """The pass must raise with this message and leave all destinations, states and low bits as they were."""
    dst = ones(device=device) if dst is None else dst
    control_ = control(device) if control_ is None else control_
    before = [t.clone() for t in (*dst, *state, *low, control_)]
    with pytest.raises(RuntimeError, match=message):
        pass_(dst, state=state, low=low, control_=control_, **rest)
    for t, b in zip((*dst, *state, *low, control_), before, strict=True):
        assert torch.equal(t, b)


def test_the_step_of_these_tests_is_valid(device):
    dst = ones(device=device)
    pass_(dst)
    assert not torch.equal(dst[0], torch.ones(8, device=device))
    assert not torch.equal(dst[0], dst[1])


@stateful
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_states_of_these_tests_are_valid(rule, states, dtype, device):
    dst, state = ones(device=device), ones(2 * states, dtype, device)
    pass_(dst, state=state, rule=rule)
    assert not any(torch.equal(t, torch.ones_like(t)) for t in (*dst, *state))


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64, torch.bool], ids=str)
def test_dtypes_that_are_no_weights(dtype, device):
    dst = [torch.ones(8, device=device), torch.ones(8, dtype=dtype, device=device)]
    refused(
        r"dst\[1\]: expected a contiguous float32, bfloat16 or float16 tensor, got \w+\[8\] on", dst=dst, device=device
    )


def test_not_contiguous(device):
    matrix = torch.ones(8, 4, device=device)
    refused(r"dst\[1\]: .*\[4, 8\].*not contiguous", dst=[torch.ones(8, device=device), matrix.t()], device=device)
    refused(r"dst\[1\]: .*not contiguous", dst=[torch.ones(8, device=device), matrix[:, 0]], device=device)


def test_overlapping_destinations(device):
    storage = torch.ones(40, device=device)
    for second in (storage[:8], storage[7:15], storage[2:6]):
        refused(
            r"dst\[\d\]: expected memory of its own, got a tensor that overlaps dst\[\d\]",
            dst=[storage[:8], second],
            device=device,
        )
    refused(r"dst\[1\]: .*overlaps dst\[0\]", dst=[storage[8:16], storage[15:24]], device=device)
    pass_([storage[:8], storage[8:16]])  # neighbours do not overlap
    storage16 = torch.ones(40, dtype=torch.bfloat16, device=device)
    refused(r"overlaps", dst=[storage16[:8], storage16[4:12]], device=device)


def test_sources(device):
    dst = ones(device=device)
    good = torch.zeros(8, device=device)
    refused(r"src: expected no tensors .* or as many as dst, which has 2, got 1", dst=dst, src=[good], device=device)
    refused(
        r"src\[1\]: expected the dtype of dst\[1\].* and the size of dst\[1\]",
        dst=dst,
        src=[good, torch.zeros(9, device=device)],
        device=device,
    )
    refused(
        r"src\[1\]: expected the dtype of dst\[1\].* and the size of dst\[1\]",
        dst=dst,
        src=[good, good.half()],
        device=device,
    )
    refused(r"src\[[01]\]: .*overlaps dst\[[01]\]", dst=dst, src=[dst[1], dst[0]], device=device)
    storage = torch.ones(20, device=device)
    refused(r"src\[0\]: .*overlaps dst\[0\]", dst=[storage[1:9], dst[1]], src=[storage[:8], good], device=device)
    pass_(dst, src=dst)  # one's own is allowed
    pass_(dst, src=[good, good])  # sources may be shared
    assert not good.any()


# States ---------------------------------------------------------------------------------------------------------------


@stateful
def test_numbers_of_states(rule, states, device):
    for count in {0, 1, 2 * states - 1, 2 * states + 1, 3 * states} - {2 * states}:
        message = rf"state: expected {states} tensors for each of the 2 of dst, got {count}"
        refused(message, state=ones(count, device=device), rule=rule, device=device)
    refused(r"state: expected 0 tensors .*, got 2", state=ones(2, device=device), rule="sign", device=device)


@stateful
def test_a_pass_without_update_may_be_given_states_or_none(rule, states, device):
    dst, state = ones(device=device), ones(2 * states, device=device)
    pass_(dst, rule=rule, directions=0)
    pass_(dst, state=state, rule=rule, directions=0)
    assert all(torch.equal(s, torch.ones_like(s)) for s in state)
    refused("state: expected", state=state[1:], rule=rule, directions=0, device=device)


@stateful
@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda device: torch.ones(8, dtype=torch.float16, device=device), r"Half\[8\]"),
        (lambda device: torch.ones(8, dtype=torch.float64, device=device), r"Double\[8\]"),
        (lambda device: torch.ones(8, dtype=torch.int32, device=device), r"Int\[8\]"),
        (lambda device: torch.ones(8, dtype=torch.bfloat16, device=device), r"BFloat16\[8\]"),  # not as all states
        (lambda device: torch.ones(9, device=device), r"Float\[9\]"),
        (lambda device: torch.ones(4, device=device), r"Float\[4\]"),
        (lambda device: torch.ones(0, device=device), r"Float\[0\]"),
        (lambda device: torch.ones(8, 2, device=device)[:, 0], r"Float\[8\].*not contiguous"),
        (lambda device: torch.ones(4, 2, device=device).t(), r"Float\[2, 4\].*not contiguous"),
    ],
)
def test_states_of_another_kind(rule, states, make, got, device):
    last = 2 * states - 1
    state = [*ones(last, device=device), make(device)]
    message = (
        rf"state\[{last}\]: expected a contiguous float32 or bfloat16 tensor .* of the size of dst\[1\].*, got {got}"
    )
    refused(message, state=state, rule=rule, device=device)


@stateful
def test_states_may_have_another_shape_of_the_same_size(rule, states, device):
    pass_(ones(device=device), state=[torch.ones(4, 2, device=device) for _ in range(2 * states)], rule=rule)


@stateful
def test_overlapping_states(rule, states, device):
    """With weights, with sources, with each other."""
    storage = torch.ones(64, device=device)
    message = r"(dst|state)\[\d\]: expected memory of its own, got a tensor that overlaps (dst|state)\[\d\]"
    for first in (storage[:8], storage[4:12], storage[32:40]):
        dst = [storage[:8], storage[32:40]]
        refused(message, dst=dst, state=[first, *ones(2 * states - 1, device=device)], rule=rule, device=device)
    for second in (storage[:8], storage[7:15]):
        state = [storage[:8], *ones(2 * states - 2, device=device), second]
        refused(r"state\[\d\]: .*overlaps state\[\d\]", state=state, rule=rule, device=device)
    state = [storage[8 * i : 8 * i + 8] for i in range(2 * states)]
    refused(
        r"src\[0\]: .*overlaps state\[0\]",
        src=[state[0], *ones(1, device=device)],
        state=state,
        rule=rule,
        device=device,
    )
    pass_([storage[48:56], storage[56:]], state=state, rule=rule)  # neighbours do not overlap


# Packed masks and lists -----------------------------------------------------------------------------------------------


def mask(nbytes: int = 1, device: str = "cpu") -> torch.Tensor:
    return torch.full((nbytes,), 0x5A, dtype=torch.uint8, device=device)


def listing(*indices: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int64, device=device)


def test_the_masks_and_lists_of_these_tests_are_valid(device):
    pass_(ones(device=device), bits=[mask(1, device), mask(0, device)], masked=True)
    dst = ones(device=device)
    pass_(dst, indices=[listing(0, 3, 7, device=device), listing(device=device)], perturb_sign=-1.0)
    assert torch.equal(dst[0] != 1, torch.tensor([1, 0, 0, 1, 0, 0, 0, 1], device=device) != 0)
    assert torch.equal(dst[1], torch.ones(8, device=device))


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda device: mask(2, device), r"Byte\[2\]"),
        (lambda device: mask(1, device).char(), r"Char\[1\]"),
        (lambda device: mask(1, device).bool(), r"Bool\[1\]"),
        (lambda device: torch.ones(8, dtype=torch.bool, device=device), r"Bool\[8\]"),
    ],
)
def test_masks_of_another_kind(make, got, device):
    for masked in (False, True):
        bits = [mask(1, device), make(device)]
        message = rf"bits\[1\]: expected a contiguous uint8 tensor of 1 bytes or none, .* of dst\[1\].*, got {got}"
        refused(message, bits=bits, masked=masked, device=device)
    wide = torch.ones(2, 2, dtype=torch.uint8, device=device)[:, 0]
    twelve = [torch.ones(12, device=device) for _ in range(2)]
    refused(r"bits\[0\]: expected .* of 2 bytes .*not contiguous", dst=twelve, bits=[wide, wide], device=device)


def test_numbers_of_masks_and_lists(device):
    one = [listing(1, device=device)]
    refused(r"bits: expected no tensors or as many as dst, which has 2, got 1", bits=[mask(1, device)], device=device)
    refused(r"indices: expected no tensors or as many as dst, which has 2, got 1", indices=one, device=device)
    both = {"bits": [mask(1, device)] * 2, "indices": one * 2}
    refused(r"bits: expected no tensors beside indices, which are a mask already, got 2", **both, device=device)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda device: listing(1, 2, device=device).int(), r"Int\[2\]"),
        (lambda device: listing(1, 2, device=device).double(), r"Double\[2\]"),
        (lambda device: listing(1, 2, device=device).view(1, 2), r"Long\[1, 2\]"),
        (lambda device: torch.arange(9, device=device), r"Long\[9\]"),
        (lambda device: torch.arange(8, device=device)[::2], r"Long\[4\].*not contiguous"),
    ],
)
def test_lists_of_another_kind(make, got, device):
    indices = [listing(0, 1, device=device), make(device)]
    message = rf"indices\[1\]: expected a contiguous int64 vector of at most 8 indices of dst\[1\], got {got}"
    refused(message, indices=indices, device=device)


@pytest.mark.parametrize(
    ("indices", "position"),
    [
        ((-1,), 0),
        ((8,), 0),
        ((2**63 - 1,), 0),
        ((-(2**63),), 0),
        ((0, 0), 1),
        ((0, 5, 4), 2),
        ((3, -1), 1),
        ((0, 1, 2, 8), 3),
        ((0, 1, 2, 9, 8), 3),
        ((-(2**63), 2**63 - 1), 0),
        ((2**63 - 1, -(2**63)), 0),
        ((7, 2**62, -(2**62)), 1),
    ],
    ids=str,
)
def test_lists_are_in_range_and_in_order_on_the_cpu(indices, position):
    message = rf"indices\[1\]: expected strictly increasing indices in \[0, 8\) of dst\[1\], got {indices[position]} "
    message += f"at position {position}"
    for step in ({}, {"directions": 0, "perturb": -1}):  # the checks alone, too
        refused(message, indices=[listing(0, 7), listing(*indices)], **step)


def test_a_long_list_out_of_order_anywhere():
    dst = [*ones(1), torch.ones(100)]
    for position in range(1, 99):
        indices = torch.arange(99)
        indices[position] = indices[position - 1]
        message = rf"indices\[1\]: .* got {position - 1} at position {position}"
        refused(message, dst=dst, indices=[listing(0), indices])


@stateful
def test_sources_and_states_are_as_long_as_the_lists(rule, states, device):
    indices = [listing(0, 3, 7, device=device), listing(2, device=device)]
    state = [torch.ones(n, device=device) for _ in range(states) for n in (3, 1)]
    src = [torch.zeros(n, device=device) for n in (3, 1)]
    pass_(ones(device=device), src=src, state=state, indices=indices, rule=rule)
    message = r"src\[0\]: expected the dtype of dst\[0\].* and the size of indices\[0\], which is Long\[3\].*Float\[8\]"
    refused(message, src=ones(device=device), state=state, indices=indices, rule=rule, device=device)
    refused(r"src\[0\]: expected", src=[src[0].half(), src[1]], state=state, indices=indices, rule=rule, device=device)
    message = r"state\[0\]: expected .* of the size of indices\[0\], which is Long\[3\].*, got Float\[8\]"
    refused(message, state=ones(2 * states, device=device), indices=indices, rule=rule, device=device)


def test_masks_lists_and_compact_sources_have_memory_of_their_own(device):
    storage = torch.ones(16, device=device)
    dst = [storage[:8], storage[8:]]
    apart = r": expected memory apart from what is written, got a tensor that overlaps dst\[\d\]"
    own = storage.view(torch.uint8)[:1]
    refused(r"bits\[0\]" + apart, dst=dst, bits=[own, mask(1, device)], masked=True, device=device)
    indices = [torch.zeros(1, dtype=torch.int64, device=device), listing(0, device=device)]
    dst = [indices[0].view(torch.float32), storage[8:]]
    refused(r"indices\[0\]" + apart, dst=dst, indices=indices, device=device)
    eight = torch.arange(8, device=device)
    dst = ones(device=device)
    refused(r"src\[\d\]" + apart, dst=dst, src=dst, indices=[eight, eight], device=device)
    pass_(dst, indices=[eight, eight])  # lists may be shared


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_masks_and_lists_are_on_the_device_of_the_tensors():
    refused(r"bits\[0\]: expected a tensor on the device of control", bits=[mask(), mask()], device="cuda")
    refused(r"indices\[0\]: expected a tensor on the device of", indices=[listing(1), listing(1)], device="cuda")


# Low bits of masters --------------------------------------------------------------------------------------------------

ALONE = {"perturb": -1, "perturb_sign": 0.0}  # the update of these tests, and nothing else


def beside(n: int = 8, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int16, device=device)


def halves(device: str) -> list[torch.Tensor]:
    return ones(2, torch.bfloat16, device)


def test_the_low_bits_of_these_tests_are_valid(device):
    dst, low = halves(device), [beside(device=device) for _ in range(2)]
    pass_(dst, low=low, **ALONE)
    assert all(t.any() for t in low)
    pass_([dst[0], torch.ones(8, device=device)], low=[low[0], beside(0, device)], **ALONE)
    pass_(dst, indices=[listing(0, 7, device=device)] * 2, low=[beside(2, device) for _ in range(2)], **ALONE)
    pass_(dst, low=low, directions=0)  # nothing is updated


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda device: beside(9, device), r"Short\[9\]"),
        (lambda device: beside(0, device), r"Short\[0\]"),
        (lambda device: beside(8, device).int(), r"Int\[8\]"),
        (lambda device: beside(8, device).view(torch.bfloat16), r"BFloat16\[8\]"),
        (lambda device: beside(16, device)[::2], r"Short\[8\].*not contiguous"),
    ],
)
def test_low_bits_of_another_kind(make, got, device):
    for directions in (0, 1):
        low = [beside(device=device), make(device)]
        message = rf"low\[1\]: expected a contiguous int16 tensor of 8 elements, one for each of dst\[1\] .*, got {got}"
        refused(message, dst=halves(device), low=low, **ALONE, directions=directions, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_only_bfloat16_weights_have_low_bits(dtype, device):
    dst = [*ones(1, torch.bfloat16, device), *ones(1, dtype, device)]
    low = [beside(device=device) for _ in range(2)]
    message = (
        r"low\[1\]: expected a contiguous int16 tensor of 0 elements, .* where weights are bfloat16, got Short\[8\]"
    )
    refused(message, dst=dst, low=low, **ALONE, device=device)


def test_numbers_and_lengths_of_low_bits(device):
    one = [beside(device=device)]
    message = r"low: expected no tensors or as many as dst, which has 2, got 1"
    refused(message, dst=halves(device), low=one, **ALONE, device=device)
    indices = [listing(0, 7, device=device)] * 2
    message = r"low\[0\]: expected a contiguous int16 tensor of 2 elements, one for each of indices\[0\]"
    low = [beside(device=device) for _ in range(2)]
    refused(message, dst=halves(device), low=low, indices=indices, **ALONE, device=device)


@pytest.mark.parametrize("more", [{"undo": 0, "undo_sign": 1.0}, {"perturb": 0}, {"retract": True}], ids=str)
def test_an_update_of_masters_does_nothing_else(more, device):
    low = [beside(device=device) for _ in range(2)]
    message = r"low: expected no tensors in an update that undoes, perturbs or retracts besides, got 2"
    for trial in (False, True):
        refused(message, dst=halves(device), low=low, **ALONE | more, trial=trial, device=device)


def test_low_bits_have_memory_of_their_own(device):
    storage = torch.zeros(64, dtype=torch.int16, device=device)
    own = r": expected memory of its own, got a tensor that overlaps (dst|low)\[\d\]"
    dst = [storage[:8].view(torch.bfloat16), storage[8:16].view(torch.bfloat16)]
    for second in (storage[16:24], storage[15:23], storage[20:28]):
        refused(r"(dst|low)\[\d\]" + own, dst=dst, low=[storage[16:24], second], **ALONE, device=device)
    src = [storage[16:24].view(torch.bfloat16), *ones(1, torch.bfloat16, device)]
    message = r"src\[0\]: expected memory apart from what is written.*overlaps low\[0\]"
    refused(message, dst=dst, src=src, low=[storage[20:28], storage[28:36]], **ALONE, device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_low_bits_are_on_the_device_of_the_tensors():
    message = r"low\[0\]: expected a tensor on the device of control"
    refused(message, dst=halves("cuda"), low=[beside(), beside()], **ALONE, device="cuda")


# Scalars --------------------------------------------------------------------------------------------------------------


def test_table(device):
    message = r"table: expected a contiguous int64 tensor \[2, 5\] on cpu, got "
    for table in (
        torch.tensor(TABLE[:1]),
        torch.tensor(TABLE)[:, :4],
        torch.tensor(TABLE).int(),
        torch.tensor(TABLE).t().contiguous().t(),
    ):
        refused(message, table=table, device=device)
    refused(r"dst\[1\]: expected a row of control in \[0, 1\), got 1", table=[TABLE[0], [2, 0, 0, 0, 1]], device=device)
    refused(
        r"dst\[1\]: expected a row of control in \[0, 1\), got -1", table=[TABLE[0], [2, 0, 0, 0, -1]], device=device
    )
    refused(r"dst\[1\]: expected a key below 2\^56", table=[TABLE[0], [2**56, 0, 0, 0, 0]], device=device)
    refused(r"dst\[0\]: expected a key below 2\^56", table=[[-1, 0, 0, 0, 0], TABLE[1]], device=device)


@pytest.mark.parametrize(
    "shard", [(-1, 0, 0), (2**63 - 7, 0, 0), (0, 4, 3), (0, 4, -1), (0, 1, 2**61), (2**63 - 9, 4, 6), (0, 3, 2**62)]
)
def test_shards_beyond_the_index_range(shard, device):
    refused(
        r"dst\[1\]: expected a shard with base >= 0, stride >= inner", table=[TABLE[0], [2, *shard, 0]], device=device
    )


def test_the_last_index_is_allowed(device):
    pass_(ones(device=device), table=[[1, 2**63 - 8, 0, 0, 0], [2, 7, 4, 2**62, 0]])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"distribution": 2}, r"distribution: expected an integer in \[0, 2\), got 2"),
        ({"distribution": -1}, "distribution"),
        ({"undo": 2}, r"undo: expected an integer in \[-1, 2\), got 2"),
        ({"undo": -2}, "undo"),
        ({"rule": 4}, r"rule: expected an integer in \[0, 4\), got 4"),
        ({"rule": -1}, "rule"),
        ({"directions": 3}, r"directions: expected an integer in \[0, 3\), got 3"),
        ({"directions": -1}, "directions"),
        ({"perturb": 2}, r"perturb: expected an integer in \[-1, 2\), got 2"),
    ],
)
def test_arguments_out_of_range(step, message, device):
    refused(message, device=device, **step)


@stateful
@pytest.mark.parametrize(
    "step", [{"update_sign": -1.0}, {"update_sign": 0.5}, {"chosen": True}, {"retract": True}], ids=str
)
@pytest.mark.parametrize("directions", [0, 1])
def test_updates_with_state_are_not_taken_back(rule, states, step, directions, device):
    message = rf"rule: expected one without state where an update may be taken back, got {ops.RULES[rule]}"
    state = ones(2 * states, device=device)
    refused(message, state=state, rule=rule, directions=directions, device=device, **step)


def bad_controls(device: str) -> list[torch.Tensor]:
    """Other dtypes, shapes and strides; without rows, without directions, with half a direction."""
    c = control(device)
    header = c[:, : layout.COEFFICIENTS].contiguous()
    half = c[:, : layout.COEFFICIENTS + 3].contiguous()
    return [c.int(), c.double(), c[0], c[: layout.LINES], header, half, c[:, : layout.COEFFICIENTS + 2]]


def test_control(device):
    message = r"control: expected a contiguous int64 matrix \[3 \+ rows, 16 \+ 2 \* directions\], got "
    losses = torch.ones(3, dtype=torch.float64, device=device)
    for bad in bad_controls(device):
        refused(message, control_=bad, device=device)
        before = bad.clone()
        for call in (
            lambda bad=bad: torch.ops.pyzo.begin_step_(bad),
            lambda bad=bad: torch.ops.pyzo.estimate_(bad, losses, 0, 1, 0),
            lambda bad=bad: torch.ops.pyzo.choose_(bad, losses),
        ):
            with pytest.raises(RuntimeError, match=message):
                call()
        assert torch.equal(bad, before)


def losses_refused(message, losses, call):
    """The operator must raise with this message and leave the control tensor as it was."""
    c = control(losses.device)
    with pytest.raises(RuntimeError, match=message):
        call(c, losses)
    assert torch.equal(c, control(losses.device))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": 3}, r"kind: expected an integer in \[0, 3\), got 3"),
        ({"kind": -1}, "kind"),
        ({"scaling": 3}, r"scaling: expected an integer in \[0, 3\), got 3"),
        ({"scaling": -1}, "scaling"),
        ({"q": 0}, r"q: expected an integer in \[1, 3\), got 0"),
        ({"q": 3}, r"q: expected an integer in \[1, 3\), got 3"),
        ({"scaling": 1, "q": 2}, r"scaling: expected the deviation of a one-sided .* q >= 2, got kind 0 and q 2"),
        ({"scaling": 1, "kind": 2, "q": 2}, "scaling"),
        ({"scaling": 1, "kind": 1, "q": 1}, "scaling"),
    ],
)
def test_estimates_that_there_are_not(wrong, message, device):
    how = {"kind": 0, "q": 1, "scaling": 0, **wrong}
    losses = torch.zeros(5, dtype=torch.float64, device=device)
    losses_refused(message, losses, lambda c, values: ops.estimate_(c, values, **how))


def test_losses(device):
    doubles = torch.zeros(12, dtype=torch.float64, device=device)
    wrong = [doubles[:1], doubles[:0], doubles[:6], doubles[:2].view(1, 2), doubles[0], doubles[:4:2]]
    for losses in [*wrong, doubles[:2].float(), doubles[:2].long()]:
        message = "losses: expected a contiguous float64 vector of 2 to 5 losses, got "
        losses_refused(message, losses, lambda c, values: ops.estimate_(c, values, kind=0, q=1, scaling=0))
    for losses in (doubles[:2], doubles[:4], doubles[:3].view(3, 1), doubles[:6:2], doubles[:3].float()):
        message = "losses: expected a contiguous float64 vector of 3 to 3 losses, got "
        losses_refused(message, losses, ops.choose_)


@pytest.mark.parametrize(("kind", "q", "least"), [(0, 1, 2), (0, 2, 4), (1, 1, 2), (1, 2, 3), (2, 1, 2), (2, 2, 4)])
def test_numbers_of_losses(kind, q, least, device):
    losses = torch.zeros(5, dtype=torch.float64, device=device)
    message = f"losses: expected a contiguous float64 vector of {least} to 5 losses"
    losses_refused(message, losses[: least - 1], lambda c, v: ops.estimate_(c, v, kind=kind, q=q, scaling=0))
    for count in range(least, 6):
        c = control(device)
        ops.estimate_(c, losses[:count], kind=kind, q=q, scaling=0)
        assert not torch.equal(c, control(device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_mixed_devices():
    on_cpu, on_cuda = torch.ones(8), torch.ones(8, device="cuda")
    refused(r"dst\[1\]: expected a tensor on the device of control", dst=[on_cpu, on_cuda])
    refused(r"dst\[0\]: expected a tensor on the device of control", dst=[on_cpu, on_cuda], device="cuda")
    refused(
        r"src\[0\]: expected a tensor on the device of control", dst=[torch.ones(8)], src=[on_cuda], table=TABLE[:1]
    )
    refused(r"state\[1\]: expected a tensor on the device of control", state=[on_cpu, on_cuda], rule="momentum")
    refused(r"table: expected", table=torch.tensor(TABLE).cuda(), device="cuda")
    losses = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="losses: expected a tensor on the device of control"):
        torch.ops.pyzo.estimate_(control("cuda"), losses, 0, 1, 0)
    with pytest.raises(RuntimeError, match="losses: expected a tensor on the device of control"):
        torch.ops.pyzo.choose_(control("cuda"), losses)
