"""Instructions per pair of normals on a GPU, part by part, against the budget of DESIGN.md section 9."""

import re
import tempfile
from pathlib import Path

from bench import toolkit
from bench.cases.sass import ARCHITECTURE, functions
from bench.harness import Recorder, against

SOURCE = "bench/cases/normal.cu"
# Moving data, addresses and constants: none of it is arithmetic, and in a loop constants stay in registers.
AROUND = re.compile(r"(MOV|HFMA2\.MMA|LDC|ULDC|S2R|IMAD\.WIDE|IMAD\.MOV|LDG|STG|EXIT|BRA|NOP)\b")
UNIFORM = 2  # of the radius: word to float, scale; the budget begins after them
BUDGET = {"logarithm": 13, "square root": 6, "sine and cosine": 18}


def run(recorder: Recorder) -> None:
    """Adds a row for the logarithm, the square root, and sine with cosine."""
    config: dict[str, object] = {"architecture": ARCHITECTURE}
    try:
        cubin = Path(tempfile.mkdtemp()) / "normal.cubin"
        toolkit.compile_cubin(SOURCE, ARCHITECTURE, cubin)
        listing = toolkit.output(toolkit.cuobjdump(), "-sass", str(cubin))
    except toolkit.Missing as reason:
        recorder.add("instructions per pair", "pyzo", config, reason=str(reason))
        return
    found = {name: arithmetic(code) for name, code in functions(listing).items()}
    counts = {
        "logarithm": found["word_to_radius"] - found["square_root"] - UNIFORM,
        "square root": found["square_root"],
        "sine and cosine": found["sine_and_cosine"],
    }
    for part, count in counts.items():
        recorder.add(
            "instructions per pair", "pyzo", {**config, "part": part},
            value=count, unit="instructions", **against(BUDGET[part], count, at_least=False),
        )  # fmt: skip


def arithmetic(code: dict[int, str]) -> int:
    """How many instructions compute something."""
    return sum(not AROUND.match(text) for text in code.values())
