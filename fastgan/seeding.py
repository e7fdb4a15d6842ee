"""Random generators, each for one purpose, from one seed."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def generator(
    seed: int, purpose: str, index: int = 0, device: str | torch.device = "cpu"
) -> torch.Generator:
    """A generator whose numbers depend on ``(seed, purpose, index)`` alone.

    Those for other purposes or indices are unrelated, which ``seed + 1`` would not be.
    """
    entropy = [seed & (2**64 - 1), zlib.crc32(purpose.encode()), index]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) >> 1)
