"""The examples of embedding run as they are shown, on real images, and learn."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "fastgan" / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
NEEDS = {"accelerate_loop": "accelerate", "lightning_module": "lightning"}
MOST_LINES = 60


def run(name, tmp_path, *flags):
    command = [sys.executable, "-m", f"fastgan.examples.{name}", *flags]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_complete(name, tmp_path):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < MOST_LINES
    needed = NEEDS.get(name)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    done = run(name, tmp_path, "--steps", "40", "--out", "samples.png")
    assert done.returncode == 0, done.stderr[-2000:]
    pixels = np.asarray(Image.open(tmp_path / "samples.png").convert("L"), dtype=float)
    # Noise is as bright at the border of an image as in its middle; digits have dark borders.
    tiles = [
        pixels[2 + 34 * i : 34 * (i + 1), 2 + 34 * j : 34 * (j + 1)]
        for i in range(8)
        for j in range(8)
    ]
    mean = np.mean(tiles, axis=0)
    border = np.concatenate([mean[:3].ravel(), mean[-3:].ravel(), mean[:, :3].ravel()])
    assert border.mean() < mean[8:-8, 8:-8].mean() - 20.0
    losses = done.stdout + done.stderr
    assert "nan" not in losses.lower()


def test_there_are_three():
    assert NAMES == ["accelerate_loop", "lightning_module", "own_loop"]
