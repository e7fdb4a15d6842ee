"""The launches of the CUDA kernels that training the example networks leads to, and Triton's.

The ops themselves run, on tensors whose memory nobody touches, and the host code of the extension
with them: what it launches goes to the stand-in for the CUDA runtime, and is written down.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fastgan.benchmarks import compile_driver, cuda_code, roofline
from fastgan.benchmarks.compile_driver import Target, recorded
from fastgan.benchmarks.compiled_launches import (
    BATCHES,
    NETWORKS,
    TABLE_BATCH,
    Batch,
    Layer,
    images_of,
    layers,
)
from fastgan.benchmarks.cuda_build import LaunchHandler
from torch import Tensor

from fastgan.errors import RunError
from fastgan.ops import augment, bn_act, conv, cuda, gan_loss

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SLOPE, _EPS, _MOMENTUM = 0.2, 1e-5, 0.1
_ACT = {"G": "relu", "D": "leaky_relu"}
_FAILURE = 719  # cudaErrorLaunchFailure
# Shapes that the networks have not: no multiple of 16 bytes, every number of thin channels.
_ODD_CHANNELS, _ODD_SIDE = 5, 5
_MOST_THIN = 4


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: its readable name.
        grid: blocks in x, y and z.
        threads: of a block; 0 where it is not known.
        shared: bytes of shared memory that the launch asks for.
        nbytes: of all tensors that the launch is given.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Pass:
    """An op in one direction, for one layer.

    Attributes:
        what: the layer and the pass, as the table names them.
        flop: floating-point operations of its first launch, a convolution, or 0.
        tabled: whether the table shows it.
    """

    what: str
    launches: tuple[Launch, ...]
    flop: float
    tabled: bool


def triton_passes(target: Target) -> Iterator[Pass]:
    """Those of the table, as the Triton kernels are launched on ``target``."""
    with recorded(target) as launches, roofline.as_on_a_gpu():
        for op, batch in _ops(launches.clear):
            if not batch.tabled:
                continue
            launches.clear()
            op.run("triton")
            found = (Launch(_name_of(x), x.grid, 0, 0, x.nbytes) for x in launches)
            yield Pass(op.what, tuple(found), op.flop, True)


def _name_of(launch: compile_driver.Launch) -> str:
    return launch.specialisation.name.strip("_").removesuffix("_kernel")


def cuda_passes(
    target: Target, path: Path, parameters: Mapping[str, Sequence[int]]
) -> Iterator[Pass]:
    """All of them.

    Args:
        target: the GPU that the host code believes to be on.
        path: the extension, from :func:`fastgan.benchmarks.cuda_build.build_recorder`.
        parameters: bytes of each parameter of each kernel.
    """
    with (
        recorded(target) as others,
        roofline.as_on_a_gpu(),
        _recorded_cuda(path, parameters) as launches,
    ):
        for op, batch in _ops(launches.clear):
            launches.clear()
            others.clear()
            op.run("cuda")
            yield Pass(op.what, tuple(launches), op.flop, batch.tabled)


@contextlib.contextmanager
def _recorded_cuda(path: Path, parameters: Mapping[str, Sequence[int]]) -> Iterator[list[Launch]]:
    """Within this context the backend ``cuda`` is the recorder at ``path``."""
    launches: list[Launch] = []
    errors: list[BaseException] = []
    noting = _Noting(_extension(path))

    def take(
        name: bytes, grid: Any, block: Any, shared: int, stream: int | None, arguments: Any
    ) -> int:
        try:
            kernel = cuda_code.readable(name.decode())
            sizes = parameters[kernel]
            given = (ctypes.string_at(arguments[i], size) for i, size in enumerate(sizes))
            launches.append(
                Launch(
                    kernel,
                    (grid[0], grid[1], grid[2]),
                    block[0] * block[1] * block[2],
                    shared,
                    noting.nbytes_in(given),
                )
            )
        except BaseException as error:
            errors.append(error)
            return _FAILURE
        return 0

    handler = LaunchHandler(take)
    library = ctypes.CDLL(str(path))
    before = cuda._find
    library.stand_in_on_launch(handler)
    # As a function that is cached, like the one that it stands for.
    cuda._find = functools.cache(lambda: cuda._Found(noting, "", on_host=True))
    try:
        yield launches
    except RuntimeError as error:
        if errors:
            raise RunError(f"a launch could not be read: {errors[0]!r}") from error
        raise
    finally:
        cuda._find = before
        library.stand_in_on_launch(LaunchHandler())


class _Noting:
    """The extension, which notes the memory that it is told of."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension
        self._nbytes: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extension, name)

    def Array(  # noqa: N802
        self, address: int, dtype: str, device: int, shape: Sequence[int], strides: Sequence[int]
    ) -> Any:
        count = torch.Size(shape).numel()
        self._nbytes[address] = count * getattr(torch, dtype).itemsize
        return self._extension.Array(address, dtype, device, shape, strides)

    def nbytes_in(self, arguments: Iterable[bytes]) -> int:
        """Of the tensors whose addresses are in the arguments, each counted once."""
        words = {
            word
            for argument in arguments
            for (word,) in struct.iter_unpack("<Q", argument[: len(argument) // 8 * 8])
        }
        return sum(self._nbytes.get(word, 0) for word in words)


@functools.cache
def _extension(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class _Op:
    """What is run on a backend, and what the table calls it."""

    what: str
    run: Callable[[str], object]
    flop: float = 0.0


def _ops(clear: Callable[[], None]) -> Iterator[tuple[_Op, Batch]]:
    """Every op of every network; ``clear`` forgets what was launched on the way to one."""
    for (size, nc), dtype, n in (
        (network, dtype, n) for network in NETWORKS for dtype in _DTYPES for n in BATCHES
    ):
        tabled = (size, dtype, n) == (NETWORKS[0][0], _DTYPES[0], TABLE_BATCH)
        one = Batch(n, 1, dtype, tabled)
        # The discriminator sees real and generated images in one pass.
        two = Batch(2 * n, 2, dtype, tabled)
        for batch, net in ((one, "G"), (two, "D")):
            for layer in layers(net, size, nc):
                yield from ((op, batch) for op in _of_layer(layer, batch, clear))
        yield _loss(two), two
        yield from ((op, one) for op in _augment(one, size, size, nc))
    for dtype in _DTYPES:
        batch = Batch(4, 2, dtype, False)
        yield from ((op, batch) for op in _odd(batch, clear))


def _of_layer(layer: Layer, batch: Batch, clear: Callable[[], None]) -> Iterator[_Op]:
    transposed = layer.net == "G"
    channels, side = (layer.ch, layer.high_side) if transposed else (layer.cl, layer.side)
    end = layer.last if transposed else layer.first
    ours = layer.side == 1 or layer.ch <= _MOST_THIN
    if ours:
        yield from _conv(layer, batch, end)
    if end:
        yield _act_backward(layer, batch, channels, side, "tanh" if transposed else "leaky_relu")
    elif transposed or not layer.last:
        yield from _bn(layer, batch, channels, side, ours, clear)


def _conv(layer: Layer, batch: Batch, end: bool) -> Iterator[_Op]:
    """All three directions, and the forward one in evaluation where batch norm follows."""
    transposed = layer.net == "G"
    dtype, flop = batch.dtype, layer.flop(batch.n)
    low, high, weight = layer.images(batch.n, dtype, "cpu")
    x, y = (low, high) if transposed else (high, low)
    step = layer.stride, layer.padding

    def forward(
        what: str, given: Tensor, bias: Tensor | None, t: bool, act: str, groups: int
    ) -> _Op:
        def run(backend: str) -> object:
            return conv.conv_forward(given, weight, bias, *step, t, act, _SLOPE, groups, backend)

        return _Op(f"{layer} {batch}: {what}", run, flop)

    normed = not end and y.shape[1] > 1
    act = ("tanh" if transposed else "leaky_relu") if end else "none"
    if normed:
        bias = torch.empty(y.shape[1])
        yield forward("forward, statistics", x, None, transposed, act, batch.groups)
        yield forward("evaluation", x, bias, transposed, _ACT[layer.net], 0)
    else:
        yield forward("forward" + f", {act}" * end, x, None, transposed, act, 0)
    yield forward("input gradient", y, None, not transposed, "none", 0)
    sides = [layer.kernel] * 2
    yield _Op(
        f"{layer} {batch}: weight gradient",
        lambda backend: conv.conv_wgrad(low, high, sides, *step, backend),
        flop,
    )


def _act_backward(layer: Layer, batch: Batch, c: int, side: int, act: str) -> _Op:
    dy, y = (images_of(batch.n, c, side, batch.dtype, "cpu") for _ in range(2))
    return _Op(
        f"{layer} {batch}: {act} backward",
        lambda backend: conv.act_backward(dy, y, act, _SLOPE, backend),
    )


def _bn(
    layer: Layer, batch: Batch, c: int, side: int, ours: bool, clear: Callable[[], None]
) -> Iterator[_Op]:
    x, dy = (images_of(batch.n, c, side, batch.dtype, "cpu") for _ in range(2))
    weight, bias, running_mean, running_var = (torch.empty(c) for _ in range(4))
    mean, var, invstd = (torch.empty(batch.groups, c) for _ in range(3))
    act, rows = _ACT[layer.net], batch.n // batch.groups * side**2

    def statistics(backend: str) -> Tensor:
        """As the convolution before it leaves them, the backend's own where it has that kernel."""
        low, high, kernel = layer.images(batch.n, batch.dtype, "cpu")
        transposed = layer.net == "G"
        given = (low if transposed else high), kernel, None, layer.stride, layer.padding
        how = transposed, "none", _SLOPE, batch.groups, backend if ours else "triton"
        stats: Tensor = conv.conv_forward(*given, *how)[1]
        clear()
        return stats

    def forward(backend: str, stats: Tensor | None, training: bool = True) -> object:
        running = (None, None) if training else (running_mean, running_var)
        how = stats, training, _EPS, batch.groups, act, _SLOPE, backend
        return bn_act.bn_act_forward(x, weight, bias, *running, *how)

    def backward(backend: str) -> object:
        how = True, act, _SLOPE, backend
        return bn_act.bn_act_backward(dy, x, mean, invstd, weight, bias, *how)

    def move(backend: str) -> object:
        how = rows, _MOMENTUM, backend
        return bn_act.bn_update_running(running_mean, running_var, mean, var, *how)

    name = f"{layer} {batch}: batch norm, {act}"
    yield _Op(name, lambda backend: forward(backend, statistics(backend)))
    yield _Op(f"{name}, own statistics", lambda backend: forward(backend, None))
    yield _Op(f"{name}, backward", backward)
    yield _Op(f"{layer} {batch}: running statistics", move)
    if not batch.tabled:
        yield _Op(f"{name}, evaluation", lambda backend: forward(backend, None, False))


def _loss(batch: Batch) -> _Op:
    logits = torch.empty(batch.n, dtype=batch.dtype)
    return _Op(
        f"loss {batch}",
        lambda backend: gan_loss.gan_loss_forward(logits, [1.0, 0.0][: batch.groups], backend),
    )


def _augment(batch: Batch, h: int, w: int, c: int) -> Iterator[_Op]:
    images = torch.empty(batch.n, h, w, c, dtype=torch.uint8)
    index = torch.empty(batch.n, dtype=torch.int64)
    flip = torch.empty(batch.n, dtype=torch.bool)

    def run(chosen: Tensor | None, flipped: Tensor | None, backend: str) -> object:
        return augment.augment_forward(images, chosen, flipped, batch.dtype, backend)

    name = f"images {h}x{w} {batch}"
    yield _Op(f"{name}: gather, flip", functools.partial(run, index, flip))
    yield _Op(f"{name}: gather", functools.partial(run, index, None))
    yield _Op(f"{name}: scale", functools.partial(run, None, None))


def _odd(batch: Batch, clear: Callable[[], None]) -> Iterator[_Op]:
    """The instances for shapes that are no multiple of 16 bytes, and for 2 and 4 channels."""
    for ch in range(1, _MOST_THIN + 1):
        for cl, side in ((_ODD_CHANNELS, _ODD_SIDE), (16, 16)):
            layer = Layer("D", cl, ch, side, 4, 2, 1, True, False)
            yield from _conv(layer, batch, True)
    for cl in (1, 2 * _ODD_CHANNELS + 1, 16):
        layer = Layer("D", cl, _ODD_CHANNELS, 1, 3, 1, 0, False, True)
        yield from _conv(layer, batch, False)
    layer = Layer("G", 1, _ODD_CHANNELS, 1, _ODD_SIDE, 1, 0, True, False)
    yield from _bn(layer, batch, _ODD_CHANNELS, _ODD_SIDE, False, clear)
    yield from _augment(batch, _ODD_SIDE, _ODD_SIDE, 3)
