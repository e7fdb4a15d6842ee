"""Runs the CUDA kernels of a library on NumPy arrays, through the PTX in the library.

The host code of the library runs: it chooses kernels and grids, and launches. What takes the launch
is not the CUDA runtime but ``benchmarks/cuda_runtime_stand_in.c``, which has its limits and errors
and hands the launch to :mod:`support.ptx`. The runtime must not be loaded, so no torch built for
CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fastgan.benchmarks.cuda_build import LaunchHandler, short_name
from support.cuda_build import build_stand_in, ptx_of, runtime_name
from support.ptx import WarpOrder
from support.ptx_launches import SHARED_BYTES, Launch, Runner
from support.ptx_memory import PtxError, Region
from support.ptx_text import TYPES, Parameter, split

LAUNCH_FAILURE = 719


class Device(NamedTuple):
    """What the host code is told of the device.

    Attributes:
        capability: 80 for 8.0; the PTX is that of 8.0 all the same.
        multiprocessors: how many.
    """

    capability: int
    multiprocessors: int


A100 = Device(80, 108)
H100 = Device(90, 132)


class Running:
    """A library whose kernels run here.

    Attributes:
        library: its functions, of Python or of C. An error in a kernel is raised from the call.
        launches: of all its kernels.
    """

    def __init__(self, path: Path, runner: Runner, execute: bool):
        self.library = _Calls(self, _load(path))
        self.launches: list[Launch] = runner.launches
        self._ptx = ptx_of(path)
        self._runner = runner
        self._execute = execute
        self._buffers: dict[tuple[int, int], tuple[Region, np.ndarray]] = {}
        self._error: BaseException | None = None

    def give(self, *arrays: np.ndarray) -> None:
        """Lets kernels read ``arrays``, and write to those that NumPy may write to."""
        for array in (a for a in arrays if a.size):
            region = _memory(array)
            # The array with it, so that the memory is not another's before the end.
            self._buffers[region.base, region.end] = region, array

    def array(self, array: np.ndarray, dtype: str | None = None) -> Any:
        """``array`` as ``fastgan._cuda`` takes it, which may use it.

        Its shape and strides are as NumPy says; ``dtype`` is for bfloat16, of which NumPy has the
        bits only, as uint16.
        """
        self.give(array)
        strides = [stride // array.itemsize for stride in array.strides]
        name = dtype or str(array.dtype)
        return self.library.Array(array.ctypes.data, name, 0, list(array.shape), strides)

    def fail_next_launch(self, error: int) -> None:
        """The next launch returns this error of the CUDA runtime, and runs nothing."""
        _stand_in().stand_in_fail_next_launch(error)

    def take_error(self) -> BaseException | None:
        """What went wrong in a kernel, once."""
        error, self._error = self._error, None
        return error

    def launch(
        self, name: bytes, grid: Any, block: Any, shared: int, stream: int | None, arguments: Any
    ) -> int:
        """As the stand-in calls it; returns an error code."""
        try:
            self._launch(
                name.decode(), tuple(grid[:3]), tuple(block[:3]), shared, stream, arguments
            )
        except BaseException as error:
            self._error = self._error or error
            return LAUNCH_FAILURE
        return 0

    def _launch(
        self,
        symbol: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        stream: int | None,
        addresses: Any,
    ) -> None:
        if symbol not in self._ptx:
            raise PtxError(f"the library has no PTX of {symbol}")
        ptx = self._ptx[symbol]
        _, kernel = self._runner.kernel(ptx)
        arguments = [_argument(p, addresses[i]) for i, p in enumerate(kernel.parameters)]
        buffers = [region for region, _ in self._buffers.values()] if self._execute else None
        self._runner.run(
            short_name(symbol),
            *(ptx, grid, block, arguments, buffers),
            shared=shared,
            stream=stream or 0,
        )


@contextlib.contextmanager
def running_cuda(
    library: Path,
    *,
    warp_order: WarpOrder = "ascending",
    edit_ptx: Callable[[str], str] | None = None,
    execute: bool = True,
    device: Device = A100,
    count_conflicts: bool = False,
) -> Iterator[Running]:
    """Within this context the kernels of ``library`` run on the arrays that it is given.

    Args:
        library: of Python or of C, linked with ``-cudart shared`` and with PTX for 8.0 in it.
        warp_order: in which the warps of a block run from one barrier to the next.
        edit_ptx: changes the text of each kernel before it runs, to see what a fault in it does.
        execute: False only lists the launches, whatever addresses they are given.
        device: what the host code is told.
        count_conflicts: lists in ``shared_accesses`` of each launch what its accesses to shared
            memory took.
    """
    running = Running(library, Runner(warp_order, edit_ptx, count_conflicts), execute)
    stand_in = _stand_in()
    stand_in.stand_in_device(*device, SHARED_BYTES[device.capability])
    handler = LaunchHandler(running.launch)
    stand_in.stand_in_on_launch(handler)
    try:
        yield running
    finally:
        stand_in.stand_in_on_launch(LaunchHandler())
        stand_in.stand_in_fail_next_launch(0)
        stand_in.cudaGetLastError()


class _Calls:
    """The functions of a library, which raise what goes wrong in the kernels that they launch."""

    def __init__(self, running: Running, library: Any):
        self._running = running
        self._library = library

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._library, name)
        if not callable(found) or isinstance(found, type):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return found(*args, **kwargs)
            finally:
                error = self._running.take_error()
                if error is not None:
                    raise error

        return call


def in_kernel(name: str, edit: Callable[[str], str]) -> Callable[[str], str]:
    """``edit`` of the kernels with that short name only, with template arguments or without."""

    def chosen(ptx: str) -> str:
        (symbol,) = split(ptx)
        short = short_name(symbol)
        return edit(ptx) if name in (short, short.partition("<")[0]) else ptx

    return chosen


@functools.cache
def _stand_in() -> ctypes.CDLL:
    with contextlib.suppress(OSError):
        ctypes.CDLL(runtime_name(), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        raise RuntimeError(
            f"{runtime_name()} is loaded already, by torch most likely: this needs another process"
        )
    stand_in = ctypes.CDLL(str(build_stand_in()), mode=ctypes.RTLD_GLOBAL)
    stand_in.stand_in_on_launch.argtypes = [LaunchHandler]
    return stand_in


@functools.cache
def _load(path: Path) -> Any:
    """A Python module, or else a library of C functions."""
    _stand_in()
    library = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    name = path.name.split(".")[0]
    if not hasattr(library, f"PyInit_{name}"):
        return library
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _memory(array: np.ndarray) -> Region:
    """All bytes from the first element of an array to its last."""
    first = last = array.ctypes.data
    for size, stride in zip(array.shape, array.strides, strict=True):
        first += min(stride * (size - 1), 0)
        last += max(stride * (size - 1), 0)
    size = last + array.itemsize - first
    data = np.frombuffer((ctypes.c_uint8 * size).from_address(first), np.uint8)
    data.flags.writeable = array.flags.writeable
    return Region(first, data)


def _argument(parameter: Parameter, address: int) -> int | float | bytes:
    """A number, or the bytes of a struct."""
    packed = ctypes.string_at(address, parameter.size)
    dtype = TYPES[parameter.type]
    if parameter.size != dtype.itemsize:
        return packed
    return np.frombuffer(packed, dtype)[0].item()
