"""The health of a GAN while it trains: what is measured on its batches, and what that means.

:class:`Vitals` measures on the device, as part of the engine's step, how the samples of a batch
lie among the real images of the same batch. :class:`Health` reads what came of it, with the
engine's own statistics, and gives a verdict with its reasons. :class:`StoppingRule` says when
nothing more is to be had.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.errors import InputError

# Images are looked at in this size at most: what tells them apart at a glance.
_SIDE = 16
# Of a batch, on either side.
_MOST = 64
# Naeem et al. 2020, section 3.3.
_NEIGHBOURS = 5
_NEAR, _SAME = 0.25, 0.1


class Vitals:
    """A monitor for :class:`fastgan.Engine`: how samples lie among real images, in a batch.

    Distances are Euclidean, between points or between pixels, of images averaged down to 16x16 at
    most. Of a batch the first 64 take part.

    - ``spread``: the mean distance between samples, divided by that between real images. 1 where
      both vary alike, 0 where all samples are one.
    - ``coverage``: the share of real images that have a sample near them: nearer than their fifth
      nearest real image (Naeem et al. 2020, https://arxiv.org/abs/2002.09797, over a batch), or
      than a quarter of the mean distance between real images, so that a mode that is small counts
      as soon as it is hit about. Of 64 samples that are real themselves 97 %, and the less the
      more of the modes are missed.
    - ``duplicates``: the share of samples that have another within a tenth of the mean distance
      from a real image to its nearest.

    Args:
        every: steps from one measurement to the next.

    Raises:
        InputError: ``every`` is less than 1.
    """

    names: Sequence[str] = ("spread", "coverage", "duplicates")

    def __init__(self, every: int = 10) -> None:
        if every < 1:
            raise InputError(f"every={every} must be at least 1")
        self.every = every

    def measure(self, real: Tensor, fake: Tensor) -> Tensor:
        """The values ``[3]``, float32, of batches ``[N, ...]``; NaN for fewer than 3 images."""
        if len(real) < 3:
            return torch.full((3,), math.nan, device=real.device)
        points = torch.cat([_points(real), _points(fake)])
        n = len(points) // 2
        distances = _distances(points)
        among_real, between, among_fake = distances[:n, :n], distances[:n, n:], distances[n:, n:]
        nearest = among_real.topk(min(_NEIGHBOURS, n - 1), largest=False).values
        scale = _mean_finite(among_real)
        near = nearest[:, -1].maximum(_NEAR * scale)
        covered = between.amin(dim=1) <= near
        close = _SAME * nearest[:, 0].mean()
        spread = _mean_finite(among_fake) / scale
        duplicates = among_fake.amin(dim=1) < close
        shares = [covered.float().mean(), duplicates.float().mean()]
        return torch.stack([spread.float(), *shares])


def _points(x: Tensor) -> Tensor:
    x = x[:_MOST].float()
    if x.ndim == 4 and max(x.shape[2:]) > _SIDE:
        x = F.adaptive_avg_pool2d(x, _SIDE)
    return x.flatten(1)


def _distances(points: Tensor) -> Tensor:
    """Of each of ``points [n, F]`` to each, and none to itself: infinite on the diagonal."""
    # In float64: of near duplicates a product of float32 would leave rounding errors alone.
    centred = (points - points.mean(dim=0)).double()
    products = centred @ centred.T
    squares = products.diagonal()
    squared = squares[:, None] + squares[None, :] - 2.0 * products
    return squared.clamp_min_(0.0).sqrt_().fill_diagonal_(math.inf)


def _mean_finite(distances: Tensor) -> Tensor:
    """The mean over all but the diagonal, which is infinite."""
    n = len(distances)
    return distances.where(distances.isfinite(), 0.0).sum() / (n * (n - 1))


class Verdict(NamedTuple):
    """How a GAN does.

    Attributes:
        state: ``starting``, ``healthy``, ``D too strong``, ``G too strong``, ``collapsing`` or
            ``diverged``.
        reasons: what speaks for it, in words; none of ``starting`` and ``healthy``.
    """

    state: str
    reasons: tuple[str, ...] = ()

    @property
    def bad(self) -> bool:
        """Whether something is wrong."""
        return self.state not in ("starting", "healthy")

    def __str__(self) -> str:
        return f"{self.state}: {'; '.join(self.reasons)}" if self.reasons else self.state


class Thresholds(NamedTuple):
    """Where a value becomes a reason. They are those of the medians over a window.

    Attributes:
        spread: samples that vary less than this part of what real images do are too alike.
        coverage: fewer real images than this with a sample near them are too few.
        duplicates: a greater share of samples with another like it is too great.
        accuracy_high: a D that is right more often leaves G nothing to learn from.
        accuracy_low: a D that is right less often does not tell G anything true.
        explosion: a loss or a norm of gradients above this is out of bounds.
    """

    spread: float = 0.5
    coverage: float = 0.2
    duplicates: float = 0.5
    accuracy_high: float = 0.995
    accuracy_low: float = 0.35
    explosion: float = 1e4


class Health:
    """Reads what the steps of a GAN measured, and says how it does.

    Args:
        window: steps that a verdict is about, the last ones.
        grace: steps in which none is given: a G that has just begun makes one image.
        scores_compared: whether D's scores have a boundary between real and generated, which those
            of a Wasserstein critic have not; without it D is not judged.
        thresholds: see :class:`Thresholds`.

    Raises:
        InputError: ``window`` or ``grace`` is less than 1.
    """

    def __init__(
        self,
        *,
        window: int = 200,
        grace: int = 300,
        scores_compared: bool = True,
        thresholds: Thresholds | None = None,
    ) -> None:
        for name, value in (("window", window), ("grace", grace)):
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        self.window, self.grace = window, grace
        self.scores_compared = scores_compared
        self.thresholds = thresholds or Thresholds()
        self._rows: collections.deque[tuple[int, dict[str, float]]] = collections.deque()
        self._broken: tuple[str, ...] = ()
        self._step = self._began = 0

    def add(self, step: int, row: Mapping[str, float]) -> None:
        """Take in what ``step`` measured, a row of ``Engine.history``."""
        broken = [
            f"{name} was {row[name]:g} at step {step}"
            for name in ("loss_d", "loss_g", "gradient_d", "gradient_g")
            if name in row
            and not abs(row[name]) <= self.thresholds.explosion
            # What was not measured is NaN, but for the losses, which always are.
            and (name.startswith("loss") or not math.isnan(row[name]))
        ]
        if broken:
            self._broken = tuple(broken)
        if not math.isnan(row.get("spread", math.nan)):
            self._rows.append((step, dict(row)))
        while self._rows and self._rows[0][0] <= step - self.window:
            self._rows.popleft()
        self._step = step

    def restart(self) -> None:
        """Forget what was measured: something has been changed, and has its time of grace."""
        self._rows.clear()
        self._broken = ()
        self._began = self._step

    def median(self, name: str) -> float:
        """Of a value over the window; NaN where it has none."""
        values = [row[name] for _, row in self._rows if not math.isnan(row.get(name, math.nan))]
        return statistics.median(values) if values else math.nan

    @property
    def accuracy(self) -> float:
        """D's, the median over the window of the mean over real images and samples."""
        values = [(row["accuracy_real"] + row["accuracy_fake"]) / 2 for _, row in self._rows]
        return statistics.median(values) if values else math.nan

    def verdict(self) -> Verdict:
        """On the last ``window`` steps."""
        if self._broken:
            return Verdict("diverged", self._broken)
        if self._step - self._began < self.grace or not self._rows:
            return Verdict("starting")
        t = self.thresholds
        spread, coverage = self.median("spread"), self.median("coverage")
        duplicates = self.median("duplicates")
        alike = [
            (spread < t.spread, f"samples vary {spread:.2f} times as much as real images"),
            (coverage < t.coverage, f"{coverage:.0%} of real images have a sample near them"),
            (duplicates > t.duplicates, f"{duplicates:.0%} of samples have a near duplicate"),
        ]
        reasons = tuple(reason for holds, reason in alike if holds)
        if reasons:
            return Verdict("collapsing", reasons)
        if self.scores_compared and self.accuracy > t.accuracy_high:
            return Verdict("D too strong", (f"D is right about {self.accuracy:.1%} of images",))
        if self.scores_compared and self.accuracy < t.accuracy_low:
            return Verdict("G too strong", (f"D is right about {self.accuracy:.0%} of images",))
        return Verdict("healthy")

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs; numbers and strings."""
        return {
            "rows": [[step, row] for step, row in self._rows],
            "broken": list(self._broken),
            "step": self._step,
            "began": self._began,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._rows = collections.deque((int(step), dict(row)) for step, row in state["rows"])
        self._broken = tuple(state["broken"])
        self._step, self._began = int(state["step"]), int(state["began"])


class StoppingRule:
    """Says when a run has given what it can: three things together, none of which says it alone.

    - D is unsure: its accuracy is ``0.5 ± tolerance`` over the health's window. It is in a run that
      has collapsed, too.
    - Diversity has held: the verdict is healthy, and ``spread`` is at least ``kept`` times the
      largest so far.
    - The quality metric no longer improves: its best is ``patience`` measurements old.

    Args:
        tolerance: of D's accuracy around a half.
        kept: the part of the largest spread that must be left.
        patience: measurements.

    Attributes:
        reason: why the run may stop, in words; empty as long as it may not.
    """

    def __init__(self, *, tolerance: float = 0.1, kept: float = 0.9, patience: int = 4) -> None:
        self.tolerance, self.kept, self.patience = tolerance, kept, patience
        self.reason = ""
        self._best = math.inf
        self._best_step = 0
        self._since = 0
        self._largest_spread = 0.0

    def add(self, step: int, metric: float, health: Health) -> bool:
        """Take in the quality ``metric`` (less is better) at ``step``.

        Returns:
            Whether the run may stop, now for the first time.
        """
        self._since += 1
        if metric < self._best:
            self._best, self._best_step, self._since = metric, step, 0
        spread, accuracy = health.median("spread"), health.accuracy
        if not math.isnan(spread):
            self._largest_spread = max(self._largest_spread, spread)
        unsure = abs(accuracy - 0.5) <= self.tolerance
        held = health.verdict().state == "healthy" and spread >= self.kept * self._largest_spread
        if self.reason or not (unsure and held and self._since >= self.patience):
            return False
        self.reason = (
            f"it may stop: D is right about {accuracy:.0%} of images, samples vary {spread:.2f} "
            f"times as much as real images, and {self._since} measurements have not been better "
            f"than the {self._best:.4g} of step {self._best_step}"
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs; numbers and strings."""
        return {
            "reason": self.reason,
            "best": self._best,
            "best_step": self._best_step,
            "since": self._since,
            "largest_spread": self._largest_spread,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.reason, self._best = state["reason"], state["best"]
        self._best_step, self._since = state["best_step"], state["since"]
        self._largest_spread = state["largest_spread"]
