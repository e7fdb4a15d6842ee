"""Finding the fused blocks in a sequence of plain modules, and running them.

``Conv2d`` or ``ConvTranspose2d``, then ``BatchNorm2d`` or none, then ``ReLU``, ``LeakyReLU``,
``Tanh`` or none, are one block of :mod:`fastgan.ops.block`. The modules stay what they are: their
parameters, state-dict keys and training modes are read at each call, and so is whether they may be
fused: what has come by a hook since runs as it is.

In a sequence of fastgan's own (``own``), unlike in anybody's that is accelerated, a batch norm that
follows no convolution makes a block as well, and so does a convolution that is changed by PyTorch's
spectral norm alone. Its weight is read once in a pass: in training each reading is an iteration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize

from fastgan.ops.activation import ACTIVATIONS
from fastgan.ops.block import conv_bn_act, conv_transpose_bn_act
from fastgan.ops.bn_act import bn_act
from fastgan.ops.conv import conv

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
}
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Activation(NamedTuple):
    """An activation that is called as a function, ``F.leaky_relu(x, 0.2)``, among modules."""

    name: str
    negative_slope: float = 0.0


Part = nn.Module | Activation
Parts = TypeVar("Parts", bound=Part)


class Block(NamedTuple):
    """Parts that follow one another and run as one, the first of them a module."""

    convolution: nn.Conv2d | nn.ConvTranspose2d | None
    batch_norm: nn.modules.batchnorm._BatchNorm | None
    activation: str
    negative_slope: float


def altered(module: nn.Module, *, own: bool = False) -> str | None:
    """What keeps ``module`` from being replaced by the op it stands for; None if nothing does."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has hooks"
    if parametrize.is_parametrized(module) and not (own and _is_spectrally_normed(module)):
        return "is parametrized"
    if "forward" in vars(module):
        return "has its forward replaced"
    if torch_module._has_any_global_hook():
        return "has hooks, as every module has while a global one is registered"
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


def split_blocks(parts: Sequence[Parts], *, own: bool = False) -> Iterator[Block | Parts]:
    """``parts`` in order, those that make a block together as one."""
    i = 0
    while i < len(parts):
        first = parts[i]
        convolution = None
        if isinstance(first, CONVOLUTIONS) and not convolution_obstacle(first, own=own):
            convolution = first
            i += 1
        kinds = BATCH_NORMS if convolution is None else (nn.BatchNorm2d,)
        batch_norm = _batch_norm(parts[i], kinds) if i < len(parts) else None
        if convolution is None and not (own and batch_norm):
            i += 1
            yield first
            continue
        i += batch_norm is not None
        activation = _activation(parts[i]) if i < len(parts) else Activation("none")
        i += activation.name != "none"
        yield Block(convolution, batch_norm, *activation)


def run_parts(x: Tensor, *parts: Part) -> Tensor:
    """``parts`` one after another, in blocks as far as they make some."""
    for part in split_blocks(parts):
        if isinstance(part, Block):
            x = run_block(part, x, 1)
        elif isinstance(part, Activation):
            x = ACTIVATIONS[part.name](x, part.negative_slope)
        else:
            x = part(x)
    return x


def is_channels_last(x: object) -> bool:
    """Whether ``x`` is a tensor in ``torch.channels_last`` alone: some sizes are contiguous too."""
    return (
        isinstance(x, Tensor)
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def plain(x: Tensor) -> Tensor:
    """``x``, contiguous if it is in ``torch.channels_last``."""
    return x.contiguous() if is_channels_last(x) else x


def laid_out_as(y: Tensor, x: Tensor, convolution: nn.Module) -> Tensor:
    """``y`` as PyTorch's own ``convolution`` of ``x`` lays out its result: ready for ``view``."""
    weight = getattr(convolution, "weight", None)
    return y if is_channels_last(x) or is_channels_last(weight) else plain(y)


def run_block(block: Block, x: Tensor, groups: int) -> Tensor:
    """``block`` over ``x``, in which ``groups`` equal batches lie one after another."""
    convolution, batch_norm, activation, slope = block
    if convolution is None:
        assert batch_norm is not None
        return run_batch_norm(batch_norm, x, groups, activation, slope)
    transposed = isinstance(convolution, nn.ConvTranspose2d)
    sizes: dict[str, Any] = {
        "stride": convolution.stride[0],
        "padding": int(convolution.padding[0]),
    }
    end: dict[str, Any] = {"activation": activation, "negative_slope": slope}
    weight, bias = convolution.weight, convolution.bias
    if batch_norm is None:
        return conv(x, weight, bias, transposed=transposed, **sizes, **end)
    if x.ndim != 4:
        batch_norm._check_input_dim(x)  # raises: the op takes other ranks, the module does not
    norm = batch_norm_arguments(batch_norm, groups)
    if norm is None:
        y = conv(x, weight, bias, transposed=transposed, **sizes)
        return ACTIVATIONS[activation](_each_group(batch_norm, y, groups), slope)
    fused = conv_transpose_bn_act if transposed else conv_bn_act
    return fused(x, weight, bias, batch_norm.weight, batch_norm.bias, **norm, **sizes, **end)


def run_batch_norm(
    bn: nn.modules.batchnorm._BatchNorm,
    x: Tensor,
    groups: int,
    activation: str = "none",
    slope: float = 0.0,
) -> Tensor:
    """``bn``, then ``activation``, over ``x``, in which ``groups`` equal batches lie in order."""
    bn._check_input_dim(x)  # raises: the op takes other ranks, the module does not
    norm = batch_norm_arguments(bn, groups)
    if norm is None:
        return ACTIVATIONS[activation](_each_group(bn, x, groups), slope)
    end: dict[str, Any] = {"activation": activation, "negative_slope": slope}
    return bn_act(x, bn.weight, bn.bias, **norm, **end)


def _each_group(module: nn.Module, x: Tensor, groups: int) -> Tensor:
    return module(x) if groups == 1 else torch.cat([module(part) for part in x.chunk(groups)])


def convolution_obstacle(
    module: nn.Conv2d | nn.ConvTranspose2d, *, own: bool = False
) -> str | None:
    """What keeps ``module`` out of a block; None if nothing does."""
    if change := altered(module, own=own):
        return change
    if parametrize.type_before_parametrizations(module) not in CONVOLUTIONS:
        return f"is a {type(module).__name__}, which may do anything"
    if isinstance(module.padding, str):
        return f"has padding={module.padding!r}"
    usual = {
        "groups": 1,
        "padding_mode": "zeros",
        "dilation": (1, 1),
        "output_padding": (0, 0),
    }
    for name, value in usual.items():
        if getattr(module, name) != value:
            return f"has {name}={getattr(module, name)!r}"
    for name in ("stride", "padding"):
        down, across = getattr(module, name)
        if down != across:
            return f"has {name}={(down, across)}"
    return None


def _is_spectrally_normed(module: nn.Module) -> bool:
    """Whether PyTorch's spectral norm of its weight is all that ``module`` is parametrized by."""
    changes = module.parametrizations
    assert isinstance(changes, nn.ModuleDict)
    if list(changes) != ["weight"]:
        return False
    of_weight = changes["weight"]
    assert isinstance(of_weight, parametrize.ParametrizationList)
    return [type(change) for change in of_weight] == [parametrizations._SpectralNorm]


def _batch_norm(
    part: Part, kinds: tuple[type[nn.Module], ...]
) -> nn.modules.batchnorm._BatchNorm | None:
    if isinstance(part, BATCH_NORMS) and type(part) in kinds and not altered(part):
        return part
    return None


def _activation(part: Part) -> Activation:
    if isinstance(part, Activation):
        return part
    if type(part) in ACTIVATION_MODULES and not altered(part):
        slope = part.negative_slope if isinstance(part, nn.LeakyReLU) else 0.0
        return Activation(ACTIVATION_MODULES[type(part)], slope)
    return Activation("none")
