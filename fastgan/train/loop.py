"""A training run from its configuration to its last checkpoint."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fastgan.data.images import ImageSet
from fastgan.data.loader import Loader
from fastgan.engine.engine import Engine, resolve_device
from fastgan.engine.history import STEPS as HISTORY
from fastgan.errors import InputError, RunError
from fastgan.files import replace_file
from fastgan.ops.backend import resolve_backend
from fastgan.seeding import generator
from fastgan.train.checkpoint import (
    build_networks,
    clean_checkpoints,
    load_checkpoint,
    newest_whole,
    prune_checkpoints,
    read_manifest,
    read_settings,
    save_checkpoint,
    set_aside,
)
from fastgan.train.config import TrainConfig
from fastgan.train.report import render_report
from fastgan.train.run import RunFolder
from fastgan.train.samples import image_grid, write_gif, write_png

GRID = 64
_ADVICE = (
    "start anew with a lower --lr or another --seed, or look at the data; --resume would repeat "
    "the same steps to the same end"
)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        step: the last step taken.
        steps: the step at which the run is complete.
        interrupted: whether a signal stopped it before that.
        seconds: time spent in this process on steps alone.
        images_per_second: over these.
    """

    step: int
    steps: int
    interrupted: bool
    seconds: float
    images_per_second: float


def train(
    config: TrainConfig,
    data: ImageSet,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> RunResult:
    """Run ``config`` on ``data`` in the folder ``out``, or go on with the run there.

    SIGINT and SIGTERM (in the main thread) end it after the step in progress, with a checkpoint; a
    second one ends it at once.

    Args:
        config: the settings; ``image_size`` and ``nc`` that are None are those of ``data``.
        data: the images.
        out: the run folder.
        resume: continue the run in ``out`` from its newest whole checkpoint, bit for bit.
        force: replace the run in ``out``.
        progress: show a progress bar where the terminal is one.
        say: takes each line for the user.

    Raises:
        InputError: the settings, the data or the folder cannot be used.
        RunError: a loss or weight is not finite, or the disk cannot be written. The last good
            checkpoint is as it was.
    """
    config = dataclasses.replace(config, image_size=data.image_size, nc=data.nc)
    config.check()
    folder = RunFolder(Path(out))
    if resume:
        folder.check_resume()
        config.check_resume(TrainConfig.from_yaml(folder.config))
    else:
        folder.check_new(force)
    device = resolve_device(config.device)
    try:
        # The networks may draw from the global generators; the caller gets theirs back.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            run = _Run(config, data, folder, device, say)
            folder.path.mkdir(parents=True, exist_ok=True)
            with folder.lock():
                if resume:
                    run.restore()
                    replace_file(folder.config, config.to_yaml().encode())
                else:
                    folder.check_new(force)
                    folder.create(config, data.bad)
                return run.go(progress)
    except OSError as error:
        raise RunError(
            f"cannot write to {str(out)!r}: {error.strerror or error}; {_last_good(folder)}; "
            "once that is mended, --resume goes on from there"
        ) from error


class _Run:
    def __init__(
        self,
        config: TrainConfig,
        data: ImageSet,
        folder: RunFolder,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.data, self.folder, self.say = config, data, folder, say
        self.steps = config.total_steps(len(data))
        resolve_backend(config.backend)
        netG, netD = build_networks(config)
        self.engine = Engine(
            netG,
            netD,
            lr=config.lr,
            betas=(config.beta1, 0.999),
            ema=config.ema,
            backend=config.backend,
            precision=config.precision,
            capture="auto" if config.capture else False,
            device=device,
            seed=config.seed,
        )
        loader = Loader(data, config.batch_size, seed=config.seed, flip=config.flip, device=device)
        self.loader = loader
        self.engine.attach(loader)
        self.fixed_noise = self.engine.draw_noise(GRID, generator(config.seed, "grid", 0, device))
        self.speed = _Speed()
        self.seconds_before = 0.0
        self.read_until = 0

    def restore(self) -> None:
        """Go to the newest whole checkpoint; without any, start anew."""
        folder = self.folder.checkpoints
        clean_checkpoints(folder)
        path, damaged = newest_whole(folder)
        if path is None and damaged:
            raise InputError(
                f"no checkpoint in {str(folder)!r} can be used: {next(iter(damaged.values()))}"
            )
        if path is None:
            self.say(f"No checkpoint in {self.folder.path} yet: starting from step 0.")
        else:
            manifest = read_manifest(path)
            self.config.check_resume(read_settings(path, manifest))
            self._restore_threads(int(manifest["threads"]))
            load_checkpoint(path, self.engine)
        for broken, reason in damaged.items():
            set_aside(broken)
            self.say(f"Warning: {reason}; going back to an earlier one.")
        if path is not None:
            self.say(f"Resuming {self.folder.path} at step {self.engine.steps} of {self.steps}.")
        self.folder.rewind(self.engine.steps)
        rows = self.folder.read_metrics()
        self.seconds_before = float(rows[-1]["seconds"]) if rows else 0.0

    def _restore_threads(self, threads: int) -> None:
        # Sums are taken in an order that depends on the number of threads.
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
            self.say(f"Using {threads} threads, as the run did so far, to go on bit for bit.")

    def go(self, progress: bool) -> RunResult:
        """Take the steps that are left."""
        config, engine = self.config, self.engine
        if engine.steps >= self.steps:
            self.say(f"The run is complete at step {engine.steps}; a larger --steps goes on.")
            return self._result(interrupted=False)
        self.folder.samples.mkdir(exist_ok=True)
        self.folder.checkpoints.mkdir(exist_ok=True)
        self.read_until = engine.steps
        signals = _StopSignals()
        saved = True
        with (
            signals,
            self.folder.metrics.open("a", encoding="utf-8") as metrics,
            SummaryWriter(str(self.folder.events), purge_step=engine.steps + 1) as events,
            tqdm(
                initial=engine.steps,
                total=self.steps,
                unit="step",
                dynamic_ncols=True,
                disable=None if progress else True,
            ) as bar,
        ):
            while engine.steps < self.steps and signals.received is None:
                started = time.perf_counter()
                engine.step()
                step = engine.steps
                last = step == self.steps
                log = last or step % config.log_every == 0
                saved = last or step % config.save_every == 0
                draw = last or step % config.sample_every == 0
                full = step - self.read_until == HISTORY
                values = self._read() if log or saved or draw or full else None
                self.speed.add(self._batch_images(), time.perf_counter() - started)
                bar.update()
                if log and values is not None:
                    row = self._row(values)
                    metrics.write(f"{json.dumps(row)}\n")
                    metrics.flush()
                    for name, value in values.items():
                        events.add_scalar(name, value, step)
                    bar.set_postfix_str(
                        f"{row['images_per_second']:.0f} img/s, loss D {values['loss_d']:.3f} "
                        f"G {values['loss_g']:.3f}, D(x) {values['d_real']:.2f}, "
                        f"D(G(z)) {values['d_fake']:.2f}"
                    )
                if draw:
                    grid = image_grid(engine.sample(GRID, self.fixed_noise), 8)
                    write_png(self.folder.sample_path(step), grid)
                if saved:
                    self._save()
            # A signal can come at any point of an iteration, so it is answered here.
            if not saved:
                self._read()
                self._save()
        return self._result(interrupted=engine.steps < self.steps)

    def _save(self) -> None:
        try:
            save_checkpoint(self.folder.checkpoints, self.engine, self.config)
        except RunError as error:
            raise self._not_finite(str(error)) from None
        prune_checkpoints(self.folder.checkpoints, self.config.keep)
        pictures = self.folder.sample_paths()
        write_gif(self.folder.gif, pictures)
        page = render_report(
            f"fastgan: {self.folder.path.name}",
            {
                "step": f"{self.engine.steps} of {self.steps}",
                "images": f"{len(self.data)} from {self.data.description}",
                "speed": f"{self.speed.mean():.0f} img/s on {self.engine.device}, "
                f"{torch.get_num_threads()} threads",
            },
            yaml.safe_load(self.config.to_yaml()),
            self.folder.read_metrics(),
            pictures,
            self.data.bad,
        )
        replace_file(self.folder.report, page.encode("utf-8", "backslashreplace"))

    def _read(self) -> dict[str, float] | None:
        """The values of the last step, if not read yet; stops at a loss that is not finite."""
        rows = self.engine.history.last(self.engine.steps - self.read_until)
        self.read_until = self.engine.steps
        for i, row in enumerate(rows):
            for name in ("loss_d", "loss_g"):
                if not torch.isfinite(torch.tensor(row[name])):
                    step = self.engine.steps - len(rows) + 1 + i
                    raise self._not_finite(f"step {step}: {name} is {row[name]}")
        return rows[-1] if rows else None

    def _not_finite(self, what: str) -> RunError:
        return RunError(f"{what}; {_last_good(self.folder)}, left as it was; {_ADVICE}")

    def _batch_images(self) -> int:
        """Images in the batch just drawn; the last of an epoch is smaller."""
        drawn = self.loader.batch or len(self.loader)
        full = self.config.batch_size
        return min(full, len(self.data) - (drawn - 1) * full)

    def _row(self, values: dict[str, float]) -> dict[str, Any]:
        epoch = self.loader.epoch + self.loader.batch / len(self.loader)
        return {
            "step": self.engine.steps,
            "epoch": round(epoch, 4),
            **values,
            "images_per_second": round(self.speed.lap(), 1),
            "seconds": round(self.seconds_before + self.speed.seconds, 3),
        }

    def _result(self, interrupted: bool) -> RunResult:
        return RunResult(
            self.engine.steps, self.steps, interrupted, self.speed.seconds, self.speed.mean()
        )


def _last_good(folder: RunFolder) -> str:
    path, _ = newest_whole(folder.checkpoints)
    return f"last good checkpoint: {path}" if path else "there is no checkpoint yet"


class _Speed:
    """Images a second over the time spent on steps: samples and checkpoints do not count."""

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._lap_images, self._lap_seconds = 0, 0.0

    def add(self, images: int, seconds: float) -> None:
        self.images += images
        self.seconds += seconds

    def mean(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def lap(self) -> float:
        """The speed since this was last asked."""
        images, seconds = self.images - self._lap_images, self.seconds - self._lap_seconds
        self._lap_images, self._lap_seconds = self.images, self.seconds
        return images / seconds if seconds else 0.0


class _StopSignals:
    """Within this context the first SIGINT or SIGTERM is noted, a second one takes its course."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
