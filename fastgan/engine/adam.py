"""torch's fused Adam over weights in any memory format.

On the CPU the fused kernel wants contiguous tensors, and copies a weight that is in
``torch.channels_last``, its gradient and its moments there and back at every step. Adam works
elementwise: the same memory seen in its own order is contiguous, and nothing need be copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Adam(torch.optim.Adam):
    """:class:`torch.optim.Adam`, its step taken on views in the order of each weight's memory."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        complex_ = super()._init_group(group, *lists)
        orders = [_memory_order(p) for p in lists[0]]
        # The last list holds the counts of steps, one number each.
        for tensors in lists[:-1]:
            tensors[:] = [
                tensor if order is None else tensor.permute(order)
                for tensor, order in zip(tensors, orders, strict=False)
            ]
        return bool(complex_)


def _memory_order(p: Tensor) -> tuple[int, ...] | None:
    """The dimensions of ``p`` from the outermost in memory inwards; None if they are in order."""
    if p.is_contiguous():
        return None
    return tuple(sorted(range(p.ndim), key=p.stride, reverse=True))
