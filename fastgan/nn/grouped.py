"""One forward pass over one batch, or over several laid one after another as if each went alone.

Only batch norm looks across the samples of a batch, so where every other leaf works on each sample
by itself, ``groups`` passes are one pass whose batch norms keep the groups apart. A module that
might look across samples in another way, or that changes with each call (spectral norm, dropout,
hooks), is not grouped; :func:`grouping_obstacle` says why not. Blocks of convolution, batch norm
and activation in a plain ``Sequential``, or an accelerated one, run fused, with one batch as with
several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgan.nn.blocks import (
    BATCH_NORMS,
    Block,
    altered,
    is_channels_last,
    plain,
    run_batch_norm,
    run_block,
    split_blocks,
)


@runtime_checkable
class _Grouped(Protocol):
    """A module that knows how to take several batches."""

    def forward_grouped(self, x: Tensor, groups: int, *extra: Tensor) -> Tensor: ...


# Exact types: a subclass may do anything.
_PER_SAMPLE = frozenset(
    {
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.Linear, nn.Identity, nn.Flatten, nn.Unflatten),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
        *(nn.Mish, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.LogSigmoid),
        *(nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
        *(nn.GroupNorm, nn.LayerNorm, nn.PixelShuffle, nn.PixelUnshuffle),
        *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
        *(nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d),
    }
)

# They return the memory format that they get and compute the same in each. Dropout does not: it
# draws in the order of memory.
_LAYOUT_KEPT = (_PER_SAMPLE | {nn.BatchNorm2d, nn.InstanceNorm2d}) - {
    nn.Linear,
    nn.Flatten,
    nn.Unflatten,
    nn.LayerNorm,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
}

_WHY_NOT = {
    "has hooks": "has hooks, which would see both batches at once",
    "is parametrized": "is parametrized, which may change with each pass",
}


def grouping_obstacle(module: nn.Module) -> str | None:
    """Why :func:`grouped_forward` may not be used on ``module``; None where it may."""
    for name, part in module.named_modules():
        where = f"{name or 'the module itself'} ({type(part).__name__})"
        if change := altered(part):
            return f"{where} {_WHY_NOT.get(change, change)}"
        if _is_per_sample(part) or type(part) in BATCH_NORMS or _walks_children(part):
            continue
        if isinstance(part, parametrize.ParametrizationList):
            continue
        return f"{where} is not known to treat each sample alone"
    return None


def grouped_forward(module: nn.Module, x: Tensor, groups: int, *extra: Tensor) -> Tensor:
    """``module`` over ``groups`` equal batches that lie one after another in ``x``.

    Args:
        module: one for which :func:`grouping_obstacle` is None.
        x: ``[groups·n, ...]``.
        groups: how many batches.
        extra: what else ``module`` takes, such as labels: ``[groups·n, ...]`` each, in the order of
            ``x``.

    Returns:
        ``[groups·n, ...]``.

    Equivalent to::

        torch.cat([module(*parts) for parts in zip(*(t.chunk(groups) for t in (x, *extra)))])
    """
    if groups > 1 and isinstance(module, _Grouped):
        return module.forward_grouped(x, groups, *extra)
    if extra:
        return module(x, *extra)
    if _is_sequence(module) and not altered(module):
        return run_sequence(_children(module), x, groups)
    if groups > 1 and isinstance(module, BATCH_NORMS):
        return run_batch_norm(module, x, groups)
    return module(x)


def sequence_forward(self: nn.Module, input: Tensor) -> Tensor:
    """In place of :meth:`torch.nn.Sequential.forward`, what accelerated ones have.

    Blocks hand ``torch.channels_last`` to one another. What others are given, who may call
    ``view``, is laid out as PyTorch's own convolutions do it: as their input or weight is.
    """
    x, is_plain = _run_in_layout(self, input, not is_channels_last(input))
    return plain(x) if is_plain else x


def _run_in_layout(module: nn.Module, x: Tensor, is_plain: bool) -> tuple[Tensor, bool]:
    """What the children make of ``x``. ``is_plain`` goes with it, in and out: whether PyTorch would
    have it otherwise than in ``torch.channels_last``."""
    for part in split_blocks(_children(module)):
        if isinstance(part, Block):
            assert part.convolution is not None
            x = run_block(part, x, 1)
            is_plain = is_plain and not is_channels_last(part.convolution.weight)
        elif _is_sequence(part) and not altered(part):
            x, is_plain = _run_in_layout(part, x, is_plain)
        elif type(part) in _LAYOUT_KEPT and not altered(part):
            x = part(x)
        else:
            x = part(plain(x) if is_plain else x)
            is_plain = not is_channels_last(x)
    return x, is_plain


def _is_sequence(module: nn.Module) -> bool:
    return type(module) is nn.Sequential or type(module).forward is sequence_forward


def _children(sequence: nn.Module) -> list[nn.Module]:
    return list(sequence)  # type: ignore[call-overload]


def run_sequence(modules: Sequence[nn.Module], x: Tensor, groups: int) -> Tensor:
    """:func:`grouped_forward` of the ``modules`` one after another, in blocks."""
    for part in split_blocks(modules, own=True):
        if isinstance(part, Block):
            x = run_block(part, x, groups)
        else:
            x = grouped_forward(part, x, groups)
    return x


def _is_per_sample(module: nn.Module) -> bool:
    if type(module) is nn.Embedding:
        # That scales by how often each index is in the batch.
        return not module.scale_grad_by_freq
    return type(module) in _PER_SAMPLE


def _walks_children(module: nn.Module) -> bool:
    """Whether ``grouped_forward`` goes through ``module``'s children as its ``forward`` does."""
    if _is_sequence(module):
        return True
    # A subclass that overrides forward alone has a forward_grouped that no longer matches it.
    for cls in type(module).__mro__:
        if "forward" in vars(cls) or "forward_grouped" in vars(cls):
            return "forward" in vars(cls) and "forward_grouped" in vars(cls)
    return False
