"""The exponential moving average of a generator's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fastgan.errors import InputError


class _Unpacking(nn.Module):
    """``module``, called with its arguments in one tuple."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training  # to which update_bn puts the whole back

    def forward(self, arguments: tuple[Tensor, ...]) -> Tensor:
        return self.module(*arguments)


class ExponentialMovingAverage:
    """Keeps ``average += (1 - d_t)·(parameters - average)`` with ``d_t = min(decay, t / (t + 9))``.

    ``t`` counts the updates, so that the average is not held up by the random weights that it began
    with: early on it is one over about a tenth of the steps so far. Yazıcı et al. 2018,
    https://arxiv.org/abs/1806.04498. Averaged weights are smaller than the
    weights they average, so that no statistics gathered in training fit them: those of batch norms
    are measured anew, by :meth:`calibrate`, when the average is about to be used.

    Args:
        module: what is averaged; its state is the first average.
        decay: in (0, 1).

    Attributes:
        module: the average, a copy in evaluation mode that takes no gradient.
        updates: ``t``, a 0-d tensor on the device, so that a captured step counts on.
        stale: whether the weights have changed since :meth:`calibrate` was last called.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        try:
            self.module = copy.deepcopy(module).requires_grad_(False).eval()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"ema={decay}: netG cannot be copied: {reason}; use ema=0") from error
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.updates = torch.zeros((), device=device)
        self.stale = True

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the present parameters of ``module``, and its buffers as they are."""
        self.updates.add_(1.0)
        share = (9.0 / (self.updates + 9.0)).clamp_min_(1.0 - self.decay)
        average: list[Tensor] = list(self.module.parameters())
        difference = list(torch._foreach_sub(list(module.parameters()), average))
        torch._foreach_mul_(difference, share)
        torch._foreach_add_(average, difference)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)

    def calibrate(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Measure the statistics of the average's batch norms on ``batches`` of its arguments.

        Does nothing where the weights have not changed since it was last called.
        """
        if not self.stale:
            return
        devices = [self.updates.device] if self.updates.device.type == "cuda" else []
        # In training mode, so that a dropout draws: not from the global generator as it stands.
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            # Of what is in a tuple, update_bn hands on the first.
            update_bn(((batch,) for batch in batches), _Unpacking(self.module))
        self.stale = False
