"""Each op against its formula, written out in float64; gradients by finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastgan import augment, bce_loss, bn_act, gan_loss
from fastgan.errors import InputError, NotBuiltError
from fastgan.ops.backend import resolve_backend, unsupported_reasons


def bn_act_formula(x, weight, bias, eps, groups, activation, slope):
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


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "tanh"])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_bn_act_equals_the_formula(rng, groups, activation, channels_last):
    x, weight, bias = rng.normal(3, 2, (6, 5, 3, 7)), rng.normal(1, 1, 5), rng.normal(0, 1, 5)
    want = bn_act_formula(x, weight, bias, 1e-5, groups, activation, 0.2)
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
def test_bn_act_gradients(groups):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda *args: bn_act(*args, groups=groups, activation="tanh"), (x, weight, bias)
    )


def test_bn_act_moves_running_statistics_once_a_group():
    x = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    want_mean, want_var = mean.clone(), var.clone()
    for part in x.chunk(2):
        want_mean.lerp_(part.mean((0, 2, 3)), 0.1)
        want_var.lerp_(part.var((0, 2, 3)), 0.1)
    bn_act(x, running_mean=mean, running_var=var, groups=2)
    torch.testing.assert_close(mean, want_mean)
    torch.testing.assert_close(var, want_var)


def test_bn_act_in_evaluation_uses_the_running_statistics():
    x = torch.randn(3, 2, 4, 4)
    mean, var = torch.tensor([1.0, -1.0]), torch.tensor([4.0, 0.25])
    got = bn_act(x, running_mean=mean, running_var=var, training=False, groups=3)
    want = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    torch.testing.assert_close(got, want)
    assert mean.tolist() == [1.0, -1.0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"groups": 2}, "groups=2 does not divide the batch of 3"), ({"activation": "sin"}, "'sin'")],
)
def test_bn_act_refuses(kwargs, message):
    with pytest.raises(InputError, match=message):
        bn_act(torch.zeros(3, 2, 2, 2), **kwargs)


@pytest.mark.parametrize("shape", [(6,), (6, 1, 3, 5)])
def test_gan_loss_equals_the_definition(rng, shape):
    logits, targets = rng.normal(0, 3, shape), (1.0, 0.0, 0.9)
    loss, d = gan_loss(torch.from_numpy(logits), targets)
    for part, target, got_loss, got_d in zip(np.split(logits, 3), targets, loss, d, strict=True):
        p = 1 / (1 + np.exp(-part))
        want = -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean()
        np.testing.assert_allclose(got_loss, want, rtol=1e-12)
        np.testing.assert_allclose(got_d, p.mean(), rtol=1e-12)


def test_gan_loss_is_stable_where_the_definition_overflows():
    logits = torch.tensor([800.0, -800.0], dtype=torch.float64, requires_grad=True)
    loss, _ = bce_loss(logits, (0.0, 1.0))
    loss.sum().backward()
    assert loss.tolist() == [800.0, 800.0]
    assert logits.grad.tolist() == [1.0, -1.0]


def test_gan_loss_gradients():
    torch.manual_seed(0)
    logits = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gan_loss(x, (1.0, 0.0))[0], (logits,))


@pytest.mark.parametrize("targets", [(), (1.0, 0.0), (1.5,), (float("nan"),)])
def test_gan_loss_refuses(targets):
    with pytest.raises(InputError, match="targets"):
        gan_loss(torch.zeros(3), targets)


def test_gan_loss_says_what_is_not_built():
    with pytest.raises(NotBuiltError, match="hinge"):
        gan_loss(torch.zeros(3), (1.0,), kind="hinge")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_augment_equals_the_formula(rng, channels):
    images = rng.integers(0, 256, (5, 6, 7, channels), dtype=np.uint8)
    index, flip = np.array([4, 0, 0, 2]), np.array([True, False, True, False])
    got = augment(
        torch.from_numpy(images),
        torch.from_numpy(index),
        torch.from_numpy(flip),
        dtype=torch.float64,
    )
    for i, (source, mirrored) in enumerate(zip(index, flip, strict=True)):
        want = images[source].astype(np.float64) / 127.5 - 1
        want = want[:, ::-1] if mirrored else want
        np.testing.assert_allclose(got[i].permute(1, 2, 0), want, rtol=0, atol=1e-15)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert got.dtype == torch.float64


def test_augment_equals_the_examples_transform(rng):
    images = torch.from_numpy(rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8))
    want = (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(augment(images), want, rtol=0, atol=2.5e-7)


def test_augment_leaves_its_input(rng):
    images = torch.from_numpy(rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8))
    before = images.clone()
    augment(images, None, torch.tensor([True, True, False]))
    assert torch.equal(images, before)


def test_backends(monkeypatch):
    assert resolve_backend("auto") == "reference"
    assert unsupported_reasons("reference") == []
    assert unsupported_reasons("triton")
    with pytest.raises(NotBuiltError, match="cpp"):
        resolve_backend("cpp")
    with pytest.raises(InputError, match="'cudnn'"):
        resolve_backend("cudnn")
    monkeypatch.setenv("FASTGAN_BACKEND", "cuda")
    with pytest.raises(NotBuiltError, match="cuda"):
        resolve_backend("auto")
    assert resolve_backend("reference") == "reference"


def test_torch_agrees():
    """The reference is torch's own batch norm where there is one group."""
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(bn_act(x), F.batch_norm(x, None, None, training=True))
