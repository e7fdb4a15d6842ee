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

OPS = ("conv", "bn_act", "gan_loss", "augment")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the oldest GPUs that have asynchronous copies, bf16 and TF32.
_LEAST_CAPABILITY = (8, 0)
# The kernels count elements in int32.
_MOST_ELEMENTS = 2**31 - 1


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
    if not torch.cuda.is_available():
        return (
            "torch sees no GPU; TRITON_INTERPRET=1 in the environment lets the kernels be "
            "interpreted on the CPU, slowly"
        )
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        has, needs = (".".join(map(str, pair)) for pair in (capability, _LEAST_CAPABILITY))
        return f"the GPU has compute capability {has}, the kernels need {needs} or later"
    return ""


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


def empty(like: Tensor, *shape: int) -> Tensor:
    """A contiguous float32 tensor where ``like`` is, uninitialised."""
    return kernels("common").empty(like, shape)


def empty_images(like: Tensor, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
    """``[n, c, h, w]`` in ``torch.channels_last``, uninitialised, of the kind of ``like``."""
    return kernels("common").empty_images(like, *sizes, dtype or like.dtype)


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    """Why the kernels of ``op`` cannot take ``tensors``, where they can run at all."""
    reasons = []
    here = {"cpu", "cuda"} if interpreted() else {"cuda"}
    if devices := {tensor.device.type for tensor in tensors} - here:
        reasons.append(f"a tensor is on {', '.join(sorted(devices))}, the kernels run on a GPU")
    if any(tensor.numel() == 0 for tensor in tensors):
        reasons.append("a tensor is empty")
    # A set of images may have more: there the kernel counts images apart.
    if op != "augment" and any(tensor.numel() > _MOST_ELEMENTS for tensor in tensors):
        reasons.append(f"a tensor has more than {_MOST_ELEMENTS} elements")
    return reasons
