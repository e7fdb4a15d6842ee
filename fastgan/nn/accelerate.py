"""Any module's convolutions, batch norms and activations as fused blocks, and back.

A module is accelerated by its class: that of each part whose runs can be found becomes a subclass
with another ``forward``, which is a function of the original class and of :class:`_Recipe` alone.
The part itself stays what it was: children, parameters, names, what it prints. A copy or a pickle
is of that class too, and an accelerated module is given back by its class.
"""

from __future__ import annotations

import abc
import functools
import itertools
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from torch import nn

from fastgan.errors import InputError
from fastgan.nn.blocks import (
    ACTIVATION_MODULES,
    CONVOLUTIONS,
    Activation,
    Block,
    Part,
    altered,
    convolution_obstacle,
    split_blocks,
)
from fastgan.nn.dcgan import DCGANDiscriminator, DCGANGenerator
from fastgan.nn.grouped import sequence_forward
from fastgan.nn.resnet import ResNetDiscriminator, ResNetGenerator
from fastgan.nn.tracing import CONTAINERS, Trace, UntraceableError, trace
from fastgan.saying import say_once

Module = TypeVar("Module", bound=nn.Module)

FUSED, WOULD_FUSE, LEFT_ALONE = "fused", "would fuse", "left alone"

_OWN_FORWARDS = (
    *(DCGANGenerator.forward, DCGANDiscriminator.forward),
    *(ResNetGenerator.forward, ResNetDiscriminator.forward),
)


class Row(NamedTuple):
    """One convolution, and what runs with it.

    Attributes:
        path: the name that the module has in ``named_modules()``.
        modules: the run, ``Conv2d + BatchNorm2d + relu``; functions are in lower case.
        status: ``fused``; ``would fuse``, by :func:`accelerate`; or ``left alone``.
        reason: why it is left alone, or why the run is not longer; may be empty.
    """

    path: str
    modules: str
    status: str
    reason: str


class Explanation(list[Row]):
    """The rows of :func:`explain`; ``str()`` is a table of them."""

    def __str__(self) -> str:
        table = [("convolution", "runs as", "status", "reason"), *self]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        return "\n".join(
            "  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in table
        )


class _Recipe(NamedTuple):
    """What a class of accelerated modules is made of.

    Attributes:
        original: the class that they had.
        trace: of their forward; None where that is ``nn.Sequential``'s.
    """

    original: type[nn.Module]
    trace: Trace | None


def accelerate(module: Module, *, undo: bool = False) -> Module:
    """Run the blocks in ``module`` fused: convolution, batch norm or none, activation or none.

    They are looked for in each ``nn.Sequential`` that keeps its forward, and by torch.fx in each
    module with a forward of its own and convolutions for children. The numbers stay the same but
    for rounding; parameters, names and state dicts stay the same entirely. What a block may be is
    looked at again in each call: a run with hooks, parametrized or replaced modules runs as it is.
    So does a traced module whose attributes or children have changed since. What a traced forward
    does besides computing, print or count in a global, it does once. :func:`explain` lists what is
    fused, and what is not, and why.

    Weights keep their memory format, which the moments of an optimiser and the buckets of
    ``DistributedDataParallel`` have too; ``module.to(memory_format=torch.channels_last)``, before
    either is made, saves the kernels a copy of each. What a block returns is laid out as PyTorch
    would have done, but for hooks within. Autograd refuses in-place operations on the result of a
    convolution that ends in ``LeakyReLU`` without batch norm, as it does after ``ReLU`` or ``Tanh``
    in PyTorch. There are no second derivatives but on the ``reference`` backend.

    Args:
        module: changed in place. Accelerated parts stay as they are, if they are up to date.
        undo: give the parts their classes back.

    Returns:
        ``module``.

    Raises:
        InputError: ``module`` is not an ``nn.Module``.

    Example::

        netG, netD = fastgan.accelerate(Generator()), fastgan.accelerate(Discriminator())
        print(fastgan.explain(netD))
    """
    for _, part, own in _parts(module):
        recipe = _recipe(part)
        # What has made a class of its own of the accelerated one since keeps it.
        if recipe and (undo or _staleness(part)) and type(part) is _fused_class(recipe):
            part.__class__ = recipe.original
            recipe = None
        if not (undo or own or recipe):
            _accelerate_part(part)
    return module


def explain(module: nn.Module) -> Explanation:
    """What of ``module`` runs in fused blocks, or would after :func:`accelerate`, and what not.

    Args:
        module: accelerated or not; left as it is.

    Returns:
        A :class:`Row` for each convolution, in the order of the modules. ``print`` it for a table.

    Raises:
        InputError: ``module`` is not an ``nn.Module``.

    Example::

        >>> print(fastgan.explain(torchvision.models.resnet18()))
    """
    rows = [row for path, part, own in _parts(module) for row in _rows(path, part, own)]
    order = {path: i for i, (path, _) in enumerate(module.named_modules(remove_duplicate=False))}
    return Explanation(sorted(rows, key=lambda row: order[row.path]))


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """The modules in ``module``: path, module, and whether a network of fastgan's runs it."""
    if not isinstance(module, nn.Module):
        raise InputError(f"module={module!r:.60} is not an nn.Module; give the network itself")
    own = {
        id(part)
        for net in module.modules()
        if type(net).forward in _OWN_FORWARDS
        for part in net.modules()
    }
    for path, part in list(module.named_modules()):
        yield path, part, id(part) in own


def _accelerate_part(part: nn.Module) -> None:
    if not _convolutions(part):
        return
    try:
        found = _find_trace(part)
    except UntraceableError:
        return
    split = (block for chain in _chains(part, found) for _, block in _split(part, chain))
    if any(isinstance(block, Block) for block in split):
        part.__class__ = _fused_class(_Recipe(type(part), found))


def _find_trace(part: nn.Module) -> Trace | None:
    """The trace of ``part``'s forward; None where it is ``nn.Sequential``'s.

    Raises:
        UntraceableError: it is neither.
    """
    cls = type(part)
    if "forward" in vars(part):
        raise UntraceableError("its parent has its forward replaced")
    if cls.forward is nn.Module.forward:
        raise UntraceableError(f"its parent {cls.__name__} has no forward")
    if type(cls) not in (type, abc.ABCMeta) or any(
        "__init_subclass__" in vars(base) for base in cls.__mro__ if base not in (object, Generic)
    ):
        raise UntraceableError(f"its parent's class {cls.__name__} is told of subclasses")
    if cls.forward is nn.Sequential.forward:
        return None
    if cls.__module__.partition(".")[0] == "torch":
        raise UntraceableError(f"its parent is PyTorch's own {cls.__name__}")
    return trace(part)


@functools.cache
def _fused_class(recipe: _Recipe) -> type[nn.Module]:
    original, traced = recipe

    def reduce(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = super(cls, self).__reduce_ex__(protocol)
        make, args, *rest = reduced
        # The class cannot be imported. What it is made of can be.
        args = tuple(original if arg is cls else arg for arg in args)
        return _remake, (recipe, make, args), *rest

    body = {
        **{name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")},
        "_fastgan_recipe": recipe,
        "__reduce_ex__": reduce,
        "forward": _traced_forward(original, traced) if traced else sequence_forward,
    }
    metaclass: Any = type(original)
    cls: type[nn.Module] = metaclass(original.__name__, (original,), body)
    return cls


def _traced_forward(original: type[nn.Module], traced: Trace) -> Any:
    namespace: dict[str, Any] = {}
    exec(compile(traced.source, f"<accelerated {original.__qualname__}>", "exec"), namespace)
    fused, plain = namespace["forward"], original.forward

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not traced.takes(args, kwargs):
            return plain(self, *args, **kwargs)
        change = traced.change(self)
        if change is None:
            return fused(self, *args, **kwargs)
        say_once(f"{original.__name__} runs as it is: {change} since fastgan.accelerate")
        return plain(self, *args, **kwargs)

    return forward


def _remake(recipe: _Recipe, make: Any, args: tuple[Any, ...]) -> nn.Module:
    module: nn.Module = make(*args)
    if type(module) is recipe.original:
        module.__class__ = _fused_class(recipe)
    return module


def _recipe(part: nn.Module) -> _Recipe | None:
    return getattr(type(part), "_fastgan_recipe", None)


def _staleness(part: nn.Module) -> str | None:
    """What has changed about the accelerated ``part`` that its forward was made for."""
    recipe = _recipe(part)
    return recipe.trace.change(part) if recipe and recipe.trace else None


def _chains(part: nn.Module, found: Trace | None) -> tuple[tuple[str | Activation, ...], ...]:
    return (tuple(part._modules),) if found is None else found.chains


def _split(
    part: nn.Module, chain: tuple[str | Activation, ...], *, own: bool = False
) -> Iterator[tuple[list[Any], Block | Part]]:
    """Blocks and what is between them, each with the part of ``chain`` that it stands for."""
    i = 0
    for block in split_blocks([_member(part, name) for name in chain], own=own):
        length = 1
        if isinstance(block, Block):
            modules = (block.convolution, block.batch_norm)
            length = 2 - modules.count(None) + (block.activation != "none")
        yield list(chain[i : i + length]), block
        i += length


def _member(part: nn.Module, name: str | Activation) -> Part:
    return part.get_submodule(name) if isinstance(name, str) else name


def _rows(path: str, part: nn.Module, own: bool) -> Iterator[Row]:
    names = _convolutions(part)
    if path == "" and isinstance(part, CONVOLUTIONS):
        yield Row("", type(part).__name__, LEFT_ALONE, "has no parent; put it in an nn.Sequential")
    if not names or (path and _is_container(part)):
        return
    within = f"{path}." if path else ""

    def row(name: str, modules: str, status: str, reason: str) -> Row:
        return Row(within + name, modules, status, reason)

    recipe = _recipe(part)
    try:
        if (own and altered(part)) or (recipe and _staleness(part)):
            raise UntraceableError(f"its parent {altered(part)}" if own else _staleness(part))
        found = recipe.trace if recipe else _find_trace(part)
    except UntraceableError as error:
        for name in names:
            yield row(name, type(part.get_submodule(name)).__name__, LEFT_ALONE, str(error))
        return

    reasons = dict(found.reasons) if found else {}
    calls = f"when called with {', '.join(found.inputs)} alone" if found and found.optional else ""
    seen = set()
    for chain in _chains(part, found):
        split = [*_split(part, chain, own=own), ([""], nn.Identity())]
        for (run, block), (after, follower) in itertools.pairwise(split):
            seen.add(run[0])
            if isinstance(block, Block):
                if block.convolution is None:
                    continue
                modules = " + ".join(_kind(part, name) for name in run)
                reason = _end(block, after[0], follower) or reasons.get(run[0], calls)
                yield row(run[0], modules, FUSED if own or recipe else WOULD_FUSE, reason)
            elif isinstance(block, CONVOLUTIONS):
                kind = type(block).__name__
                yield row(run[0], kind, LEFT_ALONE, convolution_obstacle(block) or "")
    for name in names:
        if name not in seen:
            reason = reasons.get(name, "is not called in the forward of its parent")
            yield row(name, type(part.get_submodule(name)).__name__, LEFT_ALONE, reason)


def _kind(part: nn.Module, name: str | Activation) -> str:
    return name.name if isinstance(name, Activation) else type(part.get_submodule(name)).__name__


def _end(block: Block, name: str, after: Block | Part) -> str:
    """Why ``block`` ends before a module that looks as if it belonged to it."""
    joins = tuple(ACTIVATION_MODULES)
    if block.batch_norm is None:
        joins += (nn.modules.batchnorm._BatchNorm,)
    if block.activation != "none" or not isinstance(after, joins):
        return ""
    return f"{name} {altered(after) or f'is a {type(after).__name__}'}"


def _convolutions(part: nn.Module) -> list[str]:
    """Those that ``part``'s forward can be expected to call: its own, those of its lists too."""
    names = []
    for name, child in part.named_children():
        if isinstance(child, CONVOLUTIONS):
            names.append(name)
        elif _is_container(child):
            names += [f"{name}.{inner}" for inner in _convolutions(child)]
    return names


def _is_container(part: nn.Module) -> bool:
    return isinstance(part, CONTAINERS) and type(part).forward is nn.Module.forward
