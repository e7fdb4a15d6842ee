"""Models by name, for ``--model`` and for checkpoints."""

from __future__ import annotations

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
    return tuple(sorted(_builders))


def build_model(
    name: str, *, nz: int, ngf: int, ndf: int, nc: int, image_size: int
) -> tuple[nn.Module, nn.Module]:
    """New ``(netG, netD)`` of the registered model ``name``, initialised from the global generator.

    Raises:
        InputError: the name is unknown, or the model does not take these sizes.
    """
    if name not in _builders:
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
