"""What the last steps measured, kept on the device until it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEPS = 1024


class History:
    """A ring of the values of the last ``STEPS`` steps.

    Where the next step writes is counted on the device, so that a captured step goes on counting.

    Args:
        names: of the values.
        device: where they are measured.

    Attributes:
        tensors: all that a step changes.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = tuple(names)
        self._rows = torch.zeros(STEPS, len(self._names), device=device)
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self.tensors = (self._rows, self._next)

    @torch.no_grad()
    def add(self, row: Tensor) -> None:
        """Take in the values ``row [len(names)]`` of one step."""
        self._rows.index_copy_(0, self._next, row.to(self._rows.dtype)[None])
        self._next.add_(1).remainder_(STEPS)

    def last(self, n: int) -> list[dict[str, float]]:
        """The values of the last ``n`` steps, at most ``STEPS``, the oldest first."""
        if n == 0:
            return []
        end = int(self._next.item())
        rows = torch.cat([self._rows[end:], self._rows[:end]])[-n:]
        return [dict(zip(self._names, row, strict=True)) for row in rows.tolist()]
