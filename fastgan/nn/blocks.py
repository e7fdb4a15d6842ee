"""Finding the fused blocks in a sequence of plain modules, and running them.

``Conv2d`` or ``ConvTranspose2d``, then ``BatchNorm2d`` or none, then ``ReLU``, ``LeakyReLU``,
``Tanh`` or none, are one block of :mod:`fastgan.ops.block`. The modules stay what they are: their
parameters, state-dict keys and training modes are read at each call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgan.ops.activation import ACTIVATIONS
from fastgan.ops.block import conv_bn_act, conv_transpose_bn_act
from fastgan.ops.bn_act import bn_act
from fastgan.ops.conv import conv

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Block(NamedTuple):
    """Modules that follow one another and run as one."""

    convolution: nn.Conv2d | nn.ConvTranspose2d
    batch_norm: nn.BatchNorm2d | None
    activation: str
    negative_slope: float


def altered(module: nn.Module) -> str | None:
    """What keeps ``module`` from being replaced by the op it stands for; None if nothing does."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has hooks"
    if parametrize.is_parametrized(module):
        return "is parametrized"
    if "forward" in vars(module):
        return "has its forward replaced"
    return None


def batch_norm_arguments(bn: nn.modules.batchnorm._BatchNorm, groups: int) -> dict[str, Any] | None:
    """What :func:`bn_act` takes from ``bn``, whose count of batches moves; None where it cannot.

    A cumulative average (``momentum=None``) weighs each batch by the count of those before it, and
    without running statistics evaluation takes the batch's: both are left to the module.
    """
    if bn.training and bn.track_running_stats and bn.momentum is None:
        return None
    if not bn.training and bn.running_mean is None:
        return None
    tracks = bn.track_running_stats or not bn.training
    if bn.training and tracks and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(groups)
    return {
        "running_mean": bn.running_mean if tracks else None,
        "running_var": bn.running_var if tracks else None,
        "training": bn.training,
        "momentum": 0.0 if bn.momentum is None else bn.momentum,
        "eps": bn.eps,
        "groups": groups,
    }


def split_blocks(modules: Sequence[nn.Module]) -> Iterator[Block | nn.Module]:
    """``modules`` in order, those that make a block together as one."""
    i = 0
    while i < len(modules):
        first = modules[i]
        i += 1
        if not _is_plain_convolution(first):
            yield first
            continue
        batch_norm = None
        if i < len(modules) and type(modules[i]) is nn.BatchNorm2d and not altered(modules[i]):
            batch_norm = modules[i]
            i += 1
        activation, slope = "none", 0.0
        if i < len(modules) and not altered(modules[i]):
            activation, slope = _activation(modules[i])
            i += activation != "none"
        yield Block(first, batch_norm, activation, slope)  # type: ignore[arg-type]


def run_block(block: Block, x: Tensor, groups: int) -> Tensor:
    """``block`` over ``x``, in which ``groups`` equal batches lie one after another."""
    convolution, batch_norm, activation, slope = block
    transposed = isinstance(convolution, nn.ConvTranspose2d)
    sizes: dict[str, Any] = {
        "stride": convolution.stride[0],
        "padding": int(convolution.padding[0]),
    }
    end: dict[str, Any] = {"activation": activation, "negative_slope": slope}
    weight, bias = convolution.weight, convolution.bias
    if batch_norm is None:
        return conv(x, weight, bias, transposed=transposed, **sizes, **end)
    norm = batch_norm_arguments(batch_norm, groups)
    if norm is None:
        y = conv(x, weight, bias, transposed=transposed, **sizes)
        return ACTIVATIONS[activation](_each_group(batch_norm, y, groups), slope)
    fused = conv_transpose_bn_act if transposed else conv_bn_act
    return fused(x, weight, bias, batch_norm.weight, batch_norm.bias, **norm, **sizes, **end)


def run_batch_norm(bn: nn.modules.batchnorm._BatchNorm, x: Tensor, groups: int) -> Tensor:
    """``bn`` over ``x``, in which ``groups`` equal batches lie one after another."""
    norm = batch_norm_arguments(bn, groups)
    if norm is None:
        return _each_group(bn, x, groups)
    return bn_act(x, bn.weight, bn.bias, **norm)


def _each_group(module: nn.Module, x: Tensor, groups: int) -> Tensor:
    return module(x) if groups == 1 else torch.cat([module(part) for part in x.chunk(groups)])


def _is_plain_convolution(module: nn.Module) -> bool:
    return (
        isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
        and type(module) in (nn.Conv2d, nn.ConvTranspose2d)
        and not altered(module)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.stride[0] == module.stride[1]
        and module.padding[0] == module.padding[1]
        and tuple(module.dilation) == (1, 1)
        and tuple(module.output_padding) == (0, 0)
    )


def _activation(module: nn.Module) -> tuple[str, float]:
    if type(module) is nn.ReLU:
        return "relu", 0.0
    if type(module) is nn.LeakyReLU:
        return "leaky_relu", module.negative_slope
    if type(module) is nn.Tanh:
        return "tanh", 0.0
    return "none", 0.0
