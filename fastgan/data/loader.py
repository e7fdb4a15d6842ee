"""Batches of an image set: shuffled, optionally flipped, scaled to [-1, 1], on the device.

The order of epoch ``e`` and its flips are a function of ``(seed, e)`` alone, so that a position is
two numbers and going back to it costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgan.data.images import ImageSet
from fastgan.errors import InputError
from fastgan.ops.augment import augment
from fastgan.seeding import generator

# Images up to this part of the free memory of a GPU are kept on it.
_RESIDENT_SHARE = 0.5


class Draw(NamedTuple):
    """What one batch is made from, by :meth:`Loader.images`.

    Attributes:
        source: ``[n]`` int64, the numbers of images that are on the device, or these themselves,
            ``[n, S, S, nc]`` uint8, on the device or in memory that it can copy from meanwhile.
        flips: ``[n]`` bool, or None.
        labels: ``[n]`` int64, or None.
    """

    source: Tensor
    flips: Tensor | None
    labels: Tensor | None


class Loader:
    """Draws batches of ``data`` for ever; the last, smaller batch of an epoch is drawn too.

    Iterating over it gives the batches that are left of the present epoch, as a ``DataLoader``
    would; :meth:`next_batch` goes on into the next.

    Args:
        data: the images.
        batch_size: images in a batch.
        seed: of the order and the flips.
        flip: mirror each image left to right with probability 1/2.
        shuffle: draw in a new random order each epoch, else in the set's own.
        device: where the batches lie, and the images too if they fit.
        dtype: of the batches, floating.

    Raises:
        InputError: ``batch_size`` is less than 1 or larger than the set.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        *,
        seed: int = 0,
        flip: bool = False,
        shuffle: bool = True,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} must be at least 1")
        if batch_size > len(data):
            raise InputError(
                f"batch_size={batch_size} is larger than the {len(data)} images of "
                f"{data.description}; at most {len(data)}"
            )
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.shuffle = shuffle
        self.device = torch.empty(0, device=device).device  # with its index, as tensors have it
        self.dtype = dtype
        self.epoch = 0
        self.batch = 0
        self._images = _as_tensor(data.images)
        self._labels = torch.from_numpy(data.labels) if data.labels is not None else None
        if self.device.type == "cuda" and _fits(self._images, self.device):
            self._images = self._images.to(self.device)
            self._labels = self._labels.to(self.device) if self._labels is not None else None
        self._order: Tensor
        self._flips: Tensor | None
        self._start_epoch(0)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self.data) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        epoch = self.epoch
        while self.epoch == epoch:
            yield self.next_batch()

    def next_batch(self) -> tuple[Tensor, Tensor | None]:
        """The next batch, ``[n, nc, S, S]`` in [-1, 1], and its labels ``[n]`` int64 or None."""
        drawn = self.draw()
        return self.images(drawn.source, drawn.flips), drawn.labels

    def draw(self) -> Draw:
        """What the next batch is made from; the host's part of :meth:`next_batch`."""
        part = slice(self.batch * self.batch_size, (self.batch + 1) * self.batch_size)
        index = self._order[part]
        flips = self._flips[part] if self._flips is not None else None
        labels = self._labels[index] if self._labels is not None else None
        source = index
        if self._images.device != self.device:
            source = self._copyable(self._images[index])
            flips = self._copyable(flips) if flips is not None else None
            if labels is not None:
                labels = self._copyable(labels).to(self.device, non_blocking=True)
        self.batch += 1
        if self.batch == len(self):
            self._start_epoch(self.epoch + 1)
        return Draw(source, flips, labels)

    def images(
        self, source: Tensor, flips: Tensor | None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The batch ``[n, nc, S, S]`` that ``source`` and ``flips`` of :meth:`draw` stand for.

        The device's part of :meth:`next_batch`, which a captured step can have in it. ``dtype``
        stands in for the loader's.
        """
        flips = flips.to(self.device, non_blocking=True) if flips is not None else None
        if source.dtype == torch.uint8:
            pixels = source.to(self.device, non_blocking=True)
            return augment(pixels, None, flips, dtype=dtype or self.dtype)
        return augment(self._images, source, flips, dtype=dtype or self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it depends on."""
        return {"epoch": self.epoch, "batch": self.batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position in ``state``.

        Raises:
            InputError: it is a position in other data or with other settings.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise InputError(
                    f"loader: the saved position has {name}={state[name]!r}, this loader "
                    f"{value!r}; resume with the same data and settings"
                )
        self._start_epoch(state["epoch"])
        self.batch = state["batch"]

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "flip": self.flip,
            "shuffle": self.shuffle,
            "digest": self.data.digest,
        }

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self.batch = epoch, 0
        n = len(self.data)
        draw = generator(self.seed, "epoch", epoch)
        order = torch.randperm(n, generator=draw) if self.shuffle else torch.arange(n)
        flips = torch.rand(n, generator=draw) < 0.5 if self.flip else None
        # Beside the images that they are of.
        self._order = self._beside_images(order)
        self._flips = self._beside_images(flips) if flips is not None else None

    def _beside_images(self, x: Tensor) -> Tensor:
        return self._copyable(x).to(self._images.device, non_blocking=True)

    def _copyable(self, x: Tensor) -> Tensor:
        """``x`` in memory that a GPU can copy from while the host goes on."""
        return x.pin_memory() if self.device.type == "cuda" else x


def _as_tensor(images: np.ndarray[Any, Any]) -> Tensor:
    # torch wants to be able to write; a read-only array in memory is copied, a mapped file is
    # mapped copy-on-write already.
    writable = images if images.flags.writeable else np.array(images)
    return torch.from_numpy(np.ascontiguousarray(writable))


def _fits(images: Tensor, device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    return images.numel() < _RESIDENT_SHARE * free
