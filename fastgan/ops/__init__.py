"""The numerical building blocks, one file an op: formula, reference, public function."""

from fastgan.ops.augment import augment
from fastgan.ops.backend import resolve_backend, unsupported_reasons
from fastgan.ops.bn_act import bn_act
from fastgan.ops.gan_loss import bce_loss, gan_loss

__all__ = ["augment", "bce_loss", "bn_act", "gan_loss", "resolve_backend", "unsupported_reasons"]
