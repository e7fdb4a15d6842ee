"""The convolution's Triton kernels: each direction, tile and dtype against float64."""

import pytest
import torch
from support.convolutions import DIRECTIONS, Sizes, ids, operands, projection, torchs, truth
from support.numerics import (
    DTYPES,
    EPS,
    GPU_DEVICE,
    TF32,
    alike,
    error,
    limit,
    needs_triton,
)
from support.planted_faults import DUPLICATES, NUMBERS, OUTSIDE, RACE, Fault, faults, planted

from fastgan import gpu
from fastgan.ops import triton
from fastgan.ops.activation import ACTIVATIONS

pytestmark = [
    needs_triton,
    pytest.mark.usefixtures("honest_triton", "nan_outputs"),
]
if not triton.missing_reasons():
    from fastgan.kernels import bn_act
    from fastgan.kernels import conv as kernels

    # Of which even small problems have several in each dimension, and the last ones in part.
    TINY = kernels.Tile(16, 16, 16, 4, 2)
    WIDE = kernels.Tile(16, 128, 16, 4, 2)

# What every dtype is tried on; between them they have tails in each dimension.
FEW = (
    Sizes(2, 5, 3, 4, 20),
    Sizes(2, 20, 3, 5, 3),  # thin
    Sizes(2, 32, 2, 3, 16),  # channels that are multiples of 16
    projection(5, 20, 5, (4, 4)),
    projection(5, 1, 70, (4, 4)),  # dot products, of more terms than a block
)
MANY = (
    *FEW,
    Sizes(1, 1, 2, 2, 1),
    Sizes(1, 5, 1, 1, 5),
    Sizes(2, 18, 3, 2, 2),
    Sizes(1, 3, 3, 3, 4),
    Sizes(2, 17, 2, 3, 12),  # thin, but not in dgrad
    Sizes(2, 5, 4, 5, 17, over=(1, 1)),
    Sizes(2, 5, 4, 5, 3, over=(1, 1)),
    Sizes(2, 7, 3, 5, 18, (3, 3), 1, 1),
    Sizes(1, 7, 5, 3, 3, (3, 3), 1, 1),
    Sizes(2, 6, 3, 2, 17, (5, 5), 3, 2),
    Sizes(2, 6, 3, 2, 3, (5, 5), 3, 2, (2, 2)),  # thin with nine classes
    Sizes(1, 5, 2, 3, 17, (2, 2), 3, 0, (1, 2)),  # pixels that no tap meets
    Sizes(2, 5, 2, 3, 2, (2, 3), 1, 0),
    Sizes(3, 18, 7, 7, 19, (1, 1), 1, 0),  # more tiles than are placed together
    projection(1, 18, 2, (7, 7)),
    projection(3, 4, 3, (4, 4)),
    projection(17, 5, 1, (3, 2)),
)


def problem_of(sizes, groups=1, dtype=torch.float32):
    return kernels.Problem.of(
        sizes.low, sizes.high, sizes.kernel, sizes.stride, sizes.padding, groups, dtype
    )


def run(problem, tile, direction, sizes, operands, bias=None, activation="none", stats=None):
    """By the kernels, with what is around the operands in memory full of NaN."""

    def placed(x):
        return None if x is None else alike(x, x.dtype, GPU_DEVICE, margin=64)

    low, high, weight = map(placed, operands)
    shapes = {"fprop": sizes.low, "dgrad": sizes.high, "wgrad": sizes.weight}
    n, c, h, w = shapes[direction]
    out = gpu.empty_images(low, n, c, h, w)
    if direction == "wgrad":
        kernels.conv_wgrad(problem, tile, low, high, out)
    else:
        kernel, x = (
            (kernels.conv_fprop, high) if direction == "fprop" else (kernels.conv_dgrad, low)
        )
        kernel(problem, tile, x, weight, placed(bias), activation, 0.2, out, stats)
    return out.cpu()


def check(direction, sizes, dtype=torch.float32, tiles=None):
    """All ``tiles``, or all that may be chosen, on sizes of one precision."""
    problem = problem_of(sizes, dtype=dtype)
    want, own = truth(direction, sizes, dtype)
    allowed = TF32 if problem.precision == "tf32" else limit(own, want)
    for tile in problem.tiles(direction) if tiles is None else tiles:
        got = run(problem, tile, direction, sizes, operands(sizes, dtype))
        assert got.dtype == dtype
        assert error(got, want) <= allowed, tile


def tiny(direction, sizes):
    """The tile for many programs, but not hundreds; dot products have one of their own."""
    problem = problem_of(sizes)
    if direction == "fprop" and problem.dots:
        return problem.tiles(direction)
    return (WIDE if direction != "fprop" and problem.ch > 512 else TINY,)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sizes", MANY, ids=ids)
def test_many_programs(sizes, direction):
    check(direction, sizes, tiles=tiny(direction, sizes))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sizes", FEW, ids=ids)
def test_many_programs_in_half_precision(sizes, direction, dtype):
    check(direction, sizes, dtype, tiny(direction, sizes))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sizes", FEW, ids=ids)
def test_tf32(fp32_precision, sizes, direction):
    fp32_precision("tf32")
    check(direction, sizes, tiles=tiny(direction, sizes))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_is_multiplied_as_torch_is_asked_to(fp32_precision, precision):
    fp32_precision(precision)
    sizes = FEW[0]
    problem = problem_of(sizes)
    if problem.precision == "ieee":
        pytest.skip("this GPU multiplies float32 as it is")
    assert problem.precision == ("tf32" if precision == "tf32" else "tf32x3")
    got = run(problem, TINY, "fprop", sizes, operands(sizes))
    wrong = error(got, truth("fprop", sizes)[0])
    # Three passes keep nearly all of the mantissa, one keeps 10 bits of it.
    assert wrong < 4 * EPS if precision == "ieee" else 2**-13 < wrong < TF32


# Of each kind that has tiles of its own.
CHOICES = (
    Sizes(2, 5, 3, 4, 20),
    Sizes(9, 20, 4, 4, 3),
    Sizes(1, 66, 2, 2, 68, (2, 2), 2, 0),
    projection(5, 20, 5, (4, 4)),
)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sizes", CHOICES, ids=ids)
def test_tiles_to_choose_from(sizes, direction, dtype):
    check(direction, sizes, dtype)


def test_tiles_that_are_taken_for_much_work(monkeypatch):
    """As small a problem cannot have as many rows: it is told that it has."""
    monkeypatch.setattr(kernels, "_MANY_ROWS", 1)
    monkeypatch.setattr(kernels, "_MANY_OUTPUTS", 1)
    sizes = Sizes(3, 130, 2, 2, 16, (2, 2), 2, 0)
    check("fprop", sizes, torch.bfloat16)
    check("dgrad", sizes, torch.bfloat16)


@pytest.fixture
def seven_multiprocessors(monkeypatch):
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(9, 5, 6, 6, 3),
        Sizes(9, 5, 6, 6, 17, (1, 1), 1, 0),
        projection(300, 5, 1, (3, 2)),
    ],
    ids=ids,
)
def test_wgrad_in_parts(seven_multiprocessors, sizes, dtype):
    rows = sizes.n * sizes.h * sizes.w
    parts, part_rows = kernels._parts(rows, TINY.k, 3, torch.device("cpu"))
    assert parts == 3 and rows % part_rows
    check("wgrad", sizes, dtype, (TINY,))


@pytest.mark.parametrize(
    ("rows", "k", "tiles", "multiprocessors", "parts"),
    [(1, 16, 1, 132, 1), (128, 16, 1, 132, 1), (129, 16, 1, 132, 2), (10**6, 32, 256, 132, 2),
     (10**6, 32, 264, 132, 1), (10**6, 32, 5, 132, 53), (10**6, 32, 1, 1, 2)],
)  # fmt: skip
def test_parts_hold_all_rows(monkeypatch, rows, k, tiles, multiprocessors, parts):
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: multiprocessors)
    got, part_rows = kernels._parts(rows, k, tiles, torch.device("cpu"))
    assert got == parts
    assert (got - 1) * part_rows < rows <= got * part_rows
    assert part_rows % k == 0


def check_sums(parts):
    size = 37
    sums = torch.randn(parts, size, generator=torch.Generator().manual_seed(0))
    out = torch.full((size,), torch.nan, dtype=torch.bfloat16, device=GPU_DEVICE)
    on_device = alike(sums, sums.dtype, GPU_DEVICE, margin=64)
    kernels._conv_wgrad_sum_kernel[(3,)](on_device, out, parts, size, BP=2, BLOCK=16)
    want = sums.double().sum(0)
    assert error(out.cpu(), want) <= limit(want.bfloat16(), want)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_are_added_up(parts):
    check_sums(parts)


EPILOGUES = (
    *(*FEW[:2], *FEW[3:]),
    Sizes(2, 5, 2, 3, 17, (2, 2), 3, 0, (1, 2)),
    projection(3, 4, 3, (4, 4)),  # dot products with a bias for each
)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
@pytest.mark.parametrize("sizes", EPILOGUES, ids=ids)
def test_bias_and_activation(sizes, direction, activation, dtype):
    channels = sizes.ch if direction == "dgrad" else sizes.cl
    bias = torch.randn(channels, generator=torch.Generator().manual_seed(1)).to(dtype)

    def finish(y):
        return ACTIVATIONS[activation](y + bias.to(y.dtype).view(1, -1, 1, 1), 0.2)

    want, own = (finish(y) for y in truth(direction, sizes, dtype))
    (tile,) = tiny(direction, sizes)
    problem, tensors = problem_of(sizes, dtype=dtype), operands(sizes, dtype)
    got = run(problem, tile, direction, sizes, tensors, bias, activation)
    assert error(got, want) <= limit(own, want)


def merged(stats, groups, slots, parts):
    """Count, mean and biased variance of each group and channel, in float64."""
    tiles = stats.double().view(groups, slots * parts, 3, -1)
    counts, means, m2s = tiles.unbind(2)
    count = counts.sum(1)
    mean = (counts * means).sum(1) / count
    return count, mean, (m2s + counts * (means - mean[:, None]).square()).sum(1) / count


def statistics(sizes, direction, groups, tile, dtype=torch.float32, weight=1.0, bias=None):
    """Those that the kernel sums as it writes, and what it has written, in float64."""
    problem = problem_of(sizes, groups, dtype)
    low, high, weights = operands(sizes, dtype)
    channels = sizes.ch if direction == "dgrad" else sizes.cl
    stats = gpu.empty(low.to(GPU_DEVICE), problem.stats_tiles(direction), 3, channels)
    tensors = low, high, weights * weight
    y = run(problem, tile, direction, sizes, tensors, bias, stats=stats).double()
    return problem, stats.cpu(), y


STATISTICS = (
    Sizes(6, 5, 2, 3, 20),
    Sizes(6, 20, 3, 3, 3),
    Sizes(6, 5, 2, 3, 3, over=(1, 1)),
    Sizes(6, 6, 2, 2, 17, (5, 5), 3, 2),
    Sizes(6, 5, 2, 3, 17, (2, 2), 3, 0, (1, 2)),
    projection(30, 18, 5, (3, 2)),
)


def check_statistics(direction, sizes, groups, rows):
    """Where those of a tile are of 16 rows, and the product's tiles have ``rows``."""
    channels = sizes.ch if direction == "dgrad" else sizes.cl
    bias, tile = torch.arange(1.0, 1.0 + channels), kernels.Tile(rows, 32, 16, 4, 2)
    problem, stats, y = statistics(sizes, direction, groups, tile, bias=bias)
    slots, parts = problem.stats_slots(direction), problem.stats_parts(direction)
    count, mean, var = merged(stats, groups, slots, parts)
    for g, part in enumerate(y.chunk(groups)):
        assert error(count[g], torch.full_like(count[g], part[:, 0].numel())) <= 0
        assert error(mean[g], part.mean((0, 2, 3))) <= 4 * EPS
        assert error(var[g], part.var((0, 2, 3), correction=0)) <= 4 * EPS
    # A tile fills its first slot and leaves nothing in its others.
    used = stats.view(groups, slots, parts, 3, -1)[:, :: rows // 16]
    assert int((stats[:, 0] > 0).sum()) == int((used[:, :, :, 0] > 0).sum()) > 0
    assert not stats[stats[:, :1].expand_as(stats) == 0].any()


@pytest.mark.parametrize(("groups", "rows"), [(1, 32), (2, 16), (3, 64)], ids=str)
@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
@pytest.mark.parametrize("sizes", STATISTICS, ids=ids)
def test_statistics(monkeypatch, sizes, direction, groups, rows):
    monkeypatch.setattr(kernels.Problem, "stats_rows", lambda self, direction: 16)
    check_statistics(direction, sizes, groups, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
def test_statistics_are_of_what_is_written(direction, dtype):
    """Rounded to its dtype, by a tile that may be chosen."""
    sizes = Sizes(6, 5, 3, 8, 18)
    tile = problem_of(sizes, 2, dtype).tiles(direction)[0]
    problem, stats, y = statistics(sizes, direction, 2, tile, dtype)
    slots, parts = problem.stats_slots(direction), problem.stats_parts(direction)
    _, mean, var = merged(stats, 2, slots, parts)
    for g, part in enumerate(y.chunk(2)):
        assert error(mean[g], part.mean((0, 2, 3))) < 4 * EPS
        assert error(var[g], part.var((0, 2, 3), correction=0)) < 4 * EPS


@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
@pytest.mark.parametrize(
    "sizes",
    [Sizes(4, 5, 8, 9, 17, (2, 2), 2, 0), Sizes(4, 5, 8, 9, 3), projection(140, 18, 5, (3, 2))],
    ids=ids,
)
def test_statistics_of_a_large_mean_and_a_small_deviation(sizes, direction):
    mean, deviation = 1e3, 1e-2
    scale = float(deviation / truth(direction, sizes)[0].std())
    channels = sizes.ch if direction == "dgrad" else sizes.cl
    bias = torch.full((channels,), mean)
    tile = kernels.Tile(64, 32, 16, 4, 2)
    _, stats, y = statistics(sizes, direction, 2, tile, weight=scale, bias=bias)
    got, var, invstd = (gpu.empty(stats.to(GPU_DEVICE), 2, channels) for _ in range(3))
    bn_act.bn_merge(stats.to(GPU_DEVICE), 1e-5, got, var, invstd, 2)
    # Of its deviation, y's own rounding is four times as much; plain sums are off by hundreds.
    allowed = EPS * mean / deviation / 4
    for g, part in enumerate(y.chunk(2)):
        assert error(got[g].cpu(), part.mean((0, 2, 3))) <= 2 * EPS
        exact = part.var((0, 2, 3), correction=0)
        assert error(var[g].cpu(), exact) <= allowed
        assert error(invstd[g].cpu(), (exact + 1e-5).rsqrt()) <= allowed


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "sizes", [Sizes(2, 5, 3, 3, 17), Sizes(2, 18, 3, 3, 3), projection(3, 2, 6, (2, 2))], ids=ids
)
def test_what_is_not_finite(sizes, direction, value):
    """Where torch's result is not finite ours is not; around it some may not be."""
    low, high, weight = (x.clone() for x in operands(sizes))
    low[1, 1, -1, 0] = high[0, 1, 1, -1] = value
    (tile,) = tiny(direction, sizes)
    problem = problem_of(sizes)
    got = ~run(problem, tile, direction, sizes, (low, high, weight)).isfinite()
    bad = ~torchs(direction, sizes, low, high, weight).isfinite()
    assert bad.any()
    assert got[bad].all()
    may = bad.clone()
    if direction == "wgrad":
        # A tap that reads beyond H there multiplies by 0.
        may[1] = may[:, 1] = True
    elif direction == "dgrad" and problem.thin_dgrad:
        # So do the taps that a pixel's class has not.
        around = bad.any(1, keepdim=True).float()
        may |= torch.nn.functional.max_pool2d(around, 3, 1, 1).bool()
    assert not got[~may].any()


PLAIN, THIN = Sizes(2, 5, 3, 4, 20), Sizes(2, 20, 3, 5, 3)
PARTS = Sizes(9, 5, 6, 6, 3)


def check_bias(direction, sizes):
    channels = sizes.ch if direction == "dgrad" else sizes.cl
    bias = torch.arange(1.0, 1.0 + channels)
    tiles = tiny(direction, sizes)
    got = run(problem_of(sizes), tiles[0], direction, sizes, operands(sizes), bias)
    want, own = (y + bias.to(y.dtype).view(1, -1, 1, 1) for y in truth(direction, sizes))
    assert error(got, want) <= limit(own, want)


# What finds the faults below, and passes without them.
CHECKS = {
    "fprop": lambda: check("fprop", PLAIN, tiles=[TINY]),
    "thin 3x3": lambda: check("fprop", Sizes(1, 7, 5, 3, 3, (3, 3), 1, 1), tiles=[TINY]),
    "thin fprop": lambda: check("fprop", THIN, tiles=[TINY]),
    "placed": lambda: check("fprop", Sizes(3, 18, 7, 7, 19, (1, 1), 1, 0), tiles=[TINY]),
    "dots": lambda: check("fprop", FEW[4]),
    "dgrad": lambda: check("dgrad", PLAIN, tiles=[TINY]),
    "over": lambda: check("dgrad", Sizes(2, 5, 2, 3, 17, over=(1, 1)), tiles=[TINY]),
    "odd dgrad": lambda: check("dgrad", Sizes(2, 6, 3, 2, 17, (5, 5), 3, 2), tiles=[TINY]),
    "thin dgrad": lambda: check("dgrad", THIN, tiles=[TINY]),
    "wgrad": lambda: check("wgrad", PLAIN, tiles=[TINY]),
    "thin wgrad": lambda: check("wgrad", THIN, tiles=[TINY]),
    "parts": lambda: check("wgrad", PARTS, tiles=[TINY]),
    "sums": lambda: check_sums(5),
    "fprop statistics": lambda: check_statistics("fprop", Sizes(12, 5, 2, 3, 20), 2, 32),
    "dgrad statistics": lambda: check_statistics("dgrad", Sizes(12, 5, 2, 3, 20), 2, 32),
    "projection statistics": lambda: check_statistics("dgrad", STATISTICS[5], 2, 16),
    "bias": lambda: check_bias("fprop", PLAIN),
    "bias of dots": lambda: check_bias("fprop", FEW[4]),
}


@pytest.fixture
def several_tiles(monkeypatch, seven_multiprocessors):
    monkeypatch.setattr(kernels.Problem, "stats_rows", lambda self, direction: 16)


@planted
@pytest.mark.parametrize("name", CHECKS)
def test_checks_pass_without_a_fault(several_tiles, name):
    CHECKS[name]()


@planted
@faults(
    # Masks.
    Fault(
        "_finish", "mask=real[:, None] & column[None, :]", "mask=column[None, :]", "fprop", OUTSIDE
    ),
    Fault(
        "_finish", "mask=real[:, None] & column[None, :]", "mask=real[:, None]", "fprop", DUPLICATES
    ),
    Fault("_finish", ", mask=real[:, None] & column[None, :]", "", "dgrad", OUTSIDE),
    Fault(
        "_finish",
        "bias_ptr + channel, mask=column, other=0.0",
        "bias_ptr + channel",
        "bias",
        OUTSIDE,
    ),
    Fault(
        "_conv_fprop_kernel",
        "real & (y >= 0) & (y < high_h)",
        "(y >= 0) & (y < high_h)",
        "fprop",
        OUTSIDE,
    ),
    Fault("_conv_fprop_kernel", "inside = (y >= 0) & ", "inside = ", "thin fprop", OUTSIDE),
    Fault(
        "_conv_fprop_kernel",
        "mask=inside[:, None] & some[None, :]",
        "mask=inside[:, None]",
        "fprop",
        OUTSIDE,
    ),
    Fault(
        "_conv_fprop_kernel",
        "(x < high_w)\n            some = b < ch",
        "(x <= high_w)\n            some = b < ch",
        "fprop",
        OUTSIDE,
    ),
    Fault(
        "_conv_fprop_kernel",
        "some = flat < KH * KW * ch",
        "some = flat <= KH * KW * ch",
        "thin 3x3",
        OUTSIDE,
    ),
    Fault(
        "_conv_dgrad_kernel",
        "real = real & (y < high_h) & (x < high_w)",
        "real = real & (y < high_h)",
        "over",
        RACE,
    ),
    Fault(
        "_conv_dgrad_kernel",
        "some = some & (ry + STRIDE * ty < KH) & ",
        "some = some & ",
        "odd dgrad",
        OUTSIDE,
    ),
    Fault("_conv_dgrad_kernel", "met = column & (u >= 0)", "met = column", "thin dgrad", OUTSIDE),
    Fault("_conv_wgrad_kernel", "real = row < end", "real = row <= end", "parts", OUTSIDE),
    Fault(
        "_conv_wgrad_kernel",
        "end = min(part * part_rows + part_rows, rows)",
        "end = rows",
        "parts",
        NUMBERS,
    ),
    Fault(
        "_conv_wgrad_kernel",
        "mask=(a < cl)[:, None] & column[None, :]",
        "mask=column[None, :]",
        "wgrad",
        OUTSIDE,
    ),
    Fault(
        "_conv_wgrad_kernel",
        "mask=(a < cl)[:, None] & column[None, :]",
        "mask=(a < cl)[:, None]",
        "wgrad",
        RACE,
    ),
    Fault("_conv_wgrad_sum_kernel", ", mask=i < size)", ")", "parts", OUTSIDE),
    Fault(
        "_conv_dot_kernel", "row * ch + b, mask=b < ch, other=0.0", "row * ch + b", "dots", OUTSIDE
    ),
    # What masked lanes hold.
    Fault(
        "_conv_fprop_kernel",
        "mask=inside[:, None] & some[None, :],\n                other=0.0,",
        "mask=inside[:, None] & some[None, :],",
        "fprop",
        NUMBERS,
    ),
    Fault(
        "_conv_wgrad_kernel",
        "mask=inside & column[None, :],\n            other=0.0,",
        "mask=inside & column[None, :],",
        "wgrad",
        NUMBERS,
    ),
    # By one.
    Fault(
        "_conv_fprop_kernel",
        "left = row % w * STRIDE - PADDING",
        "left = row % w * STRIDE - PADDING + 1",
        "fprop",
        NUMBERS,
    ),
    Fault("_conv_dgrad_kernel", "left = qx + j0", "left = qx + j0 + 1", "dgrad", NUMBERS),
    Fault(
        "_conv_dgrad_kernel",
        "weights = weight_ptr + (ry * KW + rx) * ch",
        "weights = weight_ptr + (ry * KW + rx + 1) * ch",
        "dgrad",
        OUTSIDE,
    ),
    Fault(
        "_conv_wgrad_kernel",
        "left = row % w * STRIDE - PADDING",
        "left = row % w * STRIDE - PADDING - 1",
        "wgrad",
        NUMBERS,
    ),
    Fault(
        "_conv_dot_kernel",
        "weight_ptr + a * ch + b",
        "weight_ptr + a * ch + b + 1",
        "dots",
        OUTSIDE,
    ),
    # What is left out.
    Fault(
        "_conv_fprop_kernel",
        "range(KH * KW * blocks)",
        "range((KH * KW - 1) * blocks)",
        "fprop",
        NUMBERS,
    ),
    Fault("_conv_fprop_kernel", "blocks = tl.cdiv(ch, BK)", "blocks = ch // BK", "fprop", NUMBERS),
    Fault(
        "_conv_fprop_kernel",
        "range(0, KH * KW * ch, BK)",
        "range(0, KH * KW * ch - BK, BK)",
        "thin fprop",
        NUMBERS,
    ),
    Fault(
        "_conv_dgrad_kernel",
        "range(TAPS * TAPS_X * blocks)",
        "range(TAPS * blocks)",
        "dgrad",
        NUMBERS,
    ),
    Fault(
        "_conv_dgrad_kernel",
        "LAST: tl.constexpr = (STRIDE - 1 + PADDING)",
        "LAST: tl.constexpr = PADDING",
        "thin dgrad",
        NUMBERS,
    ),
    Fault(
        "conv_dgrad",
        "(tiles_m * tiles_n, classes)",
        "(tiles_m * tiles_n, classes - 1)",
        "dgrad",
        NUMBERS,
    ),
    Fault(
        "conv_wgrad",
        "sums, out, parts, p.cl * size,",
        "sums, out, parts - 1, p.cl * size,",
        "parts",
        NUMBERS,
    ),
    Fault(
        "_parts",
        "return triton.cdiv(steps, part_steps)",
        "return steps // part_steps",
        "parts",
        NUMBERS,
    ),
    Fault(
        "_conv_dot_kernel", "range(0, ch, BLOCK)", "range(0, ch - BLOCK, BLOCK)", "dots", NUMBERS
    ),
    Fault(
        "_conv_dot_kernel",
        "z += tl.load(bias_ptr + a)",
        "z += 0 * tl.load(bias_ptr + a)",
        "bias of dots",
        NUMBERS,
    ),
    # Programs that meet.
    Fault("_place", "min(tiles_m - first, GROUP_M)", "GROUP_M", "placed", OUTSIDE),
    Fault(
        "_conv_fprop_kernel",
        "(pid_m % group_tiles) * BM + tl",
        "(pid_m % group_tiles) * (BM - 4) + tl",
        "fprop",
        RACE,
    ),
    Fault("_conv_fprop_kernel", "a = pid_n * BN + tl", "a = pid_n * (BN - 1) + tl", "placed", RACE),
    Fault(
        "_conv_dgrad_kernel",
        "class_ = tl.program_id(1)",
        "class_ = tl.program_id(1) % 3",
        "dgrad",
        RACE,
    ),
    Fault("_conv_wgrad_kernel", "out_ptr + part * cl * size + ", "out_ptr + ", "parts", RACE),
    Fault(
        "_conv_wgrad_kernel",
        "b = pid_n % blocks * BN + tl",
        "b = pid_n % blocks * (BN - 1) + tl",
        "wgrad",
        RACE,
    ),
    Fault(
        "_conv_wgrad_sum_kernel",
        "tl.program_id(0) * BLOCK",
        "tl.program_id(0) * (BLOCK - 1)",
        "sums",
        RACE,
    ),
    Fault(
        "_conv_dgrad_kernel",
        "column_at = (cy * high_w + cx) * ch + b",
        "column_at = (cy * high_w) * ch + b",
        "thin dgrad",
        DUPLICATES,
    ),
    # Statistics.
    Fault("_finish", "none + count if i == 0", "none + BM if i == 0", "fprop statistics", NUMBERS),
    Fault("_finish", "tl.where(real[:, None], y, 0.0)", "y", "fprop statistics", NUMBERS),
    Fault(
        "_finish",
        "tl.where(real[:, None], y - mean[None, :], 0.0)",
        "y - mean[None, :]",
        "dgrad statistics",
        NUMBERS,
    ),
    Fault(
        "_finish", "here = column & (slot + i < slots)", "here = column", "fprop statistics", RACE
    ),
    Fault("_finish", "range(BM // STATS_ROWS)", "range(1)", "fprop statistics", NUMBERS),
    Fault("_conv_fprop_kernel", "(BM // max(STATS_ROWS, 1))", "1", "fprop statistics", RACE),
    Fault(
        "_conv_dgrad_kernel",
        "part = class_ * taps + col // channels",
        "part = class_ * taps",
        "projection statistics",
        DUPLICATES,
    ),
    Fault(
        "_conv_dgrad_kernel",
        "part = class_ * taps + col // channels",
        "part = col // channels",
        "dgrad statistics",
        RACE,
    ),
)
def test_a_planted_fault_is_found(monkeypatch, tmp_path, several_tiles, fault):
    fault.plant(monkeypatch, "conv", tmp_path)
    with pytest.raises(AssertionError, match=fault.found):
        CHECKS[fault.check]()
