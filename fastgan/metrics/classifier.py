"""A small classifier of labelled sets, and what it says of generated images.

It is trained here, on the labels of the very set, and judges samples by the classes that it takes
them for: whether they are of the class that was asked for, whether all classes are among them, and
what can be learned from them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from fastgan.data.images import ImageSet
from fastgan.data.loader import Loader
from fastgan.data.pixels import to_bytes
from fastgan.errors import InputError
from fastgan.files import replace_file
from fastgan.machine import cache_folder
from fastgan.seeding import generator

logger = logging.getLogger("fastgan")

_FORMAT = 2
_WIDTH = 32
_BATCH = 128
_CHUNK = 512
_RATE = 4e-3
# Images that a classifier sees in training, where no number is given: three passes over MNIST.
_SEEN = 180_000
_HELD_OUT = 10
# Classical augmentation: degrees, and parts of the side.
_ROTATION, _SCALE, _SHIFT = 10.0, 0.1, 0.07


class Classifier(nn.Module):
    """Four convolutions, an average over what is left of the image, a linear layer.

    Maxima halve the image between them: from 20 digits a class these layers learn to read 92 % of
    MNIST's others, with strides in place of the maxima 67 %.

    Args:
        n_classes: how many classes.
        nc: channels of the images, of any size.
        width: channels of the second convolution; the last has four times as many.

    Attributes:
        held_out_accuracy: on the part of its set that it was not trained on; NaN if there was none.
    """

    def __init__(self, n_classes: int, nc: int, width: int = _WIDTH) -> None:
        super().__init__()
        for name, value in (("n_classes", n_classes), ("nc", nc), ("width", width)):
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        self.n_classes, self.nc, self.width = n_classes, nc, width
        self.held_out_accuracy = float("nan")
        layers: list[nn.Module] = []
        channels = [nc, width // 2 or 1, width, 2 * width, 4 * width]
        for i, (c_in, c_out) in enumerate(itertools.pairwise(channels)):
            layers += [nn.MaxPool2d(2, ceil_mode=True)] if i else []
            layers += [nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False)]
            layers += [nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(channels[-1], n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, n_classes]`` of images ``x [N, nc, H, W]`` in [-1, 1]."""
        return self.last(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the linear layer sees, ``[N, 4·width]``."""
        return self.layers(x).mean(dim=(2, 3))


class ClassifierFeatures(nn.Module):
    """A classifier's features, for :func:`fastgan.metrics.features.load_features`."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.num_features, self.channels = 4 * classifier.width, classifier.nc

    def forward(self, x: Tensor) -> Tensor:
        """``[N, F]`` of images ``x [N, nc, H, W]`` in [-1, 1]."""
        return self.classifier.features(x)


class StackedClassifier(nn.Module):
    """Reads the digits in an image's channels as one number: of three, classes 0 to 999.

    Args:
        digits: a classifier of one digit, of one channel.
    """

    def __init__(self, digits: Classifier) -> None:
        super().__init__()
        self.digits = digits

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities ``[N, 10^C]`` of images ``x [N, C, H, W]`` in [-1, 1]."""
        found = self.digits(x.flatten(0, 1)[:, None]).log_softmax(dim=1)
        of_each = found.unflatten(0, (len(x), -1)).unbind(dim=1)
        joint = of_each[0]
        for digit in of_each[1:]:
            joint = (joint[:, :, None] + digit[:, None, :]).flatten(1)
        return joint


def train_classifier(
    data: ImageSet,
    *,
    n_classes: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    augmentation: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Classifier:
    """A classifier of ``data``, the same for the same seed on the same machine.

    Adam with a learning rate that rises and falls (Smith & Topin 2017,
    https://arxiv.org/abs/1708.07120), in batches of at most 128.

    Args:
        data: labelled images.
        n_classes: None takes as many as ``data`` has.
        steps: None takes as many as show it 180,000 images.
        seed: of weights, order and augmentation.
        augmentation: turn, scale and shift each image a little (by up to 10 degrees, a tenth and
            7 % of the side). Nothing is mirrored: digits and letters are others then.
        device: where it is trained.
        progress: show a progress bar where the terminal is one.

    Raises:
        InputError: ``data`` has no labels, or more classes than ``n_classes``, or ``steps`` is less
            than 1.
    """
    device = torch.device(device)
    most = int(_labels_of(data).max()) + 1
    classes = data.n_classes if n_classes is None else n_classes
    if classes < most:
        raise InputError(f"n_classes={n_classes}: {data.description} has {most} classes")
    if steps is not None and steps < 1:
        raise InputError(f"steps={steps} must be at least 1")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(generator(seed, "classifier").initial_seed()))
        classifier = Classifier(classes, data.nc).to(device)
    loader = Loader(data, min(_BATCH, len(data)), seed=seed, device=device)
    steps = steps or -(-_SEEN // loader.batch_size)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    draw = generator(seed, "classifier augmentation", device=device)
    bar = tqdm(
        total=steps, desc="Classifier", unit="step", leave=False, disable=not progress or None
    )
    with bar:
        for _ in range(steps):
            images, labels = loader.next_batch()
            assert labels is not None
            if len(images) < 2:
                continue  # of which batch norm has no statistics
            images = _augmented(images, draw) if augmentation else images
            loss = F.cross_entropy(classifier(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    return classifier.eval()


def _augmented(images: Tensor, draw: torch.Generator) -> Tensor:
    n, device = len(images), images.device

    def within(limit: float) -> Tensor:
        return (torch.rand(n, generator=draw, device=device) * 2.0 - 1.0) * limit

    angle, scale = torch.deg2rad(within(_ROTATION)), 1.0 + within(_SCALE)
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    # The side is 2 in the coordinates of the grid.
    rows = [cosine, -sine, within(2 * _SHIFT), sine, cosine, within(2 * _SHIFT)]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(n, 2, 3), list(images.shape), False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def accuracy(classifier: nn.Module, data: ImageSet) -> float:
    """The share of ``data`` that ``classifier`` takes for what it is labelled, 0 to 1.

    Raises:
        InputError: ``data`` has no labels.
    """
    _labels_of(data)
    device = next(classifier.parameters()).device
    loader = Loader(data, min(_CHUNK, len(data)), shuffle=False, device=device)
    right = 0
    for images, labels in loader:
        assert labels is not None
        right += int((classifier(images).argmax(dim=1) == labels).sum())
    return right / len(data)


def load_classifier(
    data: ImageSet, *, cache_dir: Path | None = None, progress: bool = True
) -> Classifier:
    """The classifier of ``data``: read from the cache, else trained and put there.

    It is trained on nine tenths of the set, drawn at random; its accuracy on the rest is its
    ``held_out_accuracy``.

    Args:
        data: labelled images.
        cache_dir: None takes ``$FASTGAN_CACHE``, else ``~/.cache/fastgan``.
        progress: show a progress bar where the terminal is one.

    Raises:
        InputError: ``data`` has no labels, or fewer than 10 images.
    """
    if data.labels is None:
        raise InputError(
            f"data: {data.description} has no labels to train a classifier on; take other features"
        )
    if len(data) < _HELD_OUT:
        raise InputError(f"data: {len(data)} images are too few for a classifier; at least 10")
    settings = [_FORMAT, data.digest, data.n_classes, _WIDTH, _BATCH, _SEEN, _RATE]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    path = (cache_dir or cache_folder()) / f"classifier-{key}.safetensors"
    found = _read(path, data)
    if found is None:
        order = torch.randperm(len(data), generator=generator(0, "held out")).numpy()
        part = len(data) // _HELD_OUT
        found = train_classifier(
            subset(data, order[part:]), n_classes=data.n_classes, progress=progress
        )
        found.held_out_accuracy = accuracy(found, subset(data, order[:part]))
        _write(path, found)
    return found


def subset(data: ImageSet, index: NDArray[np.int64]) -> ImageSet:
    """The images of the labelled set ``data`` of the numbers ``index``."""
    labels = _labels_of(data)
    chosen = np.sort(index)
    digest = hashlib.sha256(data.digest.encode() + chosen.astype(np.int64).tobytes()).hexdigest()
    return ImageSet(
        data.images[chosen],
        labels[chosen],
        data.class_names,
        f"{len(chosen):,} of {data.description}",
        digest,
    )


def join(first: ImageSet, second: ImageSet) -> ImageSet:
    """The images of two labelled sets of the same classes and size as one."""
    return ImageSet(
        np.concatenate([first.images, second.images]),
        np.concatenate([_labels_of(first), _labels_of(second)]),
        first.class_names,
        f"{first.description} and {second.description}",
        hashlib.sha256((first.digest + second.digest).encode()).hexdigest(),
    )


def _labels_of(data: ImageSet) -> NDArray[np.int64]:
    if data.labels is None:
        raise InputError(f"data: {data.description} has no labels; give a labelled set")
    return data.labels


def _read(path: Path, data: ImageSet) -> Classifier | None:
    if not path.exists():
        return None
    with torch.random.fork_rng([]):
        classifier = Classifier(data.n_classes, data.nc)
    try:
        held = safetensors.torch.load(path.read_bytes())
        classifier.held_out_accuracy = float(held.pop("held_out_accuracy"))
        classifier.load_state_dict(held)
    except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("%s cannot be read (%s); the classifier is trained anew", path, reason)
        return None
    return classifier.eval()


def _write(path: Path, classifier: Classifier) -> None:
    held = {key: value.cpu().contiguous() for key, value in classifier.state_dict().items()}
    held["held_out_accuracy"] = torch.tensor(classifier.held_out_accuracy, dtype=torch.float64)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, safetensors.torch.save(held))
    except OSError as error:
        logger.warning("the classifier is not kept: %s: %s", path, error.strerror or error)


@dataclass(frozen=True)
class ModeHistogram:
    """The classes that samples fall in.

    Attributes:
        counts: samples in each class.
        covered: classes with at least one.
        kl: the Kullback-Leibler divergence, in nats, of the classes' shares among the samples from
            those among the real images: infinite where the real ones have none of a class.
    """

    counts: tuple[int, ...]
    covered: int
    kl: float

    @classmethod
    def of(cls, counts: Tensor, real_labels: NDArray[np.int64]) -> ModeHistogram:
        """Of samples in each class ``counts [n_classes]``, beside the labels of real images."""
        fake = counts.double() / counts.sum()
        real = torch.bincount(torch.as_tensor(real_labels), minlength=len(counts)).double()
        real /= real.sum()
        there = fake > 0
        kl = float((fake[there] * (fake[there] / real[there]).log()).sum())
        return cls(tuple(counts.tolist()), int(there.sum()), kl)


@torch.no_grad()
def mode_histogram(
    batches: Iterable[Tensor],
    classifier: nn.Module,
    real_labels: NDArray[np.int64],
) -> ModeHistogram:
    """In which classes the samples of ``batches`` fall, beside real images.

    Args:
        batches: samples ``[n, C, H, W]`` in [-1, 1].
        classifier: images to logits ``[n, n_classes]``.
        real_labels: ``[R]``, those of the real images.
    """
    counts: Tensor | None = None
    for images in batches:
        logits = torch.cat([classifier(part) for part in images.split(_CHUNK)])
        found = torch.bincount(logits.argmax(dim=1), minlength=logits.shape[1]).cpu()
        counts = found if counts is None else counts + found
    if counts is None:
        raise InputError("batches: there are no samples")
    return ModeHistogram.of(counts, real_labels)


# From labels [n] int64, which only count where there are no classes, to images [n, C, H, W] in
# [-1, 1].
Sampler = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ClassAccuracy:
    """How often samples are of the class that was asked for, as a classifier has it.

    Attributes:
        share: of all samples, 0 to 1.
        of_class: of those of each class.
        n: samples.
    """

    share: float
    of_class: tuple[float, ...]
    n: int


@torch.no_grad()
def class_accuracy(
    sampler: Sampler, classifier: nn.Module, n_classes: int, n: int
) -> ClassAccuracy:
    """Ask ``sampler`` for ``n`` samples, of each class in turn, and see what they are taken for.

    Raises:
        InputError: ``n`` is less than ``n_classes``.
    """
    if n < n_classes:
        raise InputError(f"n={n} samples are fewer than the {n_classes} classes")
    right, asked = torch.zeros(n_classes), torch.zeros(n_classes)
    for labels in (torch.arange(n) % n_classes).split(_CHUNK):
        found = classifier(sampler(labels)).argmax(dim=1).cpu()
        right += torch.bincount(labels[found == labels], minlength=n_classes)
        asked += torch.bincount(labels, minlength=n_classes)
    of_class = tuple((right / asked).tolist())
    return ClassAccuracy(float(right.sum() / n), of_class, n)


@torch.no_grad()
def generated_set(sampler: Sampler, labels: Tensor, like: ImageSet) -> ImageSet:
    """Samples of the classes ``labels [n]`` as a labelled set, in bytes, as ``like`` is."""

    images = np.concatenate([to_bytes(sampler(chunk)) for chunk in labels.split(_CHUNK)])
    return ImageSet(
        images, labels.numpy(), like.class_names, f"{len(labels):,} generated", _digest(images)
    )


def _digest(images: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


@dataclass(frozen=True)
class AccuracyScore:
    """What a classifier learns from samples alone, beside one that learns from real images.

    Attributes:
        generated: accuracy on real test images after training on samples, 0 to 1.
        real: the same after training on as many real images.
        n_train: images that each was trained on.
        n_test: real images that both were tested on.
    """

    generated: float
    real: float
    n_train: int
    n_test: int


def classification_accuracy_score(
    sampler: Sampler,
    train: ImageSet,
    test: ImageSet,
    *,
    n: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> AccuracyScore:
    """Train on generated images, test on real ones.

    Ravuri & Vinyals 2019, https://arxiv.org/abs/1905.10887; the samples' classes are those of the
    real images that the other classifier is trained on.

    Args:
        sampler: of the GAN, which was trained on ``train``.
        train: labelled real images.
        test: others.
        n: images to train each on; None takes as many as ``train`` has.
        seed: of the draw and both classifiers.
        progress: show progress bars where the terminal is one.

    Raises:
        InputError: a set has no labels, or ``n`` is not from 1 to what ``train`` has.
    """
    n = len(train) if n is None else n
    if not 1 <= n <= len(train):
        raise InputError(f"n={n} must be from 1 to the {len(train)} images of {train.description}")
    drawn = torch.randperm(len(train), generator=generator(seed, "score"))[:n].numpy()
    real = subset(train, drawn)
    fake = generated_set(sampler, torch.from_numpy(_labels_of(real)), train)
    of_fake, of_real = (
        accuracy(
            train_classifier(data, n_classes=train.n_classes, seed=seed, progress=progress), test
        )
        for data in (fake, real)
    )
    return AccuracyScore(of_fake, of_real, n, len(test))
