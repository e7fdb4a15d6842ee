"""``fastgan sample``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tqdm import tqdm

from fastgan.cli import DONE
from fastgan.cli.parse import OptionalPath, check_folder_of, parse
from fastgan.errors import InputError

if TYPE_CHECKING:
    import torch

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
        class_: The class to make, by its number or name, of a conditional generator. By default all
            of them, a row of the grid for each.
        best: The best checkpoint, of a run that measured its quality, in place of the newest.
        seed: Of the noise.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 64
    o: Annotated[Path | None, tyro.conf.arg(name="output", aliases=["-o"], metavar="PATH")] = None
    each: OptionalPath = None
    interpolate: bool = False
    class_: Annotated[str | None, tyro.conf.arg(name="class", metavar="CLASS")] = None
    best: bool = False
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

    netG = load_generator(args.run / "best" if args.best else args.run)
    labels = _labels(args, netG)
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
        for start in range(0, args.n, _CHUNK):
            chunk = noise[start : start + _CHUNK]
            classes = labels[start : start + _CHUNK] if labels is not None else None
            images = sample(netG, chunk, classes)
            if args.each is not None:
                written = write_each(args.each, images, written)
            if output is not None:
                kept.append(images)
            bar.update(len(chunk))
    if args.each is not None:
        print(f"Wrote {written} images to {args.each}")
    if output is not None:
        columns = _ARC_STEPS if args.interpolate else None
        if labels is not None and args.class_ is None and not args.interpolate:
            columns = -(-args.n // int(labels.max() + 1))
        write_png(output, image_grid(torch.cat(kept), columns))
        print(f"Wrote {output}")
    return DONE


def _labels(args: SampleArgs, netG: torch.nn.Module) -> torch.Tensor | None:
    """The class of each sample ``[n]``; None of a generator that has none."""
    import torch

    n_classes: int = getattr(netG, "n_classes", 0)
    names: tuple[str, ...] = getattr(netG, "class_names", ())
    if not n_classes:
        if args.class_ is not None:
            raise InputError(
                f"--class {args.class_}: {str(args.run)!r} was trained without classes"
            )
        return None
    if args.class_ is None and args.interpolate:
        return torch.arange(args.n) // _ARC_STEPS % n_classes
    if args.class_ is None:
        per_class = -(-args.n // n_classes)
        return torch.arange(n_classes).repeat_interleave(per_class)[: args.n]
    if args.class_ in names:
        return torch.full((args.n,), names.index(args.class_))
    if args.class_.isdecimal() and int(args.class_) < n_classes:
        return torch.full((args.n,), int(args.class_))
    known = f": {', '.join(names)}" if names else ""
    raise InputError(
        f"--class {args.class_!r} is none of the {n_classes} classes{known}; give a name, or a "
        f"number from 0 to {n_classes - 1}"
    )


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise InputError(f"-o {str(output)!r} is a folder; give a file such as grid.png")
    if output.suffix.lower() != ".png":
        raise InputError(f"-o {str(output)!r} must end in .png")
    check_folder_of("-o", output)


def _check_each(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--each {str(folder)!r} is a file; give a folder")
    if folder.is_dir() and next(folder.glob("*.png"), None) is not None:
        raise InputError(f"--each {str(folder)!r} holds images already; give an empty folder")
