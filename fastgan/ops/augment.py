"""From a set of uint8 images to a batch for the networks: gather, flip, scale.

y[i, c, h, w] = images[index[i], h, w', c] / 127.5 - 1,   w' = W-1-w where flip[i] else w
"""

from __future__ import annotations

import torch
from torch import Tensor


def augment_reference(
    images: Tensor, index: Tensor | None, flip: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The formula above in torch. Arguments as in :func:`augment`."""
    batch = images if index is None else images[index]
    if flip is not None:
        batch = torch.where(flip[:, None, None, None], batch.flip(2), batch)
    return batch.to(dtype).div_(127.5).sub_(1.0).permute(0, 3, 1, 2)


def augment(
    images: Tensor,
    index: Tensor | None = None,
    flip: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gather images by index, mirror some of them, and scale their bytes to [-1, 1].

    Args:
        images: ``[M, H, W, C]`` uint8.
        index: ``[N]`` int64 on the same device, each in 0..M-1; None takes all in order.
        flip: ``[N]`` bool on the same device; None flips none.
        dtype: of the result, floating.

    Returns:
        ``[N, C, H, W]`` in ``torch.channels_last`` memory format.

    Equivalent to::

        x = images[index].permute(0, 3, 1, 2)
        torch.where(flip[:, None, None, None], x.flip(3), x).to(dtype) / 127.5 - 1
    """
    return augment_reference(images, index, flip, dtype)
