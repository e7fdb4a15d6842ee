"""Which implementation runs an op, and what is said where it is not the one asked for."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from support.numerics import (
    CUDA,
    DTYPES,
    GPU_DEVICE,
    TRITON,
    WINOGRAD,
    error,
    needs_kernels,
    needs_triton,
)

from fastgan import bn_act, gan_loss, gpu, saying
from fastgan.errors import InputError, NotBuiltError
from fastgan.ops import cpp, cuda, triton
from fastgan.ops.backend import (
    machine_reasons,
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


def test_names(without_cuda):
    assert resolve_backend("auto") == "auto"
    assert resolve_backend("reference") == "reference"
    with pytest.raises(InputError, match="'cudnn'"):
        resolve_backend("cudnn")
    with pytest.raises(InputError, match="'cudnn'"):
        unsupported_reasons("conv", "cudnn")
    with pytest.raises(NotBuiltError, match=r"backend='cuda': .*FASTGAN_BUILD=cuda"):
        resolve_backend("cuda")
    assert unsupported_reasons("conv", "cuda")
    assert unsupported_reasons("augment", "reference") == []
    assert unsupported_reasons("augment", "cpp")


def test_the_environment_stands_in_for_auto_alone(monkeypatch, without_cuda):
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


@pytest.mark.parametrize("backend", [TRITON, CUDA])
@pytest.mark.parametrize("op", gpu.OPS)
def test_what_the_kernels_for_gpus_take(op, backend):
    fits = torch.zeros(2, 3, device=GPU_DEVICE)
    assert unsupported_reasons(op, backend) == []
    for dtype in DTYPES:
        assert unsupported_reasons(op, backend, fits.to(dtype), None) == []
    refused = [("meta", fits.to("meta")), ("empty", fits[:0])]
    if op != "augment":
        # Which takes bytes, and counts images apart.
        many = torch.zeros(1, device=GPU_DEVICE).expand(2**31)
        assert unsupported_reasons(op, backend, many[1:]) == []
        refused += [("float64", fits.double()), ("2147483647", many)]
    if op == "conv":
        refused.append(("float16 and float32", fits.half()))
    for word, tensor in refused:
        (reason,) = unsupported_reasons(op, backend, fits, tensor)
        assert word in reason
        with use_backend(backend), pytest.raises(NotBuiltError, match=word):
            select_backend(op, fits, tensor)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_tensor_on_the_cpu_is_refused_where_the_kernels_are_compiled():
    (reason,) = unsupported_reasons("conv", "triton", torch.zeros(2))
    assert "is on cpu" in reason


@needs_triton
def test_what_triton_does_not_take_is_said_by_the_ops():
    x, weight = (t.to(GPU_DEVICE) for t in operands())
    with use_backend("triton"):
        with pytest.raises(NotBuiltError, match=r"conv: .*not of one dtype"):
            conv(x.half(), weight, **CONVOLUTION)
        with pytest.raises(NotBuiltError, match=r"conv: .*meta"):
            conv(x.to("meta"), weight.to("meta"), **CONVOLUTION)
        with pytest.raises(NotBuiltError, match=r"bn_act: .*empty"):
            bn_act(x[:0], training=False, running_mean=x[0, :, 0, 0], running_var=x[0, :, 0, 0])


@needs_triton
def test_the_interpreter_is_for_whoever_asks_for_it():
    assert select_backend("augment", torch.zeros(2, 3)) == "reference"
    with use_backend("triton"):
        assert select_backend("augment", torch.zeros(2, 3, device=GPU_DEVICE)) == "triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_without_a_gpu():
    """And without triton's interpreter, which the tests have asked for."""
    program = (
        "from fastgan.ops.backend import machine_reasons, resolve_backend, unsupported_reasons\n"
        "from fastgan.errors import NotBuiltError\n"
        "(reason,) = machine_reasons('triton')\n"
        "assert unsupported_reasons('conv', 'triton') == [reason]\n"
        "try: resolve_backend('triton')\n"
        "except NotBuiltError as error: print(error)\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert (result.returncode, result.stderr) == (0, "")
    assert "backend='triton': " in result.stdout and result.stdout.count("\n") == 1
    if not triton.missing_reasons():
        assert "torch sees no GPU; TRITON_INTERPRET=1" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_cuda_kernels_without_a_gpu(monkeypatch):
    """Which say first that they are not built, if they are not."""
    monkeypatch.setattr(cuda, "_find", cuda.find)
    monkeypatch.setitem(sys.modules, "fastgan._cuda", None)
    (reason,) = machine_reasons("cuda")
    assert reason.startswith("the CUDA kernels are not installed (")
    assert "FASTGAN_BUILD=cuda" in reason
    monkeypatch.setitem(sys.modules, "fastgan._cuda", sys)
    assert machine_reasons("cuda") == ["torch sees no GPU"]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in machine_reasons("cuda")[0]


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    triton._find.cache_clear()
    try:
        (reason,) = unsupported_reasons("conv", "triton")
        assert "pip install triton" in reason
        with pytest.raises(NotBuiltError, match="not installed"):
            resolve_backend("triton")
        x, weight = operands()
        want = F.conv2d(x.double(), weight.double(), **CONVOLUTION)
        assert error(conv(x, weight, **CONVOLUTION), want) < WINOGRAD
    finally:
        triton._find.cache_clear()


@needs_kernels
def test_under_autocast_the_ops_cast_as_torchs_own_do():
    x, weight = operands()
    weight.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = conv(x, weight, bias=None, **CONVOLUTION)
        want = F.conv2d(x, weight, **CONVOLUTION)
        assert torch.equal(got, want)
        assert got.dtype == want.dtype == torch.bfloat16
        # float64 is left alone, as torch leaves it.
        assert conv(x.double(), weight.double(), **CONVOLUTION).dtype == torch.float64
        block = conv_bn_act(x, weight, bn_weight=torch.ones(len(weight)), **CONVOLUTION)
        assert block.dtype == torch.bfloat16
        loss, _ = gan_loss(got.mean((1, 2, 3)), [1.0])
        assert loss.dtype == torch.float32
        assert conv(x=x, weight=weight, **CONVOLUTION).dtype == torch.bfloat16
    loss.sum().backward()
    assert weight.grad.dtype == torch.float32
    assert conv(x, weight, **CONVOLUTION).dtype == torch.float32


@needs_kernels
def test_a_backend_that_is_named_says_that_it_cannot_do_what_autocast_asks():
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        use_backend("cpp"),
        pytest.raises(NotBuiltError, match="bfloat16, the kernels are float32"),
    ):
        conv(*operands(), **CONVOLUTION)


@needs_kernels
def test_shapes_without_a_kernel_are_left_to_the_reference_and_said_once(monkeypatch, caplog):
    monkeypatch.setattr(saying, "_said", set())
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
