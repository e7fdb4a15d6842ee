"""CUDA devices for a process without a GPU: the library's own choices by device really run.

After :func:`start` torch has a device ``cuda:0`` whose tensors are torch's own and lie in the
host's memory; ``simulated_cuda.cpp`` says how. What happens between host and device is noted:

``to_device``, ``to_host``
    a copy; with `` pinned`` behind it where the host's memory is and need not wait for it
``number``
    a kernel is given a number by value that is a tensor of the host: a captured step would keep it
``wait``
    what the host waits for the device for: ``.item()``, ``nonzero()``, a mask as an index, ...

:func:`run_kernels` makes the library find the GPU's kernels: Triton's are interpreted, those of
CUDA compiled for the CPU. Both refuse memory of the host and of another device than the present
one, those of CUDA another device's stream too.

Not simulated: several streams, and that anything runs later than it is called; cuDNN, and the
rounding of torch's own kernels, which are the CPU's here; a GPU's random numbers, likewise; CUDA
graphs; events; how much memory is left. What torch checks in its kernels for CUDA alone is checked
in part: devices, and the learning rate's dtype.

No torch is imported here: the simulation must be loaded first, so it takes a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from support import cuda_host

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-z,defs")

# An H100 as far as the library asks.
CAPABILITY = (9, 0)
MULTIPROCESSORS = 132
MEMORY = 80 << 30
# Of device 0; those of others follow.
_STREAM = 0x5000


@functools.cache
def missing_reason() -> str:
    """Why CUDA cannot be simulated here, or an empty text. Builds what it takes."""
    if reasons := cuda_host.missing_reasons():
        return reasons[0]
    try:
        build()
    except RuntimeError as error:
        # The headers are torch's private ones, which another version may have changed.
        lines = str(error).splitlines()
        return next((line for line in lines if "error:" in line), lines[-1])
    return ""


def build() -> Path:
    """The shared object, made anew for another torch or from another source.

    Raises:
        RuntimeError: it does not compile.
    """
    torch = _torch()
    libraries = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    # It brings its torch along, so that another folder's would be a second one.
    made_of = [SOURCE.read_text(), (torch / "version.py").read_text(), *FLAGS, *libraries]
    key = hashlib.sha256("\0".join(made_of).encode())
    target = cuda_host.build_folder() / key.hexdigest()[:20] / "simulated_cuda.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        cuda_host.make(target, [*FLAGS, f"-I{torch / 'include'}", SOURCE, *libraries])
    return target


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def start() -> None:
    """Simulates one CUDA device in this process from now on.

    Raises:
        RuntimeError: torch has been imported already.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before support.simulated_cuda.start()")
    ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    import torch

    torch.ops.simulated_cuda.install()
    _pose()


def _pose() -> None:
    """What torch asks of the CUDA runtime in Python, and not through the hooks."""
    import torch

    ops = torch.ops.simulated_cuda

    def index_of(device: Any = None) -> int:
        if isinstance(device, int):
            return device
        index = None if device is None else torch.device(device).index
        return ops.current_device() if index is None else index

    properties = SimpleNamespace(
        name="simulated GPU",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=MULTIPROCESSORS,
        total_memory=MEMORY,
    )

    def current_stream(device: Any = None) -> SimpleNamespace:
        index = index_of(device)
        return SimpleNamespace(cuda_stream=_STREAM + index, device=torch.device("cuda", index))

    answers = {
        "_initialized": True,
        "_lazy_init": lambda: None,
        "_exchange_device": ops.exchange_device,
        "_maybe_exchange_device": ops.exchange_device,
        "set_device": lambda device: ops.exchange_device(index_of(device)),
        "current_device": ops.current_device,
        "device_count": ops.device_count,
        "is_available": lambda: True,
        "current_stream": current_stream,
        "default_generators": tuple(ops.default_generator(index) for index in range(2)),
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "synchronize": lambda device=None: ops.note("wait synchronize"),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)

    make_storage = torch.UntypedStorage.__new__

    def storage(cls: type, *given: Any, device: Any = None, **others: Any) -> Any:
        if device is None or torch.device(device).type != "cuda":
            device = {} if device is None else {"device": device}
            return make_storage(cls, *given, **device, **others)
        # Where torch is built for CUDA it would ask the caching allocator itself.
        return torch.empty(*given, dtype=torch.uint8, device=device).untyped_storage()

    torch.UntypedStorage.__new__ = storage


def take_notes() -> list[str]:
    """What has crossed between host and device, or waited for it, since the last call."""
    import torch

    return list(torch.ops.simulated_cuda.take_notes())


@contextlib.contextmanager
def two_devices() -> Iterator[None]:
    """There is a ``cuda:1`` within."""
    import torch

    torch.ops.simulated_cuda.set_device_count(2)
    try:
        yield
    finally:
        torch.ops.simulated_cuda.set_device_count(1)


class Launch(NamedTuple):
    """A call of a kernel: ``triton`` or ``cuda``, and its name."""

    backend: str
    name: str
    device: int
    on_main_thread: bool


_launches: list[Launch] = []


def take_launches() -> list[Launch]:
    """The launches since the last call, in order."""
    taken = _launches[:]
    _launches.clear()
    return taken


def _launched(backend: str, name: str, devices: set[int]) -> None:
    """Raises RuntimeError where a GPU would: tensors of another device than the present one."""
    import torch

    current = torch.cuda.current_device()
    if devices != {current}:
        raise RuntimeError(f"{backend} kernel {name} of device {current} is given {devices}")
    main = threading.current_thread() is threading.main_thread()
    _launches.append(Launch(backend, name, current, main))


def run_kernels() -> None:
    """From now on the library finds a GPU's kernels, and of several ways the first the fastest.

    ``TRITON_INTERPRET`` must be 1 already.
    """
    from fastgan import gpu
    from fastgan.ops import cuda, triton, tuning

    tuning._measure = lambda ways, device: {way: float(i) for i, way in enumerate(ways)}
    extension = _Extension(cuda_host.load(cuda_host.build_kernels()))
    found = cuda._Found(extension, gpu.missing_reason())
    cuda._find = lambda: found
    cuda._described = functools.partial(_described, cuda._described)
    if not triton.missing_reasons():
        triton.interpreted = lambda: False
        triton._find.cache_clear()
        _interpret()


def _described(describe: Any, x: Any) -> Any:
    if not x.is_cuda:
        raise RuntimeError("an illegal memory access was encountered: a CUDA kernel, CPU memory")
    return describe(x)


class _Extension:
    """``fastgan._cuda`` compiled for the CPU, whose launches are noted."""

    def __init__(self, native: Any) -> None:
        class Array(native.Array):
            def __init__(self, address: int, dtype: str, device: int, *sizes: Any) -> None:
                # The emulator has one device.
                super().__init__(address, dtype, 0, *sizes)
                self.device = device

        self._native = native
        self.Array = Array

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._native, name)
        if not callable(attribute):
            return attribute

        def call(*arguments: Any) -> Any:
            devices = {a.device for a in arguments if isinstance(a, self.Array)}
            if devices:
                _launched("cuda", name, devices)
                if devices != {arguments[-1] - _STREAM}:
                    raise RuntimeError(f"CUDA kernel {name} is put on another device's stream")
            return attribute(*arguments)

        return call


def _interpret() -> None:
    """Triton's interpreter takes memory where it lies, where it would copy all of it and back."""
    import torch
    from support import interpreter_guard
    from triton.runtime.interpreter import GridExecutor

    interpreter_guard.install()
    interpreted = GridExecutor.__call__

    def tensors(arguments: tuple[Any, ...]) -> Iterator[tuple[int, torch.Tensor]]:
        return ((i, a) for i, a in enumerate(arguments) if isinstance(a, torch.Tensor))

    def host(x: Any) -> Any:
        return torch.ops.simulated_cuda.host_view(x) if isinstance(x, torch.Tensor) else x

    def call(executor: GridExecutor, *arguments: Any, **others: Any) -> None:
        given = (*arguments, *others.values())
        for i, x in tensors(given):
            if not x.is_cuda:
                raise ValueError(
                    f"Pointer argument (at {i}) cannot be accessed from Triton (cpu tensor?)"
                )
        devices = {x.get_device() for _, x in tensors(given)}
        _launched("triton", executor.fn.__name__, devices)
        interpreted(executor, *map(host, arguments), **{k: host(x) for k, x in others.items()})

    GridExecutor.__call__ = call
