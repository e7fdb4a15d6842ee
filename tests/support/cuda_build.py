"""Builds CUDA libraries so that they can run without a GPU, and takes the PTX out of them.

What is built is kept in ``build/``, under a hash of all that it is made from.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from support.ptx_memory import PtxError
from support.ptx_text import split

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "csrc" / "cuda"
STAND_IN = Path(__file__).with_name("cuda_runtime_stand_in.c")
# Sums and products are rounded one by one, as NumPy's are.
TOY_FLAGS = "-arch=compute_80 -code=compute_80 -std=c++17 -fmad=false -O3"
# Linked so, a library takes the runtime that is loaded already. Errors name lines of the source.
RUNTIME_FLAGS = "-cudart shared -lineinfo"


def missing_reason() -> str | None:
    """Why CUDA libraries cannot be built and read here, or None."""
    if sys.platform != "linux":
        return "only on Linux"
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    return None if _cuobjdump() else "neither triton nor the PATH has cuobjdump"


def build_extension(flags: str = RUNTIME_FLAGS) -> Path:
    """``fastgan._cuda`` with PTX for compute capability 8.0, linked to a shared CUDA runtime."""
    env = {
        **os.environ,
        "FASTGAN_BUILD": "cuda",
        "FASTGAN_NVCCFLAGS": flags,
        "TORCH_CUDA_ARCH_LIST": "8.0+PTX",
    }

    def build(folder: Path) -> Path:
        with tempfile.TemporaryDirectory() as objects:
            command = [sys.executable, "setup.py", "-q", "build_ext"]
            folders = ["--build-lib", str(folder), "--build-temp", objects]
            _run([*command, *folders], cwd=ROOT, env=env)
        (found,) = folder.glob("fastgan/_cuda*.so")
        return found

    sources = [ROOT / "setup.py", *(p for p in FOLDER.rglob("*") if p.is_file())]
    return _kept("extension", sources, f"{flags} {sysconfig.get_config_var('EXT_SUFFIX')}", build)


def build_library(source: Path, flags: str = TOY_FLAGS) -> Path:
    """A library of one ``.cu`` file."""

    def build(folder: Path) -> Path:
        built = folder / f"{source.stem}.so"
        options = [*flags.split(), *RUNTIME_FLAGS.split(), "-shared", "-Xcompiler", "-fPIC"]
        _run(["nvcc", *options, str(source), "-o", str(built)])
        return built

    return _kept(source.stem, [source], flags, build)


def build_stand_in() -> Path:
    """The library that poses as the CUDA runtime of the installed nvcc."""
    name = runtime_name()

    def build(folder: Path) -> Path:
        # A library that is loaded by this name is asked for versions of its symbols.
        linked = ["-Xlinker", f"-soname,{name},--default-symver"]
        options = ["-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-O1,-Wall,-Werror", *linked]
        _run(["nvcc", *options, str(STAND_IN), "-o", str(folder / name)])
        return folder / name

    return _kept("runtime", [STAND_IN], name, build)


@functools.cache
def runtime_name() -> str:
    """What a library linked with ``-cudart shared`` asks for."""
    release = re.search(r"release (\d+)\.", _nvcc_version())
    return f"libcudart.so.{release.group(1)}"


@functools.cache
def ptx_of(library: Path) -> dict[str, str]:
    """By the mangled name of each kernel a text with it, and nothing but it."""
    printed = _run([_cuobjdump(), "-ptx", str(library)])
    texts = re.findall(r"^\.version.*?(?=^Fatbin |\Z)", printed, re.M | re.S)
    kernels: dict[str, str] = {}
    for text in texts:
        for name, kernel in split(text).items():
            if name in kernels:
                raise PtxError(f"{name} is in {library} twice: build it for one architecture")
            kernels[name] = kernel
    if not kernels:
        raise PtxError(f"no PTX in {library}")
    return kernels


@functools.cache
def _nvcc_version() -> str:
    return _run(["nvcc", "--version"])


def _cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.exists():
            return str(tool)
    return shutil.which("cuobjdump")


def _kept(name: str, sources: Iterable[Path], how: str, build: Callable[[Path], Path]) -> Path:
    """What ``build`` makes in a folder, unless it has been made of the same before."""
    made_of = hashlib.sha256(f"{how}\n{_nvcc_version()}".encode())
    for path in sorted(sources):
        made_of.update(f"\n{path.relative_to(ROOT) if ROOT in path.parents else path}\n".encode())
        made_of.update(path.read_bytes())
    kept = ROOT / "build" / "cuda_driver" / f"{name}-{made_of.hexdigest()[:16]}"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be building the same.
        with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            built = build(made).relative_to(made)
            (made / "path").write_text(str(built))
            try:
                made.rename(kept)
            except OSError:
                if not kept.exists():
                    raise
    return kept / (kept / "path").read_text()


def _run(command: list[str], **how: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **how)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout
