"""A loop on Hugging Face's Accelerate, with the PyTorch example's networks, run fused.

``pip install accelerate``, then ``accelerate launch -m fastgan.examples.accelerate_loop``
"""

import itertools

import torch
import tyro
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import save_image
from tqdm import tqdm

import fastgan
from fastgan.benchmarks.example_dcgan import Discriminator, Generator, weights_init

NZ, SIZE = 64, 32


def main(steps: int = 1000, out: str = "accelerate_loop.png") -> None:
    """Train on the embedded digits for so many steps, and draw samples to a file."""
    accelerator = Accelerator()
    netG = fastgan.accelerate(Generator(NZ, 32, 1, SIZE).apply(weights_init))
    netD = fastgan.accelerate(Discriminator(32, 1, SIZE).apply(weights_init))
    opt_g, opt_d = (
        torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (netG, netD)
    )
    images = torch.from_numpy(fastgan.load_images("digits", SIZE).images)
    loader = DataLoader(TensorDataset(images), 64, shuffle=True, drop_last=True)
    netG, netD, opt_g, opt_d, loader = accelerator.prepare(netG, netD, opt_g, opt_d, loader)
    criterion = torch.nn.BCELoss()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    bar = tqdm(itertools.islice(batches, steps), total=steps)
    for (batch,) in bar:
        real = fastgan.augment(batch)  # uint8 [N, H, W, C] to [N, C, H, W] in [-1, 1]
        ones, zeros = torch.ones(len(real)).to(real), torch.zeros(len(real)).to(real)
        fake = netG(torch.randn(len(real), NZ, 1, 1, device=accelerator.device))
        opt_d.zero_grad()
        loss_d = criterion(netD(real), ones) + criterion(netD(fake.detach()), zeros)
        accelerator.backward(loss_d)
        opt_d.step()
        opt_g.zero_grad()
        loss_g = criterion(netD(fake), ones)
        accelerator.backward(loss_g)
        opt_g.step()
        bar.set_postfix_str(f"loss D {loss_d.item():.3f} G {loss_g.item():.3f}")
    z = torch.randn(64, NZ, 1, 1, device=accelerator.device)
    save_image(accelerator.unwrap_model(netG)(z), out, normalize=True)


if __name__ == "__main__":
    tyro.cli(main)
