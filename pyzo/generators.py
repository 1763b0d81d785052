"""Torch's generators inside a step: every forward sees the same state, so that paired losses share their dropout."""

import torch


class Rewound:
    """Remembers the states of torch's CPU and given CUDA generators, and sets them back when called."""

    def __init__(self, devices: set[torch.device]):
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}

    def __call__(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
