"""The convolution: every kernel of it in every direction, and the op, against float64."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.convolutions import (
    DIRECTIONS,
    Sizes,
    ids,
    operands,
    projection,
    torchs,
    truth,
)
from support.numerics import (
    CPP,
    CUDA,
    DTYPES,
    GPU_DEVICE,
    LAYOUTS,
    TF32,
    TRITON,
    WINOGRAD,
    alike,
    away_from_kinks,
    compiled,
    device_of,
    error,
    laid_out,
    leaves,
    limit,
    needs_cuda,
    needs_kernels,
    needs_triton,
)

from fastgan import gpu, saying
from fastgan.errors import InputError, NotBuiltError
from fastgan.ops import conv as ops
from fastgan.ops import cpp
from fastgan.ops.activation import ACTIVATIONS
from fastgan.ops.backend import use_backend
from fastgan.ops.conv import conv

WINOGRADS = ("winograd4", "winograd3", "winograd2")


def ways(sizes):
    """All that can compute it, whether or not they would be chosen."""
    if sizes.padding == 0:
        return ("matmul", "torch")
    return (*WINOGRADS, *(["thin"] if sizes.ch <= 4 else []), "torch")


def kernels_of(sizes, groups=0, kind=ops._Cpp):
    step = sizes.stride, sizes.padding
    problem = ops._problem(sizes.low, sizes.high, sizes.weight, *step, groups)
    return kind(problem, torch.float32)


SMALL = (
    Sizes(1, 1, 2, 2, 1),
    Sizes(1, 5, 1, 1, 5),
    Sizes(1, 3, 2, 9, 24),
    Sizes(7, 3, 3, 5, 16),
    Sizes(7, 24, 5, 4, 5),
    Sizes(7, 16, 6, 7, 3),
    Sizes(7, 5, 4, 4, 2),
    Sizes(7, 100, 3, 3, 4),
    Sizes(64, 16, 4, 4, 24),
    Sizes(128, 5, 2, 3, 64),
    Sizes(128, 3, 2, 2, 1),
    projection(7, 100, 24, (4, 4)),
    projection(64, 1, 16, (2, 3)),
    projection(1, 5, 3, (7, 7)),
)
LARGE = (
    Sizes(1, 512, 4, 4, 100),
    Sizes(1, 64, 32, 32, 3),
    Sizes(1, 16, 32, 32, 64),
    Sizes(7, 100, 8, 4, 512),
    Sizes(64, 64, 4, 4, 512),
    Sizes(64, 512, 4, 4, 64),
    Sizes(64, 16, 32, 32, 5),  # several chunks of the batch, and weights that are kept for all
    Sizes(64, 16, 32, 32, 3),
    Sizes(128, 64, 8, 8, 5),
    Sizes(128, 100, 8, 8, 1),
    projection(128, 100, 512, (4, 4)),
)


def cases(all_sizes):
    return [
        pytest.param(sizes, way, id=f"{ids(sizes)}-{way}")
        for sizes in all_sizes
        for way in ways(sizes)
    ]


def run(way, direction, sizes, low, high, weight, epilogue=None, groups=0, kind=ops._Cpp):
    kernels = kernels_of(sizes, groups, kind)
    if direction == "wgrad":
        return kernels.wgrad(way, low, high)
    transposed = direction == "dgrad"
    x = low if transposed else high
    return kernels.forward(way, transposed, x, weight, epilogue or ops._Epilogue())


def check_kernel(sizes, way):
    tensors = operands(sizes)
    for direction in DIRECTIONS:
        # What the kernels leave in their scratch memory must not matter to the next call.
        run(way, direction, sizes, *(torch.full_like(x, torch.nan) for x in tensors))
        got = run(way, direction, sizes, *tensors)
        want, own = truth(direction, sizes)
        allowed = WINOGRAD if way in WINOGRADS else limit(own, want)
        assert error(got, want) <= allowed, direction


@pytest.mark.parametrize("sizes", [Sizes(2, 3, 2, 3, 2), projection(2, 3, 2, (2, 3))], ids=ids)
def test_torch_computes_the_formulas(sizes):
    """The three of the module's docstring, term by term."""
    low, high, weight = (x.double().numpy() for x in operands(sizes))
    fprop, dgrad, wgrad = (np.zeros(shape) for shape in (sizes.low, sizes.high, sizes.weight))
    for i, j, u, v in itertools.product(*map(range, (sizes.h, sizes.w, *sizes.kernel))):
        y, x = sizes.stride * i + u - sizes.padding, sizes.stride * j + v - sizes.padding
        if 0 <= y < sizes.high[2] and 0 <= x < sizes.high[3]:
            fprop[..., i, j] += high[..., y, x] @ weight[..., u, v].T
            dgrad[..., y, x] += low[..., i, j] @ weight[..., u, v]
            wgrad[..., u, v] += low[..., i, j].T @ high[..., y, x]
    for direction, want in zip(DIRECTIONS, (fprop, dgrad, wgrad), strict=True):
        np.testing.assert_allclose(truth(direction, sizes)[0], want, rtol=1e-12, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize(("sizes", "way"), cases(SMALL + LARGE))
def test_kernel(nan_outputs, sizes, way):
    check_kernel(sizes, way)


@needs_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize(("sizes", "way"), cases(SMALL))
def test_kernel_of_each_instruction_set(nan_outputs, use_isa, isa, sizes, way):
    if isa not in cpp.kernels().isas():
        pytest.skip(f"this CPU has no {isa}")
    use_isa(isa)
    check_kernel(sizes, way)


EPILOGUES = (
    Sizes(6, 5, 3, 5, 24),
    Sizes(6, 24, 4, 4, 3),
    Sizes(24, 16, 16, 16, 5),
    projection(6, 5, 16, (4, 4)),
)


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
@pytest.mark.parametrize(("sizes", "way"), cases(EPILOGUES))
def test_epilogue(nan_outputs, sizes, way, direction, activation):
    tensors = operands(sizes)
    groups = 3
    transposed = direction == "dgrad"
    channels = sizes.ch if transposed else sizes.cl
    bias = torch.randn(channels, generator=torch.Generator().manual_seed(1))
    stats = cpp.empty(kernels_of(sizes, groups).stats_tiles(transposed), 3, channels)
    epilogue = ops._Epilogue(bias, activation, 0.2, stats if len(stats) else None)
    got = run(way, direction, sizes, *tensors, epilogue, groups)

    def finish(y):
        return ACTIVATIONS[activation](y + bias.to(y.dtype).view(1, -1, 1, 1), 0.2)

    want, own = (finish(y) for y in truth(direction, sizes))
    assert error(got, want) <= (WINOGRAD if way in WINOGRADS else limit(own, want))
    if len(stats):
        mean, var = merged(stats, groups)
        for g, part in enumerate(got.double().chunk(groups)):
            assert error(mean[g], part.mean((0, 2, 3))) < 1e-6
            assert error(var[g], part.var((0, 2, 3), correction=0)) < 1e-6


def merged(stats, groups):
    mean, var = (torch.empty(groups, stats.shape[2]) for _ in range(2))
    cpp.kernels().bn_merge(
        groups,
        len(stats) // groups,
        stats.shape[2],
        stats.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
    )
    return mean, var


@needs_kernels
@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
@pytest.mark.parametrize("way", [*WINOGRADS, "torch"])
def test_statistics_of_a_large_mean_and_a_small_deviation(nan_outputs, way, direction):
    sizes = Sizes(16, 16, 16, 16, 24)
    low, high, weight = operands(sizes)
    transposed = direction == "dgrad"
    channels = sizes.ch if transposed else sizes.cl
    scale = 1e-2 / truth(direction, sizes)[0].std()
    stats = cpp.empty(kernels_of(sizes, 2).stats_tiles(transposed), 3, channels)
    epilogue = ops._Epilogue(torch.full((channels,), 1e3), stats=stats)
    y = run(way, direction, sizes, low, high, weight * scale.float(), epilogue, 2)
    mean, var = merged(stats, 2)
    for g, part in enumerate(y.double().chunk(2)):
        assert error(mean[g], part.mean((0, 2, 3))) < 1e-7
        assert error(var[g], part.var((0, 2, 3), correction=0)) < 1e-4


@needs_kernels
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38], ids=["nan", "inf", "overflow"])
@pytest.mark.parametrize(("sizes", "way"), cases([Sizes(3, 5, 9, 7, 24), Sizes(3, 24, 9, 7, 3)]))
def test_what_is_not_finite(nan_outputs, sizes, way, value):
    """Where torch's result is not finite ours is not; by Winograd some around it may not be."""
    low, high, weight = (x.clone() for x in operands(sizes))
    low[1, 2, 4, 3] = high[1, 2, 8, 7] = value
    for direction in DIRECTIONS:
        bad = ~torchs(direction, sizes, low, high, weight).isfinite()
        got = ~run(way, direction, sizes, low, high, weight).isfinite()
        assert bad.any()
        assert got[bad].all(), direction
        if direction == "wgrad":
            # A channel of either side meets all of the other's.
            may = torch.zeros_like(got)
            may[2] = may[:, 2] = True
        else:
            # A tile has all channels, and up to 10 pixels a side.
            may = bad
            if way in WINOGRADS:
                may = F.max_pool2d(bad.any(1, keepdim=True).float(), 19, 1, 9).bool()
            may = may.expand_as(got)
        assert not got[~may].any(), direction


OP_SIZES = (
    Sizes(1, 3, 2, 9, 24),
    Sizes(7, 24, 5, 4, 5),
    Sizes(7, 16, 6, 7, 3),
    Sizes(64, 16, 4, 4, 64),
    Sizes(128, 5, 2, 3, 1),
    Sizes(7, 16, 16, 16, 16),
    Sizes(1, 100, 2, 2, 512),
    projection(7, 24, 5, (4, 4)),
    Sizes(2, 3, 5, 6, 4, (3, 3), 1, 1),  # torch's
)


# By Winograd, directly, as a matrix product.
ONE_OF_EACH = (OP_SIZES[1], OP_SIZES[2], OP_SIZES[7])


def by_winograd(sizes):
    return sizes.kernel == (4, 4) and sizes.stride == 2 and sizes.ch > 4


def check_op(sizes, transposed, activation, layout, backend, dtype=torch.float32):
    inner, outer = (sizes.low, sizes.high) if transposed else (sizes.high, sizes.low)
    draw = torch.Generator().manual_seed(2)
    x, weight, dy = (
        laid_out(torch.randn(shape, generator=draw), layout)
        for shape in (inner, sizes.weight, outer)
    )
    # Before a tanh of about unit variance: where it saturates, its slope is all rounding.
    terms = math.prod(sizes.kernel) * inner[1] / (sizes.stride**2 if transposed else 1)
    weight /= math.sqrt(terms)
    bias = torch.randn(outer[1], generator=draw)
    x, weight, bias = (alike(t, dtype) for t in (x, weight, bias))
    step = {"stride": sizes.stride, "padding": sizes.padding, "transposed": transposed}
    z = conv(x.double(), weight.double(), bias.double(), **step)
    dy = laid_out(away_from_kinks(dy, z, activation).to(dtype), layout)

    def results(backend, dtype, device="cpu"):
        arguments = leaves(x, weight, bias, dtype=dtype, device=device)
        with use_backend(backend):
            y = conv(*arguments, **step, activation=activation)
            y.backward(alike(dy, dtype, device))
        return [t.detach().cpu() for t in (y, *(tensor.grad for tensor in arguments))]

    want, own = results("reference", torch.float64), results("reference", dtype)
    got = results(backend, dtype, device_of(backend))
    for name, g, w, o in zip(("y", "dx", "dweight", "dbias"), got, want, own, strict=True):
        winograd = by_winograd(sizes) and backend not in ("triton", "cuda")
        assert g.dtype == dtype
        # Of one number, as a bias of one channel has, torch's own error may be none.
        floors = 4 if backend == "cuda" else 1
        assert error(g, w) <= (WINOGRAD if winograd else limit(o, w, floors)), name


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("sizes", OP_SIZES, ids=ids)
@pytest.mark.parametrize("backend", ["cpp", "auto"])
def test_op(nan_outputs, backend, sizes, transposed, layout):
    check_op(sizes, transposed, "tanh", layout, backend)


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("sizes", ONE_OF_EACH, ids=ids)
def test_op_with_each_activation(nan_outputs, sizes, transposed, activation):
    check_op(sizes, transposed, activation, "nhwc", "cpp")


# A convolution; thin, by dot products, as a product; with a stride of 1.
TRITON_SIZES = (
    Sizes(3, 5, 3, 4, 20),
    Sizes(1, 20, 3, 5, 3),
    projection(5, 1, 20, (4, 4)),
    projection(4, 20, 5, (2, 3)),
    Sizes(2, 7, 5, 3, 6, (3, 3), 1, 1),
)
TRANSPOSED = pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@TRANSPOSED
@pytest.mark.parametrize("sizes", TRITON_SIZES, ids=ids)
def test_triton_op(nan_outputs, honest_triton, sizes, transposed, dtype):
    check_op(sizes, transposed, "tanh", "nhwc", "triton", dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@TRANSPOSED
@pytest.mark.parametrize("layout", ["nchw", "strided"])
def test_triton_op_copies_other_layouts(nan_outputs, honest_triton, layout, transposed, dtype):
    check_op(TRITON_SIZES[1], transposed, "tanh", layout, "triton", dtype)


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
@TRANSPOSED
def test_triton_op_with_each_activation(nan_outputs, honest_triton, transposed, activation):
    check_op(TRITON_SIZES[1], transposed, activation, "nhwc", "triton")


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [Sizes(2, 5, 2, 3, 17, over=(1, 1)), Sizes(2, 5, 2, 2, 3, (2, 2), 3, 0, (2, 1))],
    ids=ids,
)
def test_triton_op_where_the_stride_leaves_pixels_over(nan_outputs, honest_triton, sizes, dtype):
    check_op(sizes, False, "tanh", "nhwc", "triton", dtype)


def check_act_backward(activation, count, backend, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    x, dy = (3 * torch.randn(1, count, 1, 3, generator=draw).to(dtype) for _ in range(2))
    x[0, 0, 0, 0] = 0.0
    leaf = x.clone().requires_grad_()
    y = ACTIVATIONS[activation](leaf, 0.2)
    y.backward(dy)
    # From y as it is: its rounding is another op's.
    if activation == "tanh":
        slope = 1 - y.detach().double().square()
    else:
        below = {"none": 1.0, "relu": 0.0, "leaky_relu": 0.2}[activation]
        slope = torch.where(y > 0, 1.0, below).double()
    device = device_of(backend)
    got = ops.act_backward(dy.to(device), y.detach().to(device), activation, 0.2, backend).cpu()
    want = dy.double() * slope
    assert got.dtype == dtype
    assert error(got, want) <= limit(leaf.grad, want)


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("count", [1, 15, 16, 100])
def test_act_backward(nan_outputs, activation, count):
    check_act_backward(activation, count, "cpp")


@pytest.mark.parametrize("backend", [TRITON, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("count", [1, 1000])
def test_act_backward_on_gpus(nan_outputs, honest_triton, count, activation, dtype, backend):
    check_act_backward(activation, count, backend, dtype)


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
@pytest.mark.parametrize(("sizes", "way"), cases([Sizes(2, 5, 3, 3, 24), Sizes(2, 24, 3, 3, 3)]))
def test_activations_of_what_is_not_finite(nan_outputs, sizes, way, direction, activation):
    low, high, weight = operands(sizes)
    bias = torch.zeros(sizes.cl if direction == "fprop" else sizes.ch)
    bias[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    z = truth(direction, sizes)[1] + bias.view(1, -1, 1, 1)
    z.requires_grad_()
    want = ACTIVATIONS[activation](z, 0.2)
    got = run(way, direction, sizes, low, high, weight, ops._Epilogue(bias, activation, 0.2), 1)
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-3, atol=1e-3)

    dy = torch.ones_like(want)
    dy[0] = torch.nan
    want.backward(dy)
    dz = ops.act_backward(dy, want.detach(), activation, 0.2, "cpp")
    torch.testing.assert_close(dz, z.grad, equal_nan=True)


@pytest.mark.parametrize("backend", [pytest.param("auto", marks=needs_kernels), CPP, TRITON, CUDA])
@pytest.mark.parametrize(
    "arguments",
    [
        {"bias": torch.zeros(5)},
        {"bias": torch.zeros(7)},
        {"bias": torch.zeros(())},
        {"weight": torch.zeros(6, 4, 4, 4)},
        {"x": torch.zeros(2, 3, 8)},
        {"stride": 0},
        {"padding": -1},
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_as_torch_does(backend, arguments):
    usual = {"x": torch.zeros(2, 5, 8, 8), "weight": torch.zeros(6, 5, 4, 4), "bias": None}

    def call(**arguments):
        device = device_of(backend)
        on_device = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in {**usual, "stride": 2, "padding": 1, **arguments}.items()
        }
        return conv(**on_device)

    with use_backend(backend):
        call()
        with pytest.raises(RuntimeError):
            call(**arguments)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_unknown_activation_is_refused(backend):
    with use_backend(backend), pytest.raises(InputError, match="'sin'"):
        conv(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), activation="sin")


def reproducible(sizes, backend="cpp"):
    """All that one forward and backward pass in either direction writes."""
    device = device_of(backend)
    results = []
    for transposed in (False, True):
        inner, outer = (sizes.low, sizes.high) if transposed else (sizes.high, sizes.low)
        draw = torch.Generator().manual_seed(3)
        x, weight, dy = (torch.randn(s, generator=draw) for s in (inner, sizes.weight, outer))
        x, weight, bias = leaves(x, weight, torch.ones(outer[1]), device=device)
        step = {"stride": sizes.stride, "padding": sizes.padding}
        with use_backend(backend):
            y = conv(x, weight, bias, **step, transposed=transposed, activation="leaky_relu")
            y.backward(dy.to(device))
        results += [y.detach(), x.grad, weight.grad, bias.grad]
    return results


REPEATED = (
    Sizes(64, 16, 8, 8, 24),
    Sizes(9, 40, 6, 6, 20),
    Sizes(17, 24, 8, 8, 3),
    projection(16, 100, 24, (4, 4)),
)


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("sizes", REPEATED, ids=ids)
def test_twenty_repeats_agree_bit_for_bit(threads, sizes, count):
    threads(count)
    first = reproducible(sizes)
    for _ in range(19):
        assert all(map(torch.equal, reproducible(sizes), first))


# Thin, with and without whole vectors; products, of 8 channels and by elements; dot products; and
# sides that the stride leaves something of.
CUDA_SIZES = (
    Sizes(3, 20, 5, 7, 3),
    Sizes(2, 72, 3, 20, 1),
    Sizes(2, 24, 5, 7, 40),
    projection(6, 20, 5, (3, 2)),
    projection(5, 3, 8, (4, 4)),
    Sizes(2, 7, 5, 3, 6, (3, 3), 1, 1),
    Sizes(2, 16, 3, 4, 8, (5, 5), 2, 2, (1, 0)),
)


def fits(sizes, transposed):
    """A transposed op's result has nothing that the stride leaves over."""
    return not (transposed and any(sizes.over))


CUDA_PROBLEMS = pytest.mark.parametrize(
    ("sizes", "transposed"),
    [
        pytest.param(
            sizes, transposed, id=f"{ids(sizes)}-{'transposed' if transposed else 'plain'}"
        )
        for sizes, transposed in itertools.product(CUDA_SIZES, (False, True))
        if fits(sizes, transposed)
    ],
)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@CUDA_PROBLEMS
def test_cuda_op(nan_outputs, sizes, layout, dtype, transposed):
    check_op(sizes, transposed, "tanh", layout, "cuda", dtype)


@needs_cuda
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", CUDA_SIZES[:3:2], ids=ids)
@TRANSPOSED
def test_cuda_op_with_each_activation(nan_outputs, transposed, sizes, activation):
    check_op(sizes, transposed, activation, "nhwc", "cuda")


@needs_cuda
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sizes", [Sizes(3, 80, 5, 7, 96), projection(70, 80, 16, (3, 3))], ids=ids)
def test_every_tile_of_cuda(nan_outputs, sizes, direction):
    want, own = truth(direction, sizes)
    tensors = [x.to(GPU_DEVICE) for x in operands(sizes)]
    ways = kernels_of(sizes, kind=ops._Cuda).ways(direction)
    assert len(ways) > 1
    for way in ways:
        got = run(way, direction, sizes, *tensors, kind=ops._Cuda)
        assert error(got.cpu(), want) <= limit(own, want, 4), way


@needs_cuda
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tf32_of_cuda(nan_outputs, fp32_precision, direction):
    """Operands of 11 bits: off by no more, and by no less than what three passes leave."""
    fp32_precision("tf32")
    sizes = Sizes(3, 24, 5, 7, 40)
    way = kernels_of(sizes, kind=ops._Cuda).ways(direction)[0]
    got = run(way, direction, sizes, *(x.to(GPU_DEVICE) for x in operands(sizes)), kind=ops._Cuda)
    assert 1e-5 < error(got.cpu(), truth(direction, sizes)[0]) <= TF32


@needs_cuda
@pytest.mark.parametrize("sizes", CUDA_SIZES[:-1], ids=ids)
def test_cuda_repeats_and_parts(nan_outputs, monkeypatch, sizes):
    """On any number of multiprocessors, and to the bit the same on one."""
    want = reproducible(sizes, "reference")
    for multiprocessors in (1, 108):
        monkeypatch.setattr(gpu, "multiprocessors", lambda device, n=multiprocessors: n)
        first = reproducible(sizes, "cuda")
        assert all(map(torch.equal, reproducible(sizes, "cuda"), first))
        for g, w in zip(first, want, strict=True):
            assert error(g.cpu(), w.double()) < WINOGRAD


@needs_cuda
def test_shapes_that_cuda_leaves_to_torch_are_said(monkeypatch, caplog):
    monkeypatch.setattr(saying, "_said", set())
    x, weight = (torch.randn(s, device=GPU_DEVICE) for s in ((2, 5, 24, 8), (6, 5, 17, 1)))
    with use_backend("cuda"):
        got = conv(x, weight, stride=2)
    assert torch.equal(got, F.conv2d(x, weight, stride=2))
    (record,) = caplog.records
    assert "'cuda' has no kernel for conv of a [6, 5, 17, 1] weight" in record.getMessage()


@needs_cuda
@TRANSPOSED
@pytest.mark.parametrize("sizes", CUDA_SIZES[1:4], ids=ids)
@pytest.mark.parametrize(("activation", "groups"), [("none", 1), ("tanh", 0)])
def test_opcheck_of_cuda(sizes, transposed, activation, groups):
    opcheck_forward(sizes, transposed, activation, groups, "cuda")
    opcheck_gradients(sizes, "cuda")


@needs_triton
@pytest.mark.parametrize("sizes", TRITON_SIZES[1:3], ids=ids)
def test_triton_repeats_agree_bit_for_bit(sizes):
    first = reproducible(sizes, "triton")
    for _ in range(1 if GPU_DEVICE == "cpu" else 19):
        assert all(map(torch.equal, reproducible(sizes, "triton"), first))


@needs_kernels
@pytest.mark.parametrize("sizes", REPEATED, ids=ids)
def test_thread_counts_agree_to_rounding(threads, sizes):
    threads(1)
    want = reproducible(sizes)
    for count in (2, 4):
        threads(count)
        for g, w in zip(reproducible(sizes), want, strict=True):
            assert error(g, w.double()) <= WINOGRAD


def opcheck_forward(sizes, transposed, activation, groups, backend):
    device = device_of(backend)
    x, weight = (
        torch.randn(shape, device=device, requires_grad=True)
        for shape in (sizes.low if transposed else sizes.high, sizes.weight)
    )
    channels = sizes.ch if transposed else sizes.cl
    bias = torch.randn(channels, device=device, requires_grad=True)
    step = sizes.stride, sizes.padding
    rest = sizes.over if transposed else (0, 0)
    torch.library.opcheck(
        ops.conv_forward,
        (x, weight, bias, *step, transposed, activation, 0.2, groups, backend, *rest),
    )


def opcheck_gradients(sizes, backend):
    low, high = (torch.randn(shape, device=device_of(backend)) for shape in (sizes.low, sizes.high))
    step = sizes.stride, sizes.padding
    torch.library.opcheck(ops.conv_wgrad, (low, high, list(sizes.kernel), *step, backend))
    torch.library.opcheck(ops.act_backward, (low, low.tanh(), "tanh", 0.0, backend))


@needs_kernels
@pytest.mark.parametrize("sizes", ONE_OF_EACH, ids=ids)
@TRANSPOSED
@pytest.mark.parametrize("activation", ["none", "tanh"])
@pytest.mark.parametrize("groups", [0, 1])
def test_opcheck_of_the_forward(sizes, transposed, activation, groups):
    opcheck_forward(sizes, transposed, activation, groups, "cpp")


@needs_kernels
@pytest.mark.parametrize("sizes", ONE_OF_EACH, ids=ids)
def test_opcheck_of_the_gradients(sizes):
    opcheck_gradients(sizes, "cpp")


@needs_triton
@TRANSPOSED
@pytest.mark.parametrize(("activation", "groups"), [("none", 2), ("tanh", 0)])
def test_opcheck_of_the_triton_forward(transposed, activation, groups):
    opcheck_forward(Sizes(2, 5, 2, 3, 6, over=(1, 0)), transposed, activation, groups, "triton")


@needs_triton
def test_opcheck_of_the_triton_gradients():
    opcheck_gradients(Sizes(2, 5, 2, 3, 6, over=(1, 0)), "triton")


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
@TRANSPOSED
@pytest.mark.parametrize("activation", ["none", "tanh"])
def test_a_double_backward_raises_or_is_right(backend, transposed, activation):
    """Where a gradient of a gradient comes back, it is the reference's."""
    sizes = Sizes(2, 3, 4, 4, 6)
    low, high, weight = operands(sizes)
    x = low if transposed else high
    call = functools.partial(conv, stride=2, padding=1, transposed=transposed)

    def second(backend, of):
        inputs = leaves(x, 0.1 * weight, device=device_of(backend))
        with use_backend(backend):
            y = call(*inputs, activation=activation)
            first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
            return torch.autograd.grad(first[of].square().sum(), inputs)

    for of in (0, 1):
        try:
            got = second(backend, of)
        except RuntimeError as refusal:
            assert "no autograd formula was registered" in str(refusal)
        else:
            for g, w in zip(got, second("reference", of), strict=True):
                assert error(g.cpu(), w.double()) <= 1e-5


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [
        *(
            pytest.param(*case, marks=needs_kernels)
            for case in itertools.product(["cpp", "auto", "reference"], ONE_OF_EACH)
        ),
        *(
            pytest.param("triton", sizes, marks=needs_triton)
            for sizes in (Sizes(2, 5, 2, 3, 18), projection(3, 5, 7, (4, 4)))
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else ids(value),
)
def test_compiled_whole(backend, sizes):
    device = device_of(backend)
    x = torch.randn(sizes.high, device=device, requires_grad=True)
    weight = torch.randn(sizes.weight, device=device)
    call = functools.partial(conv, stride=sizes.stride, padding=sizes.padding)

    def there_and_back(x, weight):
        y = call(x, weight, activation="leaky_relu")
        return call(y, weight, transposed=True).square().sum()

    with use_backend(backend):
        (want,) = torch.autograd.grad(there_and_back(x, weight), x)
        (got,) = torch.autograd.grad(compiled(there_and_back)(x, weight), x)
    torch.testing.assert_close(got, want)


def test_float64_is_the_references():
    x, weight = (torch.randn(s, dtype=torch.float64) for s in ((2, 5, 8, 8), (6, 5, 4, 4)))
    assert torch.equal(conv(x, weight, stride=2, padding=1), F.conv2d(x, weight, None, 2, 1))


@needs_kernels
def test_float64_is_refused_by_a_named_backend():
    x, weight = (torch.randn(s, dtype=torch.float64) for s in ((2, 5, 8, 8), (6, 5, 4, 4)))
    with use_backend("cpp"), pytest.raises(NotBuiltError, match="float64"):
        conv(x, weight, stride=2, padding=1)
