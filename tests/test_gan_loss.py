"""The adversarial loss: the reference against the definition, the kernel against float64."""

import numpy as np
import pytest
import torch
from support.numerics import (
    CPP,
    CUDA,
    DTYPES,
    TRITON,
    alike,
    compiled,
    device_of,
    error,
    limit,
    needs_cuda,
    needs_kernels,
    needs_triton,
)
from support.planted_faults import NUMBERS, OUTSIDE, RACE, Fault, faults, planted

from fastgan import bce_loss, gan_loss, saying
from fastgan.errors import InputError, NotBuiltError
from fastgan.ops import cpp
from fastgan.ops.backend import use_backend
from fastgan.ops.gan_loss import gan_loss_backward, gan_loss_forward

TARGETS = ((1.0,), (1.0, 0.0), (0.9, 0.0, 0.3))


@pytest.mark.parametrize("shape", [(6,), (6, 1, 3, 5)])
def test_the_reference_is_the_definition(rng, shape):
    logits, targets = rng.normal(0, 3, shape), (1.0, 0.0, 0.9)
    loss, d = gan_loss(torch.from_numpy(logits), targets)
    for part, target, got_loss, got_d in zip(np.split(logits, 3), targets, loss, d, strict=True):
        p = 1 / (1 + np.exp(-part))
        want = -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean()
        np.testing.assert_allclose(got_loss, want, rtol=1e-12)
        np.testing.assert_allclose(got_d, p.mean(), rtol=1e-12)


def test_gradients_of_the_reference():
    torch.manual_seed(0)
    logits = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gan_loss(x, (1.0, 0.0))[0], (logits,))


def results(backend, dtype, logits, targets, weights):
    device = device_of(backend)
    leaf = alike(logits, dtype, device).requires_grad_()
    with use_backend(backend):
        loss, d = gan_loss(leaf, targets)
    assert not d.requires_grad
    (loss * weights.to(device, dtype)).sum().backward()
    return loss.detach().cpu(), d.cpu(), leaf.grad.cpu()


def check(logits, targets, backend="cpp", dtype=torch.float32):
    weights = torch.arange(1.0, 1.0 + len(targets))
    logits = alike(logits, dtype)
    want = results("reference", torch.float64, logits, targets, weights)
    own = results("reference", dtype, logits, targets, weights)
    got = results(backend, dtype, logits, targets, weights)
    for name, g, w, o in zip(("loss", "d", "dlogits"), got, want, own, strict=True):
        assert g.dtype == dtype
        assert error(g, w) <= limit(o, w), name


def logits_of(shape, deviation=3.0):
    return deviation * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@needs_kernels
@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("n", [1, 7, 64, 128])
@pytest.mark.parametrize("rest", [(), (1, 1, 1), (1, 3, 5), (64, 64)], ids=str)
def test_kernel(nan_outputs, targets, n, rest):
    check(logits_of((n * len(targets), *rest)), targets)


@pytest.mark.parametrize("backend", [TRITON, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("rest", [(), (1, 3, 5), (21, 64)], ids=str)
def test_on_gpus(nan_outputs, honest_triton, targets, n, rest, dtype, backend):
    check(logits_of((n * len(targets), *rest)), targets, backend, dtype)


@needs_cuda
def test_more_groups_than_a_launch_has(monkeypatch, caplog):
    monkeypatch.setattr(saying, "_said", set())
    logits, targets = logits_of((130, 1)), [0.5] * 65
    with use_backend("cuda"):
        found = gan_loss(logits, targets)
    for got, want in zip(found, gan_loss(logits.double(), targets), strict=True):
        assert error(got, want) < 1e-6
    (record,) = caplog.records
    assert "no kernel for gan_loss of more than 64 groups" in record.getMessage()


@planted
@faults(
    Fault("_bce_fwd_kernel", "mask=mask, other=0.0", "", "", OUTSIDE),
    Fault("_bce_fwd_kernel", "element_ty), mask=mask", "element_ty)", "", OUTSIDE),
    Fault("_bce_fwd_kernel", "tl.where(mask, one, 0.0)", "one", "", NUMBERS),
    Fault("_bce_fwd_kernel", "tl.where(mask, sigmoid, 0.0)", "sigmoid", "", NUMBERS),
    Fault("_bce_fwd_kernel", "i + tl.arange", "i + 1 + tl.arange", "", NUMBERS),
    Fault("_bce_fwd_kernel", "range(0, size, BLOCK)", "range(0, size - BLOCK, BLOCK)", "", NUMBERS),
    Fault("_bce_fwd_kernel", "range(len(targets))", "range(len(targets) - 1)", "", NUMBERS),
    Fault("_bce_fwd_kernel", "loss_ptr + group", "loss_ptr", "", RACE),
    Fault("_log1p", "tl.where(u == 1.0, x, ", "tl.where(u == 1.0, 0.0, ", "small", NUMBERS),
)
def test_a_planted_fault_is_found(monkeypatch, tmp_path, nan_outputs, honest_triton, fault):
    """Which :func:`check` passes without it is tested above."""
    fault.plant(monkeypatch, "gan_loss", tmp_path)
    with pytest.raises(AssertionError, match=fault.found):
        if fault.check == "small":
            check_small_loss()
        else:
            check(logits_of((2, 150)), (1.0, 0.3), "triton")


@needs_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_each_instruction_set(nan_outputs, use_isa, isa, targets):
    if isa not in cpp.kernels().isas():
        pytest.skip(f"this CPU has no {isa}")
    use_isa(isa)
    check(logits_of((6, 1, 3, 5)), targets)


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
@pytest.mark.parametrize("deviation", [1e-4, 30.0])
def test_small_and_large_logits(nan_outputs, honest_triton, deviation, backend):
    check(logits_of((128, 1), deviation), (1.0, 0.0), backend)


def check_small_loss():
    for logit in (17.0, 20.0, 40.0, 80.0):
        loss, want = (
            results(backend, dtype, torch.tensor([logit]), (1.0,), torch.ones(1))[0]
            for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
        )
        assert error(loss, want) <= 1e-6


@needs_triton
def test_a_loss_next_to_nothing_keeps_its_digits(nan_outputs, honest_triton):
    """log(1 + x) of an x below the rounding of 1."""
    check_small_loss()


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
def test_other_layouts(nan_outputs, honest_triton, backend):
    check(logits_of((6, 3, 4, 5)).to(memory_format=torch.channels_last), (1.0, 0.0), backend)
    check(logits_of((12, 4))[::2, 1:], (1.0, 0.0, 0.5), backend)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", torch.float64),
        ("reference", torch.float32),
        pytest.param("cpp", torch.float32, marks=needs_kernels),
        pytest.param("triton", torch.float32, marks=needs_triton),
    ],
)
def test_stable_where_the_definition_overflows(backend, dtype):
    logits = torch.tensor([800.0, -800.0], dtype=dtype, device=device_of(backend))
    logits.requires_grad_()
    with use_backend(backend):
        loss, d = bce_loss(logits, (0.0, 1.0))
    loss.sum().backward()
    assert loss.tolist() == [800.0, 800.0]
    assert d.tolist() == pytest.approx([1.0, 0.0], abs=1e-30)
    assert logits.grad.tolist() == [1.0, -1.0]


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
def test_what_is_not_finite(nan_outputs, honest_triton, value, target, backend):
    logits = logits_of((6,))
    logits[1] = value
    weights = torch.ones(2)
    want = results("reference", torch.float32, logits, (target, 0.0), weights)
    got = results(backend, torch.float32, logits, (target, 0.0), weights)
    for g, w in zip(got, want, strict=True):
        assert not g[~w.isfinite()].isfinite().any()
        torch.testing.assert_close(g[w.isfinite()], w[w.isfinite()])


@pytest.mark.parametrize("targets", [(), (1.0, 0.0), (1.5,), (float("nan"),)])
def test_refuses(targets):
    with pytest.raises(InputError, match="targets"):
        gan_loss(torch.zeros(3), targets)


def test_says_what_is_not_built():
    with pytest.raises(NotBuiltError, match="hinge"):
        gan_loss(torch.zeros(3), (1.0,), kind="hinge")


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
def test_opcheck(backend):
    logits = torch.randn(6, 1, 2, 3, device=device_of(backend), requires_grad=True)
    torch.library.opcheck(gan_loss_forward, (logits, [1.0, 0.0], backend))
    dloss = torch.randn(2, device=device_of(backend))
    torch.library.opcheck(gan_loss_backward, (dloss, torch.randn_like(logits).detach()))


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
def test_a_double_backward_raises(backend):
    logits = torch.randn(6, device=device_of(backend), requires_grad=True)
    with use_backend(backend):
        loss, _ = gan_loss(logits, (1.0, 0.0))
    (dlogits,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        dlogits.square().sum().backward()


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
def test_compiled_whole(backend):
    logits = logits_of((6, 2)).to(device_of(backend))
    found = []
    for call in (gan_loss, compiled(gan_loss)):
        leaf = logits.clone().requires_grad_()
        with use_backend(backend):
            loss, d = call(leaf, (1.0, 0.0))
        loss.sum().backward()
        found.append((loss.detach(), d, leaf.grad))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
def test_float64_is_refused_by_a_named_backend(backend):
    with use_backend(backend), pytest.raises(NotBuiltError, match="float64"):
        gan_loss(torch.zeros(4, dtype=torch.float64), (1.0,))
