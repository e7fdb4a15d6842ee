"""The training loop of ``pytorch/examples/dcgan``, transcribed: the truth for parity, and the
opponent in benchmarks. Networks by the example's layer lists at 64, extended to other sizes by the
rule in ``fastgan/nn/dcgan.py`` (written out here a second time on purpose)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn, optim


def weights_init(m: Any) -> None:
    classname = type(m).__name__
    if "Conv" in classname:
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif "BatchNorm" in classname:
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


class Generator(nn.Module):
    def __init__(self, nz: int, ngf: int, nc: int, image_size: int) -> None:
        super().__init__()
        s, k = base_and_doublings(image_size)
        c = ngf * 2 ** (k - 1)
        layers = [nn.ConvTranspose2d(nz, c, s, 1, 0, bias=False), nn.BatchNorm2d(c), nn.ReLU(True)]
        for _ in range(k - 1):
            layers += [
                nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(c // 2),
                nn.ReLU(True),
            ]
            c //= 2
        self.main = nn.Sequential(
            *layers, nn.ConvTranspose2d(c, nc, 4, 2, 1, bias=False), nn.Tanh()
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z)


class Discriminator(nn.Module):
    def __init__(self, ndf: int, nc: int, image_size: int) -> None:
        super().__init__()
        s, k = base_and_doublings(image_size)
        c = ndf
        layers = [nn.Conv2d(nc, c, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
        for _ in range(k - 1):
            layers += [
                nn.Conv2d(c, c * 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(c * 2),
                nn.LeakyReLU(0.2, True),
            ]
            c *= 2
        self.main = nn.Sequential(*layers, nn.Conv2d(c, 1, s, 1, 0, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).view(-1, 1).squeeze(1)


def base_and_doublings(image_size: int) -> tuple[int, int]:
    k = 0
    while image_size > 7:
        image_size //= 2
        k += 1
    return image_size, k


class ExampleTrainer:
    """One iteration of the example's loop at each call of :meth:`step`."""

    def __init__(
        self, netG: nn.Module, netD: nn.Module, lr: float = 2e-4, beta1: float = 0.5
    ) -> None:
        self.netG, self.netD = netG, netD
        self.criterion = nn.BCELoss()
        self.optimizerD = optim.Adam(netD.parameters(), lr=lr, betas=(beta1, 0.999))
        self.optimizerG = optim.Adam(netG.parameters(), lr=lr, betas=(beta1, 0.999))

    def step(self, real: Tensor, noise: Tensor) -> tuple[float, float, float, float, float]:
        """``errD, errG, D_x, D_G_z1, D_G_z2`` for ``real [N, C, H, W]`` and ``noise``."""
        self.netD.zero_grad()
        label = torch.full((len(real),), 1.0, dtype=real.dtype, device=real.device)
        output = self.netD(real)
        errD_real = self.criterion(output, label)
        errD_real.backward()
        D_x = output.mean().item()

        fake = self.netG(noise)
        label.fill_(0.0)
        output = self.netD(fake.detach())
        errD_fake = self.criterion(output, label)
        errD_fake.backward()
        D_G_z1 = output.mean().item()
        errD = errD_real + errD_fake
        self.optimizerD.step()

        self.netG.zero_grad()
        label.fill_(1.0)
        output = self.netD(fake)
        errG = self.criterion(output, label)
        errG.backward()
        D_G_z2 = output.mean().item()
        self.optimizerG.step()
        return errD.item(), errG.item(), D_x, D_G_z1, D_G_z2
