"""Batch norm + activation: the reference against the formula, the kernels against float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.numerics import (
    CPP,
    CUDA,
    DTYPES,
    GPU_DEVICE,
    LAYOUTS,
    TRITON,
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
from support.planted_faults import NUMBERS, OUTSIDE, RACE, Fault, faults, planted

from fastgan import bn_act
from fastgan.errors import InputError, NotBuiltError
from fastgan.ops import cpp, triton
from fastgan.ops.activation import ACTIVATIONS
from fastgan.ops.backend import use_backend
from fastgan.ops.bn_act import bn_act_backward, bn_act_forward, bn_update_running

EPS = 1e-5
# groups, and the shape of the whole batch.
SHAPES = (
    (1, (7, 3, 1, 1)),
    (1, (1, 1, 4, 4)),
    (1, (1, 512, 4, 4)),
    (2, (64, 5, 4, 6)),
    (3, (6, 16, 7, 5)),
    (2, (128, 24, 8, 8)),
    (1, (7, 64, 16, 8)),
    (2, (2, 100, 32, 32)),
    (1, (7, 5, 64, 64)),
    (2, (14, 3, 64, 64)),
)


def formula(x, weight, bias, eps, groups, activation, slope):
    """Straight from the module's docstring, in NumPy."""
    out = []
    for part in np.split(x, groups):
        axes = (0, *range(2, x.ndim))
        shape = (1, -1) + (1,) * (x.ndim - 2)
        mean, var = part.mean(axes).reshape(shape), part.var(axes).reshape(shape)
        y = (part - mean) / np.sqrt(var + eps) * weight.reshape(shape) + bias.reshape(shape)
        out.append(y)
    y = np.concatenate(out)
    return {
        "none": y,
        "relu": np.maximum(y, 0),
        "leaky_relu": np.where(y > 0, y, slope * y),
        "tanh": np.tanh(y),
    }[activation]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_reference_is_the_formula(rng, groups, activation, channels_last):
    x, weight, bias = rng.normal(3, 2, (6, 5, 3, 7)), rng.normal(1, 1, 5), rng.normal(0, 1, 5)
    want = formula(x, weight, bias, EPS, groups, activation, 0.2)
    tensor = torch.from_numpy(x)
    if channels_last:
        tensor = tensor.to(memory_format=torch.channels_last)
    got = bn_act(
        tensor,
        torch.from_numpy(weight),
        torch.from_numpy(bias),
        groups=groups,
        activation=activation,
    )
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-12)
    assert got.stride() == tensor.stride()


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_the_reference(groups):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda *args: bn_act(*args, groups=groups, activation="tanh"), (x, weight, bias)
    )


def arguments(shape, layout="nchw", affine=True):
    """``x``, ``weight``, ``bias``, ``running_mean``, ``running_var`` and ``dy``."""
    draw = torch.Generator().manual_seed(0)
    c = shape[1]
    x, dy = (laid_out(torch.randn(shape, generator=draw), layout) for _ in range(2))
    weight, bias, mean = (torch.randn(c, generator=draw) for _ in range(3))
    var = torch.rand(c, generator=draw) + 0.5
    # Channels differ, as they do.
    x = x * (0.5 + torch.arange(c) % 3).view(-1, 1, 1) + 2 * mean.view(-1, 1, 1)
    return x, *((weight, bias) if affine else (None, None)), mean, var, dy


def check(
    groups,
    shape,
    activation,
    layout="nhwc",
    training=True,
    affine=True,
    backend="cpp",
    dtype=torch.float32,
    of_channels=None,
):
    """``x`` in ``dtype``, what there is of each channel in ``of_channels`` or ``dtype`` too."""
    x, weight, bias, mean, var, dy = arguments(shape, layout, affine)
    of_channels = of_channels or dtype
    x = alike(x, dtype)
    weight, bias, mean, var = (
        None if t is None else t.to(of_channels) for t in (weight, bias, mean, var)
    )
    keep = {"training": training, "groups": groups}
    exact = [None if t is None else t.double() for t in (x, weight, bias, mean, var)]
    dy = alike(away_from_kinks(dy, bn_act(*exact, **keep), activation), dtype)

    def results(backend, to=None):
        device = device_of(backend)
        x_, weight_, bias_, mean_, var_, dy_ = (
            None if t is None else alike(t, to or t.dtype, device)
            for t in (x, weight, bias, mean, var, dy)
        )
        inputs = [None if t is None else t.requires_grad_() for t in (x_, weight_, bias_)]
        with use_backend(backend):
            y = bn_act(*inputs, mean_, var_, **keep, activation=activation)
        y.backward(dy_)
        gradients = [None if leaf is None else leaf.grad for leaf in inputs]
        found = [y.detach(), *gradients, mean_, var_]
        return [None if t is None else t.cpu() for t in found]

    want, own, got = results("reference", torch.float64), results("reference"), results(backend)
    # On the CPU torch sums float32 in float64, as no GPU does.
    floors = 1 if backend == "cpp" else 2
    names = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")
    for name, g, w, o in zip(names, got, want, own, strict=True):
        if w is not None:
            assert g.dtype == o.dtype
            assert error(g, w) <= limit(o, w, floors), name


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("groups", "shape"), SHAPES, ids=str)
def test_training(nan_outputs, groups, shape, activation):
    check(groups, shape, activation)


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("groups", "shape"), SHAPES[::2], ids=str)
def test_evaluation(nan_outputs, groups, shape, activation):
    check(groups, shape, activation, training=False)


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_layouts(nan_outputs, layout, training, affine):
    check(2, (6, 5, 4, 7), "leaky_relu", layout, training, affine)


GPU_SHAPES = (
    (1, (7, 3, 1, 1)),
    (1, (1, 1, 4, 4)),
    (3, (6, 16, 7, 5)),
    (2, (4, 70, 3, 3)),  # more channels than a block has
    (2, (2, 5, 24, 25)),  # more rows
    (1, (1, 300, 2, 1)),  # more channels than a block of the running statistics has
)


ON_GPUS = pytest.mark.parametrize("backend", [TRITON, CUDA])


@ON_GPUS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("groups", "shape"), GPU_SHAPES, ids=str)
def test_on_gpus(nan_outputs, honest_triton, groups, shape, training, dtype, backend):
    check(groups, shape, "leaky_relu", training=training, backend=backend, dtype=dtype)


@pytest.fixture
def small_blocks(monkeypatch):
    """Of which a small tensor has several in each dimension, and the last ones in part."""
    kernels = triton.kernels("bn_act")
    sizes = {"_BLOCK": 16, "_MOST_CHANNELS": 4, "_TILES": 6, "_MERGE_TILES": 2}
    for name, size in {**sizes, "_MERGE_CHANNELS": 4}.items():
        monkeypatch.setattr(kernels, name, size)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("groups", "shape"), [(1, (1, 1, 5, 5)), (2, (4, 6, 3, 3)), (3, (6, 9, 5, 3))], ids=str
)
def test_triton_in_many_programs(
    nan_outputs, honest_triton, small_blocks, groups, shape, activation, dtype
):
    check(groups, shape, activation, backend="triton", dtype=dtype)


@ON_GPUS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("affine", [True, False])
def test_other_layouts_are_copied(nan_outputs, honest_triton, layout, training, affine, backend):
    check(2, (6, 5, 4, 7), "leaky_relu", layout, training, affine, backend=backend)


@ON_GPUS
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_channels_in_float32(nan_outputs, honest_triton, training, dtype, backend):
    """As mixed precision has them."""
    keep = {"training": training, "backend": backend, "dtype": dtype}
    check(2, (6, 5, 4, 7), "leaky_relu", **keep, of_channels=torch.float32)


@needs_cuda
def test_what_is_not_aligned_is_copied(nan_outputs):
    """A view that does not begin at a multiple of 16 bytes."""
    x, weight, bias, mean, var, _ = arguments((6, 5, 4, 7), "nhwc")

    def shifted(t):
        memory = torch.full((t.numel() + 1,), torch.nan, device=GPU_DEVICE)
        return memory.as_strided(t.shape, t.stride(), 1).copy_(t)

    keep = {"groups": 2, "activation": "relu"}
    with use_backend("reference"):
        want = bn_act(*(t.double() for t in (x, weight, bias)), **keep)
    given = [shifted(t) for t in (x, weight, bias)]
    running = [shifted(t) for t in (mean, var)]
    assert all(t.data_ptr() % 16 for t in (*given, *running))
    with use_backend("cuda"):
        got = bn_act(*given, *running, **keep)
    assert error(got.cpu(), want) < 1e-6
    assert error(running[0].cpu(), mean.double()) > 1e-3


def check_running_statistics(groups, contiguous, backend="triton"):
    draw = torch.Generator().manual_seed(0)
    mean, var = torch.randn(groups, 300, generator=draw), torch.rand(groups, 300, generator=draw)
    running = [torch.randn(300, generator=draw), torch.rand(300, generator=draw)]
    want = [statistic.double() for statistic in running]
    for group_mean, group_var in zip(mean.double(), var.double(), strict=True):
        want = [
            0.7 * want[0] + 0.3 * group_mean,
            0.7 * want[1] + 0.3 * group_var * (5 / 4),
        ]
    got = [torch.stack([t, t], 1)[:, 0].to(GPU_DEVICE) for t in running]
    if contiguous:
        got = [t.contiguous() for t in got]
    assert got[0].is_contiguous() == contiguous
    bn_update_running(*got, mean.to(GPU_DEVICE), var.to(GPU_DEVICE), 5, 0.3, backend)
    for g, w in zip(got, want, strict=True):
        assert error(g.cpu(), w) <= 4 * torch.finfo(torch.float32).eps


@ON_GPUS
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_running_statistics_on_gpus(honest_triton, groups, contiguous, backend):
    check_running_statistics(groups, contiguous, backend)


# What finds the faults below, and passes without them.
CHECKS = {
    "training": lambda: check(2, (4, 6, 3, 3), "leaky_relu", backend="triton"),
    "evaluation": lambda: check(1, (4, 6, 3, 3), "relu", training=False, backend="triton"),
    "running": lambda: check_running_statistics(3, True),
}


@planted
@pytest.mark.parametrize("name", CHECKS)
def test_checks_pass_without_a_fault(nan_outputs, honest_triton, small_blocks, name):
    CHECKS[name]()


@planted
@faults(
    # Masks, and what masked lanes hold.
    Fault("_bn_stats_kernel", "(r < end)[:, None] & ", "", "training", OUTSIDE),
    Fault("_bn_stats_kernel", "mask=mask, other=0.0", "mask=mask", "training", NUMBERS),
    Fault("_bn_stats_kernel", "count, mask=c < channels", "count", "training", RACE),
    Fault("_bn_merge_kernel", "(t < tiles)[:, None] & ", "", "training", OUTSIDE),
    Fault("_bn_merge_kernel", "+ at, mean, mask=c < channels", "+ at, mean", "training", RACE),
    Fault(
        "_of_channels",
        "weight_ptr + c, mask=c < channels, other=0.0",
        "weight_ptr + c",
        "training",
        OUTSIDE,
    ),
    Fault("_bn_act_fwd_kernel", "(r < rows)[:, None] & ", "", "training", RACE),
    Fault("_bn_act_fwd_kernel", " & (c < channels)[None, :]", "", "training", RACE),
    Fault(
        "_normalised_and_gradient",
        "dy_ptr + offsets, mask=mask, other=0.0",
        "dy_ptr + offsets",
        "training",
        OUTSIDE,
    ),
    Fault("_bn_act_bwd_reduce_kernel", "(r < end)[:, None] & ", "", "training", OUTSIDE),
    Fault("_bn_act_bwd_sum_kernel", "(t < tiles)[:, None] & ", "", "training", OUTSIDE),
    Fault(
        "_bn_act_bwd_kernel",
        "dx.to(dx_ptr.dtype.element_ty), mask=mask",
        "dx.to(dx_ptr.dtype.element_ty)",
        "training",
        RACE,
    ),
    Fault("_bn_running_kernel", "mask = c < channels", "mask = c <= channels", "running", OUTSIDE),
    # By one, and what is left out.
    Fault(
        "_bn_stats_kernel",
        "range(start, end, BR)",
        "range(start + 1, end, BR)",
        "training",
        NUMBERS,
    ),
    Fault("_bn_stats_kernel", "delta * delta * count * share", "0.0", "training", NUMBERS),
    Fault("_bn_merge_kernel", "group * tiles + t", "group * tiles + t + 1", "training", OUTSIDE),
    Fault("_of_channels", "mean_ptr + group * channels", "mean_ptr", "training", NUMBERS),
    Fault("_bn_act_bwd_kernel", " - dbias[None, :]", "", "training", NUMBERS),
    Fault("_bn_act_bwd_sum_kernel", "range(groups)", "range(groups - 1)", "training", NUMBERS),
    Fault("_bn_act_bwd_reduce_kernel", "group = tile // tiles", "group = 0", "training", NUMBERS),
    Fault("_normalise", "bias[None, :]", "0.0", "evaluation", NUMBERS),
    Fault("_bn_running_kernel", "* unbiased", "", "running", NUMBERS),
    Fault("_bn_running_kernel", "range(groups)", "range(groups - 1)", "running", NUMBERS),
    # Programs that meet.
    Fault(
        "_bn_stats_kernel", "tl.program_id(1) * BC", "tl.program_id(1) * (BC - 1)", "training", RACE
    ),
    Fault(
        "_bn_act_fwd_kernel",
        "tl.program_id(0) * BR",
        "tl.program_id(0) * (BR - 1)",
        "training",
        RACE,
    ),
    Fault("_bn_act_bwd_reduce_kernel", "sums_ptr + tile * 2", "sums_ptr + tile", "training", RACE),
    Fault(
        "_bn_running_kernel", "tl.program_id(0) * BLOCK", "tl.program_id(0) * 0", "running", RACE
    ),
)
def test_a_planted_fault_is_found(
    monkeypatch, tmp_path, nan_outputs, honest_triton, small_blocks, fault
):
    fault.plant(monkeypatch, "bn_act", tmp_path)
    with pytest.raises(AssertionError, match=fault.found):
        CHECKS[fault.check]()


@needs_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("groups", "shape"), SHAPES[:7], ids=str)
def test_each_instruction_set(nan_outputs, use_isa, isa, groups, shape, activation):
    if isa not in cpp.kernels().isas():
        pytest.skip(f"this CPU has no {isa}")
    use_isa(isa)
    check(groups, shape, activation)


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
@pytest.mark.parametrize("shape", [(8, 5, 16, 16), (64, 24, 4, 4), (2, 3, 64, 64)], ids=str)
def test_statistics_of_a_large_mean_and_a_small_deviation(
    nan_outputs, honest_triton, shape, backend
):
    # A rounding of x is 0.6 % of its deviation.
    of_mean, of_var = (1e-7, 1e-4 if backend == "cpp" else 5e-4)
    x = 1e3 + 1e-2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    _, mean, _, var = bn_act_forward(
        x.to(device_of(backend)), None, None, None, None, None, True, EPS, 2, "none", 0.0, backend
    )
    for g, part in enumerate(x.double().chunk(2)):
        assert error(mean[g].cpu(), part.mean((0, 2, 3))) < of_mean
        assert error(var[g].cpu(), part.var((0, 2, 3), correction=0)) < of_var


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_finite(nan_outputs, honest_triton, activation, value, training, backend):
    x, weight, bias, mean, var, dy = arguments((6, 5, 4, 4))
    x[1, 2, 3, 0] = value
    dy[2, 3, 0, 0] = torch.nan
    results = []
    for name in ("reference", backend):
        device = device_of(name)
        inputs = leaves(x, weight, bias, device=device)
        with use_backend(name):
            y = bn_act(
                *inputs,
                mean.to(device, copy=True),
                var.to(device, copy=True),
                training=training,
                groups=2,
                activation=activation,
            )
            y.backward(dy.to(device))
        results.append([t.detach().cpu() for t in (y, *(leaf.grad for leaf in inputs))])
    for name, want, got in zip(("y", "dx", "dweight", "dbias"), *results, strict=True):
        assert not got[~want.isfinite()].isfinite().any(), name
    # The other group, and the other channels, know nothing of it.
    y, dx = results[1][:2]
    assert y[3:].isfinite().all()
    assert y[:, [0, 1, 3, 4]].isfinite().all()
    assert dx[3:].isfinite().all()
    assert dx[:, [0, 1, 4]].isfinite().all()


def test_running_statistics_move_once_a_group():
    x = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    want_mean, want_var = mean.clone(), var.clone()
    for part in x.chunk(2):
        want_mean.lerp_(part.mean((0, 2, 3)), 0.1)
        want_var.lerp_(part.var((0, 2, 3)), 0.1)
    bn_act(x, running_mean=mean, running_var=var, groups=2)
    torch.testing.assert_close(mean, want_mean)
    torch.testing.assert_close(var, want_var)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_evaluation_uses_the_running_statistics(backend):
    x = torch.randn(3, 2, 4, 4)
    mean, var = torch.tensor([1.0, -1.0]), torch.tensor([4.0, 0.25])
    with use_backend(backend):
        got = bn_act(x, running_mean=mean, running_var=var, training=False, groups=3)
    want = (x - mean[:, None, None]) / (var[:, None, None] + EPS).sqrt()
    torch.testing.assert_close(got, want)
    assert mean.tolist() == [1.0, -1.0]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"groups": 2}, "groups=2 does not divide the batch of 3"), ({"activation": "sin"}, "'sin'")],
)
def test_refuses(backend, kwargs, message):
    with use_backend(backend), pytest.raises(InputError, match=message):
        bn_act(torch.zeros(3, 2, 2, 2), **kwargs)


@pytest.mark.parametrize("backend", ["auto", "reference", TRITON, CUDA])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("length", [2, 6])
@pytest.mark.parametrize("training", [True, False])
def test_what_does_not_fit_is_refused_as_torch_does(backend, name, length, training):
    statistics = {"running_mean": torch.zeros(5), "running_var": torch.ones(5)}
    device = device_of(backend)
    given = {k: t.to(device) for k, t in {**statistics, name: torch.ones(length)}.items()}
    with use_backend(backend), pytest.raises(RuntimeError):
        bn_act(torch.randn(3, 5, 2, 2, device=device), **given, training=training)


@pytest.mark.parametrize("backend", ["auto", "reference", TRITON, CUDA])
def test_one_value_a_channel_is_refused_as_torch_does(backend):
    with use_backend(backend), pytest.raises(ValueError, match="more than 1 value"):
        bn_act(torch.randn(2, 5, 1, 1, device=device_of(backend)), groups=2)


def test_one_group_is_torchs_own():
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(bn_act(x), F.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 2, 2, 2)], ids=str)
def test_other_ranks_are_the_references(shape):
    x = torch.randn(shape)
    want = F.leaky_relu(F.batch_norm(x, None, None, training=True), 0.2)
    assert torch.equal(bn_act(x, activation="leaky_relu"), want)


def everything(shape, groups, backend="cpp"):
    device = device_of(backend)
    x, weight, bias, mean, var, dy = (t.to(device) for t in arguments(shape))
    inputs = leaves(x, weight, bias, device=device)
    with use_backend(backend):
        y = bn_act(*inputs, mean, var, groups=groups, activation="leaky_relu")
    y.backward(dy)
    return [y.detach(), mean, var, *(leaf.grad for leaf in inputs)]


@needs_triton
def test_triton_repeats_agree_bit_for_bit():
    shape = (4, 24, 8, 8) if GPU_DEVICE == "cpu" else (64, 24, 64, 64)
    first = everything(shape, 2, "triton")
    for _ in range(2):
        assert all(map(torch.equal, everything(shape, 2, "triton"), first))


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 4])
def test_twenty_repeats_agree_bit_for_bit(threads, count):
    threads(count)
    first = everything((64, 24, 16, 16), 2)
    for _ in range(19):
        assert all(map(torch.equal, everything((64, 24, 16, 16), 2), first))


@needs_kernels
def test_thread_counts_agree_to_rounding(threads):
    threads(1)
    want = everything((64, 24, 16, 16), 2)
    for count in (2, 4):
        threads(count)
        for g, w in zip(everything((64, 24, 16, 16), 2), want, strict=True):
            assert error(g, w.double()) <= 1e-6


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_opcheck(training, affine, backend):
    x, weight, bias, mean, var, dy = (
        None if t is None else t.to(device_of(backend))
        for t in arguments((6, 5, 4, 7), "nhwc", affine)
    )
    inputs = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(
        bn_act_forward, (*inputs, mean, var, None, training, EPS, 2, "leaky_relu", 0.2, backend)
    )
    groups = 2 if training else 1
    of_groups = x.new_empty(groups, 5).normal_(), x.new_empty(groups, 5).uniform_(0.5, 1.5)
    torch.library.opcheck(
        bn_act_backward, (dy, x, *of_groups, weight, bias, training, "leaky_relu", 0.2, backend)
    )
    torch.library.opcheck(bn_update_running, (mean, var, *of_groups, 84, 0.1, backend))


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
def test_a_double_backward_raises(backend):
    x, weight, bias = leaves(*arguments((4, 3, 4, 4))[:3], device=device_of(backend))
    with use_backend(backend):
        y = bn_act(x, weight, bias)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="bn_act_backward"):
        dx.square().sum().backward()


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_whole(training, backend):
    device = device_of(backend)
    x, weight, bias, mean, var, dy = (t.to(device) for t in arguments((6, 5, 4, 7)))
    results = []
    for call in (bn_act, compiled(bn_act)):
        inputs = leaves(x, weight, bias, device=device)
        statistics = mean.clone(), var.clone()
        with use_backend(backend):
            y = call(*inputs, *statistics, training=training, groups=2, activation="tanh")
        y.backward(dy)
        results.append([y.detach(), *statistics, *(leaf.grad for leaf in inputs)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
def test_float64_is_refused_by_a_named_backend(backend):
    with use_backend(backend), pytest.raises(NotBuiltError, match="float64"):
        bn_act(torch.randn(4, 3, 2, 2, dtype=torch.float64))
