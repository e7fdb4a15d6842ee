"""The image sizes a DCGAN can make. Free of torch, so that a wrong size is refused at once."""

from __future__ import annotations

from fastgan.errors import InputError

SMALLEST, LARGEST = 16, 256
BASES = (4, 5, 6, 7)

IMAGE_SIZES: tuple[int, ...] = tuple(
    sorted(s0 << k for s0 in BASES for k in range(2, 7) if SMALLEST <= s0 << k <= LARGEST)
)


def nearest_sizes(size: int) -> tuple[int, int]:
    """The two of ``IMAGE_SIZES`` nearest to ``size``, smaller first."""
    first, second = sorted(IMAGE_SIZES, key=lambda s: (abs(s - size), s))[:2]
    return min(first, second), max(first, second)


def require_positive(**sizes: int) -> None:
    """Refuse a size of nought or less, by its name.

    Raises:
        InputError: one is not at least 1.
    """
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")


def split_size(image_size: int) -> tuple[int, int]:
    """``(s0, k)`` with ``image_size = s0·2^k`` and ``s0`` in 4..7.

    Raises:
        InputError: there is no such pair within 16..256; the message names the nearest two sizes.
    """
    if image_size not in IMAGE_SIZES:
        low, high = nearest_sizes(image_size)
        raise InputError(
            f"image_size={image_size} is not s0*2^k with s0 in 4..7 from {SMALLEST} to {LARGEST}; "
            f"the nearest are {low} and {high}"
        )
    # s0 in 4..7 is three bits long; each doubling adds one.
    k = image_size.bit_length() - 3
    return image_size >> k, k
