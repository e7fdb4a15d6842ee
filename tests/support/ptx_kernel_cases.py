"""The Triton kernels run as the PTX that they compile to for sm_80, a case by each name.

A program, see :mod:`support.ptx_runs`. What a case compares is the result of a kernel, into memory
that holds NaN until then, with torch in float64 on the same inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from fastgan.benchmarks import machine
from fastgan.kernels import augment, bn_act, conv, gan_loss
from support import gan_losses
from support.convolutions import Sizes, projection, torchs
from support.numerics import EPS, TF32, error
from support.ptx_driver import running_ptx
from support.ptx_memory import PtxError
from support.ptx_runs import ORDERS, Edit, Outcome, count, serve, without
from torch import Tensor

import fastgan
from fastgan import gpu
from fastgan.ops.activation import ACTIVATIONS

# What guards shared memory.
OPCODES = ("bar.sync", "cp.async.wait_group")
SLOPE = 0.2
NORM_EPS = 1e-5


class Numbers(NamedTuple):
    """A dtype, and how products of it are made.

    Attributes:
        dtype: of what the kernels read and write.
        precision: that torch asks for.
        product: the error of a matrix product, by the norm.
        rounding: of everything else.
    """

    dtype: torch.dtype
    precision: str
    product: float
    rounding: float


# Half a unit in the last place of 16 bits is 2^-8 and 2^-11. Three passes of TF32 leave out up to
# 2^-20 of each factor, and sums of float32 have their own rounding.
NUMBERS = {
    "bf16": Numbers(torch.bfloat16, "ieee", 2**-8, 2**-8),
    "fp16": Numbers(torch.float16, "ieee", 2**-11, 2**-11),
    "tf32": Numbers(torch.float32, "tf32", TF32, 4 * EPS),
    "tf32x3": Numbers(torch.float32, "ieee", 2**-20, 4 * EPS),
}
# Of sums in float32, whatever it is that is summed.
SUMS = 4 * EPS


class Convolution(NamedTuple):
    """And what comes after it forwards; without ``groups`` no statistics."""

    sizes: Sizes
    bias: bool = False
    activation: str = "none"
    groups: int = 0


CONVOLUTIONS = {
    "of 16": Convolution(Sizes(2, 48, 3, 5, 32), True, "leaky_relu", 2),
    "of 4": Convolution(Sizes(2, 20, 5, 3, 36), False, "relu", 2),
    "odd": Convolution(Sizes(2, 21, 3, 4, 19, over=(1, 1)), True, "none", 2),
    "one image": Convolution(Sizes(1, 33, 2, 3, 64), True, "tanh", 1),
    "many rows": Convolution(Sizes(2, 16, 10, 15, 16), False, "none", 2),
    "thin": Convolution(Sizes(2, 32, 4, 6, 3), True, "tanh", 2),
    "thin odd": Convolution(Sizes(1, 18, 3, 4, 3, over=(1, 1)), True, "relu"),
    "3x3": Convolution(Sizes(2, 17, 5, 4, 24, (3, 3), 1, 1), True, "relu", 2),
    "3x3 by 2": Convolution(Sizes(2, 24, 4, 3, 40, (3, 3), 2, 1), False, "none", 1),
    "5x5 by 3": Convolution(Sizes(1, 16, 3, 2, 20, (5, 5), 3, 1)),
    "projection": Convolution(projection(4, 20, 24, (4, 4)), True, "relu", 2),
    "few outputs": Convolution(projection(5, 1, 81, (4, 4)), True),
    "tall": Convolution(Sizes(4, 24, 12, 13, 20)),
}


class Check(NamedTuple):
    what: str
    got: Tensor
    want: Tensor
    limit: float


Checks = Callable[[], Iterator[Check]]


def filled(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN, in the order N, H, W, C where there are four sizes."""
    return dense(torch.full(shape, torch.nan, dtype=dtype))


def dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return dense(torch.randn(shape).to(dtype))


def convolution(
    direction: str,
    case: Convolution,
    numbers: Numbers,
    tile: conv.Tile | int = 0,
    multiprocessors: int = 1,
) -> Iterator[Check]:
    """``tile`` is one, or which one of those that the problem has."""
    s, dtype = case.sizes, numbers.dtype
    with machine.fp32_precision(numbers.precision):
        problem = conv.Problem.of(s.low, s.high, s.kernel, s.stride, s.padding, case.groups, dtype)
        if isinstance(tile, int):
            tile = problem.tiles(direction)[tile]
    low, high, weight = (normal(shape, dtype) for shape in (s.low, s.high, s.weight))
    z = torchs(direction, s, low.double(), high.double(), weight.double())
    out = filled(tuple(z.shape), dtype)
    if direction == "wgrad":
        with mock.patch.object(gpu, "multiprocessors", lambda device: multiprocessors):
            conv.conv_wgrad(problem, tile, low, high, out)
        yield Check("weight gradient", out, z, numbers.product)
        return
    x, run = (high, conv.conv_fprop) if direction == "fprop" else (low, conv.conv_dgrad)
    channels = z.shape[1]
    bias = normal((channels,), dtype) if case.bias else None
    tiles = problem.stats_tiles(direction) if case.groups else 0
    stats = filled((tiles, 3, channels)) if tiles else None
    run(problem, tile, x, weight, bias, case.activation, SLOPE, out, stats)
    if bias is not None:
        z += bias.double().view(1, -1, 1, 1)
    yield Check("output", out, ACTIVATIONS[case.activation](z, SLOPE), numbers.product)
    if stats is not None:
        yield from of_statistics(stats, out, case.groups)


def of_statistics(stats: Tensor, y: Tensor, groups: int) -> Iterator[Check]:
    """The tiles of each group, merged, are those of what was written."""
    counts, means, m2s = stats.double().view(groups, -1, *stats.shape[1:]).unbind(2)
    total = counts.sum(1)
    mean = (counts * means).sum(1) / total
    m2 = (m2s + counts * (means - mean[:, None]) ** 2).sum(1)
    parts = torch.stack([part.transpose(0, 1).flatten(1) for part in y.double().chunk(groups)])
    yield Check("count", total, torch.full_like(total, parts.shape[2]), 0.0)
    yield Check("mean", mean, parts.mean(2), SUMS)
    yield Check("M2", m2, parts.var(2, correction=0) * parts.shape[2], SUMS)


def activation_gradient(activation: str, numbers: Numbers, size: int = 5003) -> Iterator[Check]:
    dtype = numbers.dtype
    y = ACTIVATIONS[activation](normal((size,)), SLOPE).to(dtype)
    dy, dx = normal((size,), dtype), filled((size,), dtype)
    conv.act_backward(dy, y, activation, SLOPE, dx)
    slopes = {"relu": 0.0, "leaky_relu": SLOPE}
    v = y.double()
    slope = 1 - v * v if activation == "tanh" else torch.where(v > 0, 1.0, slopes[activation])
    yield Check("gradient", dx, dy.double() * slope, numbers.rounding)


class Norm(NamedTuple):
    """A batch norm; ``tiles`` is into how many each sum may be cut."""

    n: int
    c: int
    h: int
    w: int
    groups: int = 1
    affine: bool = True
    activation: str = "relu"
    training: bool = True
    tiles: int = 256


NORMS = {
    "of 16": Norm(4, 64, 7, 9, 2, True, "leaky_relu"),
    "of 4": Norm(3, 100, 4, 5, 1, False, "relu"),
    "thin": Norm(2, 3, 33, 35, 2, True, "tanh"),
    "odd": Norm(1, 21, 15, 11, 1, True, "none", True, 1),
    "evaluation": Norm(2, 20, 3, 3, 1, True, "leaky_relu", False),
    "many tiles": Norm(1, 33, 57, 74, 1, True, "relu"),
}


def batch_norm(sizes: Norm, numbers: Numbers, parameters: torch.dtype) -> Iterator[Check]:
    s, limit = sizes, numbers.rounding
    shape = s.n, s.c, s.h, s.w
    rows = s.n // s.groups * s.h * s.w
    x, dy = normal(shape, numbers.dtype) * 2 + 1, normal(shape, numbers.dtype)
    weight, bias = ((normal((s.c,), parameters) if s.affine else None) for _ in range(2))
    mean, var, invstd = (filled((s.groups, s.c)) for _ in range(3))
    with mock.patch.object(bn_act, "_TILES", s.tiles):
        if s.training:
            stats = filled((s.groups * bn_act.stats_tiles(s.groups, rows, s.c), 3, s.c))
            bn_act.bn_stats(x, stats, s.groups)
            yield from of_statistics(stats, x, s.groups)
            bn_act.bn_merge(stats, NORM_EPS, mean, var, invstd, s.groups)
        else:
            mean, var = normal((1, s.c)), torch.rand(1, s.c) + 0.5
            invstd = torch.rsqrt(var + NORM_EPS)
        y, dx = filled(shape, numbers.dtype), filled(shape, numbers.dtype)
        gradients = [filled((s.c,), parameters) for _ in range(2)]
        after = s.activation, SLOPE
        bn_act.bn_act_forward(x, mean, invstd, weight, bias, *after, y)
        bn_act.bn_act_backward(
            dy, x, mean, invstd, weight, bias, s.training, *after, dx, *gradients
        )

    leaf, *affine = (
        torch.as_tensor(t, dtype=torch.float64).clone().requires_grad_()
        for t in (
            x,
            weight if s.affine else torch.ones(s.c),
            bias if s.affine else torch.zeros(s.c),
        )
    )
    parts, means, variances = [], [], []
    for part in leaf.chunk(s.groups):
        over = part.detach().transpose(0, 1).flatten(1)
        means.append(over.mean(1) if s.training else mean[0].double())
        variances.append(over.var(1, correction=0) if s.training else var[0].double())
        z = F.batch_norm(part, means[-1], variances[-1], *affine, s.training, 0.0, NORM_EPS)
        parts.append(ACTIVATIONS[s.activation](z, SLOPE))
    want = torch.cat(parts)
    want.backward(dy.double())
    if s.training:
        yield Check("mean", mean, torch.stack(means), SUMS)
        yield Check("variance", var, torch.stack(variances), SUMS)
        yield Check("invstd", invstd, (torch.stack(variances) + NORM_EPS).rsqrt(), SUMS)
    yield Check("output", y, want.detach(), limit)
    yield Check("dx", dx, leaf.grad, limit)
    least = SUMS if parameters == torch.float32 else limit
    for what, got, parameter in zip(("dweight", "dbias"), gradients, affine, strict=True):
        yield Check(what, got, parameter.grad, least)


def merged(tiles: int = 150, channels: int = 37, groups: int = 2) -> Iterator[Check]:
    """Tiles of various sizes, some of them empty, of values far from 0."""
    y = 100 + normal((groups, 3000, channels))
    ends = torch.cat([torch.randint(0, 3001, (tiles - 1,)).sort().values, torch.tensor([3000])])
    stats = torch.zeros(groups, tiles, 3, channels)
    first = 0
    for tile, end in enumerate(ends.tolist()):
        if end > first:
            part = y[:, first:end].double()
            m2 = part.var(1, correction=0) * (end - first)
            stats[:, tile] = torch.stack([torch.full_like(m2, end - first), part.mean(1), m2], 1)
        first = end
    out = [filled((groups, channels)) for _ in range(3)]
    bn_act.bn_merge(stats.view(-1, 3, channels), NORM_EPS, *out, groups)
    mean, var = y.double().mean(1), y.double().var(1, correction=0)
    for what, got, want in zip(
        ("mean", "variance", "invstd"), out, (mean, var, (var + NORM_EPS).rsqrt()), strict=True
    ):
        yield Check(what, got, want, SUMS)


def running(numbers: Numbers, channels: int = 37, rows: int = 50) -> Iterator[Check]:
    momentum = 0.1
    mean, var = normal((3, channels)), torch.rand(3, channels)
    of_mean, of_var = normal((channels,), numbers.dtype), torch.rand(channels).to(numbers.dtype)
    want_mean, want_var = of_mean.double(), of_var.double()
    for m, v in zip(mean.double(), var.double(), strict=True):
        want_mean += momentum * (m - want_mean)
        want_var += momentum * (v * rows / (rows - 1) - want_var)
    bn_act.bn_update_running(mean, var, rows, momentum, of_mean, of_var)
    yield Check("running mean", of_mean, want_mean, numbers.rounding)
    yield Check("running variance", of_var, want_var, numbers.rounding)


def adversarial(kind: str, targets: list[float], size: int, numbers: Numbers) -> Iterator[Check]:
    groups, dtype = len(targets), numbers.dtype
    logits = 4 * normal((groups * size,), dtype) + 1
    logits[:6] = torch.tensor([0.0, 80.0, -80.0, 1e-3, -15.0, 1.0])
    shapes = {"loss": (groups,), "d": (groups,), "dlogits": (groups * size,)}
    out = {name: filled(shape, dtype) for name, shape in shapes.items()}
    gan_loss.gan_loss_forward(logits, targets, kind, *out.values())
    for name, want in gan_losses.adversarial(logits.double().numpy(), targets, kind).items():
        yield Check(name, out[name], torch.from_numpy(want), numbers.rounding)


def gathered(
    sizes: tuple[int, int, int], gather: bool, flip: bool, numbers: Numbers
) -> Iterator[Check]:
    """Indices and flips begin between two multiples of 16 bytes."""
    images = torch.randint(0, 256, (5, *sizes), dtype=torch.uint8)
    index = torch.tensor([9, 4, 0, 4, 2, 1, 3, 4])[1:] if gather else None
    n = 7 if gather else 5
    mirrored = (torch.arange(n + 1) % 3 == 0)[1:] if flip else None
    out = filled((n, sizes[2], *sizes[:2]), numbers.dtype)
    augment.augment_forward(images, index, mirrored, out)
    want = images if index is None else images[index]
    if mirrored is not None:
        want = torch.where(mirrored[:, None, None, None], want.flip(2), want)
    want = want.permute(0, 3, 1, 2).double() / 127.5 - 1
    yield Check("images", out, want, numbers.rounding)


@dataclasses.dataclass(frozen=True)
class Case:
    """What to compare, and the numbers it is about."""

    numbers: str
    checks: Checks


def _convolutions() -> Iterator[tuple[str, Case]]:
    every = tuple(NUMBERS)
    # All numbers where the loads are widest, narrowest and single; elsewhere one of them each.
    others = {
        "of 4": ("tf32",),
        "one image": ("fp16",),
        "many rows": ("bf16", "tf32x3"),
        "thin odd": ("tf32",),
        "3x3": ("fp16",),
        "3x3 by 2": ("bf16",),
        "5x5 by 3": ("tf32x3",),
        "projection": ("bf16", "tf32"),
        "few outputs": ("bf16", "fp16", "tf32"),
        "tall": (),
    }
    for direction in ("fprop", "dgrad", "wgrad"):
        for name, convolved in CONVOLUTIONS.items():
            for numbers in others.get(name, every):
                yield (
                    f"{direction} {name}, {numbers}",
                    Case(
                        numbers,
                        functools.partial(convolution, direction, convolved, NUMBERS[numbers]),
                    ),
                )
    for direction, name, numbers, tile in (
        *((d, "of 16", "bf16", conv.Tile(128, 128, 64, 8, 3)) for d in ("fprop", "dgrad")),
        *((d, "many rows", "fp16", conv.Tile(256, 64, 64, 8, 3)) for d in ("fprop", "dgrad")),
        ("fprop", "of 4", "tf32", conv.Tile(64, 128, 32, 4, 4)),
        ("dgrad", "of 4", "tf32", conv.Tile(128, 64, 32, 4, 4)),
        ("wgrad", "of 16", "bf16", conv.Tile(128, 128, 64, 8, 3)),
        *((d, "tall", "fp16", conv.Tile(32, 16, 16, 4, 3)) for d in ("fprop", "dgrad")),
        ("wgrad", "of 16", "tf32", conv.Tile(32, 32, 16, 4, 3)),
    ):
        yield (
            f"{direction} {name}, {numbers}, {tile}",
            Case(
                numbers,
                functools.partial(
                    convolution, direction, CONVOLUTIONS[name], NUMBERS[numbers], tile
                ),
            ),
        )
    for numbers in every:
        yield (
            f"wgrad in parts, {numbers}",
            Case(
                numbers,
                functools.partial(
                    convolution, "wgrad", CONVOLUTIONS["tall"], NUMBERS[numbers], multiprocessors=64
                ),
            ),
        )


def _others() -> Iterator[tuple[str, Case]]:
    bf16, fp16, fp32 = (NUMBERS[name] for name in ("bf16", "fp16", "tf32"))
    for name, activation in (("bf16", "relu"), ("fp16", "tanh"), ("tf32", "leaky_relu")):
        numbers = NUMBERS[name]
        yield (
            f"activation backward, {name}",
            Case(name, functools.partial(activation_gradient, activation, numbers)),
        )
        yield f"running statistics, {name}", Case(name, functools.partial(running, numbers))
    single = torch.float32
    for name, sizes, parameters in (
        ("bf16", "of 16", torch.bfloat16),
        ("fp16", "of 4", single),
        ("tf32", "thin", single),
        ("tf32", "odd", single),
        ("fp16", "evaluation", torch.float16),
        ("bf16", "many tiles", single),
    ):
        yield (
            f"batch norm {sizes}, {name}",
            Case(name, functools.partial(batch_norm, NORMS[sizes], NUMBERS[name], parameters)),
        )
    yield "merging", Case("tf32", merged)
    for name, kind, targets, size in (
        ("bf16", "bce", [1.0, 0.0], 64),
        ("fp16", "bce", [0.9], 37),
        ("tf32", "bce", [1.0, 0.0, 0.3], 5001),
        ("fp16", "lsgan", [0.9, -1.5], 37),
        ("bf16", "hinge", [1.0, 0.0], 64),
        ("tf32", "wasserstein", [1.0, 0.0], 37),
    ):
        yield (
            f"adversarial loss, {kind}, {name}",
            Case(name, functools.partial(adversarial, kind, targets, size, NUMBERS[name])),
        )
    for what, numbers, name, sizes, gather, flip in (
        ("gather and flip", bf16, "bf16", (21, 19, 3), True, True),
        ("flip", fp16, "fp16", (9, 7, 1), False, True),
        ("gather", fp32, "tf32", (16, 16, 4), True, False),
        ("scale", fp32, "tf32", (5, 8, 3), False, False),
    ):
        yield (
            f"images, {what}, {name}",
            Case(name, functools.partial(gathered, sizes, gather, flip, numbers)),
        )


CASES = {name: case for cases in (_convolutions(), _others()) for name, case in cases}


class Fault(NamedTuple):
    """A kernel into whose PTX faults are planted, and the case that must then fail.

    ``singly`` also takes what guards shared memory away piece by piece.
    """

    kernel: str
    case: str
    singly: bool = True


FAULTS = {
    f"{fault.kernel}, {fault.case}": fault
    for fault in (
        Fault("_conv_fprop_kernel", "fprop of 16, bf16"),
        Fault("_conv_fprop_kernel", "fprop odd, tf32", False),
        Fault("_conv_fprop_kernel", "fprop thin, fp16", False),
        Fault("_conv_dgrad_kernel", "dgrad of 16, bf16"),
        Fault("_conv_dgrad_kernel", "dgrad odd, tf32", False),
        Fault("_conv_dgrad_kernel", "dgrad thin, fp16", False),
        Fault("_conv_wgrad_kernel", "wgrad many rows, bf16"),
        Fault("_conv_wgrad_kernel", "wgrad odd, tf32", False),
        Fault("_conv_wgrad_kernel", "wgrad thin, fp16", False),
        Fault("_conv_wgrad_sum_kernel", "wgrad in parts, fp16"),
        Fault("_conv_dot_kernel", "fprop few outputs, bf16"),
        Fault("_act_bwd_kernel", "activation backward, bf16"),
        Fault("_bn_stats_kernel", "batch norm odd, tf32"),
        Fault("_bn_merge_kernel", "merging"),
        Fault("_bn_act_fwd_kernel", "batch norm odd, tf32"),
        Fault("_bn_act_bwd_reduce_kernel", "batch norm odd, tf32"),
        Fault("_bn_act_bwd_sum_kernel", "batch norm odd, tf32"),
        Fault("_bn_act_bwd_kernel", "batch norm odd, tf32"),
        Fault("_bn_running_kernel", "running statistics, tf32"),
        Fault("_gan_loss_fwd_kernel", "adversarial loss, bce, fp16"),
        Fault("_augment_fwd_kernel", "images, flip, fp16"),
    )
}


def run(case: Case, order: str, edit: Edit | None = None) -> tuple[list[Check], list[Any]]:
    """What the case compares, and its launches."""
    torch.manual_seed(0)
    with running_ptx(warp_order=order, edit_ptx=edit) as launches:
        return list(case.checks()), launches


def compared(case: Case) -> Outcome:
    """By order, what was compared with its error and its limit; by kernel, what it consists of."""
    errors, kernels = {}, {}
    for order in ORDERS:
        checks, launches = run(case, order)
        errors[order] = [[c.what, error(c.got, c.want), c.limit] for c in checks]
        for launch in launches:
            kernels[launch.name] = {
                **{opcode: count(opcode, launch.ptx) for opcode in OPCODES},
                "products": sorted(set(re.findall(r"\bmma\.sync\.[\w.]+", launch.ptx))),
                "shared": launch.shared,
            }
    return {"errors": errors, "kernels": kernels}


def shows(fault: Fault, edit: Edit) -> bool:
    """Whether the case fails in some order of warps where the kernel is edited."""

    def edit_kernel(ptx: str) -> str:
        if not re.search(rf"\.entry {fault.kernel}\(", ptx):
            return ptx
        edited = edit(ptx)
        assert edited != ptx
        return edited

    def fails(order: str) -> bool:
        try:
            checks, _ = run(CASES[fault.case], order, edit_kernel)
        except PtxError:
            return True
        return not all(error(c.got, c.want) <= c.limit for c in checks)

    return any(map(fails, ORDERS))


def shifted(found: re.Match[str]) -> Edit:
    """The address of an access to global memory is an element farther on."""
    size = int(found["bits"] or 32) // 8

    def edit(ptx: str) -> str:
        at = found.start("offset"), found.end("offset")
        return f"{ptx[: at[0]]}{int(found['offset']) + size}{ptx[at[1] :]}"

    return edit


# An asynchronous copy does not say what its elements are.
ACCESSES = {
    "load": r"\b(?:cp\.async\.c[ag]\.shared\.global|ld\.global[\w.]*\.b(?P<bits>\d+))\b"
    r".*\[ %rd\d+ \+ (?P<offset>\d+) \]",
    "store": r"\bst\.global[\w.]*\.b(?P<bits>\d+)\b.*\[ %rd\d+ \+ (?P<offset>\d+) \]",
}


def planted(fault: Fault) -> Outcome:
    """Whether it shows that something is missing, or displaced."""
    _, launches = run(CASES[fault.case], ORDERS[0])
    (ptx,) = {launch.ptx for launch in launches if launch.name == fault.kernel}
    missing = {opcode: runs_of(opcode, ptx) for opcode in OPCODES if count(opcode, ptx)}
    displaced = {what: list(re.finditer(access, ptx)) for what, access in ACCESSES.items()}
    return {
        "all": {opcode: shows(fault, without(opcode)) for opcode in missing},
        "each": {
            opcode: [shows(fault, without(opcode, some)) for some in found]
            for opcode, found in missing.items()
            if fault.singly
        },
        # In some all lanes are masked: what they would read lies outside of the image.
        "shifted": {
            what: any(shows(fault, shifted(access)) for access in found)
            for what, found in displaced.items()
        },
    }


def runs_of(opcode: str, ptx: str) -> Iterator[slice]:
    """The instructions of a name in turn, those that follow one another as one."""
    first = size = 0
    for line in ptx.splitlines():
        text = line.strip()
        if text.startswith(opcode):
            size += 1
        elif size and not text.startswith((".loc", "//")):
            yield slice(first, first + size)
            first, size = first + size, 0


def launched() -> Outcome:
    """The kernels of ``fastgan.kernels``: what is compiled and called by no other."""
    functions = {}
    for module in pkgutil.iter_modules(fastgan.kernels.__path__, "fastgan.kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, triton.JITFunction):
                functions[name] = value
    return {
        "kernels": sorted(
            name
            for name, function in functions.items()
            if not any(
                re.search(rf"\b{name}\(", other.src)
                for other in functions.values()
                if other is not function
            )
        )
    }


LAUNCHED = "kernels"


def main() -> None:
    without_poison = gpu._empty
    gpu._empty = lambda *args: without_poison(*args).fill_(torch.nan)
    serve(
        {
            LAUNCHED: launched,
            **{name: functools.partial(compared, case) for name, case in CASES.items()},
            **{name: functools.partial(planted, fault) for name, fault in FAULTS.items()},
        }
    )


if __name__ == "__main__":
    main()
