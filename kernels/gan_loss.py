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
def _loss_of(x, target, KIND: tl.constexpr):
    """The loss of each logit, its gradient, and what ``d`` is the mean of. NaN stays NaN."""
    if KIND == "bce":
        small = tl.exp(-tl.abs(x))
        sigmoid = tl.where(x >= 0.0, 1.0, small) / (1.0 + small)
        loss = tl.where(x > 0.0, x, tl.where(x <= 0.0, 0.0, x)) - x * target + _log1p(small)
        return loss, sigmoid - target, sigmoid
    if KIND == "lsgan":
        return 0.5 * (x - target) * (x - target), x - target, x
    sign = 2.0 * target - 1.0
    if KIND == "hinge":
        margin = 1.0 - sign * x
        return tl.where(margin <= 0.0, 0.0, margin), tl.where(margin <= 0.0, 0.0, -sign), x
    return -sign * x, tl.zeros_like(x) - sign, x


@triton.jit
def _gan_loss_fwd_kernel(
    logits_ptr,
    targets,
    loss_ptr,
    d_ptr,
    dlogits_ptr,
    size,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
        one, dx, score = _loss_of(x, target, KIND)
        loss += tl.where(mask, one, 0.0)
        d += tl.where(mask, score, 0.0)
        dx = dx / size
        tl.store(dlogits_ptr + group * size + at, dx.to(dlogits_ptr.dtype.element_ty), mask=mask)
    tl.store(loss_ptr + group, (tl.sum(loss) / size).to(loss_ptr.dtype.element_ty))
    tl.store(d_ptr + group, (tl.sum(d) / size).to(d_ptr.dtype.element_ty))


@common.launcher
def gan_loss_forward(
    logits: Tensor, targets: list[float], kind: str, loss: Tensor, d: Tensor, dlogits: Tensor
) -> None:
    """``loss [groups]``, ``d [groups]`` and ``d loss_g / d logit``; all contiguous."""
    size = logits.numel() // len(targets)
    block = common.power_of_2(size, 128, _MOST_BLOCK)
    _gan_loss_fwd_kernel[(len(targets),)](
        *(logits, tuple(targets), loss, d, dlogits, size),
        KIND=kind,
        BLOCK=block,
        num_warps=4 if block <= 1024 else 8,
    )
