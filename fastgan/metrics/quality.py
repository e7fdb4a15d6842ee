"""The figures: how far samples are from real images, and what part of them they reach.

All are of vectors x (real, R of them) and y (samples, S of them) in a space of features:

- Frechet distance (Heusel et al. 2017, https://arxiv.org/abs/1706.08500): of the normal
  distributions with their means m and covariances C,
  ``|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))``.
- Kernel distance (Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401): the unbiased estimate
  of the squared maximum mean discrepancy under the kernel ``(x.y / F + 1)^3``.
- Precision and recall (Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991): the share of y
  inside some x's ball, and of x inside some y's, a ball's radius being the distance to the centre's
  third neighbour of its own kind.
- Density and coverage (Naeem et al. 2020, https://arxiv.org/abs/2002.09797), with balls out to the
  fifth neighbour: how many x's balls hold a y, a fifth of the mean; the share of x with a y in
  their ball.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan.errors import InputError
from fastgan.metrics.features import Features
from fastgan.metrics.reference import (
    COVERAGE_NEIGHBOUR,
    FEWEST,
    KEPT,
    PRECISION_NEIGHBOUR,
    Moments,
    RealStatistics,
    check_kept,
    neighbour_radii,
    summarise,
)
from fastgan.seeding import generator

_BLOCK = 1000
_FEWEST_BLOCKS = 4
_ROWS = 1024


@dataclass(frozen=True)
class Quality:
    """How good samples are, and what that was measured by.

    All but the kernel distance depend on how many vectors there are of either kind: compare figures
    of the same numbers only. Of as many samples as real images, both from the same distribution,
    coverage is some 0.97 and density 1.

    Attributes:
        frechet: 0 is best; falls as more are taken.
        kernel: 0 is best, unbiased: it may be a little below.
        kernel_error: its standard error.
        precision: 0 to 1: samples that look real.
        recall: 0 to 1: real images that the samples reach.
        density: 1 where samples are as the real images; above where they crowd among them.
        coverage: 0 to 1: real images with a sample near.
        n_real: real images in the Frechet distance.
        n_fake: samples in it.
        kept_real: real images in the other figures.
        kept_fake: samples in these.
        features: the name of the features.
        resize: how images were resized for them.
        reference: the real set.
    """

    frechet: float
    kernel: float
    kernel_error: float
    precision: float
    recall: float
    density: float
    coverage: float
    n_real: int
    n_fake: int
    kept_real: int
    kept_fake: int
    features: str
    resize: str
    reference: str

    def to_dict(self) -> dict[str, Any]:
        """As a line of JSON takes it."""
        return asdict(self)

    def describe(self) -> str:
        """Two lines for a terminal: the figures, and what they were measured by."""
        counts = f"{self.n_fake:,} samples against {self.n_real:,} images of {self.reference}"
        if (self.kept_fake, self.kept_real) != (self.n_fake, self.n_real):
            counts += f", all but Frechet on {self.kept_fake:,} against {self.kept_real:,}"
        return (
            f"Frechet distance {self.frechet:.4g}, kernel distance {self.kernel:.3g} ± "
            f"{self.kernel_error:.2g}, precision {self.precision:.3f}, recall {self.recall:.3f}, "
            f"density {self.density:.3f}, coverage {self.coverage:.3f}\n"
            f"({self.features} features, images resized {self.resize}; {counts})"
        )


class Overlap(NamedTuple):
    """How two sets of vectors lie among each other, as :class:`Quality` says."""

    precision: float
    recall: float
    density: float
    coverage: float


def measure(
    batches: Iterable[Tensor],
    n: int,
    real: RealStatistics,
    features: Features,
    *,
    kept: int = KEPT,
    seed: int = 0,
    progress: bool = False,
) -> Quality:
    """The quality of the first ``n`` samples of ``batches``.

    Memory does not grow with ``n``: the Frechet distance is of all, the others are of ``kept``.

    Args:
        batches: samples ``[m, C, H, W]``, floating, in [-1, 1]; may be endless.
        n: samples to take.
        real: of the set that they are held against, with the same features.
        features: what maps images to vectors.
        kept: samples whose vectors are kept, drawn at random, at most.
        seed: of that draw.
        progress: show a progress bar where the terminal is one.

    Raises:
        InputError: ``n`` or ``kept`` is less than 8, the batches hold fewer than ``n``, or ``real``
            is of other features.
    """
    if n < FEWEST:
        raise InputError(f"n={n} samples must be at least {FEWEST}")
    check_kept(kept)
    if real.features != features.identity:
        raise InputError(
            f"features={features.identity!r} are others than those of the real set, "
            f"{real.features!r}; take real_statistics with the same"
        )
    index = torch.randperm(n, generator=generator(seed, "kept samples"))[:kept]
    bar = "Features of samples" if progress else None
    moments, rows = summarise(batches, n, index, features, bar=bar)
    kernel, error = kernel_distance(real.rows, rows)
    found = overlap(real.rows, rows, (real.precision_radii, real.coverage_radii))
    return Quality(
        frechet=frechet_distance(real.moments, moments),
        kernel=kernel,
        kernel_error=error,
        **found._asdict(),
        n_real=real.moments.n,
        n_fake=n,
        kept_real=len(real.rows),
        kept_fake=len(rows),
        features=features.name,
        resize=features.resize,
        reference=real.description,
    )


def frechet_distance(real: Moments, fake: Moments) -> float:
    """The squared distance that :class:`Quality` calls ``frechet``.

    With ``C = A A^T`` of either, ``tr (C_x C_y)^(1/2)`` is the sum of the singular values of
    ``A_x^T A_y``. The square roots of the eigenvalues of ``C_x C_y``, which torchmetrics and
    torch-fidelity sum, turn a rounding error of 1e-16 into one of 1e-8 wherever an eigenvalue is 0,
    as most are of fewer vectors than dimensions: 1,280 dimensions and 320 vectors gave -1.2e-4 for
    the distance of a set with itself, and 9 % less than a true 1.3e-3.
    """
    covariances = real.covariance, fake.covariance
    root_x, root_y = map(_factor, covariances)
    cross = torch.linalg.svdvals(root_x.T @ root_y).sum()
    spread = sum(c.trace() for c in covariances) - 2.0 * cross
    return max(0.0, float((real.mean - fake.mean).square().sum() + spread))


def _factor(covariance: Tensor) -> Tensor:
    """``A [F, rank]`` with ``A A^T = covariance [F, F]``, but for rounding errors."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = len(values) * torch.finfo(values.dtype).eps * values.max()
    real = values > noise
    return vectors[:, real] * values[real].sqrt()


def kernel_distance(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """The kernel distance of rows ``[R, F]`` and ``[S, F]``, and its standard error.

    The mean over disjoint blocks, of as many rows of either, and the deviation of the blocks over
    the root of their number. Blocks are of at most 1,000 rows and there are at least four, so that
    few rows make small blocks; rows beyond the smaller of R and S take no part. The rows have to
    be in random order.

    Raises:
        InputError: R or S is less than 8.
    """
    # Takes a second to import, which no run without figures should.
    from torchmetrics.image.kid import poly_mmd

    most = min(len(real), len(fake))
    if most < FEWEST:
        raise InputError(f"{most} vectors: the kernel distance takes at least {FEWEST} of a kind")
    blocks = max(_FEWEST_BLOCKS, math.ceil(most / _BLOCK))
    size = most // blocks
    pairs = zip(real.split(size), fake.split(size), strict=False)
    estimates = torch.stack([poly_mmd(x.double(), y.double()) for x, y in islice(pairs, blocks)])
    return float(estimates.mean()), float(estimates.std() / math.sqrt(blocks))


def overlap(real: Tensor, fake: Tensor, radii: tuple[Tensor, Tensor] | None = None) -> Overlap:
    """Precision, recall, density and coverage of rows ``[R, F]`` and ``[S, F]``, exact.

    Args:
        real: at least 6 rows.
        fake: at least 4 rows.
        radii: ``[R]`` each, from the real rows to their third and fifth neighbours; None computes
            them.
    """
    inner, outer = radii or neighbour_radii(real, (PRECISION_NEIGHBOUR, COVERAGE_NEIGHBOUR))
    (fake_radii,) = neighbour_radii(fake, (PRECISION_NEIGHBOUR,))
    # Distances of float32 products keep more digits the nearer the origin is.
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    precise = torch.zeros(len(fake), dtype=torch.bool)
    recalled = inside = covered = 0
    for rows, near, far in zip(
        real.split(_ROWS), inner.split(_ROWS), outer.split(_ROWS), strict=True
    ):
        distances = torch.cdist(rows, fake)
        precise |= (distances <= near[:, None]).any(0)
        recalled += int((distances <= fake_radii).any(1).sum())
        within = distances < far[:, None]
        inside += int(within.sum())
        covered += int(within.any(1).sum())
    return Overlap(
        precision=float(precise.float().mean()),
        recall=recalled / len(real),
        density=inside / (COVERAGE_NEIGHBOUR * len(fake)),
        coverage=covered / len(real),
    )
