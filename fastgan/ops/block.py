"""A block of a GAN: convolution + batch norm + activation, composed of those two ops.

In training the convolution's kernel sums the statistics of its output as it writes it, and
``bn_act`` goes over the tensor once. In evaluation the batch norm is a scale and a shift of each
channel, which fold into the convolution's weight and bias:

    scale = bn_weight / sqrt(running_var + eps)
    y = act(conv(x, weight · scale) + (bias - running_mean) · scale + bn_bias)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.errors import InputError
from fastgan.ops.autocast import under_autocast
from fastgan.ops.bn_act import bn_act
from fastgan.ops.conv import conv, conv_forward, kernel_backend


@under_autocast(x="low", weight="low", bias="low")
def _block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stride: int,
    padding: int,
    transposed: bool,
    training: bool,
    momentum: float,
    eps: float,
    groups: int,
    activation: str,
    negative_slope: float,
) -> Tensor:
    if groups < 1 or x.shape[0] % groups:
        raise InputError(f"groups={groups} does not divide the batch of {x.shape[0]}")
    backend = kernel_backend(x, weight, bias, stride, padding, transposed, negative_slope)
    if backend != "reference" and not training and running_mean is not None:
        assert running_var is not None
        scale = torch.rsqrt(running_var + eps)
        if bn_weight is not None:
            scale = scale * bn_weight
        shift = -running_mean if bias is None else bias - running_mean
        shift = shift * scale
        if bn_bias is not None:
            shift = shift + bn_bias
        per_output = (1, -1, 1, 1) if transposed else (-1, 1, 1, 1)
        return conv(
            x,
            (weight * scale.view(per_output)).to(weight.dtype),
            shift.to(weight.dtype),
            stride=stride,
            padding=padding,
            transposed=transposed,
            activation=activation,
            negative_slope=negative_slope,
        )
    stats = None
    if backend == "reference":
        y = conv(x, weight, bias, stride=stride, padding=padding, transposed=transposed)
    else:
        y, stats = conv_forward(
            x, weight, bias, stride, padding, transposed, "none", 0.0, groups, backend
        )
    return bn_act(
        y,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        groups=groups,
        activation=activation,
        negative_slope=negative_slope,
        stats=stats,
    )


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    stride: int = 2,
    padding: int = 1,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    groups: int = 1,
    activation: str = "leaky_relu",
    negative_slope: float = 0.2,
) -> Tensor:
    """Convolution, batch norm over ``groups`` parts of the batch, activation.

    Args:
        x: ``[groups·n, C, H, W]``, any floating dtype, any memory format.
        weight: ``[C_out, C, kh, kw]``.
        bias: ``[C_out]`` or None, of the convolution.
        bn_weight, bn_bias, running_mean, running_var, training, momentum, eps, groups, activation,
            negative_slope: as in :func:`fastgan.ops.bn_act.bn_act`.
        stride, padding: as in :func:`fastgan.ops.conv.conv`.

    Returns:
        ``[groups·n, C_out, H', W']``.

    Raises:
        InputError: ``groups`` does not divide the batch, or ``activation`` is unknown.
        NotBuiltError: a backend was asked for by name that cannot take these tensors.

    Equivalent to::

        y = F.conv2d(x, weight, bias, stride, padding)
        act(torch.cat([F.batch_norm(part, running_mean, running_var, bn_weight, bn_bias, training,
                                    momentum, eps) for part in y.chunk(groups)]))
    """
    return _block(
        x,
        weight,
        bias,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        stride,
        padding,
        False,
        training,
        momentum,
        eps,
        groups,
        activation,
        negative_slope,
    )


def conv_transpose_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    stride: int = 2,
    padding: int = 1,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    groups: int = 1,
    activation: str = "relu",
    negative_slope: float = 0.2,
) -> Tensor:
    """Transposed convolution, batch norm over ``groups`` parts of the batch, activation.

    Args:
        x: ``[groups·n, C, h, w]``, any floating dtype, any memory format.
        weight: ``[C, C_out, kh, kw]``.
        bias: ``[C_out]`` or None, of the convolution.
        bn_weight, bn_bias, running_mean, running_var, training, momentum, eps, groups, activation,
            negative_slope: as in :func:`fastgan.ops.bn_act.bn_act`.
        stride, padding: as in :func:`fastgan.ops.conv.conv`.

    Returns:
        ``[groups·n, C_out, H, W]``.

    Raises:
        InputError: ``groups`` does not divide the batch, or ``activation`` is unknown.
        NotBuiltError: a backend was asked for by name that cannot take these tensors.

    Equivalent to::

        y = F.conv_transpose2d(x, weight, bias, stride, padding)
        act(torch.cat([F.batch_norm(part, running_mean, running_var, bn_weight, bn_bias, training,
                                    momentum, eps) for part in y.chunk(groups)]))
    """
    return _block(
        x,
        weight,
        bias,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        stride,
        padding,
        True,
        training,
        momentum,
        eps,
        groups,
        activation,
        negative_slope,
    )
