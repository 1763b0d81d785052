"""What the pass refuses: every message names the argument, and nothing is written before it is raised."""

import pytest
import torch

TABLE = [[1, 0, 0, 0, 0], [2, 0, 0, 0, 0]]
STEP = {
    "distribution": 0,
    "undo": -1,
    "undo_sign": 1.0,
    "directions": 1,
    "perturb": 0,
    "perturb_sign": 1.0,
    "stochastic": False,
}


def control(device: str = "cpu") -> torch.Tensor:
    c = torch.zeros(4, 12, dtype=torch.int64)
    c[0, 0] = 1
    c.view(torch.float64)[3, :5] = torch.tensor([0.1, 0.1, 0.0, 1.0, 1.0], dtype=torch.float64)
    return c.to(device)


def refused(message, *, dst=None, src=(), table=TABLE, control_=None, device="cpu", **step):
    """The pass must raise with this message and leave all destinations as they were."""
    dst = [torch.ones(8, device=device), torch.ones(8, device=device)] if dst is None else dst
    before = [w.clone() for w in dst]
    table = torch.tensor(table) if isinstance(table, list) else table
    control_ = control(device) if control_ is None else control_
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pyzo.pass_(list(src), dst, table, control_, *{**STEP, **step}.values())
    for w, b in zip(dst, before, strict=True):
        assert torch.equal(w, b)


def test_the_step_of_these_tests_is_valid(device):
    dst = [torch.ones(8, device=device), torch.ones(8, device=device)]
    torch.ops.pyzo.pass_([], dst, torch.tensor(TABLE), control(device), *STEP.values())
    assert not torch.equal(dst[0], torch.ones(8, device=device))
    assert not torch.equal(dst[0], dst[1])


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
    dst = [storage[:8], storage[8:16]]  # neighbours do not overlap
    torch.ops.pyzo.pass_([], dst, torch.tensor(TABLE), control(device), *STEP.values())
    storage16 = torch.ones(40, dtype=torch.bfloat16, device=device)
    refused(r"overlaps", dst=[storage16[:8], storage16[4:12]], device=device)


def test_sources(device):
    dst = [torch.ones(8, device=device), torch.ones(8, device=device)]
    good = torch.zeros(8, device=device)
    refused(r"src: expected no tensors .* or as many as dst, which has 2, got 1", dst=dst, src=[good], device=device)
    refused(
        r"src\[1\]: expected the dtype and size of dst\[1\]",
        dst=dst,
        src=[good, torch.zeros(9, device=device)],
        device=device,
    )
    refused(r"src\[1\]: expected the dtype and size of dst\[1\]", dst=dst, src=[good, good.half()], device=device)
    refused(r"src\[[01]\]: .*overlaps dst\[[01]\]", dst=dst, src=[dst[1], dst[0]], device=device)
    storage = torch.ones(20, device=device)
    refused(r"src\[0\]: .*overlaps dst\[0\]", dst=[storage[1:9], dst[1]], src=[storage[:8], good], device=device)
    torch.ops.pyzo.pass_(dst, dst, torch.tensor(TABLE), control(device), *STEP.values())  # one's own is allowed
    torch.ops.pyzo.pass_(
        [good, good], dst, torch.tensor(TABLE), control(device), *STEP.values()
    )  # sources may be shared
    assert not good.any()


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
    table = torch.tensor([[1, 2**63 - 8, 0, 0, 0], [2, 7, 4, 2**62, 0]])
    torch.ops.pyzo.pass_([], [torch.ones(8, device=device) for _ in range(2)], table, control(device), *STEP.values())


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"distribution": 2}, r"distribution: expected an integer in \[0, 2\), got 2"),
        ({"distribution": -1}, "distribution"),
        ({"undo": 2}, r"undo: expected an integer in \[-1, 2\), got 2"),
        ({"undo": -2}, "undo"),
        ({"directions": 3}, r"directions: expected an integer in \[0, 3\), got 3"),
        ({"directions": -1}, "directions"),
        ({"perturb": 2}, r"perturb: expected an integer in \[-1, 2\), got 2"),
    ],
)
def test_arguments_out_of_range(step, message, device):
    refused(message, device=device, **step)


def test_control(device):
    c = control(device)
    message = "control: expected a contiguous int64 matrix"
    for bad in (c.int(), c.double(), c[0], c[:3], c[:, :8].contiguous(), c[:, :11].contiguous(), c[:, :10]):
        refused(message, control_=bad, device=device)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pyzo.begin_step_(bad)


def test_losses(device):
    for losses in (
        torch.zeros(2),
        torch.zeros(3).double(),
        torch.zeros(6).double(),
        torch.zeros(0).double(),
        torch.zeros(1, 2).double(),
    ):
        c = control(device)
        with pytest.raises(RuntimeError, match="losses: expected a contiguous float64 vector"):
            torch.ops.pyzo.estimate_two_sided_(c, losses.to(device))
        assert torch.equal(c, control(device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_mixed_devices():
    on_cpu, on_cuda = torch.ones(8), torch.ones(8, device="cuda")
    refused(r"dst\[1\]: expected a tensor on the device of control", dst=[on_cpu, on_cuda])
    refused(r"dst\[0\]: expected a tensor on the device of control", dst=[on_cpu, on_cuda], device="cuda")
    refused(
        r"src\[0\]: expected a tensor on the device of control", dst=[torch.ones(8)], src=[on_cuda], table=TABLE[:1]
    )
    refused(r"table: expected", table=torch.tensor(TABLE).cuda(), device="cuda")
