"""The adversarial loss: the reference against the definition, the kernel against float64."""

import sys

import numpy as np
import pytest
import torch
from support.gan_losses import FORMULAS, KINDS, adversarial
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

# One group and two, of labels; and three, of what each kind takes.
CASES = [
    *(("bce", targets) for targets in ((1.0,), (1.0, 0.0))),
    *((kind, FORMULAS[kind].targets) for kind in KINDS),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6,), (6, 1, 3, 5)])
def test_the_reference_is_the_definition(rng, kind, shape):
    logits, targets = rng.normal(0, 3, shape), FORMULAS[kind].targets
    found = results("reference", torch.float64, torch.from_numpy(logits), targets, kind)
    for got, want in zip(found, adversarial(logits, targets, kind).values(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_reference(kind):
    torch.manual_seed(0)
    logits = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gan_loss(x, (1.0, 0.0), kind=kind)[0], (logits,))


def results(backend, dtype, logits, targets, kind="bce", weights=None):
    """``loss``, ``d``, and the gradient of the sum of the losses, each times its weight."""
    device = device_of(backend)
    leaf = alike(logits, dtype, device).requires_grad_()
    with use_backend(backend):
        loss, d = gan_loss(leaf, targets, kind=kind)
    assert not d.requires_grad
    (loss if weights is None else loss * weights.to(device, dtype)).sum().backward()
    return loss.detach().cpu(), d.cpu(), leaf.grad.cpu()


def check(logits, targets, backend="cpp", dtype=torch.float32, kind="bce"):
    weights = torch.arange(1.0, 1.0 + len(targets))
    logits = alike(logits, dtype)
    wanted = adversarial(logits.double().numpy(), targets, kind)
    want = {name: torch.from_numpy(values) for name, values in wanted.items()}
    want["dlogits"] *= weights.repeat_interleave(len(logits) // len(targets)).view(
        -1, *[1] * (logits.ndim - 1)
    )
    own = results("reference", dtype, logits, targets, kind, weights)
    got = results(backend, dtype, logits, targets, kind, weights)
    for (name, w), g, o in zip(want.items(), got, own, strict=True):
        assert g.dtype == dtype
        assert error(g, w) <= limit(o, w), name


def logits_of(shape, deviation=3.0):
    return deviation * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@needs_kernels
@pytest.mark.parametrize(("kind", "targets"), CASES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 64, 128])
@pytest.mark.parametrize("rest", [(), (1, 1, 1), (1, 3, 5), (64, 64)], ids=str)
def test_kernel(nan_outputs, kind, targets, n, rest):
    check(logits_of((n * len(targets), *rest)), targets, kind=kind)


@pytest.mark.parametrize("backend", [TRITON, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "targets"), CASES, ids=str)
@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("rest", [(), (1, 3, 5), (21, 64)], ids=str)
def test_on_gpus(nan_outputs, honest_triton, kind, targets, n, rest, dtype, backend):
    check(logits_of((n * len(targets), *rest)), targets, backend, dtype, kind)


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
    Fault("_gan_loss_fwd_kernel", "mask=mask, other=0.0", "", "", OUTSIDE),
    Fault("_gan_loss_fwd_kernel", "element_ty), mask=mask", "element_ty)", "", OUTSIDE),
    Fault("_gan_loss_fwd_kernel", "tl.where(mask, one, 0.0)", "one", "", NUMBERS),
    Fault("_gan_loss_fwd_kernel", "tl.where(mask, score, 0.0)", "score", "", NUMBERS),
    Fault("_gan_loss_fwd_kernel", "i + tl.arange", "i + 1 + tl.arange", "", NUMBERS),
    Fault(
        "_gan_loss_fwd_kernel",
        "range(0, size, BLOCK)",
        "range(0, size - BLOCK, BLOCK)",
        "",
        NUMBERS,
    ),
    Fault("_gan_loss_fwd_kernel", "range(len(targets))", "range(len(targets) - 1)", "", NUMBERS),
    Fault("_gan_loss_fwd_kernel", "loss_ptr + group", "loss_ptr", "", RACE),
    Fault("_loss_of", "0.5 * (x - target)", "(x - target)", "lsgan", NUMBERS),
    Fault(
        "_loss_of", "(margin <= 0.0, 0.0, -sign)", "(margin < 0.0, 0.0, -sign)", "hinge", NUMBERS
    ),
    Fault("_loss_of", "zeros_like(x) - sign", "zeros_like(x) + sign", "wasserstein", NUMBERS),
    Fault("_log1p", "tl.where(u == 1.0, x, ", "tl.where(u == 1.0, 0.0, ", "small", NUMBERS),
)
def test_a_planted_fault_is_found(monkeypatch, tmp_path, nan_outputs, honest_triton, fault):
    """Which :func:`check` passes without it is tested above."""
    fault.plant(monkeypatch, "gan_loss", tmp_path)
    with pytest.raises(AssertionError, match=fault.found):
        if fault.check == "small":
            check_small_loss()
        elif fault.check:
            check(logits_of((2, 150)).round(), (1.0, 0.0), "triton", kind=fault.check)
        else:
            check(logits_of((2, 150)), (1.0, 0.3), "triton")


@needs_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize(("kind", "targets"), CASES, ids=str)
def test_each_instruction_set(nan_outputs, use_isa, isa, kind, targets):
    if isa not in cpp.kernels().isas():
        pytest.skip(f"this CPU has no {isa}")
    use_isa(isa)
    check(logits_of((6, 1, 3, 5)), targets, kind=kind)


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
@pytest.mark.parametrize("deviation", [1e-4, 30.0])
def test_small_and_large_logits(nan_outputs, honest_triton, deviation, backend):
    check(logits_of((128, 1), deviation), (1.0, 0.0), backend)


def check_small_loss():
    for logit in (17.0, 20.0, 40.0, 80.0):
        loss, want = (
            results(backend, dtype, torch.tensor([logit]), (1.0,))[0]
            for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
        )
        assert error(loss, want) <= 1e-6


@needs_triton
def test_a_loss_next_to_nothing_keeps_its_digits(nan_outputs, honest_triton):
    """log(1 + x) of an x below the rounding of 1."""
    check_small_loss()


@pytest.mark.parametrize("backend", ["reference", CPP, TRITON, CUDA])
@pytest.mark.parametrize("kind", KINDS)
def test_saturated_logits_and_the_hinges_kink(nan_outputs, honest_triton, kind, backend):
    """One by one, a group each: none is lost beside those of 1e4."""
    logits = torch.tensor([1e4, -1e4, 100.0, -100.0, 1.0, -1.0, 0.0, 1e-3, -2.5]).repeat(2)
    targets = [1.0] * 9 + [0.0] * 9
    found = results(backend, torch.float32, logits, targets, kind)
    wanted = adversarial(logits.double().numpy(), targets, kind)
    for got, want in zip(found, wanted.values(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
@pytest.mark.parametrize("kind", KINDS)
def test_other_layouts(nan_outputs, honest_triton, kind, backend):
    nhwc = logits_of((6, 3, 4, 5)).to(memory_format=torch.channels_last)
    check(nhwc, (1.0, 0.0), backend, kind=kind)
    check(logits_of((12, 4))[::2, 1:], FORMULAS[kind].targets, backend, kind=kind)


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
@pytest.mark.parametrize(
    ("kind", "target"),
    [
        *(("bce", target) for target in (0.0, 0.5, 1.0)),
        ("lsgan", 0.5),
        *((kind, label) for kind in ("hinge", "wasserstein") for label in (0.0, 1.0)),
    ],
)
def test_what_is_not_finite(nan_outputs, honest_triton, value, kind, target, backend):
    logits = logits_of((6,))
    logits[1] = value
    want = results("reference", torch.float32, logits, (target, 0.0), kind)
    got = results(backend, torch.float32, logits, (target, 0.0), kind)
    if kind == "bce":
        # Of an infinite logit the kernels' form may be NaN where torch's is infinite.
        want, got = ([x.where(x.isfinite(), torch.nan) for x in found] for found in (want, got))
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize(
    ("targets", "kind", "takes"),
    [
        ((), "bce", "0 groups"),
        ((1.0, 0.0), "hinge", "2 groups do not divide the batch of 3"),
        ((1.5,), "bce", "1.5 of kind='bce' must be a number from 0 to 1"),
        ((float("nan"),), "bce", "nan of kind='bce'"),
        ((float("inf"),), "lsgan", "inf of kind='lsgan' must be a finite number"),
        ((0.9,), "hinge", "0.9 of kind='hinge' must be 0 or 1"),
        ((-1.0,), "wasserstein", "-1.0 of kind='wasserstein' must be 0 or 1"),
    ],
)
def test_refuses(targets, kind, takes):
    with pytest.raises(InputError, match=f"targets: {takes}"):
        gan_loss(torch.zeros(3), targets, kind=kind)


def test_refuses_an_unknown_kind():
    with pytest.raises(InputError, match="kind='mse': choose from bce, lsgan, hinge, wasserstein"):
        gan_loss(torch.zeros(3), (1.0,), kind="mse")


@needs_kernels
def test_kinds_are_measured_apart(monkeypatch):
    problems = set()

    def remember(backend, op, problem, run, x):
        problems.add(problem)
        return backend

    monkeypatch.setattr(sys.modules[gan_loss.__module__], "fastest_backend", remember)
    for kind in KINDS:
        with use_backend("cpp"):
            gan_loss(torch.zeros(4), (1.0, 0.0), kind=kind)
    assert len(problems) == len(KINDS)


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
def test_opcheck(backend):
    logits = torch.randn(6, 1, 2, 3, device=device_of(backend), requires_grad=True)
    torch.library.opcheck(gan_loss_forward, (logits, [1.0, 0.0], "hinge", backend))
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
@pytest.mark.parametrize("kind", ["bce", "hinge"])
def test_compiled_whole(backend, kind):
    logits = logits_of((6, 2)).to(device_of(backend))
    found = []
    for call in (gan_loss, compiled(gan_loss)):
        leaf = logits.clone().requires_grad_()
        with use_backend(backend):
            loss, d = call(leaf, (1.0, 0.0), kind=kind)
        loss.sum().backward()
        found.append((loss.detach(), d, leaf.grad))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [CPP, TRITON, CUDA])
def test_float64_is_refused_by_a_named_backend(backend):
    with use_backend(backend), pytest.raises(NotBuiltError, match="float64"):
        gan_loss(torch.zeros(4, dtype=torch.float64), (1.0,))
