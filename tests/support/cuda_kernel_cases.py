"""Calls of the CUDA kernels on small ragged arrays, and what they should give, in NumPy.

Without torch, which a process that runs PTX or is under a sanitizer does not have. A case is run by
something that has the functions of ``fastgan._cuda``: the build for the CPU
(:mod:`support.cuda_host`) or the extension whose launches are executed as PTX
(:mod:`support.cuda_driver`). bfloat16 is ``uint16`` that holds its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from support import gan_losses

# A unit in the last place of 1.
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
ACTIVATIONS = ("none", "relu", "leaky_relu", "tanh")
SLOPE, NORM_EPS, MOMENTUM = 0.2, 1e-5, 0.1

Arrays = dict[str, np.ndarray]


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values`` rounded to ``dtype``, as memory holds it."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def to_float(bits: np.ndarray) -> np.ndarray:
    """float64 of what memory holds."""
    if bits.dtype == np.uint16:
        bits = (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float64)


class Kernels:
    """The functions of ``fastgan._cuda``, on NumPy arrays.

    Args:
        module: has the functions, and ``Array``.
        give: is told of each array that kernels may use.
    """

    def __init__(self, module: Any, give: Callable[[np.ndarray], None] = lambda array: None):
        self.module = module
        self._give = give

    def call(self, name: str, *arguments: Any) -> Any:
        given = (self._array(a) if isinstance(a, np.ndarray) else a for a in arguments)
        return getattr(self.module, name)(*given, 0)

    def _array(self, array: np.ndarray) -> Any:
        self._give(array)
        strides = [stride // array.itemsize for stride in array.strides]
        dtype = "bfloat16" if array.dtype == np.uint16 else str(array.dtype)
        return self.module.Array(array.ctypes.data, dtype, 0, list(array.shape), strides)


class Case(NamedTuple):
    """One call, or a few that belong together.

    Attributes:
        run: makes its inputs and calls the kernels; what they wrote.
        want: the same in float64, by other means.
        dtype: of what is read, and of ``rounded``.
        rounded: the outputs of that dtype; the others are float32.
        inexact: whether a function is involved that a GPU and a CPU compute differently.
        terms: how many roundings of float32 a sum may come to.
    """

    run: Callable[[Kernels], Arrays]
    want: Callable[[], Arrays]
    dtype: str
    rounded: tuple[str, ...]
    inexact: bool = False
    terms: int = 8

    def wrong(self, got: Arrays) -> list[str]:
        """What is further from float64 than its dtype explains."""
        found = []
        for name, want in self.want().items():
            difference = np.linalg.norm(to_float(got[name]) - want)
            norm = np.linalg.norm(want)
            allowed = self.terms * EPS["float32"]
            if name in self.rounded and self.dtype != "float32":
                allowed = EPS[self.dtype]
            # Not <=, so that NaN is wrong too.
            if not difference <= allowed * norm:
                found.append(f"{name} is off by {difference / norm:.1e} of {allowed:.1e}")
        return found


def on_host(path: Path | str) -> Kernels:
    """Those of a build for the CPU."""
    from support import cuda_host

    return Kernels(cuda_host.load(Path(path)))


def run_all(path: str, *names: str) -> None:
    """The cases of these names, in an order without a pattern: for a process under a sanitizer.

    Raises:
        AssertionError: a result is wrong.
    """
    from support import cuda_host

    kernels = on_host(path)
    with cuda_host.order(kernels.module, "random"):
        for name in names:
            assert not CASES[name].wrong(CASES[name].run(kernels)), name


class _Draw:
    """Numbers of a case, in memory that begins and ends with them."""

    def __init__(self, dtype: str):
        self._random = np.random.default_rng(0)
        self._dtype = dtype

    def images(self, n: int, c: int, h: int, w: int, scale: float = 1.0) -> np.ndarray:
        """``[n, c, h, w]`` in the order n, h, w, c."""
        values = scale * self._random.standard_normal((n, h, w, c))
        return to_bits(values, self._dtype).transpose(0, 3, 1, 2)

    def of_channels(self, *shape: int, dtype: str = "float32", mean: float = 0.0) -> np.ndarray:
        return to_bits(mean + self._random.standard_normal(shape), dtype)

    def integers(self, high: int, *shape: int, dtype: str) -> np.ndarray:
        return self._random.integers(0, high, shape).astype(dtype)


def poisoned(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """NaN throughout."""
    array = np.empty(shape, np.uint16 if dtype == "bfloat16" else dtype)
    array.view(np.uint8)[...] = 0xFF
    return array


def poisoned_images(n: int, c: int, h: int, w: int, dtype: str) -> np.ndarray:
    return poisoned((n, h, w, c), dtype).transpose(0, 3, 1, 2)


def activate(z: np.ndarray, activation: str) -> np.ndarray:
    return {
        "none": lambda: z,
        "relu": lambda: np.maximum(z, 0),
        "leaky_relu": lambda: np.where(z < 0, SLOPE * z, z),
        "tanh": lambda: np.tanh(z),
    }[activation]()


def gradient(z: np.ndarray, activation: str) -> np.ndarray:
    return {
        "none": lambda: np.ones_like(z),
        "relu": lambda: np.where(z > 0, 1.0, 0.0),
        "leaky_relu": lambda: np.where(z > 0, 1.0, SLOPE),
        "tanh": lambda: 1 - np.tanh(z) ** 2,
    }[activation]()


def _act(activation: str) -> tuple[int, float]:
    return ACTIVATIONS.index(activation), SLOPE


def batch_norm(
    dtype: str,
    shape: tuple[int, int, int, int],
    groups: int,
    activation: str,
    *,
    affine: bool = True,
    training: bool = True,
    tiles: int = 0,
    folded: int = 0,
) -> Case:
    """Forward and backward, and the running statistics.

    Those of the batch are of its own tiles, or of as many ``tiles`` of each group, which are
    ``folded`` into fewer.
    """
    n, c, h, w = shape
    draw = _Draw(dtype)
    x, dy = draw.images(*shape, scale=2.0), draw.images(*shape)
    weight, bias = (draw.of_channels(c, mean=1.0) for _ in range(2))
    parts = groups if training else 1
    rows = n // parts * h * w
    given_mean, given_var = draw.of_channels(1, c), 0.5 + np.abs(draw.of_channels(1, c))
    running = draw.of_channels(c, dtype=dtype), draw.of_channels(c, dtype=dtype)
    # Away from a kink, where rounding decides.
    values = to_float(x).reshape(parts, n // parts, c, h, w)
    mean, var = values.mean((1, 3, 4)), values.var((1, 3, 4))
    if not training:
        mean, var = to_float(given_mean), to_float(given_var)
    invstd = 1 / np.sqrt(var + NORM_EPS)

    def spread(of_groups: np.ndarray) -> np.ndarray:
        return of_groups[:, None, :, None, None]

    xhat = (values - spread(mean)) * spread(invstd)
    scale = to_float(weight) if affine else np.ones(c)
    shift = to_float(bias) if affine else np.zeros(c)
    z = xhat * scale[:, None, None] + shift[:, None, None]
    kept = np.abs(z.reshape(n, c, h, w)) > 1e-3
    dy.transpose(0, 2, 3, 1)[~kept.transpose(0, 2, 3, 1)] = 0

    def run(kernels: Kernels) -> Arrays:
        k = kernels.module
        own = k.bn_tiles(parts, rows, c, dtype)
        out = {"y": poisoned_images(*shape, dtype), "dx": poisoned_images(*shape, dtype)}
        channels = {name: poisoned((c,)) for name in ("dweight", "dbias")}
        of_groups = {name: poisoned((parts, c)) for name in ("mean", "invstd", "var")}
        stats = None
        if training:
            stats = poisoned((parts * (tiles or own), 3, c))
            kernels.call("bn_stats", x, stats, parts)
            if folded:
                many, stats = stats, poisoned((parts * folded, 3, c))
                kernels.call("bn_fold", many, stats, parts)
        else:
            of_groups = {
                "mean": given_mean,
                "var": given_var,
                "invstd": (1 / np.sqrt(given_var + np.float32(NORM_EPS))).astype(np.float32),
            }
        m, i, v = (of_groups[name] for name in ("mean", "invstd", "var"))
        wb = (weight, bias) if affine else (None, None)
        kernels.call(
            "bn_act_forward", x, stats, NORM_EPS, m, i, v, *wb, *_act(activation), out["y"]
        )
        kernels.call(
            "bn_act_backward",
            *(dy, x, m, i, *wb, training, *_act(activation), out["dx"]),
            *(channels["dweight"], channels["dbias"], poisoned((parts * own, 2, c))),
        )
        moved = [np.array(r) for r in running]
        kernels.call("bn_update_running", m, v, rows, MOMENTUM, *moved)
        names = ("running_mean", "running_var")
        return {**out, **channels, **of_groups, **dict(zip(names, moved, strict=True))}

    def want() -> Arrays:
        dz = to_float(dy).reshape(values.shape) * gradient(z, activation)
        dbias, dweight = dz.sum((1, 3, 4)), (dz * xhat).sum((1, 3, 4))
        centred = dz - spread(dbias / rows) - xhat * spread(dweight / rows) if training else dz
        dx = centred * spread(invstd * scale)
        moved_mean, moved_var = (to_float(r) for r in running)
        for g in range(parts):
            moved_mean = moved_mean + MOMENTUM * (mean[g] - moved_mean)
            moved_var = moved_var + MOMENTUM * (var[g] * rows / (rows - 1) - moved_var)
        return {
            "y": activate(z, activation).reshape(shape),
            "dx": dx.reshape(shape),
            "dweight": dweight.sum(0),
            "dbias": dbias.sum(0),
            "mean": mean,
            "var": var,
            "invstd": invstd,
            "running_mean": moved_mean,
            "running_var": moved_var,
        }

    rounded = ("y", "dx", "running_mean", "running_var")
    return Case(run, want, dtype, rounded, inexact=activation == "tanh", terms=32)


def loss(dtype: str, size: int, targets: tuple[float, ...], kind: str = "bce") -> Case:
    """With a logit at the hinge's kink, and some far from it."""
    logits = _Draw(dtype).of_channels(len(targets) * size, 1, dtype=dtype, mean=1.0)
    logits[[0, 1, -1], 0] = to_bits(np.array([30.0, 1.0, -30.0]), dtype)

    def run(kernels: Kernels) -> Arrays:
        out = {name: poisoned((len(targets),), dtype) for name in ("loss", "d")}
        out["dlogits"] = poisoned(logits.shape, dtype)
        of = gan_losses.KINDS.index(kind)
        kernels.call("gan_loss_forward", logits, list(targets), of, *out.values())
        return out

    def want() -> Arrays:
        return gan_losses.adversarial(to_float(logits), targets, kind)

    return Case(run, want, dtype, ("loss", "d", "dlogits"), inexact=kind == "bce")


def images(dtype: str, shape: tuple[int, int, int, int], gathered: bool, flipped: bool) -> Case:
    m, h, w, c = shape
    draw = _Draw(dtype)
    source = draw.integers(256, *shape, dtype="uint8")
    n = 3 if gathered else m
    index = draw.integers(m, n, dtype="int64") if gathered else None
    flip = np.arange(n) % 2 == 0 if flipped else None

    def run(kernels: Kernels) -> Arrays:
        out = poisoned_images(n, c, h, w, dtype)
        kernels.call("augment_forward", source, index, flip, out)
        return {"out": out}

    def want() -> Arrays:
        batch = source if index is None else source[index]
        if flip is not None:
            batch = np.where(flip[:, None, None, None], batch[:, :, ::-1], batch)
        return {"out": (batch / 127.5 - 1).transpose(0, 3, 1, 2)}

    return Case(run, want, dtype, ("out",))


def act_backward(dtype: str, shape: tuple[int, int, int, int], activation: str) -> Case:
    draw = _Draw(dtype)
    dy, y = draw.images(*shape), draw.images(*shape, scale=0.5)

    def run(kernels: Kernels) -> Arrays:
        out = poisoned_images(*shape, dtype)
        kernels.call("act_backward", dy, y, *_act(activation), out)
        return {"dx": out}

    def want() -> Arrays:
        values = to_float(y)
        # Each derivative can be read off y.
        slope = 1 - values**2 if activation == "tanh" else gradient(values, activation)
        return {"dx": to_float(dy) * slope}

    return Case(run, want, dtype, ("dx",))


class Sides(NamedTuple):
    """Of a convolution, and by which kernels: ``conv`` with a tile, ``thin`` or ``dot``.

    Attributes:
        rest: by how much the high side is larger than the low side needs it to be.
        product: rows and columns of the tile, and whether float32 is multiplied as TF32.
    """

    n: int
    cl: int
    h: int
    w: int
    ch: int
    kernel: tuple[int, int] = (4, 4)
    stride: int = 2
    padding: int = 1
    rest: tuple[int, int] = (0, 0)
    name: str = "conv"
    product: tuple[int, int, bool] | None = (64, 64, False)

    @property
    def low(self) -> tuple[int, int, int, int]:
        return self.n, self.cl, self.h, self.w

    @property
    def high(self) -> tuple[int, int, int, int]:
        h, w = (
            (side - 1) * self.stride - 2 * self.padding + kernel + rest
            for side, kernel, rest in zip(self.low[2:], self.kernel, self.rest, strict=True)
        )
        return self.n, self.ch, h, w

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return self.cl, self.ch, *self.kernel

    @property
    def sizes(self) -> tuple[int, ...]:
        """As the functions of sizes alone take them."""
        return *self.low, *self.high[1:], *self.kernel, self.stride, self.padding

    @property
    def how(self) -> tuple[Any, ...]:
        """What a call begins with."""
        return self.stride, self.padding, self.product

    def exact(self, bits: np.ndarray) -> np.ndarray:
        """float64 of what is multiplied: of float32, what one pass of TF32 leaves."""
        if bits.dtype != np.float32 or self.product is None or not self.product[2]:
            return to_float(bits)
        rounded = (bits.copy().view(np.uint32) + 0x1000) & 0xFFFFE000
        return to_float(rounded.view(np.float32))

    def taps(self, high: np.ndarray) -> np.ndarray:
        """``[n, ch, kh, kw, h, w]``: what each tap of a pixel of the low side reads."""
        pad, step = (self.padding, self.padding), self.stride
        padded = np.pad(high, ((0, 0), (0, 0), pad, pad))
        read = [
            padded[:, :, u : u + step * self.h : step, v : v + step * self.w : step]
            for u, v in np.ndindex(*self.kernel)
        ]
        read = [x[:, :, : self.h, : self.w] for x in read]
        return np.stack(read, 2).reshape(self.n, self.ch, *self.kernel, self.h, self.w)

    def fprop(self, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return np.einsum("nbuvij,abuv->naij", self.taps(high), weight, optimize=True)

    def wgrad(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return np.einsum("naij,nbuvij->abuv", low, self.taps(high), optimize=True)

    def dgrad(self, low: np.ndarray, weight: np.ndarray) -> np.ndarray:
        pad, step = self.padding, self.stride
        _, _, high_h, high_w = self.high
        padded = np.zeros((self.n, self.ch, high_h + 2 * pad, high_w + 2 * pad))
        for u, v in np.ndindex(*self.kernel):
            rows, columns = (
                slice(at, at + step * (size - 1) + 1, step)
                for at, size in ((u, self.h), (v, self.w))
            )
            padded[:, :, rows, columns] += np.einsum(
                "naij,ab->nbij", low, weight[:, :, u, v], optimize=True
            )
        return padded[:, :, pad : pad + high_h, pad : pad + high_w]


def forward(
    dtype: str,
    sides: Sides,
    direction: str,
    activation: str = "none",
    *,
    bias: bool = False,
    groups: int = 0,
    infinite: bool = False,
) -> Case:
    """fprop or dgrad; statistics where there are ``groups``.

    With ``infinite`` inputs, which of the results are finite, and those.
    """
    draw = _Draw(dtype)
    transposed = direction == "dgrad"
    x = draw.images(*(sides.low if transposed else sides.high))
    weight = draw.images(*sides.weight, scale=0.2)
    to = sides.high if transposed else sides.low
    shift = draw.of_channels(to[1], dtype=dtype) if bias else None
    if infinite:
        _put_infinities(x, dtype)
    tiles_of = f"{sides.name}_{direction}_stats_tiles"

    def run(kernels: Kernels) -> Arrays:
        out = {"y": poisoned_images(*to, dtype)}
        if groups:
            tiles = getattr(kernels.module, tiles_of)(*sides.sizes, groups)
            out["stats"] = poisoned((tiles, 3, to[1]))
        kernels.call(
            f"{sides.name}_{direction}",
            *(*sides.how, max(groups, 1), x, weight, shift, *_act(activation)),
            *(out["y"], out.get("stats")),
        )
        return _where_finite(out) if infinite else _of_groups(out, groups)

    def want() -> Arrays:
        with np.errstate(invalid="ignore"):
            z = (sides.dgrad if transposed else sides.fprop)(sides.exact(x), sides.exact(weight))
        if shift is not None:
            z = z + to_float(shift)[:, None, None]
        found = {"y": activate(z, activation)}
        if groups:
            # Of what is written.
            rounded = to_float(to_bits(found["y"], dtype))
            parts = rounded.reshape(groups, -1, *to[1:])
            found |= {"mean": parts.mean((1, 3, 4)), "var": parts.var((1, 3, 4))}
            found["count"] = np.full_like(found["mean"], parts[0, :, 0].size)
        return _where_finite(found) if infinite else found

    # A result on the edge of two roundings may fall to either, which moves the statistics.
    rounded = ("y", "mean", "var")
    return Case(run, want, dtype, rounded, inexact=activation == "tanh", terms=64)


def _of_groups(out: Arrays, groups: int) -> Arrays:
    """The statistics of each group, of those of its tiles."""
    if groups:
        tiles = to_float(out["stats"]).reshape(groups, -1, 3, out["stats"].shape[2])
        counts, means, m2s = tiles.transpose(2, 0, 1, 3)
        count = counts.sum(1)
        mean = (counts * means).sum(1) / count
        var = (m2s + counts * (means - mean[:, None]) ** 2).sum(1) / count
        out |= {"count": count, "mean": mean, "var": var}
    return out


def _put_infinities(x: np.ndarray, dtype: str) -> None:
    """In the first pixel and in the last."""
    for at, value in ((0, np.inf), (-1, -np.inf)):
        x[at, at, at, at] = to_bits(np.array(value), dtype)


def _where_finite(found: Arrays) -> Arrays:
    out = {}
    for name, values in found.items():
        finite = np.isfinite(to_float(values))
        out[name] = np.where(finite, values, values.dtype.type(0))
        out[f"{name} is finite"] = finite.astype(np.float32)
    return out


def wgrad(dtype: str, sides: Sides, multiprocessors: int = 1, *, infinite: bool = False) -> Case:
    """With ``infinite`` inputs, which of the results are finite, and those."""
    draw = _Draw(dtype)
    low, high = draw.images(*sides.low), draw.images(*sides.high)
    if infinite:
        _put_infinities(low, dtype)
        _put_infinities(high, dtype)

    def run(kernels: Kernels) -> Arrays:
        assert sides.product
        tile = sides.product[:2]
        parts = kernels.module.conv_wgrad_parts(*sides.sizes, *tile, multiprocessors)
        assert (parts > 1) == (multiprocessors > 1)
        out = poisoned_images(*sides.weight, dtype)
        sums = poisoned((parts, out.size)) if parts > 1 else None
        kernels.call("conv_wgrad", *sides.how, low, high, out, sums)
        return _where_finite({"dweight": out}) if infinite else {"dweight": out}

    def want() -> Arrays:
        with np.errstate(invalid="ignore"):
            found = {"dweight": sides.wgrad(sides.exact(low), sides.exact(high))}
        return _where_finite(found) if infinite else found

    return Case(run, want, dtype, ("dweight",), terms=64)


def _thin(n: int, cl: int, h: int, w: int, ch: int) -> Sides:
    return Sides(n, cl, h, w, ch, name="thin", product=None)


def _dots(n: int, cl: int, ch: int, side: int) -> Sides:
    return Sides(n, cl, 1, 1, ch, (side, side), 1, 0, name="dot", product=None)


_THIN = {
    "thin": _thin(2, 20, 5, 7, 3),
    "thin of 8": _thin(2, 72, 3, 20, 1),  # vectors, and more channels and columns than a tile has
    "thin of 4": _thin(3, 16, 17, 2, 4),
    "thin of 2": _thin(2, 5, 4, 4, 2),
}
# What is left of the kernels, which are one for each number of channels.
_MORE_THIN = (
    *(_thin(1, 3, 2, 3, 1), _thin(1, 3, 2, 3, 4)),
    *(_thin(1, 8, 2, 4, 2), _thin(1, 24, 3, 8, 3)),
)
_DOTS = {"dots": _dots(4, 3, 7, 3), "dots of 8": _dots(5, 1, 72, 4)}

# Of convolutions on tensor cores: ragged in every dimension, with and without 16-byte copies of
# either operand, with stages that cross taps and such that do not, and taps of every kind that
# classes can have.
_CONV = {
    "4x4": Sides(2, 24, 5, 7, 40),
    "4x4, whole": Sides(2, 32, 3, 5, 64),
    "4x4, odd": Sides(2, 5, 4, 3, 7),
    "4x4, odd low": Sides(2, 13, 3, 5, 24),
    "4x4, odd high": Sides(2, 72, 3, 5, 3),
    "5x5": Sides(2, 16, 3, 4, 24, (5, 5), 2, 2, (1, 1)),
    "3x3": Sides(2, 32, 5, 6, 32, (3, 3), 1, 1),
    "3x3 in strides": Sides(2, 32, 3, 4, 32, (3, 3), 2, 1, (1, 0)),
    "1x1 in strides": Sides(3, 16, 3, 2, 8, (1, 1), 2, 0, (1, 0)),
    "2x5 in threes": Sides(2, 8, 3, 3, 8, (2, 5), 3, 2, (1, 2)),
    "product": Sides(70, 72, 1, 1, 8, (4, 4), 1, 0),
    "product of 100": Sides(6, 100, 1, 1, 5, (3, 3), 1, 0),
    "one channel": Sides(5, 1, 1, 1, 72, (4, 4), 1, 0),
    "few channels": Sides(4, 3, 5, 7, 1),
}
# Of those, what takes every way of copying that a direction has.
_WAYS = {
    "4x4": ("fprop", "dgrad"),
    "4x4, odd": ("fprop", "dgrad", "wgrad"),
    "4x4, odd low": ("dgrad", "wgrad"),
    "4x4, odd high": ("dgrad", "wgrad"),
    "product of 100": ("fprop",),
}
# As many taps as there may be.
_MOST_TAPS = Sides(2, 1, 3, 2, 2, (16, 16), 1, 7)
_DIRECTIONS = ("fprop", "dgrad", "wgrad")
_TILES = ((64, 64), (128, 64), (128, 128))
# For each direction more rows and columns than the largest tile has, and whole stages, more than
# are on their way at a time.
_LARGER = {
    "fprop": Sides(2, 136, 9, 16, 32, (2, 2), 2, 0),
    "dgrad": Sides(2, 32, 9, 8, 136),
    "wgrad": Sides(2, 136, 9, 8, 40, (2, 2), 2, 0),
}
# As many rows as make the statistics' tiles large.
_MANY_ROWS = Sides(2, 32, 128, 128, 32, (1, 1), 1, 0)


def _cases(dtype: str) -> dict[str, Case]:
    found = {
        "bn": batch_norm(dtype, (4, 6, 3, 3), 2, "leaky_relu"),
        "bn of 8": batch_norm(dtype, (4, 40, 5, 4), 2, "relu"),
        "bn, tanh": batch_norm(dtype, (6, 5, 3, 2), 3, "tanh"),
        "bn, plain": batch_norm(dtype, (3, 70, 3, 1), 1, "none", affine=False),
        "bn, evaluation": batch_norm(dtype, (4, 24, 3, 3), 2, "leaky_relu", training=False),
        "bn, odd evaluation": batch_norm(dtype, (2, 5, 3, 3), 1, "relu", training=False),
        "bn, many rows": batch_norm(dtype, (1, 3, 41, 43), 1, "relu"),
        "loss": loss(dtype, 37, (1.0, 0.0)),
        "loss, many": loss(dtype, 1100, (0.9,)),
        "loss, lsgan": loss(dtype, 37, (0.9, -1.5), "lsgan"),
        "loss, hinge": loss(dtype, 37, (1.0, 0.0), "hinge"),
        "loss, wasserstein": loss(dtype, 37, (1.0, 0.0), "wasserstein"),
        "images": images(dtype, (4, 5, 7, 3), True, True),
        "images of 16": images(dtype, (3, 32, 48, 1), True, True),
        "images, scaled": images(dtype, (2, 4, 4, 4), False, False),
        "act backward": act_backward(dtype, (3, 5, 3, 7), "tanh"),
        "act backward, leaky": act_backward(dtype, (2, 8, 4, 4), "leaky_relu"),
    }
    if dtype == "float32":
        found["bn, folded"] = batch_norm(dtype, (2, 8, 9, 9), 2, "relu", tiles=7, folded=3)
    for name, sides in _DOTS.items():
        found[f"{name}, fprop"] = forward(dtype, sides, "fprop")
        found[f"{name}, fprop, bias"] = forward(dtype, sides, "fprop", "leaky_relu", bias=True)
    for name, sides in _THIN.items():
        groups = 1 if sides.n % 2 else 2
        found[f"{name}, dgrad"] = forward(dtype, sides, "dgrad", groups=groups)
        if dtype == "float32":
            found[f"{name}, dgrad, bias"] = forward(dtype, sides, "dgrad", "tanh", bias=True)
    for sides in _MORE_THIN:
        name = f"thin of {sides.cl} and {sides.ch}, dgrad"
        found[name] = forward(dtype, sides, "dgrad", "tanh", bias=True, groups=1)
    return found | _products(dtype)


def _product(dtype: str, sides: Sides, direction: str) -> Case:
    if direction == "wgrad":
        return wgrad(dtype, sides)
    activation = "relu" if direction == "fprop" else "none"
    return forward(dtype, sides, direction, activation, groups=1 if sides.n % 2 else 2)


def _products(dtype: str) -> dict[str, Case]:
    """Of convolutions on tensor cores.

    float16 differs from bfloat16 in its products alone, as does TF32 from float32 in three passes.
    """
    found = {}
    for name, sides in _CONV.items():
        ways = _WAYS.get(name, ()) if dtype == "float16" else _DIRECTIONS
        found |= {f"{name}, {way}": _product(dtype, sides, way) for way in ways}
    found |= _tiles(dtype, False)
    sides = _CONV["4x4"]
    found["4x4, wgrad in parts"] = wgrad(dtype, sides._replace(n=16), 108)
    if dtype == "float32":
        for name, ways in _WAYS.items():
            sides = _CONV[name]._replace(product=(64, 64, True))
            found |= {f"{name} in TF32, {way}": _product(dtype, sides, way) for way in ways}
        found |= _tiles(dtype, True)
        found |= {f"16x16, {way}": _product(dtype, _MOST_TAPS, way) for way in _DIRECTIONS}
    if dtype != "float16":
        sides = _CONV["4x4"]
        found |= {
            "4x4, fprop, bias": forward(dtype, sides, "fprop", "leaky_relu", bias=True),
            "4x4, dgrad, bias": forward(dtype, sides, "dgrad", "tanh", bias=True),
            "product, dgrad, bias": forward(dtype, _CONV["product"], "dgrad", "relu", bias=True),
        }
        for name in ("4x4, odd", "5x5", "3x3 in strides"):
            sides = _CONV[name]
            found |= {
                f"{name}, fprop, infinite": forward(dtype, sides, "fprop", infinite=True),
                f"{name}, dgrad, infinite": forward(dtype, sides, "dgrad", infinite=True),
                f"{name}, wgrad, infinite": wgrad(dtype, sides, infinite=True),
            }
    if dtype == "bfloat16":
        tall, large = (_MANY_ROWS._replace(product=(128, side, False)) for side in (64, 128))
        found |= {
            "many rows, fprop": forward(dtype, tall, "fprop", groups=2),
            "many rows, dgrad": forward(dtype, large, "dgrad", groups=2),
        }
    return found


def _tiles(dtype: str, tf32: bool) -> dict[str, Case]:
    found = {}
    for rows, columns in _TILES:
        fprop, dgrad, own = (
            _LARGER[way]._replace(product=(rows, columns, tf32)) for way in _DIRECTIONS
        )
        name = f"{rows}x{columns}{' in TF32' if tf32 else ''}"
        # Tiles that end within a group, and groups that are all of the batch.
        groups = 1 if columns == 128 else 2
        found |= {
            f"{name}, fprop": forward(dtype, fprop, "fprop", groups=groups),
            f"{name}, dgrad": forward(
                dtype, dgrad, "dgrad", "leaky_relu", bias=True, groups=groups if rows == 128 else 0
            ),
            f"{name}, wgrad": wgrad(dtype, own),
        }
    return found


CASES = {f"{name} {dtype}": case for dtype in EPS for name, case in _cases(dtype).items()}
