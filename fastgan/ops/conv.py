"""Convolution between a low-resolution and a high-resolution side, in its three directions.

A low side ``L [N, Cl, h, w]`` and a high side ``H [N, Ch, H, W]`` are tied by one weight
``[Cl, Ch, kh, kw]``, that of ``ConvTranspose2d(Cl, Ch)`` and of ``Conv2d(Ch, Cl)``. With stride
``s`` and padding ``p``:

    fprop:  L[n, a, i, j] = sum over b, u, v of H[n, b, s·i+u-p, s·j+v-p] · W[a, b, u, v]
    dgrad:  H[n, b, y, x] = sum over a, i, j of L[n, a, i, j] · W[a, b, y-s·i+p, x-s·j+p]
    wgrad:  W[a, b, u, v] = sum over n, i, j of L[n, a, i, j] · H[n, b, s·i+u-p, s·j+v-p]

Each is linear in both of its arguments and the other two are its adjoints: a convolution is fprop,
a transposed one dgrad, and the gradients of either are two of the three.

The C++ kernels have the shapes that GANs are made of: 4x4 with stride 2 and padding 1, by
Winograd's minimal filtering F(m, 2) (Winograd 1980; Lavin & Gray 2016,
https://arxiv.org/abs/1509.09308) or, where the high side has 1 to 4 channels, directly; and a low
side of 1x1, where it is a matrix product. Other shapes are torch's. The Triton kernels are implicit
matrix products of any shape, as the CUDA kernels are, which have others too for the two ends of a
network, where a side has 1 to 4 channels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import gpu
from fastgan.errors import InputError
from fastgan.gpu import empty, empty_images
from fastgan.ops import cpp, cuda, triton, tuning
from fastgan.ops.activation import ACTIVATIONS
from fastgan.ops.autocast import under_autocast
from fastgan.ops.backend import (
    fastest_backend,
    kernels_of,
    requested_backend,
    say_left_to_reference,
    select_backend,
)

# The tile on the low side of each way by Winograd; 0 is the direct kernel.
_TILES = {"winograd4": 4, "winograd3": 3, "winograd2": 2, "thin": 0}
_MOST_THIN_CHANNELS = 4

# The ways of the CUDA kernels: direct ones where one side has few channels, and tiles of products.
_DIRECT = "direct"
# Channels of a low side of 1x1 that are dot products.
_MOST_DOTS = 4
_PRODUCTS = {"128x128": (128, 128), "128x64": (128, 64), "64x64": (64, 64)}
_SMALLEST = "64x64"
# Along each side of a kernel that they take.
_MOST_TAPS = 16
# From so many rows on, statistics are of 128 each, where csrc/cuda/conv.cuh has tiles of as many.
_MANY_ROWS = 32768
# From so many outputs on there are large tiles enough to occupy a GPU.
_MANY_OUTPUTS = 128 * 128 * 128


def conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    transposed: bool,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """The formula above in differentiable torch. Arguments as in :func:`conv`."""
    convolve = F.conv_transpose2d if transposed else F.conv2d
    y = convolve(x, weight, bias, stride=stride, padding=padding)
    return ACTIVATIONS[activation](y, negative_slope)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The sizes of one convolution, whichever its direction."""

    n: int
    cl: int
    h: int
    w: int
    ch: int
    high_h: int
    high_w: int
    kh: int
    kw: int
    stride: int
    padding: int
    groups: int

    def low(self) -> tuple[int, int, int, int]:
        return self.n, self.cl, self.h, self.w

    def high(self) -> tuple[int, int, int, int]:
        return self.n, self.ch, self.high_h, self.high_w

    def doubles(self) -> bool:
        """4x4 with stride 2 and padding 1, the high side twice the low one."""
        sizes = self.kh, self.kw, self.stride, self.padding, self.high_h, self.high_w
        return sizes == (4, 4, 2, 1, 2 * self.h, 2 * self.w)

    def thin(self) -> bool:
        """Doubles, and the high side has few channels: the image's end of a network."""
        return self.doubles() and self.ch <= _MOST_THIN_CHANNELS

    def projection(self) -> bool:
        """A low side of 1x1 without padding, which is a matrix product."""
        low = (self.h, self.w, self.padding) == (1, 1, 0)
        return low and (self.kh, self.kw) == (self.high_h, self.high_w)

    def output(self, transposed: bool) -> tuple[int, int, int, int]:
        """The sizes of what comes out of the convolution, transposed or not."""
        return self.high() if transposed else self.low()


def _direction(transposed: bool) -> str:
    """Of a convolution forward."""
    return "dgrad" if transposed else "fprop"


def _problem(
    low: tuple[int, ...] | torch.Size,
    high: tuple[int, ...] | torch.Size,
    weight: tuple[int, ...] | torch.Size,
    stride: int,
    padding: int,
    groups: int = 0,
) -> _Problem:
    n, cl, h, w = low
    return _Problem(
        n, cl, h, w, high[1], high[2], high[3], weight[2], weight[3], stride, padding, groups
    )


def _output_sizes(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    transposed: bool,
    rest: tuple[int, int] = (0, 0),
) -> tuple[int, int, int, int]:
    n, _, *sides = x.shape
    kernel = weight.shape[2:]
    if transposed:
        h, w = ((s - 1) * stride - 2 * padding + k for s, k in zip(sides, kernel, strict=True))
        return n, weight.shape[1], h + rest[0], w + rest[1]
    h, w = ((s + 2 * padding - k) // stride + 1 for s, k in zip(sides, kernel, strict=True))
    return n, weight.shape[0], h, w


def _forward_problem(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    transposed: bool,
    groups: int,
    rest: tuple[int, int] = (0, 0),
) -> _Problem:
    out = _output_sizes(x, weight, stride, padding, transposed, rest)
    low, high = (tuple(x.shape), out) if transposed else (out, tuple(x.shape))
    return _problem(low, high, weight.shape, stride, padding, groups)


@dataclasses.dataclass(frozen=True)
class _Epilogue:
    """What follows the sum: bias, activation, and the statistics of the result."""

    bias: Tensor | None = None
    activation: str = "none"
    negative_slope: float = 0.0
    stats: Tensor | None = None


class _Kernels:
    """What can compute one problem: kernels of our own, each a way, and the way ``torch``."""

    def __init__(self, problem: _Problem, dtype: torch.dtype) -> None:
        self.problem = problem
        self._dtype = dtype

    def ways(self, direction: str) -> tuple[str, ...]:
        """Our own, the likeliest first."""
        raise NotImplementedError

    def choose(
        self, direction: str, backend: str, device: torch.device, run: Callable[[str], object]
    ) -> str:
        """The fastest way of our own, and of torch's too where ``backend`` is auto."""
        p, own = self.problem, self.ways(direction)
        sizes = f"n{p.n} low {p.cl}x{p.h}x{p.w} high {p.ch}x{p.high_h}x{p.high_w}"
        if not (p.doubles() or p.projection()):
            sizes += f" kernel {p.kh}x{p.kw} stride {p.stride} padding {p.padding}"
        ways = (*own, "torch")
        return tuning.fastest(
            f"{direction} {sizes} groups {p.groups} {self._key()}",
            {way: functools.partial(run, way) for way in ways},
            ways if backend == "auto" else own,
            device,
        )

    def forward(
        self, way: str, transposed: bool, x: Tensor, weight: Tensor, end: _Epilogue
    ) -> Tensor:
        """fprop, or dgrad where ``transposed``, and what follows it."""
        p = self.problem
        if way != "torch":
            out = self.empty_images(x, *p.output(transposed))
            if self._forward(way, transposed, x, weight, out, end):
                return out
            if end.bias is not None:
                out += end.bias.view(1, -1, 1, 1)
        else:
            step, rest = ([p.stride] * 2, [p.padding] * 2), [0, 0]
            if transposed:
                fits = _output_sizes(x, weight, p.stride, p.padding, True)
                rest = [p.high_h - fits[2], p.high_w - fits[3]]
            out = cpp.dense(
                torch.convolution(x, weight, end.bias, *step, [1, 1], transposed, rest, 1)
            )
        if end.activation != "none":
            out = ACTIVATIONS[end.activation](out, end.negative_slope)
        if end.stats is not None:
            self._sum_stats(out, end.stats, transposed)
        return out

    def wgrad(self, way: str, low: Tensor, high: Tensor) -> Tensor:
        p = self.problem
        sizes = p.cl, p.ch, p.kh, p.kw
        if way != "torch":
            out = self.empty_images(low, *sizes)
            self._wgrad(way, low, high, out)
            return out
        step, like = ([p.stride] * 2, [p.padding] * 2), self.empty_images(low, *sizes)
        wanted = [False, True, False]
        gradients = torch.ops.aten.convolution_backward(
            low, high, like, None, *step, [1, 1], False, [0, 0], 1, wanted
        )
        return cpp.dense(gradients[1])

    def empty_images(self, like: Tensor, *sizes: int) -> Tensor:
        raise NotImplementedError

    def empty_stats(self, like: Tensor, *sizes: int) -> Tensor:
        raise NotImplementedError

    def stats_tiles(self, transposed: bool) -> int:
        """How many tiles of statistics a convolution's output has; see :func:`conv_forward`."""
        raise NotImplementedError

    def _key(self) -> str:
        """What a measurement depends on besides the sizes."""
        raise NotImplementedError

    def _forward(
        self, way: str, transposed: bool, x: Tensor, weight: Tensor, out: Tensor, end: _Epilogue
    ) -> bool:
        """By a way of our own; whether what follows it is done too."""
        raise NotImplementedError

    def _wgrad(self, way: str, low: Tensor, high: Tensor, out: Tensor) -> None:
        raise NotImplementedError

    def _sum_stats(self, y: Tensor, stats: Tensor, transposed: bool) -> None:
        """The statistics of ``y`` where the way has summed none."""
        raise NotImplementedError


def _flat(x: Tensor) -> Tensor:
    """``[N, H·W·C]`` of a dense ``[N, C, H, W]``, or of a weight."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1)


class _Cpp(_Kernels):
    """The C++ kernels; a way is a tile of Winograd's, the direct one, or a matrix product."""

    def ways(self, direction: str) -> tuple[str, ...]:
        p = self.problem
        if p.thin():
            return ("thin",)
        if p.doubles():
            # Tiles that the image fills badly are not worth a measurement.
            tiles = (4, 2) if p.h % 3 or p.w % 3 else (4, 3, 2)
            return tuple(f"winograd{m}" for m in tiles)
        return ("matmul",) if p.projection() else ()

    def _key(self) -> str:
        return f"threads {torch.get_num_threads()}"

    def empty_images(self, like: Tensor, *sizes: int) -> Tensor:
        return cpp.empty_images(*sizes)

    def empty_stats(self, like: Tensor, *sizes: int) -> Tensor:
        return cpp.empty(*sizes)

    def stats_tiles(self, transposed: bool) -> int:
        p = self.problem
        if not p.groups or not self.ways(_direction(transposed))[0].startswith("winograd"):
            return 0
        k = cpp.kernels()
        tiles = k.conv_dgrad_stats_tiles if transposed else k.conv_fprop_stats_tiles
        return p.groups * int(tiles(self._shape(), p.groups))

    def _forward(
        self, way: str, transposed: bool, x: Tensor, weight: Tensor, out: Tensor, end: _Epilogue
    ) -> bool:
        if way == "matmul":
            matrix = _flat(weight)
            torch.mm(_flat(x), matrix if transposed else matrix.t(), out=_flat(out))
            return False
        k = cpp.kernels()
        kernel = k.conv_dgrad if transposed else k.conv_fprop
        kernel(
            _TILES[way],
            self._shape(),
            x.data_ptr(),
            k.ConvWeight(weight.data_ptr(), *weight.stride()),
            out.data_ptr(),
            k.ConvEpilogue(
                bias=cpp.address(end.bias),
                activation=cpp.ACTIVATION_CODES[end.activation],
                negative_slope=end.negative_slope,
                stats=cpp.address(end.stats),
                groups=max(self.problem.groups, 1),
            ),
            torch.get_num_threads(),
        )
        return True

    def _wgrad(self, way: str, low: Tensor, high: Tensor, out: Tensor) -> None:
        if way == "matmul":
            torch.mm(_flat(low).t(), _flat(high), out=_flat(out))
            return
        cpp.kernels().conv_wgrad(
            _TILES[way],
            self._shape(),
            low.data_ptr(),
            high.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )

    def _sum_stats(self, y: Tensor, stats: Tensor, transposed: bool) -> None:
        k, groups = cpp.kernels(), self.problem.groups
        images = k.conv_images_per_stats_tile(self._shape(), groups)
        n, c, h, w = y.shape
        k.bn_stats(
            k.BatchNormShape(groups, n // groups * h * w, c),
            images * h * w,
            4 if transposed else 1,
            cpp.address(y),
            cpp.address(stats),
            torch.get_num_threads(),
        )

    def _shape(self) -> Any:
        p = self.problem
        return cpp.kernels().ConvShape(p.n, p.h, p.w, p.cl, p.ch)


class _OnGpu(_Kernels):
    """Kernels that write to torch's own memory."""

    def empty_images(self, like: Tensor, *sizes: int) -> Tensor:
        return empty_images(like, *sizes)

    def empty_stats(self, like: Tensor, *sizes: int) -> Tensor:
        return empty(like, *sizes)


class _Triton(_OnGpu):
    """The Triton kernels; a way is a tile of the matrix product."""

    def __init__(self, problem: _Problem, dtype: torch.dtype) -> None:
        super().__init__(problem, dtype)
        self._native = triton.kernels("conv")
        kernel, step = (problem.kh, problem.kw), (problem.stride, problem.padding)
        self._product = self._native.Problem.of(
            problem.low(), problem.high(), kernel, *step, problem.groups, dtype
        )

    def ways(self, direction: str) -> tuple[str, ...]:
        return tuple(self._tiles(direction))

    def stats_tiles(self, transposed: bool) -> int:
        if not self.problem.groups:
            return 0
        return int(self._product.stats_tiles(_direction(transposed)))

    def _key(self) -> str:
        return f"{self._dtype} {self._product.precision}"

    def _forward(
        self, way: str, transposed: bool, x: Tensor, weight: Tensor, out: Tensor, end: _Epilogue
    ) -> bool:
        kernel = self._native.conv_dgrad if transposed else self._native.conv_fprop
        tile = self._tiles(_direction(transposed))[way]
        after = end.bias, end.activation, end.negative_slope
        kernel(self._product, tile, x, weight, *after, out, end.stats)
        return True

    def _wgrad(self, way: str, low: Tensor, high: Tensor, out: Tensor) -> None:
        self._native.conv_wgrad(self._product, self._tiles("wgrad")[way], low, high, out)

    def _sum_stats(self, y: Tensor, stats: Tensor, transposed: bool) -> None:
        triton.kernels("bn_act").bn_stats(y, stats, self.problem.groups)

    def _tiles(self, direction: str) -> dict[str, Any]:
        return _tiles_of(self._product, direction)


# Asked for twice in each call of an op, and for long the same.
@functools.lru_cache(maxsize=1024)
def _tiles_of(product: Any, direction: str) -> dict[str, Any]:
    """What :class:`_Triton` may choose from, by the name of the way."""
    tiles = product.tiles(direction)
    # An interpreter's times say nothing of a GPU's.
    return {str(tile): tile for tile in (tiles[:1] if triton.interpreted() else tiles)}


class _Cuda(_OnGpu):
    """The CUDA kernels; a way is a tile of the product on tensor cores, or the direct kernel."""

    def ways(self, direction: str) -> tuple[str, ...]:
        direct = (_DIRECT,) if self._direct_kind(direction) else ()
        return (*direct, *self._tiles(direction))

    def stats_tiles(self, transposed: bool) -> int:
        direction = _direction(transposed)
        return self._stats_tiles(self.ways(direction)[0], direction) if self.problem.groups else 0

    def _key(self) -> str:
        return f"{self._dtype} {'tf32' if self._tf32() else 'tf32x3'}"

    def _forward(
        self, way: str, transposed: bool, x: Tensor, weight: Tensor, out: Tensor, end: _Epilogue
    ) -> bool:
        given, direction = end.stats, _direction(transposed)
        # Tiles may be asked for as other kernels write them.
        own = given is not None and len(given) == self._stats_tiles(way, direction)
        cuda.launch(
            f"{self._kind(way, direction)}_{direction}",
            *(self.problem.stride, self.problem.padding, self._product(way)),
            max(self.problem.groups, 1),
            *(cuda.aligned(x), cuda.aligned(weight), cuda.aligned(end.bias)),
            *(cpp.ACTIVATION_CODES[end.activation], end.negative_slope, out),
            given if own else None,
        )
        if given is not None and not own:
            self._sum_stats(out, given, transposed)
        return True

    def _wgrad(self, way: str, low: Tensor, high: Tensor, out: Tensor) -> None:
        sides, step = _PRODUCTS[way], (self.problem.stride, self.problem.padding)
        parts = self._of_sizes("conv_wgrad_parts", *sides, gpu.multiprocessors(low.device))
        sums = empty(low, parts, out.numel()) if parts > 1 else None
        low, high = cuda.aligned(low), cuda.aligned(high)
        cuda.launch("conv_wgrad", *step, self._product(way), low, high, out, sums)

    def _sum_stats(self, y: Tensor, stats: Tensor, transposed: bool) -> None:
        cuda.launch("bn_stats", y, stats, self.problem.groups)

    def _direct_kind(self, direction: str) -> str:
        p = self.problem
        if direction == "dgrad" and p.thin():
            return "thin"
        if direction == "fprop" and p.projection() and p.cl <= _MOST_DOTS:
            return "dot"
        return ""

    def _kind(self, way: str, direction: str) -> str:
        return self._direct_kind(direction) if way == _DIRECT else "conv"

    def _tiles(self, direction: str) -> tuple[str, ...]:
        """Of those of tensor cores, the likeliest first."""
        p = self.problem
        if max(p.kh, p.kw) > _MOST_TAPS:
            return ()
        taps = p.kh * p.kw
        if direction == "wgrad":
            rows, columns = p.cl, p.ch * taps
        elif direction == "fprop":
            rows, columns = p.n * p.h * p.w, p.cl
        elif p.projection():
            rows, columns = p.n, p.ch * taps
        else:
            class_h, class_w = (-(-side // p.stride) for side in (p.high_h, p.high_w))
            rows, columns = p.n * class_h * class_w, p.ch
        ch = p.ch * taps if p.projection() else p.ch
        # Large tiles are of what is copied 16 bytes at a time, by whole stages of 64 of one tap.
        along, across = (64 // self._dtype.itemsize, 16 // self._dtype.itemsize)
        runs = {
            "fprop": ((ch, along),),
            "dgrad": ((p.cl, along), (ch, across)),
            "wgrad": ((p.cl, across), (ch, across)),
        }
        if any(size % run for size, run in runs[direction]):
            return (_SMALLEST,)
        # A tile of which half is padding is not worth a measurement.
        many = direction != "wgrad" and rows >= _MANY_ROWS and not (p.cl % 32 or ch % 32)
        found = [
            name
            for name, (m, n) in _PRODUCTS.items()
            if (m == 64 or rows > 64) and (n == 64 or columns > 64)
            if m == 128 or not many
        ]
        # A weight gradient's sum is cut until there are tiles enough.
        large = direction == "wgrad" or rows * columns >= _MANY_OUTPUTS
        return tuple(found if large else found[::-1])

    def _product(self, way: str) -> tuple[int, int, bool] | None:
        sides = _PRODUCTS.get(way)
        return None if sides is None else (*sides, self._tf32())

    def _tf32(self) -> bool:
        return self._dtype != torch.float32 or gpu.tf32()

    def _stats_tiles(self, way: str, direction: str) -> int:
        kind = self._kind(way, direction)
        return self._of_sizes(f"{kind}_{direction}_stats_tiles", self.problem.groups)

    def _of_sizes(self, name: str, *others: int) -> int:
        p = self.problem
        high = p.ch, p.high_h, p.high_w, p.kh, p.kw, p.stride, p.padding
        return int(getattr(cuda.kernels(), name)(p.n, p.cl, p.h, p.w, *high, *others))


class _Either(_OnGpu):
    """Several kernels of our own for one problem, each with its ways."""

    def __init__(self, kernels: list[_Kernels]) -> None:
        super().__init__(kernels[0].problem, kernels[0]._dtype)
        self._kernels = kernels

    def ways(self, direction: str) -> tuple[str, ...]:
        return tuple(way for one in self._kernels for way in one.ways(direction))

    def forward(
        self, way: str, transposed: bool, x: Tensor, weight: Tensor, end: _Epilogue
    ) -> Tensor:
        owner = self._owner(way, _direction(transposed))
        return owner.forward(way, transposed, x, weight, end)

    def wgrad(self, way: str, low: Tensor, high: Tensor) -> Tensor:
        return self._owner(way, "wgrad").wgrad(way, low, high)

    def stats_tiles(self, transposed: bool) -> int:
        return self._kernels[0].stats_tiles(transposed)

    def _key(self) -> str:
        return self._kernels[0]._key()

    def _owner(self, way: str, direction: str) -> _Kernels:
        found = (one for one in self._kernels if way in one.ways(direction))
        return next(found, self._kernels[0])


_KINDS: dict[str, Callable[[_Problem, torch.dtype], _Kernels]] = {
    "cpp": _Cpp,
    "triton": _Triton,
    "cuda": _Cuda,
}


def _kernels(backend: str, problem: _Problem, x: Tensor) -> _Kernels:
    # The Triton kernels first, where there are any: they have every shape, and statistics of each.
    names = sorted(kernels_of(backend, x.device), reverse=True)
    found = [_KINDS[name](problem, x.dtype) for name in names]
    return found[0] if len(found) == 1 else _Either(found)


@torch.library.custom_op("fastgan::conv_forward", mutates_args=())
def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    transposed: bool,
    activation: str,
    negative_slope: float,
    groups: int,
    backend: str,
    rest_h: int = 0,
    rest_w: int = 0,
) -> tuple[Tensor, Tensor]:
    """fprop, or dgrad where ``transposed``, with what follows it.

    Args:
        rest_h, rest_w: by how many pixels the high side is larger than the low side needs it to be:
            dgrad's result, and not to be seen from its arguments.

    Returns:
        ``y``, and ``stats [tiles, 3, C]`` float32: the count, mean and sum of squared deviations of
        ``y`` in each tile; tiles of one of the ``groups`` parts of the batch follow one another.
        ``[0, 3, C]`` where ``groups`` is 0 or the kernel has no statistics.
    """
    rest = rest_h, rest_w
    problem = _forward_problem(x, weight, stride, padding, transposed, groups, rest)
    kernels = _kernels(backend, problem, x)
    x, weight, bias = cpp.dense(x), cpp.dense(weight), cpp.contiguous(bias)
    channels = problem.output(transposed)[1]
    stats = kernels.empty_stats(x, kernels.stats_tiles(transposed), 3, channels)
    end = _Epilogue(bias, activation, negative_slope, stats if len(stats) else None)

    def run(way: str) -> Tensor:
        return kernels.forward(way, transposed, x, weight, end)

    way = kernels.choose(_direction(transposed), backend, x.device, run)
    return run(way), stats


@conv_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    transposed: bool,
    activation: str,
    negative_slope: float,
    groups: int,
    backend: str,
    rest_h: int = 0,
    rest_w: int = 0,
) -> tuple[Tensor, Tensor]:
    rest = rest_h, rest_w
    problem = _forward_problem(x, weight, stride, padding, transposed, groups, rest)
    sizes = problem.output(transposed)
    tiles = _kernels(backend, problem, x).stats_tiles(transposed)
    stats = x.new_empty(tiles, 3, sizes[1], dtype=torch.float32)
    return cpp.fake_images(x, *sizes), stats


@torch.library.custom_op("fastgan::conv_wgrad", mutates_args=())
def conv_wgrad(
    low: Tensor,
    high: Tensor,
    kernel: list[int],
    stride: int,
    padding: int,
    backend: str,
) -> Tensor:
    """wgrad: ``[Cl, Ch, kh, kw]``, in ``torch.channels_last``, from both sides."""
    sizes = (low.shape[1], high.shape[1], *kernel)
    problem = _problem(low.shape, high.shape, sizes, stride, padding)
    kernels = _kernels(backend, problem, low)
    low, high = cpp.dense(low), cpp.dense(high)

    def run(way: str) -> Tensor:
        return kernels.wgrad(way, low, high)

    return run(kernels.choose("wgrad", backend, low.device, run))


@conv_wgrad.register_fake
def _(
    low: Tensor,
    high: Tensor,
    kernel: list[int],
    stride: int,
    padding: int,
    backend: str,
) -> Tensor:
    return cpp.fake_images(low, low.shape[1], high.shape[1], kernel[0], kernel[1])


@torch.library.custom_op("fastgan::act_backward", mutates_args=())
def act_backward(
    dy: Tensor, y: Tensor, activation: str, negative_slope: float, backend: str
) -> Tensor:
    """``dy · act'(x)`` from ``y = act(x)``, both ``[N, C, H, W]``; in ``torch.channels_last``."""
    dy, y = cpp.dense(dy), cpp.dense(y)
    code = cpp.ACTIVATION_CODES[activation]

    def run(backend: str) -> Tensor:
        if backend == "cpp":
            out, threads = cpp.empty_images(*y.shape), torch.get_num_threads()
            addresses = dy.data_ptr(), y.data_ptr()
            cpp.kernels().act_backward(
                y.numel(), *addresses, code, negative_slope, out.data_ptr(), threads
            )
            return out
        out = empty_images(y, *y.shape)
        if backend == "triton":
            triton.kernels("conv").act_backward(dy, y, activation, negative_slope, out)
        else:
            given = cuda.aligned(dy), cuda.aligned(y)
            cuda.launch("act_backward", *given, code, negative_slope, out)
        return out

    # `auto` stands for one kernel of our own on the CPU.
    names = kernels_of(backend, y.device)
    backend = names[0] if len(names) == 1 else backend
    key = f"act_backward {y.numel()} {activation} {y.dtype}"
    return run(fastest_backend(backend, "conv", key, run, y))


@act_backward.register_fake
def _(dy: Tensor, y: Tensor, activation: str, negative_slope: float, backend: str) -> Tensor:
    return cpp.fake_images(y, *y.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, stride, padding, transposed, activation, slope, _, backend, *_ = inputs
    y = output[0] if activation != "none" else None
    ctx.save_for_backward(x, weight, y)
    ctx.set_materialize_grads(False)  # of the statistics, which would be filled with zeros
    ctx.arguments = stride, padding, transposed, activation, slope, backend
    ctx.has_bias = bias is not None


def _backward(ctx, dy, dstats):  # type: ignore[no-untyped-def]
    x, weight, y = ctx.saved_tensors
    stride, padding, transposed, activation, slope, backend = ctx.arguments
    if dy is None:
        return (None,) * 12
    if activation != "none":
        dy = act_backward(dy, y, activation, slope, backend)
    dx = dweight = dbias = None
    if ctx.needs_input_grad[0]:
        rest = (0, 0)
        if not transposed:
            fits = _output_sizes(dy, weight, stride, padding, True)
            rest = x.shape[2] - fits[2], x.shape[3] - fits[3]
        step = stride, padding, not transposed
        dx, _ = conv_forward(dy, weight, None, *step, "none", 0.0, 0, backend, *rest)
    if ctx.needs_input_grad[1]:
        low, high = (x, dy) if transposed else (dy, x)
        dweight = conv_wgrad(low, high, list(weight.shape[2:]), stride, padding, backend)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        dbias = dy.sum((0, 2, 3))
    return dx, dweight, dbias, *([None] * 9)


conv_forward.register_autograd(_backward, setup_context=_setup_context)


def kernel_backend(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    transposed: bool,
    negative_slope: float,
) -> str:
    """``reference``, or from what :func:`conv_forward` is to choose: a backend's own or ``auto``.

    Raises:
        NotBuiltError: a backend was asked for by name that cannot; the message says why.
    """
    if select_backend("conv", x, weight, bias) == "reference":
        return "reference"
    # What does not fit is for torch to complain of.
    if (
        x.ndim == weight.ndim == 4
        and x.shape[1] == weight.shape[0 if transposed else 1]
        and (bias is None or bias.shape == weight.shape[1 if transposed else 0 :][:1])
        and stride >= 1
        and padding >= 0
        and negative_slope >= 0.0
        and _has_way(x, weight, stride, padding, transposed)
    ):
        return requested_backend()
    if requested_backend() != "auto":
        say_left_to_reference(
            f"conv of a {list(weight.shape)} weight, stride {stride}, padding {padding} on "
            f"{list(x.shape)}"
        )
    return "reference"


def _has_way(x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool) -> bool:
    problem = _forward_problem(x, weight, stride, padding, transposed, 0)
    # One of no output has none.
    sizes = min(problem.low() + problem.high())
    if sizes <= 0:
        return False
    names = kernels_of(requested_backend(), x.device)
    # The Triton kernels have every shape, and are not to be looked for while a graph is traced.
    if "triton" in names:
        return True
    direction = _direction(transposed)
    return any(_KINDS[name](problem, x.dtype).ways(direction) for name in names)


@under_autocast(x="low", weight="low", bias="low")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    transposed: bool = False,
    activation: str = "none",
    negative_slope: float = 0.2,
) -> Tensor:
    """A convolution, or a transposed one, with bias and activation.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, any memory format.
        weight: ``[C_out, C, kh, kw]``, or ``[C, C_out, kh, kw]`` where ``transposed``.
        bias: ``[C_out]`` or None.
        stride: of both dimensions, at least 1.
        padding: zeros at each side of both dimensions, at least 0.
        transposed: the adjoint of a convolution of these sizes, as in ``ConvTranspose2d``.
        activation: ``none``, ``relu``, ``leaky_relu`` or ``tanh``.
        negative_slope: of ``leaky_relu``.

    Returns:
        ``[N, C_out, H', W']``; in ``torch.channels_last`` from kernels of our own.

    Raises:
        InputError: ``activation`` is unknown.
        NotBuiltError: a backend was asked for by name that cannot take these tensors.

    Equivalent to::

        convolve = F.conv_transpose2d if transposed else F.conv2d
        act(convolve(x, weight, bias, stride=stride, padding=padding))
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"activation={activation!r}: choose from {', '.join(ACTIVATIONS)}")
    backend = kernel_backend(x, weight, bias, stride, padding, transposed, negative_slope)
    if backend == "reference":
        return conv_reference(
            x, weight, bias, stride, padding, transposed, activation, negative_slope
        )
    return conv_forward(
        x, weight, bias, stride, padding, transposed, activation, negative_slope, 0, backend
    )[0]
