"""Batch norm + activation over groups of the batch.

With the batch ``[groups·n, C, H, W]`` cut into ``groups`` equal parts along its first dimension,
each part ``g`` is normalised by its own statistics:

    y = act(weight · (x - mean_g) · invstd_g + bias),   invstd_g = 1 / sqrt(var_g + eps)

``mean_g`` and the biased ``var_g`` are taken over N, H, W of the part (Ioffe & Szegedy 2015,
https://arxiv.org/abs/1502.03167). In training the running statistics move once for each part, in
order, by ``momentum`` and with the unbiased variance, as that many separate calls would move them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.errors import InputError
from fastgan.gpu import empty, empty_images
from fastgan.ops import cpp, cuda, triton
from fastgan.ops.activation import ACTIVATIONS
from fastgan.ops.autocast import under_autocast
from fastgan.ops.backend import fastest_backend, kernels_of, select_backend


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


@torch.library.custom_op("fastgan::bn_act_forward", mutates_args=())
def bn_act_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stats: Tensor | None,
    training: bool,
    eps: float,
    groups: int,
    activation: str,
    negative_slope: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formula above, without the update of the running statistics.

    Args:
        stats: ``[tiles, 3, C]`` as of :func:`fastgan.ops.conv.conv_forward`, where the kernel that
            made ``x`` has summed it already.
        backend: ``cpp``, ``triton``, ``cuda``, or ``auto`` for the fastest.

    Returns:
        ``y``, and ``mean``, ``invstd``, biased ``var``, each float32 ``[groups, C]``, or ``[1, C]``
        and the running ones in evaluation.
    """
    x, weight, bias = cpp.dense(x), cpp.contiguous(weight), cpp.contiguous(bias)
    running = None
    if not training:
        assert running_mean is not None
        assert running_var is not None
        mean, var = torch.stack([running_mean]).float(), torch.stack([running_var]).float()
        running = mean, (var + eps).rsqrt_(), var
    given = _Given(x, weight, bias, activation, negative_slope)

    def run(backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _FORWARD[backend](given, running, stats, eps, groups)

    tiles = 0 if stats is None else len(stats)
    key = f"forward {_key(x, groups)} training {training} tiles {tiles}"
    return run(fastest_backend(backend, "bn_act", key, run, x))


class _Given(NamedTuple):
    """What both passes of every backend take: dense, and contiguous."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    activation: str
    negative_slope: float

    def aligned(self) -> _Given:
        x, weight, bias = map(cuda.aligned, self[:3])
        assert x is not None
        return self._replace(x=x, weight=weight, bias=bias)

    @property
    def code(self) -> int:
        return cpp.ACTIVATION_CODES[self.activation]


# Mean, invstd and var, where they are those of the running statistics and not of the batch.
_Running = tuple[Tensor, Tensor, Tensor] | None


def _key(x: Tensor, groups: int) -> str:
    """What the time of any pass depends on."""
    n, c, h, w = x.shape
    return f"n{n} {c}x{h}x{w} groups {groups} {x.dtype}"


def _cpp_forward(
    given: _Given, running: _Running, stats: Tensor | None, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y``, ``mean``, ``invstd``, ``var``."""
    x, weight, bias, _, slope = given
    mean, invstd, var = running or _cpp_statistics(x, stats, eps, groups)
    y = cpp.empty_images(*x.shape)
    cpp.kernels().bn_apply(
        _cpp_shape(x, len(mean)),
        x.data_ptr(),
        mean.data_ptr(),
        invstd.data_ptr(),
        cpp.address(weight),
        cpp.address(bias),
        given.code,
        slope,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y, mean, invstd, var


def _triton_forward(
    given: _Given, running: _Running, stats: Tensor | None, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`_cpp_forward`."""
    x, *rest = given
    mean, invstd, var = running or _triton_statistics(x, stats, eps, groups)
    y = empty_images(x, *x.shape)
    triton.kernels("bn_act").bn_act_forward(x, mean, invstd, *rest, y)
    return y, mean, invstd, var


def _cuda_forward(
    given: _Given, running: _Running, stats: Tensor | None, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`_cpp_forward`, the statistics finished by the kernel that normalises."""
    x, weight, bias, _, slope = given = given.aligned()
    tiles = None if running else _cuda_tiles(x, stats, groups)
    channels = x.shape[1]
    mean, invstd, var = running or (empty(x, groups, channels) for _ in range(3))
    y = empty_images(x, *x.shape)
    of_channels = mean, invstd, var, weight, bias
    cuda.launch("bn_act_forward", x, tiles, eps, *of_channels, given.code, slope, y)
    return y, mean, invstd, var


def _cuda_tiles(x: Tensor, stats: Tensor | None, groups: int) -> Tensor:
    """Statistics of few enough tiles for the kernel that normalises to merge."""
    k, c = cuda.kernels(), x.shape[1]
    if stats is None or len(stats) == 0:
        tiles = k.bn_tiles(groups, x.numel() // (groups * c), c, cuda.dtype_name(x))
        stats = empty(x, groups * tiles, 3, c)
        cuda.launch("bn_stats", x, stats, groups)
    elif len(stats) > groups * k.bn_most_tiles():
        many, stats = stats, empty(x, groups * k.bn_most_tiles(), 3, c)
        cuda.launch("bn_fold", many, stats, groups)
    return stats


def _cpp_statistics(
    x: Tensor, stats: Tensor | None, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``mean``, ``invstd`` and ``var``, of ``stats`` where there are any."""
    k, shape, c = cpp.kernels(), _cpp_shape(x, groups), x.shape[1]
    if stats is None or len(stats) == 0:
        stats = cpp.empty(groups * k.bn_tiles(shape), 3, c)
        threads = torch.get_num_threads()
        k.bn_stats(shape, k.bn_tile_rows(shape), 1, x.data_ptr(), stats.data_ptr(), threads)
    mean, var = cpp.empty(groups, c), cpp.empty(groups, c)
    k.bn_merge(groups, len(stats) // groups, c, stats.data_ptr(), mean.data_ptr(), var.data_ptr())
    return mean, (var + eps).rsqrt_(), var


def _triton_statistics(
    x: Tensor, stats: Tensor | None, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``mean``, ``invstd`` and ``var``, of ``stats`` where there are any."""
    k, c = triton.kernels("bn_act"), x.shape[1]
    if stats is None or len(stats) == 0:
        stats = empty(x, groups * k.stats_tiles(groups, x.numel() // (groups * c), c), 3, c)
        k.bn_stats(x, stats, groups)
    mean, invstd, var = (empty(x, groups, c) for _ in range(3))
    k.bn_merge(stats, eps, mean, var, invstd, groups)
    return mean, invstd, var


def _cpp_shape(x: Tensor, groups: int) -> Any:
    c = x.shape[1]
    return cpp.kernels().BatchNormShape(groups, x.numel() // (groups * c), c)


_FORWARD = {"cpp": _cpp_forward, "triton": _triton_forward, "cuda": _cuda_forward}


@bn_act_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stats: Tensor | None,
    training: bool,
    eps: float,
    groups: int,
    activation: str,
    negative_slope: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape
    mean, invstd, var = (
        x.new_empty(groups if training else 1, c, dtype=torch.float32) for _ in range(3)
    )
    return cpp.fake_images(x, n, c, h, w), mean, invstd, var


@torch.library.custom_op("fastgan::bn_act_backward", mutates_args=())
def bn_act_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    activation: str,
    negative_slope: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx``, ``dweight``, ``dbias`` from what :func:`bn_act_forward` took and returned."""
    dy, x, weight, bias = cpp.dense(dy), cpp.dense(x), cpp.contiguous(weight), cpp.contiguous(bias)
    given = _Given(x, weight, bias, activation, negative_slope)

    def run(backend: str) -> tuple[Tensor, Tensor, Tensor]:
        return _BACKWARD[backend](given, dy, mean, invstd, training)

    key = f"backward {_key(x, len(mean))} training {training}"
    return run(fastest_backend(backend, "bn_act", key, run, x))


def _cpp_backward(
    given: _Given, dy: Tensor, mean: Tensor, invstd: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx``, ``dweight``, ``dbias``."""
    x, weight, bias, _, slope = given
    c = x.shape[1]
    dx, dweight, dbias = cpp.empty_images(*x.shape), cpp.empty(c), cpp.empty(c)
    cpp.kernels().bn_backward(
        _cpp_shape(x, len(mean)),
        dy.data_ptr(),
        x.data_ptr(),
        mean.data_ptr(),
        invstd.data_ptr(),
        cpp.address(weight),
        cpp.address(bias),
        given.code,
        slope,
        training,
        dx.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
        torch.get_num_threads(),
    )
    return dx, dweight, dbias


def _triton_backward(
    given: _Given, dy: Tensor, mean: Tensor, invstd: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_cpp_backward`."""
    x, weight, bias, *act = given
    dx, dweight, dbias = empty_images(x, *x.shape), *_empty_gradients(x, weight, bias)
    triton.kernels("bn_act").bn_act_backward(
        dy, x, mean, invstd, weight, bias, training, *act, dx, dweight, dbias
    )
    return dx, dweight, dbias


def _cuda_backward(
    given: _Given, dy: Tensor, mean: Tensor, invstd: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_cpp_backward`."""
    x, weight, bias, _, slope = given = given.aligned()
    dx, dweight, dbias = empty_images(x, *x.shape), *_empty_gradients(x, weight, bias)
    groups, c = mean.shape
    tiles = cuda.kernels().bn_tiles(groups, x.numel() // (groups * c), c, cuda.dtype_name(x))
    cuda.launch(
        "bn_act_backward",
        *(cuda.aligned(dy), x, mean, invstd, weight, bias, training, given.code, slope),
        *(dx, dweight, dbias, empty(x, groups * tiles, 2, c)),
    )
    return dx, dweight, dbias


_BACKWARD = {"cpp": _cpp_backward, "triton": _triton_backward, "cuda": _cuda_backward}


@bn_act_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    activation: str,
    negative_slope: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return cpp.fake_images(x, *x.shape), *_empty_gradients(x, weight, bias)


def _empty_gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of the dtypes of ``weight`` and ``bias``, float32 where there are none."""
    dtypes = (torch.float32 if p is None else p.dtype for p in (weight, bias))
    dweight, dbias = (x.new_empty(x.shape[1], dtype=dtype) for dtype in dtypes)
    return dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, _, training, _, _, activation, negative_slope, backend = inputs
    _, mean, invstd, _ = output
    ctx.save_for_backward(x, mean, invstd, weight, bias)
    ctx.set_materialize_grads(False)  # of the statistics, which would be filled with zeros
    ctx.arguments = training, activation, negative_slope, backend


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 12
    x, mean, invstd, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = bn_act_backward(dy, x, mean, invstd, weight, bias, *ctx.arguments)
    return (
        dx,
        dweight if weight is not None else None,
        dbias if bias is not None else None,
        *([None] * 9),
    )


bn_act_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("fastgan::bn_update_running", mutates_args=("running_mean", "running_var"))
def bn_update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    rows: int,
    momentum: float,
    backend: str,
) -> None:
    """Move the running statistics by those of each group, in order, of ``rows`` values each."""
    # Changed in place, it cannot be measured: `auto` takes the likeliest.
    backend = kernels_of(backend, mean.device)[0]
    contiguous = running_mean.is_contiguous() and running_var.is_contiguous()
    if backend == "triton" and contiguous:
        triton.kernels("bn_act").bn_update_running(
            mean, var, rows, momentum, running_mean, running_var
        )
        return
    in_place = all(cuda.aligned(running) is running for running in (running_mean, running_var))
    if backend == "cuda" and contiguous and in_place:
        cuda.launch("bn_update_running", mean, var, rows, momentum, running_mean, running_var)
        return
    for group_mean, group_var in zip(mean, var, strict=True):
        running_mean.mul_(1.0 - momentum).add_(group_mean, alpha=momentum)
        running_var.mul_(1.0 - momentum).add_(group_var, alpha=momentum * rows / (rows - 1))


@bn_update_running.register_fake
def _(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    rows: int,
    momentum: float,
    backend: str,
) -> None:
    return None


@under_autocast()
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
    stats: Tensor | None = None,
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
        stats: what :func:`fastgan.ops.conv.conv_forward` has summed of ``x``; the reference does
            without.

    Returns:
        ``y``, shaped as ``x``; laid out as ``x`` too by the reference, in ``torch.channels_last``
        by kernels of our own.

    Raises:
        InputError: ``groups`` does not divide the batch, or ``activation`` is unknown.
        NotBuiltError: a backend was asked for by name that cannot take these tensors.

    Equivalent to::

        act(torch.cat([F.batch_norm(part, running_mean, running_var, weight, bias, training,
                                    momentum, eps) for part in x.chunk(groups)]))
    """
    if groups < 1 or x.shape[0] % groups:
        raise InputError(f"groups={groups} does not divide the batch of {x.shape[0]}")
    if activation not in ACTIVATIONS:
        raise InputError(f"activation={activation!r}: choose from {', '.join(ACTIVATIONS)}")
    # torch refuses what does not fit and statistics of a single value, and takes other ranks and
    # negative slopes.
    per_channel = (weight, bias, running_mean, running_var)
    backend = "reference"
    if (
        x.ndim == 4
        and all(p is None or p.shape == x.shape[1:2] for p in per_channel)
        and (not training or x.numel() > groups * x.shape[1])
        and negative_slope >= 0.0
    ):
        backend = select_backend("bn_act", x, *per_channel)
    if backend == "reference":
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
    y, mean, _, var = bn_act_forward(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        stats,
        training,
        eps,
        groups,
        activation,
        negative_slope,
        backend,
    )
    if training and running_mean is not None and running_var is not None:
        rows = x.numel() // (groups * x.shape[1])
        bn_update_running(running_mean, running_var, mean, var, rows, momentum, backend)
    return y
