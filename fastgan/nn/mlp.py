"""The GAN of Goodfellow et al. 2014 (https://arxiv.org/abs/1406.2661): fully connected layers.

For images, which are flattened, or for points. Rectifiers and batch norm stand in for what the
paper had before batch norm: maxout, dropout and an initialisation for each data set.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from fastgan.errors import InputError
from fastgan.nn.grouped import grouped_forward
from fastgan.nn.sequential import SequentialDiscriminator
from fastgan.nn.sizes import require_positive

_ACTIVATIONS = ("relu", "leaky_relu", "tanh")


class MLPGenerator(nn.Module):
    """Turns noise ``[N, nz]`` (or ``[N, nz, 1, 1]``) into images or points ``[N, *out_shape]``.

    Args:
        nz: length of the noise vector ``z``.
        hidden: units of each hidden layer, at least one layer.
        out_shape: ``(nc, S, S)`` of images, in (-1, 1) by a final tanh, or ``(F,)`` of points,
            which have no bounds.
        batch_norm: in each hidden layer, between its sum and its activation.
        activation: of the hidden layers: ``relu``, ``leaky_relu`` (of slope 0.2) or ``tanh``.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        nz: int,
        hidden: Sequence[int],
        out_shape: tuple[int, ...],
        batch_norm: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        require_positive(nz=nz)
        _check(hidden, "out_shape", out_shape, activation)
        self.nz, self.out_shape = nz, tuple(out_shape)
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise([nz, *hidden]):
            # The norm subtracts what a bias would add.
            layers += [nn.Linear(n_in, n_out, bias=not batch_norm)]
            layers += [nn.BatchNorm1d(n_out)] if batch_norm else []
            layers += [_activation(activation)]
        layers += [nn.Linear(hidden[-1], math.prod(out_shape))]
        self.main = nn.Sequential(*layers, *([nn.Tanh()] if len(out_shape) > 1 else []))

    def forward(self, z: Tensor) -> Tensor:
        """``[N, *out_shape]`` for noise ``z [N, nz]`` or ``[N, nz, 1, 1]``."""
        return grouped_forward(self.main, z.flatten(1), 1).view(-1, *self.out_shape)


class MLPDiscriminator(SequentialDiscriminator):
    """Turns images or points ``[N, *in_shape]`` into logits ``[N]``: positive for real.

    Args:
        in_shape: ``(nc, S, S)`` or ``(F,)``.
        hidden: units of each hidden layer, at least one layer.
        activation: of the hidden layers: ``relu``, ``leaky_relu`` (of slope 0.2) or ``tanh``.

    Attributes:
        n_features: units of the last hidden layer.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self, in_shape: tuple[int, ...], hidden: Sequence[int], activation: str = "leaky_relu"
    ) -> None:
        super().__init__()
        _check(hidden, "in_shape", in_shape, activation)
        self.in_shape, self.n_features = tuple(in_shape), hidden[-1]
        layers: list[nn.Module] = [nn.Flatten()]
        for n_in, n_out in itertools.pairwise([math.prod(in_shape), *hidden]):
            layers += [nn.Linear(n_in, n_out), _activation(activation)]
        self.main = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))


def _activation(name: str) -> nn.Module:
    if name == "leaky_relu":
        return nn.LeakyReLU(0.2, inplace=True)
    return nn.ReLU(inplace=True) if name == "relu" else nn.Tanh()


def _check(hidden: Sequence[int], name: str, shape: tuple[int, ...], activation: str) -> None:
    for size_name, sizes in (("hidden", hidden), (name, shape)):
        if not sizes or min(sizes) < 1:
            raise InputError(f"{size_name}={sizes!r} must be one or more sizes of at least 1")
    if activation not in _ACTIVATIONS:
        raise InputError(f"activation={activation!r}: choose from {', '.join(_ACTIVATIONS)}")
