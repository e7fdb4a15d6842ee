"""What a set of images comes to in a space of features, and the cached one of a real set.

Mean and covariance are summed over all images. The figures that need the vectors themselves are
taken from at most ``kept`` of them, drawn at random, so that memory does not grow with the set.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from fastgan.data.images import ImageSet
from fastgan.errors import InputError
from fastgan.files import replace_file
from fastgan.machine import cache_folder
from fastgan.metrics.features import Features
from fastgan.seeding import generator

logger = logging.getLogger("fastgan")

FORMAT = 1
MOST_REAL = 50_000
KEPT = 10_000
# Four blocks of two for the kernel distance, and a fifth neighbour.
FEWEST = 8
# The neighbour whose distance is a ball's radius: of precision and recall (Kynkäänniemi et al.
# 2019), of density and coverage (Naeem et al. 2020).
PRECISION_NEIGHBOUR = 3
COVERAGE_NEIGHBOUR = 5

# Rows whose distances to all others are there at a time: 40 MB against 10,000.
_ROWS = 1024
_BATCH = 256
_BATCH_BYTES = 1 << 24


class Moments:
    """Number, mean and scatter of vectors that come in batches, float64 on the CPU.

    Centred sums, merged (Chan et al. 1979): the sum of squares less that of the mean would cancel
    where the mean is large beside the deviation.

    Attributes:
        n: vectors so far.
        mean: ``[F]``.
        scatter: ``[F, F]``, the sum of the outer products of the deviations from the mean.
    """

    def __init__(self, mean: Tensor, scatter: Tensor, n: int = 0) -> None:
        self.n = n
        self.mean = mean
        self.scatter = scatter

    @classmethod
    def zero(cls, size: int) -> Moments:
        """Of no vectors ``[size]``."""
        zeros = torch.zeros(size, dtype=torch.float64)
        return cls(zeros, torch.outer(zeros, zeros))

    def add(self, x: Tensor) -> None:
        """Count the rows of ``x [N, F]`` in."""
        x = x.to("cpu", torch.float64)
        n, mean = self.n + len(x), x.mean(0)
        shift = mean - self.mean
        x = x - mean
        self.scatter.addmm_(x.T, x)
        self.scatter.addr_(shift, shift, alpha=self.n * len(x) / n)
        self.mean += shift * (len(x) / n)
        self.n = n

    @property
    def covariance(self) -> Tensor:
        """``[F, F]``, unbiased."""
        return self.scatter / (self.n - 1)


@dataclass(frozen=True)
class RealStatistics:
    """A real set in a space of features.

    Attributes:
        moments: of all its images, or of those drawn.
        rows: ``[kept, F]`` float32, vectors of some of these, in random order.
        index: ``[kept]`` int64, the number of each of these in the set.
        precision_radii: ``[kept]`` float32, from each row to its third neighbour among the others.
        coverage_radii: ``[kept]`` float32, to its fifth.
        features: the identity of the features.
        digest: of the set.
        description: of the set, for messages.
    """

    moments: Moments
    rows: Tensor
    index: Tensor
    precision_radii: Tensor
    coverage_radii: Tensor
    features: str
    digest: str
    description: str


def real_statistics(
    data: ImageSet,
    features: Features,
    *,
    n: int | None = None,
    kept: int = KEPT,
    seed: int = 0,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> RealStatistics:
    """Those of ``data``: read from the cache, else computed and put there.

    Args:
        data: the real images.
        features: what maps them to vectors.
        n: images that are drawn; None takes all, of more than 50,000 that many.
        kept: of these, whose vectors are kept, at most.
        seed: of both draws.
        cache_dir: None takes ``$FASTGAN_CACHE``, else ``~/.cache/fastgan``.
        progress: show a progress bar where the terminal is one.

    Raises:
        InputError: ``n`` or ``kept`` is less than 8, or ``n`` more than there are.
    """
    n = min(len(data), MOST_REAL) if n is None else n
    if not FEWEST <= n <= len(data):
        raise InputError(
            f"n={n} real images: at least {FEWEST} and at most the {len(data)} of "
            f"{data.description} can be measured"
        )
    check_kept(kept)
    settings = [FORMAT, data.digest, data.images.shape, features.identity, n, kept, seed]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    folder = Path(cache_dir) if cache_dir else cache_folder()
    path = folder / f"real-{key[:32]}.safetensors"
    held = _read(path, key)
    if held is None:
        held = _compute(data, features, n, kept, seed, progress)
        _write(path, key, held)
    return RealStatistics(
        Moments(held["mean"], held["scatter"], n),
        held["rows"],
        held["index"],
        held["precision_radii"],
        held["coverage_radii"],
        features.identity,
        data.digest,
        describe_set(data),
    )


def image_batches(data: ImageSet, index: Tensor | None = None) -> Iterator[Tensor]:
    """The images of ``data``, or those of the numbers ``index [N]``, in order.

    Batches are ``[n, C, S, S]`` float32 in [-1, 1] on the CPU, of some 256 images, less of large
    ones.
    """
    numbers = torch.arange(len(data)) if index is None else index
    one = data.image_size**2 * data.nc
    for part in numbers.split(max(1, min(_BATCH, _BATCH_BYTES // one))):
        pixels = torch.from_numpy(np.ascontiguousarray(data.images[part.numpy()]))
        yield pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def summarise(
    batches: Iterable[Tensor], n: int, kept: Tensor, features: Features, *, bar: str | None
) -> tuple[Moments, Tensor]:
    """The moments of the first ``n`` images of ``batches``, and the vectors of some.

    Args:
        batches: ``[m, C, H, W]`` in [-1, 1] each; no more are drawn than ``n`` images take.
        n: at least 1.
        kept: ``[k]`` int64, the numbers of images whose vectors are kept, in any order.
        features: what maps images to vectors.
        bar: the words on the progress bar; None shows none.

    Returns:
        The moments, and ``[k, F]`` float32 on the CPU, in the order of ``kept``.

    Raises:
        InputError: the batches end before.
    """
    place = torch.full((n,), -1)
    place[kept] = torch.arange(len(kept))
    moments: Moments | None = None
    done = 0
    with tqdm(total=n, desc=bar, unit="image", disable=None if bar else True, leave=False) as shown:
        for batch in batches:
            x = features(batch[: n - done]).cpu()
            if moments is None:
                moments, rows = Moments.zero(x.shape[1]), x.new_empty(len(kept), x.shape[1])
            moments.add(x)
            places = place[done : done + len(x)]
            rows[places[places >= 0]] = x[places >= 0]
            done += len(x)
            shown.update(len(x))
            if done == n:
                break
    if moments is None or done < n:
        raise InputError(f"batches: hold {done} images, n={n} are asked for; ask for fewer")
    return moments, rows


def neighbour_radii(rows: Tensor, neighbours: tuple[int, ...]) -> list[Tensor]:
    """From each of ``rows [N, F]`` to its k-th nearest other row, ``[N]`` for each k, exact."""
    centred = rows - rows.mean(0)
    k = torch.tensor(neighbours)
    # The nearest is the row itself.
    found = [
        torch.cdist(part, centred).topk(int(k.max()) + 1, largest=False).values[:, k]
        for part in centred.split(_ROWS)
    ]
    return list(torch.cat(found).T.contiguous())


def describe_set(data: ImageSet) -> str:
    """What results call ``data``: where it comes from, its size, the start of its digest."""
    return f"{data.description} {data.image_size}x{data.image_size} ({data.digest[:8]})"


def check_kept(kept: int) -> None:
    """Refuse to keep less than the figures are made of."""
    if kept < FEWEST:
        raise InputError(f"kept={kept} must be at least {FEWEST}")


def _compute(
    data: ImageSet, features: Features, n: int, kept: int, seed: int, progress: bool
) -> dict[str, Tensor]:
    drawn = torch.randperm(len(data), generator=generator(seed, "real images"))[:n]
    numbers, order = drawn.sort()
    # Row i is the i-th that was drawn.
    places = order.argsort()[:kept]
    bar = f"Features of {data.description}" if progress else None
    moments, rows = summarise(image_batches(data, numbers), n, places, features, bar=bar)
    radii = neighbour_radii(rows, (PRECISION_NEIGHBOUR, COVERAGE_NEIGHBOUR))
    return {
        "mean": moments.mean,
        "scatter": moments.scatter,
        "rows": rows,
        "index": drawn[:kept].clone(),
        "precision_radii": radii[0],
        "coverage_radii": radii[1],
    }


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """What :func:`_write` put there; None if there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys()
            held = {name: file.get_tensor(name) for name in names}
            if (file.metadata() or {}).get("sha256") == _checksum(key, held):
                return held
    except (OSError, safetensors.SafetensorError) as error:
        logger.warning("%s: %s; computing the statistics anew", path, error)
        return None
    logger.warning("%s: is damaged; computing the statistics anew", path)
    return None


def _write(path: Path, key: str, held: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"sha256": _checksum(key, held)}
        replace_file(path, safetensors.torch.save(held, metadata))
    except OSError as error:
        # They took minutes: better used than lost.
        logger.warning("%s: cannot be written (%s); the next run computes again", path, error)


def _checksum(key: str, held: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(key.encode())
    for name in sorted(held):
        digest.update(f"{name} {held[name].dtype} {tuple(held[name].shape)}".encode())
        digest.update(held[name].numpy().tobytes())
    return digest.hexdigest()
