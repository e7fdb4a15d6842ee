"""One call from a source to a uint8 NHWC set, decoded and resized once and kept in a cache.

A cache entry is a folder ``<key>/`` of ``images.npy`` (memory-mapped when it is used),
``labels.npy`` where there are labels, and ``meta.json``. The key covers the source's contents and
the settings. It is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastgan.data.decode import Pixels, is_grey, to_pixels
from fastgan.data.sources import Source, open_source
from fastgan.errors import InputError
from fastgan.files import sync_file, write_synced
from fastgan.machine import cache_folder

FORMAT = 1
_PROBE = 64
_STALE_SECONDS = 24 * 3600.0
_LISTED = 10


@dataclass(frozen=True)
class ImageSet:
    """A set of images of one size, ready for the loader.

    Attributes:
        images: ``[N, S, S, nc]`` uint8, in memory or memory-mapped.
        labels: ``[N]`` int64, or None.
        class_names: of the labels; empty where there are none.
        description: where they come from, for messages.
        digest: SHA-256 of pixels and labels.
        bad: ``(name, reason)`` of each image that was skipped.
    """

    images: Pixels
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    description: str
    digest: str
    bad: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def n_classes(self) -> int:
        """How many classes the labels have; 0 where there are none."""
        if self.labels is None:
            return 0
        return max(int(self.labels.max()) + 1, len(self.class_names))

    @property
    def image_size(self) -> int:
        """The side of the images."""
        return self.images.shape[1]

    @property
    def nc(self) -> int:
        """Their number of channels."""
        return self.images.shape[3]


def load_images(
    source: Any,
    image_size: int = 64,
    nc: int | None = None,
    *,
    max_bad: float = 0.01,
    workers: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> ImageSet:
    """Read, resize and keep the images of ``source``.

    An image that cannot be decoded is skipped and named in the result's ``bad``. Data sets and
    arrays in memory are not cached.

    Args:
        source: what :func:`fastgan.data.sources.open_source` takes, or what it returned.
        image_size: side of the images, pixels; the shorter side is resized to it, the centre kept.
        nc: channels, 1 or 3; None takes 1 if the images are all grey, by a sample of 64, else 3.
        max_bad: the largest part of the images, 0 to 1, that may be bad.
        workers: threads that decode; None takes one for each CPU.
        cache_dir: None takes ``$FASTGAN_CACHE``, else ``~/.cache/fastgan``.
        progress: show a progress bar where the terminal is one.

    Raises:
        InputError: the source cannot be used, or has more than ``max_bad`` bad images.
    """
    if image_size < 1:
        raise InputError(f"image_size={image_size} must be at least 1")
    if nc is not None and nc < 1:
        raise InputError(f"nc={nc} must be at least 1")
    if not 0.0 <= max_bad <= 1.0:
        raise InputError(f"max_bad={max_bad} must be from 0 to 1")
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers} must be at least 1")
    opened = open_source(source)
    nc = _choose_nc(opened) if nc is None else nc
    array = opened.array
    build = _Build(opened, image_size, nc, max_bad, workers or os.cpu_count() or 1, progress)
    if opened.fingerprint is None or (
        array is not None and array.shape[1:] == (image_size, image_size, nc)
    ):
        return build.in_memory()
    root = Path(cache_dir) if cache_dir else cache_folder()
    settings = [FORMAT, opened.fingerprint, image_size, nc]
    entry = root / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    found = _read_entry(entry, opened.description)
    if found is None:
        build.to_cache(entry)
        found = _read_entry(entry, opened.description)
        if found is None:
            raise InputError(f"cache: {str(entry)!r} cannot be read back; delete it and try again")
    build.check_bad(found.bad, len(opened.names))
    return found


@dataclass(frozen=True)
class _Build:
    source: Source
    image_size: int
    nc: int
    max_bad: float
    workers: int
    progress: bool

    def in_memory(self) -> ImageSet:
        source = self.source
        size = (self.image_size, self.image_size, self.nc)
        if source.array is not None and source.array.shape[1:] == size:
            images = source.array
            read = [source.read(i)[1] for i in range(len(images))]
            bad: list[tuple[str, str]] = []
        else:
            pixels, read, bad = [], [], []
            for array, label in self._decode(bad):
                pixels.append(array)
                read.append(label)
            images = np.stack(pixels)
        labels = _as_labels(read)
        digest = hashlib.sha256()
        for start in range(0, len(images), 1024):
            digest.update(np.ascontiguousarray(images[start : start + 1024]).tobytes())
        return ImageSet(
            images,
            labels,
            _class_names(source, labels),
            source.description,
            _finish(digest, labels),
            tuple(bad),
        )

    def to_cache(self, entry: Path) -> None:
        """Write the entry; a failure leaves nothing behind, and what is whole is not replaced."""
        temporary: Path | None = None
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            _sweep(entry.parent)
            temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=entry.parent))
            self._write(temporary)
            if entry.exists() and _read_entry(entry, "") is None:
                shutil.rmtree(entry)
            with contextlib.suppress(FileExistsError):
                _rename(temporary, entry)
        except OSError as error:
            raise InputError(
                f"cache: cannot write {str(entry.parent)!r}: {error.strerror or error}; set "
                "FASTGAN_CACHE to a folder that can be written and has room"
            ) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        bad: list[tuple[str, str]] = []
        read: list[int | None] = []
        digest = hashlib.sha256()
        shape = (self.image_size, self.image_size, self.nc)
        with (folder / "images.npy").open("wb") as file:
            # NumPy leaves room in the header for any length, so it can be written again at the end.
            _write_header(file, (len(self.source.names), *shape))
            for array, label in self._decode(bad):
                data = array.tobytes()
                file.write(data)
                digest.update(data)
                read.append(label)
            file.seek(0)
            _write_header(file, (len(read), *shape))
            sync_file(file)
        labels = _as_labels(read)
        if labels is not None:
            with (folder / "labels.npy").open("wb") as file:
                np.save(file, labels)
                sync_file(file)
        meta = {
            "format": FORMAT,
            "source": self.source.description,
            "shape": [len(read), *shape],
            "class_names": _class_names(self.source, labels),
            "digest": _finish(digest, labels),
            "bad": bad,
        }
        write_synced(folder / "meta.json", json.dumps(meta).encode())

    def check_bad(self, bad: Any, total: int) -> None:
        """Refuse more than ``max_bad`` bad images of ``total``, and a set with no good one."""
        if len(bad) > self.max_bad * total or len(bad) == total:
            listed = "; ".join(f"{name}: {reason}" for name, reason in bad[:_LISTED])
            more = f"; and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
            raise InputError(
                f"data: {len(bad)} of {total} images in {self.source.description} cannot be "
                f"used (max_bad={self.max_bad:g}): {listed}{more}"
            )

    def _decode(self, bad: list[tuple[str, str]]) -> Iterator[tuple[Pixels, int | None]]:
        """Each good image in order, as pixels with its label; the others are put into ``bad``."""
        total = len(self.source.names)

        def decode(i: int) -> tuple[Pixels, int | None] | str:
            try:
                image, label = self.source.read(i)
                return to_pixels(image, self.image_size, self.nc), label
            except Exception as error:  # decoders raise all sorts on damaged files
                return (str(error).splitlines() or [type(error).__name__])[0]

        results = _map_ordered(decode, total, self.workers if self.source.thread_safe else 1)
        bar = tqdm(
            results,
            total=total,
            desc=f"Reading {self.source.description}",
            unit="image",
            disable=None if self.progress else True,
            leave=False,
        )
        for i, result in enumerate(bar):
            if isinstance(result, str):
                bad.append((self.source.names[i], result))
            else:
                yield result
        self.check_bad(bad, total)


def _map_ordered(function: Callable[[int], Any], total: int, workers: int) -> Iterator[Any]:
    """``map(function, range(total))`` by ``workers`` threads, a bounded way ahead of the reader."""
    if workers == 1:
        yield from map(function, range(total))
        return
    waiting: collections.deque[Future[Any]] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for i in range(total):
                waiting.append(pool.submit(function, i))
                if len(waiting) > 16 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _choose_nc(source: Source) -> int:
    if source.array is not None:
        return 3 if source.array.shape[3] == 4 else source.array.shape[3]
    n = len(source.names)
    for i in np.unique(np.linspace(0, n - 1, min(n, _PROBE)).astype(int)):
        try:
            image, _ = source.read(int(i))
        except Exception:  # named when it is decoded
            continue
        if not is_grey(image):
            return 3
    return 1


def _as_labels(read: list[int | None]) -> NDArray[np.int64] | None:
    if any(label is None for label in read):
        return None
    return np.array(read, np.int64)


def _class_names(source: Source, labels: NDArray[np.int64] | None) -> tuple[str, ...]:
    if labels is None:
        return ()
    return source.class_names or tuple(str(i) for i in range(int(labels.max()) + 1))


def _finish(digest: Any, labels: NDArray[np.int64] | None) -> str:
    if labels is not None:
        digest.update(labels.tobytes())
    return str(digest.hexdigest())


def _read_entry(entry: Path, description: str) -> ImageSet | None:
    """The set in ``entry``; None if there is none or it is not whole."""
    try:
        meta = json.loads((entry / "meta.json").read_bytes())
        images = np.load(entry / "images.npy", mmap_mode="c", allow_pickle=False)
        labels = None
        if (entry / "labels.npy").exists():
            labels = np.load(entry / "labels.npy", allow_pickle=False)
        if meta["format"] != FORMAT or list(images.shape) != meta["shape"]:
            return None
        if labels is not None and len(labels) != len(images):
            return None
        return ImageSet(
            images,
            labels,
            tuple(meta["class_names"]),
            description,
            meta["digest"],
            tuple((name, reason) for name, reason in meta["bad"]),
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _rename(temporary: Path, entry: Path) -> None:
    try:
        temporary.rename(entry)
    except OSError:
        # Another process may have been quicker; its entry is as good.
        if not entry.exists():
            raise


def _sweep(root: Path) -> None:
    """Remove what killed processes left half written."""
    for path in root.glob(".tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
