"""A discriminator that is one sequence of layers, the last of which gives the score."""

from __future__ import annotations

from torch import Tensor, nn

from fastgan.nn.grouped import grouped_forward, run_sequence


class SequentialDiscriminator(nn.Module):
    """What discriminators with all their layers in ``main`` have in common.

    Attributes:
        main: images or points to one logit each; its last layer takes the features.
        n_features: channels or units of the features.
    """

    main: nn.Sequential
    n_features: int

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N]`` of ``x [N, ...]``."""
        return self.forward_grouped(x, 1)

    def forward_grouped(self, x: Tensor, groups: int) -> Tensor:
        """Logits ``[groups·n]``; see :func:`fastgan.nn.grouped.grouped_forward`."""
        return grouped_forward(self.main, x, groups).flatten()

    def features(self, x: Tensor, groups: int = 1) -> Tensor:
        """What the last hidden layer makes of ``x``: ``[groups·n, n_features, ...]``."""
        return run_sequence([*self.main.children()][:-1], x, groups)

    def score(self, h: Tensor, groups: int = 1) -> Tensor:
        """The logits ``[groups·n]`` of what has the features ``h``."""
        return run_sequence([*self.main.children()][-1:], h, groups).flatten()
