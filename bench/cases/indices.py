"""Passes over listed elements against the dense pass of the same kind over the same tensor, and against the memory."""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness import Recorder, against, speedup, summary
from bench.pass_kinds import DISTRIBUTIONS, PassKinds
from pyzo.timing import Provider, interleave

DTYPES = (torch.float32, torch.bfloat16)
SHARES = (0.001, 0.01)  # of the elements that are listed
TARGETS = {("normal", 0.001): 0.02}  # most of the dense pass's time, by distribution and share (issue 5)

TOUCH = "read and write"  # of listed elements, with nothing computed
AHEAD = 32  # elements that are fetched ahead there; 8 to 512 took the same time


@dataclass(frozen=True)
class Job:
    """One kind of pass over all elements (share 1) or over a list."""

    what: str
    distribution: str
    share: float
    call: Callable[[], None]

    @property
    def name(self) -> str:
        return f"{self.what}/{self.distribution}/{self.share}"


def run(recorder: Recorder) -> None:
    """Adds the rows of all dtypes. A dry run has a list of 4 elements."""
    for dtype in DTYPES:
        compare(recorder, 1 << (12 if recorder.dry_run else 26), dtype, repeats=3 if recorder.dry_run else 15)


def compare(recorder: Recorder, elements: int, dtype: torch.dtype, *, repeats: int) -> None:
    """Adds the rows of one tensor: its dense passes and those over random lists, interleaved."""
    torch.manual_seed(0)
    weights = torch.empty(elements, dtype=dtype, device=recorder.device).normal_(0, 0.02)
    lists = {share: choose(elements, share).to(recorder.device) for share in SHARES}
    made = [job for distribution in DISTRIBUTIONS for job in jobs(weights, distribution, lists)]
    with tempfile.TemporaryDirectory() as folder:
        made.insert(1, touch(weights, lists[SHARES[0]], Path(folder)))  # behind a dense pass, as its perturbation is
        providers = [Provider(job.name, job.call) for job in made]
        samples = interleave(providers, repeats=repeats, device=recorder.device)
    dense = {(job.what, job.distribution): samples[job.name] for job in made if job.share == 1}
    for job in made:
        listed = elements if job.share == 1 else len(lists[job.share])
        config = {
            "elements": elements,
            "share": job.share,
            "dtype": str(dtype).removeprefix("torch."),
            "distribution": job.distribution,
            "rounding": job.what.split()[-1] if "update" in job.what else "nearest",
        }
        numbers: dict[str, object] = summary(samples[job.name])
        numbers["elements_per_s"] = listed / numbers["median_s"]
        if job.share != 1:
            what = "perturb" if job.what == TOUCH else job.what
            ratio = speedup(samples[job.name], dense[what, job.distribution])
            numbers["ratio"] = {"to": "time of the dense pass", **ratio}
            target = TARGETS.get((job.distribution, job.share))
            if target is not None and job.what != TOUCH:
                numbers |= against(target, ratio["of_medians"], at_least=False)
        provider = "memory" if job.what == TOUCH else "dense" if job.share == 1 else "indices"
        recorder.add(job.what, provider, config, **numbers)


def choose(elements: int, share: float) -> torch.Tensor:
    """This share of the indices of a tensor, drawn at random, in order."""
    count = max(1, round(elements * share))
    return torch.randperm(elements)[:count].sort().values


def touch(weights: torch.Tensor, indices: torch.Tensor, folder: Path) -> Job:
    """Listed elements fetched ahead, read and written back by a loop in C++: what the memory takes."""
    library = folder / "touch.so"
    source = Path(__file__).with_name("touch.cpp")
    subprocess.run(["c++", "-O3", "-pthread", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).touch
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, *(ctypes.c_int64,) * 3]
    size, threads = weights.element_size(), torch.get_num_threads()
    arguments = weights.data_ptr(), size, indices.data_ptr(), len(indices), AHEAD, threads
    return Job(TOUCH, "normal", SHARES[0], lambda: function(*arguments))


def jobs(weights: torch.Tensor, distribution: str, lists: dict[float, torch.Tensor]) -> list[Job]:
    """Perturb, and restore with update, over everything and over each list."""
    kinds = PassKinds([weights], distribution=distribution)
    stochastic = weights.element_size() == 2
    update = f"restore+update {'stochastic' if stochastic else 'nearest'}"
    made = []
    for share, indices in ((1, None), *lists.items()):
        chosen = {} if indices is None else {"indices": [indices]}
        perturb = {"perturb": 0, "perturb_sign": 1.0, **chosen}
        restore = {"undo": 0, "undo_sign": 1.0, "directions": 1, "stochastic": stochastic, **chosen}
        for what, arguments in (("perturb", perturb), (update, restore)):
            made.append(Job(what, distribution, share, lambda arguments=arguments: kinds.run(**arguments)))
    return made
