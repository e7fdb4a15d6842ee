"""The adversarial loss, and what a GAN's log shows beside it, over groups of the batch.

For group ``g`` of the logits ``l``, with target ``t_g`` in [0, 1] (1 real, 0 fake):

    bce:   loss_g = mean(max(l, 0) - l·t_g + log(1 + exp(-|l|)))
    d_g    = mean(sigmoid(l))

the binary cross-entropy of Goodfellow et al. 2014 (https://arxiv.org/abs/1406.2661) on logits, in
the form that neither overflows nor loses the small values. A generator that minimises it with
``t = 1`` minimises the non-saturating loss -log D(G(z)).
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.errors import InputError, NotBuiltError
from fastgan.ops import cpp, cuda, triton
from fastgan.ops.autocast import under_autocast
from fastgan.ops.backend import fastest_backend, say_left_to_reference, select_backend

# Of a launch of the CUDA kernel: csrc/cuda/kernels.h.
_MOST_TARGETS = 64


def gan_loss_reference(logits: Tensor, targets: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The formula above in differentiable torch. Arguments as in :func:`gan_loss`."""
    losses, means = [], []
    for part, target in zip(logits.chunk(len(targets)), targets, strict=True):
        losses.append(F.binary_cross_entropy_with_logits(part, torch.full_like(part, target)))
        means.append(part.detach().sigmoid().mean())
    return torch.stack(losses), torch.stack(means)


@torch.library.custom_op("fastgan::gan_loss_forward", mutates_args=())
def gan_loss_forward(
    logits: Tensor, targets: list[float], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``loss [groups]``, ``d [groups]``, and ``d loss_g / d logit``, shaped as ``logits``."""
    logits = logits.contiguous()

    def run(backend: str) -> tuple[Tensor, Tensor, Tensor]:
        return _FORWARD[backend](logits, targets)

    key = f"{logits.numel()} groups {len(targets)} {logits.dtype}"
    return run(fastest_backend(backend, "gan_loss", key, run, logits))


def _cpp_forward(logits: Tensor, targets: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    groups = len(targets)
    loss, d, dlogits = cpp.empty(groups), cpp.empty(groups), cpp.empty(*logits.shape)
    target = array.array("f", targets)
    cpp.kernels().bce_forward(
        groups,
        logits.numel() // groups,
        logits.data_ptr(),
        target.buffer_info()[0],
        loss.data_ptr(),
        d.data_ptr(),
        dlogits.data_ptr(),
    )
    return loss, d, dlogits


def _triton_forward(logits: Tensor, targets: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(logits, len(targets))
    triton.kernels("gan_loss").bce_forward(logits, targets, *outputs)
    return outputs


def _cuda_forward(logits: Tensor, targets: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(logits, len(targets))
    cuda.launch("bce_forward", cuda.aligned(logits), targets, *outputs)
    return outputs


def _outputs(logits: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    return logits.new_empty(groups), logits.new_empty(groups), torch.empty_like(logits)


_FORWARD = {"cpp": _cpp_forward, "triton": _triton_forward, "cuda": _cuda_forward}


@gan_loss_forward.register_fake
def _(logits: Tensor, targets: list[float], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    groups = len(targets)
    return logits.new_empty(groups), logits.new_empty(groups), logits.new_empty(logits.shape)


@torch.library.custom_op("fastgan::gan_loss_backward", mutates_args=())
def gan_loss_backward(dloss: Tensor, dlogits: Tensor) -> Tensor:
    """The gradient for ``dloss [groups]``, from what :func:`gan_loss_forward` returned."""
    return (dlogits.view(len(dloss), -1) * dloss[:, None]).view(dlogits.shape)


@gan_loss_backward.register_fake
def _(dloss: Tensor, dlogits: Tensor) -> Tensor:
    return torch.empty_like(dlogits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.set_materialize_grads(False)  # of d and dlogits, which would be filled with zeros


def _backward(
    ctx: Any, dloss: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, None, None]:
    if dloss is None:
        return None, None, None
    (dlogits,) = ctx.saved_tensors
    return gan_loss_backward(dloss, dlogits), None, None


gan_loss_forward.register_autograd(_backward, setup_context=_setup_context)


@under_autocast(logits="float32")
def gan_loss(
    logits: Tensor, targets: Sequence[float], *, kind: str = "bce"
) -> tuple[Tensor, Tensor]:
    """Loss of each group of the batch against its target, and the mean of D(x) over it.

    Args:
        logits: ``[groups·n, ...]``, floating; the discriminator's output before any sigmoid.
        targets: one for each of the ``groups`` equal parts of the batch, each in [0, 1].
        kind: ``bce``.

    Returns:
        ``loss [groups]``, differentiable, and ``d [groups]``, detached; both of the logits' dtype,
        each the mean over all elements of its group.

    Raises:
        InputError: the number of targets does not divide the batch, or a target is out of range.
        NotBuiltError: ``kind`` is a loss that this version does not have, or a backend was asked
            for by name that cannot take these logits.

    Equivalent to::

        loss = [F.binary_cross_entropy_with_logits(part, torch.full_like(part, t))
                for part, t in zip(logits.chunk(len(targets)), targets)]
        d = [part.sigmoid().mean() for part in logits.chunk(len(targets))]
    """
    if kind != "bce":
        raise NotBuiltError(f"kind={kind!r}: this version has only 'bce'")
    if not targets or logits.shape[0] % len(targets):
        raise InputError(
            f"targets: {len(targets)} groups do not divide the batch of {logits.shape[0]}"
        )
    for target in targets:
        if not 0.0 <= target <= 1.0:
            raise InputError(f"targets: {target} is not in [0, 1]")
    backend = select_backend("gan_loss", logits)
    if backend in ("cuda", "auto") and len(targets) > _MOST_TARGETS:
        if backend == "cuda":
            say_left_to_reference(f"gan_loss of more than {_MOST_TARGETS} groups")
        backend = "reference"
    if backend == "reference":
        return gan_loss_reference(logits, targets)
    loss, d, _ = gan_loss_forward(logits, list(targets), backend)
    return loss, d.detach()


def bce_loss(logits: Tensor, targets: Sequence[float]) -> tuple[Tensor, Tensor]:
    """:func:`gan_loss` with ``kind="bce"``."""
    return gan_loss(logits, targets, kind="bce")
