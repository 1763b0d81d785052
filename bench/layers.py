"""Times one layer in all its ways, forward and backward together and apart, and records them as rows."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.harness import Recorder, against, speedup, summary
from bench.layer_jobs import Call, Job, Way
from pyzo.timing import Provider, Samples, interleave

BOTH = "forward+backward"
EAGER, COMPILED = "eager", "torch.compile"
LEAST_SHARE = 0.85  # of the copy bandwidth, of every kernel of a GPU (issue 4)


def compare(recorder: Recorder, job: Job, *, repeats: int, **conditions: object) -> None:
    """Adds the rows of a job: eager, compiled, every way of pyzo, and a copy of a tensor like its output.

    Forward builds the graph, backward keeps it; both together free it. Under torch.compile only both together.
    `conditions` go into the rows' config.
    """
    gradient = torch.randn_like(job.eager(*job.inputs))
    config = {**job.config, "dtype": str(gradient.dtype).removeprefix("torch."), **conditions}
    plain: dict[str, Call] = {EAGER: job.eager, **job.others}
    ways = {f"pyzo {name}": way for name, way in job.pyzo.items()}
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, call in (plain | {name: way.call for name, way in ways.items()}).items():
        calls[name, BOTH] = partial(forward_backward, call, job.inputs, gradient)
        calls[name, "forward"] = partial(call, *job.inputs)
        calls[name, "backward"] = partial(
            torch.autograd.grad, call(*job.inputs), job.inputs, gradient, retain_graph=True
        )
    if job.compile:
        # A test has no time for a compiler: a dry run stops before the code is generated.
        backend = "aot_eager" if recorder.dry_run else "inductor"
        try:
            calls[COMPILED, BOTH] = compiled(job, gradient, backend)
        except RuntimeError as error:  # no C++ compiler, or no Python headers for Triton
            reason = str(error).strip().partition("\n")[0]
            recorder.add(f"{job.what} {BOTH}", COMPILED, {**config, "backend": backend}, reason=reason)
    source = gradient.clone()
    calls["torch copy_", "copy"] = partial(source.copy_, gradient)
    named = {" ".join(key): key for key in calls}
    samples = interleave(
        [Provider(text, calls[key]) for text, key in named.items()], repeats=repeats, device=recorder.device
    )
    by_call = {key: samples[text] for text, key in named.items()}
    for (name, part), mine in by_call.items():
        numbers: dict[str, object] = summary(mine)
        if name in ways:
            numbers |= compared(recorder, job, by_call, name, part, ways[name], gradient)
        recorder.add(f"{job.what} {part}", name, config | ({"backend": backend} if name == COMPILED else {}), **numbers)


def forward_backward(call: Call, inputs: tuple[Tensor, ...], gradient: Tensor) -> None:
    """One pass forward and one backward, whose gradients are dropped."""
    torch.autograd.grad(call(*inputs), inputs, gradient)


def compiled(job: Job, gradient: Tensor, backend: str) -> Callable[[], object]:
    """The baseline under torch.compile, compiled for these very shapes before it returns."""
    torch._dynamo.reset()  # calls that share their code with another job's would count as its recompilations
    call = torch.compile(job.eager, fullgraph=True, dynamic=False, backend=backend)
    run = partial(forward_backward, call, job.inputs, gradient)
    run()
    return run


def compared(
    recorder: Recorder,
    job: Job,
    samples: dict[tuple[str, str], Samples],
    name: str,
    part: str,
    way: Way,
    gradient: Tensor,
) -> dict[str, object]:
    """Ratios of one of pyzo's ways to eager and compiled torch, its share of the copy bandwidth, its target."""
    mine = samples[name, part]
    numbers: dict[str, object] = {"ratio": {"to": EAGER, **speedup(samples[EAGER, part], mine)}}
    if (COMPILED, part) in samples:
        numbers["ratio_compiled"] = {"to": COMPILED, **speedup(samples[COMPILED, part], mine)}
    moved = way.moved(part, gradient.itemsize)
    if moved:
        share = speedup(samples["torch copy_", "copy"], mine)
        numbers["copy_share"] = {key: value * moved / (2 * gradient.itemsize) for key, value in share.items()}
    if part == BOTH or (part == "backward" and name.removeprefix("pyzo ") in job.faster_backward):
        return numbers | against(1.0, numbers["ratio"]["of_medians"])
    if moved and torch.device(recorder.device).type == "cuda":
        return numbers | against(LEAST_SHARE, numbers["copy_share"]["of_medians"])
    return numbers
