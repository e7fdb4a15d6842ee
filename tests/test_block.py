"""Convolution + batch norm + activation as one, and whole networks of it, against float64."""

import copy
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from support.numerics import (
    CPP,
    CUDA,
    DTYPES,
    LAYOUTS,
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
from torch import nn

from fastgan import DCGANDiscriminator, DCGANGenerator, Engine
from fastgan.errors import InputError, NotBuiltError
from fastgan.ops import conv as conv_ops
from fastgan.ops.activation import ACTIVATIONS
from fastgan.ops.backend import use_backend
from fastgan.ops.block import conv_bn_act, conv_transpose_bn_act

# n, input channels, input height and width, output channels, kernel, stride, padding.
BLOCKS = {
    "plain": (
        (8, 5, (8, 12), 16, 4, 2, 1),
        (64, 16, (8, 8), 24, 4, 2, 1),
        (128, 100, (4, 4), 64, 4, 2, 1),
        (2, 24, (64, 64), 5, 4, 2, 1),
        (8, 3, (16, 16), 24, 4, 2, 1),  # direct
        (64, 16, (4, 4), 5, 4, 1, 0),  # a matrix product
        (4, 5, (7, 6), 8, 3, 1, 1),  # torch's
    ),
    "transposed": (
        (8, 16, (4, 6), 5, 4, 2, 1),
        (64, 24, (4, 4), 16, 4, 2, 1),
        (128, 64, (2, 2), 100, 4, 2, 1),
        (2, 5, (32, 32), 24, 4, 2, 1),
        (8, 24, (8, 8), 3, 4, 2, 1),
        (64, 100, (1, 1), 16, 4, 1, 0),
        (4, 5, (7, 6), 8, 3, 1, 1),
    ),
}
CASES = [
    pytest.param(kind, sizes, id=f"{kind}-n{sizes[0]}-{sizes[1]}x{sizes[2][0]}x{sizes[2][1]}")
    for kind, all_sizes in BLOCKS.items()
    for sizes in all_sizes
]
OPS = {"plain": conv_bn_act, "transposed": conv_transpose_bn_act}


def winograd(kind, sizes):
    _, c, _, c_out, kernel, stride, _ = sizes
    return (kernel, stride) == (4, 2) and (c_out if kind == "transposed" else c) > 4


def arguments(kind, sizes, layout, bias):
    n, c, sides, c_out, kernel, stride, padding = sizes
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=draw)

    shape = (c, c_out) if kind == "transposed" else (c_out, c)
    weight = random(*shape, kernel, kernel) / math.sqrt(kernel * kernel * c)
    tensors = {
        "x": laid_out(random(n, c, *sides), layout),
        "weight": laid_out(weight, layout),
        "bias": random(c_out) if bias else None,
        "bn_weight": 1.0 + 0.3 * random(c_out),
        "bn_bias": random(c_out),
        "running_mean": 0.1 * random(c_out),
        "running_var": 0.5 + random(c_out).square(),
    }
    return tensors, {"stride": stride, "padding": padding}


def equivalent(kind, x, weight, bias, bn_weight, bn_bias, mean, var, step, training, groups):
    """Before the activation, as the docstrings have it."""
    convolve = F.conv_transpose2d if kind == "transposed" else F.conv2d
    y = convolve(x, weight, bias, **step)
    parts = y.chunk(groups) if training else [y]
    return torch.cat(
        [F.batch_norm(part, mean, var, bn_weight, bn_bias, training) for part in parts]
    )


def check(
    kind,
    sizes,
    activation,
    backend="cpp",
    layout="nhwc",
    training=True,
    bias=False,
    dtype=torch.float32,
    groups=2,
):
    tensors, step = arguments(kind, sizes, layout, bias)
    tensors = {name: None if t is None else alike(t, dtype) for name, t in tensors.items()}
    keep = {"training": training, "groups": groups}
    exact = [None if t is None else t.double() for t in tensors.values()]
    z = equivalent(kind, *exact, step, training, groups)
    dy = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    dy = laid_out(away_from_kinks(dy, z, activation).to(dtype), layout)

    def results(call, dtype, device="cpu"):
        *inputs, mean, var = tensors.values()
        inputs = leaves(*inputs, dtype=dtype, device=device)
        mean, var = alike(mean, dtype, device), alike(var, dtype, device)
        y = call(*inputs, mean, var)
        y.backward(alike(dy, dtype, device))
        found = dict(zip(tensors, (None if t is None else t.grad for t in inputs), strict=False))
        found |= {"y": y.detach(), "running_mean": mean, "running_var": var}
        return {name: None if t is None else t.cpu() for name, t in found.items()}

    def in_torch(*inputs):
        return ACTIVATIONS[activation](equivalent(kind, *inputs, step, training, groups), 0.2)

    def ours(*inputs):
        with use_backend(backend):
            return OPS[kind](*inputs, **step, **keep, activation=activation, negative_slope=0.2)

    want, own = results(in_torch, torch.float64), results(in_torch, dtype)
    got = results(ours, dtype, device_of(backend))
    # On the CPU torch sums float32 in float64, as no GPU does.
    floors = 2 if backend in ("triton", "cuda") else 1
    for name, w in want.items():
        if w is None:
            continue
        g, o = got[name], own[name]
        assert g.dtype == dtype
        if name == "bias" and training:
            # Batch norm takes it away again: its gradient is the rounding of a zero.
            rounding = 100 * torch.finfo(dtype).eps
            assert g.abs().max() <= rounding * want["bn_bias"].norm()
            continue
        winograd_s = winograd(kind, sizes) and backend not in ("triton", "cuda")
        assert error(g, w) <= (WINOGRAD if winograd_s else limit(o, w, floors)), name


@needs_kernels
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kind", "sizes"), CASES)
def test_block(nan_outputs, kind, sizes, activation, training):
    check(kind, sizes, activation, training=training)


@needs_kernels
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
@pytest.mark.parametrize("kind", OPS)
def test_layouts_backends_and_a_bias(nan_outputs, prefer, kind, backend, layout, training):
    prefer("winograd2")  # What a larger tile rounds depends on the draw of so few channels.
    check(kind, BLOCKS[kind][0], "leaky_relu", backend, layout, training, bias=True)


TRITON_BLOCKS = (
    ("plain", (4, 5, (6, 4), 20, 4, 2, 1)),
    ("plain", (4, 3, (5, 7), 6, 4, 2, 1)),
    ("plain", (12, 20, (4, 4), 6, 4, 1, 0)),
    ("transposed", (4, 20, (3, 2), 5, 4, 2, 1)),
    ("transposed", (4, 5, (3, 2), 18, 4, 2, 1)),
    ("transposed", (6, 18, (1, 1), 5, 4, 1, 0)),
)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("kind", "sizes"), TRITON_BLOCKS, ids=str)
def test_triton_block(nan_outputs, honest_triton, kind, sizes, training, dtype):
    check(kind, sizes, "tanh", "triton", training=training, dtype=dtype)


CUDA_BLOCKS = (
    ("plain", (4, 3, (10, 14), 20, 4, 2, 1)),
    ("plain", (12, 20, (4, 4), 6, 4, 1, 0)),
    ("plain", (12, 20, (4, 4), 2, 4, 1, 0)),  # dot products have no statistics
    ("plain", (2, 1, (70, 70), 5, 4, 2, 1)),  # more tiles of statistics than are merged at once
    ("transposed", (4, 20, (3, 2), 3, 4, 2, 1)),
    ("transposed", (2, 5, (9, 8), 2, 4, 2, 1)),
    ("transposed", (6, 18, (1, 1), 5, 4, 1, 0)),
    ("transposed", (4, 5, (3, 2), 18, 4, 2, 1)),
    ("transposed", (4, 16, (3, 4), 24, 4, 2, 1)),  # whole vectors
    ("plain", (4, 24, (6, 10), 16, 4, 2, 1)),
    ("plain", (4, 6, (5, 4), 7, 3, 1, 1)),
)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("kind", "sizes"), CUDA_BLOCKS, ids=str)
def test_cuda_block(nan_outputs, kind, sizes, training, dtype):
    check(kind, sizes, "tanh", "cuda", training=training, dtype=dtype)


@needs_triton
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", OPS)
def test_triton_layouts_groups_and_a_bias(
    nan_outputs, honest_triton, kind, layout, training, groups
):
    sizes = (4, 20, (4, 2), 5, 4, 2, 1)
    keep = {"layout": layout, "training": training, "groups": groups}
    check(kind, sizes, "leaky_relu", "triton", **keep, bias=True)


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("training", [True, False])
def test_float64_is_the_references(kind, training):
    tensors, step = arguments(kind, BLOCKS[kind][0], "nchw", bias=True)
    exact = [t.double() for t in tensors.values()]
    got = OPS[kind](*map(torch.clone, exact), **step, training=training, activation="none")
    want = equivalent(kind, *map(torch.clone, exact), step, training, 1)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
@pytest.mark.parametrize("kind", OPS)
def test_float64_is_refused_by_a_named_backend(kind, backend):
    tensors, step = arguments(kind, BLOCKS[kind][0], "nchw", bias=True)
    with use_backend(backend), pytest.raises(NotBuiltError, match="float64"):
        OPS[kind](*(t.double() for t in tensors.values()), **step)


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"groups": 3}, "groups=3 does not divide the batch of 8"), ({"activation": "sin"}, "'sin'")],
)
def test_refuses(kind, kwargs, message):
    tensors, step = arguments(kind, BLOCKS[kind][0], "nchw", bias=False)
    with pytest.raises(InputError, match=message):
        OPS[kind](*tensors.values(), **step, **kwargs)


@needs_kernels
@pytest.mark.parametrize("way", ["winograd4", "winograd2", "torch"])
@pytest.mark.parametrize("kind", OPS)
def test_statistics_of_a_large_mean_and_a_small_deviation(monkeypatch, nan_outputs, kind, way):
    """What the convolution sums as it writes serves for the batch norm."""
    monkeypatch.setattr(conv_ops._Cpp, "choose", lambda *args: way)
    tensors, step = arguments(kind, BLOCKS[kind][1], "nhwc", bias=True)
    x, weight, bias = tensors["x"], tensors["weight"], torch.full_like(tensors["bias"], 1e3)
    mean, var = torch.zeros_like(bias), torch.zeros_like(bias)
    convolve = functools.partial(conv_ops.conv, **step, transposed=kind == "transposed")
    weight *= 1e-2 / convolve(x, weight).std()
    with use_backend("cpp"):
        OPS[kind](x, weight, bias, None, None, mean, var, **step, momentum=1.0)
        y = convolve(x, weight, bias).double()
    assert error(mean, y.mean((0, 2, 3))) < 1e-7
    assert error(var, y.var((0, 2, 3))) < 1e-4


@pytest.mark.parametrize(
    ("compiler", "kind", "training", "backend"),
    [
        *(
            pytest.param("aot_eager", kind, training, *backend.values, marks=backend.marks)
            for kind, training, backend in itertools.product(
                OPS, [True, False], [CPP, TRITON, CUDA]
            )
        ),
        # Which takes its time: one block shows that what it writes fits.
        pytest.param("inductor", "plain", True, "cpp", marks=needs_kernels),
    ],
)
def test_compiled_whole(compiler, kind, training, backend):
    device = device_of(backend)
    tensors, step = arguments(kind, BLOCKS[kind][0], "nhwc", bias=True)
    call = functools.partial(OPS[kind], **step, training=training, groups=2, activation="tanh")
    found = []
    for function in (call, compiled(call, compiler)):
        *inputs, mean, var = tensors.values()
        inputs = leaves(*inputs, device=device)
        mean, var = mean.to(device, copy=True), var.to(device, copy=True)
        with use_backend(backend):
            y = function(*inputs, mean, var)
        y.sum().backward()
        found.append([y.detach(), mean, var, *(leaf.grad for leaf in inputs)])
    torch.testing.assert_close(*found)


class Recorder(Engine):
    """Keeps the gradients of every update."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradients = []

    def reduce_gradients(self, params):
        self.gradients.append([p.grad.clone() for p in params])


def smooth(network):
    """With tanh for every ReLU: at a kink, a rounding decides what a gradient is."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.LeakyReLU)):
                setattr(module, name, nn.Tanh())
    return network


@needs_kernels
@pytest.mark.parametrize("backend", ["cpp", "auto"])
@pytest.mark.parametrize("fuse_passes", [True, False])
@pytest.mark.parametrize(("size", "nc", "n"), [(28, 1, 16), (32, 3, 7), (64, 3, 8)])
def test_the_gradients_of_a_whole_step(backend, fuse_passes, size, nc, n):
    torch.manual_seed(0)
    netG = smooth(DCGANGenerator(20, 16, nc, size))
    netD = smooth(DCGANDiscriminator(16, nc, size))
    real, z = torch.rand(n, nc, size, size) * 2 - 1, torch.randn(n, 20, 1, 1)

    def gradients(backend, dtype):
        networks = [copy.deepcopy(network).to(dtype) for network in (netG, netD)]
        # Adam's first step is the sign of the gradient, whatever its size.
        opt_g, opt_d = (torch.optim.SGD(network.parameters(), lr=0.1) for network in networks)
        engine = Recorder(
            *networks,
            opt_g=opt_g,
            opt_d=opt_d,
            backend=backend,
            fuse_passes=fuse_passes,
            device="cpu",
        )
        engine.step(real.to(dtype), noise=z.to(dtype))
        return engine.gradients

    want, own = (gradients("reference", dtype) for dtype in (torch.float64, torch.float32))
    got = gradients(backend, torch.float32)
    depth = sum(isinstance(m, nn.Conv2d) for m in netD.modules())
    # Each pass goes through so many convolutions twice; G's through both networks.
    for exact, torchs, ours, passed in zip(want, own, got, (2 * depth, 4 * depth), strict=True):
        for w, o, g in zip(exact, torchs, ours, strict=True):
            assert error(g, w) <= max(limit(o, w), math.sqrt(passed) * WINOGRAD)
