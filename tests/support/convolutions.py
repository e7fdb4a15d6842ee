"""Convolutions to test, by their sizes, and what torch computes of them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from support.numerics import laid_out
from torch import Tensor
from torch.nn.grad import conv2d_weight

DIRECTIONS = ("fprop", "dgrad", "wgrad")


class Sizes(NamedTuple):
    """A convolution by its low side; the high side of a 4x4 stride-2 one is 2h x 2w.

    ``over`` is how many more rows and columns the high side has, that the stride leaves over.
    """

    n: int
    cl: int
    h: int
    w: int
    ch: int
    kernel: tuple[int, int] = (4, 4)
    stride: int = 2
    padding: int = 1
    over: tuple[int, int] = (0, 0)

    @property
    def low(self) -> tuple[int, int, int, int]:
        return self.n, self.cl, self.h, self.w

    @property
    def high(self) -> tuple[int, int, int, int]:
        h, w = (
            (side - 1) * self.stride - 2 * self.padding + kernel + over
            for side, kernel, over in zip((self.h, self.w), self.kernel, self.over, strict=True)
        )
        return self.n, self.ch, h, w

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return self.cl, self.ch, *self.kernel


def projection(n: int, cl: int, ch: int, kernel: tuple[int, int]) -> Sizes:
    """The first layer of a generator, or the last of a discriminator."""
    return Sizes(n, cl, 1, 1, ch, kernel, 1, 0)


def ids(sizes: Sizes) -> str:
    name = f"n{sizes.n}-low{sizes.cl}x{sizes.h}x{sizes.w}-high{sizes.ch}"
    if (sizes.padding, sizes.stride) not in ((1, 2), (0, 1)) or any(sizes.over):
        (kh, kw), (y, x) = sizes.kernel, sizes.over
        name += f"-{kh}x{kw}s{sizes.stride}p{sizes.padding}+{y}+{x}"
    return name


@functools.lru_cache(maxsize=1)
def operands(sizes: Sizes, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides and the weight, in NHWC."""
    draw = torch.Generator().manual_seed(0)
    low, high, weight = (
        laid_out(torch.randn(shape, generator=draw), "nhwc").to(dtype)
        for shape in (sizes.low, sizes.high, sizes.weight)
    )
    return low, high, weight


def torchs(direction: str, sizes: Sizes, low: Tensor, high: Tensor, weight: Tensor) -> Tensor:
    step = {"stride": sizes.stride, "padding": sizes.padding}
    if direction == "fprop":
        return F.conv2d(high, weight, **step)
    if direction == "dgrad":
        return F.conv_transpose2d(low, weight, **step, output_padding=sizes.over)
    return conv2d_weight(high, list(sizes.weight), low, **step)


@functools.lru_cache(maxsize=3)
def truth(
    direction: str, sizes: Sizes, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The result in float64, and torch's in ``dtype``."""
    tensors = operands(sizes, dtype)
    want = torchs(direction, sizes, *(x.double() for x in tensors))
    return want, torchs(direction, sizes, *tensors)
