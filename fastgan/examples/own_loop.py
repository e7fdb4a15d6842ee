"""A loop of your own: your networks, run fused, and your step, captured in a CUDA graph on a GPU.

``python -m fastgan.examples.own_loop``
"""

import torch
import tyro
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm import trange

import fastgan

NZ, SIZE = 64, 32


def main(steps: int = 1000, out: str = "own_loop.png") -> None:
    """Train on the embedded digits for so many steps, and draw samples to a file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    netG = nn.Sequential(
        *(nn.ConvTranspose2d(NZ, 128, 4, 1, 0, bias=False), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.Tanh()),
    ).to(device)
    netD = nn.Sequential(
        *(nn.Conv2d(1, 32, 4, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(64, 128, 4, 2, 1, bias=False), nn.BatchNorm2d(128), nn.LeakyReLU(0.2)),
        nn.Conv2d(128, 1, 4),
    ).to(device)
    adam = {"lr": 2e-4, "betas": (0.5, 0.999), "fused": True, "capturable": True}
    opt_g = torch.optim.Adam(fastgan.accelerate(netG).parameters(), **adam)
    opt_d = torch.optim.Adam(fastgan.accelerate(netD).parameters(), **adam)

    def train_step(real: Tensor, z: Tensor) -> Tensor:
        fake = netG(z)
        loss_real, _ = fastgan.bce_loss(netD(real), [1.0])
        loss_fake, _ = fastgan.bce_loss(netD(fake.detach()), [0.0])
        opt_d.zero_grad()
        (loss_real + loss_fake).sum().backward()
        opt_d.step()
        loss_g, _ = fastgan.bce_loss(netD(fake), [1.0])
        opt_g.zero_grad()
        loss_g.sum().backward()
        opt_g.step()
        return torch.cat([loss_real + loss_fake, loss_g]).detach()

    step = fastgan.capture_step(train_step, [netG, netD, opt_g, opt_d])
    loader = fastgan.Loader(fastgan.load_images("digits", SIZE), 64, device=device)
    for _ in (bar := trange(steps)):
        real, _ = loader.next_batch()
        loss_d, loss_g = step(real, torch.randn(len(real), NZ, 1, 1, device=device)).tolist()
        bar.set_postfix_str(f"loss D {loss_d:.3f} G {loss_g:.3f}")
    save_image(netG(torch.randn(64, NZ, 1, 1, device=device)), out, normalize=True)


if __name__ == "__main__":
    tyro.cli(main)
