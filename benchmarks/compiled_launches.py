"""Every launch of a Triton kernel that training the example networks can lead to.

Each op has one function, which calls the kernels' host functions on tensors without data, as the op
itself calls them, with every configuration that there is to choose from.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from fastgan.benchmarks import machine
from fastgan.benchmarks.compile_driver import Launch, Target, recorded
from fastgan.benchmarks.plan import NZ
from fastgan.kernels import augment, bn_act, conv, gan_loss
from torch import Tensor

from fastgan.gpu import empty_images
from fastgan.nn.sizes import split_size
from fastgan.ops.gan_loss import KINDS

# Side and channels of the images; the networks are 64 channels wide at the image.
NETWORKS = ((64, 3), (28, 1), (32, 1))
WIDTH = 64
BATCHES = (64, 128, 256, 1024)
# What the table shows.
TABLE_BATCH = 128

# What torch may ask of float32: one pass of TF32, or the rounding of float32.
PRECISIONS = ("tf32", "ieee")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SLOPE = 0.2
_EPS, _MOMENTUM = 1e-5, 0.1
# Images of a set that fits the batch, and of one beyond 2 GiB, which AMD addresses otherwise.
_LARGE_SET = 1_000_000


@dataclasses.dataclass(frozen=True)
class Use:
    """A launch, and what it is for.

    Attributes:
        what: the layer and the pass, as the table names them.
        tile: the configuration; empty where there is no choice.
        flop: floating-point operations of the matrix product; 0 where there is none.
        tabled: whether the table shows it.
    """

    launch: Launch
    what: str
    tile: str
    flop: float
    tabled: bool


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution of a network, ``[n, cl, side, side]`` and ``[n, ch, ...]``."""

    net: str
    cl: int
    ch: int
    side: int
    kernel: int
    stride: int
    padding: int
    first: bool
    last: bool

    @property
    def high_side(self) -> int:
        return (self.side - 1) * self.stride - 2 * self.padding + self.kernel

    def images(
        self, n: int, dtype: torch.dtype, device: str = "meta"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Low side, high side, weight."""
        return (
            images_of(n, self.cl, self.side, dtype, device),
            images_of(n, self.ch, self.high_side, dtype, device),
            images_of(self.cl, self.ch, self.kernel, dtype, device),
        )

    def flop(self, n: int) -> float:
        return 2.0 * n * self.cl * self.ch * (self.side * self.kernel) ** 2

    def __str__(self) -> str:
        return f"{self.net} {self.cl}-{self.ch}@{self.side}"


@dataclasses.dataclass(frozen=True)
class Batch:
    """A pass of a network: ``n`` images in ``groups`` parts, of a dtype."""

    n: int
    groups: int
    dtype: torch.dtype
    tabled: bool

    def __str__(self) -> str:
        return f"n{self.n}" + (f" in {self.groups}" if self.groups > 1 else "")


def layers(net: str, size: int, nc: int) -> Iterator[Layer]:
    """Of ``G`` or ``D`` for images of ``nc`` channels, the one of the low side of 1x1 first."""
    s0, k = split_size(size)
    channels = [*(WIDTH << i for i in reversed(range(k))), nc]
    first, last = net == "G", net == "D"
    yield Layer(net, NZ if first else 1, channels[0], 1, s0, 1, 0, first, last)
    for i, (cl, ch) in enumerate(itertools.pairwise(channels)):
        image = ch == nc
        yield Layer(*(net, cl, ch, s0 << i, 4, 2, 1), image and net == "D", image and net == "G")


def uses(target: Target) -> Iterator[Use]:
    """All of them; the same kernel comes again and again."""
    with recorded(target) as launches:
        for size, nc in NETWORKS:
            for dtype, precision in itertools.product(_DTYPES, PRECISIONS):
                if precision == PRECISIONS[0] or dtype == torch.float32:
                    with machine.fp32_precision(precision):
                        yield from _Network(size, nc, dtype, launches).uses()


class _Network:
    """The launches of one pair of networks in one dtype."""

    def __init__(self, size: int, nc: int, dtype: torch.dtype, launches: list[Launch]) -> None:
        self._size, self._nc, self._dtype, self._launches = size, nc, dtype, launches

    def uses(self) -> Iterator[Use]:
        for batch in BATCHES:
            tabled = (
                self._size == NETWORKS[0][0]
                and batch == TABLE_BATCH
                and self._dtype == torch.bfloat16
            )
            one = Batch(batch, 1, self._dtype, tabled)
            # The discriminator sees real and generated images in one pass, the latter again alone.
            two = Batch(2 * batch, 2, self._dtype, tabled)
            alone = dataclasses.replace(one, tabled=False)
            for layer in layers("G", self._size, self._nc):
                yield from self._generator(layer, one)
            for layer in layers("D", self._size, self._nc):
                yield from self._discriminator(layer, two)
                yield from self._discriminator(layer, alone)
            for both in (two, alone):
                yield from self._gan_loss(both)
            yield from self._augment(one)

    def _generator(self, layer: Layer, batch: Batch) -> Iterator[Use]:
        if layer.last:
            yield from self._conv("dgrad", "forward, tanh", layer, batch, activation="tanh")
            yield from self._act_backward(layer, batch, layer.ch, layer.high_side, "tanh")
        else:
            yield from self._conv("dgrad", "forward, statistics", layer, batch, stats=True)
            yield from self._conv("dgrad", "evaluation", layer, batch, bias=True, activation="relu")
            yield from self._bn_act(layer, batch, layer.ch, layer.high_side, "dgrad", "relu")
        yield from self._conv("fprop", "input gradient", layer, batch)
        yield from self._wgrad(layer, batch)

    def _discriminator(self, layer: Layer, batch: Batch) -> Iterator[Use]:
        act = "leaky_relu"
        if layer.first:
            yield from self._conv("fprop", f"forward, {act}", layer, batch, activation=act)
            yield from self._act_backward(layer, batch, layer.cl, layer.side, act)
        elif layer.last:
            yield from self._conv("fprop", "forward", layer, batch)
        else:
            yield from self._conv("fprop", "forward, statistics", layer, batch, stats=True)
            yield from self._conv("fprop", "evaluation", layer, batch, bias=True, activation=act)
            yield from self._bn_act(layer, batch, layer.cl, layer.side, "fprop", act)
        yield from self._conv("dgrad", "input gradient", layer, batch)
        yield from self._wgrad(layer, batch)

    def _conv(
        self,
        direction: str,
        what: str,
        layer: Layer,
        batch: Batch,
        *,
        bias: bool = False,
        activation: str = "none",
        stats: bool = False,
    ) -> Iterator[Use]:
        low, high, weight = layer.images(batch.n, batch.dtype)
        x, y, run = (
            (high, low, conv.conv_fprop) if direction == "fprop" else (low, high, conv.conv_dgrad)
        )
        problem = _problem(layer, batch)
        tiles = problem.stats_tiles(direction) if stats else 0
        for tile in problem.tiles(direction):
            shift = _empty(y.shape[1], dtype=torch.float32) if bias else None
            sums = _empty(tiles, 3, y.shape[1]) if tiles else None
            run(problem, tile, x, weight, shift, activation, _SLOPE, y, sums)
            yield from self._take(f"{layer} {batch}: {what}", layer.flop(batch.n), batch, tile)

    def _wgrad(self, layer: Layer, batch: Batch) -> Iterator[Use]:
        low, high, weight = layer.images(batch.n, batch.dtype)
        problem = _problem(layer, batch)
        for tile in problem.tiles("wgrad"):
            conv.conv_wgrad(problem, tile, low, high, weight)
            what = f"{layer} {batch}: weight gradient"
            yield from self._take(what, layer.flop(batch.n), batch, tile)

    def _act_backward(
        self, layer: Layer, batch: Batch, c: int, side: int, activation: str
    ) -> Iterator[Use]:
        dy, y, dx = (images_of(batch.n, c, side, batch.dtype) for _ in range(3))
        conv.act_backward(dy, y, activation, _SLOPE, dx)
        yield from self._take(f"{layer} {batch}: {activation} backward", 0.0, batch)

    def _bn_act(
        self, layer: Layer, batch: Batch, c: int, side: int, direction: str, activation: str
    ) -> Iterator[Use]:
        x, y, dx = (images_of(batch.n, c, side, batch.dtype) for _ in range(3))
        groups, rows = batch.groups, batch.n // batch.groups * side**2
        mean, var, invstd = (_empty(groups, c) for _ in range(3))
        weight, bias, dweight, dbias = (_empty(c) for _ in range(4))
        by_conv = _problem(layer, batch).stats_tiles(direction)
        own = groups * bn_act.stats_tiles(groups, rows, c)
        bn_act.bn_stats(x, _empty(own, 3, c), groups)
        for tiles in (by_conv, own):
            bn_act.bn_merge(_empty(tiles, 3, c), _EPS, mean, var, invstd, groups)
        bn_act.bn_update_running(mean, var, rows, _MOMENTUM, _empty(c), _empty(c))
        bn_act.bn_act_forward(x, mean, invstd, weight, bias, activation, _SLOPE, y)
        # Only in training is the gradient that of the statistics too.
        gradients = activation, _SLOPE, dx, dweight, dbias
        bn_act.bn_act_backward(y, x, mean, invstd, weight, bias, True, *gradients)
        yield from self._take(f"{layer} {batch}: batch norm, {activation}", 0.0, batch)
        running = mean[:1], invstd[:1]
        bn_act.bn_act_forward(x, *running, weight, bias, activation, _SLOPE, y)
        bn_act.bn_act_backward(y, x, *running, weight, bias, False, *gradients)
        yield from self._take(f"{layer} {batch}: batch norm, {activation}, evaluation", 0.0)

    def _gan_loss(self, batch: Batch) -> Iterator[Use]:
        logits, dlogits = (_empty(batch.n, dtype=batch.dtype) for _ in range(2))
        loss, d = (_empty(batch.groups, dtype=batch.dtype) for _ in range(2))
        for kind in KINDS:
            gan_loss.gan_loss_forward(logits, [1.0, 0.0][: batch.groups], kind, loss, d, dlogits)
            # The table is of a step with binary cross-entropy.
            tabled = batch if kind == "bce" else None
            yield from self._take(f"loss {batch}, {kind}", 0.0, tabled)

    def _augment(self, batch: Batch) -> Iterator[Use]:
        out = images_of(batch.n, self._nc, self._size, batch.dtype)
        for m, gathered, flipped in (
            (batch.n, True, True),
            (batch.n, True, False),
            (batch.n, False, False),
            (_LARGE_SET, True, True),
            (_LARGE_SET, True, False),
        ):
            images = _empty(m, self._size, self._size, self._nc, dtype=torch.uint8)
            index = _empty(batch.n, dtype=torch.int64) if gathered else None
            flip = _empty(batch.n, dtype=torch.bool) if flipped else None
            augment.augment_forward(images, index, flip, out)
            what = ", ".join(["gather"] * gathered + ["flip"] * flipped) or "scale"
            whole = batch if m == batch.n else None
            yield from self._take(f"images {self._size}x{self._size} {batch}: {what}", 0.0, whole)

    def _take(
        self, what: str, flop: float, batch: Batch | None = None, tile: conv.Tile | None = None
    ) -> Iterator[Use]:
        """What was launched since the last time; ``flop`` is the first launch's."""
        launches = list(self._launches)
        self._launches.clear()
        tabled = batch is not None and batch.tabled
        for i, launch in enumerate(launches):
            yield Use(launch, what, str(tile or ""), 0.0 if i else flop, tabled)


def _problem(layer: Layer, batch: Batch) -> conv.Problem:
    low, high = (
        (batch.n, layer.cl, layer.side, layer.side),
        (batch.n, layer.ch, layer.high_side, layer.high_side),
    )
    kernel = layer.kernel, layer.kernel
    return conv.Problem.of(
        low, high, kernel, layer.stride, layer.padding, batch.groups, batch.dtype
    )


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def images_of(n: int, c: int, side: int, dtype: torch.dtype, device: str = "meta") -> Tensor:
    """``[n, c, side, side]`` without values, in ``torch.channels_last``."""
    return empty_images(torch.empty(0, device=device), n, c, side, side, dtype=dtype)
