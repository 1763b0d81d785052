"""What becomes of activations: handed to the linear behind them, taken into a gated MLP, or coded."""

from dataclasses import dataclass

import torch

from pyzo.nn import codebook

from .activations import (
    FUNCTIONALS,
    CodedActivation,
    HandedOver,
    HandoverBlock,
    OutputActivation,
    RecomputingBlock,
    function_of,
    is_torch_layer,
)
from .decisions import Decisions, Skip
from .flow import Call, within
from .gates import GatedMLP, check_gate
from .linears import SharingLinear, has_hooks, is_linear


@dataclass(frozen=True)
class Gate:
    """The parts of down(h(gate(x)) * up(x)) by name."""

    block: str
    gate: str
    up: str
    down: str
    activation: str


def decide_activations(decisions: Decisions) -> None:
    """Every activation of the model whose class is known."""
    for name, module in decisions.modules.items():
        if is_torch_layer(module) and decisions.recipe["activation"] is not None:
            decisions.report(name, "activation", lambda name: _recompute(decisions, name))
        if function_of(module) is None:
            continue
        gate = find_gate(decisions, name)
        kind = "activation" if gate is None else "gate"
        how = decisions.recipe[kind]
        if how is None:
            continue
        if gate is not None and how == "recompute":
            decisions.report(gate.block, "gate", lambda _, gate=gate: _take_in(decisions, gate))
        else:
            decide = {"recompute": _hand_over, "output": _from_output}.get(how, _code)
            decisions.report(name, kind, lambda name, decide=decide: decide(decisions, name))
    _swap_blocks(decisions)


def _checked(decisions: Decisions, name: str) -> tuple[str, list[Call]]:
    """The function of an activation, and its calls."""
    module = decisions.modules[name]
    calls = decisions.flow.calls.get(name)
    if not calls:
        raise Skip("it did not run")
    if reason := decisions.findings.activations[name]:
        raise Skip(reason)
    if has_hooks(module):
        raise Skip("it has hooks")
    if any(call.argument == call.result for call in calls):
        raise Skip("it works in place")
    return function_of(module), calls


def _code(decisions: Decisions, name: str) -> tuple[str, bool, str]:
    function, _ = _checked(decisions, name)
    if function == "relu":
        raise Skip("torch keeps its output alone, which is exact")
    kind = decisions.recipe["gate" if find_gate(decisions, name) else "activation"]
    try:
        table = codebook(function, 2, kind)
    except ValueError as error:
        raise Skip(str(error)) from error
    decisions.swap(name, CodedActivation, _function=function, _codebook=table)
    return f"slopes from 2-bit codes, codebook {kind!r}", False, ""


def _from_output(decisions: Decisions, name: str) -> tuple[str, bool, str]:
    function, _ = _checked(decisions, name)
    if function == "relu":
        raise Skip("torch keeps its output alone, which is exact")
    decisions.swap(name, OutputActivation, _function=function)
    return "slopes from its output and a bit", False, "near-exact"


def _hand_over(decisions: Decisions, name: str) -> tuple[str, bool, str]:
    """Where nothing but one linear reads the output, the linear applies the function."""
    function, calls = _checked(decisions, name)
    if function == "relu":
        raise Skip("torch keeps its output alone, which the linear behind it keeps too")
    if len(decisions.names[id(decisions.modules[name])]) > 1:
        raise Skip("several modules share it")
    linears = set()
    for call in calls:
        readers = decisions.flow.readers(call.result)
        if readers.written:
            raise Skip("its output is changed in place")
        if len(readers.products) != 1 or readers.others:
            seen = sorted({module or operator for operator, module in readers.others} | set(readers.products))
            raise Skip("its output is not read by one linear alone" + (f": {_count(seen)} read it" if seen else ""))
        linears.update(readers.products)
    linear = linears.pop()
    module = decisions.modules[linear]
    if linears or not is_linear(module) or has_hooks(module):
        raise Skip("no plain linear reads its output")
    if [c.argument for c in decisions.flow.calls[linear]] != [c.result for c in calls]:
        raise Skip("its output is copied on the way to the linear")
    if len(decisions.names[id(module)]) > 1:
        raise Skip("several modules share the linear behind it")
    if not module.weight.requires_grad:
        raise Skip("the linear behind it is frozen and keeps no output of it")
    block = _block_of(decisions, name, linear)
    if reason := decisions.cannot_swap(linear, SharingLinear) or decisions.cannot_swap(block, HandoverBlock):
        raise Skip(reason)
    decisions.swap(name, HandedOver, _handover=None)
    decisions.swap(linear, SharingLinear, _handover=None)
    cut = len(block) + 1 if block else 0
    pair = (tuple(name[cut:].split(".")), tuple(linear[cut:].split(".")), function)
    decisions.pairs.setdefault(block, []).append(pair)
    return "applied by the linear behind it, which keeps its input alone", True, ""


def _recompute(decisions: Decisions, name: str) -> tuple[str, bool, str]:
    """The activation of a layer of torch, which is a function that its class calls."""
    if name not in decisions.flow.calls:
        raise Skip("it did not run")
    function = FUNCTIONALS[decisions.modules[name].activation]
    if function == "relu":
        raise Skip("torch keeps its output alone, which the linear behind it keeps too")
    if decisions.recipe["activation"] != "recompute":
        raise Skip("its activation is no module")
    decisions.swap(name, RecomputingBlock, _function=function)
    return "its second linear applies the activation and keeps its input alone", True, "where no dropout is between"


def _swap_blocks(decisions: Decisions) -> None:
    for block, pairs in decisions.pairs.items():
        decisions.swap(block, HandoverBlock, _pairs=tuple(pairs))


def _block_of(decisions: Decisions, first: str, second: str) -> str:
    """The innermost module around both that is called."""
    parts = [name.split(".")[:-1] for name in (first, second)]
    shared = []
    for a, b in zip(*parts, strict=False):
        if a != b:
            break
        shared.append(a)
    while shared and ".".join(shared) not in decisions.flow.calls:
        shared.pop()
    return ".".join(shared)


def _count(names: list[str]) -> str:
    return ", ".join(name.rpartition(".")[2] for name in names[:3]) + (" and others" if len(names) > 3 else "")


def find_gate(decisions: Decisions, activation: str) -> Gate | None:
    """The gated MLP of an activation, by what was multiplied with what; None where there is none."""
    flow, block = decisions.flow, decisions.parent(activation)
    calls = flow.calls.get(activation)
    if not calls or (block not in flow.calls and block):
        return None
    events = flow.readers_of(calls[0].result)
    if len(events) != 1 or events[0].operator != "mul" or events[0].module != block or len(events[0].makes) != 1:
        return None
    other = [storage for storage in events[0].reads if storage != calls[0].result]
    if len(other) != 1:
        return None
    first = {child: flow.calls[child][0] for child in decisions.children(block) if flow.calls.get(child)}
    gate = next((c for c, call in first.items() if call.result == calls[0].argument and c != activation), None)
    up = next((c for c, call in first.items() if call.result == other[0]), None)
    down = next((c for c, call in first.items() if call.argument == events[0].makes[0]), None)
    if None in (gate, up, down) or len({gate, up, down, activation}) != 4:
        return None
    return Gate(block, gate, up, down, activation)


def _take_in(decisions: Decisions, gate: Gate) -> tuple[str, bool, str]:
    function, calls = _checked(decisions, gate.activation)
    flow = decisions.flow
    if {gate.gate, gate.up, gate.down, gate.activation} != set(decisions.children(gate.block)):
        raise Skip("it has other children than gate, up, down and an activation")
    if len({len(flow.calls[name]) for name in (gate.block, gate.gate, gate.up, gate.down, gate.activation)}) != 1:
        raise Skip("its children run more than once in a call")
    for i, call in enumerate(calls):
        gated, up, down, block = (flow.calls[name][i] for name in (gate.gate, gate.up, gate.down, gate.block))
        product = flow.readers_of(call.result)
        if (
            len(product) != 1
            or set(product[0].reads) != {call.result, up.result}
            or product[0].makes != (down.argument,)
        ):
            raise Skip("its dataflow changes from call to call")
        if gated.argument != up.argument or gated.argument != block.argument or block.result != down.result:
            raise Skip("its dataflow is not down(h(gate(x)) * up(x))")
        inner = (gated.result, up.result, down.argument)
        events = [event for storage in inner for event in flow.readers_of(storage)]
        allowed = (gate.activation, gate.down)
        foreign = [e for e in events if e is not product[0] and not any(within(e.module, name) for name in allowed)]
        if foreign or set(inner) & flow.outputs:
            raise Skip("others read what its linears return")
    sample = decisions.findings.samples.get(gate.block)
    if sample is None:
        raise Skip("it was not tried")
    module = decisions.modules[gate.block]
    parts = tuple(name.rpartition(".")[2] for name in (gate.gate, gate.up, gate.down))
    device = sample.x.device.type
    with (
        torch.no_grad(),
        torch.autocast(device, sample.autocast or torch.bfloat16, enabled=sample.autocast is not None),
    ):
        if reason := check_gate(module, parts, function, sample.x, sample.y):
            raise Skip(reason)
    activation = gate.activation.rpartition(".")[2]
    decisions.swap(gate.block, GatedMLP, _parts=parts, _activation=activation, _function=function)
    return "keeps gate and up alone, the product is recomputed", True, ""
