"""fastgan: a fast, deterministic, resumable GAN trainer.

``import fastgan`` loads nothing heavy; torch is imported when a name that needs it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastgan._version import __version__

if TYPE_CHECKING:
    from fastgan.data.images import ImageSet, load_images
    from fastgan.data.loader import Loader
    from fastgan.engine.capture import CapturedStep, capture_step
    from fastgan.engine.engine import Engine, StepStats
    from fastgan.errors import InputError, NotBuiltError, RunError
    from fastgan.metrics.health import Health, Vitals
    from fastgan.nn.accelerate import accelerate, explain
    from fastgan.nn.dcgan import DCGANDiscriminator, DCGANGenerator
    from fastgan.nn.registry import build_model, register_model
    from fastgan.ops.augment import augment
    from fastgan.ops.backend import use_backend
    from fastgan.ops.block import conv_bn_act, conv_transpose_bn_act
    from fastgan.ops.bn_act import bn_act
    from fastgan.ops.conv import conv
    from fastgan.ops.gan_loss import bce_loss, gan_loss

_HOMES = {
    "CapturedStep": "fastgan.engine.capture",
    "DCGANDiscriminator": "fastgan.nn.dcgan",
    "DCGANGenerator": "fastgan.nn.dcgan",
    "Engine": "fastgan.engine.engine",
    "Health": "fastgan.metrics.health",
    "ImageSet": "fastgan.data.images",
    "InputError": "fastgan.errors",
    "Loader": "fastgan.data.loader",
    "NotBuiltError": "fastgan.errors",
    "RunError": "fastgan.errors",
    "StepStats": "fastgan.engine.engine",
    "Vitals": "fastgan.metrics.health",
    "accelerate": "fastgan.nn.accelerate",
    "augment": "fastgan.ops.augment",
    "bce_loss": "fastgan.ops.gan_loss",
    "bn_act": "fastgan.ops.bn_act",
    "capture_step": "fastgan.engine.capture",
    "conv": "fastgan.ops.conv",
    "conv_bn_act": "fastgan.ops.block",
    "conv_transpose_bn_act": "fastgan.ops.block",
    "explain": "fastgan.nn.accelerate",
    "gan_loss": "fastgan.ops.gan_loss",
    "build_model": "fastgan.nn.registry",
    "load_images": "fastgan.data.images",
    "register_model": "fastgan.nn.registry",
    "use_backend": "fastgan.ops.backend",
}

__all__ = [
    "CapturedStep",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "Engine",
    "Health",
    "ImageSet",
    "InputError",
    "Loader",
    "NotBuiltError",
    "RunError",
    "StepStats",
    "Vitals",
    "__version__",
    "accelerate",
    "augment",
    "bce_loss",
    "bn_act",
    "build_model",
    "capture_step",
    "conv",
    "conv_bn_act",
    "conv_transpose_bn_act",
    "explain",
    "gan_loss",
    "load_images",
    "register_model",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastgan' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
