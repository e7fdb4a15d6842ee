"""The CUDA kernels compiled by g++ and run on the CPU, as ``cuda_on_host/emulator.cpp`` says.

:func:`build_kernels` compiles ``csrc/cuda`` as it stands, or with a fault planted, and :func:`load`
imports what it built as the module ``_cuda``. A launch that does what CUDA leaves undefined raises
RuntimeError. With a sanitizer, what is built runs only in a process of its own, in which
:func:`run_sanitized` calls a function. Any number of builds can be loaded at once, as long as
``bindings.cpp`` binds functions only, or its classes with ``py::module_local``.

No torch is imported here: it takes longer to load under a sanitizer than the kernels take to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

Sanitizer = Literal["address", "thread"]

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
HEADERS = TESTS / "support" / "cuda_on_host"
EMULATOR = HEADERS / "emulator.cpp"
KERNELS = Path("csrc", "cuda")
BINDINGS = "bindings.cpp"

FLAGS = ("-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden")
# -fno-gnu-unique: or inline variables would be shared by all builds that a process loads.
FLAGS += ("-fno-gnu-unique", "-pthread")
SANITIZER_FLAGS: dict[Sanitizer, tuple[str, ...]] = {
    # Of undefined behaviour, what a GPU faults on: a float4 that is not aligned.
    "address": (
        *("-fsanitize=address,alignment", "-fno-sanitize-recover=all"),
        *("-g1", "-fno-omit-frame-pointer"),
    ),
    "thread": ("-fsanitize=thread", "-g1", "-fno-omit-frame-pointer"),
}
EMULATOR_FLAGS: dict[Sanitizer, tuple[str, ...]] = {
    "address": ("-DCUDA_ON_HOST_ADDRESS",),
    "thread": ("-DCUDA_ON_HOST_THREAD",),
}
# The exit status of a process in which a sanitizer has found something.
FOUND = 77
ORDERS = ("ascending", "descending", "random")
_NO_ADDRESS_RANDOMISATION = 0x0040000


class Edit(NamedTuple):
    """``new`` in the place of ``old``, which the file of ``csrc/cuda`` has once."""

    file: str
    old: str
    new: str


class Launch(NamedTuple):
    """A launch that was let through; ``shared`` in bytes."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint64),
    )


@functools.cache
def missing_reasons(sanitizer: Sanitizer | None = None) -> list[str]:
    """Why the kernels cannot be built and run here; an empty list means that they can."""
    if sys.platform != "linux":
        return ["CUDA kernels run on the CPU under Linux only"]
    if shutil.which("g++") is None:
        return ["there is no g++"]
    reasons = []
    if _pybind11() is None:
        reasons.append("there is no pybind11, nor a torch that brings it")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        reasons.append("there is no Python.h")
    if sanitizer and not reasons:
        if not _runtime(sanitizer).is_absolute():
            return [f"g++ has no lib{_runtime(sanitizer).name}"]
        tried = _sanitized([sys.executable, "-c", "import numpy"], sanitizer)
        if tried.returncode:
            last = (tried.stderr.strip().splitlines() or ["no message"])[-1]
            reasons.append(f"Python does not run under the {sanitizer} sanitizer: {last}")
    return reasons


def build_kernels(sanitizer: Sanitizer | None = None, edit: Edit | None = None) -> Path:
    """``csrc/cuda`` compiled as the module ``_cuda``, with ``edit`` made in a copy of it.

    Raises:
        ValueError: the file has not just one ``old``.
        RuntimeError: it does not compile.
    """
    if edit is None:
        return _build_kernels(ROOT, sanitizer)
    file, old, new = edit
    text = (ROOT / KERNELS / file).read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise ValueError(f"{file} has {text.count(old)} times what is to be replaced: {old}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / KERNELS, copy / KERNELS)
        (copy / KERNELS / file).write_text(text.replace(old, new), encoding="utf-8")
        return _build_kernels(copy, sanitizer)


def _build_kernels(root: Path, sanitizer: Sanitizer | None) -> Path:
    kernels = sorted(path.relative_to(root) for path in (root / KERNELS).glob("*.cu"))
    includes = [KERNELS, _pybind11(), sysconfig.get_path("include")]
    sources = [KERNELS / BINDINGS, *kernels]  # the longest to compile first
    return build("_cuda", sources, sanitizer, root=root, includes=includes)


def build(
    name: str,
    sources: Sequence[Path],
    sanitizer: Sanitizer | None = None,
    *,
    root: Path = ROOT,
    includes: Sequence[Any] = (),
) -> Path:
    """A shared object of ``sources``, which are relative to ``root``, and the emulator.

    A source is compiled anew only where what the preprocessor makes of it has changed.
    """
    folder = build_folder()
    include = [f"-I{path}" for path in (HEADERS, *includes)]
    flags = [*FLAGS, *include]
    kernel_flags = [*flags, *(SANITIZER_FLAGS[sanitizer] if sanitizer else ())]
    emulator_flags = [*flags, *(EMULATOR_FLAGS[sanitizer] if sanitizer else ())]
    jobs = [(EMULATOR, [*emulator_flags, "-O2"])]
    # The bindings hold no kernel to instrument.
    jobs += [(path, flags if path.name == BINDINGS else kernel_flags) for path in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _object(root, folder, *job), jobs))
    key = hashlib.sha256("\n".join([name, *(path.name for path in objects)]).encode())
    target = folder / key.hexdigest()[:20] / f"{name}.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        link = [*objects, "-shared", "-pthread"]
        if sanitizer:
            link.append(next(f for f in SANITIZER_FLAGS[sanitizer] if f.startswith("-fsanitize=")))
        make(target, link, root)
    return target


def _object(root: Path, folder: Path, source: Path, flags: list[str]) -> Path:
    """``source`` compiled; where it stands does not count, so that copies find each other's."""
    compile_it = [*flags, "-x", "c++", source]
    # With -g it would name the folder that it runs in.
    preprocessed = _gpp([*compile_it, "-fno-working-directory", "-E"], root)
    key = hashlib.sha256("\0".join([_compiler(), *map(str, flags), preprocessed]).encode())
    target = folder / f"{source.stem}-{key.hexdigest()[:20]}.o"
    if not target.exists():
        make(target, [*compile_it, "-c"], root)
    return target


def make(target: Path, arguments: Sequence[Any], root: Path = ROOT) -> None:
    """``target``, by g++ in the folder ``root``.

    Raises:
        RuntimeError: it does not compile.
    """
    # Another process may make the same: the last to be ready stays, and they are alike.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        _gpp([*arguments, "-o", made], root)
        made.replace(target)


def _gpp(arguments: Sequence[Any], root: Path) -> str:
    command = ["g++", *map(str, arguments)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


@functools.cache
def _compiler() -> str:
    """What tells g++ and the CPU that it compiles for from others."""
    return _gpp([*FLAGS, "-dM", "-E", "-x", "c++", os.devnull], ROOT)


@functools.cache
def _pybind11() -> Path | None:
    """Where the headers of pybind11 are: its own, or those that torch brings."""
    for package in ("pybind11", "torch"):
        found = importlib.util.find_spec(package)
        if found is not None and found.origin is not None:
            include = Path(found.origin).parent / "include"
            if (include / "pybind11").is_dir():
                return include
    return None


@functools.cache
def build_folder() -> Path:
    """Where all that is built is kept."""
    elsewhere = Path(tempfile.gettempdir(), f"fastgan-cuda-on-host-{os.getuid()}")
    for folder in (ROOT / "build" / "cuda_on_host", elsewhere):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    raise RuntimeError("there is no folder to build in")


def load(path: Path) -> Any:
    """The module ``_cuda`` of a build, under a name of its own."""
    name = f"cuda_on_host_{path.parent.name}._cuda"
    if name in sys.modules:
        return sys.modules[name]
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[name] = module
    return module


def _library(module: Any) -> ctypes.CDLL:
    return module if isinstance(module, ctypes.CDLL) else ctypes.CDLL(module.__file__)


@contextlib.contextmanager
def order(
    module: Any, name: Literal["ascending", "descending", "random"], seed: int = 0
) -> Iterator[None]:
    """The order of blocks, and of the threads in them; it is ascending before and after."""
    library = _library(module)
    library.cuda_on_host_order(ORDERS.index(name), seed)
    try:
        yield
    finally:
        library.cuda_on_host_order(0, 0)


@contextlib.contextmanager
def recorded(module: Any) -> Iterator[list[Launch]]:
    """A list that has the launches made within, once they are over."""
    library = _library(module)
    library.cuda_on_host_forget_launches()
    launches: list[Launch] = []
    try:
        yield launches
    finally:
        read = library.cuda_on_host_launches
        read.restype, read.argtypes = ctypes.c_uint64, (ctypes.c_void_p, ctypes.c_uint64)
        entries = (_Launch * read(None, 0))()
        read(entries, len(entries))
        launches += [Launch(tuple(e.grid), tuple(e.block), e.shared) for e in entries]


def sanitized_environment(sanitizer: Sanitizer) -> dict[str, str]:
    """The environment in which Python can load what is built with ``sanitizer``."""
    options = [f"exitcode={FOUND}", "halt_on_error=1", "detect_leaks=0"]
    # Fresh memory is full of NaN.
    options += ["malloc_fill_byte=255", "max_malloc_fill_size=1000000000"]
    if sanitizer == "thread":
        options = [f"exitcode={FOUND}", "halt_on_error=1", "atexit_sleep_ms=0"]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        **os.environ,
        **threads,
        # libstdc++ too, or the runtime finds no exceptions to intercept when it starts.
        "LD_PRELOAD": f"{_runtime(sanitizer)} {_library_of_gpp('libstdc++.so')}",
        f"{'ASAN' if sanitizer == 'address' else 'TSAN'}_OPTIONS": ":".join(options),
        "UBSAN_OPTIONS": f"exitcode={FOUND}:print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _runtime(sanitizer: Sanitizer) -> Path:
    return _library_of_gpp("libasan.so" if sanitizer == "address" else "libtsan.so")


@functools.cache
def _library_of_gpp(name: str) -> Path:
    return Path(_gpp([f"-print-file-name={name}"], ROOT).strip())


def run_sanitized(
    sanitizer: Sanitizer, function: str, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Calls ``function``, a ``"module:name"``, with ``arguments`` as text, in a new process.

    Its exit status is 0, :data:`FOUND` where the sanitizer has found something, or 1 where the
    function raised; stderr says what.
    """
    command = [sys.executable, "-m", "support.cuda_case", function, *map(str, arguments)]
    return _sanitized(command, sanitizer)


def _sanitized(command: Sequence[str], sanitizer: Sanitizer) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=sanitized_environment(sanitizer),
        capture_output=True,
        text=True,
        preexec_fn=_fix_addresses if sanitizer == "thread" else None,
    )


def _fix_addresses() -> None:
    # ThreadSanitizer needs parts of the address space that randomisation may have taken. Where
    # this is forbidden, it is left to luck.
    ctypes.CDLL(None).personality(_NO_ADDRESS_RANDOMISATION)
