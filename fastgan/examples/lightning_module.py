"""A Lightning module with manual optimisation, on fastgan's networks, loss and data.

``pip install lightning``, then ``python -m fastgan.examples.lightning_module``
"""

import lightning as L
import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import save_image

import fastgan


class DCGAN(L.LightningModule):
    """Both networks; a step updates D, then G."""

    def __init__(self, image_size: int = 32, nc: int = 1, nz: int = 64) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.nz = nz
        self.netG = fastgan.DCGANGenerator(nz, 32, nc, image_size)
        self.netD = fastgan.DCGANDiscriminator(32, nc, image_size)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Of G and of D."""
        networks = self.netG, self.netD
        return [torch.optim.Adam(n.parameters(), lr=2e-4, betas=(0.5, 0.999)) for n in networks]

    def training_step(self, batch: list[Tensor], index: int) -> None:
        """One update of each network on uint8 images ``[N, H, W, C]``."""
        opt_g, opt_d = self.optimizers()
        real = fastgan.augment(batch[0])  # [N, C, H, W] in [-1, 1]
        fake = self.netG(torch.randn(len(real), self.nz, device=self.device))
        # One pass, in which each half has batch statistics of its own.
        scores = self.netD.forward_grouped(torch.cat([real, fake.detach()]), groups=2)
        loss_d, _ = fastgan.bce_loss(scores, [1.0, 0.0])
        opt_d.zero_grad()
        self.manual_backward(loss_d.sum())
        opt_d.step()
        loss_g, _ = fastgan.bce_loss(self.netD(fake), [1.0])
        opt_g.zero_grad()
        self.manual_backward(loss_g.sum())
        opt_g.step()
        self.log_dict({"loss_d": loss_d.sum(), "loss_g": loss_g.sum()}, prog_bar=True)


def main(steps: int = 1000, out: str = "lightning_module.png") -> None:
    """Train on the embedded digits for so many steps, and draw samples to a file."""
    images = torch.from_numpy(fastgan.load_images("digits", 32).images)
    trainer = L.Trainer(max_steps=2 * steps, logger=False, enable_checkpointing=False)
    model = DCGAN()
    trainer.fit(model, DataLoader(TensorDataset(images), 64, shuffle=True))
    save_image(model.netG(torch.randn(64, model.nz)), out, normalize=True)


if __name__ == "__main__":
    tyro.cli(main)
