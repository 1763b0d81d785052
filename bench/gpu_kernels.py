"""GPU stage: each kernel's share of the device's own copy bandwidth, measured by events in the same run."""

from functools import partial

import torch

from bench import gpu_stage
from bench.cases import shapes
from bench.harness import Recorder, against, speedup, summary
from bench.pass_kinds import DISTRIBUTIONS, EPS, PassKinds
from pyzo import baselines, control, ops
from pyzo.timing import Provider, interleave

NBYTES = {True: 1 << 14, False: 4 << 30}  # of weights; dry run, real
REPEATS = {True: 2, False: 15}
MANY = (4, 16)


def target(dtype: torch.dtype, distribution: str, what: str) -> float | None:
    """Least share of the copy bandwidth (DESIGN.md section 9); None where none is set."""
    if dtype is torch.float32 or distribution == "rademacher":
        return 0.90
    if dtype is torch.bfloat16:
        return {"perturb": 0.80, "restore": 0.80, "restore+update stochastic": 0.65}.get(what)
    return None


def main() -> None:
    """One large tensor in each dtype, under every rule, then the tensors of OPT-13B in bfloat16 where they fit."""
    recorder = gpu_stage.begin("kernels")
    for dtype in ops.DTYPES:
        sizes = shapes.one(NBYTES[recorder.dry_run] // dtype.itemsize)
        compare(recorder, "one tensor", sizes, dtype, many=MANY)
        compare_rules(recorder, NBYTES[recorder.dry_run] // dtype.itemsize, dtype)
    model = {"hidden": 8, "layers": 2, "vocabulary": 64} if recorder.dry_run else {"hidden": 5120, "layers": 40}
    sizes = shapes.opt(**model)
    needed = 2.2 * 2 * shapes.elements(sizes)
    if not recorder.dry_run and torch.cuda.mem_get_info()[0] < needed:
        recorder.add(
            "all passes", "pyzo", {"tensors": "OPT-13B"}, reason=f"needs {needed:.3g} bytes of free device memory"
        )
    else:
        compare(recorder, "OPT-13B", sizes, torch.bfloat16, many=())
    gpu_stage.end(recorder)


def compare(
    recorder: Recorder, name: str, sizes: list[shapes.Shape], dtype: torch.dtype, *, many: tuple[int, ...]
) -> None:
    """Adds the rows of one list of tensors: copy, eager line, noise, all passes; `many`: more numbers of directions."""
    tensors = [torch.empty(size, dtype=dtype, device=recorder.device).normal_(0, 0.02) for size in sizes]
    others = [torch.empty_like(tensor) for tensor in tensors]
    calls = {
        ("torch copy_", "copy", 1): lambda: torch._foreach_copy_(others, tensors),
        ("eager", "perturb", 1): lambda: baselines.eager_perturb_(tensors, EPS, 1.0, 1),
    }
    for distribution in DISTRIBUTIONS:
        provider = f"pyzo {distribution}"
        calls[provider, "noise", 1] = noise(others, distribution)
        for what, call in PassKinds(tensors, distribution=distribution).calls().items():
            calls[provider, what, 1] = call
        for directions in many:
            for what, call in PassKinds(tensors, distribution=distribution, directions=directions).calls().items():
                if "update" in what:
                    calls[provider, what, directions] = call
    named = {" ".join(map(str, key)): key for key in calls}
    samples = interleave(
        [Provider(text, calls[key]) for text, key in named.items()],
        repeats=REPEATS[recorder.dry_run],
        device=recorder.device,
    )
    by_call = {key: samples[text] for text, key in named.items()}
    nbytes = sum(tensor.nbytes for tensor in tensors)
    config = {
        "tensors": name,
        "count": len(sizes),
        "elements": shapes.elements(sizes),
        "dtype": str(dtype).removeprefix("torch."),
    }
    for (provider, what, directions), mine in by_call.items():
        numbers: dict[str, object] = summary(mine)
        moved = nbytes if what == "noise" else 2 * nbytes
        numbers["bytes_per_s"] = moved / numbers["median_s"]
        numbers["elements_per_s"] = config["elements"] / numbers["median_s"]
        share = speedup(by_call["torch copy_", "copy", 1], mine)
        numbers["copy_share"] = {key: value * moved / (2 * nbytes) for key, value in share.items()}
        if provider.startswith("pyzo"):
            numbers["ratio"] = {"to": "eager perturb", **speedup(by_call["eager", "perturb", 1], mine)}
            least = target(dtype, provider.split()[1], what) if directions == 1 and what != "noise" else None
            if least is not None:
                numbers |= against(least, numbers["copy_share"]["of_medians"])
        recorder.add(what, provider, {**config, "directions": directions}, **numbers)


def compare_rules(recorder: Recorder, elements: int, dtype: torch.dtype) -> None:
    """Adds the rows of one tensor under every rule with every dtype of its states, and of a masked update by SGD.

    What an update moves is the weight and the states, read and written; the copy is that of the weights alone.
    """
    weights = torch.empty(elements, dtype=dtype, device=recorder.device).normal_(0, 0.02)
    other = torch.empty_like(weights)
    stochastic = dtype.itemsize == 2
    for rule, masked in (*((rule, False) for rule in ops.RULES), ("sgd", True)):
        for state_dtype in (torch.float32, torch.bfloat16) if ops.STATES[rule] else (torch.float32,):
            kinds = {
                distribution: PassKinds([weights], distribution=distribution, rule=rule, state_dtype=state_dtype)
                for distribution in DISTRIBUTIONS
            }
            for kind in kinds.values():
                kind.control[control.LINES, control.KEEP] = control.KEEP_ALL // 2
            update = {"undo": 0, "undo_sign": 1.0, "directions": 1, "stochastic": stochastic, "masked": masked}
            providers = [Provider(name, partial(kind.run, **update)) for name, kind in kinds.items()]
            providers.append(Provider("copy", lambda: other.copy_(weights)))
            samples = interleave(providers, repeats=REPEATS[recorder.dry_run], device=recorder.device)
            moved = 2 * (dtype.itemsize + ops.STATES[rule] * state_dtype.itemsize)  # bytes per element
            config = {"tensors": "one tensor", "elements": elements, "dtype": str(dtype).removeprefix("torch.")}
            config["state"] = str(state_dtype).removeprefix("torch.") if ops.STATES[rule] else None
            for distribution in DISTRIBUTIONS:
                numbers: dict[str, object] = summary(samples[distribution])
                numbers["elements_per_s"] = elements / numbers["median_s"]
                numbers["bytes_per_s"] = moved * numbers["elements_per_s"]
                share = speedup(samples["copy"], samples[distribution])
                numbers["copy_share"] = {key: value * moved / (2 * dtype.itemsize) for key, value in share.items()}
                what = f"restore+update {rule}" + (" masked" if masked else "")
                recorder.add(what, f"pyzo {distribution}", config, **numbers)


def noise(tensors: list[torch.Tensor], distribution: str):
    """Fills all tensors with noise: a kernel that only writes."""
    code = ops.distribution_code(distribution)

    def fill() -> None:
        for key, tensor in enumerate(tensors):
            ops.noise_(tensor, seed=1, key=key, base=0, inner=0, stride=0, distribution=code)

    return fill


if __name__ == "__main__":
    main()
