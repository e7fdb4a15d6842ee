"""A training run from its configuration to its last checkpoint."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fastgan.data.images import ImageSet
from fastgan.data.loader import Loader
from fastgan.engine.engine import Engine, resolve_device
from fastgan.engine.history import STEPS as HISTORY
from fastgan.errors import InputError, RunError
from fastgan.files import replace_file
from fastgan.metrics.health import Health, StoppingRule, Verdict, Vitals
from fastgan.ops.backend import resolve_backend
from fastgan.seeding import generator
from fastgan.train.checkpoint import (
    build_networks,
    clean_checkpoints,
    go_back,
    load_checkpoint,
    newest_whole,
    prune_checkpoints,
    read_manifest,
    read_settings,
    save_checkpoint,
    set_aside,
)
from fastgan.train.config import ACTIONS, DIFF_AUGMENTS, TrainConfig
from fastgan.train.evaluation import Evaluation, engine_sampler
from fastgan.train.report import render_report
from fastgan.train.run import RunFolder, add_line, read_lines
from fastgan.train.samples import image_grid, write_gif, write_png

GRID = 64
_COLUMNS = 8
# Steps from one verdict on the run's health to the next.
_JUDGE_EVERY = 100
_MEASURE_EVERY = 10
# After something has been done about a bad verdict.
_REST = 1000
_RESCUE_NOISE = 0.1
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
        stopped: whether the stopping rule ended it before that.
        seconds: time spent in this process on steps alone.
        images_per_second: over these.
    """

    step: int
    steps: int
    interrupted: bool
    stopped: bool
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
    config = settle(config, data)
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


def settle(config: TrainConfig, data: ImageSet) -> TrainConfig:
    """``config`` with what is the data's put in.

    Raises:
        InputError: the GAN is to be conditional, and the data have no labels, or more classes.
    """
    config = dataclasses.replace(config, image_size=data.image_size, nc=data.nc)
    if config.condition == "none":
        return config
    if data.labels is None:
        raise InputError(
            f"--condition {config.condition}: {data.description} has no labels; give a folder with "
            "a subfolder for each class, or a file with labels"
        )
    n_classes = config.n_classes or data.n_classes
    if n_classes < data.n_classes:
        raise InputError(f"--n-classes {n_classes}: {data.description} has {data.n_classes}")
    return dataclasses.replace(config, n_classes=n_classes)


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
            loss=config.loss,
            lr=config.lr,
            lr_d=config.lr_d,
            betas=(config.beta1, 0.999),
            n_d=config.n_d,
            label_smoothing=config.label_smoothing,
            gp=config.gp,
            r1=config.r1,
            r1_every=config.r1_every,
            diff_augment=config.choices("diff_augment", DIFF_AUGMENTS),
            instance_noise=config.instance_noise,
            monitor=Vitals(_MEASURE_EVERY),
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
        self.fixed_noise, self.fixed_labels = self._grid(generator(config.seed, "grid", 0, device))
        self.health = Health(scores_compared=config.loss != "wgan-gp")
        self.verdict = Verdict("starting")
        self.last_good: Path | None = None
        self.acted_at = -_REST
        self.actions = config.choices("on_bad", ACTIONS)
        self.stopping = StoppingRule()
        self.evaluation = (
            Evaluation(data, config.features, config.eval_samples, device, config.seed)
            if config.eval_every
            else None
        )
        self.speed = _Speed()
        self.seconds_before = 0.0
        self.read_until = 0
        self.values: dict[str, float] = {}

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
            health = load_checkpoint(path, self.engine)
            if health is not None:
                self._restore_health(health)
        for broken, reason in damaged.items():
            set_aside(broken)
            self.say(f"Warning: {reason}; going back to an earlier one.")
        if path is not None:
            self.say(f"Resuming {self.folder.path} at step {self.engine.steps} of {self.steps}.")
        self.folder.rewind(self.engine.steps)
        rows = read_lines(self.folder.metrics)
        self.seconds_before = float(rows[-1]["seconds"]) if rows else 0.0

    def _grid(self, draw: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Noise of the sample grids; of a conditional GAN the same in each row, a row a class."""
        classes = self.engine.n_classes
        if not classes:
            return self.engine.draw_noise(GRID, draw), None
        noise = self.engine.draw_noise(_COLUMNS, draw)
        labels = torch.arange(classes, device=self.engine.device).repeat_interleave(_COLUMNS)
        return noise.repeat(classes, *[1] * (noise.ndim - 1)), labels

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
            SummaryWriter(str(self.folder.events), purge_step=engine.steps + 1) as events,
            tqdm(
                initial=engine.steps,
                total=self.steps,
                unit="step",
                dynamic_ncols=True,
                disable=None if progress else True,
            ) as bar,
        ):
            while engine.steps < self.steps and signals.received is None and not self.stopped:
                started = time.perf_counter()
                before = self._images_seen()
                engine.step()
                step = engine.steps
                last = step == self.steps
                judge = step % _JUDGE_EVERY == 0
                evaluate = self.evaluation is not None and (last or step % config.eval_every == 0)
                log = last or step % config.log_every == 0
                saved = last or step % config.save_every == 0
                draw = last or step % config.sample_every == 0
                full = step - self.read_until == HISTORY
                if log or saved or draw or full or judge or evaluate:
                    self._read()
                self.speed.add(self._images_seen() - before, time.perf_counter() - started)
                bar.update()
                if judge:
                    with bar.external_write_mode():
                        self._judge()
                if log:
                    row = self._row()
                    add_line(self.folder.metrics, row)
                    for name in self.values:
                        events.add_scalar(name, row[name], step)
                    bar.set_postfix_str(
                        f"{row['images_per_second']:.0f} img/s, loss D {row['loss_d']:.3f} "
                        f"G {row['loss_g']:.3f}, D(x) {row['d_real']:.2f}, "
                        f"D(G(z)) {row['d_fake']:.2f}, {self.verdict.state}"
                    )
                if draw:
                    images = engine.sample(
                        len(self.fixed_noise), self.fixed_noise, labels=self.fixed_labels
                    )
                    write_png(self.folder.sample_path(step), image_grid(images, _COLUMNS))
                if evaluate:
                    with bar.external_write_mode():
                        quality = self._evaluate()
                    for name, value in quality.items():
                        events.add_scalar(f"quality/{name}", value, step)
                saved = saved or self.stopped
                if saved:
                    self._save()
            # A signal can come at any point of an iteration, so it is answered here.
            if not saved:
                self._read()
                self._save()
        return self._result(interrupted=engine.steps < self.steps and not self.stopped)

    def _save(self) -> None:
        path = self._checkpoint(self.folder.checkpoints)
        if self.verdict.state == "healthy":
            self.last_good = path
        prune_checkpoints(self.folder.checkpoints, self.config.keep)
        self.write_report()

    def _checkpoint(self, folder: Path) -> Path:
        try:
            return save_checkpoint(
                folder, self.engine, self.config, self.data, self._health_state()
            )
        except RunError as error:
            raise self._not_finite(str(error)) from None

    def write_report(self) -> None:
        """The animation and ``report.html``, of what there is."""
        pictures = self.folder.sample_paths()
        write_gif(self.folder.gif, pictures)
        page = render_report(
            f"fastgan: {self.folder.path.name}",
            {
                "step": f"{self.engine.steps} of {self.steps}",
                "images": f"{len(self.data)} from {self.data.description}",
                "speed": f"{self.speed.mean():.0f} img/s on {self.engine.device}, "
                f"{torch.get_num_threads()} threads",
                "health": str(self.verdict),
                **self._summary_of_quality(),
            },
            yaml.safe_load(self.config.to_yaml()),
            read_lines(self.folder.metrics),
            pictures,
            skipped=self.data.bad,
            health=read_lines(self.folder.health),
            quality=read_lines(self.folder.quality),
            neighbours=self.folder.neighbours,
        )
        replace_file(self.folder.report, page.encode("utf-8", "backslashreplace"))

    def _read(self) -> None:
        """Take in what the steps since the last call measured; stops at a loss not finite."""
        rows = self.engine.history.last(self.engine.steps - self.read_until)
        self.read_until = self.engine.steps
        for i, row in enumerate(rows):
            step = self.engine.steps - len(rows) + 1 + i
            self.health.add(step, row)
            # What a step did not measure keeps the value that it had.
            self.values |= {name: value for name, value in row.items() if not math.isnan(value)}
            for name in ("loss_d", "loss_g"):
                if not math.isfinite(row[name]):
                    self.verdict = Verdict("diverged", (f"{name} was {row[name]} at step {step}",))
                    if not self._recover():
                        raise self._not_finite(f"step {step}: {name} is {row[name]}")
                    return

    def _not_finite(self, what: str) -> RunError:
        return RunError(f"{what}; {_last_good(self.folder)}, left as it was; {_ADVICE}")

    def _judge(self) -> None:
        """Give a verdict on the last steps; a new one is said and written down."""
        verdict, before = self.health.verdict(), self.verdict
        self.verdict = verdict
        if verdict.state != before.state:
            self._note({"verdict": verdict.state, "reasons": list(verdict.reasons)})
            if verdict.bad or before.bad:
                self.say(f"Step {self.engine.steps}: {verdict}.")
        rested = self.engine.steps - self.acted_at >= _REST
        if verdict.bad and self.actions and rested:
            self._act(verdict)

    def _act(self, verdict: Verdict) -> None:
        done = []
        if verdict.state == "D too strong" and "lower-lr-d" in self.actions:
            self.engine.scale_lr_d(0.5)
            done.append("halved D's learning rate")
        if verdict.state == "D too strong" and "instance-noise" in self.actions:
            self.engine.set_instance_noise(_RESCUE_NOISE)
            done.append(f"noise of {_RESCUE_NOISE} on what D sees")
        if verdict.state in ("collapsing", "diverged") and self._recover():
            return
        if done:
            self._acted("; ".join(done))

    def _recover(self) -> bool:
        """Go back to the last good checkpoint, where that is wanted and there is one."""
        good = self.last_good
        if "roll-back" not in self.actions or good is None or not good.exists():
            return False
        go_back(good, self.engine)
        self._acted(f"back to the networks of {good.name}")
        return True

    def _acted(self, what: str) -> None:
        self.acted_at = self.engine.steps
        # What was measured before says nothing of what is now.
        self.health.restart()
        self._note({"action": what, "because": str(self.verdict)})
        self.say(f"Step {self.engine.steps}: {self.verdict}; {what}.")

    def _note(self, row: dict[str, Any]) -> None:
        add_line(self.folder.health, {"step": self.engine.steps, **row})

    def _health_state(self) -> dict[str, Any]:
        return {
            **self.health.state_dict(),
            "verdict": [self.verdict.state, list(self.verdict.reasons)],
            "last_good": self.last_good.name if self.last_good else None,
            "acted_at": self.acted_at,
            "values": dict(self.values),
            "stopping": self.stopping.state_dict(),
        }

    def _restore_health(self, state: Mapping[str, Any]) -> None:
        self.health.load_state_dict(state)
        name, reasons = state["verdict"]
        self.verdict = Verdict(name, tuple(reasons))
        good = state["last_good"]
        self.last_good = self.folder.checkpoints / good if good else None
        self.acted_at = state["acted_at"]
        self.values = dict(state["values"])
        self.stopping.load_state_dict(state["stopping"])

    def _evaluate(self) -> dict[str, float]:
        """Measure the quality; keep the checkpoint if it is the best so far."""
        assert self.evaluation is not None
        step, engine = self.engine.steps, self.engine
        sampler = engine_sampler(engine, self.config.seed)
        measured = self.evaluation.measure(sampler, conditional=engine.n_classes > 0)
        quality = measured.to_dict()
        best = self._best()
        add_line(self.folder.quality, {"step": step, **quality})
        better = best is None or quality["frechet"] < best["frechet"]
        if better:
            self._checkpoint(self.folder.best)
            prune_checkpoints(self.folder.best, 1)
        best_so_far = "\n(the best so far)" if better else ""
        self.say(f"Step {step}: {measured.describe()}{best_so_far}")
        write_png(self.folder.neighbours, image_grid(*self.evaluation.neighbours(measured)))
        # Not one that is measured because the run ends: it might go on, as if it had not.
        regular = step % self.config.eval_every == 0
        if regular and self.stopping.add(step, quality["frechet"], self.health):
            self._note({"stop": self.stopping.reason})
            self.say(f"Step {step}: {self.stopping.reason}.")
        return {name: value for name, value in quality.items() if isinstance(value, float)}

    @property
    def stopped(self) -> bool:
        """Whether the stopping rule ends the run here."""
        return self.config.stop and bool(self.stopping.reason)

    def _best(self) -> dict[str, Any] | None:
        rows = read_lines(self.folder.quality)
        return min(rows, key=lambda row: row["frechet"]) if rows else None

    def _summary_of_quality(self) -> dict[str, str]:
        best = self._best()
        if best is None:
            return {}
        found = {"best": f"step {best['step']}: {best['described']}"}
        if self.stopping.reason:
            found["stopping rule"] = self.stopping.reason
        return found

    def _images_seen(self) -> int:
        """Of the loader, in all."""
        loader = self.loader
        in_epoch = min(loader.batch * self.config.batch_size, len(self.data))
        return loader.epoch * len(self.data) + in_epoch

    def _row(self) -> dict[str, Any]:
        epoch = self.loader.epoch + self.loader.batch / len(self.loader)
        return {
            "step": self.engine.steps,
            "epoch": round(epoch, 4),
            **self.values,
            "images_per_second": round(self.speed.lap(), 1),
            "seconds": round(self.seconds_before + self.speed.seconds, 3),
        }

    def _result(self, interrupted: bool) -> RunResult:
        return RunResult(
            step=self.engine.steps,
            steps=self.steps,
            interrupted=interrupted,
            stopped=self.stopped,
            seconds=self.speed.seconds,
            images_per_second=self.speed.mean(),
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
