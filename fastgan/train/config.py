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

from fastgan.choices import Backend, Precision
from fastgan.errors import InputError
from fastgan.nn.sizes import split_size

DEFAULT_STEPS = 2000

OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT")]

# What a resumed run may be given anew: where it stops, what it writes, where it runs. The data may
# have moved; that they are the same is checked by their digest.
_FREE_ON_RESUME = frozenset(
    {
        *("data", "steps", "epochs", "save_every", "sample_every", "log_every", "keep"),
        *("max_bad", "workers", "backend", "device", "capture"),
    }
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; written to its ``config.yaml``.

    Attributes:
        data: Images to train on: a folder (class subfolders or not), a .zip, .npy, .npz, .h5, MNIST
            idx files, or 'digits', the embedded set of 10,000 handwritten digits.
        model: Networks to train, by their registered name.
        image_size: Side of the images, s0*2^k with s0 in 4..7, from 16 to 256. By default the power
            of two that holds the images, where the source is an array (digits: 32), else 64.
        nc: Channels: 1 (grey) or 3 (RGB). By default what the images have.
        nz: Length of the noise vector z.
        ngf: Channels of the generator's last hidden layer.
        ndf: Channels of the discriminator's first hidden layer.
        batch_size: Images in a batch.
        steps: Steps in all, each one update of D and one of G. Default: 2000, unless --epochs is
            given.
        epochs: Passes over the data in all, instead of --steps.
        lr: Learning rate of Adam.
        beta1: Adam's beta1.
        ema: Decay of the moving average of G's weights that samples are made with; 0 keeps none and
            samples with G itself.
        seed: Of weights, noise and data order. The same seed on the same machine gives the same
            run.
        flip: Mirror each image left to right with probability 1/2.
        save_every: Steps between checkpoints; the last step is always kept.
        sample_every: Steps between sample grids.
        log_every: Steps between lines of metrics.
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
    image_size: OptionalInt = None
    nc: OptionalInt = None
    nz: int = 100
    ngf: int = 64
    ndf: int = 64
    batch_size: int = 64
    steps: OptionalInt = None
    epochs: OptionalInt = None
    lr: float = 2e-4
    beta1: float = 0.5
    ema: float = 0.999
    seed: int = 0
    flip: bool = False
    save_every: int = 500
    sample_every: int = 250
    log_every: int = 10
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
        for name in ("nz", "ngf", "ndf", "batch_size", "save_every", "sample_every", "log_every"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("image_size", "nc", "steps", "epochs", "workers"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "must be at least 1")
        for name in ("lr", "beta1", "ema", "max_bad"):
            self._require(name, math.isfinite(getattr(self, name)), "must be a finite number")
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
        if self.image_size is not None and self.model == "dcgan":
            try:
                split_size(self.image_size)
            except InputError as error:
                raise InputError(f"--image-size: {error}") from None

    def steps_per_epoch(self, n_images: int) -> int:
        """Batches in a pass over ``n_images``; the last may be smaller."""
        return math.ceil(n_images / self.batch_size)

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
