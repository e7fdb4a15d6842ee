"""``fastgan doctor``."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable

from fastgan._version import __version__
from fastgan.cli import DONE
from fastgan.cli.parse import parse
from fastgan.errors import InputError, NotBuiltError
from fastgan.machine import cache_folder, cpu_name

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
_CONV = """\
  conv has C++ kernels for
    4x4, stride 2, padding 1, one side twice the other: Winograd with tiles of 4 and 2, and of 3
      where the low side is a multiple of 3; direct where the high side has up to 4 channels
    a side of 1x1, no padding: a matrix product
  and leaves other shapes to torch"""


@dataclasses.dataclass(frozen=True)
class DoctorArgs:
    """Say what this machine can do, and why not the rest."""


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parse(DoctorArgs, "fastgan doctor", argv)

    import torch

    print(f"fastgan {__version__}, Python {platform.python_version()}, {sys.platform}")
    print(f"CPU: {cpu_name()}, {os.cpu_count()} CPUs, torch uses {torch.get_num_threads()} threads")
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
    _print_backends()
    _print_kernels()
    _print_step()
    print(f"cache: {cache_folder()}")
    return DONE


def _print_backends() -> None:
    from fastgan.gpu import OPS
    from fastgan.ops.backend import BACKENDS, machine_reasons, resolve_backend, unsupported_reasons

    print("backends:")
    for name in BACKENDS:
        reasons = _or_complaint(machine_reasons, name)
        print(f"  {name:<12}{'no: ' + '; '.join(reasons) if reasons else 'yes'}")
    try:
        auto = resolve_backend("auto")
    except (InputError, NotBuiltError) as error:
        print(f"  {'auto':<12}no: {error}")
    else:
        measured = "for each op and shape, what measures fastest at the first step"
        print(f"  {'auto':<12}{measured if auto == 'auto' else f'{auto}, by FASTGAN_BACKEND'}")

    print(f"{'ops:':<12}{''.join(f'{name:<12}' for name in BACKENDS)}".rstrip())
    notes = []
    for op in OPS:
        row = f"  {op:<10}"
        for name in BACKENDS:
            reasons = _or_complaint(unsupported_reasons, op, name)
            row += f"{'no' if reasons else 'yes':<12}"
            # What a backend lacks altogether is said above.
            if reasons and reasons != _or_complaint(machine_reasons, name):
                notes.append(f"  {name}: {'; '.join(reasons)}")
        print(row.rstrip())
    for note in notes:
        print(note)


def _print_kernels() -> None:
    from fastgan.ops import cpp, cuda, triton, tuning

    if not cuda.missing_reasons():
        where = "compiled for the CPU" if cuda.on_host() else f"in {cuda.kernels().__file__}"
        print(f"CUDA kernels: {where}; convolutions of any size, kernels to 16x16")
    if not triton.missing_reasons():
        where = "interpreted on the CPU" if triton.interpreted() else "compiled when first used"
        print(f"Triton kernels: {where}; convolutions of any size")
    if _or_complaint(cpp.missing_reasons):
        return
    kernels = cpp.kernels()
    used = kernels.isa()
    others = ", ".join(name for name in kernels.isas() if name != used)
    print(f"C++ kernels: for {used}" + (f"; FASTGAN_CPU_ISA can name {others}" if others else ""))
    print(_CONV)
    path = tuning.tuning_file()
    print(f"  measured choices: {len(tuning._read(path))} in {path}")


def _print_step() -> None:
    from typing import get_args

    from fastgan import choices
    from fastgan.engine.capture import uncapturable_reason
    from fastgan.engine.engine import resolve_device
    from fastgan.engine.precision import remark, unsupported_reason

    device = resolve_device("auto")
    print(f"step on {device}:")
    reason = uncapturable_reason(device)
    print(f"  {'captured':<12}{f'no: {reason}' if reason else 'yes, in CUDA graphs'}")
    for name in get_args(choices.Precision):
        reason, said = unsupported_reason(name, device), remark(name, device)
        print(f"  {name:<12}{f'no: {reason}' if reason else f'yes; {said}' if said else 'yes'}")


def _or_complaint(reasons: Callable[..., list[str]], *args: str) -> list[str]:
    """What ``reasons`` returns, or what it says of an environment variable with a wrong value."""
    try:
        return reasons(*args)
    except InputError as error:
        return [str(error)]
