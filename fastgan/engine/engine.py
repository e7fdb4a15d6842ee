"""The alternating step of ``pytorch/examples/dcgan``, and the state that it carries.

One step updates D on real images and on G(z).detach(), then G through the updated D, on the same
G(z). Two things are done otherwise than in the example, with the same result:

- where it is known to be the same, D(real) and D(fake) are one pass over both batches, in which
  each keeps its own batch statistics (``fuse_passes``);
- D's parameters get no gradient in G's update, where the example computes and discards it.

The loss, the regularisers and the classes of a conditional GAN are settings of the same step.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.choices import Backend, Capture, DOutput, FusePasses, Loss
from fastgan.choices import Precision as PrecisionName
from fastgan.engine.adam import Adam
from fastgan.engine.capture import CapturedStep
from fastgan.engine.d_output import DiscriminatorOutput
from fastgan.engine.ema import ExponentialMovingAverage
from fastgan.engine.history import History
from fastgan.engine.losses import FAKE, LOSSES, REAL
from fastgan.engine.precision import Precision
from fastgan.engine.regularisers import DiffAugment, add_noise, gradient_penalty, r1_penalty
from fastgan.errors import InputError
from fastgan.nn.grouped import grouped_forward, grouping_obstacle
from fastgan.nn.modes import evaluation_mode
from fastgan.ops import tuning
from fastgan.ops.augment import augment
from fastgan.ops.backend import (
    requested_backend,
    resolve_backend,
    say_missing_kernels,
    use_backend,
)
from fastgan.ops.gan_loss import gan_loss
from fastgan.saying import say_once
from fastgan.seeding import generator

logger = logging.getLogger("fastgan")

NoiseFunction = Callable[[int, torch.Generator], Tensor]

# What is measured in each step that is monitored, before the monitor's own.
_MEASURED = ("accuracy_real", "accuracy_fake", "gradient_d", "gradient_g")
_SAMPLE_CHUNK = 256
_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")


class DStats(NamedTuple):
    """What one update of D measured: device scalars, as in :class:`StepStats`."""

    loss_d: Tensor
    d_real: Tensor
    d_fake: Tensor


class GStats(NamedTuple):
    """What one update of G measured: device scalars, as in :class:`StepStats`."""

    loss_g: Tensor
    d_fake_g: Tensor


class StepStats(NamedTuple):
    """What one step measured: 0-d tensors on the device, reading which waits for the step.

    A later step may write its own values into the same tensors: read, or clone, what you want to
    keep before the next step. With ``n_d > 1`` D's values are those of its last update.

    Attributes:
        loss_d: the example's ``errD``, D's loss on real plus its loss on fake.
        loss_g: its ``errG``.
        d_real: its ``D_x``, the mean of D(x) over the real batch.
        d_fake: its ``D_G_z1``, the mean of D(G(z)) before D's update.
        d_fake_g: its ``D_G_z2``, the mean of D(G(z)) after it.
    """

    loss_d: Tensor
    loss_g: Tensor
    d_real: Tensor
    d_fake: Tensor
    d_fake_g: Tensor

    def to_dict(self) -> dict[str, float]:
        """The values as floats, by one transfer from the device."""
        return dict(zip(self._fields, torch.stack(tuple(self)).tolist(), strict=True))


class BatchSource(Protocol):
    """What :meth:`Engine.attach` takes; :class:`fastgan.Loader` is one."""

    def next_batch(self) -> tuple[Tensor, Tensor | None]:
        """The next ``(images, labels)``, for ever."""

    def state_dict(self) -> dict[str, Any]:
        """The position."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""


@runtime_checkable
class DrawnSource(Protocol):
    """A :class:`BatchSource` that leaves the device's part of a batch to the captured step."""

    def draw(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the next batch is made from: ``(source, flips, labels)``."""

    def images(self, source: Tensor, flips: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The batch ``[n, C, H, W]``, by work on the device alone."""


class Monitor(Protocol):
    """What the engine has measured on the batches of some of its steps, as part of the step.

    Attributes:
        names: of the values, under which ``Engine.history`` has them.
        every: steps from one measurement to the next.
    """

    names: Sequence[str]
    every: int

    def measure(self, real: Tensor, fake: Tensor) -> Tensor:
        """The values ``[len(names)]`` for ``[N, ...]`` each, by work on the device alone."""


class _Batch(NamedTuple):
    """What an update of D is made from, and on what occasion.

    Attributes:
        drawn: whether ``source`` is the loader's, or images that were handed in.
        source, flips: see :meth:`DrawnSource.images`.
        labels, fake_labels: of a conditional GAN.
        noise: for the samples; None draws it.
        penalised: whether this is one of the updates that R1 is added to.
        measured: whether this is one of the steps that are monitored.
    """

    drawn: bool
    source: Tensor
    flips: Tensor | None
    labels: Tensor | None
    fake_labels: Tensor | None
    noise: Tensor | None
    penalised: bool
    measured: bool


class _Scored(NamedTuple):
    """What D made of some batches: ``[groups]`` each, but ``scores [groups·n, ...]``."""

    loss: Tensor
    mean: Tensor
    scores: Tensor


class Engine:
    """Trains ``netG`` against ``netD``.

    Both networks are moved, in place, to the device and to ``torch.channels_last``.

    Args:
        netG: noise ``[N, ...]`` to images ``[N, C, H, W]`` in [-1, 1], or to points ``[N, F]``.
            Where its ``n_classes`` is positive it is conditional: called with noise and labels
            ``[N]``.
        netD: images to scores ``[N, ...]``; see ``d_output``. Called with images and labels where
            its ``n_classes`` is positive, which must be ``netG``'s.
        loss: ``bce``, ``minimax``, ``lsgan``, ``hinge`` or ``wgan-gp``: see
            :mod:`fastgan.engine.losses`.
        label_smoothing: D's target for real images is less than 1 by this much, in [0, 0.5)
            (Salimans et al. 2016, https://arxiv.org/abs/1606.03498); of ``bce``, ``minimax`` and
            ``lsgan``.
        gp: weight of the gradient penalty of ``wgan-gp``.
        r1: weight of :func:`fastgan.engine.regularisers.r1_penalty`; 0 is none.
        r1_every: updates of D from one that has R1 to the next; its weight is multiplied by as
            much (Karras et al. 2020, https://arxiv.org/abs/1912.04958). Penalties need second
            derivatives, for which D runs as plain PyTorch, in the dtype of its weights.
        diff_augment: changes of all images that D sees, see
            :class:`fastgan.engine.regularisers.DiffAugment`.
        instance_noise: standard deviation of normal noise on all images that D sees.
        opt_g, opt_d: optimisers, taken as they are; by default fused Adam with ``lr``, ``betas``.
        lr: learning rate of both default optimisers; ``lr_d``, if given, of D's.
        betas: of the default optimisers.
        n_d: updates of D for each update of G.
        monitor: what to measure on the batches, besides D's accuracy on them (the share of images
            on their side of the loss's boundary) and the norms of both gradients.
        ema: decay of the moving average of G's weights, in [0, 1), reached after a warm-up of
            about ``9 / (1 - ema)`` steps; 0 keeps none.
        noise: the shape of one ``z``, or ``f(n, generator) -> Tensor [n, ...]``. By default
            standard normal of length ``netG.nz``: ``(nz, 1, 1)`` where G begins with a
            convolution, ``(nz,)`` where it begins with a linear layer.
        d_output: whether D returns ``logits`` or a ``probability``. ``auto`` finds out from its
            last operation at the first step; a final sigmoid is then left out, and the loss taken
            on logits.
        precision: ``fp32`` computes in the dtype that the parameters have, float32 products rounded
            as ``torch.backends`` says; ``tf32`` rounds them to TF32 on a GPU; ``bf16`` and ``fp16``
            run the networks under autocast, with float32 weights, statistics, loss and updates,
            ``fp16`` with a gradient scaler for each optimiser. Samples are made in float32.
        capture: whether steps are captured in CUDA graphs, see :func:`fastgan.capture_step`:
            ``auto`` where there is a GPU and they can be; True raises where they cannot; False
            never. Python in the networks, in ``noise`` and in ``reduce_gradients`` then runs while
            a step is recorded, and no more; ``auto`` leaves an engine whose ``reduce_gradients`` is
            overridden uncaptured.
        backend: ``auto``, ``reference``, ``cpp`` on the CPU, or ``triton`` on a GPU. ``auto`` takes
            for each op and shape what measures fastest at the first step, and keeps to it: see
            :mod:`fastgan.ops.tuning`. A backend that is named raises for tensors that it cannot
            take, and leaves shapes for which it has no kernel to the reference.
        device: ``auto`` takes the accelerator that the parameters are on, else CUDA where there is
            one, else the CPU.
        seed: of the engine's own generators; the global ones are never used.
        fuse_passes: ``auto`` makes D(real) and D(fake) one pass where that is known to be the
            same and says once why it is not; False is the example's two passes; True raises where
            it is not known to be the same.

    Attributes:
        netG, netD: the networks.
        ema_module: the averaged G, or None.
        opt_g, opt_d: the optimisers.
        generator: the generator of the training noise.
        steps: how many steps have been taken.
        history: what the last steps measured; NaN for what a step did not.
        n_classes: of a conditional GAN; else 0.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(
        self,
        netG: nn.Module,
        netD: nn.Module,
        *,
        loss: Loss = "bce",
        opt_g: torch.optim.Optimizer | None = None,
        opt_d: torch.optim.Optimizer | None = None,
        lr: float = 2e-4,
        lr_d: float | None = None,
        betas: tuple[float, float] = (0.5, 0.999),
        n_d: int = 1,
        label_smoothing: float = 0.0,
        gp: float = 10.0,
        r1: float = 0.0,
        r1_every: int = 16,
        diff_augment: Sequence[str] = (),
        instance_noise: float = 0.0,
        monitor: Monitor | None = None,
        ema: float = 0.0,
        noise: int | Sequence[int] | NoiseFunction | None = None,
        d_output: DOutput = "auto",
        precision: PrecisionName = "fp32",
        capture: Capture = "auto",
        backend: Backend = "auto",
        device: str | torch.device = "auto",
        seed: int = 0,
        fuse_passes: FusePasses = "auto",
    ) -> None:
        _check_choice("loss", loss, get_args(Loss))
        _check_choice("precision", precision, get_args(PrecisionName))
        _check_choice("capture", capture, ("auto", True, False))
        _check_choice("d_output", d_output, get_args(DOutput))
        _check_choice("fuse_passes", fuse_passes, ("auto", True, False))
        for name, count in (("n_d", n_d), ("r1_every", r1_every)):
            if count < 1:
                raise InputError(f"{name}={count} must be at least 1")
        for name, value in (("gp", gp), ("r1", r1), ("instance_noise", instance_noise)):
            if not (math.isfinite(value) and value >= 0.0):
                raise InputError(f"{name}={value} must be a number of at least 0")
        if not 0.0 <= label_smoothing < 0.5:
            raise InputError(f"label_smoothing={label_smoothing} must be from 0 to less than 0.5")
        if label_smoothing and LOSSES[loss].kind_d not in ("bce", "lsgan"):
            raise InputError(
                f"label_smoothing={label_smoothing}: loss={loss!r} has no target to smooth; use 0"
            )
        if not 0.0 <= ema < 1.0:
            raise InputError(f"ema={ema} must be at least 0 (none) and less than 1")
        self.loss = loss
        self._loss = LOSSES[loss]
        self._targets = (REAL - label_smoothing, FAKE)
        self._gp = gp if loss == "wgan-gp" else 0.0
        self._r1, self._r1_every = r1, r1_every
        self._diff_augment = DiffAugment(diff_augment)
        self._monitor = monitor
        self.n_classes = _n_classes(netG, netD)
        self._conditional_d = bool(getattr(netD, "n_classes", 0))
        self.n_d = n_d
        self.backend = requested_backend() if backend == "auto" else resolve_backend(backend)
        self._choices: tuning.Times = {}
        self.fuse_passes = fuse_passes
        self.device = resolve_device(device, netG)
        if self.backend == "auto":
            say_missing_kernels(self.device)
        self._precision = Precision(precision, self.device, netG=netG, netD=netD)
        self.netG = _place(netG, self.device)
        self.netD = _place(netD, self.device)
        self._dtype = next((p.dtype for p in netG.parameters()), torch.get_default_dtype())
        self._image_dtype = self._precision.low or self._dtype
        self._noise = _noise_function(noise, netG, self.device, self._dtype)
        self.opt_g = opt_g or _adam("lr", netG, lr, betas, self.device)
        self.opt_d = opt_d or _adam("lr_d", netD, lr if lr_d is None else lr_d, betas, self.device)
        self._update_by_g = self._precision.updater(self.opt_g)
        self._update_by_d = self._precision.updater(self.opt_d)
        # On the device, where a captured step reads its present value.
        self._instance_noise = torch.tensor(instance_noise, device=self.device)
        self._has_instance_noise = instance_noise > 0.0
        self._ema = ExponentialMovingAverage(netG, ema) if ema else None
        self.seed = seed
        self.generator = torch.Generator(self.device)
        # Sampling has its own: looking at a GAN does not change its training.
        self._sample_generator = torch.Generator(self.device)
        self._seed_generators(0)
        self.steps = 0
        self._updates_of_d = 0
        self.history = History(
            [*StepStats._fields, *((*_MEASURED, *monitor.names) if monitor else ())], self.device
        )
        self._requested_output = d_output
        self._output: DiscriminatorOutput | None = None
        self._image_shape: tuple[int, ...] | None = None
        self._range_checked = False
        self._labels_checked: set[str] = set()
        self._two_passes_said = False
        self._loader: BatchSource | None = None
        self._loader_checked = False
        self._captured = CapturedStep(
            self._run,
            (
                *(self.netG, self.netD, self.opt_g, self.opt_d, *self.history.tensors),
                *(self._update_by_g.state + self._update_by_d.state),
                *((self._ema.module, self._ema.updates) if self._ema else ()),
            ),
            generators=(self.generator,),
            capture=capture,
        )
        overridden = type(self).reduce_gradients is not Engine.reduce_gradients
        if capture == "auto" and overridden and not self._captured.reason:
            self._captured.reason = (
                "reduce_gradients is overridden, and would run while a step is recorded alone; "
                "capture=True captures it"
            )
            logger.warning("steps are not captured: %s", self._captured.reason)

    @property
    def uncaptured_reason(self) -> str:
        """Why steps are not captured in CUDA graphs; empty where they are."""
        return self._captured.reason

    @property
    def captures(self) -> int:
        """How many CUDA graphs have been captured, one for each kind of step and size of batch."""
        return self._captured.captures

    @property
    def ema_module(self) -> nn.Module | None:
        """The averaged generator, ready to be used in evaluation mode; None where ``ema`` is 0."""
        if self._ema is None:
            return None
        draw = generator(0, "calibrate", device=self.device)
        labels = self._balanced_labels(64) if self.n_classes else None
        batches = (
            (z,) if labels is None else (z, labels)
            for z in (self.draw_noise(64, draw) for _ in range(8))
        )
        with self._running():
            self._ema.calibrate(batches)
        return self._ema.module

    def attach(self, loader: BatchSource) -> None:
        """Let :meth:`step` draw its batches from ``loader``, whose position joins the state.

        Raises:
            InputError: ``loader`` has no ``next_batch``, as a ``DataLoader`` has not.
        """
        if not hasattr(loader, "next_batch"):
            raise InputError(
                f"loader: a {type(loader).__name__} has no next_batch(); attach a fastgan.Loader, "
                "or give step() the batches"
            )
        self._loader = loader
        self._loader_checked = False
        self._labels_checked.clear()
        self._captured.reset()

    def step(
        self,
        real: Tensor | None = None,
        labels: Tensor | None = None,
        noise: Tensor | None = None,
        fake_labels: Tensor | None = None,
    ) -> StepStats:
        """``n_d`` updates of D and one of G, which reuses the samples of D's last update.

        Args:
            real: ``[n_d·N, ...]``: uint8 ``[.., H, W, C]`` or ``[.., C, H, W]``, or floating
                ``[.., C, H, W]`` in [-1, 1]. None takes ``n_d`` batches of the attached loader.
            labels: ``[n_d·N]`` int64, the classes of ``real``; a conditional GAN needs them.
            noise: ``[n_d·N, ...]``; None draws it.
            fake_labels: ``[n_d·N]``, the classes to be generated; None takes those of ``real``.

        Raises:
            InputError: a batch of the wrong dtype, range (looked at in the first batch only, as are
                labels), size or channel count; no batch and no loader; labels that are missing, or
                not of use.
        """
        measured = self._monitor is not None and self.steps % self._monitor.every == 0
        with self._running():
            batches = list(self._batches(real, labels, noise, fake_labels, measured))
            row = self._captured("step", *(value for batch in batches for value in batch))
        self.steps += 1
        self._updates_of_d += self.n_d
        self._age_average()
        return StepStats(*row[: len(StepStats._fields)].unbind())

    def d_step(
        self,
        real: Tensor,
        labels: Tensor | None = None,
        noise: Tensor | None = None,
        fake_labels: Tensor | None = None,
    ) -> DStats:
        """One update of D on ``real [N, ...]`` and on as many fresh samples of G."""
        with self._running():
            batch = self._batch(0, (False, real, None, labels), noise, fake_labels)
            row = self._captured("d_step", *batch)
        self._updates_of_d += 1
        return DStats(*row.unbind())

    def g_step(
        self, n: int | None = None, noise: Tensor | None = None, fake_labels: Tensor | None = None
    ) -> GStats:
        """One update of G on ``n`` fresh samples, or on those that ``noise [n, ...]`` gives.

        Those of a conditional GAN are of the classes ``fake_labels [n]``; None draws them.
        """
        if (n is None) == (noise is None):
            raise InputError(
                f"g_step: give either n or noise, not {'neither' if n is None else 'both'}"
            )
        count = len(noise) if noise is not None else int(n or 0)
        if count < 1:
            raise InputError(f"n={count} must be at least 1")
        with self._running():
            self._prepare_networks()
            fake_labels = self._checked_labels("fake_labels", fake_labels, count)
            if self.n_classes and fake_labels is None:
                fake_labels = torch.randint(
                    self.n_classes, (count,), generator=self.generator, device=self.device
                )
            row = self._captured("g_step", count, noise, fake_labels)
        self._age_average()
        return GStats(*row.unbind())

    @torch.no_grad()
    def sample(
        self,
        n: int,
        noise: Tensor | None = None,
        ema: bool = True,
        labels: Tensor | None = None,
    ) -> Tensor:
        """``n`` images of the generator in evaluation mode, ``[n, C, H, W]`` in [-1, 1].

        Leaves the training as it was: the noise comes from a generator kept for sampling.

        Args:
            n: how many.
            noise: ``[n, ...]``; None draws it.
            ema: use the averaged generator where there is one.
            labels: ``[n]``, the classes, of a conditional GAN; None takes each in turn.
        """
        if n < 1:
            raise InputError(f"n={n} must be at least 1")
        if noise is None:
            noise = self.draw_noise(n, self._sample_generator)
        if len(noise) != n:
            raise InputError(f"noise has {len(noise)} rows; n={n} samples need as many")
        labels = self._checked_labels("labels", labels, n)
        if self.n_classes and labels is None:
            labels = self._balanced_labels(n)
        averaged = self.ema_module if ema else None
        with self._running():
            return sample(
                averaged or self.netG,
                noise.to(self.device, self._dtype),
                labels.to(self.device) if labels is not None else None,
            )

    def _balanced_labels(self, n: int) -> Tensor:
        return torch.arange(n, device=self.device) % self.n_classes

    def draw_noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Noise ``[n, ...]`` for ``netG`` from ``generator``, which is on the engine's device."""
        return self._noise(n, generator).to(self.device, self._dtype)

    def reduce_gradients(self, params: Iterable[nn.Parameter]) -> None:
        """Called with the parameters of the network about to be updated, gradients in place.

        Does nothing; override it to accumulate or to all-reduce. With ``precision="fp16"`` the
        gradients are multiplied by the loss scale; see ``capture`` for when it runs.
        """

    @torch.no_grad()
    def scale_lr_d(self, factor: float) -> None:
        """Multiply D's learning rate; without a new capture where it is a tensor."""
        for group in self.opt_d.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].mul_(factor)
            else:
                group["lr"] *= factor

    def set_instance_noise(self, deviation: float) -> None:
        """Change ``instance_noise``; from or to 0 captures anew."""
        if not (math.isfinite(deviation) and deviation >= 0.0):
            raise InputError(f"instance_noise={deviation} must be a number of at least 0")
        if (deviation > 0.0) != self._has_instance_noise:
            self._captured.reset()
        self._instance_noise.fill_(deviation)
        self._has_instance_noise = deviation > 0.0

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs; tensors, numbers and strings only."""
        return {
            "netG": self.netG.state_dict(),
            "netD": self.netD.state_dict(),
            "ema": averaged.state_dict() if (averaged := self.ema_module) else None,
            "ema_updates": self._ema.updates if self._ema else None,
            "opt_g": self.opt_g.state_dict(),
            "opt_d": self.opt_d.state_dict(),
            "scale_g": self._update_by_g.state_dict(),
            "scale_d": self._update_by_d.state_dict(),
            "generator": self.generator.get_state(),
            "sample_generator": self._sample_generator.get_state(),
            "device": self.device.type,
            "steps": self.steps,
            "updates_of_d": self._updates_of_d,
            "instance_noise": float(self._instance_noise),
            "choices": copy.deepcopy(self._choices),
            "loader": self._loader.state_dict() if self._loader is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            InputError: the state was saved with an EMA or a loader and this engine has none, or
                the other way round.
            RuntimeError: the weights are of other networks.
        """
        for name, mine in (("ema", self._ema), ("loader", self._loader)):
            if (mine is None) != (state[name] is None):
                saved, has = ("without", "has one") if mine is not None else ("with", "has none")
                raise InputError(f"state was saved {saved} {name}, this engine {has}")
        # Another way to compute the same would round otherwise.
        self._choices.update(copy.deepcopy(state.get("choices", {})))
        self.netG.load_state_dict(state["netG"])
        self.netD.load_state_dict(state["netD"])
        if self._ema:
            self._ema.module.load_state_dict(state["ema"])
            self._ema.updates.copy_(state["ema_updates"])
        _load_optimizer(self.opt_g, state["opt_g"])
        _load_optimizer(self.opt_d, state["opt_d"])
        self._update_by_g.load_state_dict(state.get("scale_g"))
        self._update_by_d.load_state_dict(state.get("scale_d"))
        self.steps = state["steps"]
        self._updates_of_d = state.get("updates_of_d", self.steps * self.n_d)
        self.set_instance_noise(state.get("instance_noise", float(self._instance_noise)))
        if state["device"] == self.device.type:
            self.generator.set_state(state["generator"].cpu())
            self._sample_generator.set_state(state["sample_generator"].cpu())
        else:
            logger.warning(
                "the state comes from %s and goes on on %s: with other random numbers from here",
                state["device"],
                self.device.type,
            )
            self._seed_generators(self.steps)
        if self._loader is not None:
            self._loader.load_state_dict(state["loader"])

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Whatever runs a network of this engine does so on its backend, by its choices.

        So do gradients on a GPU, which autograd would compute in a thread that knows of neither.
        """
        with (
            use_backend(self.backend),
            tuning.use_choices(self._choices),
            self._precision.products(),
            torch.autograd.set_multithreading_enabled(False),
        ):
            yield

    def _seed_generators(self, steps: int) -> None:
        for mine, name in ((self.generator, "noise"), (self._sample_generator, "sample")):
            mine.set_state(generator(self.seed, name, steps, self.device).get_state())

    def _age_average(self) -> None:
        """A captured step has updated the average, and could not say so."""
        if self._ema:
            self._ema.stale = True

    def _batches(
        self,
        real: Tensor | None,
        labels: Tensor | None,
        noise: Tensor | None,
        fake_labels: Tensor | None,
        measured: bool,
    ) -> Iterator[_Batch]:
        """What each of the ``n_d`` updates of D is made from; the host's part of a step."""
        noises, classes = self._split("noise", noise), self._split("fake_labels", fake_labels)
        for i, images in enumerate(self._real_batches(real, labels)):
            last = i == self.n_d - 1
            yield self._batch(i, images, noises[i], classes[i], measured and last)

    def _real_batches(
        self, real: Tensor | None, labels: Tensor | None
    ) -> Iterator[tuple[bool, Tensor, Tensor | None, Tensor | None]]:
        """``drawn``, ``source``, ``flips`` and ``labels`` of each."""
        if real is not None:
            parts = zip(self._split("real", real), self._split("labels", labels), strict=True)
            for images, classes in parts:
                assert images is not None
                yield False, images, None, classes
        elif labels is not None:
            raise InputError("labels: given without real; a loader draws its own")
        elif self._loader is None:
            raise InputError("real: no batch was given and no loader is attached")
        elif isinstance(self._loader, DrawnSource):
            for _ in range(self.n_d):
                source, flips, classes = self._loader.draw()
                if not self._loader_checked:
                    self._checked(self._loader.images(source, flips, self._image_dtype))
                    self._loader_checked = True
                yield True, source, flips, classes if self.n_classes else None
        else:
            for _ in range(self.n_d):
                images, classes = self._loader.next_batch()
                yield False, images, None, classes if self.n_classes else None

    def _batch(
        self,
        i: int,
        images: tuple[bool, Tensor, Tensor | None, Tensor | None],
        noise: Tensor | None,
        fake_labels: Tensor | None,
        measured: bool = False,
    ) -> _Batch:
        """What the ``i``-th update of D from now is made from."""
        drawn, source, flips, labels = images
        if not drawn:
            source = self._checked(source)
        n = len(source)
        if noise is not None and len(noise) != n:
            raise InputError(f"noise has {len(noise)} rows; {n} real images need as many")
        labels = self._checked_labels("labels", labels, n)
        if self.n_classes and labels is None:
            raise InputError(
                f"labels: netG is conditional, of {self.n_classes} classes; give labels, or attach "
                "a loader of a labelled set"
            )
        fake_labels = self._checked_labels("fake_labels", fake_labels, n)
        penalised = self._r1 > 0.0 and (self._updates_of_d + i) % self._r1_every == 0
        classes = labels if fake_labels is None else fake_labels
        return _Batch(drawn, source, flips, labels, classes, noise, penalised, measured)

    def _checked_labels(self, name: str, labels: Tensor | None, n: int) -> Tensor | None:
        if labels is None:
            return None
        if not self.n_classes:
            raise InputError(f"{name}: netG and netD take no labels; pass {name}=None")
        if labels.dtype != torch.int64 or labels.shape != (n,):
            raise InputError(
                f"{name} is {_described(labels)}; {n} images need int64 [{n}] of classes 0 to "
                f"{self.n_classes - 1}"
            )
        if name not in self._labels_checked:
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.n_classes:
                raise InputError(
                    f"{name} holds classes from {low} to {high}; netG has {self.n_classes}, from 0"
                )
            self._labels_checked.add(name)
        return labels

    def _split(self, name: str, batch: Tensor | None) -> Sequence[Tensor | None]:
        if batch is None:
            return [None] * self.n_d
        if len(batch) == 0 or len(batch) % self.n_d:
            raise InputError(
                f"{name}: a batch of {len(batch)} cannot be cut into n_d={self.n_d} equal parts"
            )
        return batch.chunk(self.n_d)

    def _run(self, kind: str, *args: Any) -> Tensor:
        """The device's part of ``step``, ``d_step`` or ``g_step``: all that is captured.

        Args:
            args: of ``g_step`` the number of samples, their noise and their labels; of the others
                the values of a :class:`_Batch` for each update of D.

        Returns:
            What it measured, as one tensor in the order of its statistics.
        """
        if kind == "g_step":
            count, noise, fake_labels = args
            of_g, _ = self._update_g(self._fake(count, noise, fake_labels), fake_labels)
            return torch.stack(of_g)
        size = len(_Batch._fields)
        batches = [_Batch(*args[i : i + size]) for i in range(0, len(args), size)]
        for i, batch in enumerate(batches):
            real = self._images(batch.drawn, batch.source, batch.flips)
            # Only the last fake batch of a step goes on to update G.
            goes_on = kind == "step" and i == len(batches) - 1
            with contextlib.nullcontext() if goes_on else torch.no_grad():
                fake = self._fake(len(real), batch.noise, batch.fake_labels)
            of_d, measured_d = self._update_d(real, fake.detach(), batch)
        if kind == "d_step":
            return torch.stack(of_d)
        of_g, measured_g = self._update_g(fake, batch.fake_labels, batch.measured)
        row = torch.stack((of_d.loss_d, of_g.loss_g, of_d.d_real, of_d.d_fake, of_g.d_fake_g))
        if self._monitor is not None:
            if batch.measured:
                of_batches = self._monitor.measure(real, fake.detach())
                values = torch.cat([measured_d, measured_g, of_batches.to(row.dtype)])
            else:
                values = row.new_full((len(_MEASURED) + len(self._monitor.names),), math.nan)
            row = torch.cat([row, values.to(row.dtype)])
        self.history.add(row)
        return row

    def _images(self, drawn: bool, source: Tensor, flips: Tensor | None) -> Tensor:
        """A batch as floating ``[N, C, H, W]`` in [-1, 1], or ``[N, F]``, on the device."""
        if drawn:
            assert isinstance(self._loader, DrawnSource)
            return self._loader.images(source, flips, self._image_dtype)
        if source.dtype == torch.uint8:
            return augment(source, dtype=self._image_dtype)
        if source.ndim != 4:
            return source.to(self._image_dtype)
        return source.to(self._image_dtype, memory_format=torch.channels_last)

    def _fake(self, n: int, noise: Tensor | None, labels: Tensor | None) -> Tensor:
        z = self.draw_noise(n, self.generator) if noise is None else noise
        with self._precision.forward():
            return self.netG(z.to(self._dtype), *_given(labels))

    def _prepare_networks(self) -> tuple[int, ...]:
        """Find out, once, what G makes and D returns; neither network nor generator is changed."""
        if self._image_shape is None:
            devices = [self.device] if self.device.type == "cuda" else []
            # Shapes are all that is asked for: nothing is worth a measurement.
            with (
                torch.random.fork_rng(devices),
                evaluation_mode(self.netD),
                use_backend("reference"),
            ):
                z = self.draw_noise(2, generator(0, "probe", device=self.device))
                labels = self._balanced_labels(2) if self.n_classes else None
                make = functools.partial(sample, self.netG, labels=labels)
                images = _probe("netG", make, "noise", z)
                if images.ndim not in (2, 4) or len(images) != 2:
                    raise InputError(
                        f"netG returned {list(images.shape)} for 2 samples; it must return "
                        "[N, C, H, W], or [N, F] for points"
                    )
                classes = labels if self._conditional_d else None
                score = functools.partial(_call_with, self.netD, classes)
                with torch.no_grad():
                    scores = _probe("netD", score, "netG's images", images)
                _check_scores(scores, 2)
                self._output = DiscriminatorOutput(
                    self.netD, images, self._requested_output, _given(classes)
                )
                if self._output.kind == "probability" and self._loss.kind_d != "bce":
                    raise InputError(
                        f"loss={self.loss!r} is one of scores, and netD returns probabilities; "
                        "leave its sigmoid out"
                    )
            self._image_shape = tuple(images.shape[1:])
        return self._image_shape

    def _checked(self, real: Tensor) -> Tensor:
        """``real``, uint8 ``[N, H, W, C]`` or floating ``[N, C, H, W]``, where it is neither."""
        shape = self._prepare_networks()
        if len(shape) == 1:
            return self._checked_points(real, shape)
        c, h, w = shape
        got = _described(real)
        want = f"uint8 [N, {h}, {w}, {c}] or [N, {c}, {h}, {w}], or floating [N, {c}, {h}, {w}]"
        nchw, nhwc = real.shape[1:] == (c, h, w), real.shape[1:] == (h, w, c)
        if len(real) == 0 or not (nchw or nhwc):
            raise InputError(f"real is {got}; netG makes, so netD is to see, {want} in [-1, 1]")
        if real.dtype == torch.uint8:
            return real if nhwc else real.permute(0, 2, 3, 1)
        if not real.is_floating_point() or not nchw:
            raise InputError(f"real is {got}; give {want} in [-1, 1]")
        if not self._range_checked:
            low, high = real.min().item(), real.max().item()
            # A hair of slack: resizing filters and float16 overshoot by rounding.
            if not (math.isfinite(low) and math.isfinite(high) and -1.001 <= low <= high <= 1.001):
                raise InputError(
                    f"real is {got} with values from {low:g} to {high:g}; scale it to [-1, 1], or "
                    "give uint8"
                )
            self._range_checked = True
        return real

    def _checked_points(self, real: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not real.is_floating_point() or real.shape[1:] != shape or len(real) == 0:
            raise InputError(
                f"real is {_described(real)}; netG makes, so netD is to see, floating "
                f"[N, {shape[0]}]"
            )
        if not self._range_checked:
            if not bool(real.isfinite().all()):
                raise InputError(f"real is {_described(real)} with values that are not finite")
            self._range_checked = True
        return real

    def _one_pass(self) -> bool:
        if self.fuse_passes is False:
            return False
        obstacle = grouping_obstacle(self.netD)
        if obstacle is None:
            return True
        if self.fuse_passes is True:
            raise InputError(f"fuse_passes=True: {obstacle}; use 'auto' or False")
        if not self._two_passes_said:
            logger.warning("D(real) and D(fake) run as two passes: %s", obstacle)
            self._two_passes_said = True
        return False

    def _seen_by_d(self, x: Tensor) -> Tensor:
        """``x`` as D is shown it."""
        x = self._diff_augment(x, self.generator)
        if self._has_instance_noise:
            x = add_noise(x, self._instance_noise, self.generator)
        return x

    def _scores(self, x: Tensor, groups: int, labels: Tensor | None) -> Tensor:
        assert self._output is not None
        classes = labels if self._conditional_d else None
        with self._output.logits():
            scores = grouped_forward(self.netD, x, groups, *_given(classes))
        _check_scores(scores, len(x))
        return scores

    def _discriminate(
        self, x: Tensor, labels: Tensor | None, kind: str, targets: Sequence[float]
    ) -> _Scored:
        """What D makes of the groups that lie in ``x``, with the loss ``kind``."""
        with self._precision.forward():
            scores = self._scores(x, len(targets), labels)
        if self._precision.low is not None:
            scores = scores.float()
        return self._judged(scores, kind, targets)

    def _judged(self, scores: Tensor, kind: str, targets: Sequence[float]) -> _Scored:
        assert self._output is not None
        if self._output.kind == "logits":
            return _Scored(*gan_loss(scores, targets, kind=kind), scores)
        losses = [
            F.binary_cross_entropy(part, torch.full_like(part, target))
            for part, target in zip(scores.chunk(len(targets)), targets, strict=True)
        ]
        means = [part.detach().mean() for part in scores.chunk(len(targets))]
        return _Scored(torch.stack(losses), torch.stack(means), scores)

    def _update_d(self, real: Tensor, fake: Tensor, batch: _Batch) -> tuple[DStats, Tensor]:
        """One update, and what is measured in it: the first three of ``_MEASURED``."""
        kind, targets = self._loss.kind_d, self._targets
        labels, fake_labels = batch.labels, batch.fake_labels
        self.netD.zero_grad()
        if batch.penalised:
            real = real.detach().to(self._dtype).requires_grad_()
        seen, fake = self._seen_by_d(real), self._seen_by_d(fake)
        if self._one_pass() and not batch.penalised:
            both = None if labels is None else torch.cat(_given(labels) + _given(fake_labels))
            scored = self._discriminate(torch.cat([seen, fake]), both, kind, targets)
            self._update_by_d.backward(scored.loss.sum())
        else:
            parts = []
            for x, classes, target in (
                (seen, labels, targets[0]),
                (fake, fake_labels, targets[1]),
            ):
                if batch.penalised and x is seen:
                    with self._twice_differentiable("r1"):
                        part = self._judged(self._scores(x, 1, classes), kind, (target,))
                        penalty = r1_penalty(part.scores, real)
                        penalty = self._r1 * self._r1_every * penalty
                        self._update_by_d.backward(part.loss.sum() + penalty)
                else:
                    part = self._discriminate(x, classes, kind, (target,))
                    self._update_by_d.backward(part.loss.sum())
                parts.append(_Scored(*(value.detach() for value in part)))
            scored = _Scored(*(torch.cat(values) for values in zip(*parts, strict=True)))
        if self._gp:
            with self._twice_differentiable("gp"):
                score = functools.partial(self._scores, groups=1, labels=labels)
                x, y = seen.detach().to(self._dtype), fake.detach().to(self._dtype)
                penalty = gradient_penalty(score, x, y, self.generator)
                self._update_by_d.backward(self._gp * penalty)
        self.reduce_gradients(self.netD.parameters())
        measured = scored.loss.detach()[:0]
        if batch.measured:
            norm = self._update_by_d.gradient_norm(self.netD.parameters())
            measured = torch.cat([self._accuracy(scored.scores.detach()), norm])
        self._update_by_d.step()
        return DStats(scored.loss.detach().sum(), scored.mean[0], scored.mean[1]), measured

    def _accuracy(self, scores: Tensor) -> Tensor:
        """The shares of real images and of samples that D takes for what they are, ``[2]``."""
        assert self._output is not None
        boundary = self._loss.boundary if self._output.kind == "logits" else 0.5
        taken_for_real = (scores.reshape(2, -1) > boundary).float().mean(dim=1)
        return torch.stack([taken_for_real[0], 1.0 - taken_for_real[1]])

    @contextlib.contextmanager
    def _twice_differentiable(self, name: str) -> Iterator[None]:
        if self.backend != "reference":
            say_once(
                f"{name}: a gradient penalty is differentiated twice, which the fused ops are not; "
                "D runs as plain PyTorch for it"
            )
        with use_backend("reference"):
            yield

    def _update_g(
        self, fake: Tensor, labels: Tensor | None, measured: bool = False
    ) -> tuple[GStats, Tensor]:
        """One update, and what is measured in it: the last of ``_MEASURED``."""
        self.netG.zero_grad()
        with _without_gradients(self.netD):
            scored = self._discriminate(
                self._seen_by_d(fake), labels, self._loss.kind_g, (self._loss.target_g,)
            )
        loss = -scored.loss.sum() if self._loss.g_maximises else scored.loss.sum()
        self._update_by_g.backward(loss)
        self.reduce_gradients(self.netG.parameters())
        norm = loss.detach().reshape(1)[:0]
        if measured:
            norm = self._update_by_g.gradient_norm(self.netG.parameters())
        self._update_by_g.step()
        if self._ema:
            self._ema.update(self.netG)
        return GStats(loss.detach(), scored.mean[0]), norm


@torch.no_grad()
def sample(netG: nn.Module, noise: Tensor, labels: Tensor | None = None) -> Tensor:
    """Images of ``netG`` in evaluation mode for ``noise [n, ...]``, some at a time.

    Of the classes ``labels [n]``, if it is conditional. The mode of each of its modules is as
    before afterwards.
    """
    parts = zip(
        noise.split(_SAMPLE_CHUNK),
        itertools.repeat(None) if labels is None else labels.split(_SAMPLE_CHUNK),
        strict=False,
    )
    with evaluation_mode(netG):
        return torch.cat([netG(z, *_given(classes)) for z, classes in parts])


def noise_shape(netG: nn.Module) -> tuple[int, ...]:
    """The shape of one ``z`` by ``netG.nz``; see ``noise`` of :class:`Engine`.

    Raises:
        InputError: ``netG`` has no integer ``nz``.
    """
    nz = getattr(netG, "nz", None)
    if not isinstance(nz, int):
        raise InputError(
            f"noise=None: netG ({type(netG).__name__}) has no integer attribute nz; give the "
            "shape of one z, such as noise=(100, 1, 1)"
        )
    weight = next((p for p in netG.parameters() if p.ndim > 1), None)
    return (nz, 1, 1) if weight is not None and weight.ndim == 4 else (nz,)


def resolve_device(device: str | torch.device, module: nn.Module | None = None) -> torch.device:
    """The device that ``device`` means here; see :class:`Engine`.

    Raises:
        InputError: there is no such device on this machine.
    """
    if device == "auto":
        first = next(module.parameters(), None) if module is not None else None
        if first is not None and first.device.type not in ("cpu", "meta"):
            return first.device
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # A tensor knows its index: cuda:0, where the request may have been cuda.
        resolved = torch.empty(0, device=device).device
        if resolved.type not in _DEVICE_TYPES:
            raise RuntimeError("it is not a device to train on")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["not usable"])[0]
        raise InputError(f"device={str(device)!r} cannot be used here: {reason}") from error
    return resolved


def _check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    if not any(value is v or (value == v and type(value) is type(v)) for v in known):
        choices = ", ".join(map(repr, known))
        raise InputError(f"{name}={value!r} is unknown; choose from {choices}")


def _n_classes(netG: nn.Module, netD: nn.Module) -> int:
    of_g, of_d = (int(getattr(net, "n_classes", 0) or 0) for net in (netG, netD))
    if of_d and of_d != of_g:
        raise InputError(
            f"netD: n_classes={of_d}, but netG's is {of_g}; both must be of the same classes"
        )
    return of_g


def _given(labels: Tensor | None) -> tuple[Tensor, ...]:
    """The arguments that follow a network's first."""
    return () if labels is None else (labels,)


def _call_with(net: nn.Module, labels: Tensor | None, x: Tensor) -> Any:
    return net(x, *_given(labels))


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _probe(name: str, call: Callable[[Tensor], Any], what: str, x: Tensor) -> Tensor:
    """``call(x)``, any failure of which is put down to the network ``name``."""
    try:
        result = call(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name} cannot take {what} {list(x.shape)}: {reason}") from error
    if not isinstance(result, Tensor):
        raise InputError(f"{name} returned a {type(result).__name__}; it must return a tensor")
    return result


def _check_scores(scores: Tensor, n: int) -> None:
    if scores.ndim == 0 or len(scores) != n:
        raise InputError(
            f"netD returned {list(scores.shape)} for {n} images; it must return [N, ...]"
        )


def _place(module: nn.Module, device: torch.device) -> nn.Module:
    module.to(device)
    if all(p.ndim != 5 for p in module.parameters()):
        module.to(memory_format=torch.channels_last)
    return module


def _adam(
    name: str, module: nn.Module, lr: float, betas: tuple[float, float], device: torch.device
) -> torch.optim.Adam:
    if not (math.isfinite(lr) and lr > 0.0):
        raise InputError(f"{name}={lr} must be a positive number")
    for beta in betas:
        if not 0.0 <= beta < 1.0:
            raise InputError(f"betas={betas} must each be at least 0 and less than 1")
    # A tensor, so that a captured step reads its present value. The CUDA kernel reads a float32;
    # on the CPU nothing need be rounded.
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    rate = torch.tensor(lr, dtype=dtype, device=device)
    return Adam(module.parameters(), lr=rate, betas=betas, fused=True, capturable=True)


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    rates = [group.get("lr") for group in optimizer.param_groups]
    # torch takes the moments of a state as they are; two engines must not share them.
    optimizer.load_state_dict(copy.deepcopy(state))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        # A captured step reads the rate where it lies: keep the tensor, take the value.
        if isinstance(rate, Tensor):
            rate.copy_(torch.as_tensor(group["lr"]))
            group["lr"] = rate


def _noise_function(
    noise: int | Sequence[int] | NoiseFunction | None,
    netG: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
) -> NoiseFunction:
    if callable(noise):
        return noise
    if noise is None:
        noise = noise_shape(netG)
    shape = (noise,) if isinstance(noise, int) else tuple(noise)
    if not shape or any(not isinstance(size, int) or size < 1 for size in shape):
        raise InputError(f"noise={noise!r} must be a shape of positive integers or a function")

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, *shape, generator=generator, device=device, dtype=dtype)

    return draw


@contextlib.contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """``module``'s parameters take no part in the graphs recorded within."""
    taken = [p for p in module.parameters() if p.requires_grad]
    for p in taken:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in taken:
            p.requires_grad_(True)
