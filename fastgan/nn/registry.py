"""Models by name, for ``--model`` and for checkpoints.

An installed package adds one by an entry point in the group ``fastgan.models``, whose name is the
model's and whose object is its builder; a program adds one by :func:`register_model`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

from torch import nn

from fastgan.errors import InputError
from fastgan.nn.dcgan import DCGANDiscriminator, DCGANGenerator

ModelBuilder = Callable[..., tuple[nn.Module, nn.Module]]

_builders: dict[str, ModelBuilder] = {}


def register_model(name: str, builder: ModelBuilder) -> None:
    """Make ``builder`` known as ``name``.

    Args:
        name: what ``--model`` and :func:`build_model` call it.
        builder: called with the keyword arguments ``nz``, ``ngf``, ``ndf``, ``nc``, ``image_size``
            (all int); returns ``(netG, netD)``.

    Raises:
        InputError: the name is taken by another builder.
    """
    if _builders.get(name, builder) is not builder:
        raise InputError(f"model {name!r} is registered already; choose another name")
    _builders[name] = builder


def model_names() -> tuple[str, ...]:
    """The registered names, sorted."""
    for entry in importlib.metadata.entry_points(group="fastgan.models"):
        if entry.name not in _builders:
            register_model(entry.name, entry.load())
    return tuple(sorted(_builders))


def build_model(
    name: str, *, nz: int, ngf: int, ndf: int, nc: int, image_size: int
) -> tuple[nn.Module, nn.Module]:
    """New ``(netG, netD)`` of the registered model ``name``, initialised from the global generator.

    Raises:
        InputError: the name is unknown, or the model does not take these sizes.
    """
    if name not in _builders and name not in model_names():
        raise InputError(f"model={name!r} is unknown; choose from {', '.join(model_names())}")
    return _builders[name](nz=nz, ngf=ngf, ndf=ndf, nc=nc, image_size=image_size)


def _build_dcgan(
    *, nz: int, ngf: int, ndf: int, nc: int, image_size: int
) -> tuple[nn.Module, nn.Module]:
    # G before D: with one seed this draws the numbers that the example draws.
    return (
        DCGANGenerator(nz, ngf, nc, image_size),
        DCGANDiscriminator(ndf, nc, image_size),
    )


register_model("dcgan", _build_dcgan)
