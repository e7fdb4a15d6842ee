"""The quality of a run's samples against the images that it is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.data.images import ImageSet
from fastgan.engine.engine import Engine, noise_shape, sample
from fastgan.metrics.features import load_features
from fastgan.metrics.neighbours import Copies, find_copies, neighbours_grid
from fastgan.metrics.quality import Quality, measure
from fastgan.metrics.reference import real_statistics
from fastgan.seeding import generator

# From labels [n] int64, which count where there are no classes, to images [n, C, H, W].
Sampler = Callable[[Tensor], Tensor]

_CHUNK = 256
# Samples that are looked up among the real images.
_LOOKED_UP = 256


def engine_sampler(engine: Engine, seed: int) -> Sampler:
    """Samples of ``engine`` as it is, of the averaged G where there is one; the same each time."""
    draw = generator(seed, "quality", device=engine.device)

    def make(labels: Tensor) -> Tensor:
        noise = engine.draw_noise(len(labels), draw)
        return engine.sample(len(labels), noise, labels=labels if engine.n_classes else None)

    return make


def network_sampler(netG: nn.Module, seed: int, device: torch.device) -> Sampler:
    """Samples of ``netG``, which is on ``device``; the same each time."""
    draw = generator(seed, "quality", device=device)
    shape, conditional = noise_shape(netG), bool(getattr(netG, "n_classes", 0))

    def make(labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), *shape, generator=draw, device=device)
        return sample(netG, noise, labels.to(device) if conditional else None)

    return make


@dataclasses.dataclass(frozen=True)
class Measured:
    """What came of one measurement.

    Attributes:
        quality: the figures.
        copies: of the first samples, those nearest among the real images.
        samples: these samples, ``[256, C, H, W]`` at most.
    """

    quality: Quality
    copies: Copies
    samples: Tensor

    def to_dict(self) -> dict[str, Any]:
        """As a line of JSON takes it."""
        return {
            **self.quality.to_dict(),
            "copy_rate": self.copies.rate,
            "described": self.describe(),
        }

    def describe(self) -> str:
        """The figures with all that they were measured by, on one line."""
        found = " ".join(self.quality.describe().split())
        return f"{found}; {self.copies.rate:.1%} of samples suspected to be copies"


class Evaluation:
    """Measures samples against ``data``, whose statistics are taken once and cached.

    Args:
        data: the images that the GAN is trained on.
        features: a name, for :func:`fastgan.metrics.features.load_features`.
        n: samples to make for each measurement.
        device: where features are computed.
        seed: of the noise and of the choice of classes, which are those of real images.
        progress: show progress bars where the terminal is one.

    Raises:
        InputError: the features are unknown or cannot be had, or the set is too small.
    """

    def __init__(
        self,
        data: ImageSet,
        features: str,
        n: int,
        device: torch.device,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self._data, self._n, self._seed, self._progress = data, n, seed, progress
        self._features = load_features(features, device=device, data=data)
        self._real = real_statistics(data, self._features, progress=progress)
        self._labels = self._classes()

    def measure(self, sampler: Sampler) -> Measured:
        """The quality of what ``sampler`` makes."""
        first: list[Tensor] = []

        def batches() -> Iterator[Tensor]:
            for labels in self._labels.split(_CHUNK):
                images = sampler(labels)
                if not first:
                    first.append(images[:_LOOKED_UP])
                yield images

        quality = measure(batches(), self._n, self._real, self._features, progress=self._progress)
        copies = find_copies(first[0], self._data, self._features, real=self._real)
        return Measured(quality, copies, first[0])

    def neighbours(self, measured: Measured, rows: int = 8) -> tuple[Tensor, int]:
        """A picture of the most suspicious samples, each before its nearest, and its columns."""
        grid = neighbours_grid(measured.samples, self._data, measured.copies, rows=rows)
        return grid, 1 + measured.copies.indices.shape[1]

    def _classes(self) -> Tensor:
        """The class of each sample ``[n]``, drawn as those of the real images are."""
        if self._data.labels is None:
            return torch.zeros(self._n, dtype=torch.int64)
        draw = generator(self._seed, "quality labels")
        of_images = torch.from_numpy(self._data.labels)
        return of_images[torch.randint(len(of_images), (self._n,), generator=draw)]
