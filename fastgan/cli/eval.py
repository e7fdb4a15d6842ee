"""``fastgan eval``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from fastgan.cli import DONE
from fastgan.cli.parse import OptionalPath, check_folder_of, parse
from fastgan.errors import InputError


@dataclasses.dataclass(frozen=True)
class EvalArgs:
    """Measure how good a run's samples are, against the images that it was trained on.

    Attributes:
        run: A run folder (its newest checkpoint) or a checkpoint folder.
        data: Images to hold the samples against. By default those that the run was trained on.
        n: How many samples. Figures of different numbers cannot be compared.
        features: What they are measured on: 'efficientnet-lite0', which needs no download;
            'inception', the standard network; or 'classifier', trained here on the data's labels.
        best: The best checkpoint, of a run that measured its quality, in place of the newest.
        neighbours: Where to write a picture of the samples that are nearest to real images (PNG).
        json: Where to write the figures (JSON).
        seed: Of the noise.
        device: 'cpu', 'cuda', 'cuda:1', ...; auto takes a GPU where there is one.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    data: Annotated[str | None, tyro.conf.arg(metavar="STR")] = None
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 10_000
    features: str = "efficientnet-lite0"
    best: bool = False
    neighbours: OptionalPath = None
    json: OptionalPath = None
    seed: int = 0
    device: str = "auto"


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = parse(EvalArgs, "fastgan eval", argv)
    if args.n < 10:
        raise InputError(f"-n {args.n} must be at least 10")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed} must be from 0 to 2^63 - 1")
    for name, path in (("neighbours", args.neighbours), ("json", args.json)):
        if path is not None:
            check_folder_of(f"--{name}", path)
    if not args.run.exists():
        raise InputError(f"RUN {str(args.run)!r} does not exist; give a run folder")

    from fastgan.data.images import load_images
    from fastgan.engine.engine import resolve_device
    from fastgan.files import replace_file
    from fastgan.train.checkpoint import (
        find_checkpoint,
        load_generator,
        read_manifest,
        read_settings,
    )
    from fastgan.train.evaluation import Evaluation, network_sampler
    from fastgan.train.samples import image_grid, write_png

    path = find_checkpoint(args.run / "best" if args.best else args.run)
    settings = read_settings(path, read_manifest(path))
    device = resolve_device(args.device)
    assert settings.image_size is not None
    data = load_images(
        args.data or settings.data, settings.image_size, settings.nc, max_bad=settings.max_bad
    )
    evaluation = Evaluation(data, args.features, args.n, device, args.seed)
    sampler = network_sampler(load_generator(path).to(device), args.seed, device)
    measured = evaluation.measure(sampler, conditional=settings.condition != "none")
    print(f"{path}\n{measured.describe()}")
    if args.neighbours is not None:
        write_png(args.neighbours, image_grid(*evaluation.neighbours(measured)))
        print(f"Wrote {args.neighbours}")
    if args.json is not None:
        row = {"checkpoint": str(path), **measured.to_dict()}
        replace_file(args.json, json.dumps(row, indent=1).encode())
        print(f"Wrote {args.json}")
    return DONE
