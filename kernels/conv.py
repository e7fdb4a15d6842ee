"""The three convolutions as implicit matrix products on NHWC tensors.

    fprop:  rows are the pixels of L, columns the channels of L, and the sum runs over the taps of
            the weight and the channels of H, which is gathered as it is read.
    dgrad:  the pixels of H fall into ``stride²`` classes by their place between the strides, and
            each class meets only its own taps: for 4x4 with stride 2, four products with 2x2 taps
            each and no multiplication by an inserted zero.
    wgrad:  rows are the channels of L, columns the taps and channels of H, and the sum runs over
            the pixels of L. It is cut into parts that are added up in order by a second kernel.

Where a side is thin, a tile of 64 channels would be padding. A thin H gives fprop and wgrad tiles
over taps and channels together, and dgrad columns that hold all classes of a pixel, over the
neighbourhood that they share. A low side of 1x1 without padding is a plain product, of which each
tap is so many more channels of H; with few channels of L it is one dot product an output.

All take the operation in fp32, bf16 or fp16 and accumulate in fp32. Reductions go by fixed parts in
a fixed order.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastgan.kernels import common
from torch import Tensor

from fastgan import gpu

# Channels of H below this make a side thin: shorter than a 16-byte load of 16-bit numbers, twice.
_THIN = 16
# Up to as many columns hold all classes of a pixel in dgrad.
_THIN_COLUMNS = 32
_FEW_OUTPUTS = 4
_DOT_BLOCK = 1024
_GROUP_M = 8
# Channels that are a multiple of this allow the widest loads.
_ALIGNED = 16
# Rows of a matrix product from which its tiles are large.
_MANY_ROWS = 32768
# Tiles of wgrad are split until there are as many programs for each multiprocessor.
_WAVES = 2
_SUM_BLOCK = 2048
# A 16-byte load of 16-bit numbers for each thread of four wide warps.
_ACT_BLOCK = 2048


class Tile(NamedTuple):
    """A configuration: the sides of a tile of the product, and how it is run."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} warps {self.warps} stages {self.stages}"


# (rows, columns, warps, stages) in the order in which to try them, where there are enough of both
# to give every multiprocessor a tile of 128x128, and where there are not.
_LARGE = ((128, 128, 8, 3), (64, 128, 4, 4), (128, 64, 4, 4), (256, 64, 8, 3))
_SMALL = ((64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 8, 3))
_MANY_OUTPUTS = 128 * 128 * 128
# (rows, warps, stages) of tiles with fewer than 64 columns.
_NARROW = ((128, 4, 4), (256, 8, 3), (64, 4, 4))
_MOST_TILES = 4
# Rows and up to 64 columns of a tile that three passes of TF32 have registers for.
_MOST_PRECISE_OUTPUTS = 64 * 64


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of one convolution, with a low side of 1x1 seen as a plain product.

    Attributes:
        n: images.
        cl, h, w: channels, height and width of L.
        ch, high_h, high_w: of H; a collapsed problem has the taps among the channels.
        kh, kw, stride, padding: of the weight ``[cl, ch, kh, kw]``.
        groups: equal parts of the batch that no tile of rows crosses.
        taps: how many taps were made channels of H; 1 where none were.
        itemsize: bytes of an element.
        precision: of the multiplication, see :func:`precision`.
    """

    n: int
    cl: int
    h: int
    w: int
    ch: int
    high_h: int
    high_w: int
    kh: int
    kw: int
    stride: int
    padding: int
    groups: int
    taps: int
    itemsize: int
    precision: str

    @classmethod
    def of(
        cls,
        low: tuple[int, ...],
        high: tuple[int, ...],
        kernel: tuple[int, int],
        stride: int,
        padding: int,
        groups: int,
        dtype: torch.dtype,
    ) -> Problem:
        """From the shapes ``[N, C, H, W]`` of both sides; ``groups`` may be 0, which is 1 part."""
        n, cl, h, w = low
        _, ch, high_h, high_w = high
        kh, kw, taps = *kernel, 1
        if (h, w, padding) == (1, 1, 0) and (high_h, high_w) == (kh, kw):
            taps = kh * kw
            ch, high_h, high_w, kh, kw, stride = ch * taps, 1, 1, 1, 1, 1
        return cls(
            *(n, cl, h, w, ch, high_h, high_w, kh, kw, stride, padding, max(groups, 1), taps),
            *(dtype.itemsize, precision(dtype)),
        )

    @property
    def classes(self) -> int:
        """Of pixels of H, by their place between the strides."""
        return self.stride * self.stride

    @property
    def thin(self) -> bool:
        """Whether H has too few channels for tiles of channels alone."""
        return self.ch < _THIN

    @property
    def thin_dgrad(self) -> bool:
        """Whether one tile of dgrad holds all classes, which then have equally many pixels."""
        whole = self.high_h % self.stride == 0 == self.high_w % self.stride
        return self.classes > 1 and self.classes * self.ch <= _THIN_COLUMNS and whole

    @property
    def dots(self) -> bool:
        """Whether fprop is one dot product for each of few outputs."""
        return self.h * self.w * self.kh * self.kw == 1 and self.cl <= _FEW_OUTPUTS < self.ch

    def class_sides(self) -> tuple[int, int]:
        """Height and width of a class of pixels of H, the largest of them."""
        return triton.cdiv(self.high_h, self.stride), triton.cdiv(self.high_w, self.stride)

    def group_rows(self, direction: str) -> int:
        """Rows of the product in one group of the batch."""
        h, w = (self.h, self.w) if direction == "fprop" else self.class_sides()
        return self.n // self.groups * h * w

    def stats_rows(self, direction: str) -> int:
        """Rows of a tile of statistics: those of the smallest tile that may be taken."""
        many = self.groups * self.group_rows(direction) >= _MANY_ROWS
        return 128 if many and self.precision != "tf32x3" else 64

    def stats_slots(self, direction: str) -> int:
        """Tiles of statistics in one group of the batch, of one class or tap."""
        return triton.cdiv(self.group_rows(direction), self.stats_rows(direction))

    def stats_parts(self, direction: str) -> int:
        """Of which each tile of statistics has one: the classes or taps of a pixel."""
        return self.classes * self.taps if direction == "dgrad" else 1

    def stats_tiles(self, direction: str) -> int:
        """How many tiles of statistics ``direction`` writes; 0 where it writes none."""
        if direction == "fprop" and self.dots:
            return 0
        return self.groups * self.stats_slots(direction) * self.stats_parts(direction)

    def tiles(self, direction: str) -> tuple[Tile, ...]:
        """The configurations to choose from, at most four, the likeliest first."""
        if direction == "wgrad":
            return self._wgrad_tiles()
        if direction == "fprop":
            columns, channels, thin = self.cl, self.ch, self.thin
            if self.dots:
                return (Tile(1, 1, _DOT_BLOCK, 4, 1),)
        else:
            columns, channels, thin = self.ch, self.cl, False
            if self.thin_dgrad:
                columns *= self.classes
        k = self._depth(channels * (self.kh * self.kw if thin else 1))
        rows, least = self.groups * self.group_rows(direction), self.stats_rows(direction)
        width = common.power_of_2(columns, 16, 128)
        shapes: tuple[tuple[int, int, int, int], ...]
        if thin:
            # Elements are gathered one by one, which takes registers for addresses.
            shapes = tuple((m, min(width, 64), 8, 2) for m in (128, 64))
        elif width < 64:
            shapes = tuple((m, width, warps, stages) for m, warps, stages in _NARROW)
        else:
            shapes = _LARGE if rows * columns >= _MANY_OUTPUTS else _SMALL
        # A sum of one step has no next one to fetch ahead.
        once = self.kh * self.kw == 1 and channels <= k
        found = [
            self._tile(m, n, k, warps, 1 if once else stages)
            for m, n, warps, stages in shapes
            if least <= m and n <= width
        ]
        return tuple(tile for tile in found if tile)[:_MOST_TILES]

    def _wgrad_tiles(self) -> tuple[Tile, ...]:
        columns = self.ch * self.kh * self.kw if self.thin else self.ch
        m, n = common.power_of_2(self.cl, 16, 128), common.power_of_2(columns, 16, 128)
        k = self._depth(self.n * self.h * self.w)
        sides = dict.fromkeys(((m, n), (m, min(n, 64)), (min(m, 64), n), (min(m, 64), min(n, 64))))
        found = [self._tile(*side, k, *((8, 3) if min(side) == 128 else (4, 4))) for side in sides]
        return tuple(tile for tile in found if tile)

    def _depth(self, size: int) -> int:
        """How much of the sum a tile takes at a time: 128 bytes, or all where there is less.

        Three passes of TF32 hold each operand twice, and take half of that.
        """
        most = 64 if self.precision == "tf32x3" else 128
        return common.power_of_2(size, 16, most // self.itemsize)

    def _tile(self, m: int, n: int, k: int, warps: int, stages: int) -> Tile | None:
        """None where there are not the registers for it."""
        if self.precision == "tf32x3":
            if m * min(n, 64) > _MOST_PRECISE_OUTPUTS:
                return None
            warps = max(4, m * n // 1024)
        # AMD's local memory holds 64 KiB, and its compiler keeps the next tile in registers.
        hip = common.target_backend() == "hip"
        return Tile(m, n, k, warps, min(stages, 2) if hip else stages)


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies, from what torch asks of its own convolutions.

    ``torch.backends.cudnn.conv.fp32_precision``: ``tf32`` is one pass of TF32, anything else three
    of them, which have nearly the rounding of float32. AMD has float32 instructions instead.
    """
    if dtype != torch.float32:
        return "ieee"
    if common.target_backend() == "hip":
        return "ieee"
    return "tf32" if gpu.tf32() else "tf32x3"


# A kernel would be compiled anew for each size that is a multiple of 16. Only channels decide how
# wide loads can be, and of what they are multiples is among the constants.
_SIZES = ("h", "w", "cl", "high_h", "high_w", "ch")
_FORWARD_SIZES = ("tiles_m", "tiles_n", "group_tiles", "group_rows", "slots", *_SIZES)


@triton.jit
def _place(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The tile of this program: columns within groups of rows, so that L2 serves both operands."""
    pid = tl.program_id(0)
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    rows = min(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % rows, within // rows


@triton.jit
def _finish(
    acc,
    real,
    row_at,
    column,
    column_at,
    channel,
    y_ptr,
    bias_ptr,
    stats_ptr,
    slot,
    slots,
    parts,
    part,
    channels,
    negative_slope,
    BM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STATS_ROWS: tl.constexpr,
):
    """Bias, activation, writing the tile, and the statistics of what is written.

    ``real`` and ``column`` say which rows and columns there are, ``row_at`` and ``column_at`` where
    they lie in ``y``. ``slot`` is the tile's first of the ``slots`` that its group ends at; a tile
    of more rows than a slot has leaves nothing in its other ones.
    """
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=column, other=0.0).to(tl.float32)
        acc += bias[None, :]
    y = common.activate(acc, ACTIVATION, negative_slope).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row_at[:, None] + column_at[None, :], y, mask=real[:, None] & column[None, :])
    if STATS_ROWS > 0:
        y = y.to(tl.float32)
        count = tl.sum(real.to(tl.float32), axis=0)
        mean = tl.sum(tl.where(real[:, None], y, 0.0), axis=0) / tl.maximum(count, 1.0)
        d = tl.where(real[:, None], y - mean[None, :], 0.0)
        m2 = tl.sum(d * d, axis=0)
        none = tl.zeros_like(mean)
        for i in tl.static_range(BM // STATS_ROWS):
            here = column & (slot + i < slots)
            at = stats_ptr + ((slot + i) * parts + part) * 3 * channels + channel
            tl.store(at, none + count if i == 0 else none, mask=here)
            tl.store(at + channels, mean if i == 0 else none, mask=here)
            tl.store(at + 2 * channels, m2 if i == 0 else none, mask=here)


@triton.jit(do_not_specialize=_FORWARD_SIZES)
def _conv_fprop_kernel(
    high_ptr,
    weight_ptr,
    bias_ptr,
    low_ptr,
    stats_ptr,
    negative_slope,
    tiles_m,
    tiles_n,
    group_tiles,
    group_rows,
    slots,
    h,
    w,
    cl,
    high_h,
    high_w,
    ch,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    THIN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STATS_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    CL_MULTIPLE: tl.constexpr,
    CH_MULTIPLE: tl.constexpr,
):
    cl = cl // CL_MULTIPLE * CL_MULTIPLE
    ch = ch // CH_MULTIPLE * CH_MULTIPLE
    pid_m, pid_n = _place(tiles_m, tiles_n, GROUP_M)
    group = pid_m // group_tiles
    in_group = (pid_m % group_tiles) * BM + tl.arange(0, BM)
    real = in_group < group_rows
    row = group * group_rows + in_group
    image = row // (h * w)
    top = row // w % h * STRIDE - PADDING
    left = row % w * STRIDE - PADDING
    window = high_ptr + ((image * high_h + top) * high_w + left) * ch

    a = pid_n * BN + tl.arange(0, BN)
    column = a < cl
    weights = weight_ptr + a * (KH * KW * ch)
    acc = tl.zeros((BM, BN), tl.float32)
    if THIN:
        for k in range(0, KH * KW * ch, BK):
            flat = k + tl.arange(0, BK)
            u = flat // ch // KW
            v = flat // ch % KW
            y = top[:, None] + u[None, :]
            x = left[:, None] + v[None, :]
            inside = (y >= 0) & (y < high_h) & (x >= 0) & (x < high_w)
            some = flat < KH * KW * ch
            high = tl.load(
                window[:, None] + ((u * high_w + v) * ch + flat % ch)[None, :],
                mask=inside & real[:, None] & some[None, :],
                other=0.0,
            )
            weight = tl.load(
                weights[None, :] + flat[:, None], mask=column[None, :] & some[:, None], other=0.0
            )
            acc = tl.dot(high, weight, acc, input_precision=PRECISION)
    else:
        blocks = tl.cdiv(ch, BK)
        # One loop over taps and channels, so that the loads of a tap overlap the sums of another.
        for t in range(KH * KW * blocks):
            tap = t // blocks
            u = tap // KW
            v = tap % KW
            b = t % blocks * BK + tl.arange(0, BK)
            y = top + u
            x = left + v
            inside = real & (y >= 0) & (y < high_h) & (x >= 0) & (x < high_w)
            some = b < ch
            high = tl.load(
                window[:, None] + ((u * high_w + v) * ch + b)[None, :],
                mask=inside[:, None] & some[None, :],
                other=0.0,
            )
            weight = tl.load(
                weights[None, :] + (tap * ch + b)[:, None],
                mask=column[None, :] & some[:, None],
                other=0.0,
            )
            acc = tl.dot(high, weight, acc, input_precision=PRECISION)

    slot = group * slots + (pid_m % group_tiles) * (BM // max(STATS_ROWS, 1))
    _finish(
        acc,
        real,
        row * cl,
        column,
        a,
        a,
        low_ptr,
        bias_ptr,
        stats_ptr,
        slot,
        group * slots + slots,
        1,
        0,
        cl,
        negative_slope,
        BM,
        ACTIVATION,
        STATS_ROWS,
    )


@triton.jit(do_not_specialize=(*_FORWARD_SIZES, "channels", "taps"))
def _conv_dgrad_kernel(
    low_ptr,
    weight_ptr,
    bias_ptr,
    high_ptr,
    stats_ptr,
    negative_slope,
    tiles_m,
    tiles_n,
    group_tiles,
    group_rows,
    slots,
    h,
    w,
    cl,
    high_h,
    high_w,
    ch,
    channels,
    taps,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    THIN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STATS_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    CL_MULTIPLE: tl.constexpr,
    CH_MULTIPLE: tl.constexpr,
):
    cl = cl // CL_MULTIPLE * CL_MULTIPLE
    ch = ch // CH_MULTIPLE * CH_MULTIPLE
    pid_m, pid_n = _place(tiles_m, tiles_n, GROUP_M)
    group = pid_m // group_tiles
    in_group = (pid_m % group_tiles) * BM + tl.arange(0, BM)
    # The pixels of a class, which lie a stride apart.
    class_h = (high_h + STRIDE - 1) // STRIDE
    class_w = (high_w + STRIDE - 1) // STRIDE
    row = group * group_rows + in_group
    image = row // (class_h * class_w)
    qy = row // class_w % class_h
    qx = row % class_w
    real = in_group < group_rows

    col = pid_n * BN + tl.arange(0, BN)
    blocks = tl.cdiv(cl, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    if THIN:
        column = col < STRIDE * STRIDE * ch
        b = col % ch
        cy = col // ch // STRIDE
        cx = col // ch % STRIDE
        # L from where the first tap of the last class reads to where the last of the first does.
        FIRST: tl.constexpr = -((KH - 1 - PADDING) // STRIDE)
        LAST: tl.constexpr = (STRIDE - 1 + PADDING) // STRIDE
        FIRST_X: tl.constexpr = -((KW - 1 - PADDING) // STRIDE)
        SPAN: tl.constexpr = LAST - FIRST + 1
        SPAN_X: tl.constexpr = LAST - FIRST_X + 1
        window = low_ptr + ((image * h + qy) * w + qx) * cl
        for t in range(SPAN * SPAN_X * blocks):
            place = t // blocks
            ey = place // SPAN_X + FIRST
            ex = place % SPAN_X + FIRST_X
            a = t % blocks * BK + tl.arange(0, BK)
            i = qy + ey
            j = qx + ex
            inside = real & (i >= 0) & (i < h) & (j >= 0) & (j < w)
            some = a < cl
            low = tl.load(
                window[:, None] + ((ey * w + ex) * cl + a)[None, :],
                mask=inside[:, None] & some[None, :],
                other=0.0,
            )
            u = cy + PADDING - STRIDE * ey
            v = cx + PADDING - STRIDE * ex
            met = column & (u >= 0) & (u < KH) & (v >= 0) & (v < KW)
            weight = tl.load(
                weight_ptr + (a * (KH * KW * ch))[:, None] + ((u * KW + v) * ch + b)[None, :],
                mask=some[:, None] & met[None, :],
                other=0.0,
            )
            acc = tl.dot(low, weight, acc, input_precision=PRECISION)
        row_at = ((image * high_h + qy * STRIDE) * high_w + qx * STRIDE) * ch
        column_at = (cy * high_w + cx) * ch + b
        channel = b
        part = col // ch
        parts = STRIDE * STRIDE
    else:
        column = col < ch
        class_ = tl.program_id(1)
        ry = class_ // STRIDE
        rx = class_ % STRIDE
        # The first pixel whose taps are ry, ry + STRIDE, …, and where on L the first of them reads.
        y0 = (ry - PADDING + PADDING * STRIDE) % STRIDE
        x0 = (rx - PADDING + PADDING * STRIDE) % STRIDE
        i0 = (y0 + PADDING - ry) // STRIDE
        j0 = (x0 + PADDING - rx) // STRIDE
        TAPS: tl.constexpr = (KH + STRIDE - 1) // STRIDE
        TAPS_X: tl.constexpr = (KW + STRIDE - 1) // STRIDE
        y = qy * STRIDE + y0
        x = qx * STRIDE + x0
        real = real & (y < high_h) & (x < high_w)
        top = qy + i0
        left = qx + j0
        window = low_ptr + ((image * h + top) * w + left) * cl
        weights = weight_ptr + (ry * KW + rx) * ch + col
        for t in range(TAPS * TAPS_X * blocks):
            tap = t // blocks
            ty = tap // TAPS_X
            tx = tap % TAPS_X
            a = t % blocks * BK + tl.arange(0, BK)
            i = top - ty
            j = left - tx
            inside = real & (i >= 0) & (i < h) & (j >= 0) & (j < w)
            some = a < cl
            if KH % STRIDE != 0 or KW % STRIDE != 0:
                some = some & (ry + STRIDE * ty < KH) & (rx + STRIDE * tx < KW)
            low = tl.load(
                window[:, None] + (a - (ty * w + tx) * cl)[None, :],
                mask=inside[:, None] & some[None, :],
                other=0.0,
            )
            weight = tl.load(
                weights[None, :] + (a * (KH * KW) + STRIDE * (ty * KW + tx))[:, None] * ch,
                mask=some[:, None] & column[None, :],
                other=0.0,
            )
            acc = tl.dot(low, weight, acc, input_precision=PRECISION)
        row_at = ((image * high_h + y) * high_w + x) * ch
        column_at = col
        channel = col % channels
        part = class_ * taps + col // channels
        parts = STRIDE * STRIDE * taps

    slot = group * slots + (pid_m % group_tiles) * (BM // max(STATS_ROWS, 1))
    _finish(
        acc,
        real,
        row_at,
        column,
        column_at,
        channel,
        high_ptr,
        bias_ptr,
        stats_ptr,
        slot,
        group * slots + slots,
        parts,
        part,
        channels,
        negative_slope,
        BM,
        ACTIVATION,
        STATS_ROWS,
    )


@triton.jit(do_not_specialize=("cl",))
def _conv_dot_kernel(
    high_ptr,
    weight_ptr,
    bias_ptr,
    low_ptr,
    negative_slope,
    cl,
    ch,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    a = tl.program_id(1)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, ch, BLOCK):
        b = k + tl.arange(0, BLOCK)
        high = tl.load(high_ptr + row * ch + b, mask=b < ch, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + a * ch + b, mask=b < ch, other=0.0).to(tl.float32)
        acc += high * weight
    z = tl.sum(acc)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + a).to(tl.float32)
    y = common.activate(z, ACTIVATION, negative_slope)
    tl.store(low_ptr + row * cl + a, y.to(low_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=("tiles_m", "tiles_n", "rows", "part_rows", *_SIZES))
def _conv_wgrad_kernel(
    low_ptr,
    high_ptr,
    out_ptr,
    tiles_m,
    tiles_n,
    rows,
    part_rows,
    h,
    w,
    cl,
    high_h,
    high_w,
    ch,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    THIN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    CL_MULTIPLE: tl.constexpr,
    CH_MULTIPLE: tl.constexpr,
):
    cl = cl // CL_MULTIPLE * CL_MULTIPLE
    ch = ch // CH_MULTIPLE * CH_MULTIPLE
    pid_m, pid_n = _place(tiles_m, tiles_n, GROUP_M)
    part = tl.program_id(1)
    a = pid_m * BM + tl.arange(0, BM)
    if THIN:
        flat = pid_n * BN + tl.arange(0, BN)
        column = flat < KH * KW * ch
        u = flat // ch // KW
        v = flat // ch % KW
        b = flat % ch
    else:
        blocks = tl.cdiv(ch, BN)
        u = pid_n // blocks // KW
        v = pid_n // blocks % KW
        b = pid_n % blocks * BN + tl.arange(0, BN)
        column = b < ch
        flat = (u * KW + v) * ch + b
    end = min(part * part_rows + part_rows, rows)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(part * part_rows, end, BK):
        row = k + tl.arange(0, BK)
        real = row < end
        top = row // w % h * STRIDE - PADDING
        left = row % w * STRIDE - PADDING
        window = ((row // (h * w) * high_h + top) * high_w + left) * ch
        low = tl.load(
            low_ptr + a[:, None] + (row * cl)[None, :],
            mask=(a < cl)[:, None] & real[None, :],
            other=0.0,
        )
        if THIN:
            y = top[:, None] + u[None, :]
            x = left[:, None] + v[None, :]
            inside = (y >= 0) & (y < high_h) & (x >= 0) & (x < high_w) & real[:, None]
        else:
            y = top + u
            x = left + v
            inside = (real & (y >= 0) & (y < high_h) & (x >= 0) & (x < high_w))[:, None]
        high = tl.load(
            high_ptr + window[:, None] + ((u * high_w + v) * ch + b)[None, :],
            mask=inside & column[None, :],
            other=0.0,
        )
        acc = tl.dot(low, high, acc, input_precision=PRECISION)
    size = KH * KW * ch
    tl.store(
        out_ptr + part * cl * size + (a * size)[:, None] + flat[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(a < cl)[:, None] & column[None, :],
    )


@triton.jit(do_not_specialize=("parts",))
def _conv_wgrad_sum_kernel(parts_ptr, out_ptr, parts, size, BP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, BP):
        part = first + tl.arange(0, BP)
        mask = (part < parts)[:, None] & (i < size)[None, :]
        some = tl.load(parts_ptr + (part * size)[:, None] + i[None, :], mask=mask, other=0.0)
        acc += tl.sum(some, axis=0)
    tl.store(out_ptr + i, acc.to(out_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def _act_bwd_kernel(
    dy_ptr, y_ptr, dx_ptr, size, negative_slope, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    dx = dy * common.activation_gradient(y, ACTIVATION, negative_slope)
    tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), mask=i < size)


@common.launcher
def conv_fprop(
    problem: Problem,
    tile: Tile,
    high: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    low: Tensor,
    stats: Tensor | None,
) -> None:
    """``low = act(fprop(high, weight) + bias)``, and its statistics where ``stats`` is given.

    Tensors are dense NHWC; ``stats`` is float32 ``[stats_tiles, 3, cl]``.
    """
    p = problem
    if p.dots:
        _conv_dot_kernel[(p.n, p.cl)](
            *(high, weight, bias, low, negative_slope, p.cl, p.ch),
            ACTIVATION=activation,
            BLOCK=tile.k,
            num_warps=tile.warps,
        )
        return
    group_rows = p.group_rows("fprop")
    group_tiles = triton.cdiv(group_rows, tile.m)
    tiles_m, tiles_n = p.groups * group_tiles, triton.cdiv(p.cl, tile.n)
    _conv_fprop_kernel[(tiles_m * tiles_n,)](
        *(high, weight, bias, low, stats, negative_slope),
        *(tiles_m, tiles_n, group_tiles, group_rows, p.stats_slots("fprop")),
        *(p.h, p.w, p.cl, p.high_h, p.high_w, p.ch),
        **_constants(p, tile),
        THIN=p.thin,
        ACTIVATION=activation,
        STATS_ROWS=0 if stats is None else p.stats_rows("fprop"),
    )


@common.launcher
def conv_dgrad(
    problem: Problem,
    tile: Tile,
    low: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    high: Tensor,
    stats: Tensor | None,
) -> None:
    """``high = act(dgrad(low, weight) + bias)``, and its statistics where ``stats`` is given.

    Tensors are dense NHWC; ``stats`` is float32 ``[stats_tiles, 3, channels of high]``.
    """
    p = problem
    group_rows = p.group_rows("dgrad")
    group_tiles = triton.cdiv(group_rows, tile.m)
    columns, classes = (p.ch * p.classes, 1) if p.thin_dgrad else (p.ch, p.classes)
    tiles_m, tiles_n = p.groups * group_tiles, triton.cdiv(columns, tile.n)
    _conv_dgrad_kernel[(tiles_m * tiles_n, classes)](
        *(low, weight, bias, high, stats, negative_slope),
        *(tiles_m, tiles_n, group_tiles, group_rows, p.stats_slots("dgrad")),
        *(p.h, p.w, p.cl, p.high_h, p.high_w, p.ch, p.ch // p.taps, p.taps),
        **_constants(p, tile),
        THIN=p.thin_dgrad,
        ACTIVATION=activation,
        STATS_ROWS=0 if stats is None else p.stats_rows("dgrad"),
    )


@common.launcher
def conv_wgrad(problem: Problem, tile: Tile, low: Tensor, high: Tensor, out: Tensor) -> None:
    """``out [cl, ch, kh, kw]``, the gradient of the weight. All tensors are dense NHWC."""
    p = problem
    rows, size = p.n * p.h * p.w, p.kh * p.kw * p.ch
    tiles_m = triton.cdiv(p.cl, tile.m)
    tiles_n = triton.cdiv(size, tile.n) if p.thin else p.kh * p.kw * triton.cdiv(p.ch, tile.n)
    parts, part_rows = _parts(rows, tile.k, tiles_m * tiles_n, low.device)
    sums = out if parts == 1 else gpu.empty(low, parts, p.cl * size)
    _conv_wgrad_kernel[(tiles_m * tiles_n, parts)](
        *(low, high, sums, tiles_m, tiles_n, rows, part_rows),
        *(p.h, p.w, p.cl, p.high_h, p.high_w, p.ch),
        **_constants(p, tile),
        THIN=p.thin,
    )
    if parts > 1:
        # As many parts at a time as there are: one after another they would wait for memory.
        at_once = common.power_of_2(parts, 2, 32)
        block = _SUM_BLOCK // at_once
        _conv_wgrad_sum_kernel[(triton.cdiv(p.cl * size, block),)](
            sums, out, parts, p.cl * size, BP=at_once, BLOCK=block
        )


def _parts(rows: int, k: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts of how many rows wgrad's sum is cut."""
    steps = triton.cdiv(rows, k)
    wanted = triton.cdiv(_WAVES * gpu.multiprocessors(device), tiles)
    # A part of less than a few steps is mostly the writing of its result.
    part_steps = max(triton.cdiv(steps, wanted), min(steps, 8))
    return triton.cdiv(steps, part_steps), part_steps * k


def _constants(problem: Problem, tile: Tile) -> dict[str, object]:
    return {
        "KH": problem.kh,
        "KW": problem.kw,
        "STRIDE": problem.stride,
        "PADDING": problem.padding,
        "PRECISION": problem.precision,
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "GROUP_M": _GROUP_M,
        "CL_MULTIPLE": math.gcd(problem.cl, _ALIGNED),
        "CH_MULTIPLE": math.gcd(problem.ch, _ALIGNED),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        # Else ptxas may spill a few registers so that one block more fits a multiprocessor, where
        # the shared memory does not let it anyway.
        **({"maxnreg": 255} if common.target_backend() == "cuda" else {}),
    }


@common.launcher
def act_backward(dy: Tensor, y: Tensor, activation: str, negative_slope: float, dx: Tensor) -> None:
    """``dx = dy · act'(z)`` from ``y = act(z)``; all dense, of one layout."""
    _act_bwd_kernel[(triton.cdiv(y.numel(), _ACT_BLOCK),)](
        dy, y, dx, y.numel(), negative_slope, ACTIVATION=activation, BLOCK=_ACT_BLOCK
    )
