"""Shared fixtures: small data, and no trace left outside the tests' own folders."""

import functools
import os

import numpy as np
import pytest
import torch
from PIL import Image

# Read when triton is imported. Where torch has a GPU, the Triton kernels run on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from support import cuda_host

from fastgan import gpu
from fastgan.ops import cpp, cuda, triton, tuning


@pytest.fixture(autouse=True, scope="session")
def cuda_on_host():
    """Where torch has no GPU the CUDA kernels run on the CPU too, built when first asked for."""
    if torch.cuda.is_available() or cuda_host.missing_reasons():
        yield
        return

    @functools.cache
    def find():
        return cuda._Found(cuda_host.load(cuda_host.build_kernels()), "", on_host=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_find", find)
        yield


@pytest.fixture
def without_cuda(monkeypatch):
    """As where the CUDA kernels are not built."""
    missing = cuda._Found(None, "the CUDA kernels are not installed (no _cuda); FASTGAN_BUILD=cuda")
    monkeypatch.setattr(cuda, "_find", lambda: missing)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("FASTGAN_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def same_numbers_each_time():
    torch.manual_seed(0)


@pytest.fixture
def nan_outputs(monkeypatch):
    """What a kernel writes holds NaN until then, and ends where its memory ends."""

    def empty(shape, strides):
        return torch.empty_strided(shape, strides).fill_(torch.nan)

    monkeypatch.setattr(cpp, "_empty", empty)
    without = gpu._empty
    monkeypatch.setattr(gpu, "_empty", lambda *args: without(*args).fill_(torch.nan))


@pytest.fixture
def honest_triton():
    """Where the Triton kernels are interpreted, as strictly as a GPU would run them."""
    if triton.missing_reasons() or not triton.interpreted():
        yield
        return
    from support.interpreter_guard import guarded

    with guarded():
        yield


@pytest.fixture(autouse=True)
def fp32_precision():
    """Sets how the convolutions multiply float32 on a GPU: precisely, or as it is called with."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision

    def start(precision):
        convolutions.fp32_precision = precision

    start("ieee")
    yield start
    start(before)


@pytest.fixture
def threads():
    """Sets the number of threads, for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def use_isa():
    """Sets the instruction set of the kernels, for the rest of the test."""
    before = cpp.kernels().isa()
    yield cpp.kernels().use_isa
    cpp.kernels().use_isa(before)


@pytest.fixture
def prefer(monkeypatch, tmp_path):
    """A machine that finds the way of a given name the fastest, and has measured nothing before."""

    def start(way):
        def measured(ways, device):
            return {name: float(name != way) for name in ways}

        monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / way))
        monkeypatch.setattr(tuning, "_times", {})
        monkeypatch.setattr(tuning, "_measure", measured)

    return start


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path, rng):
    """Twelve RGB images of various sizes in two class folders."""
    root = tmp_path / "photos"
    for i in range(12):
        path = root / ("cats" if i % 3 else "dogs") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (int(rng.integers(20, 50)), int(rng.integers(20, 50)), 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return root


@pytest.fixture
def array_file(tmp_path, rng):
    """Forty grey 16x16 images with labels, as npz."""
    path = tmp_path / "small.npz"
    images = rng.integers(0, 256, (40, 16, 16), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(40) % 4)
    return path
