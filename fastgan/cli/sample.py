"""``fastgan sample``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from fastgan.cli import DONE
from fastgan.cli.parse import OptionalPath, parse
from fastgan.errors import InputError

_ARC_STEPS = 8
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class SampleArgs:
    """Make images with a trained generator, the averaged one where the run keeps one.

    Attributes:
        run: A run folder (its newest checkpoint), a checkpoint folder, or a DCGAN generator's
            weights, such as the netG_epoch_24.pth of pytorch/examples.
        n: How many images.
        o: Where to write the grid (PNG); by default grid.png, unless --each is given.
        each: A folder to write each image to, by itself.
        interpolate: Rows of eight steps on the way from one sample to another.
        seed: Of the noise.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 64
    o: Annotated[Path | None, tyro.conf.arg(name="output", aliases=["-o"], metavar="PATH")] = None
    each: OptionalPath = None
    interpolate: bool = False
    seed: int = 0


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = parse(SampleArgs, "fastgan sample", argv)
    if args.n < 1:
        raise InputError(f"-n {args.n} must be at least 1")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed} must be from 0 to 2^63 - 1")
    output = args.o or (None if args.each else Path("grid.png"))
    if output is not None:
        _check_output(output)
    if args.each is not None:
        _check_each(args.each)
    if not args.run.exists():
        raise InputError(f"RUN {str(args.run)!r} does not exist; give a run folder or a netG file")

    import torch

    from fastgan.engine.engine import noise_shape, sample
    from fastgan.seeding import generator
    from fastgan.train.checkpoint import load_generator
    from fastgan.train.samples import image_grid, slerp, write_each, write_png

    netG = load_generator(args.run)
    shape = noise_shape(netG)
    draw = generator(args.seed, "sample")
    if args.interpolate:
        rows = -(-args.n // _ARC_STEPS)
        ends = torch.randn(2 * rows, *shape, generator=draw)
        noise = torch.cat([slerp(a, b, _ARC_STEPS) for a, b in ends.split(2)])[: args.n]
    else:
        noise = torch.randn(args.n, *shape, generator=draw)
    kept = []
    written = 0
    with tqdm(total=args.n, unit="image", disable=None, leave=False) as bar:
        for chunk in noise.split(_CHUNK):
            images = sample(netG, chunk)
            if args.each is not None:
                written = write_each(args.each, images, written)
            if output is not None:
                kept.append(images)
            bar.update(len(chunk))
    if args.each is not None:
        print(f"Wrote {written} images to {args.each}")
    if output is not None:
        write_png(output, image_grid(torch.cat(kept), _ARC_STEPS if args.interpolate else None))
        print(f"Wrote {output}")
    return DONE


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise InputError(f"-o {str(output)!r} is a folder; give a file such as grid.png")
    if output.suffix.lower() != ".png":
        raise InputError(f"-o {str(output)!r} must end in .png")
    if not output.absolute().parent.is_dir():
        raise InputError(f"-o {str(output)!r}: the folder {str(output.parent)!r} does not exist")


def _check_each(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--each {str(folder)!r} is a file; give a folder")
    if folder.is_dir() and next(folder.glob("*.png"), None) is not None:
        raise InputError(f"--each {str(folder)!r} holds images already; give an empty folder")
