"""``fastgan train``."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from fastgan.cli import DONE, INTERRUPTED
from fastgan.cli.parse import OptionalPath, parse
from fastgan.data.images import ImageSet, load_images
from fastgan.data.sources import Source, open_source
from fastgan.errors import InputError
from fastgan.nn.sizes import IMAGE_SIZES
from fastgan.train.config import TrainConfig, default_out
from fastgan.train.run import RunFolder, read_lines

_DEFAULT_IMAGE_SIZE = 64
_DRY_STEPS = 4


@dataclasses.dataclass(frozen=True)
class TrainArgs(TrainConfig):
    """Train a GAN, into a run folder with checkpoints, samples, metrics and a report.

    Ctrl-C finishes the step, writes a checkpoint and says how to go on; --resume continues bit for
    bit, on the same machine with the same number of threads.

    Attributes:
        out: The run folder. By default runs/<name of the data>.
        resume: Go on with the run in --out, with its settings; --steps may be raised.
        force: Replace the run in --out.
        dry_run: Do all of it for a few steps, in a temporary folder, and say how long the run would
            take.
        config: Settings from a YAML file, such as another run's config.yaml; flags come before it.
    """

    out: OptionalPath = None
    resume: bool = False
    force: bool = False
    dry_run: bool = False
    config: OptionalPath = None


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    defaults = _defaults(argv)
    args = parse(TrainArgs, "fastgan train", argv, defaults)
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig)})
    if args.resume and (args.force or args.dry_run):
        raise InputError(f"--resume and --{'force' if args.force else 'dry-run'}: give one of them")
    if defaults is not None:
        config = _one_length(config, defaults)
    config.check()
    out = args.out or default_out(config)
    folder = RunFolder(out)
    if args.resume:
        folder.check_resume()
        config.check_resume(TrainConfig.from_yaml(folder.config))
    elif not args.dry_run:
        folder.check_new(args.force)
    source = open_source(config.data)
    data = load_images(
        source,
        config.image_size or _natural_size(source),
        config.nc,
        max_bad=config.max_bad,
        workers=config.workers,
    )
    if config.batch_size > len(data):
        raise InputError(
            f"--batch-size {config.batch_size} is larger than the {len(data)} images of "
            f"{data.description}; at most {len(data)}"
        )
    if Path(config.data).exists():
        # The run may be resumed from another folder.
        config = dataclasses.replace(config, data=str(Path(config.data).absolute()))
    if data.bad:
        name, reason = data.bad[0]
        print(f"Skipped {len(data.bad)} bad images; the first, {name}: {reason}")
    if args.dry_run:
        return _dry_run(config, data)
    return _train(config, data, out, args)


def _train(config: TrainConfig, data: ImageSet, out: Path, args: TrainArgs) -> int:
    from fastgan.train.loop import train

    _describe(config, data)
    result = train(config, data, out, resume=args.resume, force=args.force)
    if result.stopped:
        print(f"Stopped at step {result.step} of {result.steps}, by --stop; see its health.jsonl.")
    if result.interrupted:
        print(
            f"Stopped after step {result.step} of {result.steps}; to go on: fastgan train --out "
            f"{out} --resume"
        )
        return INTERRUPTED
    print(
        f"Done: step {result.step}, {result.images_per_second:.0f} img/s. Samples: "
        f"{RunFolder(out).sample_path(result.step)}; report: {RunFolder(out).report}; more: "
        f"fastgan sample {out} -n 64 -o grid.png"
    )
    return DONE


def _dry_run(config: TrainConfig, data: ImageSet) -> int:
    from fastgan.train.loop import train

    _describe(config, data)
    few = dataclasses.replace(config, steps=_DRY_STEPS, epochs=None, log_every=1)
    with tempfile.TemporaryDirectory(prefix="fastgan-") as folder:
        result = train(few, data, Path(folder) / "run", progress=False)
        rows = read_lines(RunFolder(Path(folder) / "run").metrics)
    if result.interrupted:
        print("Dry run stopped; nothing was kept.")
        return INTERRUPTED
    total = config.total_steps(len(data))
    # The first step does what is done once.
    minutes = (rows[-1]["seconds"] - rows[0]["seconds"]) / (_DRY_STEPS - 1) * total / 60
    print(
        f"Dry run: {_DRY_STEPS} steps, samples and a checkpoint were made and removed. {total} "
        f"steps would take about {minutes:.1f} minutes."
    )
    return DONE


def _describe(config: TrainConfig, data: ImageSet) -> None:
    steps = config.total_steps(len(data))
    epochs = steps / config.steps_per_epoch(len(data))
    print(
        f"Training {config.model} at {data.image_size}x{data.image_size}x{data.nc} on "
        f"{len(data)} images from {data.description}: {steps} steps of {config.batch_size}, "
        f"{epochs:.1f} epochs.",
        flush=True,
    )


def _natural_size(source: Source) -> int:
    """The power of two that holds the source's images, where it is known and they are square."""
    shape = source.array.shape if source.array is not None else (0, 0, 0)
    if shape[1] != shape[2]:
        return _DEFAULT_IMAGE_SIZE
    holding = (size for size in IMAGE_SIZES if size.bit_count() == 1 and size >= shape[1] > 0)
    return next(holding, _DEFAULT_IMAGE_SIZE)


def _defaults(argv: list[str]) -> TrainArgs | None:
    """What flags that are not given stand for: the settings of ``--config`` or of the run."""
    scout = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scout.add_argument("--config", type=Path)
    scout.add_argument("--out", type=Path)
    scout.add_argument("--data", default=TrainConfig.data)
    scout.add_argument("--resume", action="store_true")
    try:
        seen, _ = scout.parse_known_args(argv)
    except argparse.ArgumentError:
        return None  # a flag without its value, which the parser proper will name
    if seen.config is not None:
        if seen.resume:
            raise InputError("--config and --resume: a resumed run has its settings already")
        return TrainArgs(**vars(TrainConfig.from_yaml(seen.config)))
    if seen.resume:
        folder = RunFolder(seen.out or default_out(TrainConfig(data=seen.data)))
        folder.check_resume()
        return TrainArgs(**vars(TrainConfig.from_yaml(folder.config)), out=folder.path)
    return None


def _one_length(config: TrainConfig, before: TrainConfig) -> TrainConfig:
    """The length that was given instead of the one from before, where both are there."""
    if config.steps is not None and config.epochs is not None:
        if config.epochs == before.epochs:
            return dataclasses.replace(config, epochs=None)
        if config.steps == before.steps:
            return dataclasses.replace(config, steps=None)
    return config
