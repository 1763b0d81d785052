"""Compiles the C++ tests of csrc/tests without torch and runs them."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
GOLDEN = ROOT / "tests" / "golden.txt"
ISAS = {"base": 4, "avx2": 8, "avx512": 16}
NOT_ON_THIS_MACHINE = 77
# Test -> what it is linked with and its arguments. Every csrc/tests/test_*.cpp is here or in PER_ISA (checked below).
PROGRAMS = {
    "test_philox": (False, []),
    "test_fma": (False, []),
    "test_normal": (False, []),
    "test_rounding": (False, []),
    "test_bodies": (True, []),
    "test_golden": (True, [GOLDEN]),
}
PER_ISA = {"test_lanes", "test_elementary"}  # compiled for each of ISAS: below, and in test_elementary.py
COMPILER = os.environ.get("CXX", "c++")


def flags() -> list[str]:
    lines = (CSRC / "cxx.flags").read_text().splitlines()
    return [*(line for line in lines if line and not line.startswith("#")), "-pthread", f"-I{CSRC}"]


def build(output: Path, *arguments: object) -> Path:
    subprocess.run(
        [COMPILER, *flags(), *map(str, arguments), "-o", str(output)], check=True, capture_output=True, text=True
    )
    return output


def run(program: Path, *arguments: object) -> int:
    done = subprocess.run([program, *map(str, arguments)], check=False, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    return done.returncode


@pytest.fixture(scope="session")
def bodies(tmp_path_factory) -> list[Path]:
    """The object files of csrc/cpu/isa*.cpp, compiled once."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler {COMPILER} on this machine")
    folder = tmp_path_factory.mktemp("bodies")
    sources = sorted(CSRC.glob("cpu/isa*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a compiler
        return list(pool.map(lambda source: build(folder / f"{source.stem}.o", "-c", source), sources))


def test_every_cpp_test_is_run():
    assert {path.stem for path in CSRC.glob("tests/test_*.cpp")} == {*PROGRAMS, *PER_ISA}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name, bodies, tmp_path):
    with_bodies, arguments = PROGRAMS[name]
    program = build(tmp_path / name, CSRC / "tests" / f"{name}.cpp", *(bodies if with_bodies else []))
    assert run(program, *arguments) == 0


def test_golden_program_sees_a_wrong_hash(bodies, tmp_path):
    """Of noise, of a seed, of the weights and of the last state after steps."""
    program = build(tmp_path / "test_golden", CSRC / "tests" / "test_golden.cpp", *bodies)
    wrong = tmp_path / "golden.txt"
    lines = GOLDEN.read_text().splitlines()
    for kind, word in (("normal", -1), ("seed", -1), ("pass sgd", -1), ("pass adam", -3), ("pass adam", -1)):
        changed = list(lines)
        line = max(i for i, text in enumerate(lines) if text.startswith(kind))
        words = changed[line].split()
        words[word] = f"{int(words[word], 16) ^ 1:016x}"
        changed[line] = " ".join(words)
        wrong.write_text("\n".join(changed) + "\n")
        assert run(program, wrong) == 1, changed[line]


@pytest.mark.parametrize("lanes", ISAS)
def test_lanes(lanes, bodies, tmp_path):
    source = CSRC / "tests" / "test_lanes.cpp"
    program = build(tmp_path / lanes, f"-DPYZO_ISA={lanes}", f"-DPYZO_LANES={ISAS[lanes]}", source)
    code = run(program)
    if code == NOT_ON_THIS_MACHINE:
        pytest.skip(f"this machine has no {lanes}: compiled, not run")
    assert code == 0
