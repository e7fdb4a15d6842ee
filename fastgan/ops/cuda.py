"""What the ops need of the CUDA kernels: finding the extension, handing tensors to it.

The functions of ``fastgan._cuda`` take descriptions of memory, which they check, and the stream
that their kernels go to. Outputs are the caller's.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from fastgan import gpu

# The widest access of a kernel.
_ALIGNMENT = 16


class _Found(NamedTuple):
    """The extension, or None and why it cannot run here; its tests run it ``on_host``."""

    extension: Any
    reason: str
    on_host: bool = False


def find() -> _Found:
    """Look for the extension and a GPU."""
    try:
        extension = importlib.import_module("fastgan._cuda")
    except ImportError as error:
        first = (str(error).splitlines() or ["cannot be imported"])[0]
        return _Found(
            None,
            f"the CUDA kernels are not installed ({first}); install fastgan from its source with "
            "FASTGAN_BUILD=cuda where there is nvcc",
        )
    if torch.version.hip is not None:
        return _Found(None, "the CUDA kernels are for NVIDIA's GPUs, and torch is built for AMD's")
    return _Found(extension, gpu.missing_reason())


_find = functools.cache(find)


def missing_reasons() -> list[str]:
    """Why the CUDA kernels cannot run on this machine; an empty list means that they can."""
    reason = _missing_reason()
    return [reason] if reason else []


@torch.compiler.assume_constant_result
def _missing_reason() -> str:
    return _find().reason


@torch.compiler.assume_constant_result
def on_host() -> bool:
    """Whether the kernels run on the CPU, compiled for it by their tests."""
    return _find().on_host


def kernels() -> Any:
    """The module ``fastgan._cuda``; only where :func:`missing_reasons` has none."""
    return _find().extension


def launch(name: str, *arguments: Any) -> None:
    """Calls ``name`` of the extension on the current stream of the first tensor's device.

    Tensors are handed over as descriptions of their memory, everything else as it is.

    Raises:
        ValueError: an argument does not fit; the message names it and the mend.
        RuntimeError: the launch failed.
    """
    first = next(x for x in arguments if isinstance(x, Tensor))
    stream = torch.cuda.current_stream(first.device).cuda_stream if first.is_cuda else 0
    given = (_described(x) if isinstance(x, Tensor) else x for x in arguments)
    with torch.cuda.device_of(first):
        getattr(kernels(), name)(*given, stream)


def dtype_name(x: Tensor) -> str:
    """As the extension knows it."""
    return str(x.dtype).removeprefix("torch.")


def _described(x: Tensor) -> Any:
    return kernels().Array(x.data_ptr(), dtype_name(x), x.device.index or 0, x.shape, x.stride())


@overload
def aligned(x: Tensor) -> Tensor: ...
@overload
def aligned(x: Tensor | None) -> Tensor | None: ...
def aligned(x: Tensor | None) -> Tensor | None:
    """``x``, or a copy where it does not begin at a multiple of 16 bytes, as a view may not."""
    return x if x is None or x.data_ptr() % _ALIGNMENT == 0 else x.clone()


@torch.compiler.assume_constant_result
def _most_row_bytes() -> int:
    """Of an image that ``augment`` takes."""
    return int(kernels().MOST_ROW_BYTES)


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    """Why the kernels of ``op`` cannot take ``tensors``, where they can run at all."""
    reasons = gpu.unsupported_reasons(op, on_host(), *tensors)
    if op == "augment" and tensors and tensors[0].ndim == 4:
        row, most = tensors[0].shape[2] * tensors[0].shape[3], _most_row_bytes()
        if row > most:
            reasons.append(f"a row of an image has {row} bytes, the kernel takes {most}")
    return reasons
