"""Stacked MNIST: how many of 1,000 modes a DCGAN reaches, and how evenly.

``python -m fastgan.benchmarks.quality_stacked_mnist --data mnist/train``; by default on the
embedded digits, 10,000 of MNIST's; with ``--minutes 0.1 --samples 2000`` to see that it works. An
image is three digits, one in each colour; the mode of a sample is what a classifier, trained here
on the same digits, reads in its three channels. Of 26,000 samples: modes with at least one, and the
Kullback-Leibler divergence, in nats, of the modes' shares from those of the real images (Metz et
al. 2016, https://arxiv.org/abs/1611.02163, section 3.3.1).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from fastgan.benchmarks import machine, report
from torch import Tensor
from tqdm import tqdm

from fastgan import DCGANDiscriminator, DCGANGenerator, Engine, ImageSet, Loader, load_images
from fastgan.errors import InputError
from fastgan.metrics.classifier import (
    ModeHistogram,
    StackedClassifier,
    load_classifier,
    mode_histogram,
)
from fastgan.train.samples import image_grid, write_png

SAMPLES = 26_000
_SIZE, _STACKED = 32, 60_000
# Srivastava et al. 2017, https://arxiv.org/abs/1705.07761, table 2: modes and divergence.
PUBLISHED = {
    "DCGAN": ("99", "3.40"),
    "ALI": ("16", "5.40"),
    "Unrolled GAN": ("48.7", "4.32"),
    "VEEGAN": ("150", "2.95"),
}


def stack(digits: ImageSet, n: int, seed: int) -> ImageSet:
    """``n`` images of three of ``digits``, each of a class of its own from 0 to 999."""
    assert digits.labels is not None
    picked = np.random.default_rng(seed).integers(0, len(digits), (n, 3))
    images = np.stack([digits.images[picked[:, i], :, :, 0] for i in range(3)], axis=3)
    labels = digits.labels[picked] @ np.array([100, 10, 1])
    names = tuple(f"{label:03d}" for label in range(1000))
    return ImageSet(images, labels, names, f"{digits.description}, stacked", digits.digest)


def samples(engine: Engine, n: int) -> Iterator[Tensor]:
    """``n`` samples in batches."""
    for start in range(0, n, 1000):
        yield engine.sample(min(1000, n - start))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--data", default="digits", help="labelled digits")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--ngf", type=int, default=64)
    parser.add_argument("--ndf", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("stacked.png"), help="a grid of samples")
    args = parser.parse_args(argv)
    digits = load_images(args.data, _SIZE, 1)
    if digits.labels is None or digits.labels.max() != 9:
        raise InputError(f"--data {args.data!r} must be digits with their labels, 0 to 9")
    classifier = load_classifier(digits)
    data = stack(digits, _STACKED, args.seed)
    torch.manual_seed(args.seed)
    netG, netD = DCGANGenerator(100, args.ngf, 3, _SIZE), DCGANDiscriminator(args.ndf, 3, _SIZE)
    engine = Engine(netG, netD, ema=0.999, seed=args.seed)
    engine.attach(Loader(data, args.batch_size, seed=args.seed, device=engine.device))
    record = {
        "machine": machine.describe(engine.device),
        "measured": machine.measure(engine.device),
    }
    print("\n".join(report.machine_lines(record)), flush=True)
    started = time.perf_counter()
    with tqdm(total=round(args.minutes * 60), unit="s", disable=None) as bar:
        while (seconds := time.perf_counter() - started) < args.minutes * 60:
            engine.step()
            bar.update(round(seconds) - bar.n)
    stacked = StackedClassifier(classifier)
    assert data.labels is not None
    found = mode_histogram(samples(engine, args.samples), stacked, data.labels)
    write_png(args.out, image_grid(engine.sample(100), 10))
    print(
        f"{engine.steps:,} steps of {args.batch_size} in {args.minutes:g} minutes; "
        f"{args.samples:,} samples; the classifier reads {classifier.held_out_accuracy:.2%} of "
        f"digits held out; "
        f"{args.out}\n"
    )
    print("\n".join(_table(found)))


def _table(found: ModeHistogram) -> list[str]:
    rows = [["fastgan, DCGAN", str(found.covered), f"{found.kl:.3f}"]]
    rows += [[f"{name}, published", *figures] for name, figures in PUBLISHED.items()]
    return report.markdown_table(["", "modes of 1,000", "KL"], rows)


if __name__ == "__main__":
    main()
