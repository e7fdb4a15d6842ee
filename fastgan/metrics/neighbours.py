"""Copies of training images among samples.

A sample is suspected where it lies nearer to some real image than real images lie to each other: at
most as far as the nearest 1 % of them lie to their nearest other. Of new images from the same
distribution 1 % would be suspected; a rate well above that says that the generator remembers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastgan.data.images import ImageSet
from fastgan.errors import InputError
from fastgan.metrics.features import Features
from fastgan.metrics.reference import RealStatistics, describe_set, image_batches
from fastgan.seeding import generator

EXPECTED_RATE = 0.01
_REAL_QUERIES = 1000
_ROWS = 1024
# Of the median distance between real images: the same picture but for rounding, whatever the 1 %
# says of a set that has an image many times.
_SAME = 1e-3


@dataclass(frozen=True)
class Copies:
    """Samples and the real images nearest to them, in a space of features.

    Attributes:
        indices: ``[S, k]`` int64, numbers in the set, the nearest first.
        distances: ``[S, k]`` float64.
        threshold: the largest distance at which a sample is suspected.
        n_real: images of the set that the samples were held against.
        n_compared: real images whose distances to their nearest others made the threshold.
        features: the name of the features.
        resize: how images were resized for them.
        reference: the set.
    """

    indices: Tensor
    distances: Tensor
    threshold: float
    n_real: int
    n_compared: int
    features: str
    resize: str
    reference: str

    @property
    def order(self) -> Tensor:
        """``[S]`` int64, the samples' numbers, the most suspicious first."""
        return self.distances[:, 0].argsort(stable=True)

    @property
    def suspected(self) -> Tensor:
        """``[S]`` bool."""
        return self.distances[:, 0] <= self.threshold

    @property
    def rate(self) -> float:
        """The share that is suspected, 0 to 1."""
        return float(self.suspected.double().mean())

    def to_dict(self) -> dict[str, Any]:
        """As a line of JSON takes it: the rate and what it was measured by."""
        return {
            "copy_rate": self.rate,
            "expected_rate": EXPECTED_RATE,
            "threshold": self.threshold,
            "nearest": self.distances[:, 0].min().item(),
            "n_fake": len(self.distances),
            "n_real": self.n_real,
            "n_compared": self.n_compared,
            "features": self.features,
            "resize": self.resize,
            "reference": self.reference,
        }

    def describe(self) -> str:
        """Two lines for a terminal."""
        return (
            f"{int(self.suspected.sum()):,} of {len(self.distances):,} samples ({self.rate:.1%}) "
            f"are suspected copies; of new real images {EXPECTED_RATE:.0%} would be\n"
            f"({self.features} features, images resized {self.resize}; nearest of "
            f"{self.n_real:,} images of {self.reference}, suspected up to a distance of "
            f"{self.threshold:.4g}, by {self.n_compared:,} real images)"
        )


def find_copies(
    images: Tensor,
    data: ImageSet,
    features: Features,
    *,
    real: RealStatistics | None = None,
    k: int = 3,
    seed: int = 0,
    progress: bool = False,
) -> Copies:
    """Hold each of ``images`` against the whole of ``data``, in one pass over it.

    The threshold is of 1,000 real images, drawn at random, each against all the others. With
    ``real`` there is no such pass: its kept images are what the samples are held against, and
    copies of others are not found.

    Args:
        images: samples ``[S, C, H, W]``, floating, in [-1, 1].
        data: the images that the generator was trained on.
        features: what maps images to vectors.
        real: what :func:`fastgan.metrics.reference.real_statistics` returned for both.
        k: real images to find for each sample.
        seed: of the draw.
        progress: show a progress bar where the terminal is one.

    Raises:
        InputError: ``k`` is less than 1, there are no more real images than that, or ``real`` is of
            another set or of other features.
    """
    draw = generator(seed, "compared images")
    if real is None:
        n = len(data)
        drawn = torch.randperm(n, generator=draw)[:_REAL_QUERIES]
        compared = torch.cat([features(batch) for batch in image_batches(data, drawn)]).cpu()
        rows: Iterable[tuple[Tensor, Tensor]] = _all_rows(data, features, progress)
    else:
        if (real.digest, real.features) != (data.digest, features.identity):
            raise InputError(
                f"real: the statistics are of {real.description} with {real.features!r}, not of "
                f"{describe_set(data)} with {features.identity!r}; take them of the same"
            )
        n = len(real.rows)
        some = torch.randperm(n, generator=draw)[:_REAL_QUERIES]
        drawn, compared = real.index[some], real.rows[some]
        rows = zip(real.index.split(_ROWS), real.rows.split(_ROWS), strict=True)
    _check_k(k, n)
    own = torch.cat([torch.full((len(images),), -1), drawn])
    found, distances = _nearest(torch.cat([features(images).cpu(), compared]), own, rows, k)
    between = distances[len(images) :, 0]
    threshold = max(float(between.quantile(EXPECTED_RATE)), _SAME * float(between.median()))
    return Copies(
        found[: len(images)],
        distances[: len(images)],
        threshold,
        n,
        len(drawn),
        features.name,
        features.resize,
        describe_set(data),
    )


def nearest_real(
    images: Tensor, data: ImageSet, features: Features, *, k: int = 3, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """The ``k`` images of ``data`` nearest to each of ``images``, exact, over the whole set.

    Returns:
        Their numbers ``[S, k]`` int64 and distances ``[S, k]`` float64, the nearest first.

    Raises:
        InputError: ``k`` is less than 1, or the set has no more images than that.
    """
    _check_k(k, len(data))
    own = torch.full((len(images),), -1)
    return _nearest(features(images), own, _all_rows(data, features, progress), k)


def neighbours_grid(images: Tensor, data: ImageSet, copies: Copies, *, rows: int = 8) -> Tensor:
    """What to look at: each sample, and beside it the real images nearest to it.

    Args:
        images: those that ``copies`` was found of, ``[S, C, H, W]``.
        data: the set that they were held against, of the same channels and size.
        copies: what :func:`find_copies` returned.
        rows: the most suspicious samples, at most this many.

    Returns:
        ``[rows * (1 + k), C, H, W]`` float32 in [-1, 1], row by row, for a grid of ``1 + k``
        columns.

    Raises:
        InputError: the samples and the set differ in channels or size.
    """
    shape = (data.nc, data.image_size, data.image_size)
    if tuple(images.shape[1:]) != shape:
        raise InputError(
            f"images: are {tuple(images.shape[1:])} each, those of {data.description} {shape}; "
            "load the set with the size and channels of the samples"
        )
    shown = copies.order[:rows]
    found = torch.cat(list(image_batches(data, copies.indices[shown].flatten())))
    samples = images[shown.to(images.device)].to("cpu", torch.float32)
    beside = found.unflatten(0, (len(shown), -1))
    return torch.cat([samples[:, None], beside], 1).flatten(0, 1)


def _check_k(k: int, n: int) -> None:
    if not 1 <= k < n:
        raise InputError(f"k={k} must be from 1 to {n - 1}, one less than there are real images")


def _all_rows(
    data: ImageSet, features: Features, progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The numbers and vectors of all the images of ``data``, batch by batch."""
    start = 0
    with tqdm(
        total=len(data),
        desc=f"Nearest in {data.description}",
        unit="image",
        disable=None if progress else True,
        leave=False,
    ) as bar:
        for batch in image_batches(data):
            yield torch.arange(start, start + len(batch)), features(batch)
            start += len(batch)
            bar.update(len(batch))


def _nearest(
    queries: Tensor, own: Tensor, rows: Iterable[tuple[Tensor, Tensor]], k: int
) -> tuple[Tensor, Tensor]:
    """The nearest ``k`` of ``rows`` to each of ``queries``, but for that of its ``own`` number."""
    # Products of float32 would leave 3e-4 of the length of a vector between it and its copy.
    queries = queries.to("cpu", torch.float64)
    best = torch.full((len(queries), k), torch.inf, dtype=torch.float64)
    indices = torch.full((len(queries), k), -1)
    for numbers, x in rows:
        distances = torch.cdist(queries, x.to("cpu", torch.float64))
        distances[own[:, None] == numbers] = torch.inf
        best, at = torch.cat([best, distances], 1).topk(k, largest=False)
        known = torch.cat([indices, numbers.expand(len(queries), -1)], 1)
        indices = known.gather(1, at)
    return indices, best
