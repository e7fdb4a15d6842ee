"""The residual networks of SNGAN (Miyato et al. 2018, https://arxiv.org/abs/1802.05957).

An image of side ``s0·2^k`` (``s0`` in 4..7) takes ``k`` up- or down-samplings by two. At 128, with
``ngf = ndf = 64``, these are the paper's networks for ImageNet, channel for channel; their weights
are drawn as its code draws them (https://github.com/pfnet-research/sngan_projection). Spectral norm
is put on by :func:`fastgan.nn.spectral.apply_spectral_norm`.

A shortcut's 1x1 convolution is applied where the image is small, before it is repeated or after it
is averaged: it commutes with both, at a quarter of the work.
"""

from __future__ import annotations

import itertools
import math
from typing import TypeVar

from torch import Tensor, nn

from fastgan.nn.grouped import grouped_forward
from fastgan.nn.sizes import require_positive, split_size


class UpBlock(nn.Module):
    """``[N, c_in, H, W]`` to ``[N, c_out, 2H, 2W]``: batch norm and ReLU before each convolution.

    Args:
        c_in, c_out: channels.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            *(nn.BatchNorm2d(c_in), nn.ReLU(inplace=True)),
            *(nn.Upsample(scale_factor=2), _conv3(c_in, c_out)),
            *(nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)),
            _conv3(c_out, c_out),
        )
        self.shortcut = nn.Sequential(_conv1(c_in, c_out), nn.Upsample(scale_factor=2))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both branches of ``x``."""
        return self.forward_grouped(x, 1)

    def forward_grouped(self, x: Tensor, groups: int) -> Tensor:
        """See :func:`fastgan.nn.grouped.grouped_forward`."""
        return grouped_forward(self.main, x, groups) + grouped_forward(self.shortcut, x, groups)


class DownBlock(nn.Module):
    """``[N, c_in, H, W]`` to ``[N, c_out, H/2, W/2]``, or as large: ReLU before each convolution.

    Args:
        c_in, c_out: channels.
        down: whether the result is averaged over 2x2.
        first: whether this is the first of a network, whose input no ReLU may cut.
    """

    def __init__(self, c_in: int, c_out: int, down: bool = True, first: bool = False) -> None:
        super().__init__()
        # Not in place: the shortcut has the same input.
        start: list[nn.Module] = [] if first else [nn.ReLU()]
        pool: list[nn.Module] = [nn.AvgPool2d(2)] if down else []
        self.main = nn.Sequential(
            *start, _conv3(c_in, c_out), nn.ReLU(inplace=True), _conv3(c_out, c_out), *pool
        )
        learned: list[nn.Module] = [_conv1(c_in, c_out)] if down or c_in != c_out else []
        self.shortcut = nn.Sequential(*pool, *learned)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both branches of ``x``."""
        return self.forward_grouped(x, 1)

    def forward_grouped(self, x: Tensor, groups: int) -> Tensor:
        """See :func:`fastgan.nn.grouped.grouped_forward`."""
        return grouped_forward(self.main, x, groups) + grouped_forward(self.shortcut, x, groups)


class ResNetGenerator(nn.Module):
    """Turns noise ``[N, nz]`` (or ``[N, nz, 1, 1]``) into images ``[N, nc, S, S]`` in (-1, 1).

    Args:
        nz: length of the noise vector ``z``.
        ngf: channels of the last block; each earlier one has twice those of the next, and the
            first is given as many as it has.
        nc: channels of the image.
        image_size: its side ``S = s0·2^k`` with ``s0`` in 4..7, from 16 to 256.

    Raises:
        InputError: an argument is out of range; for a size, the nearest two are named.
    """

    def __init__(self, nz: int = 128, ngf: int = 64, nc: int = 3, image_size: int = 64) -> None:
        super().__init__()
        require_positive(nz=nz, ngf=ngf, nc=nc)
        self._s0, k = split_size(image_size)
        self.nz, self.ngf, self.nc, self.image_size = nz, ngf, nc, image_size
        channels = [ngf << i for i in reversed(range(k))]
        self.start = nn.Linear(nz, channels[0] * self._s0**2)
        blocks = [UpBlock(*c) for c in zip([channels[0], *channels], channels, strict=False)]
        self.main = nn.Sequential(
            *blocks,
            nn.BatchNorm2d(ngf),
            nn.ReLU(inplace=True),
            _conv3(ngf, nc, gain=1.0),
            nn.Tanh(),
        )
        _init(self.start)

    def forward(self, z: Tensor) -> Tensor:
        """Images ``[N, nc, S, S]`` for noise ``z [N, nz]`` or ``[N, nz, 1, 1]``."""
        x = self.start(z.flatten(1)).unflatten(1, (-1, self._s0, self._s0))
        return grouped_forward(self.main, x, 1)


class ResNetDiscriminator(nn.Module):
    """Turns images ``[N, nc, S, S]`` into logits ``[N]``: positive for real.

    Args:
        ndf: channels of the first block; each later one has twice those of the one before, but for
            the last, which does not shrink the image either.
        nc: channels of the image.
        image_size: its side ``S = s0·2^k`` with ``s0`` in 4..7, from 16 to 256.

    Attributes:
        n_features: channels of the last block.

    Raises:
        InputError: an argument is out of range; for a size, the nearest two are named.
    """

    def __init__(self, ndf: int = 64, nc: int = 3, image_size: int = 64) -> None:
        super().__init__()
        require_positive(ndf=ndf, nc=nc)
        _, k = split_size(image_size)
        self.ndf, self.nc, self.image_size = ndf, nc, image_size
        channels = [nc, *(ndf << i for i in range(k))]
        self.n_features = channels[-1]
        blocks = [DownBlock(*c, first=i == 0) for i, c in enumerate(itertools.pairwise(channels))]
        last = DownBlock(self.n_features, self.n_features, down=False)
        self.main = nn.Sequential(*blocks, last, nn.ReLU(inplace=True))
        self.end = nn.Linear(self.n_features, 1)
        _init(self.end)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N]`` of images ``x [N, nc, S, S]``."""
        return self.forward_grouped(x, 1)

    def forward_grouped(self, x: Tensor, groups: int) -> Tensor:
        """Logits ``[groups·n]``; see :func:`fastgan.nn.grouped.grouped_forward`."""
        return self.score(self.features(x, groups), groups)

    def features(self, x: Tensor, groups: int = 1) -> Tensor:
        """What the blocks make of ``x``, summed over the image: ``[groups·n, n_features]``."""
        return grouped_forward(self.main, x, groups).sum((2, 3))

    def score(self, h: Tensor, groups: int = 1) -> Tensor:
        """The logits ``[groups·n]`` of what has the features ``h``."""
        return grouped_forward(self.end, h, groups).flatten()


def _conv3(c_in: int, c_out: int, gain: float = math.sqrt(2.0)) -> nn.Conv2d:
    return _init(nn.Conv2d(c_in, c_out, 3, padding=1), gain)


def _conv1(c_in: int, c_out: int) -> nn.Conv2d:
    return _init(nn.Conv2d(c_in, c_out, 1))


_Layer = TypeVar("_Layer", nn.Conv2d, nn.Linear)


def _init(layer: _Layer, gain: float = 1.0) -> _Layer:
    nn.init.xavier_uniform_(layer.weight, gain)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
