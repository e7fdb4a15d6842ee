"""How the numbers of an op are judged: against float64, by the norm of the error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import cuda_host
from torch import Tensor

from fastgan.ops import cpp, cuda, triton

needs_kernels = pytest.mark.skipif(
    bool(cpp.missing_reasons()), reason="; ".join(cpp.missing_reasons())
)
needs_triton = pytest.mark.skipif(
    bool(triton.missing_reasons()), reason="; ".join(triton.missing_reasons())
)
_find_cuda = cuda if torch.cuda.is_available() else cuda_host
_without_cuda = _find_cuda.missing_reasons()
needs_cuda = pytest.mark.skipif(bool(_without_cuda), reason="; ".join(_without_cuda))
# Where the kernels for GPUs are tested: on a GPU, or on the CPU, Triton's interpreted and CUDA's
# compiled for it.
GPU_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPP = pytest.param("cpp", marks=needs_kernels)
TRITON = pytest.param("triton", marks=needs_triton)
CUDA = pytest.param("cuda", marks=needs_cuda)

EPS = torch.finfo(torch.float32).eps
WINOGRAD = 4e-6
TIMES_TORCH = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Where torch's own error is next to nothing, as much as two roundings.
FLOOR = {dtype: 2 * torch.finfo(dtype).eps for dtype in DTYPES}
# Of TF32, whose operands lose what follows 10 bits of their mantissas: up to 2^-10 of each.
TF32 = 2**-9

LAYOUTS = ("nchw", "nhwc", "strided")


def device_of(backend: str) -> str:
    """Where the tensors of a test of ``backend`` are."""
    return GPU_DEVICE if backend in ("triton", "cuda") else "cpu"


def error(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|``; that of zeros is 0 where they are exact."""
    assert got.shape == want.shape
    difference = (got.double() - want).norm()
    return float(difference / want.norm()) if difference else 0.0


def limit(torchs_own: Tensor, want: Tensor, floors: int = 1) -> float:
    """What an op may have where torch's result in the same dtype is ``torchs_own``."""
    return max(TIMES_TORCH * error(torchs_own, want), floors * FLOOR[torchs_own.dtype])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A copy of ``x [N, C, H, W]``; ``strided`` lies in no dense order, with NaN between."""
    if layout == "nchw":
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "nhwc":
        return x.clone(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    wider = torch.full((n, h, c + 1, 2 * w), torch.nan, dtype=x.dtype)
    view = wider[:, :, 1:, ::2].permute(0, 2, 1, 3)
    return view.copy_(x)


def alike(x: Tensor, dtype: torch.dtype, device: str = "cpu", *, margin: int = 0) -> Tensor:
    """A copy of ``x`` with the very strides it has, and NaN in memory between and around it."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.full((span + 2 * margin,), torch.nan, dtype=dtype, device=device)
    return memory.as_strided(x.shape, x.stride(), margin).copy_(x.detach())


def leaves(
    *tensors: Tensor | None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor | None]:
    """Copies that gather gradients, laid out as they were."""
    return [None if x is None else alike(x, dtype, device).requires_grad_() for x in tensors]


def away_from_kinks(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """``dy`` without the elements whose ``z`` is so near to 0 that rounding decides its side."""
    return dy if activation in ("none", "tanh") else dy * (z.abs() > 1e-4)


def compiled(function: Callable, backend: str = "aot_eager") -> Callable:
    """``function`` as one graph; each test compiles anew, and torch limits how often."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)
