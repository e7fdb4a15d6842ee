"""Small runs for the tests, and the command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from fastgan import load_images
from fastgan.train.config import TrainConfig
from fastgan.train.loop import RunResult, train

SMALL = TrainConfig(
    image_size=16, nc=1, nz=4, ngf=2, ndf=2, batch_size=8, steps=10, save_every=4, sample_every=5,
    log_every=2,
)  # fmt: skip


def small_data(n: int = 20):
    images = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 1), dtype=np.uint8)
    return load_images(images, 16)


def run_small(out: Path, config: TrainConfig = SMALL, **kwargs: object) -> RunResult:
    kwargs.setdefault("say", lambda line: None)
    return train(config, small_data(), out, progress=False, **kwargs)


def fastgan(*args: object, timeout: float = 120, **kwargs: object) -> subprocess.CompletedProcess:
    """``fastgan ARGS`` in a process of its own, its output as text."""
    command = [sys.executable, "-m", "fastgan", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=dict(os.environ), **kwargs
    )


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its contents."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
