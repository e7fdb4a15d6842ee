"""Batch norm + activation over groups of the batch.

With the batch ``[groups·n, C, H, W]`` cut into ``groups`` equal parts along its first dimension,
each part ``g`` is normalised by its own statistics:

    y = act(weight · (x - mean_g) · invstd_g + bias),   invstd_g = 1 / sqrt(var_g + eps)

``mean_g`` and the biased ``var_g`` are taken over N, H, W of the part (Ioffe & Szegedy 2015,
https://arxiv.org/abs/1502.03167). In training the running statistics move once for each part, in
order, by ``momentum`` and with the unbiased variance, as that many separate calls would move them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.errors import InputError

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda y, slope: y,
    "relu": lambda y, slope: F.relu(y),
    "leaky_relu": lambda y, slope: F.leaky_relu(y, slope),
    "tanh": lambda y, slope: torch.tanh(y),
}


def bn_act_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    groups: int,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """The formula above in differentiable torch. Arguments as in :func:`bn_act`."""
    parts = [
        F.batch_norm(part, running_mean, running_var, weight, bias, training, momentum, eps)
        for part in x.chunk(groups if training else 1)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return ACTIVATIONS[activation](y, negative_slope)


def bn_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    groups: int = 1,
    activation: str = "none",
    negative_slope: float = 0.2,
) -> Tensor:
    """Batch norm over ``groups`` equal parts of the batch, then an activation.

    Args:
        x: ``[groups·n, C, ...]``, any floating dtype, any memory format.
        weight, bias: ``[C]`` or None.
        running_mean, running_var: ``[C]``, updated in place in training; None in training means
            that none are kept. Required in evaluation, where they normalise and groups have no
            effect.
        training: normalise by the statistics of the batch.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.
        groups: how many equal parts ``x`` has along its first dimension.
        activation: ``none``, ``relu``, ``leaky_relu`` or ``tanh``.
        negative_slope: of ``leaky_relu``.

    Returns:
        ``y``, shaped and laid out as ``x``.

    Raises:
        InputError: ``groups`` does not divide the batch, or ``activation`` is unknown.

    Equivalent to::

        act(torch.cat([F.batch_norm(part, running_mean, running_var, weight, bias, training,
                                    momentum, eps) for part in x.chunk(groups)]))
    """
    if groups < 1 or x.shape[0] % groups:
        raise InputError(f"groups={groups} does not divide the batch of {x.shape[0]}")
    if activation not in ACTIVATIONS:
        raise InputError(f"activation={activation!r}: choose from {', '.join(ACTIVATIONS)}")
    return bn_act_reference(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        groups,
        activation,
        negative_slope,
    )
