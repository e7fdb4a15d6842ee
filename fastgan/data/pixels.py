"""Floating images as the bytes that files and sets hold."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """``[N, C, H, W]`` in [-1, 1] as uint8 ``[N, H, W, C]``."""
    scaled = images.detach().float().add(1.0).mul(127.5).round().clamp(0.0, 255.0)
    return scaled.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
