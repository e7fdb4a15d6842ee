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
import itertools
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from fastgan.benchmarks import compile_driver, cuda_code, machine, roofline
from fastgan.benchmarks.compile_driver import Target, recorded
from fastgan.benchmarks.compiled_launches import (
    BATCHES,
    NETWORKS,
    PRECISIONS,
    TABLE_BATCH,
    Batch,
    Layer,
    images_of,
    layers,
)
from fastgan.benchmarks.cuda_build import LaunchHandler
from torch import Tensor

from fastgan.errors import RunError
from fastgan.ops import augment, bn_act, conv, cuda, gan_loss, tuning

# Of these the table of convolutions is.
CONV_BATCHES = (TABLE_BATCH, 1024)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SLOPE, _EPS, _MOMENTUM = 0.2, 1e-5, 0.1
_ACT = {"G": "relu", "D": "leaky_relu"}
_FAILURE = 719  # cudaErrorLaunchFailure
# Shapes that the networks have not: channels that are no multiple of 16 bytes, every number of
# thin ones.
_ODD_CHANNELS, _ODD_SIDE = 5, 5
# Channels that are one, and no whole stage of a product.
_FEW_CHANNELS = 8
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


_L = TypeVar("_L", Launch, compile_driver.Launch)


@dataclasses.dataclass(frozen=True)
class Pass(Generic[_L]):
    """An op in one direction, for one layer.

    Attributes:
        what: the layer and the pass, as the tables name them.
        way: of those of a convolution; empty where there is no choice.
        flop: floating-point operations of its first launch, a convolution, or 0.
        depth: how many products each element of that is the sum of, or 0.
        table: the batch of the table that shows it; 0 where none does.
    """

    what: str
    way: str
    launches: tuple[_L, ...]
    flop: float
    depth: int
    table: int


def triton_passes(target: Target) -> Iterator[Pass[compile_driver.Launch]]:
    """Those of the tables, as the Triton kernels are launched on ``target``, every way."""
    with recorded(target) as launches, roofline.as_on_a_gpu(every_way=True):
        for op in _ops(launches.clear):
            if op.table:
                yield from _every_way(op, "triton", launches)


def _every_way(op: _Op, backend: str, launches: list[_L]) -> Iterator[Pass[_L]]:
    """The op by each way that it has a choice of, the likeliest first."""
    for i in itertools.count():
        with _taking(i) as seen:
            launches.clear()
            op.run(backend)
        way = seen[i] if op.flop else ""
        yield Pass(op.what, way, tuple(launches), op.flop, op.depth, op.table)
        if not op.flop or i + 1 == len(seen):
            return


@contextlib.contextmanager
def _taking(index: int) -> Iterator[list[str]]:
    """Within this context the way so numbered is taken, or the first where it is not there.

    Gives those that there were to choose from when last a choice was made.
    """
    seen: list[str] = []

    def taken(problem: str, ways: object, among: Sequence[str], device: object = None) -> str:
        seen[:] = among
        return among[index if index < len(among) else 0]

    before = tuning.fastest
    tuning.fastest = taken
    try:
        yield seen
    finally:
        tuning.fastest = before


def cuda_passes(
    target: Target, path: Path, parameters: Mapping[str, Sequence[int]]
) -> Iterator[Pass[Launch]]:
    """All of them, every way.

    Args:
        target: the GPU that the host code believes to be on.
        path: the extension, from :func:`fastgan.benchmarks.cuda_build.build_recorder`.
        parameters: bytes of each parameter of each kernel.
    """
    with (
        recorded(target),
        roofline.as_on_a_gpu(),
        _recorded_cuda(path, parameters) as launches,
    ):
        for op in _ops(launches.clear):
            yield from _every_way(op, "cuda", launches)


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
    """What is run on a backend, and what the tables call it; see :class:`Pass`."""

    what: str
    run: Callable[[str], object]
    table: int
    flop: float = 0.0
    depth: int = 0


def _ops(clear: Callable[[], None]) -> Iterator[_Op]:
    """Every op of every network; ``clear`` forgets what was launched on the way to one."""
    for dtype, precision in itertools.product(_DTYPES, PRECISIONS):
        if precision != PRECISIONS[0] and dtype != torch.float32:
            continue
        with machine.fp32_precision(precision):
            for (size, nc), n in itertools.product(NETWORKS, BATCHES):
                yield from _of_networks(size, nc, n, dtype, clear)
            yield from _odd(Batch(4, 2, dtype, False), clear)


def _of_networks(
    size: int, nc: int, n: int, dtype: torch.dtype, clear: Callable[[], None]
) -> Iterator[_Op]:
    first = (size, dtype) == (NETWORKS[0][0], _DTYPES[0])
    table, of_convs = (n if first and n in shown else 0 for shown in ((TABLE_BATCH,), CONV_BATCHES))
    one = Batch(n, 1, dtype, False)
    # The discriminator sees real and generated images in one pass.
    two = dataclasses.replace(one, n=2 * n, groups=2)
    for batch, net in ((one, "G"), (two, "D")):
        for layer in layers(net, size, nc):
            yield from _conv(layer, batch, layer.last if net == "G" else layer.first, of_convs)
            yield from _after(layer, batch, table, clear)
    yield _loss(two, table)
    yield from _augment(one, size, size, nc, table)


def _after(layer: Layer, batch: Batch, table: int, clear: Callable[[], None]) -> Iterator[_Op]:
    """What follows its convolution."""
    transposed = layer.net == "G"
    channels, side = (layer.ch, layer.high_side) if transposed else (layer.cl, layer.side)
    if layer.last if transposed else layer.first:
        act = "tanh" if transposed else "leaky_relu"
        yield _act_backward(layer, batch, channels, side, act, table)
    elif transposed or not layer.last:
        yield from _bn(layer, batch, channels, side, table, clear)


def _conv(layer: Layer, batch: Batch, end: bool, table: int) -> Iterator[_Op]:
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

        # Evaluation has the times of training.
        shown = table if bias is None else 0
        return _Op(f"{layer} {batch}: {what}", run, shown, flop, _depth(layer, t))

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
        table,
        flop,
        batch.n * layer.side**2,
    )


def _depth(layer: Layer, transposed: bool) -> int:
    """How many products each element of fprop, or of dgrad where ``transposed``, is the sum of."""
    if not transposed:
        return layer.ch * layer.kernel**2
    # Of a low side of 1x1 each pixel of the high side meets one tap; else those a stride apart.
    return layer.cl * (1 if layer.side == 1 else -(-layer.kernel // layer.stride)) ** 2


def _act_backward(layer: Layer, batch: Batch, c: int, side: int, act: str, table: int) -> _Op:
    dy, y = (images_of(batch.n, c, side, batch.dtype, "cpu") for _ in range(2))
    return _Op(
        f"{layer} {batch}: {act} backward",
        lambda backend: conv.act_backward(dy, y, act, _SLOPE, backend),
        table,
    )


def _bn(
    layer: Layer, batch: Batch, c: int, side: int, table: int, clear: Callable[[], None]
) -> Iterator[_Op]:
    x, dy = (images_of(batch.n, c, side, batch.dtype, "cpu") for _ in range(2))
    weight, bias, running_mean, running_var = (torch.empty(c) for _ in range(4))
    mean, var, invstd = (torch.empty(batch.groups, c) for _ in range(3))
    act, rows = _ACT[layer.net], batch.n // batch.groups * side**2

    def statistics(backend: str) -> Tensor:
        """As the convolution before it leaves them."""
        low, high, kernel = layer.images(batch.n, batch.dtype, "cpu")
        transposed = layer.net == "G"
        given = (low if transposed else high), kernel, None, layer.stride, layer.padding
        how = transposed, "none", _SLOPE, batch.groups, backend
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
    yield _Op(name, lambda backend: forward(backend, statistics(backend)), table)
    yield _Op(f"{name}, own statistics", lambda backend: forward(backend, None), table)
    yield _Op(f"{name}, backward", backward, table)
    yield _Op(f"{layer} {batch}: running statistics", move, table)
    yield _Op(f"{name}, evaluation", lambda backend: forward(backend, None, False), 0)


def _loss(batch: Batch, table: int) -> _Op:
    logits = torch.empty(batch.n, dtype=batch.dtype)
    targets = [1.0, 0.0][: batch.groups]
    return _Op(
        f"loss {batch}",
        lambda backend: gan_loss.gan_loss_forward(logits, targets, "bce", backend),
        table,
    )


def _augment(batch: Batch, h: int, w: int, c: int, table: int) -> Iterator[_Op]:
    images = torch.empty(batch.n, h, w, c, dtype=torch.uint8)
    index = torch.empty(batch.n, dtype=torch.int64)
    flip = torch.empty(batch.n, dtype=torch.bool)

    def run(chosen: Tensor | None, flipped: Tensor | None, backend: str) -> object:
        return augment.augment_forward(images, chosen, flipped, batch.dtype, backend)

    name = f"images {h}x{w} {batch}"
    yield _Op(f"{name}: gather, flip", functools.partial(run, index, flip), table)
    yield _Op(f"{name}: gather", functools.partial(run, index, None), table)
    yield _Op(f"{name}: scale", functools.partial(run, None, None), table)


def _odd(batch: Batch, clear: Callable[[], None]) -> Iterator[_Op]:
    """The instances for shapes that are no multiple of 16 bytes, and for 2 and 4 channels."""
    of_high = (*range(1, _MOST_THIN + 1), _ODD_CHANNELS, _FEW_CHANNELS)
    both = ((_ODD_CHANNELS, _ODD_SIDE), (_FEW_CHANNELS, 16))
    for ch, (cl, side) in itertools.product(of_high, both):
        layer = Layer("D", cl, ch, side, 4, 2, 1, True, False)
        yield from _conv(layer, batch, True, 0)
    # Of a kernel that is no multiple of 16 bytes either.
    layer = Layer("D", 1, _ODD_CHANNELS, 1, 3, 1, 0, False, True)
    yield from _conv(layer, batch, False, 0)
    layer = Layer("D", _ODD_CHANNELS, _ODD_CHANNELS, _ODD_SIDE, 3, 1, 1, True, False)
    yield from _conv(layer, batch, True, 0)
    layer = Layer("G", 1, _ODD_CHANNELS, 1, _ODD_SIDE, 1, 0, True, False)
    yield from _bn(layer, batch, _ODD_CHANNELS, _ODD_SIDE, 0, clear)
    yield from _augment(batch, _ODD_SIDE, _ODD_SIDE, 3, 0)
