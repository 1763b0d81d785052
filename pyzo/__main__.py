"""`python -m pyzo info`: this build, devices, operators. `python -m pyzo bench`: pyzo beside plain torch."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path


def build_lines() -> Iterator[str]:
    """The version, the libraries, and what setup.py recorded when it built them."""
    import pyzo

    folder = Path(pyzo.__file__).parent
    library, record = folder / "_C.so", folder / "_build.json"
    yield f"pyzo          {getattr(pyzo, '__version__', 'not installed by pip')}"
    yield f"operators     {library if library.is_file() else 'not built: pip install .'}"
    if not record.is_file():
        return
    build = json.loads(record.read_text())
    yield f"built with    {build['compiler']}, torch {build['torch']}"
    if build["cuda"] is None:
        yield "CUDA kernels  none"
    else:
        architectures = " ".join(map(str, build["cuda"]["architectures"]))
        yield f"CUDA kernels  architectures {architectures}, and PTX of the last (nvcc {build['cuda']['nvcc']})"


def host_lines() -> Iterator[str]:
    """What the torch-free module finds on this machine."""
    try:
        from pyzo import _host
    except ImportError as error:
        yield f"host module   {error}"
        return
    yield f"noise         version {_host.noise_version}"
    yield f"CPU           instruction sets {' '.join(_host.isas())}, the first is used"


def torch_lines() -> Iterator[str]:
    """torch, its devices, and every operator with its schema."""
    try:
        import torch
    except ImportError:
        yield "torch         not installed"
        return
    from pyzo import ops

    yield f"torch         {torch.__version__}, {torch.get_num_threads()} threads"
    yield f"CUDA stream   {'bound' if ops.cuda_stream_bound() else 'not bound: this torch has no CUDA'}"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}        {properties.name}, sm_{properties.major}{properties.minor}"
    yield "operators"
    for schema in sorted(map(str, torch._C._jit_get_all_schemas())):
        if schema.startswith("pyzo::"):
            yield f"  {schema}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pyzo", description="About pyzo on this machine.")
    parser.add_argument(
        "command",
        choices=["info", "bench"],
        help="info: this build, the devices and the operators; bench: pyzo beside plain torch, in under two minutes "
        "(bench --help for its options)",
    )
    options = parser.parse_args(sys.argv[1:2])
    if options.command == "bench":
        from pyzo import bench

        return bench.main(sys.argv[2:])
    if sys.argv[2:]:
        parser.error(f"info takes no arguments, got {sys.argv[2:]}")
    print("\n".join([*build_lines(), *host_lines(), *torch_lines()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
