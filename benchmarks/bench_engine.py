"""Images a second of the engine's step against a transcription of the example's loop.

    python benchmarks/bench_engine.py                      # 64x64, nc 3, batch 64
    python benchmarks/bench_engine.py --image-size 28 --nc 1 --batch-size 128

The variants start from the same weights and see the same images and noise. A parity check comes
first, and a variant that fails it gets no figure. Rounds are interleaved, A B C A B C, after a
warm-up; each figure is the median over the rounds with the 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import example_dcgan as example
import numpy as np
import torch
from torch import Tensor, nn

from fastgan import DCGANDiscriminator, DCGANGenerator, Engine

NZ = 100
PARITY_STEPS = 3
# Float32 rounding, amplified by three steps of Adam, whose first steps go by the gradient's sign.
TOLERANCE = 1e-3

Step = Callable[[Tensor, Tensor], object]


class Variant:
    def __init__(self, name: str, build: Callable[[nn.Module, nn.Module], Step]) -> None:
        self.name, self.build = name, build
        self.seconds: list[float] = []


def example_loop(netG: nn.Module, netD: nn.Module) -> Step:
    return example.ExampleTrainer(netG, netD).step


def example_channels_last(netG: nn.Module, netD: nn.Module) -> Step:
    trainer = example.ExampleTrainer(
        netG.to(memory_format=torch.channels_last), netD.to(memory_format=torch.channels_last)
    )
    return lambda real, z: trainer.step(real.to(memory_format=torch.channels_last), z)


def engine(fuse_passes: bool | str) -> Callable[[nn.Module, nn.Module], Step]:
    def build(netG: nn.Module, netD: nn.Module) -> Step:
        mine = (
            DCGANGenerator.from_state_dict(netG.state_dict()),
            DCGANDiscriminator.from_state_dict(netD.state_dict()),
        )
        trainer = Engine(*mine, fuse_passes=fuse_passes, device="cpu")
        return lambda real, z: tuple(trainer.step(real, noise=z).to_dict().values())

    return build


VARIANTS = [
    Variant("example, NCHW", example_loop),
    Variant("example, channels_last", example_channels_last),
    Variant("fastgan, two passes", engine(False)),
    Variant("fastgan", engine("auto")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--nc", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2, help="steps of each variant in a round")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()

    torch.manual_seed(0)
    netG = example.Generator(NZ, 64, args.nc, args.image_size).apply(example.weights_init)
    netD = example.Discriminator(64, args.nc, args.image_size).apply(example.weights_init)
    shape = (args.batch_size, args.nc, args.image_size, args.image_size)
    batches = [
        (torch.rand(shape) * 2 - 1, torch.randn(args.batch_size, NZ, 1, 1))
        for _ in range(PARITY_STEPS)
    ]
    steps = {}
    truth = None
    for variant in VARIANTS:
        steps[variant] = variant.build(copy.deepcopy(netG), copy.deepcopy(netD))
        numbers = np.array([steps[variant](*batch) for batch in batches])
        truth = numbers if truth is None else truth
        error = np.abs(numbers - truth).max() / np.abs(truth).max()
        if not error < TOLERANCE:
            print(f"{variant.name}: differs from the example by {error:.1e}; no figure")
            del steps[variant]
    for _ in range(args.rounds):
        for variant, step in steps.items():
            started = time.perf_counter()
            for i in range(args.steps):
                step(*batches[i % len(batches)])
            variant.seconds.append((time.perf_counter() - started) / args.steps)

    machine = (
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32"
    )
    print(
        f"{machine}; {args.image_size}x{args.image_size}x{args.nc}, batch {args.batch_size}, ",
        end="",
    )
    print(f"{args.rounds} rounds of {args.steps} steps")
    figures = {}
    baseline = VARIANTS[0].seconds
    for variant in steps:
        speeds = [args.batch_size / s for s in variant.seconds]
        low, median, high = np.percentile(speeds, (10, 50, 90))
        ratio = statistics.median(a / b for a, b in zip(baseline, variant.seconds, strict=True))
        figures[variant.name] = {"img/s": median, "p10": low, "p90": high, "ratio": ratio}
        print(
            f"  {variant.name:<24}{median:8.1f} img/s  [{low:.1f}, {high:.1f}]  "
            f"{ratio:.2f}x the example"
        )
    if args.json:
        record = {"machine": machine, **vars(args), "figures": figures}
        Path(args.json).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
