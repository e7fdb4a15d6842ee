"""Builds the CUDA sources of a checkout without a GPU: what setup.py tells nvcc, and what is kept.

Imports neither torch nor triton. What is built is kept in ``build/``, under a hash of all that it
is made from.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastgan.errors import RunError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "csrc" / "cuda"
# Poses as the CUDA runtime.
STAND_IN = Path(__file__).with_name("cuda_runtime_stand_in.c")
# What it hands a launch to: kernel, grid, block, shared bytes, stream, addresses of the arguments.
LaunchHandler = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)
_SETUP = ROOT / "setup.py"
WORKERS = 2


def missing_reason() -> str | None:
    """Why CUDA libraries cannot be built and read here, or None."""
    if sys.platform != "linux":
        return "only on Linux"
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    if not cuobjdump():
        return "neither triton nor the PATH has cuobjdump"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def nvcc_flags() -> list[str]:
    """What setup.py tells nvcc of any file."""
    flags: list[str] = _constant("NVCC_FLAGS")
    return flags


def architectures() -> list[str]:
    """What setup.py builds for, as ``90`` for compute capability 9.0."""
    wanted: str = _constant("ARCHITECTURES")
    return [name.removesuffix("+PTX").replace(".", "") for name in wanted.split(";")]


@functools.cache
def _constant(name: str) -> Any:
    """The literal that setup.py first gives to ``name``; to import it would be to run it."""
    if not _SETUP.exists():
        raise RunError(f"no {_SETUP}: the CUDA sources are read in a checkout of fastgan")
    for node in ast.parse(_SETUP.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(x) for x in node.targets] == [name]:
            return ast.literal_eval(node.value)
    raise RunError(f"{_SETUP} does not say what {name} is")


def build_recorder() -> Path:
    """``fastgan._cuda`` with the stand-in for the CUDA runtime within it.

    So it does not meet the runtime that torch has loaded, and its launches go to a function. The
    kernels are PTX, which takes the least time to make and is never run.
    """

    def build(folder: Path) -> Path:
        import pybind11

        flags = [*nvcc_flags(), "-arch=compute_80", "-code=compute_80"]
        flags.append("-Xcompiler=-fPIC,-fvisibility=hidden")
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        runtime = folder / "runtime.o"
        run(["nvcc", "-Xcompiler=-fPIC,-O1", "-c", str(STAND_IN), "-o", str(runtime)])

        def compile_one(source: Path) -> str:
            made = folder / f"{source.name}.o"
            run(["nvcc", *flags, *includes, "-c", str(source), "-o", str(made)])
            return str(made)

        sources = [*FOLDER.glob("*.cu"), FOLDER / "bindings.cpp"]
        with ThreadPoolExecutor(WORKERS) as pool:
            objects = list(pool.map(compile_one, sorted(sources, key=lambda p: -p.stat().st_size)))
        built = folder / f"_cuda{suffix}"
        # Its own runtime goes before any that is loaded already.
        bound = ["-cudart=none", "-Xlinker=-Bsymbolic", "-shared"]
        run(["nvcc", *bound, *objects, str(runtime), "-o", str(built)])
        for path in (runtime, *map(Path, objects)):
            path.unlink()
        return built

    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    sources = [STAND_IN, *(p for p in FOLDER.rglob("*") if p.is_file())]
    return kept("recorder", sources, f"{nvcc_flags()} {suffix}", build)


def kept(name: str, sources: Iterable[Path], how: str, build: Callable[[Path], Path]) -> Path:
    """What ``build`` makes in a folder, unless it has been made of the same before."""
    made_of = hashlib.sha256(f"{how}\n{nvcc_version()}".encode())
    for path in sorted(sources):
        made_of.update(f"\n{path.relative_to(ROOT) if ROOT in path.parents else path}\n".encode())
        made_of.update(path.read_bytes())
    place = ROOT / "build" / "cuda_driver" / f"{name}-{made_of.hexdigest()[:16]}"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be building the same.
        with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            built = build(made).relative_to(made)
            (made / "path").write_text(str(built))
            try:
                made.rename(place)
            except OSError:
                if not place.exists():
                    raise
    return place / (place / "path").read_text()


@functools.cache
def nvcc_version() -> str:
    """As ``13.0.88``."""
    found = re.search(r"V(\d+\.\d+\.\d+)", run(["nvcc", "--version"]))
    assert found
    return found[1]


def cuobjdump() -> str | None:
    """The tool, of triton or on the PATH."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.exists():
            return str(tool)
    return shutil.which("cuobjdump")


def run(command: list[str], **how: Any) -> str:
    """What a command prints, without its warnings.

    Raises:
        RunError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, **how)
    if done.returncode:
        raise RunError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def short_name(symbol: str) -> str:
    """Of a mangled kernel: the last name and the template arguments."""
    name = _demangled(symbol).replace("(anonymous namespace)::", "")
    depth = start = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if not depth and character == "(":
            return name[start:i]
        if not depth and character in " :":
            start = i + 1
    return name[start:]


@functools.cache
def _demangled(symbol: str) -> str:
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    found = demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not found:
        return symbol
    # A few bytes for each kernel are not worth a free().
    return ctypes.string_at(found).decode()
