"""GANs as people write them, for :func:`fastgan.accelerate`. ``python tests/support/networks.py``
prints what is fused in each of them, and what is not, and why."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastgan.benchmarks import example_dcgan as example
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class UpsamplingGenerator(nn.Module):
    """Of PyTorch-GAN's ``dcgan.py``, which Lightning's GANs are written after."""

    def __init__(self, nz: int, channels: int) -> None:
        super().__init__()
        self.l1 = nn.Sequential(nn.Linear(nz, channels * 4 * 4))
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(channels, channels, 3, stride=1, padding=1),
            nn.BatchNorm2d(channels, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(channels, channels // 2, 3, stride=1, padding=1),
            nn.BatchNorm2d(channels // 2, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(channels // 2, 3, 3, stride=1, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        out = self.l1(z)
        out = out.view(out.shape[0], -1, 4, 4)
        return self.conv_blocks(out)


class DropoutDiscriminator(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()

        def block(c_in: int, c_out: int, bn: bool = True) -> list[nn.Module]:
            layers = [nn.Conv2d(c_in, c_out, 3, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
            layers += [nn.Dropout2d(0.25)]
            return [*layers, nn.BatchNorm2d(c_out, 0.8)] if bn else layers

        self.model = nn.Sequential(*block(3, channels, bn=False), *block(channels, 2 * channels))
        self.adv_layer = nn.Sequential(nn.Linear(2 * channels * 4 * 4, 1), nn.Sigmoid())

    def forward(self, img: Tensor) -> Tensor:
        out = self.model(img)
        return self.adv_layer(out.view(out.shape[0], -1))


class LightningGAN(nn.Module):
    """A ``LightningModule`` in all but name: both networks, and hyperparameters in a dict."""

    def __init__(self, nz: int, channels: int) -> None:
        super().__init__()
        self.hparams = {"nz": nz, "lr": 2e-4}
        self.generator = UpsamplingGenerator(nz, channels)
        self.discriminator = DropoutDiscriminator(channels)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def g_loss(self, z: Tensor) -> Tensor:
        return F.binary_cross_entropy(self.discriminator(self(z)), torch.ones(len(z), 1).to(z))


class UnetSkipConnectionBlock(nn.Module):
    """Of ``pytorch-CycleGAN-and-pix2pix``: X -- down -- submodule -- up -- concatenated with X."""

    def __init__(
        self,
        outer: int,
        inner: int,
        image: int | None = None,
        submodule: nn.Module | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        use_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.outermost = image is not None
        image = outer if image is None else image
        downconv = nn.Conv2d(image, inner, kernel_size=4, stride=2, padding=1, bias=False)
        downrelu, uprelu = nn.LeakyReLU(0.2, True), nn.ReLU(True)
        if self.outermost:
            upconv = nn.ConvTranspose2d(inner * 2, outer, kernel_size=4, stride=2, padding=1)
            model = [downconv, submodule, uprelu, upconv, nn.Tanh()]
        elif submodule is None:
            upconv = nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1, bias=False)
            model = [downrelu, downconv, uprelu, upconv, norm_layer(outer)]
        else:
            upconv = nn.ConvTranspose2d(inner * 2, outer, 4, stride=2, padding=1, bias=False)
            down, up = [downrelu, downconv, norm_layer(inner)], [uprelu, upconv, norm_layer(outer)]
            model = [*down, submodule, *up, *([nn.Dropout(0.5)] if use_dropout else [])]
        self.model = nn.Sequential(*model)

    def forward(self, x: Tensor) -> Tensor:
        if self.outermost:
            return self.model(x)
        return torch.cat([x, self.model(x)], 1)


class UnetGenerator(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        norm = functools.partial(nn.BatchNorm2d, affine=True, track_running_stats=True)
        block = functools.partial(UnetSkipConnectionBlock, norm_layer=norm)
        inner = block(channels * 4, channels * 4)
        inner = block(channels * 4, channels * 4, submodule=inner, use_dropout=True)
        inner = block(channels * 2, channels * 4, submodule=inner)
        inner = block(channels, channels * 2, submodule=inner)
        self.model = block(3, channels, image=3, submodule=inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class ResidualBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.conv1 = norm(nn.Conv2d(c_in, c_out, 3, 1, 1))
        self.conv2 = norm(nn.Conv2d(c_out, c_out, 3, 1, 1))
        self.shortcut = norm(nn.Conv2d(c_in, c_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(F.relu(x))))
        return F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2))


class SpectralResNet(nn.Module):
    """The discriminator of SNGAN, by the spectral norm of today or by the one with hooks."""

    def __init__(self, channels: int, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            norm(nn.Conv2d(3, channels, 4, 2, 1)),
            nn.LeakyReLU(0.1),
            ResidualBlock(channels, 2 * channels, norm),
            ResidualBlock(2 * channels, 2 * channels, norm),
        )
        self.linear = norm(nn.Linear(2 * channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.blocks(x)).sum(dim=(2, 3)))


class AttributeGenerator(nn.Module):
    """An attribute a layer, and activations as functions."""

    def __init__(self, nz: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(nz, channels * 2, 4, 1, 0, bias=False)
        self.bn1 = nn.BatchNorm2d(channels * 2)
        self.conv2 = nn.ConvTranspose2d(channels * 2, channels, 4, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(z.view(len_of(z), -1, 1, 1))))
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return torch.tanh(self.conv3(x))


class AttributeDiscriminator(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.slope = 0.2
        self.conv1 = nn.Conv2d(3, channels, 4, 2, 1)
        self.conv2 = nn.Conv2d(channels, channels * 2, 4, 2, 1)
        self.bn2 = nn.BatchNorm2d(channels * 2)
        self.act = nn.LeakyReLU(0.2)
        self.head = nn.Conv2d(channels * 2, 1, 4, 1, 0)

    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        x = F.leaky_relu(self.conv1(x), self.slope)
        h = self.act(self.bn2(self.conv2(x)))
        return h if features else self.head(h).flatten()


def len_of(x: Tensor) -> int:
    return x.size(0)


class ConvBlock(nn.Sequential):
    """A subclass of ``Sequential`` that keeps its forward."""

    def __init__(self, c_in: int, c_out: int, norm: bool = True) -> None:
        layers = [nn.Conv2d(c_in, c_out, 4, 2, 1, bias=not norm)]
        layers += [nn.BatchNorm2d(c_out)] if norm else []
        super().__init__(*layers, nn.LeakyReLU(0.2))


def conv_block(c_in: int, c_out: int, side: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(c_in, c_out, 4, 2 if side else 1, side, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(True),
    )


def nested_generator(nz: int, channels: int) -> nn.Module:
    return nn.Sequential(
        conv_block(nz, channels * 2, side=0),
        nn.Sequential(conv_block(channels * 2, channels)),
        nn.Sequential(nn.ConvTranspose2d(channels, 3, 4, 2, 1), nn.Tanh()),
    )


def nested_discriminator(channels: int) -> nn.Module:
    return nn.Sequential(
        ConvBlock(3, channels, norm=False),
        ConvBlock(channels, channels * 2),
        nn.Conv2d(channels * 2, 1, 4),
        nn.Flatten(0),
    )


class LoopDiscriminator(nn.Module):
    """Layers in lists, gone through by a loop."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        sides = [3, channels, channels * 2]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 4, 2, 1, bias=False) for a, b in itertools.pairwise(sides)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in sides[1:])
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.out = nn.Linear(channels * 2 * 4 * 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.act(norm(conv(x)))
        return self.out(x.flatten(1))


class Network(NamedTuple):
    """How to make a network, what goes into it, and how many of its convolutions are fused."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    fused: int
    left: int = 0


_IMAGES = (4, 3, 16, 16)
NETWORKS = {
    "example G": Network(lambda: example.Generator(8, 4, 3, 32), (4, 8, 1, 1), 4),
    "example D": Network(lambda: example.Discriminator(4, 3, 32), (4, 3, 32, 32), 4),
    "lightning G": Network(lambda: LightningGAN(8, 4), (4, 8), 5),
    "lightning D": Network(lambda: DropoutDiscriminator(4), _IMAGES, 2),
    "pix2pix U-Net": Network(lambda: UnetGenerator(4), (4, 3, 32, 32), 10),
    "SNGAN D": Network(lambda: SpectralResNet(4, spectral_norm), _IMAGES, 0, 7),
    "SNGAN D, hooks": Network(lambda: SpectralResNet(4, nn.utils.spectral_norm), _IMAGES, 0, 7),
    "SNGAN D, no norm": Network(lambda: SpectralResNet(4, lambda m: m), _IMAGES, 7),
    "attributes G": Network(lambda: AttributeGenerator(8, 4), (4, 8), 3),
    "attributes D": Network(lambda: AttributeDiscriminator(4), _IMAGES, 3),
    "nested G": Network(lambda: nested_generator(8, 4), (4, 8, 1, 1), 3),
    "nested D": Network(lambda: nested_discriminator(4), _IMAGES, 3),
    "loop D": Network(lambda: LoopDiscriminator(4), _IMAGES, 2),
}


if __name__ == "__main__":
    from fastgan import accelerate, explain

    for _name, _network in NETWORKS.items():
        print(f"{_name}\n{explain(accelerate(_network.build()))}\n")
