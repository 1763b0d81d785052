"""Instructions per element of the main loop of every CUDA kernel over tensors, estimated from its machine code."""

import itertools
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench import toolkit
from bench.harness import Recorder

ARCHITECTURE = 90
STORE = re.compile(r"\bSTG(?:\.E)?(\.128|\.64|\.[US]16|\.[US]8|)\b")
ACCESS_BYTES = {".128": 16, ".64": 8, "": 4, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")


@dataclass
class Block:
    """Straight-line code: its instructions, and where it can go."""

    instructions: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    @property
    def stored_bytes(self) -> int:
        """Bytes a thread stores to global memory."""
        found = (STORE.search(text) for text in self.instructions)
        return sum(ACCESS_BYTES[match[1]] for match in found if match)


def run(recorder: Recorder) -> None:
    """Adds a row per kernel that stores in a loop."""
    try:
        cuobjdump, cubins = toolkit.cuobjdump(), toolkit.cubins(ARCHITECTURE, Path(tempfile.mkdtemp()))
    except toolkit.Missing as reason:
        recorder.add("instructions per element", "pyzo", {"architecture": ARCHITECTURE}, reason=str(reason))
        return
    listings = [toolkit.output(cuobjdump, "-sass", str(cubin)) for cubin in cubins]
    for name, code in ((name, code) for listing in listings for name, code in functions(listing).items()):
        kernel = toolkit.Kernel.parse(name)
        config = {"kernel": str(kernel), "architecture": ARCHITECTURE}
        found = main_loop(blocks(code), element_bytes=kernel.stored_bytes)
        if found is not None and kernel.name in toolkit.TENSOR_KERNELS:
            shortest, longest, elements = found
            recorder.add(
                "instructions per element", "pyzo", config,
                value=longest / elements, unit="on the longest path",
                shortest=shortest / elements, elements_per_turn=elements,
                widest_load_bytes=_widest(code, "LDG"), widest_store_bytes=_widest(code, "STG"),
            )  # fmt: skip


def _widest(code: dict[int, str], opcode: str) -> int:
    found = re.findall(rf"\b{opcode}(?:\.E)?(\.128|\.64|\.[US]16|\.[US]8|)\b", "\n".join(code.values()))
    return max((ACCESS_BYTES[width] for width in found), default=0)


def functions(listing: str) -> dict[str, dict[int, str]]:
    """Instructions by address of every function in the output of cuobjdump -sass."""
    found: dict[str, dict[int, str]] = {}
    code: dict[int, str] = {}
    for line in listing.splitlines():
        if "Function :" in line:
            code = found.setdefault(line.split("Function :")[1].strip(), {})
        elif match := LINE.match(line):
            code[int(match[1], 16)] = match[2]
    return found


def blocks(code: dict[int, str]) -> dict[int, Block]:
    """Basic blocks by first address. A call counts as one instruction that comes back."""
    addresses = sorted(code)
    follows = dict(itertools.pairwise(addresses))
    starts = {addresses[0]}
    for address in addresses:
        if _jump(code[address]) is not None or _ends(code[address]):
            starts |= {target for target in (_jump(code[address]), follows.get(address)) if target is not None}
    found: dict[int, Block] = {}
    for address in addresses:
        if address in starts:
            block = found[address] = Block()
        block.instructions.append(code[address])
        after = follows.get(address)
        if after is None or after in starts or _ends(code[address]):
            conditional = code[address].startswith("@") or "," in code[address].partition("BRA")[2]
            block.next = [] if _ends(code[address]) and not conditional else [after] if after is not None else []
            if (target := _jump(code[address])) is not None:
                block.next.append(target)
    return found


def _jump(text: str) -> int | None:
    match = re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", text)
    return int(match[1], 16) if match else None


def _ends(text: str) -> bool:
    return re.search(r"\b(BRA|EXIT|RET|BRX|JMX)\b", text) is not None


def main_loop(code: dict[int, Block], *, element_bytes: int) -> tuple[int, int, int] | None:
    """Fewest and most instructions of a turn of the outer loop that stores, and elements per turn.

    Only turns that store the most bytes, `element_bytes` for each element, count: those of a thread whose elements are
    aligned and inside the tensor. Inner loops count once. Branches on what the pass does are not followed: the two
    numbers enclose every kind of pass.
    None where no loop stores.
    """
    first = min(code)
    order, back = _depth_first(code, first)
    headers = [header for header in order if any(target == header for _, target in back)]
    for header in headers:  # outermost first
        members = _loop(code, header, [start for start, target in back if target == header])
        turns = _turns(code, header, [start for start in order if start in members], members, back)
        nbytes = max(turns, default=0)
        if nbytes:
            return (*turns[nbytes], nbytes // element_bytes)
    return None


def _depth_first(code: dict[int, Block], first: int) -> tuple[list[int], set[tuple[int, int]]]:
    """Reverse postorder of the blocks, and the edges that close loops."""
    order: list[int] = []
    back: set[tuple[int, int]] = set()
    open_blocks, seen = {first}, {first}
    stack = [(first, iter(code[first].next))]
    while stack:
        start, targets = stack[-1]
        for target in targets:
            if target in open_blocks:
                back.add((start, target))
            elif target not in seen:
                seen.add(target)
                open_blocks.add(target)
                stack.append((target, iter(code[target].next)))
                break
        else:
            stack.pop()
            open_blocks.remove(start)
            order.append(start)
    return order[::-1], back


def _loop(code: dict[int, Block], header: int, latches: Iterable[int]) -> set[int]:
    """Blocks that reach a latch without passing the header."""
    before: dict[int, set[int]] = {start: set() for start in code}
    for start, block in code.items():
        for target in block.next:
            before[target].add(start)
    members, todo = {header}, list(latches)
    while todo:
        start = todo.pop()
        if start not in members:
            members.add(start)
            todo += before[start]
    return members


def _turns(
    code: dict[int, Block], header: int, order: Iterable[int], members: set[int], back: set[tuple[int, int]]
) -> dict[int, tuple[int, int]]:
    """Fewest and most instructions of a turn from the header to itself, by the bytes it stores."""
    reached: dict[int, dict[int, tuple[int, int]]] = {header: {0: (0, 0)}}
    turns: dict[int, tuple[int, int]] = {}
    for start in order:
        for nbytes, (low, high) in reached.get(start, {}).items():
            here = (low + len(code[start].instructions), high + len(code[start].instructions))
            total = nbytes + code[start].stored_bytes
            for target in code[start].next:
                if target == header:
                    _widen(turns, total, here)
                elif target in members and (start, target) not in back:
                    _widen(reached.setdefault(target, {}), total, here)
    return turns


def _widen(known: dict[int, tuple[int, int]], nbytes: int, path: tuple[int, int]) -> None:
    low, high = known.get(nbytes, path)
    known[nbytes] = (min(low, path[0]), max(high, path[1]))
