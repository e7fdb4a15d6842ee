"""What the ops need of the Triton kernels: whether they can run here, and on which tensors.

``fastgan.kernels`` imports triton, so nothing of it is imported before an op needs it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from fastgan import gpu


def missing_reasons() -> list[str]:
    """Why the Triton kernels cannot run on this machine; an empty list means that they can."""
    reason = _missing_reason()
    return [reason] if reason else []


@torch.compiler.assume_constant_result
def _missing_reason() -> str:
    return _find()


@functools.cache
def _find() -> str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        first = (str(error).splitlines() or ["cannot be imported"])[0]
        return f"triton is not installed ({first}); pip install triton, which is made for Linux"
    if interpreted():
        return ""
    return gpu.missing_reason(
        "TRITON_INTERPRET=1 in the environment lets the kernels be interpreted on the CPU, slowly"
    )


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU; only where triton is installed."""
    return bool(kernels("common").INTERPRETED)


def version() -> str:
    """Of triton; only where it is installed."""
    return importlib.metadata.version("triton")


def kernels(op: str) -> Any:
    """The module ``fastgan.kernels.<op>``; only where triton is installed."""
    return importlib.import_module(f"fastgan.kernels.{op}")


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    """Why the kernels of ``op`` cannot take ``tensors``, where they can run at all."""
    return gpu.unsupported_reasons(op, interpreted(), *tensors)
