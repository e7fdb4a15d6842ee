"""Gather, flip and scale uint8 images, NHWC to NHWC."""

from __future__ import annotations

import triton
import triton.language as tl
from fastgan.kernels import common
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _augment_fwd_kernel(images_ptr, index_ptr, flip_ptr, out_ptr, size, w, c, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    image = i.to(tl.int64)
    if index_ptr is not None:
        image = tl.load(index_ptr + i)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = at
    if flip_ptr is not None:
        # The same place in the row, counted from its end: w·c - c - x·c + channel.
        x = at // c % w
        source = tl.where(tl.load(flip_ptr + i) != 0, at + (w - 1 - 2 * x) * c, at)
    byte = tl.load(images_ptr + image * size + source, mask=at < size, other=0)
    y = byte.to(tl.float32) / 127.5 - 1.0
    tl.store(out_ptr + i.to(tl.int64) * size + at, y.to(out_ptr.dtype.element_ty), mask=at < size)


@common.launcher
def augment_forward(images: Tensor, index: Tensor | None, flip: Tensor | None, out: Tensor) -> None:
    """``out``, dense NHWC, from ``images [M, H, W, C]`` uint8, contiguous."""
    _, h, w, c = images.shape
    size = h * w * c
    _augment_fwd_kernel[(len(out), triton.cdiv(size, _BLOCK))](
        images, index, flip, out, size, w, c, BLOCK=_BLOCK
    )
