"""From one decoded image to ``[S, S, nc]`` uint8, by the example's transform.

The shorter side is resized to S (bilinear, antialiased) and the centre is cropped, as
``torchvision.transforms`` ``Resize(S)`` and ``CenterCrop(S)`` do to a PIL image.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels: TypeAlias = NDArray[np.uint8]

MAX_PIXELS = 89_478_485  # Pillow's own limit before it warns of a decompression bomb
MAX_ASPECT = 16
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")


def is_grey(image: Image.Image | Pixels) -> bool:
    """Whether ``image`` is stored with a single channel of colour."""
    if isinstance(image, np.ndarray):
        return image.ndim == 2 or image.shape[2] == 1
    return image.mode in _GREY_MODES


def to_pixels(image: Image.Image | Pixels, size: int, nc: int) -> Pixels:
    """``image`` as ``[size, size, nc]`` uint8.

    Args:
        image: a PIL image, turned upright by its EXIF tag, or uint8 ``[H, W]`` or ``[H, W, C]``.
        size: the side of the result.
        nc: 1 (luminance), 3 (RGB), or the number of channels that an array has.

    Raises:
        ValueError: the image cannot be used; the message says why.
        OSError: the image is truncated or broken.
    """
    if isinstance(image, np.ndarray):
        array = image[:, :, None] if image.ndim == 2 else image
        if array.shape == (size, size, nc):
            return array
        if array.shape[2] not in (1, 3, 4):
            if array.shape[2] != nc:
                raise ValueError(f"has {array.shape[2]} channels, {nc} are asked for")
            planes = [_fit(Image.fromarray(array[:, :, c]), size) for c in range(nc)]
            return np.stack([np.asarray(plane) for plane in planes], axis=2)
        image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels: a decompression bomb?")
    if nc not in (1, 3):
        raise ValueError(f"{nc} channels are asked for; an image has 1 or 3")
    if image.mode == "F":
        raise ValueError("floating-point image; save it as 8-bit")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 0xFFFF:
            raise ValueError(f"has values from {levels.min()} to {levels.max()}; save it as 8-bit")
        # Bytes in a wider type, or 16 bits of which the high byte is kept.
        shift = 0 if image.mode == "I" and levels.max() <= 0xFF else 8
        image = Image.fromarray((levels >> shift).astype(np.uint8))
    upright = ImageOps.exif_transpose(image)
    pixels = np.asarray(_fit(upright.convert("L" if nc == 1 else "RGB"), size))
    return pixels.reshape(size, size, nc)


def _fit(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` and crop the centre."""
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) > longest:
        # Far outside the crop; without this a sliver of 1 x 100,000 would be blown up in full.
        image = _crop_centre(image, min(width, longest), min(height, longest))
        width, height = image.size
    if width <= height:
        scaled = (size, int(size * height / width))
    else:
        scaled = (int(size * width / height), size)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    return _crop_centre(image, size, size)


def _crop_centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left = round((image.width - width) / 2)
    top = round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
