"""Builds pyzo/_C.so and pyzo/_host with ninja; sources and flags are what lies in csrc/, as for CMakeLists.txt.

Environment: PYZO_CUDA = auto (where there is nvcc) | 0 | 1 (must); PYZO_ARCHS = "80 90" for these architectures; CXX.
"""

import importlib.machinery
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPERATORS = ("csrc/*.cpp", "csrc/cpu/*.cpp")  # pyzo/_C.so
CUDA_OPERATORS = ("csrc/cuda/*.cpp", "csrc/cuda/*.cu")  # the same, where it has CUDA
HOST = ("csrc/cpu/isa*.cpp", "csrc/host/*.cpp")  # pyzo/_host
TORCH_FREE = ("csrc/cpu/isa*.cpp", "csrc/cuda/*.cu", "csrc/host/*.cpp")  # compiled without torch's headers
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
OLDEST_SETUPTOOLS = 77  # the first to read an SPDX license from pyproject.toml
OLDEST_COMPILER = {"g++": 10, "clang": 12}  # C++20
OLDEST_NVCC = 12  # C++20


def stop(message: str) -> None:
    """End the build with one line; pip shows it as the last of its output."""
    raise SystemExit(f"pyzo: {message}")


def sources(*patterns: str) -> list[str]:
    return sorted({str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern)})


def flags(name: str) -> list[str]:
    return [f for f in (ROOT / "csrc" / name).read_text().splitlines() if f and not f.startswith("#")]


def oldest_torch() -> tuple[int, int]:
    version = next(int(f.partition("=")[2], 16) for f in flags("torch.flags") if "TORCH_TARGET_VERSION" in f)
    return version >> 56, version >> 48 & 255


def find_torch() -> Path | None:
    """Folder of the torch that pyzo is installed beside, even under pip's build isolation; None if there is none.

    Isolation hides the environment's own packages, but sysconfig still names their folder. torch is never imported.
    """
    folders = [*sys.path, sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    spec = importlib.machinery.PathFinder.find_spec("torch", folders)
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_version(torch: Path) -> str:
    oldest = oldest_torch()
    text = (torch / "version.py").read_text()
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE).group(1)
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < oldest:
        stop(f"expected torch >= {oldest[0]}.{oldest[1]}, got {version} in {torch}")
    return version


def output(*command: str) -> str:
    kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    return subprocess.run(command, check=True, text=True, **kinds).stdout


def find_compiler() -> tuple[list[str], str]:
    """The C++ compiler as a command, and its name and version."""
    command = shlex.split(os.environ.get("CXX", ""))
    found = [shutil.which(c) for c in command[:1] or ("c++", "g++", "clang++")]
    path = next((c for c in found if c), None)
    if path is None:
        stop("no C++ compiler found ($CXX, c++, g++, clang++): install g++ >= 10 or clang >= 12, or set CXX")
    command = [path, *command[1:]]
    try:
        macros = dict(re.findall(r"#define (__\w+__) (\d+)\n", output(*command, "-dM", "-E", "-x", "c++", "/dev/null")))
    except (OSError, subprocess.CalledProcessError):
        stop(f"CXX: expected a C++ compiler like g++ or clang++, got {shlex.join(command)}")
    name = "clang" if "__clang_major__" in macros else "g++"
    major = int(macros["__clang_major__" if name == "clang" else "__GNUC__"])
    if major < OLDEST_COMPILER[name]:
        stop(f"expected {name} >= {OLDEST_COMPILER[name]} for C++20, got {name} {major} as {shlex.join(command)}")
    return command, f"{name} {major}"


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    version: str
    include: Path
    library: Path
    architectures: list[int]


def find_cuda() -> Cuda | None:
    """The CUDA toolkit to build with, by PYZO_CUDA; torch's own idea of CUDA does not matter."""
    wish = os.environ.get("PYZO_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        stop(f"PYZO_CUDA: expected auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return None
    homes = [os.environ["CUDA_HOME"]] if os.environ.get("CUDA_HOME") else []
    candidates = [shutil.which(f"{home}/bin/nvcc") for home in homes]
    candidates += [shutil.which("nvcc"), shutil.which("/usr/local/cuda/bin/nvcc")]
    nvcc = next((c for c in candidates if c), None)
    if nvcc is None:
        if wish == "1":
            stop("PYZO_CUDA=1, but there is no nvcc in $CUDA_HOME/bin, $PATH or /usr/local/cuda/bin")
        return None
    try:
        version = re.search(r"release ([\d.]+)", output(nvcc, "--version")).group(1)
        known = sorted({int(a) for a in re.findall(r"compute_(\d+)\b", output(nvcc, "--list-gpu-arch"))})
        # nvcc may be a link or a script elsewhere: it says itself where its toolkit is.
        plan = output(nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null")
        top = Path(re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE).group(1).strip()).resolve()
    except (OSError, AttributeError, subprocess.CalledProcessError):
        stop(f"{nvcc} does not run; PYZO_CUDA=0 builds without CUDA")
    if int(version.split(".")[0]) < OLDEST_NVCC:
        stop(f"expected nvcc >= {OLDEST_NVCC}, got {version} as {nvcc}; PYZO_CUDA=0 builds without CUDA")
    libraries = [top / "lib64", top / "lib", *top.glob("targets/*/lib")]
    library = next((p for p in libraries if (p / "libcudart_static.a").is_file()), None)
    if library is None:
        stop(f"no libcudart_static.a in the CUDA toolkit {top}; PYZO_CUDA=0 builds without CUDA")
    return Cuda(nvcc, version, top / "include", library, choose_architectures(known))


def choose_architectures(known: list[int]) -> list[int]:
    wanted = re.split(r"[ ,;]+", os.environ.get("PYZO_ARCHS", "").strip(" ,;"))
    if wanted == [""]:
        return [a for a in ARCHITECTURES if a in known]
    for name in wanted:
        if name not in map(str, known):
            stop(f"PYZO_ARCHS: expected architectures of this nvcc ({' '.join(map(str, known))}), got {name!r}")
    return sorted({int(name) for name in wanted})


def python_headers() -> list[Path]:
    """Include folders of the host module: Python's and pybind11's."""
    try:
        import pybind11
    except ImportError:
        stop("the build needs pybind11: pip install pybind11")
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        stop(f"no Python.h in {python}: install Python's development files (python3-dev)")
    return [python, Path(pybind11.get_include())]


class Graph:
    """The build as a ninja file: one object per source whoever links it, then the libraries."""

    def __init__(self, torch: Path, version: str) -> None:
        self.compiler, compiler_name = find_compiler()
        self.cuda = find_cuda()
        self.torch, self.host_headers = torch, python_headers()
        self.folder = Path("build") / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        cuda = self.cuda and {"nvcc": self.cuda.version, "architectures": self.cuda.architectures}
        self.record = {"compiler": compiler_name, "torch": version, "cuda": cuda}

    def compile_command(self, source: str) -> list[str]:
        torch_free = source in sources(*TORCH_FREE)
        headers = [] if torch_free else [self.torch / "include"]
        headers += [self.cuda.include] if source in sources("csrc/cuda/*.cpp") else []
        headers += self.host_headers if source in sources("csrc/host/*.cpp") else []
        shared = ["-Icsrc", *(part for folder in headers for part in ("-isystem", str(folder)))]
        shared += [] if torch_free else flags("torch.flags")
        if not source.endswith(".cu"):
            return [*self.compiler, *flags("cxx.flags"), *shared]
        compiler = [part for part in self.compiler if not part.startswith("-")][-1]  # of "ccache g++ -m64": g++
        last = self.cuda.architectures[-1]  # as PTX too: what later GPUs compile for themselves
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.cuda.architectures]
        targets += [f"-gencode=arch=compute_{last},code=compute_{last}"]
        return [self.cuda.nvcc, "-ccbin", compiler, *flags("nvcc.flags"), *targets, *shared]

    def torch_libraries(self) -> list[str]:
        # libtorch.so holds nothing, but brings in libtorch_cuda.so under a CUDA torch, where the weak stream symbol is.
        # No rpath: torch is loaded before this library is.
        needed = ["-Wl,-z,defs", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-lc10"]
        static = [f"-L{self.cuda.library}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"] if self.cuda else []
        return [f"-L{self.torch / 'lib'}", *needed, *static]

    def write(self) -> dict[str, Path]:
        """Write build.ninja; returns where each module's library will be."""
        operators = sources(*OPERATORS, *(CUDA_OPERATORS if self.cuda else ()))
        modules = {"pyzo._C": (operators, self.torch_libraries()), "pyzo._host": (sources(*HOST), [])}
        (ROOT / self.folder).mkdir(parents=True, exist_ok=True)
        with open(ROOT / self.folder / "build.ninja", "w") as file:
            graph = import_ninja().ninja_syntax.Writer(file, width=1 << 20)
            graph.variable("builddir", str(self.folder))
            graph.rule("compile", "$compiler -MD -MF $out.d -c $in -o $out", "$in", depfile="$out.d", deps="gcc")
            graph.rule("link", "$linker -shared -Wl,--exclude-libs,ALL -o $out $in $libraries", "$out")
            objects = {}
            for source in sorted({s for files, _ in modules.values() for s in files}):
                objects[source] = str(self.folder / (source + ".o"))
                command = quote(self.compile_command(source))
                graph.build(objects[source], "compile", source, variables={"compiler": command})
            for name, (files, libraries) in modules.items():
                variables = {"linker": quote(self.compiler), "libraries": quote(libraries)}
                library = str(self.folder / (name + ".so"))
                graph.build(library, "link", [objects[s] for s in files], variables=variables)
        return {name: ROOT / self.folder / (name + ".so") for name in modules}

    def run(self) -> None:
        program = Path(import_ninja().BIN_DIR) / "ninja"
        done = subprocess.run([program, "-f", self.folder / "build.ninja"], cwd=ROOT, check=False)
        if done.returncode != 0:
            stop("compiling failed; the compiler's own message is above")


def import_ninja():
    try:
        import ninja
        import ninja.ninja_syntax
    except ImportError:
        stop("the build needs ninja: pip install ninja")
    return ninja


def quote(command: list[str]) -> str:
    """A command line as the value of a ninja variable."""
    return shlex.join(command).replace("$", "$$")


class Build(build_ext):
    """setuptools' build_ext with ninja in place of its compiler."""

    def get_ext_filename(self, name: str) -> str:
        # _C.so holds no Python module: torch loads it.
        operators = name.rpartition(".")[2] == "_C"
        return name.replace(".", os.sep) + ".so" if operators else super().get_ext_filename(name)

    def run(self) -> None:
        in_place = self.inplace
        super().run()
        for folder in [self.build_lib, *([ROOT] if in_place else [])]:
            file = Path(folder) / "pyzo" / "_build.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self.record) + "\n")

    def build_extensions(self) -> None:
        if not sys.platform.startswith("linux"):
            stop(f"expected Linux, got {sys.platform}")
        torch = find_torch()
        if torch is None:
            stop("no torch to build against: pip install torch")
        graph = Graph(torch, torch_version(torch))
        built = graph.write()
        graph.run()
        self.record = graph.record
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(built[extension.name]), str(target))


def main() -> None:
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        stop(f"expected setuptools >= {OLDEST_SETUPTOOLS}, got {setuptools.__version__}: pip install -U setuptools")
    os.chdir(ROOT)
    # Without any torch the front end is asked for one; which does not matter, the ABI is stable.
    needs = [] if find_torch() else ["torch>={}.{}".format(*oldest_torch())]
    setuptools.setup(
        ext_modules=[setuptools.Extension(name, []) for name in ("pyzo._C", "pyzo._host")],
        cmdclass={"build_ext": Build},
        setup_requires=needs,
    )


if __name__ == "__main__":
    main()
