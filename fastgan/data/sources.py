"""What can be trained on: folders, zips, NumPy and HDF5 files, MNIST files, data sets, ``digits``.

Each opener checks what it is given and returns a :class:`Source`, in which nothing is decoded yet.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastgan.data.decode import MAX_PIXELS, Pixels
from fastgan.errors import InputError

Sample: TypeAlias = "tuple[Image.Image | Pixels, int | None]"

IMAGE_SUFFIXES = frozenset(
    {
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".webp", ".gif", ".tif"),
        *(".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
    }
)
KINDS = "a folder of images, a .zip of images, .npy, .npz, .h5/.hdf5, MNIST idx files, or 'digits'"
# What reading a damaged file of NumPy's raises.
_READ_ERRORS = (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Source:
    """Images to be read.

    Attributes:
        description: what it is, for messages: ``folder /data/cats``.
        names: of each image, for reports.
        read: ``read(i)`` is image ``i`` and its label, or raises what is wrong with it.
        class_names: of the labels; empty where there are none.
        fingerprint: differs when the contents differ; None where that cannot be told.
        array: all images ``[N, H, W, C]`` uint8, where they lie in memory or a mapped file.
        thread_safe: whether ``read`` may be called from several threads at once.
    """

    description: str
    names: Sequence[str]
    read: Callable[[int], Sample]
    class_names: tuple[str, ...] = ()
    fingerprint: str | None = None
    array: Pixels | None = None
    thread_safe: bool = True


def open_source(source: Any) -> Source:
    """Recognise ``source`` and list its images.

    Args:
        source: a path, ``"digits"``, a uint8 array or tensor ``[N, H, W]``, ``[N, H, W, C]`` or
            ``[N, C, H, W]``, or a ``torch.utils.data.Dataset`` with a length, whose items are
            images or ``(image, label)``; an image is a PIL image, a uint8 array ``[H, W(, C)]`` or
            a tensor ``[C, H, W]``, uint8 or floating in [0, 1] or in [-1, 1].

    Raises:
        InputError: there is nothing there, or it is not of a kind listed above.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _open_path(os.fspath(source))
    if type(source).__module__.startswith("torch") and hasattr(source, "numpy"):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return _from_arrays("array", source, None, (), None)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return _open_dataset(source)
    raise InputError(f"data: {type(source).__name__} is not {KINDS}, nor a Dataset with a length")


def _open_path(text: str) -> Source:
    if text == "digits":
        return _open_npz(Path(__file__).with_name("digits.npz"), "embedded set digits")
    if not text:
        raise InputError(f"data: the path is empty; give {KINDS}")
    try:
        path = Path(text).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:
        raise InputError(f"data: {text!r} cannot be used as a path: {error}") from error
    if not exists:
        raise InputError(f"data: {text!r} does not exist; give {KINDS}")
    if path.is_dir():
        idx = _find_idx(path)
        return _open_idx(idx) if idx else _open_folder(path)
    openers: dict[str, Callable[[Path], Source]] = {
        ".zip": _open_zip,
        ".npy": _open_npy,
        ".npz": _open_npz,
        ".h5": _open_hdf5,
        ".hdf5": _open_hdf5,
    }
    if path.suffix.lower() in openers:
        return openers[path.suffix.lower()](path)
    if "ubyte" in path.name:
        return _open_idx(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"data: {text!r} is a single image; give the folder it is in")
    raise InputError(f"data: {text!r} is not {KINDS}")


def _open_folder(path: Path) -> Source:
    files = sorted(_walk_images(path))
    if not files:
        raise InputError(f"data: no images in the folder {str(path)!r} (looked for .png, .jpg, …)")
    labels, class_names = _classes_of(files)

    def read(i: int) -> Sample:
        # Read whole, so that no file stays open while its image waits to be decoded.
        data = (path / files[i]).read_bytes()
        return Image.open(io.BytesIO(data)), labels[i] if labels else None

    stamps = [_stamp(path / name, name) for name in files]
    return Source(f"folder {path}", files, read, class_names, _hash(stamps))


def _walk_images(root: Path) -> list[str]:
    found: list[str] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise InputError(f"data: {error.filename!r} cannot be read: {error.strerror}") from error

    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if _is_visible(name)]
        relative = Path(folder).relative_to(root)
        found += [(relative / name).as_posix() for name in files if _is_image_name(name)]
    return found


def _open_zip(path: Path) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"data: {str(path)!r} is not a readable zip: {error}") from error
    members: list[str] = []
    for info in archive.infolist():
        parts = PurePosixPath(info.filename.replace("\\", "/")).parts
        if ".." in parts or re.match(r"[/\\]|[A-Za-z]:[/\\]", info.filename):
            raise InputError(
                f"data: {str(path)!r} holds {info.filename!r}, a path that climbs out of the "
                "archive; it may be hostile, pack it anew"
            )
        if (
            parts
            and not info.is_dir()
            and all(map(_is_visible, parts))
            and _is_image_name(parts[-1])
        ):
            members.append(info.filename)
    members.sort()
    if not members:
        raise InputError(f"data: no images in the zip {str(path)!r} (looked for .png, .jpg, …)")
    labels, class_names = _classes_of(members)

    def read(i: int) -> Sample:
        info = archive.getinfo(members[i])
        # No encoded image needs more bytes than its pixels would in 32 bits.
        if info.file_size > 4 * MAX_PIXELS:
            raise ValueError(f"unpacks to {info.file_size} bytes: a decompression bomb?")
        return Image.open(io.BytesIO(archive.read(info))), labels[i] if labels else None

    return Source(f"zip {path}", members, read, class_names, _hash([_stamp(path, path.name)]))


def _open_npy(path: Path) -> Source:
    try:
        # Copy-on-write: torch wants memory that it may write to.
        images = np.load(path, mmap_mode="c", allow_pickle=False)
    except _READ_ERRORS as error:
        raise InputError(f"data: {str(path)!r} is not a readable .npy file: {error}") from error
    return _from_arrays(f"file {path}", images, None, (), _hash([_stamp(path, path.name)]))


def _open_npz(path: Path, description: str | None = None) -> Source:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except _READ_ERRORS as error:
        raise InputError(f"data: {str(path)!r} is not a readable .npz file: {error}") from error
    return _from_arrays(
        description or f"file {path}",
        arrays[_choose_images(path, arrays)],
        arrays.get("labels"),
        tuple(map(str, arrays.get("classes", ()))),
        _hash([_stamp(path, path.name)]),
    )


def _open_hdf5(path: Path) -> Source:
    try:
        import h5py
    except ImportError:
        raise InputError(
            f"data: reading {str(path)!r} needs h5py; pip install 'fastgan[hdf5]'"
        ) from None
    try:
        with h5py.File(path, "r") as file:
            arrays = {k: v[()] for k, v in file.items() if isinstance(v, h5py.Dataset) and v.shape}
    except (*_READ_ERRORS, KeyError, RuntimeError) as error:
        raise InputError(f"data: {str(path)!r} is not a readable HDF5 file: {error}") from error
    images = arrays[_choose_images(path, arrays)]
    stamp = _hash([_stamp(path, path.name)])
    return _from_arrays(f"file {path}", images, arrays.get("labels"), (), stamp)


def _choose_images(path: Path, arrays: dict[str, Any]) -> str:
    """The name of the array that holds the images: ``images``, or the only one that could."""
    if "images" in arrays:
        return "images"
    fitting = [key for key, a in arrays.items() if a.dtype == np.uint8 and a.ndim in (3, 4)]
    if len(fitting) != 1:
        listed = ", ".join(f"{k} {a.dtype} {list(a.shape)}" for k, a in arrays.items()) or "nothing"
        raise InputError(
            f"data: {str(path)!r} needs one uint8 array [N, H, W(, C)], named 'images' if there "
            f"are several; it holds {listed}"
        )
    return fitting[0]


def _find_idx(folder: Path) -> Path | None:
    """The MNIST images in ``folder`` or where torchvision puts them below it; training first."""
    for place in (folder, folder / "raw", folder / "MNIST" / "raw"):
        found = sorted(place.glob("*images*idx3-ubyte*"), key=lambda p: ("train" not in p.name, p))
        if found:
            return found[0]
    return None


def _open_idx(path: Path) -> Source:
    images = _read_idx(path, 3)
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if not beside.exists():
        beside = beside.with_suffix("") if beside.suffix == ".gz" else Path(f"{beside}.gz")
    labels = _read_idx(beside, 1) if "images" in path.name and beside.exists() else None
    return _from_arrays(f"MNIST file {path}", images, labels, (), _hash([_stamp(path, path.name)]))


def _read_idx(path: Path, ndim: int) -> Pixels:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except _READ_ERRORS as error:
        raise InputError(f"data: {str(path)!r} cannot be read: {error}") from error
    header = 4 + 4 * ndim
    if len(data) < header or data[:4] != bytes((0, 0, 8, ndim)):
        raise InputError(f"data: {str(path)!r} is not an idx file of bytes with {ndim} dimensions")
    shape = struct.unpack(f">{ndim}I", data[4:header])
    if len(data) - header != int(np.prod(shape, dtype=np.int64)):
        raise InputError(
            f"data: {str(path)!r} is damaged: its header says {list(shape)}, "
            f"it holds {len(data) - header} bytes"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _from_arrays(
    description: str,
    images: NDArray[Any],
    labels: NDArray[Any] | None,
    class_names: tuple[str, ...],
    fingerprint: str | None,
) -> Source:
    got = f"data: {description} has images {images.dtype} {list(images.shape)}"
    if images.dtype != np.uint8:
        raise InputError(f"{got}; they must be uint8, 0 to 255")
    if images.ndim == 3:
        images = images[:, :, :, None]
    if images.ndim != 4 or 0 in images.shape:
        raise InputError(f"{got}; they must be [N, H, W], [N, H, W, C] or [N, C, H, W], N >= 1")
    if images.shape[3] not in (1, 3, 4) and images.shape[1] in (1, 3, 4):
        images = images.transpose(0, 2, 3, 1)
    index: list[int] | None = None
    if labels is not None:
        index, class_names = _index_labels(description, labels, len(images), class_names)

    def read(i: int) -> Sample:
        return images[i], index[i] if index is not None else None

    names = [f"image {i}" for i in range(len(images))]
    return Source(description, names, read, class_names, fingerprint, images)


def _index_labels(
    description: str, labels: NDArray[Any], n: int, class_names: tuple[str, ...]
) -> tuple[list[int], tuple[str, ...]]:
    """Labels as 0..K-1, and the names of the K classes."""
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise InputError(
            f"data: {description} has labels {labels.dtype} {list(labels.shape)}; "
            f"they must be integers [{n}], one for each image"
        )
    if class_names:
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise InputError(
                f"data: {description} has labels from {labels.min()} to {labels.max()} "
                f"for {len(class_names)} classes; they must be 0 to {len(class_names) - 1}"
            )
        return labels.tolist(), class_names
    values, index = np.unique(labels, return_inverse=True)
    return index.tolist(), tuple(map(str, values))


def _open_dataset(dataset: Any) -> Source:
    n = len(dataset)
    description = f"data set {type(dataset).__name__}"
    if n == 0:
        raise InputError(f"data: the {description} is empty")
    signed = any(_has_negative(dataset, i) for i in range(min(n, 64)))

    def read(i: int) -> Sample:
        image, label = _split_item(dataset[i])
        return image if isinstance(image, Image.Image) else _from_item(image, signed), label

    classes = tuple(map(str, getattr(dataset, "classes", ())))
    names = [f"item {i}" for i in range(n)]
    return Source(description, names, read, classes, None, thread_safe=False)


def _has_negative(dataset: Any, i: int) -> bool:
    try:
        image, _ = _split_item(dataset[i])
        return not isinstance(image, Image.Image) and bool(np.asarray(image).min() < 0)
    except Exception:  # named when it is decoded
        return False


def _split_item(item: Any) -> tuple[Any, int | None]:
    if not isinstance(item, (tuple, list)):
        return item, None
    label: Any = item[1] if len(item) > 1 else None
    if hasattr(label, "item") and np.ndim(label) == 0:
        label = label.item()
    known = isinstance(label, int) and not isinstance(label, bool) and label >= 0
    return item[0], label if known else None


def _from_item(image: Any, signed: bool) -> Pixels:
    """A data set's array or tensor as uint8 ``[H, W, C]``."""
    is_tensor = type(image).__module__.startswith("torch")
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None]
    elif is_tensor and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3:
        raise ValueError(f"has shape {list(array.shape)}; an image is [C, H, W] or [H, W, C]")
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise ValueError(f"is {array.dtype}; images are uint8 or floating")
    low, high = float(array.min()), float(array.max())
    if not (-1.001 if signed else -0.001) <= low <= high <= 1.001:
        want = "[-1, 1]" if signed else "[0, 1]"
        raise ValueError(f"has values from {low:g} to {high:g}; {want} is expected")
    scaled = (array + 1.0) * 127.5 if signed else array * 255.0
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _classes_of(names: Sequence[str]) -> tuple[list[int] | None, tuple[str, ...]]:
    """Labels by the first folder of each path, below the folders that all have in common."""
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    shared = 0
    for level in zip(*folders, strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    if any(len(parts) == shared for parts in folders):
        return None, ()
    own = [parts[shared] for parts in folders]
    class_names = tuple(sorted(set(own)))
    index = {name: i for i, name in enumerate(class_names)}
    return [index[name] for name in own], class_names


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _is_image_name(name: str) -> bool:
    return _is_visible(name) and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _stamp(path: Path, name: str) -> tuple[str, int, int, int]:
    # The change time cannot be set back, so no edit goes unnoticed.
    try:
        stat = path.stat()
    except OSError:  # a link to nowhere: bad when it is read
        return name, -1, 0, 0
    return name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _hash(stamps: Sequence[tuple[str, int, int, int]]) -> str:
    return hashlib.sha256(repr(sorted(stamps)).encode()).hexdigest()
