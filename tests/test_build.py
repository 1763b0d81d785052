"""The build: its error lines, that nothing is listed twice, and what the libraries need and hold."""

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pyzo"
LIBRARY = PACKAGE / "_C.so"

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="setup.py is not beside the tests")


def load_setup():
    spec = importlib.util.spec_from_file_location("pyzo_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pyzo_setup"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


setup = load_setup()


def run(*command, **environment):
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def record():
    file = PACKAGE / "_build.json"
    if not file.is_file():
        pytest.skip("pyzo/_build.json is missing: this library was not built by setup.py")
    return json.loads(file.read_text())


def readelf(*arguments):
    try:
        done = run("readelf", *arguments, LC_ALL="C")
    except FileNotFoundError:
        pytest.skip("readelf is missing: install binutils")
    assert done.returncode == 0, done.stderr
    return done.stdout


def stopped(call, monkeypatch, **environment):
    """The line with which setup.py stops when `call` runs under these environment variables."""
    for name in ("PYZO_CUDA", "PYZO_ARCHS", "CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        call()
    line = str(stop.value)
    assert line.startswith("pyzo: ") and "\n" not in line
    return line


def executable(path, body):
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return str(path)


def fake_nvcc(folder, version="13.0"):
    """A toolkit folder whose nvcc answers setup.py's questions."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    body = f"""case $1 in
  --version) echo "release {version}, V{version}.1";;
  --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_90a\\ncompute_103\\n';;
  --dryrun) echo '#$ TOP={folder}/bin/..' >&2;;
esac
"""
    executable(folder / "bin" / "nvcc", body)
    return str(folder)


def test_a_bad_wish_for_cuda_ends_the_build_in_one_line():
    done = run(sys.executable, "setup.py", "build_ext", PYZO_CUDA="yes")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "pyzo: PYZO_CUDA: expected auto, 0 or 1, got 'yes'"
    assert "Traceback" not in done.stderr


def test_cuda_that_must_be_but_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    assert stopped(setup.find_cuda, monkeypatch, PYZO_CUDA="1") == (
        "pyzo: PYZO_CUDA=1, but there is no nvcc in $CUDA_HOME/bin, $PATH or /usr/local/cuda/bin"
    )
    monkeypatch.setenv("PYZO_CUDA", "auto")
    assert setup.find_cuda() is None


def test_no_cuda_on_wish(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(tmp_path))
    monkeypatch.setenv("PYZO_CUDA", "0")
    assert setup.find_cuda() is None


def test_architectures_are_those_of_this_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(tmp_path))
    monkeypatch.setenv("PYZO_CUDA", "1")
    monkeypatch.delenv("PYZO_ARCHS", raising=False)
    assert setup.find_cuda().architectures == [75, 80, 90]
    for value in ("103;80", "80 103", "80,103, 80"):
        monkeypatch.setenv("PYZO_ARCHS", value)
        assert setup.find_cuda().architectures == [80, 103]
    line = stopped(setup.find_cuda, monkeypatch, CUDA_HOME=str(tmp_path), PYZO_ARCHS="35")
    assert line == "pyzo: PYZO_ARCHS: expected architectures of this nvcc (75 80 90 103), got '35'"


def test_nvcc_too_old_or_broken(monkeypatch, tmp_path):
    line = stopped(setup.find_cuda, monkeypatch, CUDA_HOME=fake_nvcc(tmp_path / "old", "11.8"))
    assert re.match(r"pyzo: expected nvcc >= 12, got 11\.8 as .*; PYZO_CUDA=0 builds without CUDA$", line)
    broken = Path(fake_nvcc(tmp_path / "broken"))
    executable(broken / "bin" / "nvcc", "exit 3\n")
    line = stopped(setup.find_cuda, monkeypatch, CUDA_HOME=str(broken))
    assert re.match(r"pyzo: .*nvcc does not run; PYZO_CUDA=0 builds without CUDA$", line)


def test_no_compiler(monkeypatch, tmp_path):
    line = stopped(setup.find_compiler, monkeypatch, PATH=str(tmp_path))
    assert line.startswith("pyzo: no C++ compiler found ($CXX, c++, g++, clang++): install g++ >= 10")
    line = stopped(setup.find_compiler, monkeypatch, CXX="no-such-compiler")
    assert line.startswith("pyzo: no C++ compiler found")


@pytest.mark.parametrize(
    ("macros", "message"),
    [
        ("#define __GNUC__ 9", "pyzo: expected g++ >= 10 for C++20, got g++ 9 as "),
        ("#define __GNUC__ 4\n#define __clang_major__ 11", "pyzo: expected clang >= 12 for C++20, got clang 11 as "),
    ],
)
def test_compiler_too_old(monkeypatch, tmp_path, macros, message):
    compiler = executable(tmp_path / "c++", f"echo '{macros}'\n")
    assert stopped(setup.find_compiler, monkeypatch, CXX=compiler) == message + compiler


def test_torch_too_old(monkeypatch, tmp_path):
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    line = stopped(lambda: setup.torch_version(tmp_path), monkeypatch)
    assert line == f"pyzo: expected torch >= 2.10, got 2.9.1+cpu in {tmp_path}"


def test_setuptools_too_old(monkeypatch):
    monkeypatch.setattr(setup.setuptools, "__version__", "65.5.0")
    assert stopped(setup.main, monkeypatch) == "pyzo: expected setuptools >= 77, got 65.5.0: pip install -U setuptools"


def test_torch_is_asked_for_where_there_is_none(monkeypatch):
    asked = {}
    monkeypatch.setattr(setup, "find_torch", lambda: None)
    monkeypatch.setattr(setup.setuptools, "setup", asked.update)
    setup.main()
    assert asked["setup_requires"] == ["torch>=2.10"]


def test_the_oldest_torch_is_the_same_everywhere():
    oldest = "torch>={}.{}".format(*setup.oldest_torch())
    assert f'dependencies = ["{oldest}", "numpy"]' in (ROOT / "pyproject.toml").read_text()


def test_cmake_reads_the_same_sources_and_flags():
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.findall(r"file\(GLOB (\w+) CONFIGURE_DEPENDS (.*)\)", text)
    globs = {name: set(patterns.split()) for name, patterns in found}
    assert globs.pop("tests") == {"csrc/tests/*.cpp"}
    assert globs == {
        "operators": set(setup.OPERATORS),
        "cuda_operators": set(setup.CUDA_OPERATORS),
        "host": set(setup.HOST),
        "torch_free": set(setup.TORCH_FREE),
    }
    files = {path.name for path in (ROOT / "csrc").glob("*.flags")}
    assert set(re.findall(r"pyzo_flags\((\S+) ", text)) == files
    assert set(re.findall(r'flags\("(\S+)"\)', (ROOT / "setup.py").read_text())) == files


def test_every_source_is_compiled():
    known = set(setup.sources(*setup.OPERATORS, *setup.CUDA_OPERATORS, *setup.HOST, "csrc/tests/*.cpp"))
    found = {str(p.relative_to(ROOT)) for suffix in ("cpp", "cu") for p in (ROOT / "csrc").rglob(f"*.{suffix}")}
    assert found == known


def test_torch_free_sources_do_not_include_torch():
    """All but what hands a device its work: register.cpp, device_*.h and stream.h."""
    headers = setup.sources("csrc/core/*.h", "csrc/body/*.h", "csrc/cpu/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh")
    for source in (*setup.sources(*setup.TORCH_FREE, "csrc/cpu/layers*.cpp"), *headers):
        if Path(source).name.startswith(("device_", "stream.")):
            continue
        assert not re.search(r"#include <(torch|ATen|c10)/", (ROOT / source).read_text()), source


def test_the_operators_need_libtorch_and_neither_cudart_nor_a_folder():
    """libtorch.so brings in libtorch_cuda.so under a CUDA torch; a path to one torch would tie the library to it."""
    dynamic = readelf("-d", LIBRARY)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "python" in name]
    assert not re.search(r"RPATH|RUNPATH", dynamic)


def test_the_host_module_needs_no_torch():
    (host,) = PACKAGE.glob("_host.*.so")
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("-d", host))
    assert needed and not [name for name in needed if "torch" in name or "c10" in name]


def test_the_cuda_stream_symbol_is_weak():
    lines = [line for line in readelf("--dyn-syms", "-W", LIBRARY).splitlines() if "get_current_cuda_stream" in line]
    assert lines and all(" WEAK " in line and " UND " in line for line in lines)


def test_the_operators_use_torch_through_its_stable_abi():
    """Undefined symbols are C names of the shim; a mangled name of torch or c10 would tie the library to one torch."""
    undefined = [line.split()[-1] for line in readelf("--dyn-syms", "-W", LIBRARY).splitlines() if " UND " in line]
    assert [name for name in undefined if name.startswith(("aoti_torch", "torch_"))]
    assert not [name for name in undefined if re.match(r"_ZN?K?\w*(2at|3c10|5torch)", name)]


def fatbin_parts(path):
    """(kind, architecture) of each part of the CUDA fat binaries in a library; kind 1 is PTX, 2 machine code."""
    section = re.search(r"\.nv_fatbin\s+PROGBITS\s+\w+\s+(\w+)\s+(\w+)", readelf("-S", "-W", path))
    data = path.read_bytes()[int(section[1], 16) :][: int(section[2], 16)]
    parts, at = [], 0
    while (at := data.find(b"\x50\xed\x55\xba", at)) >= 0:
        header, size = struct.unpack_from("<6xHQ", data, at)
        part, at = at + header, at + header + size
        while part < at:
            kind, part_header, part_size = struct.unpack_from("<H2xIQ", data, part)
            parts.append((kind, struct.unpack_from("<I", data, part + 28)[0]))
            part += part_header + part_size
    return parts


def test_cuda_kernels_are_there_for_every_architecture():
    cuda = record()["cuda"]
    if cuda is None:
        pytest.skip("built without CUDA: no nvcc here, or PYZO_CUDA=0")
    parts = set(fatbin_parts(LIBRARY))
    assert parts == {(2, a) for a in cuda["architectures"]} | {(1, cuda["architectures"][-1])}


def test_the_host_module_works_without_torch():
    code = """
import sys
sys.modules["torch"] = None
import pyzo
from pyzo import _host
assert _host.noise(5, seed=1, key=2).shape == (5,)
assert {"optim", "noise", "__version__"} <= set(dir(pyzo))
try:
    pyzo.noise
except ImportError as error:
    assert "torch" in str(error)
else:
    raise SystemExit("pyzo.noise came without torch")
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_info_names_the_build_and_every_operator():
    done = run(sys.executable, "-m", "pyzo", "info")
    assert done.returncode == 0, done.stderr
    registry = re.findall(r'PYZO_(?:HOST_)?OP\(\w+, "(.*)"\)', (ROOT / "csrc" / "ops.inc").read_text())
    assert registry
    for schema in registry:
        assert f"pyzo::{schema.partition('(')[0]}(" in done.stdout
    assert str(LIBRARY) in done.stdout
