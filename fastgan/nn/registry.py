"""Models by name, for ``--model`` and for checkpoints.

An installed package adds one by an entry point in the group ``fastgan.models``, whose name is the
model's and whose object is its builder; a program adds one by :func:`register_model`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fastgan.choices import NormD
from fastgan.errors import InputError
from fastgan.nn.conditional import ConditionalGenerator, LabelPlanes, Projection
from fastgan.nn.dcgan import DCGANDiscriminator, DCGANGenerator
from fastgan.nn.mlp import MLPDiscriminator, MLPGenerator
from fastgan.nn.resnet import ResNetDiscriminator, ResNetGenerator
from fastgan.nn.sizes import require_positive
from fastgan.nn.spectral import apply_spectral_norm

ModelBuilder = Callable[..., tuple[nn.Module, nn.Module]]

_LONGEST_EMBEDDING = 50
_LARGEST_MLP_IMAGE = 256

_builders: dict[str, ModelBuilder] = {}
_options: dict[str, tuple[str, ...]] = {}


def register_model(name: str, builder: ModelBuilder, options: Sequence[str] = ()) -> None:
    """Make ``builder`` known as ``name``.

    Args:
        name: what ``--model`` and :func:`build_model` call it.
        builder: called with the keyword arguments ``nz``, ``ngf``, ``ndf``, ``nc``, ``image_size``
            (all int), and those of the ``options`` that are given; returns ``(netG, netD)``. For a
            conditional GAN ``nz`` and ``nc`` are what the networks within the wrappers take.
        options: keyword arguments that it may be given besides.

    Raises:
        InputError: the name is taken by another builder.
    """
    if _builders.get(name, builder) is not builder:
        raise InputError(f"model {name!r} is registered already; choose another name")
    _builders[name], _options[name] = builder, tuple(options)


def model_names() -> tuple[str, ...]:
    """The registered names, sorted."""
    for entry in importlib.metadata.entry_points(group="fastgan.models"):
        if entry.name not in _builders:
            register_model(entry.name, entry.load())
    return tuple(sorted(_builders))


def build_model(
    name: str,
    *,
    nz: int,
    ngf: int,
    ndf: int,
    nc: int,
    image_size: int,
    n_classes: int = 0,
    condition: str = "planes",
    spectral_norm: bool = False,
    **options: Any,
) -> tuple[nn.Module, nn.Module]:
    """New ``(netG, netD)`` of the registered model ``name``, initialised from the global generator.

    Args:
        name: ``dcgan``, ``mlp``, ``resnet`` or what :func:`register_model` was given.
        nz: length of the noise vector ``z``, without what a class adds to it.
        ngf, ndf: widths of the two networks.
        nc: channels of the images.
        image_size: their side.
        n_classes: of a conditional GAN; 0 makes one that is not. ``netG(z, labels)`` has an
            embedding of ``min(n_classes, 50)`` numbers for each class, as long as may be needed and
            no longer than the noise usually is.
        condition: how ``netD(x, labels)`` sees the classes: ``planes``
            (:class:`~fastgan.nn.conditional.LabelPlanes`) or ``projection``
            (:class:`~fastgan.nn.conditional.Projection`).
        spectral_norm: see :func:`~fastgan.nn.spectral.apply_spectral_norm`; of ``netD``.
        options: what the model takes besides: ``extra_layers`` and ``norm_d`` (``norm`` of
            :class:`~fastgan.nn.dcgan.DCGANDiscriminator`) of ``dcgan``.

    Raises:
        InputError: the name or an option is unknown, the model does not take these sizes, or
            ``condition`` is not what ``netD`` can have.
    """
    if name not in _builders and name not in model_names():
        raise InputError(f"model={name!r} is unknown; choose from {', '.join(model_names())}")
    for option, value in options.items():
        if option not in _options[name]:
            raise InputError(
                f"{option}={value!r}: model {name!r} takes "
                f"{', '.join(_options[name]) or 'no options'}; leave it out"
            )
    if n_classes < 0:
        raise InputError(f"n_classes={n_classes} must be at least 0")
    if n_classes and condition not in ("planes", "projection"):
        raise InputError(f"condition={condition!r}: choose from planes, projection")

    def build(nz: int, nc: int) -> tuple[nn.Module, nn.Module]:
        sizes = {"nz": nz, "ngf": ngf, "ndf": ndf, "nc": nc, "image_size": image_size}
        return _builders[name](**sizes, **options)

    if n_classes:
        embed_dim = min(n_classes, _LONGEST_EMBEDDING)
        inner_g, inner_d = build(nz + embed_dim, nc)
        if condition == "planes":
            # A builder has one nc for both networks.
            _, inner_d = build(nz, nc + 1)
        netG: nn.Module = ConditionalGenerator(inner_g, n_classes, nz, embed_dim)
        netD: nn.Module = (
            LabelPlanes(inner_d, n_classes, image_size)
            if condition == "planes"
            else Projection(inner_d, n_classes)
        )
    else:
        netG, netD = build(nz, nc)
    return netG, apply_spectral_norm(netD) if spectral_norm else netD


def _build_dcgan(
    *,
    nz: int,
    ngf: int,
    ndf: int,
    nc: int,
    image_size: int,
    extra_layers: int = 0,
    norm_d: NormD = "batch",
) -> tuple[nn.Module, nn.Module]:
    # G before D: with one seed this draws the numbers that the example draws.
    return (
        DCGANGenerator(nz, ngf, nc, image_size, extra_layers),
        DCGANDiscriminator(ndf, nc, image_size, extra_layers, norm_d),
    )


def _build_resnet(
    *, nz: int, ngf: int, ndf: int, nc: int, image_size: int
) -> tuple[nn.Module, nn.Module]:
    return ResNetGenerator(nz, ngf, nc, image_size), ResNetDiscriminator(ndf, nc, image_size)


def _build_mlp(
    *, nz: int, ngf: int, ndf: int, nc: int, image_size: int
) -> tuple[nn.Module, nn.Module]:
    """With ``ngf = ndf = 64``, hidden layers of 256, 512 and 1024 in G and of 512 and 256 in D."""
    require_positive(ngf=ngf, ndf=ndf, nc=nc)
    if not 1 <= image_size <= _LARGEST_MLP_IMAGE:
        raise InputError(f"image_size={image_size} must be from 1 to {_LARGEST_MLP_IMAGE}")
    shape = (nc, image_size, image_size)
    return (
        MLPGenerator(nz, (4 * ngf, 8 * ngf, 16 * ngf), shape),
        MLPDiscriminator(shape, (8 * ndf, 4 * ndf)),
    )


register_model("dcgan", _build_dcgan, ("extra_layers", "norm_d"))
register_model("mlp", _build_mlp)
register_model("resnet", _build_resnet)
