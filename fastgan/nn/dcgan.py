"""DCGAN (Radford et al. 2015, https://arxiv.org/abs/1511.06434), as ``pytorch/examples`` builds it.

An image of side ``s0·2^k`` (``s0`` in 4..7) takes ``k`` up- or down-samplings by two. At 64 these
are the networks of the example, layer for layer: the same state-dict keys, the same initialisation
drawing the same random numbers. The one difference is that the discriminator stops before the
sigmoid, which has no parameters, so that checkpoints pass both ways unchanged.

Either network is made deeper by ``extra_layers``: that many convolutions of 3x3 with stride 1, each
with its batch norm and activation, after each hidden layer of the example's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from fastgan.choices import NormD
from fastgan.errors import InputError
from fastgan.nn.grouped import grouped_forward
from fastgan.nn.sequential import SequentialDiscriminator
from fastgan.nn.sizes import require_positive, split_size


def init_dcgan_weights(module: nn.Module) -> None:
    """Initialise one module as the example does; for :meth:`torch.nn.Module.apply`.

    Convolutions are N(0, 0.02); batch norms have weight N(1, 0.02) and bias 0.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class DCGANGenerator(nn.Module):
    """Turns noise ``[N, nz, 1, 1]`` (or ``[N, nz]``) into images ``[N, nc, S, S]`` in (-1, 1).

    Args:
        nz: length of the noise vector ``z``.
        ngf: channels of the last hidden layer; each earlier one has twice those of the next.
        nc: channels of the image.
        image_size: its side ``S = s0·2^k`` with ``s0`` in 4..7, from 16 to 256.
        extra_layers: further layers at each resolution but the image's.

    Raises:
        InputError: an argument is out of range; for a size, the nearest two are named.
    """

    def __init__(
        self,
        nz: int = 100,
        ngf: int = 64,
        nc: int = 3,
        image_size: int = 64,
        extra_layers: int = 0,
    ) -> None:
        super().__init__()
        require_positive(nz=nz, ngf=ngf, nc=nc)
        _require_depth(extra_layers)
        s0, k = split_size(image_size)
        self.nz, self.ngf, self.nc, self.image_size = nz, ngf, nc, image_size
        channels = [ngf << i for i in reversed(range(k))]
        layers: list[nn.Module] = [nn.ConvTranspose2d(nz, channels[0], s0, 1, 0, bias=False)]
        for c_in, c_out in zip(channels, [*channels[1:], nc], strict=True):
            layers += [nn.BatchNorm2d(c_in), nn.ReLU(inplace=True)]
            for _ in range(extra_layers):
                layers += [nn.Conv2d(c_in, c_in, 3, 1, 1, bias=False)]
                layers += [nn.BatchNorm2d(c_in), nn.ReLU(inplace=True)]
            layers += [nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)]
        self.main = nn.Sequential(*layers, nn.Tanh())
        self.apply(init_dcgan_weights)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> DCGANGenerator:
        """The generator that ``state_dict`` belongs to, its sizes read off the tensors' shapes.

        Args:
            state_dict: of this class or of the example's ``Generator`` (``netG_epoch_24.pth``).

        Raises:
            InputError: the keys or shapes are not a DCGAN generator's.
        """
        convs, extra_layers = _conv_weights(state_dict, "generator")
        first, last = convs[0], convs[-1]
        model = cls(
            nz=first.shape[0],
            ngf=last.shape[0],
            nc=last.shape[1],
            image_size=first.shape[2] << (len(convs) - 1),
            extra_layers=extra_layers,
        )
        _load(model, state_dict, "generator")
        return model

    def forward(self, z: Tensor) -> Tensor:
        """Images ``[N, nc, S, S]`` for noise ``z [N, nz, 1, 1]`` or ``[N, nz]``."""
        return grouped_forward(self.main, z if z.ndim == 4 else z[:, :, None, None], 1)


class DCGANDiscriminator(SequentialDiscriminator):
    """Turns images ``[N, nc, S, S]`` into logits ``[N]``: positive for real, before any sigmoid.

    Args:
        ndf: channels of the first hidden layer; each later one has twice those of the one before.
        nc: channels of the image.
        image_size: its side ``S = s0·2^k`` with ``s0`` in 4..7, from 16 to 256.
        extra_layers: further layers at each resolution but the image's.
        norm: ``batch``, or ``none``, which has a bias in place of each batch norm: for penalties of
            the gradient, which are of each sample alone (Gulrajani et al. 2017,
            https://arxiv.org/abs/1704.00028), and for spectral norm.

    Attributes:
        n_features: channels of the last hidden layer.

    Raises:
        InputError: an argument is out of range; for a size, the nearest two are named.
    """

    def __init__(
        self,
        ndf: int = 64,
        nc: int = 3,
        image_size: int = 64,
        extra_layers: int = 0,
        norm: NormD = "batch",
    ) -> None:
        super().__init__()
        require_positive(ndf=ndf, nc=nc)
        _require_depth(extra_layers)
        if norm not in get_args(NormD):
            raise InputError(f"norm={norm!r}: choose from {', '.join(get_args(NormD))}")
        s0, k = split_size(image_size)
        self.ndf, self.nc, self.image_size = ndf, nc, image_size
        channels = [ndf << i for i in range(k)]
        self.n_features = channels[-1]
        layers: list[nn.Module] = []
        for c_in, c_out in zip([nc, *channels], channels, strict=False):
            down = (c_in, c_out, 4, 2, 1)
            for sizes in (down, *[(c_out, c_out, 3, 1, 1)] * extra_layers):
                is_first = not layers
                layers += [nn.Conv2d(*sizes, bias=norm == "none" and not is_first)]
                layers += [nn.BatchNorm2d(c_out)] if norm == "batch" and not is_first else []
                layers += [nn.LeakyReLU(0.2, inplace=True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, s0, 1, 0, bias=False))
        self.apply(init_dcgan_weights)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> DCGANDiscriminator:
        """The discriminator that ``state_dict`` belongs to, its sizes read off the shapes.

        Args:
            state_dict: of this class or of the example's ``Discriminator``.

        Raises:
            InputError: the keys or shapes are not a DCGAN discriminator's.
        """
        convs, extra_layers = _conv_weights(state_dict, "discriminator")
        first, last = convs[0], convs[-1]
        model = cls(
            ndf=first.shape[0],
            nc=first.shape[1],
            image_size=last.shape[2] << (len(convs) - 1),
            extra_layers=extra_layers,
            norm="batch" if any(key.endswith("running_mean") for key in state_dict) else "none",
        )
        _load(model, state_dict, "discriminator")
        return model


def _require_depth(extra_layers: int) -> None:
    if extra_layers < 0:
        raise InputError(f"extra_layers={extra_layers} must be at least 0")


def _conv_weights(state_dict: Mapping[str, Tensor], what: str) -> tuple[list[Tensor], int]:
    """The weights of the example's layers in order, and how many extra ones each hidden one has."""
    weights = [
        (int(parts[1]), value)
        for key, value in state_dict.items()
        if isinstance(key, str)
        and (parts := key.split("."))[0] == "main"
        and len(parts) == 3
        and parts[1].isdigit()
        and parts[2] == "weight"
        and isinstance(value, torch.Tensor)
        and value.ndim == 4
    ]
    # The example's are of 4 to 7 a side.
    convs = [w for _, w in sorted(weights, key=lambda item: item[0]) if w.shape[2] > 3]
    if len(convs) < 3:
        keys = ", ".join(map(str, list(state_dict)[:3])) or "none"
        raise InputError(
            f"state dict is not a DCGAN {what}'s: it needs at least three convolutions named "
            f"main.N.weight; its first keys are {keys}"
        )
    return convs, (len(weights) - len(convs)) // (len(convs) - 1)


def _load(model: nn.Module, state_dict: Mapping[str, Tensor], what: str) -> None:
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InputError(f"state dict is not a DCGAN {what}'s: {first}") from error
