"""Pictures of samples: grids, single images, the animation of a run."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from fastgan.data.pixels import to_bytes
from fastgan.files import replace_file

MAX_FRAMES = 60
_FRAME_MS, _LAST_FRAME_MS = 150, 2000


def image_grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """One picture of ``images [N, C, H, W]`` in [-1, 1], row by row.

    Args:
        images: with 1 or 3 channels; of any other number the first is shown.
        columns: by default as many as make the grid square.

    """
    if images.shape[1] not in (1, 3):
        images = images[:, :1]
    columns = columns or math.ceil(math.sqrt(len(images)))
    # Black lines between the images: -1 is black.
    return Image.fromarray(to_bytes(make_grid(images, columns, pad_value=-1.0)[None])[0])


def write_png(path: Path, image: Image.Image) -> None:
    """Put ``image`` at ``path``, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    replace_file(path, buffer.getvalue())


def write_gif(path: Path, frames: list[Path]) -> None:
    """An animation of the pictures ``frames``, evenly thinned to at most ``MAX_FRAMES``."""
    pictures = [Image.open(frame).convert("RGB") for frame in thin(frames, MAX_FRAMES)]
    if not pictures:
        return
    durations = [_FRAME_MS] * (len(pictures) - 1) + [_LAST_FRAME_MS]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0
    )
    replace_file(path, buffer.getvalue())


def thin(items: list[Path], most: int) -> list[Path]:
    """At most ``most`` of ``items``, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def slerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """``steps`` points from ``start`` to ``end``, both ``[...]``, on the arc between them.

    A straight line would pass through shorter vectors than a normal distribution draws
    (White 2016, https://arxiv.org/abs/1609.04468).
    """
    flat_start, flat_end = start.flatten(), end.flatten()
    cosine = torch.dot(flat_start, flat_end) / (flat_start.norm() * flat_end.norm())
    angle = torch.arccos(cosine.clamp(-1.0, 1.0))
    t = torch.linspace(0.0, 1.0, steps, dtype=start.dtype).reshape(-1, *[1] * start.ndim)
    if angle < 1e-6:
        return start + t * (end - start)
    return (torch.sin((1.0 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)


def write_each(folder: Path, images: Tensor, start: int = 0) -> int:
    """Write ``images`` one by one to ``folder/000000.png`` and so on, counting from ``start``.

    Each is there whole or not at all.

    Returns:
        The number of the next.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(to_bytes(images), start):
        picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        write_png(folder / f"{i:06d}.png", picture)
    return start + len(images)
