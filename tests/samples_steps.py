"""Arguments of the operators of zeroth-order steps for the registry's tests."""

from collections.abc import Callable

import torch
from bits import weights
from sweeps import arguments, make_control, make_states, rows_arguments

from pyzo import control as layout

EXACT = True  # the reference has the bits of every operator here
Arguments = tuple[object, ...]


def step_control(device: str) -> torch.Tensor:
    return make_control(2, 2, seed=42).to(device)


def tensors(device: str) -> list[torch.Tensor]:
    return [
        weights(n, dtype, seed=n, special=False).to(device)
        for n, dtype in ((65, torch.float32), (7, torch.bfloat16), (130, torch.float16))
    ]


def table(device: str) -> torch.Tensor:
    return torch.tensor([[1, 0, 0, 0, 0], [2, 5, 3, 8, 1], [3, 2**34, 0, 0, 0]])


def masks(device: str) -> list[torch.Tensor]:
    """Packed masks of `tensors`; the second has none."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(0, 256, (nbytes,), generator=generator, dtype=torch.uint8).to(device) for nbytes in (9, 0, 17)
    ]


def lists(device: str) -> list[torch.Tensor]:
    """Indices into `tensors`, into the second none."""
    return [torch.tensor(listed, dtype=torch.int64, device=device) for listed in ([0, 7, 64], [], [*range(60, 90)])]


def compact(device: str) -> list[torch.Tensor]:
    return [t[i] for t, i in zip(tensors(device), lists(device), strict=True)]


def small_control(device: str) -> torch.Tensor:
    """Rows with a threshold and without."""
    control = make_control(2, 2, seed=42)
    control.view(torch.float64)[layout.LINES, layout.THRESHOLD] = 0.01
    return control.to(device)


def pass_sample(
    device: str,
    src: list[torch.Tensor],
    state_dtype: torch.dtype | None = None,
    bits: list[torch.Tensor] | None = None,
    indices: list[torch.Tensor] | None = None,
    low: list[torch.Tensor] | None = None,
    **step: object,
) -> Arguments:
    """Arguments of a pass over all of `tensors`."""
    dst = tensors(device)
    sizes = [t.numel() for t in indices or dst]
    state = make_states(str(step.get("rule", "sgd")), sizes, state_dtype, seed=9)
    state = [s.to(device) for s in state]
    lists = (src, dst, state, bits or [], indices or [], low or [])
    return (*lists, table(device), step_control(device), *arguments(step).values())


def low_bits(device: str) -> list[torch.Tensor]:
    """Of the bfloat16 weights among `tensors`."""
    return [torch.arange(-3, -3 + n, dtype=torch.int16, device=device) for n in (0, 7, 0)]


def rows_sample(device: str, **step: object) -> Arguments:
    """Arguments of a pass over rows of two matrices, of which the second has no packed mask."""
    out = [
        weights(n * d, dtype, seed=n).view(n, d).to(device)
        for n, d, dtype in ((5, 13, torch.float32), (3, 8, torch.bfloat16))
    ]
    ids = [torch.tensor(which, device=device) for which in ([3, 0, 3, 9, 1], [1, 1, 0])]
    bits = [torch.full((nbytes,), 0x5B, dtype=torch.uint8, device=device) for nbytes in (17, 0)]
    control = small_control(device) if step.get("masked") else step_control(device)
    return (out, ids, bits, [10, 2], table(device)[:2], control, *rows_arguments(step).values())


EVERYTHING = {"undo": 0, "undo_sign": 1.0, "directions": 2, "perturb": 1, "perturb_sign": -1.0, "stochastic": True}
LOSSES = {  # of each kind of estimate
    0: [1.0, 0.5, 2.0, 2.5],
    1: [1.0, 0.5, 2.0],
    2: [1.0, 0.5, 1.0, -2.0],
}


def estimate_sample(device: str, losses: list[float], kind: int, q: int, scaling: int) -> Arguments:
    return (step_control(device), torch.tensor(losses, dtype=torch.float64, device=device), kind, q, scaling)


def choose_sample(device: str, losses: list[float]) -> Arguments:
    return (step_control(device), torch.tensor(losses, dtype=torch.float64, device=device))


# Operator -> samples of arguments. An operator without a sample fails below.
SAMPLES: dict[str, Callable[[str], list[Arguments]]] = {
    "pass_": lambda device: [
        pass_sample(device, [], **EVERYTHING),
        pass_sample(device, [], **EVERYTHING, rule="sign", update_sign=-1.0, chosen=True, retract=True),
        pass_sample(device, tensors(device), **EVERYTHING, rule="momentum", state_dtype=torch.float32),
        pass_sample(device, [], **EVERYTHING, rule="adam", state_dtype=torch.bfloat16, masked=True),
        pass_sample(device, tensors(device), directions=1, distribution=1),
        pass_sample(device, [], **EVERYTHING, bits=masks(device), masked=True),
        pass_sample(device, [], **EVERYTHING, indices=lists(device), rule="adam", state_dtype=torch.float32),
        pass_sample(device, compact(device), **EVERYTHING, indices=lists(device), masked=True),
        pass_sample(device, [], directions=2, low=low_bits(device), rule="adam", state_dtype=torch.float32),
        pass_sample(device, tensors(device), directions=1, low=low_bits(device), trial=True),
        ([], [], [], [], [], [], torch.zeros(0, 5, dtype=torch.int64), step_control(device), *arguments({}).values()),
    ],
    "pass_rows_": lambda device: [
        rows_sample(device, directions=2, perturb=1, perturb_sign=-1.0, stochastic=True, masked=True),
        rows_sample(device, directions=1, rule="sign", update_sign=-1.0, chosen=True),
        rows_sample(device, perturb=0, perturb_sign=1.0, distribution=1),
        ([], [], [], [], torch.zeros(0, 5, dtype=torch.int64), step_control(device), *rows_arguments({}).values()),
    ],
    "mask_bits_": lambda device: [
        (
            tensors(device),
            [torch.full((nbytes,), 7, dtype=torch.uint8, device=device) for nbytes in (9, 1, 17)],
            table(device),
            small_control(device),
        )
    ],
    "noise_": lambda device: [
        (torch.empty(100, device=device), -1, 2**56 - 1, 3, 10, 100, 0),
        (torch.empty(4, 33, dtype=torch.float16, device=device), 1, 2, 0, 0, 0, 1),
        (torch.empty(0, dtype=torch.bfloat16, device=device), 1, 2, 0, 0, 0, 0),
    ],
    "philox_": lambda device: [(torch.empty(5, 4, dtype=torch.int32, device=device), -1, 2, -3)],
    "begin_step_": lambda device: [(step_control(device),)],
    "estimate_": lambda device: [
        *(estimate_sample(device, losses, kind, 2, scaling) for kind, losses in LOSSES.items() for scaling in (0, 2)),
        estimate_sample(device, LOSSES[1], 1, 2, 1),
        estimate_sample(device, [1.0, torch.inf], 0, 1, 0),
    ],
    "choose_": lambda device: [choose_sample(device, [2.0, 1.0, 3.0]), choose_sample(device, [2.0, torch.nan, 1.0])],
}
