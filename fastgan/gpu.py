"""What the kernels for GPUs, Triton's and CUDA's, have in common: what they ask for, and memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

OPS = ("conv", "bn_act", "gan_loss", "augment")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the oldest GPUs that have asynchronous copies, bf16 and TF32.
_LEAST_CAPABILITY = (8, 0)
# The kernels count elements in int32.
_MOST_ELEMENTS = 2**31 - 1


def missing_reason(instead: str = "") -> str:
    """Why no GPU here can run the kernels, or an empty text; ``instead`` is what may be done."""
    if not torch.cuda.is_available():
        return "torch sees no GPU" + (f"; {instead}" if instead else "")
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        has, needs = (".".join(map(str, pair)) for pair in (capability, _LEAST_CAPABILITY))
        return f"the GPU has compute capability {has}, the kernels need {needs} or later"
    return ""


def multiprocessors(device: torch.device) -> int:
    """How many of them ``device`` has; 1 where the kernels are not run by a GPU."""
    return _multiprocessors(device) if device.type == "cuda" else 1


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def tf32() -> bool:
    """Whether torch lets its own convolutions round float32 to TF32."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(convolutions.fp32_precision == "tf32")


def unsupported_reasons(op: str, on_cpu: bool, *tensors: Tensor) -> list[str]:
    """Why the kernels of ``op``, which may run ``on_cpu``, cannot take ``tensors``."""
    reasons = []
    here = {"cpu", "cuda"} if on_cpu else {"cuda"}
    if devices := {tensor.device.type for tensor in tensors} - here:
        reasons.append(f"a tensor is on {', '.join(sorted(devices))}, the kernels run on a GPU")
    if any(tensor.numel() == 0 for tensor in tensors):
        reasons.append("a tensor is empty")
    # A set of images may have more: there the kernel counts images apart.
    if op != "augment" and any(tensor.numel() > _MOST_ELEMENTS for tensor in tensors):
        reasons.append(f"a tensor has more than {_MOST_ELEMENTS} elements")
    return reasons


def empty(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised contiguous float32 tensor where ``like`` is."""
    return _empty(shape, torch.float32, like.device, torch.contiguous_format)


def empty_images(like: Tensor, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
    """``[n, c, h, w]`` in ``torch.channels_last``, uninitialised, of the kind of ``like``."""
    return _empty(sizes, dtype or like.dtype, like.device, torch.channels_last)


def _empty(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: torch.memory_format
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
