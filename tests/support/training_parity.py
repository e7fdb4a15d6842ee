"""Do two ways to train train alike? ``python tests/support/training_parity.py --data photos/``.

A GAN's training is chaotic: two runs that differ by a rounding error in the first step part after
some dozens of steps, and neither is wrong. So the loss curves of a subject, ``cpp`` in float32 or
the reference in bfloat16, are held against those of the reference in float32 by the yardstick of
such runs whose first weights differ by a relative error, that of the subject's arithmetic:

    distance(a, b) = root mean square over the steps of the difference of the curves' running means
    distance(subject, reference) <= BOUND · the greatest distance(perturbed reference, reference)

for D's and for G's loss, over running means of ``WINDOW`` steps.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch

from fastgan import DCGANDiscriminator, DCGANGenerator, Engine, ImageSet, Loader, load_images

BOUND = 2.0
WINDOW = 10
PERTURBED_RUNS = 3


class Subject(NamedTuple):
    """What is held against the reference: settings of the engine, and the error of a result."""

    settings: dict[str, str]
    perturbation: float


SUBJECTS = {
    "cpp": Subject({"backend": "cpp"}, 1e-6),
    # Half a unit in the last of 8 bits.
    "bf16": Subject({"backend": "reference", "precision": "bf16"}, 2.0**-9),
}


class Distances(NamedTuple):
    """Of D's and G's loss curve, to those of the reference."""

    subject: np.ndarray
    perturbed: np.ndarray  # [PERTURBED_RUNS, 2]

    @property
    def within(self) -> bool:
        return bool((self.subject <= BOUND * self.perturbed.max(axis=0)).all())


def measure(
    subject: str, data: ImageSet, size: int, channels: int, batch: int, steps: int, seed: int = 0
) -> Distances:
    """The distances for a DCGAN of ``channels`` feature maps on ``data``."""
    settings, error = SUBJECTS[subject]

    def curves(perturbation: float = 0.0, seed_of_it: int = 0, **settings: str) -> np.ndarray:
        torch.manual_seed(seed)
        nc = data.images.shape[3]
        netG = DCGANGenerator(ngf=channels, nc=nc, image_size=size)
        netD = DCGANDiscriminator(ndf=channels, nc=nc, image_size=size)
        draw = torch.Generator().manual_seed(seed_of_it)
        with torch.no_grad():
            for p in (*netG.parameters(), *netD.parameters()):
                p.mul_(1.0 + perturbation * torch.randn(p.shape, generator=draw))
        engine = Engine(netG, netD, **{"backend": "reference", **settings}, device="cpu", seed=seed)
        engine.attach(Loader(data, batch_size=batch, seed=seed))
        stats = [engine.step() for _ in range(steps)]
        losses = np.array([[s.loss_d.item(), s.loss_g.item()] for s in stats])
        window = np.ones(WINDOW) / WINDOW
        return np.stack([np.convolve(losses[:, i], window, "valid") for i in range(2)], axis=1)

    truth = curves()

    def distance(other: np.ndarray) -> np.ndarray:
        return np.sqrt(((other - truth) ** 2).mean(axis=0))

    perturbed = [distance(curves(error, i + 1)) for i in range(PERTURBED_RUNS)]
    return Distances(distance(curves(**settings)), np.stack(perturbed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", choices=SUBJECTS, default="cpp")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--channels", type=int, default=64, help="ngf and ndf")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    data = load_images(args.data, image_size=args.image_size)
    sizes = args.image_size, args.channels, args.batch_size, args.steps
    found = measure(args.subject, data, *sizes)
    print(f"distance of the loss curves (D, G) to the reference's, {args.steps} steps:")
    print(f"  {args.subject:27} {found.subject.round(4)}")
    for row in found.perturbed:
        print(f"  reference, weights +- {SUBJECTS[args.subject].perturbation:.0e} {row.round(4)}")
    print(f"within {BOUND} of the greatest: {found.within}")
    raise SystemExit(not found.within)


if __name__ == "__main__":
    main()
