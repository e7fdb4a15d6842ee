"""The machine that figures were taken on, and the two rates that bound what it can do."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastgan._version import __version__
from fastgan.machine import cpu_name
from fastgan.ops import cpp

_COPY_BYTES = 256 * 10**6
_AT_LEAST_S = 0.3


def prepare(device: torch.device) -> None:
    """As the example's own script: let cuDNN try its kernels and keep the fastest."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True


@contextlib.contextmanager
def fp32_precision(convolutions: str) -> Iterator[None]:
    """Within this context convolutions of float32 multiply so: ``tf32`` or ``ieee``."""
    settings: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = convolutions
    try:
        yield
    finally:
        settings.fp32_precision = before


def describe(device: torch.device) -> dict[str, Any]:
    """What has to be the same for figures to be compared: processor, threads, versions."""
    return {
        "cpu": cpu_name(),
        "cpus": _cpus(),
        "threads": torch.get_num_threads(),
        "kernels": "none" if cpp.missing_reasons() else cpp.kernels().isa(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "fastgan": __version__,
        **({} if device.type == "cpu" else _accelerator()),
    }


def _accelerator() -> dict[str, Any]:
    """What the float32 of a GPU is, and how cuDNN picks its kernels: the same for every variant."""
    return {
        # Where a GPU has TF32, PyTorch's convolutions take it unless told otherwise.
        "fp32_precision": {
            "convolutions": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
            "matrix products": torch.backends.cuda.matmul.fp32_precision,
        },
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def measure(device: torch.device) -> dict[str, Any]:
    """The float32 peak and the bandwidth of ``device``, with the threads that torch has now.

    Returns:
        ``sgemm_gflop_s``, the fastest of several square ``torch.mm``; ``sgemm_by_size``, of each;
        ``copy_gb_s``, the median of large ``copy_``, bytes read and written; ``load``, the load
        average of the minute before, None where the system has none.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    sizes = (512, 1024, 2048) if device.type == "cpu" else (2048, 4096, 8192)
    by_size = {n: 2 * n**3 / 1e9 / min(_seconds_of_mm(n, device)) for n in sizes}
    source = torch.zeros(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(_seconds(lambda: target.copy_(source), device))
    return {
        "sgemm_gflop_s": max(by_size.values()),
        "sgemm_by_size": {str(n): rate for n, rate in by_size.items()},
        "copy_gb_s": 2 * _COPY_BYTES / 1e9 / seconds,
        "load": load,
    }


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Within this context nothing is collected, so that no turn pays for what others left."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # those that this process may use; not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _seconds_of_mm(n: int, device: torch.device) -> list[float]:
    a, b = torch.randn(2, n, n, device=device)
    out = torch.empty_like(a)
    return _seconds(lambda: torch.mm(a, b, out=out), device)


def _seconds(call: Callable[[], object], device: torch.device) -> list[float]:
    """How long ``call`` takes, several times over, after a first time that does not count."""
    call()
    synchronize(device)
    taken: list[float] = []
    while len(taken) < 5 or sum(taken) < _AT_LEAST_S:
        started = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return taken
