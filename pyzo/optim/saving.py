"""State dicts of the zeroth-order optimizers: a run continues bit for bit where its state was taken."""

from typing import TYPE_CHECKING, Any

import torch

from pyzo.field import NOISE_VERSION
from pyzo.masks import load_mask
from pyzo.optim.params import named_tensors

if TYPE_CHECKING:
    from pyzo.optim.base import ZOOptimizer


def save(opt: "ZOOptimizer") -> dict[str, Any]:
    """Groups and state as in torch, and under "pyzo" the run: noise version, method, counters, keys, masks."""
    whole = torch.optim.Optimizer.state_dict
    saved = getattr(whole, "__wrapped__", whole)(opt)  # without the wrapper against compilation: see add_param_group
    ages = opt._ages_now()
    for index, tensor in enumerate(p for group in opt.param_groups for p in group["params"]):
        if tensor in ages:
            saved["state"][index] = {**saved["state"][index], "step": ages[tensor]}
    for group in saved["param_groups"]:  # as plain values, which torch.load takes with weights_only
        group["mask"] = None if group["mask"] is None else group["mask"].plain()
    saved["pyzo"] = {
        "noise_version": NOISE_VERSION,
        "method": type(opt).__name__,
        "runs": {run.block.name: run.first.read_header() for run in opt._runs},
        "keys": opt.keys(),
        "masks": opt._masks.numbers(named_tensors(opt.param_groups)),
    }
    return saved


def load(opt: "ZOOptimizer", state_dict: dict[str, Any]) -> None:
    """Takes what `save` returned; ValueError before anything changes where it is of another run."""
    saved = state_dict.get("pyzo")
    if saved is None:
        raise ValueError("state_dict: expected one of a pyzo optimizer, got one without the entry 'pyzo'")
    if saved["noise_version"] != NOISE_VERSION:
        raise ValueError(f"state_dict: expected noise version {NOISE_VERSION}, got {saved['noise_version']}")
    if saved["keys"] != opt.keys():
        other = sorted(set(saved["keys"].items()) ^ set(opt.keys().items()))
        raise ValueError(
            f"state_dict: expected the same trained parameters, got others, the first being {other[0][0]!r}"
        )
    pairs = zip(opt.param_groups, state_dict["param_groups"], strict=False)
    if saved["method"] != type(opt).__name__ or any(set(own) != set(theirs) for own, theirs in pairs):
        raise ValueError(f"state_dict: expected one of {type(opt).__name__}, got one of {saved['method']}")
    blocks = [run.block.name for run in opt._runs]
    if set(saved["runs"]) != set(blocks):
        raise ValueError(f"state_dict: expected runs of {len(blocks)} blocks, got {len(saved['runs'])} or others")
    masks = [load_mask(group["mask"]) for group in state_dict["param_groups"]]
    tensors = [p for group in opt.param_groups for p in group["params"]]
    states = {tensors[index]: state for index, state in state_dict["state"].items()}
    named = named_tensors(opt.param_groups)
    for tensor in dict.fromkeys([*(n.tensor for n in named if opt._state_dtypes(n.tensor)), *states]):
        _check_state(opt, tensor, states.get(tensor, {}))
    # Without the state: torch would cast it to the dtype of the parameter.
    groups = [{**group, "mask": mask} for group, mask in zip(state_dict["param_groups"], masks, strict=True)]
    torch.optim.Optimizer.load_state_dict(opt, {"state": {}, "param_groups": groups})
    opt._masks.load(opt.param_groups, named, saved["masks"])
    opt.state.clear()
    for tensor, state in states.items():
        opt.state[tensor] = {name: state[name].clone().to(tensor.device) for name in opt._state_dtypes(tensor)}
    opt._resume(saved["runs"], {tensor: state["step"] for tensor, state in states.items() if opt.state_names})


def _check_state(opt: "ZOOptimizer", tensor: torch.Tensor, state: dict[str, Any]) -> None:
    dtypes = opt._state_dtypes(tensor)
    expected = {*dtypes, "step"} if opt.state_names else set(dtypes)
    if set(state) != expected:
        raise ValueError(f"state_dict: expected state {sorted(expected)}, got {sorted(state)}")
    for name, dtype in dtypes.items():
        own = opt.state.get(tensor, {}).get(name, tensor).shape
        if state[name].dtype != dtype or state[name].shape != own:
            raise ValueError(
                f"state_dict: expected {name} of dtype {dtype} and shape {tuple(own)}, got "
                f"{state[name].dtype} and {tuple(state[name].shape)}"
            )
