"""The adversarial loss, its gradient and the mean of D(x), one program for each group."""

from __future__ import annotations

import triton
import triton.language as tl
from fastgan.kernels import common
from torch import Tensor

_MOST_BLOCK = 4096


@triton.jit
def _log1p(x):
    """``log(1 + x)`` for ``x`` in [0, 1]: the rounding of ``1 + x`` divided out again (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _bce_fwd_kernel(logits_ptr, targets, loss_ptr, d_ptr, dlogits_ptr, size, BLOCK: tl.constexpr):
    group = tl.program_id(0)
    target = 0.0
    for g in tl.static_range(len(targets)):
        target = tl.where(group == g, targets[g], target)
    loss = tl.zeros((BLOCK,), tl.float32)
    d = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, size, BLOCK):
        at = i + tl.arange(0, BLOCK)
        mask = at < size
        x = tl.load(logits_ptr + group * size + at, mask=mask, other=0.0).to(tl.float32)
        small = tl.exp(-tl.abs(x))
        sigmoid = tl.where(x >= 0.0, 1.0, small) / (1.0 + small)
        one = tl.where(x > 0.0, x, tl.where(x <= 0.0, 0.0, x)) - x * target + _log1p(small)
        loss += tl.where(mask, one, 0.0)
        d += tl.where(mask, sigmoid, 0.0)
        dx = (sigmoid - target) / size
        tl.store(dlogits_ptr + group * size + at, dx.to(dlogits_ptr.dtype.element_ty), mask=mask)
    tl.store(loss_ptr + group, (tl.sum(loss) / size).to(loss_ptr.dtype.element_ty))
    tl.store(d_ptr + group, (tl.sum(d) / size).to(d_ptr.dtype.element_ty))


@common.launcher
def bce_forward(
    logits: Tensor, targets: list[float], loss: Tensor, d: Tensor, dlogits: Tensor
) -> None:
    """``loss [groups]``, ``d [groups]`` and ``d loss_g / d logit``; all contiguous."""
    size = logits.numel() // len(targets)
    block = common.power_of_2(size, 128, _MOST_BLOCK)
    _bce_fwd_kernel[(len(targets),)](
        *(logits, tuple(targets), loss, d, dlogits, size),
        BLOCK=block,
        num_warps=4 if block <= 1024 else 8,
    )
