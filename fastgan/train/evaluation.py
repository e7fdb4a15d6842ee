"""The quality of a run's samples against the images that it is trained on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.data.images import ImageSet
from fastgan.engine.engine import Engine, noise_shape, sample
from fastgan.metrics.classifier import ModeHistogram, Sampler, load_classifier
from fastgan.metrics.features import load_features
from fastgan.metrics.neighbours import Copies, find_copies, neighbours_grid
from fastgan.metrics.quality import Quality, measure
from fastgan.metrics.reference import real_statistics
from fastgan.seeding import generator

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
        modes: of a labelled set, the classes that the samples fall in.
        class_accuracy: of a conditional GAN, the share of samples of the class asked for.
        classifier_accuracy: on real images, of the classifier that says so.
        copies: of the first samples, those nearest among the real images.
        samples: these samples, ``[256, C, H, W]`` at most.
    """

    quality: Quality
    modes: ModeHistogram | None
    class_accuracy: float | None
    classifier_accuracy: float
    copies: Copies
    samples: Tensor

    def to_dict(self) -> dict[str, Any]:
        """As a line of JSON takes it."""
        found = {**self.quality.to_dict(), "copy_rate": self.copies.rate}
        if self.modes is not None:
            found |= {"classes": self.modes.covered, "classes_kl": self.modes.kl}
            found["classifier_accuracy"] = self.classifier_accuracy
        if self.class_accuracy is not None:
            found["class_accuracy"] = self.class_accuracy
        return {**found, "described": " ".join(self.describe().split())}

    def describe(self) -> str:
        """The figures with all that they were measured by, a line each."""
        lines = [self.quality.describe(), self.copies.describe()]
        if self.modes is not None:
            lines.append(
                f"the samples fall in {self.modes.covered} of {len(self.modes.counts)} classes, "
                f"{self.modes.kl:.3g} nats from the real images' shares"
            )
            if self.class_accuracy is not None:
                lines[-1] += f"; {self.class_accuracy:.1%} are of the class asked for"
            lines[-1] += f" (a classifier that is right about {self.classifier_accuracy:.2%})"
        return "\n".join(lines)


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
        # A network that is made draws its weights: not from the global generator as it stands.
        with torch.random.fork_rng([]):
            self._features = load_features(features, device=device, data=data)
            self._real = real_statistics(data, self._features, progress=progress)
            self._labels = self._classes()
            self._classifier = None
            if data.labels is not None:
                self._classifier = load_classifier(data, progress=progress).to(device)

    @torch.no_grad()
    def measure(self, sampler: Sampler, *, conditional: bool) -> Measured:
        """The quality of what ``sampler`` makes, which heeds labels if it is ``conditional``."""
        first: list[Tensor] = []
        taken_for: list[Tensor] = []

        def batches() -> Iterator[Tensor]:
            for labels in self._labels.split(_CHUNK):
                images = sampler(labels)
                if not first:
                    first.append(images[:_LOOKED_UP])
                if self._classifier is not None:
                    taken_for.append(self._classifier(images).argmax(dim=1).cpu())
                yield images

        quality = measure(batches(), self._n, self._real, self._features, progress=self._progress)
        copies = find_copies(first[0], self._data, self._features, real=self._real)
        if self._classifier is None:
            return Measured(quality, None, None, math.nan, copies, first[0])
        assert self._data.labels is not None
        found = torch.cat(taken_for)
        counts = torch.bincount(found, minlength=self._data.n_classes)
        return Measured(
            quality,
            ModeHistogram.of(counts, self._data.labels),
            (found == self._labels).double().mean().item() if conditional else None,
            self._classifier.held_out_accuracy,
            copies,
            first[0],
        )

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
