"""The adversarial loss, and what a GAN's log shows beside it, over groups of the batch.

For group ``g`` of the logits ``l``, with target ``t_g`` (1 real, 0 fake) and ``s_g = 2·t_g - 1``:

    kind           loss_g                                            d_g               t_g
    bce            mean(max(l, 0) - l·t_g + log(1 + exp(-|l|)))      mean(sigmoid(l))  from 0 to 1
    lsgan          mean((l - t_g)² / 2)                              mean(l)           finite
    hinge          mean(max(0, 1 - s_g·l))                           mean(l)           0 or 1
    wasserstein    mean(-s_g·l)                                      mean(l)           0 or 1

``bce`` is the binary cross-entropy of Goodfellow et al. 2014 (https://arxiv.org/abs/1406.2661) on
logits, in the form that neither overflows nor loses the small values: a generator that minimises it
with ``t = 1`` minimises the non-saturating loss -log D(G(z)). ``lsgan`` is of Mao et al. 2016
(https://arxiv.org/abs/1611.04076), ``hinge`` of Lim & Ye 2017 (https://arxiv.org/abs/1705.02894)
and Miyato et al. 2018 (https://arxiv.org/abs/1802.05957), ``wasserstein`` of Arjovsky et al. 2017
(https://arxiv.org/abs/1701.07875), and what the generator of ``hinge`` minimises.
"""

from __future__ import annotations

import array
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.errors import InputError
from fastgan.ops import cpp, cuda, triton
from fastgan.ops.autocast import under_autocast
from fastgan.ops.backend import fastest_backend, say_left_to_reference, select_backend

# Of a launch of the CUDA kernel: csrc/cuda/kernels.h.
_MOST_TARGETS = 64


class _Kind(NamedTuple):
    """A loss of one group's logits and its target.

    Attributes:
        loss: of the logits and the target, ``loss_g``.
        takes: which targets, in words.
        is_target: the same of one of them.
        score: what ``d_g`` is the mean of.
    """

    loss: Callable[[Tensor, float], Tensor]
    takes: str
    is_target: Callable[[float], bool]
    score: Callable[[Tensor], Tensor] = lambda x: x


def _is_label(target: float) -> bool:
    return target in (0.0, 1.0)


_KINDS = {
    "bce": _Kind(
        lambda x, target: F.binary_cross_entropy_with_logits(x, torch.full_like(x, target)),
        "a number from 0 to 1",
        lambda target: 0.0 <= target <= 1.0,
        torch.sigmoid,
    ),
    "lsgan": _Kind(
        lambda x, target: (x - target).square().mean() / 2, "a finite number", math.isfinite
    ),
    "hinge": _Kind(lambda x, target: F.relu(1 - (2 * target - 1) * x).mean(), "0 or 1", _is_label),
    "wasserstein": _Kind(lambda x, target: ((1 - 2 * target) * x).mean(), "0 or 1", _is_label),
}
# By name; the C++ and CUDA kernels know a kind by its place: csrc/*/kernels.h.
KINDS = tuple(_KINDS)


def gan_loss_reference(
    logits: Tensor, targets: Sequence[float], kind: str
) -> tuple[Tensor, Tensor]:
    """The formulas above in differentiable torch. Arguments as in :func:`gan_loss`."""
    of = _KINDS[kind]
    losses, means = [], []
    for part, target in zip(logits.chunk(len(targets)), targets, strict=True):
        losses.append(of.loss(part, target))
        means.append(of.score(part.detach()).mean())
    return torch.stack(losses), torch.stack(means)


@torch.library.custom_op("fastgan::gan_loss_forward", mutates_args=())
def gan_loss_forward(
    logits: Tensor, targets: list[float], kind: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``loss [groups]``, ``d [groups]``, and ``d loss_g / d logit``, shaped as ``logits``."""
    logits = logits.contiguous()

    def run(backend: str) -> tuple[Tensor, Tensor, Tensor]:
        return _FORWARD[backend](logits, targets, kind)

    key = f"{kind} {logits.numel()} groups {len(targets)} {logits.dtype}"
    return run(fastest_backend(backend, "gan_loss", key, run, logits))


def _cpp_forward(logits: Tensor, targets: list[float], kind: str) -> tuple[Tensor, Tensor, Tensor]:
    groups = len(targets)
    loss, d, dlogits = cpp.empty(groups), cpp.empty(groups), cpp.empty(*logits.shape)
    target = array.array("f", targets)
    cpp.kernels().gan_loss_forward(
        groups,
        logits.numel() // groups,
        logits.data_ptr(),
        target.buffer_info()[0],
        KINDS.index(kind),
        loss.data_ptr(),
        d.data_ptr(),
        dlogits.data_ptr(),
    )
    return loss, d, dlogits


def _triton_forward(
    logits: Tensor, targets: list[float], kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(logits, len(targets))
    triton.kernels("gan_loss").gan_loss_forward(logits, targets, kind, *outputs)
    return outputs


def _cuda_forward(logits: Tensor, targets: list[float], kind: str) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(logits, len(targets))
    given = cuda.aligned(logits), targets, KINDS.index(kind)
    cuda.launch("gan_loss_forward", *given, *outputs)
    return outputs


def _outputs(logits: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    return logits.new_empty(groups), logits.new_empty(groups), torch.empty_like(logits)


_FORWARD = {"cpp": _cpp_forward, "triton": _triton_forward, "cuda": _cuda_forward}


@gan_loss_forward.register_fake
def _(
    logits: Tensor, targets: list[float], kind: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
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
) -> tuple[Tensor | None, None, None, None]:
    if dloss is None:
        return None, None, None, None
    (dlogits,) = ctx.saved_tensors
    return gan_loss_backward(dloss, dlogits), None, None, None


gan_loss_forward.register_autograd(_backward, setup_context=_setup_context)


@under_autocast(logits="float32")
def gan_loss(
    logits: Tensor, targets: Sequence[float], *, kind: str = "bce"
) -> tuple[Tensor, Tensor]:
    """Loss of each group of the batch against its target, and what D says of it, in the mean.

    Args:
        logits: ``[groups·n, ...]``, floating; the discriminator's output before any sigmoid.
        targets: one for each of the ``groups`` equal parts of the batch: 1 where D is to take it
            for real, 0 for fake. ``bce`` takes any number between, ``lsgan`` any finite one.
        kind: ``bce``, ``lsgan``, ``hinge`` or ``wasserstein``.

    Returns:
        ``loss [groups]``, differentiable, and ``d [groups]``, detached; both of the logits' dtype,
        each the mean over all elements of its group; ``d`` is that of D(x), the sigmoid of the
        logits, for ``bce`` and of the logits for the others.

    Raises:
        InputError: the number of targets does not divide the batch, ``kind`` is unknown, or a
            target is none that it takes.
        NotBuiltError: a backend was asked for by name that cannot take these logits.

    The formulas and their sources are this module's: the binary cross-entropy (Goodfellow et al.
    2014), least squares (Mao et al. 2016), the hinge loss (Lim & Ye 2017, Miyato et al. 2018; its
    gradient at the kink is 0) and the critic's (Arjovsky et al. 2017).

    Equivalent to::

        of = {
            "bce": lambda l, t: F.binary_cross_entropy_with_logits(l, torch.full_like(l, t)),
            "lsgan": lambda l, t: ((l - t) ** 2).mean() / 2,
            "hinge": lambda l, t: F.relu(1 - (2 * t - 1) * l).mean(),
            "wasserstein": lambda l, t: (-(2 * t - 1) * l).mean(),
        }[kind]
        parts = logits.chunk(len(targets))
        loss = torch.stack([of(l, t) for l, t in zip(parts, targets)])
        d = torch.stack([(l.sigmoid() if kind == "bce" else l).mean() for l in parts])
    """
    if kind not in _KINDS:
        raise InputError(f"kind={kind!r}: choose from {', '.join(KINDS)}")
    if not targets or logits.shape[0] % len(targets):
        raise InputError(
            f"targets: {len(targets)} groups do not divide the batch of {logits.shape[0]}"
        )
    for target in targets:
        if not _KINDS[kind].is_target(target):
            raise InputError(f"targets: {target} of kind={kind!r} must be {_KINDS[kind].takes}")
    backend = select_backend("gan_loss", logits)
    if backend in ("cuda", "auto") and len(targets) > _MOST_TARGETS:
        if backend == "cuda":
            say_left_to_reference(f"gan_loss of more than {_MOST_TARGETS} groups")
        backend = "reference"
    if backend == "reference":
        return gan_loss_reference(logits, targets, kind)
    loss, d, _ = gan_loss_forward(logits, list(targets), kind, backend)
    return loss, d.detach()


def bce_loss(logits: Tensor, targets: Sequence[float]) -> tuple[Tensor, Tensor]:
    """:func:`gan_loss` with ``kind="bce"``."""
    return gan_loss(logits, targets, kind="bce")
