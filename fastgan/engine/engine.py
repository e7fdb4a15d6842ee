"""The alternating step of ``pytorch/examples/dcgan``, and the state that it carries.

One step updates D on real images and on G(z).detach(), then G through the updated D, on the same
G(z). Two things are done otherwise than in the example, with the same result:

- where it is known to be the same, D(real) and D(fake) are one pass over both batches, in which
  each keeps its own batch statistics (``fuse_passes``);
- D's parameters get no gradient in G's update, where the example computes and discards it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
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
from fastgan.engine.precision import Precision
from fastgan.errors import InputError, NotBuiltError
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
from fastgan.seeding import generator

logger = logging.getLogger("fastgan")

NoiseFunction = Callable[[int, torch.Generator], Tensor]

REAL, FAKE = 1.0, 0.0
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


class _Batch(NamedTuple):
    """What a batch of real images is made from, ``drawn`` by the loader or handed in."""

    drawn: bool
    source: Tensor
    flips: Tensor | None


class Engine:
    """Trains ``netG`` against ``netD``.

    Both networks are moved, in place, to the device and to ``torch.channels_last``.

    Args:
        netG: noise ``[N, ...]`` to images ``[N, C, H, W]`` in [-1, 1].
        netD: images to scores ``[N, ...]``; see ``d_output``.
        loss: ``bce``.
        opt_g, opt_d: optimisers, taken as they are; by default fused Adam with ``lr``, ``betas``.
        lr: learning rate of both default optimisers; ``lr_d``, if given, of D's.
        betas: of the default optimisers.
        n_d: updates of D for each update of G.
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
        history: what the last steps measured.

    Raises:
        InputError: an argument that cannot be used.
        NotBuiltError: a documented value that this version does not have.
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
        _check_choice("loss", loss, ("bce",), get_args(Loss))
        _check_choice("precision", precision, get_args(PrecisionName))
        _check_choice("capture", capture, ("auto", True, False))
        _check_choice("d_output", d_output, get_args(DOutput))
        _check_choice("fuse_passes", fuse_passes, ("auto", True, False))
        if n_d < 1:
            raise InputError(f"n_d={n_d} must be at least 1")
        if not 0.0 <= ema < 1.0:
            raise InputError(f"ema={ema} must be at least 0 (none) and less than 1")
        self.loss = loss
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
        self._ema = ExponentialMovingAverage(netG, ema) if ema else None
        self.seed = seed
        self.generator = torch.Generator(self.device)
        # Sampling has its own: looking at a GAN does not change its training.
        self._sample_generator = torch.Generator(self.device)
        self._seed_generators(0)
        self.steps = 0
        self.history = History(StepStats._fields, self.device)
        self._requested_output = d_output
        self._output: DiscriminatorOutput | None = None
        self._image_shape: tuple[int, ...] | None = None
        self._range_checked = False
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
        noise = (self.draw_noise(64, draw) for _ in range(8))
        with self._running():
            self._ema.calibrate(noise)
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
            labels, fake_labels: for conditional GANs, which this version does not have.
            noise: ``[n_d·N, ...]``; None draws it.

        Raises:
            InputError: a batch of the wrong dtype, range (looked at in the first batch only),
                size or channel count; no batch and no loader.
            NotBuiltError: labels were given.
        """
        _refuse_labels(labels=labels, fake_labels=fake_labels)
        zs = [None] * self.n_d if noise is None else self._split("noise", noise)
        args: list[Any] = []
        with self._running():
            for batch, z in zip(self._batches(real), zs, strict=True):
                _check_noise(z, len(batch.source))
                args += [*batch, z]
            row = self._captured("step", *args)
        self.steps += 1
        self._age_average()
        return StepStats(*row.unbind())

    def d_step(
        self,
        real: Tensor,
        labels: Tensor | None = None,
        noise: Tensor | None = None,
        fake_labels: Tensor | None = None,
    ) -> DStats:
        """One update of D on ``real [N, ...]`` and on as many fresh samples of G."""
        _refuse_labels(labels=labels, fake_labels=fake_labels)
        with self._running():
            batch = _Batch(False, self._checked(real), None)
            _check_noise(noise, len(batch.source))
            return DStats(*self._captured("d_step", *batch, noise).unbind())

    def g_step(
        self, n: int | None = None, noise: Tensor | None = None, fake_labels: Tensor | None = None
    ) -> GStats:
        """One update of G on ``n`` fresh samples, or on those that ``noise [n, ...]`` gives."""
        _refuse_labels(fake_labels=fake_labels)
        if (n is None) == (noise is None):
            raise InputError(
                f"g_step: give either n or noise, not {'neither' if n is None else 'both'}"
            )
        count = len(noise) if noise is not None else int(n or 0)
        if count < 1:
            raise InputError(f"n={count} must be at least 1")
        with self._running():
            self._prepare_networks()
            row = self._captured("g_step", count, noise)
        self._age_average()
        return GStats(*row.unbind())

    @torch.no_grad()
    def sample(self, n: int, noise: Tensor | None = None, ema: bool = True) -> Tensor:
        """``n`` images of the generator in evaluation mode, ``[n, C, H, W]`` in [-1, 1].

        Leaves the training as it was: the noise comes from a generator kept for sampling.

        Args:
            n: how many.
            noise: ``[n, ...]``; None draws it.
            ema: use the averaged generator where there is one.
        """
        if n < 1:
            raise InputError(f"n={n} must be at least 1")
        if noise is None:
            noise = self.draw_noise(n, self._sample_generator)
        if len(noise) != n:
            raise InputError(f"noise has {len(noise)} rows; n={n} samples need as many")
        averaged = self.ema_module if ema else None
        with self._running():
            return sample(averaged or self.netG, noise.to(self.device, self._dtype))

    def draw_noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Noise ``[n, ...]`` for ``netG`` from ``generator``, which is on the engine's device."""
        return self._noise(n, generator).to(self.device, self._dtype)

    def reduce_gradients(self, params: Iterable[nn.Parameter]) -> None:
        """Called with the parameters of the network about to be updated, gradients in place.

        Does nothing; override it to accumulate or to all-reduce. With ``precision="fp16"`` the
        gradients are multiplied by the loss scale; see ``capture`` for when it runs.
        """

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

    def _batches(self, real: Tensor | None) -> Iterator[_Batch]:
        """What each of the ``n_d`` batches is made from; the host's part of a step."""
        if real is not None:
            for part in self._split("real", real):
                yield _Batch(False, self._checked(part), None)
        elif self._loader is None:
            raise InputError("real: no batch was given and no loader is attached")
        elif isinstance(self._loader, DrawnSource):
            for _ in range(self.n_d):
                source, flips, _ = self._loader.draw()
                if not self._loader_checked:
                    self._checked(self._loader.images(source, flips, self._image_dtype))
                    self._loader_checked = True
                yield _Batch(True, source, flips)
        else:
            for _ in range(self.n_d):
                yield _Batch(False, self._checked(self._loader.next_batch()[0]), None)

    def _split(self, name: str, batch: Tensor) -> Sequence[Tensor]:
        if len(batch) == 0 or len(batch) % self.n_d:
            raise InputError(
                f"{name}: a batch of {len(batch)} cannot be cut into n_d={self.n_d} equal parts"
            )
        return batch.chunk(self.n_d)

    def _run(self, kind: str, *args: Any) -> Tensor:
        """The device's part of ``step``, ``d_step`` or ``g_step``: all that is captured.

        Args:
            args: of ``g_step`` the number of samples and their noise; of the others the three
                values of a :class:`_Batch` and its noise, for each batch.

        Returns:
            What it measured, as one tensor in the order of its statistics.
        """
        if kind == "g_step":
            return torch.stack(self._update_g(self._fake(*args)))
        batches = [args[i : i + 4] for i in range(0, len(args), 4)]
        for i, (drawn, source, flips, z) in enumerate(batches):
            real = self._images(drawn, source, flips)
            # Only the last fake batch of a step goes on to update G.
            goes_on = kind == "step" and i == len(batches) - 1
            with contextlib.nullcontext() if goes_on else torch.no_grad():
                fake = self._fake(len(real), z)
            of_d = self._update_d(real, fake.detach())
        if kind == "d_step":
            return torch.stack(of_d)
        of_g = self._update_g(fake)
        row = torch.stack((of_d.loss_d, of_g.loss_g, of_d.d_real, of_d.d_fake, of_g.d_fake_g))
        self.history.add(row)
        return row

    def _images(self, drawn: bool, source: Tensor, flips: Tensor | None) -> Tensor:
        """A batch as floating ``[N, C, H, W]`` in [-1, 1] on the device."""
        if drawn:
            assert isinstance(self._loader, DrawnSource)
            return self._loader.images(source, flips, self._image_dtype)
        if source.dtype == torch.uint8:
            return augment(source, dtype=self._image_dtype)
        return source.to(self._image_dtype, memory_format=torch.channels_last)

    def _fake(self, n: int, noise: Tensor | None) -> Tensor:
        z = self.draw_noise(n, self.generator) if noise is None else noise
        with self._precision.forward():
            return self.netG(z.to(self._dtype))

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
                images = _probe("netG", functools.partial(sample, self.netG), "noise", z)
                if images.ndim != 4 or len(images) != 2:
                    raise InputError(
                        f"netG returned {list(images.shape)} for 2 samples; it must return "
                        "[N, C, H, W]"
                    )
                with torch.no_grad():
                    scores = _probe("netD", self.netD, "netG's images", images)
                _check_scores(scores, 2)
                self._output = DiscriminatorOutput(self.netD, images, self._requested_output)
            self._image_shape = tuple(images.shape[1:])
        return self._image_shape

    def _checked(self, real: Tensor) -> Tensor:
        """``real``, uint8 ``[N, H, W, C]`` or floating ``[N, C, H, W]``, where it is neither."""
        c, h, w = self._prepare_networks()
        got = f"{str(real.dtype).removeprefix('torch.')} {list(real.shape)}"
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

    def _discriminate(self, x: Tensor, targets: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Loss ``[groups]`` and mean D(x) ``[groups]`` of the groups that lie in ``x``."""
        assert self._output is not None
        with self._output.logits(), self._precision.forward():
            scores = grouped_forward(self.netD, x, len(targets))
        _check_scores(scores, len(x))
        if self._precision.low is not None:
            scores = scores.float()
        if self._output.kind == "logits":
            return gan_loss(scores, targets, kind=self.loss)
        losses = [
            F.binary_cross_entropy(part, torch.full_like(part, target))
            for part, target in zip(scores.chunk(len(targets)), targets, strict=True)
        ]
        return torch.stack(losses), torch.stack(
            [part.detach().mean() for part in scores.chunk(len(targets))]
        )

    def _update_d(self, real: Tensor, fake: Tensor) -> DStats:
        self.netD.zero_grad()
        if self._one_pass():
            loss, d = self._discriminate(torch.cat([real, fake]), (REAL, FAKE))
            self._update_by_d.backward(loss.sum())
        else:
            losses, means = [], []
            for batch, target in ((real, REAL), (fake, FAKE)):
                part, mean = self._discriminate(batch, (target,))
                self._update_by_d.backward(part.sum())
                losses.append(part)
                means.append(mean)
            loss, d = torch.cat(losses), torch.cat(means)
        self.reduce_gradients(self.netD.parameters())
        self._update_by_d.step()
        return DStats(loss.detach().sum(), d[0], d[1])

    def _update_g(self, fake: Tensor) -> GStats:
        self.netG.zero_grad()
        with _without_gradients(self.netD):
            loss, d = self._discriminate(fake, (REAL,))
        self._update_by_g.backward(loss.sum())
        self.reduce_gradients(self.netG.parameters())
        self._update_by_g.step()
        if self._ema:
            self._ema.update(self.netG)
        return GStats(loss.detach().sum(), d[0])


@torch.no_grad()
def sample(netG: nn.Module, noise: Tensor) -> Tensor:
    """Images of ``netG`` in evaluation mode for ``noise [n, ...]``, some at a time.

    The mode of each of its modules is as before afterwards.
    """
    with evaluation_mode(netG):
        return torch.cat([netG(z) for z in noise.split(_SAMPLE_CHUNK)])


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


def _check_choice(
    name: str, value: object, built: tuple[object, ...], known: tuple[object, ...] = ()
) -> None:
    if any(value is v or (value == v and type(value) is type(v)) for v in built):
        return
    choices = ", ".join(map(repr, built))
    if value in known:
        raise NotBuiltError(f"{name}={value!r} is not built yet; this version has {choices}")
    raise InputError(f"{name}={value!r} is unknown; choose from {choices}")


def _refuse_labels(**labels: Tensor | None) -> None:
    for name, value in labels.items():
        if value is not None:
            raise NotBuiltError(f"{name}: conditional GANs are not built yet; pass {name}=None")


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


def _check_noise(noise: Tensor | None, n: int) -> None:
    if noise is not None and len(noise) != n:
        raise InputError(f"noise has {len(noise)} rows; {n} real images need as many")


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
