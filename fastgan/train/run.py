"""The folder of a training run and what is written to it.

config.yaml  metrics.jsonl  health.jsonl  events/  samples/step-000500.png  samples.gif
checkpoints/step-000500/    report.html    skipped.txt (where images were)
quality.jsonl  best/step-000400/  neighbours.png (where quality is measured)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgan.errors import InputError
from fastgan.files import replace_file
from fastgan.train.config import TrainConfig

_OWN_NAMES = (
    "config.yaml",
    "metrics.jsonl",
    "health.jsonl",
    "quality.jsonl",
    "neighbours.png",
    "best",
    "events",
    "samples",
    "samples.gif",
    "checkpoints",
    "report.html",
    "skipped.txt",
)

_SAMPLE = re.compile(r"step-(\d{6,})\.png")


def sample_step(path: Path) -> int:
    """The step of the grid at ``path``."""
    return int(path.stem.removeprefix("step-"))


class RunFolder:
    """Paths of a run, and the few things that are done to its files outside training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.health = path / "health.jsonl"
        self.quality = path / "quality.jsonl"
        self.neighbours = path / "neighbours.png"
        self.best = path / "best"
        self.events = path / "events"
        self.samples = path / "samples"
        self.gif = path / "samples.gif"
        self.checkpoints = path / "checkpoints"
        self.report = path / "report.html"
        self.skipped = path / "skipped.txt"

    def is_run(self) -> bool:
        """Whether there is a run here."""
        return self.config.is_file()

    def check_new(self, force: bool) -> None:
        """Refuse to start a run where something is.

        Raises:
            InputError: there is a run and ``force`` is off, or there is something else.
        """
        if not self.path.exists():
            return self._check_parent()
        if not self.path.is_dir():
            raise InputError(f"--out {str(self.path)!r} is a file; give a folder")
        if self.is_run() and not force:
            raise InputError(
                f"--out {str(self.path)!r} is a run already: --resume goes on with it, --force "
                "replaces it, another --out starts beside it"
            )
        if not self.is_run() and any(self.path.iterdir()):
            raise InputError(
                f"--out {str(self.path)!r} is a folder with other files in it; give a new one"
            )
        foreign = sorted(p.name for p in self.path.iterdir() if p.name not in _OWN_NAMES)
        if foreign:
            raise InputError(
                f"--force: {str(self.path)!r} holds {foreign[0]!r}, which is not the run's; move "
                "it away"
            )
        return None

    def _check_parent(self) -> None:
        parent = next(p for p in self.path.absolute().parents if p.exists())
        if not parent.is_dir():
            raise InputError(f"--out {str(self.path)!r}: {str(parent)!r} is a file, not a folder")
        if not os.access(parent, os.W_OK):
            raise InputError(f"--out {str(self.path)!r}: {str(parent)!r} cannot be written to")

    def check_resume(self) -> None:
        """Refuse to resume where there is no run.

        Raises:
            InputError: there is none.
        """
        if not self.is_run():
            raise InputError(
                f"--resume: there is no run at {str(self.path)!r} (no config.yaml); name one with "
                "--out, or leave --resume out to start it"
            )

    def create(self, config: TrainConfig, skipped: Sequence[tuple[str, str]]) -> None:
        """Make the folder a run with this configuration, in place of the one that may be here.

        The configuration is what makes the folder a run: it stays until the new one takes its
        place, when all else of the old run is gone.

        Raises:
            OSError: the folder cannot be written.
        """
        for name in _OWN_NAMES:
            path = self.path / name
            if path == self.config:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        replace_file(self.config, config.to_yaml().encode())
        if skipped:
            lines = "".join(f"{name}: {reason}\n" for name, reason in skipped)
            # The name of a file need not be Unicode.
            replace_file(self.skipped, lines.encode("utf-8", "backslashreplace"))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process out of this run; the lock goes with the process that holds it.

        Raises:
            InputError: another process trains here.
        """
        try:
            import fcntl
        except ImportError:  # not on Windows
            yield
            return
        # The folder itself: a file in it could be replaced, and the lock on it lost.
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise InputError(
                f"--out {str(self.path)!r} is being trained by another process"
            ) from None
        finally:
            os.close(descriptor)

    def sample_path(self, step: int) -> Path:
        """Where the grid of ``step`` is."""
        return self.samples / f"step-{step:06d}.png"

    def sample_paths(self) -> list[Path]:
        """The grids so far, in order of their steps."""
        if not self.samples.is_dir():
            return []
        found = [path for path in self.samples.iterdir() if _SAMPLE.fullmatch(path.name)]
        return sorted(found, key=sample_step)

    def rewind(self, step: int) -> None:
        """Drop what was written after ``step``, which is about to be made again."""
        for path in (self.metrics, self.health, self.quality):
            if path.exists():
                rows = [row for row in read_lines(path) if row["step"] <= step]
                replace_file(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
        for path in self.sample_paths():
            if sample_step(path) > step:
                path.unlink()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of the ``.jsonl`` file ``path``; none where there is no such file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a line that was cut off by a kill
            rows.append(json.loads(line))
    return rows


def add_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add ``row`` to the ``.jsonl`` file ``path``."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(row)}\n")
