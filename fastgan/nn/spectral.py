"""Spectral norm of a discriminator (Miyato et al. 2018, https://arxiv.org/abs/1802.05957)."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastgan.nn.conditional import Projection


def apply_spectral_norm(netD: nn.Module) -> nn.Module:
    """Divide each layer's weight by an estimate of its largest singular value.

    Every ``Conv2d`` and ``Linear`` in ``netD``, and the embedding of a
    :class:`~fastgan.nn.conditional.Projection`, as in the code of the paper, gets PyTorch's
    ``spectral_norm``: one power iteration at each pass in training. The discriminator's passes over
    real images and samples stay two for it. Draws from the global generator.

    Args:
        netD: changed in place; layers that have it already stay as they are.

    Returns:
        ``netD``.
    """
    embeddings = [part.embedding for part in netD.modules() if isinstance(part, Projection)]
    for part in list(netD.modules()):
        normed = isinstance(part, (nn.Conv2d, nn.Linear)) or any(part is e for e in embeddings)
        if normed and not parametrize.is_parametrized(part, "weight"):
            parametrizations.spectral_norm(part)
    return netD
