"""Checkpoints: written whole or not at all, verified when they are read.

``step-000500/`` holds ``netG.safetensors``, ``netD.safetensors``, ``ema.safetensors`` where an
average is kept, ``state.pt`` (optimisers, generators, loader position, the run's health; tensors
and plain values only) and ``manifest.json`` (format, step, settings, the data's number of images
and names of classes, versions, thread count, and the SHA-256 of each file). It is written under a
temporary name, synced and renamed, so that a folder with the final name is complete.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastgan._version import __version__
from fastgan.data.images import ImageSet
from fastgan.engine.engine import Engine
from fastgan.errors import InputError, RunError
from fastgan.files import sync_folder, write_synced
from fastgan.nn.dcgan import DCGANGenerator
from fastgan.nn.registry import build_model
from fastgan.train.config import TrainConfig

logger = logging.getLogger("fastgan")

FORMAT = 1
_NETWORKS = ("netG", "netD", "ema")
_NAME = re.compile(r"step-(\d{6,})")


def build_networks(config: TrainConfig) -> tuple[nn.Module, nn.Module]:
    """New ``(netG, netD)`` of a run, initialised from the global generator.

    Args:
        config: with ``nc``, ``image_size`` and, if it is conditional, ``n_classes`` set.

    Raises:
        InputError: the model is unknown or does not take these sizes.
    """
    conditional = config.condition != "none"
    assert config.nc is not None and config.image_size is not None
    assert config.n_classes is not None or not conditional
    return build_model(
        config.model,
        nz=config.nz,
        ngf=config.ngf,
        ndf=config.ndf,
        nc=config.nc,
        image_size=config.image_size,
        n_classes=(config.n_classes or 0) if conditional else 0,
        condition=config.condition,
        spectral_norm=config.spectral_norm,
        **_options(config),
    )


def _options(config: TrainConfig) -> dict[str, Any]:
    """The settings that are of some models alone, where they are not the defaults."""
    options = {"extra_layers": config.extra_layers, "norm_d": config.norm_d}
    return {name: value for name, value in options.items() if value != getattr(TrainConfig, name)}


def save_checkpoint(
    folder: Path,
    engine: Engine,
    config: TrainConfig,
    data: ImageSet | None = None,
    health: Mapping[str, Any] | None = None,
) -> Path:
    """Write the state of ``engine`` to ``folder/step-NNNNNN`` and return that path.

    One that is there already for the same step is left as it is: steps are deterministic.

    Args:
        folder: the run's ``checkpoints``.
        engine: its state, and that of torch's global generators, is what is saved.
        config: the settings of the run.
        data: what it is trained on.
        health: the state of its :class:`fastgan.metrics.health.Health`.

    Raises:
        RunError: a weight is not finite.
        OSError: the disk is full or cannot be written; nothing is left behind.
    """
    target = folder / f"step-{engine.steps:06d}"
    if target.exists() and _is_whole(target):
        return target
    state = engine.state_dict()
    contents = {}
    for name in _NETWORKS:
        weights = state.pop(name)
        if weights is not None:
            _require_finite(name, weights, engine.steps)
            plain = {key: value.cpu().contiguous() for key, value in weights.items()}
            contents[f"{name}.safetensors"] = safetensors.torch.save(plain)
    # A network with dropout draws from the global generators.
    state["global_rng"] = torch.get_rng_state()
    state["health"] = dict(health) if health is not None else None
    if engine.device.type == "cuda":
        state["global_cuda_rng"] = torch.cuda.get_rng_state(engine.device)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    contents["state.pt"] = buffer.getvalue()
    manifest = {
        "format": FORMAT,
        "step": engine.steps,
        "settings": vars(config),
        "images": len(data) if data is not None else None,
        "class_names": list(data.class_names) if data is not None else [],
        "threads": torch.get_num_threads(),
        "versions": {"fastgan": __version__, "torch": str(torch.__version__)},
        "files": {name: hashlib.sha256(held).hexdigest() for name, held in contents.items()},
    }
    contents["manifest.json"] = json.dumps(manifest, indent=1).encode()
    temporary = folder / f".tmp-{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, content in contents.items():
            write_synced(temporary / name, content)
        sync_folder(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints; 0 removes none."""
    if keep:
        for path in list_checkpoints(folder)[keep:]:
            # Renamed first, so that a half-removed one never bears a checkpoint's name.
            doomed = path.with_name(f".old-{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def clean_checkpoints(folder: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    for pattern in (".tmp-step-*", ".old-step-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("step-")))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at ``path``.

    Raises:
        InputError: it is missing, damaged, or of a later format.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["format"] > FORMAT:
            raise InputError(
                f"checkpoint {str(path)!r} has format {manifest['format']}, this version reads up "
                f"to {FORMAT}; upgrade fastgan"
            )
        _ = manifest["files"]["netG.safetensors"], manifest["files"]["state.pt"]
        _ = manifest["step"], manifest["threads"], manifest["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"checkpoint {str(path)!r} is damaged: manifest.json is missing or cannot be read"
        ) from error
    return dict(manifest)


def read_settings(path: Path, manifest: Mapping[str, Any]) -> TrainConfig:
    """The settings of the run that wrote the checkpoint at ``path``.

    Raises:
        InputError: a setting is unknown, as one of a later version would be.
    """
    return TrainConfig.from_values(manifest["settings"], f"checkpoint {str(path)!r}")


def load_checkpoint(path: Path, engine: Engine) -> Mapping[str, Any] | None:
    """Put the state at ``path`` into ``engine``, once every file's checksum is right.

    Returns:
        The state of the run's health, where there is one.

    Raises:
        InputError: a file is missing or damaged, or is of other networks or data.
    """
    manifest = read_manifest(path)
    contents = {name: _read_verified(path, name, manifest) for name in manifest["files"]}
    state = _unpickle(path / "state.pt", contents["state.pt"])
    for name in _NETWORKS:
        data = contents.get(f"{name}.safetensors")
        state[name] = safetensors.torch.load(data) if data is not None else None
    try:
        torch.set_rng_state(state.pop("global_rng"))
        cuda_rng = state.pop("global_cuda_rng", None)
        if cuda_rng is not None and engine.device.type == "cuda":
            torch.cuda.set_rng_state(cuda_rng, engine.device)
        health: Mapping[str, Any] | None = state.pop("health", None)
        engine.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"checkpoint {str(path)!r} does not fit this run: {reason}") from error
    return health


def go_back(path: Path, engine: Engine) -> None:
    """Give ``engine`` the weights and optimisers at ``path``; data and noise go on from here.

    Raises:
        InputError: a file is missing or damaged.
    """
    manifest = read_manifest(path)
    before = _unpickle(path / "state.pt", _read_verified(path, "state.pt", manifest))
    state = engine.state_dict()
    for name in _NETWORKS:
        if state[name] is not None:
            file = f"{name}.safetensors"
            state[name] = safetensors.torch.load(_read_verified(path, file, manifest))
    for name in ("opt_g", "opt_d", "scale_g", "scale_d", "ema_updates"):
        state[name] = before[name]
    engine.load_state_dict(state)


def newest_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint in ``folder`` that is not damaged.

    Returns:
        Its path, None if there is none, and what is wrong with each newer one.
    """
    damaged = {}
    for path in list_checkpoints(folder):
        try:
            _verify(path)
        except InputError as error:
            damaged[path] = str(error)
        else:
            return path, damaged
    return None, damaged


def set_aside(path: Path) -> None:
    """Give the damaged checkpoint at ``path`` a name that no checkpoint has."""
    names = (f"damaged-{path.name}" + (f"-{i}" if i else "") for i in itertools.count())
    path.rename(next(p for name in names if not (p := path.with_name(name)).exists()))


def load_generator(path: Path) -> nn.Module:
    """A trained generator, on the CPU, the averaged one where there is one.

    A conditional one has the names of its classes, as far as the data had some, in
    ``class_names``.

    Args:
        path: a run folder (its newest checkpoint that is not damaged), a checkpoint folder, or a
            DCGAN generator's state dict as ``.pth``, ``.pt`` or ``.safetensors``.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if not path.exists():
        raise InputError(f"{str(path)!r} does not exist; give a run folder or a netG file")
    if path.is_file():
        return DCGANGenerator.from_state_dict(read_state_dict(path))
    return _generator_of(find_checkpoint(path))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest of a run that is not damaged.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if (path / "manifest.json").exists():
        return path
    # A run keeps them in checkpoints/, the best in best/.
    candidates = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not candidates:
        raise InputError(
            f"{str(path)!r} holds no checkpoint; give a run folder (with checkpoints/step-…), a "
            "checkpoint or a netG file"
        )
    for candidate in candidates:
        try:
            _verify(candidate)
        except InputError as error:
            logger.warning("%s; looking for an earlier one", error)
            last = error
        else:
            return candidate
    raise last


def _generator_of(path: Path) -> nn.Module:
    manifest = read_manifest(path)
    name = "ema.safetensors" if "ema.safetensors" in manifest["files"] else "netG.safetensors"
    weights = safetensors.torch.load(_read_verified(path, name, manifest))
    netG, _ = build_networks(read_settings(path, manifest))
    netG.load_state_dict(weights)
    netG.class_names = tuple(manifest.get("class_names") or ())  # type: ignore[assignment]
    return netG


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in ``path``, ``.safetensors`` or what ``torch.save`` wrote, on the CPU.

    Raises:
        InputError: the file is neither, or holds more than tensors.
    """
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise InputError(f"{str(path)!r} is not a safetensors file: {error}") from error
    state = _unpickle(path, data)
    if not isinstance(state, dict):
        raise InputError(f"{str(path)!r} holds a {type(state).__name__}, not a state dict")
    return state


def _unpickle(path: Path, data: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{str(path)!r} is not a file of tensors alone; it is not loaded, since that could run "
            "code it contains"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{str(path)!r} is not a readable torch file: {reason}") from error


def _read_verified(path: Path, name: str, manifest: dict[str, Any]) -> bytes:
    try:
        data = (path / name).read_bytes()
    except OSError as error:
        raise InputError(
            f"checkpoint {str(path)!r} is damaged: {name} cannot be read: {error.strerror}"
        ) from error
    if hashlib.sha256(data).hexdigest() != manifest["files"][name]:
        raise InputError(f"checkpoint {str(path)!r} is damaged: the checksum of {name} is wrong")
    return data


def _verify(path: Path) -> None:
    manifest = read_manifest(path)
    for name in manifest["files"]:
        _read_verified(path, name, manifest)


def _is_whole(path: Path) -> bool:
    try:
        _verify(path)
    except InputError:
        return False
    return True


def _require_finite(name: str, weights: dict[str, Tensor], step: int) -> None:
    for key, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise RunError(f"step {step}: {name}'s {key} is no longer finite")
