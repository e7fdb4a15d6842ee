"""``fastgan augment``."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tqdm import tqdm

from fastgan.cli import DONE
from fastgan.cli.parse import OptionalPath, check_folder_of, parse
from fastgan.errors import InputError
from fastgan.train.config import OptionalInt

if TYPE_CHECKING:
    from fastgan.data.images import ImageSet
    from fastgan.metrics.classifier import Sampler

_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class AugmentArgs:
    """Put the samples of a conditional run to use: a labelled set, or a report on what it is worth.

    With --out, as many images of each class are written to a folder for it. With --report, a small
    classifier is trained on (a) real images, (b) these and generated ones, (c) these with classical
    augmentation, as many steps each time, and tested on other real images.

    Attributes:
        run: A run folder (its newest checkpoint) or a checkpoint folder.
        out: The folder to write; new, or empty.
        per_class: Images to write, or to add in the report, of each class.
        best: The best checkpoint, of a run that measured its quality, in place of the newest.
        report: Print the report.
        real_per_class: Real images of each class in the report, drawn anew for each seed. By
            default all that the run was trained on.
        test: Labelled real images to test on. By default those that the run's data have left.
        seeds: How many times the report trains each classifier.
        steps: In training each, of at most 128 images.
        json: Where to write the report (JSON).
        seed: Of the noise, and the first of the seeds.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    out: OptionalPath = None
    per_class: int = 200
    best: bool = False
    report: bool = False
    real_per_class: OptionalInt = None
    test: Annotated[str | None, tyro.conf.arg(metavar="STR")] = None
    seeds: int = 5
    steps: int = 600
    json: OptionalPath = None
    seed: int = 0

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            InputError: names the flag, its value and what it takes.
        """
        for name in ("per_class", "real_per_class", "seeds", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if not 0 <= self.seed < 2**62:
            raise InputError(f"--seed {self.seed} must be from 0 to 2^62 - 1")
        if (self.out is None) != self.report:
            raise InputError("give either --out, a folder to write images to, or --report")
        for name, value in (("--real-per-class", self.real_per_class), ("--test", self.test)):
            if value is not None and not self.report:
                raise InputError(f"{name} {value} is of --report; leave it out, or give that")
        if self.json is not None:
            check_folder_of("--json", self.json)
        if self.out is not None and self.out.exists():
            if not self.out.is_dir():
                raise InputError(f"--out {str(self.out)!r} is a file; give a folder")
            if any(self.out.iterdir()):
                raise InputError(f"--out {str(self.out)!r} holds files already; give a new folder")
        if not self.run.exists():
            raise InputError(f"RUN {str(self.run)!r} does not exist; give a run folder")


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = parse(AugmentArgs, "fastgan augment", argv)
    args.check()

    import torch

    from fastgan.train.checkpoint import find_checkpoint, load_generator
    from fastgan.train.evaluation import network_sampler

    path = find_checkpoint(args.run / "best" if args.best else args.run)
    netG = load_generator(path)
    n_classes: int = getattr(netG, "n_classes", 0)
    if not n_classes:
        raise InputError(
            f"RUN {str(args.run)!r} was trained without classes; train one with --condition"
        )
    sampler = network_sampler(netG, args.seed, torch.device("cpu"))
    if args.out is not None:
        folders = _folders(getattr(netG, "class_names", ()), n_classes)
        _write(args.out, sampler, folders, args.per_class)
        print(f"Wrote {args.per_class} images of each of {n_classes} classes to {args.out}")
        return DONE
    _report(args, path, sampler, n_classes)
    return DONE


def _folders(names: Sequence[str], n_classes: int) -> list[str]:
    """A folder for each class: its name, as far as every system takes it for one, or its number."""
    cleaned = [re.sub(r"[^\w .()+-]", "_", name).strip(" .") for name in names]
    if len({name.casefold() for name in cleaned if name}) == n_classes:
        return cleaned
    # Of one width, so that their order is that of the numbers.
    return [f"{label:0{len(str(n_classes - 1))}d}" for label in range(n_classes)]


def _write(out: Path, sampler: Sampler, folders: list[str], per_class: int) -> None:
    import torch

    from fastgan.train.samples import write_each

    with tqdm(total=per_class * len(folders), unit="image", disable=None, leave=False) as bar:
        for label, folder in enumerate(folders):
            written = 0
            for n in _chunks(per_class):
                images = sampler(torch.full((n,), label))
                written = write_each(out / folder, images, written)
                bar.update(n)


def _chunks(n: int) -> list[int]:
    return [min(_CHUNK, n - start) for start in range(0, n, _CHUNK)]


def _report(args: AugmentArgs, path: Path, sampler: Sampler, n_classes: int) -> None:
    import torch

    from fastgan.data.images import load_images
    from fastgan.files import replace_file
    from fastgan.metrics.classifier import accuracy, generated_set, join, train_classifier
    from fastgan.train.checkpoint import read_manifest, read_settings

    manifest = read_manifest(path)
    settings = read_settings(path, manifest)
    assert settings.image_size is not None
    data = load_images(settings.data, settings.image_size, settings.nc, max_bad=settings.max_bad)
    if data.n_classes != n_classes:
        raise InputError(
            f"RUN {str(args.run)!r} was trained on {n_classes} classes, {data.description} has "
            f"{data.n_classes} now; put back what it was trained on"
        )
    other = None
    if args.test is not None:
        other = load_images(args.test, settings.image_size, settings.nc, max_bad=settings.max_bad)
        other = _with_classes_of(data, other, args.test)
    seeds = list(range(args.seed, args.seed + args.seeds))
    rows: dict[str, list[float]] = {"real": [], "real + generated": [], "real + classical": []}
    tested = 0
    with tqdm(total=3 * args.seeds, unit="classifier", disable=None, leave=False) as bar:
        for seed in seeds:
            real, rest = _draw(args, data, seed)
            test = other or rest
            if test is None:
                raise InputError(
                    "--test: the run's data have no image left to test on; name others, or give a "
                    "smaller --real-per-class"
                )
            labels = torch.arange(data.n_classes).repeat_interleave(args.per_class)
            both = join(real, generated_set(sampler, labels, real))
            for name, train, classical in (
                ("real", real, False),
                ("real + generated", both, False),
                ("real + classical", real, True),
            ):
                found = train_classifier(
                    train,
                    n_classes=data.n_classes,
                    steps=args.steps,
                    seed=seed,
                    augmentation=classical,
                )
                rows[name].append(accuracy(found, test))
                bar.update()
            tested, n_real = len(test), len(real)
    print(
        f"{path}: a classifier of {data.n_classes} classes, {args.steps} steps, tested on "
        f"{tested:,} real images; {n_real:,} real images to train on, "
        f"{args.per_class * data.n_classes:,} "
        f"generated; mean and standard deviation over {args.seeds} seeds"
    )
    for name, values in rows.items():
        spread = f" ± {statistics.stdev(values):.2%}" if len(values) > 1 else ""
        each = ", ".join(f"{value:.2%}" for value in values)
        print(f"  {name:<17} {statistics.mean(values):.2%}{spread}   ({each})")
    trained_on = manifest.get("images") or len(data)
    caveat = ""
    if trained_on > n_real:
        tested_on = ", those of the test among them" if other is None else ""
        caveat = (
            f"The GAN was trained on {trained_on:,} images{tested_on}, more than the {n_real:,} "
            "that the classifier has: what it adds is not to be had from these alone."
        )
        print(caveat)
    if args.json is not None:
        found_all: dict[str, Any] = {
            "checkpoint": str(path),
            "accuracy": rows,
            "seeds": seeds,
            "steps": args.steps,
            "n_real": n_real,
            "n_generated": args.per_class * data.n_classes,
            "n_test": tested,
            "gan_trained_on": trained_on,
            "caveat": caveat,
        }
        replace_file(args.json, json.dumps(found_all, indent=1).encode())
        print(f"Wrote {args.json}")


def _with_classes_of(data: ImageSet, test: ImageSet, source: str) -> ImageSet:
    """``test`` with the numbers that its classes, by their names, have in ``data``."""
    import numpy as np

    if test.labels is None:
        raise InputError(f"--test {source!r} has no labels; give a labelled set")
    strange = sorted(set(test.class_names) - set(data.class_names))
    if strange:
        raise InputError(
            f"--test {source!r} has the class {strange[0]!r}, which is none of "
            f"{', '.join(data.class_names)}; give images of these"
        )
    numbers = np.array([data.class_names.index(name) for name in test.class_names])
    return dataclasses.replace(test, labels=numbers[test.labels], class_names=data.class_names)


def _draw(args: AugmentArgs, data: ImageSet, seed: int) -> tuple[ImageSet, ImageSet | None]:
    """The real images to train on, as many of each class, and those that are left."""
    import numpy as np
    import torch

    from fastgan.metrics.classifier import subset
    from fastgan.seeding import generator

    assert data.labels is not None
    order = torch.randperm(len(data), generator=generator(seed, "real images")).numpy()
    if args.real_per_class is None:
        return data, None
    picked = []
    for label in range(data.n_classes):
        of_class = order[data.labels[order] == label]
        if len(of_class) < args.real_per_class:
            raise InputError(
                f"--real-per-class {args.real_per_class}: {data.description} has "
                f"{len(of_class)} images of class {label}"
            )
        picked.append(of_class[: args.real_per_class])
    chosen = np.concatenate(picked)
    rest = np.setdiff1d(order, chosen)
    return subset(data, chosen), subset(data, rest) if len(rest) else None
