"""Builds CUDA libraries so that they can run without a GPU, and takes the PTX out of them.

What it has in common with the benchmarks is in :mod:`fastgan.benchmarks.cuda_build`.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import sysconfig
import tempfile
from pathlib import Path

from fastgan.benchmarks.cuda_build import (
    FOLDER,
    ROOT,
    STAND_IN,
    cuobjdump,
    kept,
    nvcc_version,
    run,
)
from fastgan.benchmarks.cuda_build import missing_reason as missing_reason
from support.ptx_memory import PtxError
from support.ptx_text import split

TOYS = Path(__file__).with_name("cuda_driver_toys.cu")
# Sums and products are rounded one by one, as NumPy's are.
TOY_FLAGS = "-arch=compute_80 -code=compute_80 -std=c++17 -fmad=false -O3"
# Linked so, a library takes the runtime that is loaded already. Errors name lines of the source.
RUNTIME_FLAGS = "-cudart shared -lineinfo"


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
            run([*command, *folders], cwd=ROOT, env=env)
        (found,) = folder.glob("fastgan/_cuda*.so")
        return found

    sources = [ROOT / "setup.py", *(p for p in FOLDER.rglob("*") if p.is_file())]
    return kept("extension", sources, f"{flags} {sysconfig.get_config_var('EXT_SUFFIX')}", build)


def build_library(source: Path, flags: str = TOY_FLAGS) -> Path:
    """A library of one ``.cu`` file."""

    def build(folder: Path) -> Path:
        built = folder / f"{source.stem}.so"
        options = [*flags.split(), *RUNTIME_FLAGS.split(), "-shared", "-Xcompiler", "-fPIC"]
        run(["nvcc", *options, str(source), "-o", str(built)])
        return built

    return kept(source.stem, [source, FOLDER / "ptx.cuh"], flags, build)


def build_stand_in() -> Path:
    """The library that poses as the CUDA runtime of the installed nvcc."""
    name = runtime_name()

    def build(folder: Path) -> Path:
        # A library that is loaded by this name is asked for versions of its symbols.
        linked = ["-Xlinker", f"-soname,{name},--default-symver"]
        options = ["-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-O1,-Wall,-Werror", *linked]
        run(["nvcc", *options, str(STAND_IN), "-o", str(folder / name)])
        return folder / name

    return kept("runtime", [STAND_IN], name, build)


@functools.cache
def runtime_name() -> str:
    """What a library linked with ``-cudart shared`` asks for."""
    return f"libcudart.so.{nvcc_version().split('.')[0]}"


@functools.cache
def ptx_of(library: Path) -> dict[str, str]:
    """By the mangled name of each kernel a text with it, and nothing but it."""
    printed = run([cuobjdump(), "-ptx", str(library)])
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
