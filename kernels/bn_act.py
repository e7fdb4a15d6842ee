"""Batch norm + activation over groups of the batch, on NHWC tensors seen as ``[rows, C]``.

Statistics are a count, a mean and a sum of squared deviations of each tile of rows, merged in
order (Chan, Golub, LeVeque 1979): plain sums of squares cancel where the mean is large. The
backward pass sums twice over each tile of rows, adds up the tiles in order, and goes over the
tensors once more.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastgan.kernels import common
from torch import Tensor

from fastgan import gpu

# Elements that a program holds at a time, and channels of them: a warp's row of 16-byte loads.
_BLOCK = 4096
_MOST_CHANNELS = 64
_WARPS = 4
# Tiles of one group that a sum is cut into: enough programs for a large GPU, few to merge.
_TILES = 256
# The programs that merge are few, and each waits for memory: so it takes many tiles at a time.
_MERGE_TILES = 512
_MERGE_CHANNELS = 8
_MERGE_WARPS = 8


@triton.jit(do_not_specialize=("rows", "tile_rows", "tiles"))
def _bn_stats_kernel(
    x_ptr, stats_ptr, rows, tile_rows, tiles, channels, BR: tl.constexpr, BC: tl.constexpr
):
    tile = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tile // tiles * rows
    start = tile % tiles * tile_rows
    end = min(start + tile_rows, rows)
    count = 0.0
    mean = tl.zeros((BC,), tl.float32)
    m2 = tl.zeros((BC,), tl.float32)
    for row in range(start, end, BR):
        r = row + tl.arange(0, BR)
        mask = (r < end)[:, None] & (c < channels)[None, :]
        x = tl.load(
            x_ptr + ((first + r) * channels)[:, None] + c[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        size = tl.minimum(end - row, BR).to(tl.float32)
        block_mean = tl.sum(x, axis=0) / size
        d = tl.where(mask, x - block_mean[None, :], 0.0)
        # What the first sum has rounded away of a large mean.
        shift = tl.sum(d, axis=0) / size
        m2 += tl.sum(d * d, axis=0) - size * shift * shift
        block_mean += shift
        delta = block_mean - mean
        share = size / (count + size)
        mean += delta * share
        m2 += delta * delta * count * share
        count += size
    at = stats_ptr + tile * 3 * channels + c
    tl.store(at, tl.zeros((BC,), tl.float32) + count, mask=c < channels)
    tl.store(at + channels, mean, mask=c < channels)
    tl.store(at + 2 * channels, m2, mask=c < channels)


@triton.jit(do_not_specialize=("tiles",))
def _bn_merge_kernel(
    stats_ptr,
    mean_ptr,
    var_ptr,
    invstd_ptr,
    tiles,
    channels,
    eps,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    group = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    count = tl.zeros((BC,), tl.float32)
    mean = tl.zeros((BC,), tl.float32)
    m2 = tl.zeros((BC,), tl.float32)
    for tile in range(0, tiles, BT):
        t = tile + tl.arange(0, BT)
        mask = (t < tiles)[:, None] & (c < channels)[None, :]
        at = stats_ptr + ((group * tiles + t) * 3 * channels)[:, None] + c[None, :]
        counts = tl.load(at, mask=mask, other=0.0)
        means = tl.load(at + channels, mask=mask, other=0.0)
        m2s = tl.load(at + 2 * channels, mask=mask, other=0.0)
        size = tl.sum(counts, axis=0)
        # Relative to one of the means, so that nothing is lost where all are large.
        pivot = tl.sum(tl.where((t == tile)[:, None], means, 0.0), axis=0)
        shift = tl.sum(counts * (means - pivot[None, :]), axis=0) / tl.maximum(size, 1.0)
        block_mean = pivot + shift
        d = means - block_mean[None, :]
        delta = block_mean - mean
        share = size / tl.maximum(count + size, 1.0)
        mean += delta * share
        m2 += tl.sum(m2s + counts * d * d, axis=0) + delta * delta * count * share
        count += size
    var = m2 / tl.maximum(count, 1.0)
    at = group * channels + c
    tl.store(mean_ptr + at, mean, mask=c < channels)
    tl.store(var_ptr + at, var, mask=c < channels)
    tl.store(invstd_ptr + at, 1.0 / tl.sqrt_rn(var + eps), mask=c < channels)


@triton.jit
def _of_channels(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, group, c, channels):
    """Mean and invstd of a group in channels ``c``; weight and bias, 1 and 0 if there are none."""
    mean = tl.load(mean_ptr + group * channels + c, mask=c < channels, other=0.0)
    invstd = tl.load(invstd_ptr + group * channels + c, mask=c < channels, other=0.0)
    weight = tl.full(c.shape, 1.0, tl.float32)
    bias = tl.zeros(c.shape, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    return mean, invstd, weight, bias


@triton.jit
def _normalise(x, mean, invstd, weight, bias):
    """Before the activation; one expression for both passes, which see the same side of a kink."""
    return (x - mean[None, :]) * (invstd * weight)[None, :] + bias[None, :]


@triton.jit(do_not_specialize=("rows",))
def _bn_act_fwd_kernel(
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    rows,
    channels,
    negative_slope,
    ACTIVATION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    group = tl.program_id(2)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (r < rows)[:, None] & (c < channels)[None, :]
    offsets = ((group * rows + r) * channels)[:, None] + c[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean, invstd, weight, bias = _of_channels(
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, group, c, channels
    )
    z = _normalise(x, mean, invstd, weight, bias)
    y = common.activate(z, ACTIVATION, negative_slope)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normalised_and_gradient(
    dy_ptr,
    x_ptr,
    offsets,
    mask,
    mean,
    invstd,
    weight,
    bias,
    negative_slope,
    ACTIVATION: tl.constexpr,
):
    """``xhat`` and the gradient of ``z``; both 0 where masked."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    xhat = tl.where(mask, (x - mean[None, :]) * invstd[None, :], 0.0)
    z = _normalise(x, mean, invstd, weight, bias)
    if ACTIVATION == "tanh":
        z = common.activate(z, ACTIVATION, negative_slope)
    return xhat, dy * common.activation_gradient(z, ACTIVATION, negative_slope)


@triton.jit(do_not_specialize=("rows", "tile_rows", "tiles"))
def _bn_act_bwd_reduce_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    rows,
    tile_rows,
    tiles,
    channels,
    negative_slope,
    ACTIVATION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    tile = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    group = tile // tiles
    start = tile % tiles * tile_rows
    end = min(start + tile_rows, rows)
    mean, invstd, weight, bias = _of_channels(
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, group, c, channels
    )
    dbias = tl.zeros((BC,), tl.float32)
    dweight = tl.zeros((BC,), tl.float32)
    for row in range(start, end, BR):
        r = row + tl.arange(0, BR)
        mask = (r < end)[:, None] & (c < channels)[None, :]
        offsets = ((group * rows + r) * channels)[:, None] + c[None, :]
        xhat, dz = _normalised_and_gradient(
            dy_ptr, x_ptr, offsets, mask, mean, invstd, weight, bias, negative_slope, ACTIVATION
        )
        dbias += tl.sum(dz, axis=0)
        dweight += tl.sum(dz * xhat, axis=0)
    at = sums_ptr + tile * 2 * channels + c
    tl.store(at, dbias, mask=c < channels)
    tl.store(at + channels, dweight, mask=c < channels)


@triton.jit(do_not_specialize=("groups", "tiles"))
def _bn_act_bwd_sum_kernel(
    sums_ptr,
    totals_ptr,
    dweight_ptr,
    dbias_ptr,
    groups,
    tiles,
    channels,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    dbias = tl.zeros((BC,), tl.float32)
    dweight = tl.zeros((BC,), tl.float32)
    for group in range(groups):
        db = tl.zeros((BC,), tl.float32)
        dw = tl.zeros((BC,), tl.float32)
        for tile in range(0, tiles, BT):
            t = tile + tl.arange(0, BT)
            mask = (t < tiles)[:, None] & (c < channels)[None, :]
            at = sums_ptr + ((group * tiles + t) * 2 * channels)[:, None] + c[None, :]
            db += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
            dw += tl.sum(tl.load(at + channels, mask=mask, other=0.0), axis=0)
        at = totals_ptr + group * 2 * channels + c
        tl.store(at, db, mask=c < channels)
        tl.store(at + channels, dw, mask=c < channels)
        dbias += db
        dweight += dw
    tl.store(dbias_ptr + c, dbias.to(dbias_ptr.dtype.element_ty), mask=c < channels)
    tl.store(dweight_ptr + c, dweight.to(dweight_ptr.dtype.element_ty), mask=c < channels)


@triton.jit(do_not_specialize=("rows",))
def _bn_act_bwd_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    totals_ptr,
    dx_ptr,
    rows,
    channels,
    negative_slope,
    TRAINING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    group = tl.program_id(2)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (r < rows)[:, None] & (c < channels)[None, :]
    offsets = ((group * rows + r) * channels)[:, None] + c[None, :]
    mean, invstd, weight, bias = _of_channels(
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, group, c, channels
    )
    xhat, dx = _normalised_and_gradient(
        dy_ptr, x_ptr, offsets, mask, mean, invstd, weight, bias, negative_slope, ACTIVATION
    )
    if TRAINING:
        at = totals_ptr + group * 2 * channels + c
        dbias = tl.load(at, mask=c < channels, other=0.0) / rows
        dweight = tl.load(at + channels, mask=c < channels, other=0.0) / rows
        dx = dx - dbias[None, :] - xhat * dweight[None, :]
    dx *= (weight * invstd)[None, :]
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("groups",))
def _bn_running_kernel(
    mean_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    groups,
    channels,
    momentum,
    unbiased,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    running_mean = tl.load(running_mean_ptr + c, mask=mask, other=0.0).to(tl.float32)
    running_var = tl.load(running_var_ptr + c, mask=mask, other=0.0).to(tl.float32)
    for group in range(groups):
        mean = tl.load(mean_ptr + group * channels + c, mask=mask, other=0.0)
        var = tl.load(var_ptr + group * channels + c, mask=mask, other=0.0) * unbiased
        running_mean += momentum * (mean - running_mean)
        running_var += momentum * (var - running_var)
    tl.store(running_mean_ptr + c, running_mean.to(running_mean_ptr.dtype.element_ty), mask=mask)
    tl.store(running_var_ptr + c, running_var.to(running_var_ptr.dtype.element_ty), mask=mask)


def _block(channels: int) -> dict[str, int]:
    """Rows and channels of a program's block."""
    width = common.power_of_2(channels, 1, _MOST_CHANNELS)
    return {"BR": _BLOCK // width, "BC": width, "num_warps": _WARPS}


def _grid(rows: int, channels: int, groups: int, block: dict[str, int]) -> tuple[int, int, int]:
    return triton.cdiv(rows, block["BR"]), triton.cdiv(channels, block["BC"]), groups


def stats_tiles(groups: int, rows: int, channels: int) -> int:
    """Tiles of statistics, or of sums, that each of ``groups`` parts of ``rows`` is cut into."""
    return min(triton.cdiv(rows, _block(channels)["BR"]), max(_TILES // groups, 1))


@common.launcher
def bn_stats(x: Tensor, stats: Tensor, groups: int) -> None:
    """``stats [tiles, 3, C]``: count, mean and sum of squared deviations of each tile of rows.

    ``x`` is dense NHWC; each group's rows are cut into ``tiles / groups`` equal parts.
    """
    c = x.shape[1]
    rows, tiles = x.numel() // (c * groups), len(stats) // groups
    block = _block(c)
    _bn_stats_kernel[(len(stats), triton.cdiv(c, block["BC"]))](
        x, stats, rows, triton.cdiv(rows, tiles), tiles, c, **block
    )


@common.launcher
def bn_merge(
    stats: Tensor, eps: float, mean: Tensor, var: Tensor, invstd: Tensor, groups: int
) -> None:
    """``mean``, biased ``var`` and ``invstd``, ``[groups, C]``, of the tiles of each group."""
    c = stats.shape[2]
    _bn_merge_kernel[(groups, triton.cdiv(c, _MERGE_CHANNELS))](
        *(stats, mean, var, invstd, len(stats) // groups, c, eps),
        BT=_MERGE_TILES,
        BC=_MERGE_CHANNELS,
        num_warps=_MERGE_WARPS,
    )


@common.launcher
def bn_act_forward(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    y: Tensor,
) -> None:
    """``y = act((x - mean) · invstd · weight + bias)``; ``mean`` and ``invstd`` ``[groups, C]``."""
    c, groups = x.shape[1], len(mean)
    rows, block = x.numel() // (c * groups), _block(c)
    _bn_act_fwd_kernel[_grid(rows, c, groups, block)](
        *(x, mean, invstd, weight, bias, y, rows, c, negative_slope),
        ACTIVATION=activation,
        **block,
    )


@common.launcher
def bn_act_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    activation: str,
    negative_slope: float,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
) -> None:
    """``dx``, and ``dweight``, ``dbias`` ``[C]``, of what :func:`bn_act_forward` was given."""
    c, groups = x.shape[1], len(mean)
    rows, block = x.numel() // (c * groups), _block(c)
    tiles = stats_tiles(groups, rows, c)
    sums = gpu.empty(x, groups * tiles, 2, c)
    totals = gpu.empty(x, groups, 2, c)
    _bn_act_bwd_reduce_kernel[(groups * tiles, triton.cdiv(c, block["BC"]))](
        *(dy, x, mean, invstd, weight, bias, sums),
        *(rows, triton.cdiv(rows, tiles), tiles, c, negative_slope),
        ACTIVATION=activation,
        **block,
    )
    _bn_act_bwd_sum_kernel[(triton.cdiv(c, _MERGE_CHANNELS),)](
        *(sums, totals, dweight, dbias, groups, tiles, c),
        BT=_MERGE_TILES,
        BC=_MERGE_CHANNELS,
        num_warps=_MERGE_WARPS,
    )
    _bn_act_bwd_kernel[_grid(rows, c, groups, block)](
        *(dy, x, mean, invstd, weight, bias, totals, dx, rows, c, negative_slope),
        TRAINING=training,
        ACTIVATION=activation,
        **block,
    )


@common.launcher
def bn_update_running(
    mean: Tensor,
    var: Tensor,
    rows: int,
    momentum: float,
    running_mean: Tensor,
    running_var: Tensor,
) -> None:
    """Move the running statistics by those of each group, in order; ``rows`` to a group."""
    groups, c = mean.shape
    block = common.power_of_2(c, 32, 256)
    _bn_running_kernel[(triton.cdiv(c, block),)](
        *(mean, var, running_mean, running_var, groups, c, momentum, rows / (rows - 1)),
        BLOCK=block,
        num_warps=1,
    )
