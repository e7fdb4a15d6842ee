"""Runs Triton kernels on CPU tensors, through the PTX that Triton emits for a GPU.

``kernel[grid](...)`` takes Triton's own path: it binds and specialises the arguments, picks
configurations, and compiles. Only the launch is another, which hands the PTX to
:mod:`support.ptx`. An interpreting process (``TRITON_INTERPRET``) cannot do it, as its kernels are
never compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
from support.ptx import WarpOrder
from support.ptx_launches import GRID_LIMITS, SHARED_BYTES, Launch, Runner
from support.ptx_memory import PtxError, Region
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources


@contextlib.contextmanager
def running_ptx(
    *,
    warp_order: WarpOrder = "ascending",
    edit_ptx: Callable[[str], str] | None = None,
    arch: int = 80,
) -> Iterator[list[Launch]]:
    """Within this context kernels run on CPU tensors; yields the list of their launches.

    Args:
        warp_order: in which the warps of a block run from one barrier to the next.
        edit_ptx: changes the text before it runs, to see what a fault in it does.
        arch: what the kernels are compiled for: 80, 86 or 89.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    runner = _Runner(arch, warp_order, edit_ptx)
    config = triton.runtime.driver
    before = config._active, CompiledKernel._init_handles
    config.set_active(_Driver(arch))
    # Compiled kernels outlive the context, in the caches of the kernels: they ask for the runner
    # at each launch.
    CompiledKernel._init_handles = _init_handles
    _runners.append(runner)
    try:
        yield runner.launches
    finally:
        _runners.remove(runner)
        config._active, CompiledKernel._init_handles = before


_runners: list[_Runner] = []


def _init_handles(compiled: CompiledKernel) -> None:
    def run(grid_x: int, grid_y: int, grid_z: int, *rest: Any) -> None:
        # Stream, function, metadata, launch metadata and two hooks come before the arguments.
        _runners[-1].launch(compiled, (grid_x, grid_y, grid_z), rest[6:])

    compiled.function = object()
    compiled.n_regs = compiled.n_spills = 0
    compiled.n_max_threads = 1024
    compiled._run = run


class _Driver:
    """As much of a Triton driver as choosing and compiling a kernel asks for."""

    def __init__(self, arch: int):
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        """Kernels are kept by device, and compiled for an architecture."""
        return self._arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """For the autotuner: runs each configuration once, and finds all equally fast."""

        def bench(
            call: Callable[[], object], quantiles: list[float] | None = None, **_: Any
        ) -> list[float]:
            call()
            return [1.0] * len(quantiles or [1])

        return bench

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


class _Runner(Runner):
    """Launches compiled kernels in one way."""

    def __init__(self, arch: int, warp_order: WarpOrder, edit_ptx: Callable[[str], str] | None):
        super().__init__(warp_order, edit_ptx)
        self._shared_bytes = SHARED_BYTES[arch]

    def launch(
        self, compiled: CompiledKernel, grid: tuple[int, int, int], arguments: tuple[Any, ...]
    ) -> None:
        metadata = compiled.metadata
        if any(not 0 <= n <= limit for n, limit in zip(grid, GRID_LIMITS, strict=True)):
            raise PtxError(f"a grid of {grid} is more than {GRID_LIMITS}, or negative")
        if metadata.shared > self._shared_bytes:
            raise OutOfResources(metadata.shared, self._shared_bytes, "shared memory")
        if metadata.num_ctas != 1 or metadata.global_scratch_size:
            raise PtxError("clusters and scratch memory are unknown")
        numbers, buffers = _passed(tuple(compiled.src.signature.values()), arguments)
        ptx = compiled.asm["ptx"]
        # Two more parameters point to scratch memory that is not asked for.
        numbers += [0] * (len(self.kernel(ptx)[1].parameters) - len(numbers))
        self.run(
            metadata.name,
            ptx,
            grid,
            (32 * metadata.num_warps, 1, 1),
            numbers,
            list(buffers.values()),
            shared=metadata.shared,
        )


def _passed(
    signature: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[list[int | float], dict[int, Region]]:
    """What the kernel is passed, and by address the storages that its pointers point into."""
    numbers: list[int | float] = []
    buffers: dict[int, Region] = {}
    for type_name, value in zip(signature, arguments, strict=True):
        if isinstance(type_name, tuple):
            inner, more = _passed(type_name, tuple(value))
            numbers += inner
            buffers.update(more)
        elif type_name.startswith("*"):
            numbers.append(value.data_ptr())
            region = _storage(getattr(value, "base", value))
            buffers[region.base] = region
        elif type_name in ("fp16", "bf16"):
            dtype = torch.float16 if type_name == "fp16" else torch.bfloat16
            numbers.append(torch.tensor(value, dtype=dtype).view(torch.int16).item())
        elif type_name in ("fp32", "f32", "fp64"):
            numbers.append(float(value))
        elif type_name[0] in "iu":
            numbers.append(int(value))
        elif type_name != "constexpr":
            raise PtxError(f"arguments of type {type_name} are unknown")
    return numbers, buffers


def _storage(tensor: torch.Tensor) -> Region:
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    data = (ctypes.c_uint8 * size).from_address(storage.data_ptr())
    return Region(storage.data_ptr(), np.frombuffer(data, np.uint8))
