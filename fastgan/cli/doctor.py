"""``fastgan doctor``."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from fastgan._version import __version__
from fastgan.cli import DONE
from fastgan.cli.parse import parse
from fastgan.errors import InputError, NotBuiltError

_PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "pillow",
    "safetensors",
    "tensorboard",
    "tyro",
    "h5py",
)


@dataclasses.dataclass(frozen=True)
class DoctorArgs:
    """Say what this machine can do, and why not the rest."""


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parse(DoctorArgs, "fastgan doctor", argv)

    import torch

    from fastgan.data.images import default_cache
    from fastgan.ops.backend import BACKENDS, resolve_backend, unsupported_reasons

    print(f"fastgan {__version__}, Python {platform.python_version()}, {sys.platform}")
    print(
        f"CPU: {_cpu_name()}, {os.cpu_count()} CPUs, torch uses {torch.get_num_threads()} threads"
    )
    print(f"     instruction set that torch uses: {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            print(f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        print(f"GPU: none that torch can use (torch is built with {build}); runs are on the CPU")
    print("packages:")
    for name in _PACKAGES:
        try:
            print(f"  {name:<12}{importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {name:<12}not installed")
    print("backends:")
    for name in BACKENDS:
        reasons = unsupported_reasons(name)
        print(f"  {name:<12}{'no: ' + '; '.join(reasons) if reasons else 'yes'}")
    try:
        print(f"  {'auto':<12}takes {resolve_backend('auto')}")
    except (InputError, NotBuiltError) as error:
        print(f"  {'auto':<12}{error}")
    print(f"image cache: {default_cache()}")
    return DONE


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
