"""Wrappers that make a GAN conditional on classes.

``labels [N]`` int64, from 0 to ``n_classes - 1``, go with each batch. They are not checked here, as
that would wait for the device: they are checked where they come from.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastgan.errors import InputError
from fastgan.nn.grouped import grouped_forward
from fastgan.nn.sizes import require_positive


class ConditionalGenerator(nn.Module):
    """A generator whose noise is joined by a learned vector for each class.

    Of Mirza & Osindero 2014 (https://arxiv.org/abs/1411.1784).

    Args:
        netG: a generator of noise of length ``nz + embed_dim``.
        n_classes: how many classes.
        nz: length of the noise vector ``z``.
        embed_dim: length of the vector of a class; drawn from N(0, 1), as ``z`` is.

    Attributes:
        nz: of ``z`` alone.
        n_classes: how many classes.

    Raises:
        InputError: a size is not positive, or ``netG.nz`` is not ``nz + embed_dim``.
    """

    def __init__(self, netG: nn.Module, n_classes: int, nz: int, embed_dim: int) -> None:
        super().__init__()
        require_positive(n_classes=n_classes, nz=nz, embed_dim=embed_dim)
        if getattr(netG, "nz", nz + embed_dim) != nz + embed_dim:
            raise InputError(
                f"netG.nz={netG.nz}, but nz + embed_dim = {nz} + {embed_dim}; build netG for noise "
                f"of length {nz + embed_dim}"
            )
        self.nz, self.n_classes = nz, n_classes
        # Before the embedding: the first weight is what tells the rank of the noise.
        self.netG = netG
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """What ``netG`` makes of ``z [N, nz, 1, 1]`` or ``[N, nz]`` and ``labels [N]``."""
        joined = torch.cat([z.flatten(1), self.embedding(labels).to(z.dtype)], dim=1)
        return self.netG(joined if z.ndim == 2 else joined[:, :, None, None])


class LabelPlanes(nn.Module):
    """A discriminator that sees, as one more channel, a learned plane for each class.

    As Mirza & Osindero 2014 (https://arxiv.org/abs/1411.1784) have it, where the class joins the
    image at the discriminator's input.

    Args:
        netD: a discriminator of images with one channel more than there is.
        n_classes: how many classes.
        image_size: side ``S`` of the images.

    Attributes:
        n_classes: how many classes.

    Raises:
        InputError: a size is not positive.
    """

    def __init__(self, netD: nn.Module, n_classes: int, image_size: int) -> None:
        super().__init__()
        require_positive(n_classes=n_classes, image_size=image_size)
        self.n_classes, self.image_size = n_classes, image_size
        self.netD = netD
        self.embedding = nn.Embedding(n_classes, image_size**2)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Scores of images ``x [N, nc, S, S]`` as ones of ``labels [N]``."""
        return self.forward_grouped(x, 1, labels)

    def forward_grouped(self, x: Tensor, groups: int, labels: Tensor) -> Tensor:
        """Scores ``[groups·n, ...]``; see :func:`fastgan.nn.grouped.grouped_forward`."""
        planes = self.embedding(labels).view(-1, 1, self.image_size, self.image_size)
        return grouped_forward(self.netD, torch.cat([x, planes.to(x.dtype)], dim=1), groups)


@runtime_checkable
class _Featured(Protocol):
    """A discriminator in two halves: ``forward`` is the score of the features."""

    n_features: int

    def features(self, x: Tensor, groups: int = 1) -> Tensor: ...

    def score(self, h: Tensor, groups: int = 1) -> Tensor: ...


class Projection(nn.Module):
    """A discriminator whose score has a part linear in a learned vector for each class.

    Miyato & Koyama 2018 (https://arxiv.org/abs/1802.05637):
    ``D(x, y) = psi(phi(x)) + <embedding(y), phi(x)>``, where ``phi(x)`` of the inner product is
    summed over the image. The embedding is drawn as in the code of the paper, by Glorot's uniform
    distribution.

    Args:
        netD: a discriminator with ``n_features``, ``features(x, groups) -> h [N, n_features, ...]``
            and ``score(h, groups) -> [N]``, as those of fastgan are.
        n_classes: how many classes.

    Attributes:
        n_classes: how many classes.

    Raises:
        InputError: ``n_classes`` is not positive, or ``netD`` is not made of these two halves.
    """

    def __init__(self, netD: nn.Module, n_classes: int) -> None:
        super().__init__()
        require_positive(n_classes=n_classes)
        if not isinstance(netD, _Featured):
            raise InputError(
                f"netD ({type(netD).__name__}) has no n_features, features() and score(), which a "
                "projection is made of; take LabelPlanes, condition='planes'"
            )
        self.n_classes = n_classes
        self.netD: nn.Module = netD
        self.embedding = nn.Embedding(n_classes, netD.n_features)
        nn.init.xavier_uniform_(self.embedding.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Scores ``[N]`` of ``x [N, ...]`` as ones of ``labels [N]``."""
        return self.forward_grouped(x, 1, labels)

    def forward_grouped(self, x: Tensor, groups: int, labels: Tensor) -> Tensor:
        """Scores ``[groups·n]``; see :func:`fastgan.nn.grouped.grouped_forward`."""
        netD = self.netD
        assert isinstance(netD, _Featured)
        h = netD.features(x, groups)
        pooled = h.flatten(2).sum(2) if h.ndim > 2 else h
        # A matrix product, by which the engine knows the sum for a logit.
        inner = torch.bmm(self.embedding(labels).to(h.dtype)[:, None, :], pooled[:, :, None])
        return netD.score(h, groups) + inner[:, 0, 0]
