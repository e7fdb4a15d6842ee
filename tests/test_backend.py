"""Which implementation runs an op, and what is said where it is not the one asked for."""

import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from support.numerics import needs_kernels

from fastgan import bn_act, gan_loss
from fastgan.errors import InputError, NotBuiltError
from fastgan.ops import backend as backends
from fastgan.ops import cpp
from fastgan.ops.backend import (
    requested_backend,
    resolve_backend,
    select_backend,
    unsupported_reasons,
    use_backend,
)
from fastgan.ops.block import conv_bn_act
from fastgan.ops.conv import conv

CONVOLUTION = {"stride": 2, "padding": 1}


def operands(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return (torch.randn(s, generator=draw, dtype=dtype) for s in ((2, 5, 8, 8), (6, 5, 4, 4)))


def test_names():
    assert resolve_backend("auto") == "auto"
    assert resolve_backend("reference") == "reference"
    with pytest.raises(InputError, match="'cudnn'"):
        resolve_backend("cudnn")
    with pytest.raises(InputError, match="'cudnn'"):
        unsupported_reasons("conv", "cudnn")
    for name in ("cuda", "triton"):
        with pytest.raises(NotBuiltError, match=name):
            resolve_backend(name)
        assert unsupported_reasons("conv", name)
    assert unsupported_reasons("augment", "reference") == []
    assert unsupported_reasons("augment", "cpp")


def test_the_environment_stands_in_for_auto_alone(monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", "reference")
    assert requested_backend() == "reference"
    assert resolve_backend("auto") == "reference"
    monkeypatch.setenv("FASTGAN_BACKEND", "cuda")
    assert resolve_backend("reference") == "reference"
    with pytest.raises(NotBuiltError, match="cuda"):
        requested_backend()
    with use_backend("reference"):
        assert requested_backend() == "reference"
    monkeypatch.setenv("FASTGAN_BACKEND", "")
    assert requested_backend() == "auto"


@needs_kernels
def test_contexts_nest_and_end():
    assert requested_backend() == "auto"
    with use_backend("cpp"):
        with use_backend("reference"):
            assert requested_backend() == "reference"
            with use_backend("auto"):
                assert requested_backend() == "auto"
        assert requested_backend() == "cpp"
        with pytest.raises(InputError), use_backend("cudnn"):
            pass
        assert requested_backend() == "cpp"
    assert requested_backend() == "auto"


@needs_kernels
def test_a_context_is_its_threads_own():
    found = []
    with use_backend("cpp"):
        thread = threading.Thread(target=lambda: found.append(requested_backend()))
        thread.start()
        thread.join()
    assert found == ["auto"]


@needs_kernels
@pytest.mark.parametrize("op", cpp.OPS)
def test_what_the_kernels_take(op):
    fits = torch.zeros(2, 3)
    assert unsupported_reasons(op, "cpp") == unsupported_reasons(op, "cpp", fits, None) == []
    for tensor, word in (
        (fits.double(), "float64"),
        (fits.half(), "float16"),
        (fits.to("meta"), "meta"),
        (fits[:0], "empty"),
    ):
        (reason,) = unsupported_reasons(op, "cpp", fits, tensor)
        assert word in reason
        assert select_backend(op, tensor) == "reference"
        with use_backend("cpp"), pytest.raises(NotBuiltError, match=word):
            select_backend(op, fits, tensor)


@needs_kernels
def test_autocast_is_torchs_own():
    x, weight = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert select_backend("conv", x) == "reference"
        assert conv(x, weight, **CONVOLUTION).dtype == torch.bfloat16


@needs_kernels
def test_shapes_without_a_kernel_are_left_to_the_reference_and_said_once(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_said", set())
    x, weight = torch.randn(2, 5, 8, 8), torch.randn(6, 5, 3, 3)
    want = F.conv2d(x, weight, padding=1)
    assert torch.equal(conv(x, weight, padding=1), want)
    assert not caplog.records
    with use_backend("cpp"):
        for _ in range(2):
            assert torch.equal(conv(x, weight, padding=1), want)
            conv_bn_act(x, weight, stride=1)
    (record,) = caplog.records
    assert "[6, 5, 3, 3]" in record.getMessage()
    assert "'cpp' has no kernel" in record.getMessage()


@needs_kernels
def test_the_reference_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(cpp, "kernels", None)
    x, weight = operands()
    want = F.conv2d(x, weight, **CONVOLUTION)
    with use_backend("reference"):
        assert torch.equal(conv(x, weight, **CONVOLUTION), want)
        bn_act(x)
        gan_loss(x, (1.0,))
    monkeypatch.setenv("FASTGAN_BACKEND", "reference")
    assert torch.equal(conv(x, weight, **CONVOLUTION), want)


def test_without_the_extension(monkeypatch):
    """Everything runs, and what was asked for by name says how to have it."""
    monkeypatch.setitem(sys.modules, "fastgan._cpu", None)
    cpp._load.cache_clear()
    try:
        x, weight = operands()
        assert torch.equal(conv(x, weight, **CONVOLUTION), F.conv2d(x, weight, **CONVOLUTION))
        (reason,) = unsupported_reasons("conv", "cpp")
        assert "compiler" in reason
        with pytest.raises(NotBuiltError, match="not installed"):
            resolve_backend("cpp")
    finally:
        cpp._load.cache_clear()
