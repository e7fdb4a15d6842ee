"""What the C++ ops have in common: finding the extension, handing tensors to it, its memory.

The functions of ``fastgan._cpu`` take addresses of dense float32 NHWC memory. Outputs come from the
extension's own pool: blocks are kept from step to step, and a block goes back when the last tensor
on it is gone.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from typing import Any

import torch
from torch import Tensor

from fastgan.errors import InputError

OPS = ("conv", "bn_act", "gan_loss")
ACTIVATION_CODES = {"none": 0, "relu": 1, "leaky_relu": 2, "tanh": 3}


@functools.cache
def _load() -> tuple[Any, str]:
    """The extension, or None and why it is missing."""
    try:
        extension = importlib.import_module("fastgan._cpu")
    except ImportError as error:
        reason = (str(error).splitlines() or ["cannot be imported"])[0]
        return None, (
            f"the C++ kernels are not installed ({reason}); install fastgan where there is a C++ "
            "compiler"
        )
    isa = os.environ.get("FASTGAN_CPU_ISA")
    if isa:
        try:
            extension.use_isa(isa)
        except ValueError as error:
            raise InputError(
                f"FASTGAN_CPU_ISA={isa!r}: this CPU runs {', '.join(extension.isas())}"
            ) from error
    return extension, ""


def missing_reasons() -> list[str]:
    """Why there are no C++ kernels on this machine; an empty list means that there are.

    Raises:
        InputError: ``FASTGAN_CPU_ISA`` names an instruction set that this CPU has not.
    """
    reason = _missing_reason()
    return [reason] if reason else []


@torch.compiler.assume_constant_result
def _missing_reason() -> str:
    return _load()[1]


def kernels() -> Any:
    """The module ``fastgan._cpu``; only where :func:`missing_reasons` has none."""
    return _load()[0]


def empty(*shape: int) -> Tensor:
    """A float32 tensor of the pool, uninitialised and contiguous."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return _empty(shape, tuple(reversed(strides)))


def empty_images(n: int, c: int, h: int, w: int) -> Tensor:
    """A tensor ``[n, c, h, w]`` of the pool in ``torch.channels_last``."""
    return _empty((n, c, h, w), _image_strides(c, h, w))


def fake_images(
    x: Tensor, n: int, c: int, h: int, w: int, dtype: torch.dtype | None = None
) -> Tensor:
    """What :func:`empty_images` returns, of the kind of ``x``: for an op's fake."""
    return x.new_empty_strided((n, c, h, w), _image_strides(c, h, w), dtype=dtype)


def _image_strides(c: int, h: int, w: int) -> tuple[int, int, int, int]:
    return h * w * c, 1, w * c, c


def _empty(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    if count == 0:
        return torch.empty_strided(shape, strides)
    block = torch.frombuffer(kernels().Block(4 * count), dtype=torch.float32, count=count)
    # Not a view of the block: what an op returns may be changed in place.
    return torch.empty(0).set_(block.untyped_storage(), 0, shape, strides)


def dense(x: Tensor) -> Tensor:
    """``x [N, C, H, W]`` with its memory in the order N, H, W, C; a copy only where it is not."""
    return x.contiguous(memory_format=torch.channels_last)


def contiguous(x: Tensor | None) -> Tensor | None:
    """``x`` with its elements next to one another; a copy only where they are not."""
    return None if x is None else x.contiguous()


def address(x: Tensor | None) -> int:
    """Where the elements of ``x`` begin; 0 for None."""
    return 0 if x is None else x.data_ptr()
