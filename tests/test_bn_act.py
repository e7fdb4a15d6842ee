"""Batch norm + activation: the reference against the formula, the kernels against float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.numerics import (
    LAYOUTS,
    away_from_kinks,
    compiled,
    error,
    laid_out,
    leaves,
    limit,
    needs_kernels,
)

from fastgan import bn_act
from fastgan.errors import InputError, NotBuiltError
from fastgan.ops import cpp
from fastgan.ops.activation import ACTIVATIONS
from fastgan.ops.backend import use_backend
from fastgan.ops.bn_act import bn_act_backward, bn_act_forward

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


def check(groups, shape, activation, layout="nhwc", training=True, affine=True):
    x, weight, bias, mean, var, dy = arguments(shape, layout, affine)
    keep = {"training": training, "groups": groups}

    def results(backend, dtype, dy):
        x_, weight_, bias_ = leaves(x, weight, bias, dtype=dtype)
        statistics = mean.to(dtype, copy=True), var.to(dtype, copy=True)
        with use_backend(backend):
            y = bn_act(x_, weight_, bias_, *statistics, **keep, activation=activation)
        y.backward(dy.to(dtype))
        assert y.dtype == dtype
        gradients = [None if leaf is None else leaf.grad for leaf in (x_, weight_, bias_)]
        return [y.detach(), *gradients, *statistics]

    exact = [None if t is None else t.double() for t in (x, weight, bias, mean, var)]
    dy = away_from_kinks(dy, bn_act(*exact, **keep), activation)
    want = results("reference", torch.float64, dy)
    own = results("reference", torch.float32, dy)
    got = results("cpp", torch.float32, dy)
    names = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")
    for name, g, w, o in zip(names, got, want, own, strict=True):
        if w is not None:
            assert error(g, w) <= limit(o, w), name


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


@needs_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("groups", "shape"), SHAPES[:7], ids=str)
def test_each_instruction_set(nan_outputs, use_isa, isa, groups, shape, activation):
    if isa not in cpp.kernels().isas():
        pytest.skip(f"this CPU has no {isa}")
    use_isa(isa)
    check(groups, shape, activation)


@needs_kernels
@pytest.mark.parametrize("shape", [(8, 5, 16, 16), (64, 24, 4, 4), (2, 3, 64, 64)], ids=str)
def test_statistics_of_a_large_mean_and_a_small_deviation(nan_outputs, shape):
    x = 1e3 + 1e-2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    _, mean, _, var = bn_act_forward(
        x, None, None, None, None, None, True, EPS, 2, "none", 0.0, "cpp"
    )
    for g, part in enumerate(x.double().chunk(2)):
        assert error(mean[g], part.mean((0, 2, 3))) < 1e-7
        assert error(var[g], part.var((0, 2, 3), correction=0)) < 1e-4


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_finite(nan_outputs, activation, value, training):
    x, weight, bias, mean, var, dy = arguments((6, 5, 4, 4))
    x[1, 2, 3, 0] = value
    dy[2, 3, 0, 0] = torch.nan
    results = []
    for backend in ("reference", "cpp"):
        inputs = leaves(x, weight, bias)
        with use_backend(backend):
            y = bn_act(
                *inputs,
                mean.clone(),
                var.clone(),
                training=training,
                groups=2,
                activation=activation,
            )
            y.backward(dy)
        results.append([y.detach(), *(leaf.grad for leaf in inputs)])
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


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("length", [2, 6])
@pytest.mark.parametrize("training", [True, False])
def test_what_does_not_fit_is_refused_as_torch_does(backend, name, length, training):
    fits = {"running_mean": torch.zeros(5), "running_var": torch.ones(5)}
    with use_backend(backend), pytest.raises(RuntimeError):
        bn_act(torch.randn(3, 5, 2, 2), **{**fits, name: torch.ones(length)}, training=training)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_one_value_a_channel_is_refused_as_torch_does(backend):
    with use_backend(backend), pytest.raises(ValueError, match="more than 1 value"):
        bn_act(torch.randn(2, 5, 1, 1), groups=2)


def test_one_group_is_torchs_own():
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(bn_act(x), F.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 2, 2, 2)], ids=str)
def test_other_ranks_are_the_references(shape):
    x = torch.randn(shape)
    want = F.leaky_relu(F.batch_norm(x, None, None, training=True), 0.2)
    assert torch.equal(bn_act(x, activation="leaky_relu"), want)


def everything(shape, groups):
    x, weight, bias, mean, var, dy = arguments(shape)
    inputs = leaves(x, weight, bias)
    with use_backend("cpp"):
        y = bn_act(*inputs, mean, var, groups=groups, activation="leaky_relu")
    y.backward(dy)
    return [y.detach(), mean, var, *(leaf.grad for leaf in inputs)]


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


@needs_kernels
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_opcheck(training, affine):
    x, weight, bias, mean, var, dy = arguments((6, 5, 4, 7), "nhwc", affine)
    inputs = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(
        bn_act_forward, (*inputs, mean, var, None, training, EPS, 2, "leaky_relu", 0.2, "cpp")
    )
    groups = 2 if training else 1
    of_groups = torch.randn(groups, 5), torch.rand(groups, 5) + 0.5
    torch.library.opcheck(
        bn_act_backward, (dy, x, *of_groups, weight, bias, training, "leaky_relu", 0.2, "cpp")
    )


@needs_kernels
def test_a_double_backward_raises():
    x, weight, bias = leaves(*arguments((4, 3, 4, 4))[:3])
    with use_backend("cpp"):
        y = bn_act(x, weight, bias)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="bn_act_backward"):
        dx.square().sum().backward()


@needs_kernels
@pytest.mark.parametrize("training", [True, False])
def test_compiled_whole(training):
    x, weight, bias, mean, var, dy = arguments((6, 5, 4, 7))
    results = []
    for call in (bn_act, compiled(bn_act)):
        inputs, statistics = leaves(x, weight, bias), (mean.clone(), var.clone())
        with use_backend("cpp"):
            y = call(*inputs, *statistics, training=training, groups=2, activation="tanh")
        y.backward(dy)
        results.append([y.detach(), *statistics, *(leaf.grad for leaf in inputs)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@needs_kernels
def test_float64_is_refused_by_a_named_backend():
    with use_backend("cpp"), pytest.raises(NotBuiltError, match="float64"):
        bn_act(torch.randn(4, 3, 2, 2, dtype=torch.float64))
