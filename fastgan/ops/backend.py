"""Which implementation runs an op.

``reference`` is plain torch on any device; ``cpp`` the C++ kernels for the CPU; ``cuda`` the CUDA
kernels and ``triton`` the Triton kernels for GPUs, the latter on the CPU too under Triton's
interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, get_args

import torch
from torch import Tensor

from fastgan import gpu
from fastgan.choices import Backend
from fastgan.errors import InputError, NotBuiltError
from fastgan.ops import cpp, cuda, triton, tuning
from fastgan.saying import say_once

BACKENDS: tuple[str, ...] = tuple(name for name in get_args(Backend) if name != "auto")
# Among what `auto` chooses by the device of the tensors, the likeliest first.
_KERNELS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
_MODULES: dict[str, Any] = {"cpp": cpp, "triton": triton, "cuda": cuda}

_current: ContextVar[str] = ContextVar("fastgan_backend", default="auto")


def machine_reasons(backend: str) -> list[str]:
    """Why ``backend`` cannot run on this machine at all; an empty list means that it can.

    Raises:
        InputError: ``backend`` is not one of ``BACKENDS``.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend: unknown {backend!r}; choose auto, {', '.join(BACKENDS)}")
    return [] if backend == "reference" else _MODULES[backend].missing_reasons()


def unsupported_reasons(op: str, backend: str, *tensors: Tensor | None) -> list[str]:
    """Why ``backend`` cannot run ``op`` on ``tensors``; an empty list means that it can.

    Args:
        op: ``conv``, ``bn_act``, ``gan_loss`` or ``augment``.
        backend: one of ``BACKENDS``.
        tensors: the arguments, as far as there are any.

    Raises:
        InputError: ``backend`` is not one of ``BACKENDS``.
    """
    reasons = machine_reasons(backend)
    if reasons or backend == "reference":
        return reasons
    given = [tensor for tensor in tensors if tensor is not None]
    if backend != "cpp":
        own: list[str] = _MODULES[backend].unsupported_reasons(op, *given)
        return own + _dtype_reasons(given, gpu.DTYPES, op)
    if op not in cpp.OPS:
        return [f"{op} has no C++ kernel; torch's is used"]
    devices = {tensor.device.type for tensor in given} - {"cpu"}
    if devices:
        reasons.append(f"a tensor is on {', '.join(sorted(devices))}, the kernels run on the CPU")
    reasons += _dtype_reasons(given, (torch.float32,), op)
    if any(tensor.numel() == 0 for tensor in given):
        reasons.append("a tensor is empty")
    return reasons


def _dtype_reasons(tensors: list[Tensor], dtypes: tuple[torch.dtype, ...], op: str) -> list[str]:
    if op == "augment":
        # It takes bytes and numbers of images, and the dtype that it makes is asked of the caller.
        return []
    found = {tensor.dtype for tensor in tensors}
    if wrong := found - set(dtypes):
        takes = ", ".join(map(_name, dtypes))
        return [f"a tensor is {', '.join(sorted(map(_name, wrong)))}, the kernels are {takes}"]
    if op == "conv" and len(found) > 1:
        return [f"the tensors are {' and '.join(sorted(map(_name, found)))}, and not of one dtype"]
    return []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def resolve_backend(requested: str = "auto") -> str:
    """``requested``, or what takes the place of ``auto``, once it is known to run here.

    ``auto`` yields to the environment variable ``FASTGAN_BACKEND`` where that is set; else it
    stays, and takes for each op and shape what measures fastest.

    Raises:
        InputError: the name is unknown.
        NotBuiltError: a backend was named that cannot run here; the message says why.
    """
    if requested == "auto":
        requested = os.environ.get("FASTGAN_BACKEND") or "auto"
    if requested == "auto":
        return requested
    reasons = machine_reasons(requested)
    if reasons:
        instead = _instead(requested, "use 'reference'")
        raise NotBuiltError(f"backend={requested!r}: {'; '.join(reasons)}; {instead}")
    return requested


def _instead(requested: str, mend: str) -> str:
    """``mend``, which the environment would undo where it has named the backend."""
    named = os.environ.get("FASTGAN_BACKEND") == requested
    return f"{mend}, and unset FASTGAN_BACKEND" if named else mend


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within this context the ops run on ``backend``, ``auto`` or one of ``BACKENDS``.

    Raises:
        InputError: the name is unknown.
        NotBuiltError: it cannot run here; the message says why.
    """
    token = _current.set(resolve_backend(backend))
    try:
        yield
    finally:
        _current.reset(token)


def requested_backend() -> str:
    """What the innermost :func:`use_backend` or ``FASTGAN_BACKEND`` asks for, or ``auto``."""
    current = _current.get()
    return resolve_backend("auto") if current == "auto" else current


def select_backend(op: str, *tensors: Tensor | None) -> str:
    """The backend that runs ``op`` on ``tensors``, or ``auto`` where several can.

    Of those :func:`fastest_backend` takes one.

    Raises:
        NotBuiltError: a backend was asked for by name that cannot; the message says why.
    """
    requested = requested_backend()
    if requested == "reference":
        return requested
    device = next((tensor.device.type for tensor in tensors if tensor is not None), "cpu")
    if requested == "auto":
        names = _fitting(op, device, *tensors)
        return "auto" if len(names) > 1 else next(iter(names), "reference")
    if requested == "cpp" and op not in cpp.OPS:
        return "reference"
    reasons = unsupported_reasons(op, requested, *tensors)
    if reasons:
        instead = _instead(requested, "use 'auto'")
        raise NotBuiltError(f"backend={requested!r}: {op}: {'; '.join(reasons)}; {instead}")
    return requested


def kernels_of(backend: str, device: torch.device) -> list[str]:
    """What ``backend`` stands for on ``device``: itself, or all kernels that ``auto`` has there."""
    if backend != "auto":
        return [backend]
    return [name for name in _KERNELS.get(device.type, ()) if not machine_reasons(name)]


def _fitting(op: str, device: str, *tensors: Tensor | None) -> list[str]:
    return [n for n in _KERNELS.get(device, ()) if not unsupported_reasons(op, n, *tensors)]


def fastest_backend(
    backend: str, op: str, key: str, run: Callable[[str], object], *tensors: Tensor | None
) -> str:
    """``backend``, or for ``auto`` that of those which can run ``op`` that measures fastest.

    Args:
        key: what the time depends on: the pass, the sizes.
        run: computes it on the backend of a name, without other effects.
        tensors: the arguments, at least one of them given.
    """
    if backend != "auto":
        return backend
    device = next(tensor.device for tensor in tensors if tensor is not None)
    names = _fitting(op, device.type, *tensors)
    ways: dict[str, Callable[[], object]] = {n: functools.partial(run, n) for n in names}
    return tuning.fastest(f"{op} {key}", ways, names, device)


def say_left_to_reference(what: str) -> None:
    """Log, once for each ``what``, that the backend asked for has no kernel for it."""
    say_once(f"backend={requested_backend()!r} has no kernel for {what}: torch's is used")


def say_missing_kernels(device: torch.device) -> None:
    """Log, once, why ``auto`` on ``device`` has no kernels of our own to choose from."""
    names = _KERNELS.get(device.type, ())
    reasons = [reason for name in names for reason in machine_reasons(name)]
    if names and not kernels_of("auto", device):
        say_once(f"plain PyTorch runs the step: {'; '.join(reasons)}")
