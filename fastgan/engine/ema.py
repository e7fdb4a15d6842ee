"""The exponential moving average of a generator's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class ExponentialMovingAverage:
    """Keeps ``average = decay·average + (1 - decay)·module`` after each step.

    Parameters and floating-point buffers (the running statistics of batch norms) are averaged
    alike, so that the statistics belong to the averaged weights; other buffers are copied.
    Yazıcı et al. 2018, https://arxiv.org/abs/1806.04498.

    Args:
        module: what is averaged; its state is the first average.
        decay: in (0, 1).

    Attributes:
        module: the average, a copy that takes no gradient.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the present state of ``module``."""
        averaged, current = [], []
        for mine, theirs in zip(
            self.module.state_dict().values(), module.state_dict().values(), strict=True
        ):
            if mine.is_floating_point():
                averaged.append(mine)
                current.append(theirs)
            else:
                mine.copy_(theirs)
        torch._foreach_lerp_(averaged, current, 1.0 - self.decay)
