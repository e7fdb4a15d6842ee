"""What a training run is set to. Free of torch, so that a wrong value is refused at once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from fastgan.choices import Backend, Condition, Loss, NormD, Precision
from fastgan.errors import InputError
from fastgan.nn.sizes import split_size

DEFAULT_STEPS = 2000
DIFF_AUGMENTS = ("color", "translation", "cutout")
ACTIONS = ("lower-lr-d", "instance-noise", "roll-back")

OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]

# What a resumed run may be given anew: where it stops, what it writes, where it runs. The data may
# have moved; that they are the same is checked by their digest.
_FREE_ON_RESUME = frozenset(
    {
        *("data", "steps", "epochs", "save_every", "sample_every", "log_every", "keep"),
        *("max_bad", "workers", "backend", "device", "capture", "stop"),
    }
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; written to its ``config.yaml``.

    Attributes:
        data: Images to train on: a folder (class subfolders or not), a .zip, .npy, .npz, .h5, MNIST
            idx files, or 'digits', the embedded set of 10,000 handwritten digits.
        model: Networks to train, by their registered name: 'dcgan', 'resnet' (as SNGAN's), 'mlp',
            or one that an installed package adds.
        condition: Train on the classes of a labelled set, so that images of a class can be asked
            for. The classes join G's noise, and D's images as 'planes' or D's score by
            'projection'.
        n_classes: Classes of a conditional GAN. By default those of the data.
        image_size: Side of the images, s0*2^k with s0 in 4..7, from 16 to 256. By default the power
            of two that holds the images, where the source is an array (digits: 32), else 64.
        nc: Channels: 1 (grey) or 3 (RGB). By default what the images have.
        nz: Length of the noise vector z.
        ngf: Channels of the generator's last hidden layer.
        ndf: Channels of the discriminator's first hidden layer.
        extra_layers: Of dcgan: further convolutions, of 3x3, at each resolution of both networks.
        norm_d: Of dcgan: batch norm in the discriminator, or none, as penalties of its gradient and
            spectral norm would have it.
        spectral_norm: Spectral norm in each layer of the discriminator.
        loss: 'bce'; 'minimax'; 'lsgan'; 'hinge'; or 'wgan-gp', with a gradient penalty.
        label_smoothing: D's target for real images is less than 1 by this much; of 'bce', 'minimax'
            and 'lsgan'.
        gp: Weight of the gradient penalty of 'wgan-gp'.
        r1: Weight of the R1 penalty of D's gradient on real images; 0 is none.
        r1_every: Updates of D from one with the R1 penalty to the next.
        diff_augment: Changes of all images that D sees, which gradients pass through, for small
            sets: a comma-separated choice of color, translation, cutout.
        instance_noise: Standard deviation of noise on all images that D sees.
        batch_size: Images in a batch.
        steps: Steps in all, each one update of D and one of G. Default: 2000, unless --epochs is
            given.
        epochs: Passes over the data in all, instead of --steps.
        lr: Learning rate of Adam.
        lr_d: D's own learning rate. Default: --lr.
        beta1: Adam's beta1.
        n_d: Updates of D for each update of G.
        ema: Decay of the moving average of G's weights that samples are made with; 0 keeps none and
            samples with G itself.
        seed: Of weights, noise and data order. The same seed on the same machine gives the same
            run.
        flip: Mirror each image left to right with probability 1/2.
        save_every: Steps between checkpoints; the last step is always kept.
        sample_every: Steps between sample grids.
        log_every: Steps between lines of metrics.
        eval_every: Steps between measurements of quality: Fréchet and kernel distance, precision,
            recall, density, coverage. The best checkpoint is then kept, in best/. 0 is never.
        eval_samples: Images that are generated for each.
        features: What they are measured on: 'efficientnet-lite0', which needs no download;
            'inception', the standard network; or 'classifier', trained here on the data's labels.
        stop: End the run when D is unsure, the samples vary as real images do, and the Fréchet
            distance has stopped falling. Without it, the report says when that was.
        on_bad: What to do about a bad verdict, each time written to health.jsonl: a comma-separated
            choice of lower-lr-d, instance-noise (both where D is too strong) and roll-back (to the
            last good checkpoint, where the run collapses or diverges). By default nothing.
        keep: Checkpoints to keep, newest first; 0 keeps all.
        max_bad: Largest part of the images, 0 to 1, that may be unreadable; these are skipped and
            named.
        workers: Threads that decode images. Default: one for each CPU.
        backend: Implementation of the ops: 'auto' takes what measures fastest here.
        precision: 'fp32'; 'tf32', which rounds products to TF32, on a GPU; 'bf16'; or 'fp16', on a
            GPU. Weights and their updates are float32 in each of them.
        capture: Capture each step in a CUDA graph, where there is a GPU.
        device: 'cpu', 'cuda', 'cuda:1', ...; auto takes a GPU where there is one.
    """

    data: str = "digits"
    model: str = "dcgan"
    condition: Condition = "none"
    n_classes: OptionalInt = None
    image_size: OptionalInt = None
    nc: OptionalInt = None
    nz: int = 100
    ngf: int = 64
    ndf: int = 64
    extra_layers: int = 0
    norm_d: NormD = "batch"
    spectral_norm: bool = False
    loss: Loss = "bce"
    label_smoothing: float = 0.0
    gp: float = 10.0
    r1: float = 0.0
    r1_every: int = 16
    diff_augment: str = ""
    instance_noise: float = 0.0
    batch_size: int = 64
    steps: OptionalInt = None
    epochs: OptionalInt = None
    lr: float = 2e-4
    lr_d: OptionalFloat = None
    beta1: float = 0.5
    n_d: int = 1
    ema: float = 0.999
    seed: int = 0
    flip: bool = False
    save_every: int = 500
    sample_every: int = 250
    log_every: int = 10
    eval_every: int = 0
    eval_samples: int = 2000
    features: str = "efficientnet-lite0"
    stop: bool = False
    on_bad: str = ""
    keep: int = 3
    max_bad: float = 0.01
    workers: OptionalInt = None
    backend: Backend = "auto"
    precision: Precision = "fp32"
    capture: bool = True
    device: str = "auto"

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            InputError: names the flag, its value and what it takes.
        """
        for name in (
            *("nz", "ngf", "ndf", "batch_size", "save_every", "sample_every", "log_every"),
            *("n_d", "r1_every"),
        ):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("image_size", "nc", "steps", "epochs", "workers", "n_classes"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "must be at least 1")
        for name in ("lr", "beta1", "ema", "max_bad", "gp", "r1", "instance_noise"):
            self._require(name, math.isfinite(getattr(self, name)), "must be a finite number")
        for name in ("extra_layers", "gp", "r1", "instance_noise", "eval_every"):
            self._require(name, getattr(self, name) >= 0, "must be at least 0")
        self._require(
            "lr_d",
            self.lr_d is None or 0.0 < self.lr_d < math.inf,
            "must be a finite number greater than 0",
        )
        self._require(
            "label_smoothing",
            0.0 <= self.label_smoothing < 0.5,
            "must be at least 0 and less than 0.5",
        )
        if self.label_smoothing and self.loss in ("hinge", "wgan-gp"):
            raise InputError(
                f"--label-smoothing {self.label_smoothing}: --loss {self.loss} has no target to "
                "smooth; use 0"
            )
        self._require("eval_samples", self.eval_samples >= 10, "must be at least 10")
        if self.stop and not self.eval_every:
            raise InputError("--stop needs --eval-every, which measures what it goes by")
        self.choices("diff_augment", DIFF_AUGMENTS)
        self.choices("on_bad", ACTIONS)
        self._require("nc", self.nc in (None, 1, 3), "must be 1 (grey) or 3 (RGB)")
        self._require("lr", self.lr > 0.0, "must be greater than 0")
        self._require("beta1", 0.0 <= self.beta1 < 1.0, "must be at least 0 and less than 1")
        self._require("ema", 0.0 <= self.ema < 1.0, "must be at least 0 and less than 1")
        self._require("max_bad", 0.0 <= self.max_bad <= 1.0, "must be from 0 to 1")
        self._require("keep", self.keep >= 0, "must be at least 0")
        self._require("seed", 0 <= self.seed < 2**63, "must be from 0 to 2^63 - 1")
        self._require("data", bool(self.data), "must name images")
        if self.steps is not None and self.epochs is not None:
            raise InputError(
                f"--steps {self.steps} and --epochs {self.epochs}: give one of the two"
            )
        if self.image_size is not None and self.model in ("dcgan", "resnet"):
            try:
                split_size(self.image_size)
            except InputError as error:
                raise InputError(f"--image-size: {error}") from None

    def choices(self, name: str, known: tuple[str, ...]) -> tuple[str, ...]:
        """The comma-separated values of the setting ``name``.

        Raises:
            InputError: one is not among ``known``.
        """
        chosen = tuple(part.strip() for part in getattr(self, name).split(",") if part.strip())
        for value in chosen:
            if value not in known:
                raise InputError(f"{_flag(name)}: {value!r} is not one of {', '.join(known)}")
        return chosen

    def steps_per_epoch(self, n_images: int) -> int:
        """Steps in a pass over ``n_images``; the last batch may be smaller."""
        return math.ceil(math.ceil(n_images / self.batch_size) / self.n_d)

    def total_steps(self, n_images: int) -> int:
        """The step at which the run ends, for a set of ``n_images``."""
        if self.epochs is not None:
            return self.epochs * self.steps_per_epoch(n_images)
        return DEFAULT_STEPS if self.steps is None else self.steps

    def check_resume(self, stored: TrainConfig) -> None:
        """Refuse to go on with a run set to ``stored`` where that would make it another run.

        Raises:
            InputError: names the flags that differ.
        """
        differing = [
            f"{_flag(field.name)} {getattr(self, field.name)} (the run has "
            f"{getattr(stored, field.name)})"
            for field in dataclasses.fields(TrainConfig)
            if field.name not in _FREE_ON_RESUME
            and getattr(self, field.name) != getattr(stored, field.name)
        ]
        if differing:
            raise InputError(
                f"--resume continues a run exactly; {', '.join(differing)} would change it: leave "
                "that out, or start a new run with another --out"
            )

    def to_yaml(self) -> str:
        """The settings, one a line."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig)}
        return str(yaml.safe_dump(values, sort_keys=False))

    @classmethod
    def from_yaml(cls, path: Path) -> TrainConfig:
        """The settings in ``path``; those it leaves out have their defaults.

        Raises:
            InputError: the file cannot be read, or holds an unknown name or a value of the wrong
                type.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise InputError(f"--config {str(path)!r} cannot be read: {reason}") from error
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"--config {str(path)!r} is not YAML: {reason}") from error
        return cls.from_values({} if values is None else values, f"--config {str(path)!r}")

    @classmethod
    def from_values(cls, values: object, where: str) -> TrainConfig:
        """The settings in ``values``, name to value; those left out have their defaults.

        Raises:
            InputError: begins with ``where`` and says which name or value is wrong.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"{where} must hold lines of 'name: value'")
        hints = typing.get_type_hints(cls)
        known = {}
        for name, value in values.items():
            if name not in hints:
                near = difflib.get_close_matches(str(name), hints, 1)
                meant = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(hints)}"
                raise InputError(f"{where}: unknown setting {name!r}{meant}")
            known[name] = _convert(where, name, value, hints[name])
        return cls(**known)

    def _require(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise InputError(f"{_flag(name)} {getattr(self, name)} {wanted}")


def default_out(config: TrainConfig) -> Path:
    """The run folder of a run that was given none: ``runs/<stem of the data>``."""
    return Path("runs") / (Path(config.data).resolve().stem or "run")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _convert(where: str, name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint``; YAML reads ``2e-4`` as a string and ``1`` as an int."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif option is float and not isinstance(value, bool):
            try:
                return float(value)
            except (TypeError, ValueError):
                continue
        elif option is not type(None) and type(value) is option:
            return value
    names = " or ".join(
        repr(list(typing.get_args(o)))
        if typing.get_origin(o) is typing.Literal
        else getattr(o, "__name__", str(o))
        for o in options
        if o is not type(None)
    )
    raise InputError(f"{where}: {name}: {value!r} is not of type {names}")
