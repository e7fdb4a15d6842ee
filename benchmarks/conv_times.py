"""What the convolutions would take on a GPU, by a model of their tiles: predicted, never measured.

:data:`MODEL` says how.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from fastgan.benchmarks import compile_driver, cuda_code
from fastgan.benchmarks.compile_driver import TARGETS, Compiled, Target, occupancy
from fastgan.benchmarks.cuda_code import Code
from fastgan.benchmarks.cuda_launches import Launch, Pass
from fastgan.benchmarks.report import markdown_table

from fastgan.errors import RunError

# On ordinary cores, in FLOP/s: NVIDIA's data sheets.
FP32_FLOP_S = {"sm_80": 19.5e12, "sm_90": 66.9e12}
# What mma.sync reaches of the rate of tensor cores.
_MMA_SYNC = {"sm_80": 1.0, "sm_90": 0.63}
_WARP = 32
# The tables are in bfloat16.
_DTYPE_BYTES = 2

MODEL = (
    "**Predicted, not measured.** A launch takes the longer of two times. One is its bytes, every "
    "tensor once, over the bandwidth of the memory. The other is the FLOP of the busiest "
    "multiprocessor: the blocks over the multiprocessors, rounded up, each with its whole tile, "
    "over its share of the device's rate. Blocks that are on a multiprocessor at a time share its "
    "tensor cores, so that how many they are is not in the time, and is shown beside it with the "
    "waves that they come in. A tile is counted with its padding in all three dimensions, the sum "
    "to whole stages. `padding` is the share of these FLOP that is for nothing. The second kernel "
    "of a weight gradient, which adds up the parts of its sum, adds its bytes. "
    "The rate is the data sheet's for dense bf16; on an H100 `mma.sync`, which the CUDA kernels "
    f"use, is taken to reach {100 * _MMA_SYNC['sm_90']:.0f} % of it (others quote "
    "62.9 of [arXiv:2501.12084](https://arxiv.org/abs/2501.12084)), and `wgmma` all of it, which "
    "Triton's kernels compile to there but for tiles of less than 64 rows. `direct`, and Triton's "
    "`dots`, are on ordinary cores at the rate of float32. Left out is what a launch costs, the "
    "filling of the pipeline before the first product and what follows the last, whether the "
    "blocks at hand hide what they wait for, and L2, which can move bytes faster. No kernel "
    "reaches all of these rates, so that real times are longer."
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of a convolution by one way.

    Attributes:
        way: its short name.
        blocks: of the launch that multiplies.
        resident: how many of them a multiprocessor has at a time.
        waves: in which they come.
        padding: the share of its FLOP that is for nothing.
        bound: what its time is by: ``FLOP`` or ``bytes``.
        nbytes: of all launches.
        seconds: of all launches.
    """

    way: str
    blocks: int
    resident: int
    waves: int
    padding: float
    bound: str
    nbytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Multiplying:
    """The launch that multiplies: FLOP of a block, the device's rate, blocks at a time."""

    block_flop: float
    flop_s: float
    resident: int


def of_cuda(target: Target, one: Pass[Launch], codes: Mapping[tuple[str, str], Code]) -> Estimate:
    """Of a pass by the CUDA kernels, from what they compile to, by target and kernel."""
    launch = one.launches[0]
    code, product = codes[target.name, launch.kernel], cuda_code.product_of(launch.kernel)
    shared, warps = launch.shared + code.shared, -(-launch.threads // _WARP)
    resident, _ = occupancy(target, code.registers, shared, warps)
    if product is None:
        flop = one.flop / math.prod(launch.grid)
        return _estimate(
            target, one, one.way, _Multiplying(flop, FP32_FLOP_S[target.name], resident)
        )
    stage = cuda_code.stage_depth(_DTYPE_BYTES)
    # The second dimension of the grid is the parts of a weight gradient's sum.
    stages = -(-one.depth // launch.grid[1] // stage)
    flop = 2.0 * product.rows * product.columns * stages * stage
    rate = target.flop_s * _MMA_SYNC[target.name]
    return _estimate(target, one, one.way, _Multiplying(flop, rate, resident))


def of_triton(
    target: Target,
    one: Pass[compile_driver.Launch],
    kernels: Mapping[str, tuple[str, str, Compiled]],
) -> Estimate:
    """Of a pass by the Triton kernels, from what they compile to, by key.

    Raises:
        RunError: it is not known what they compile to.
    """
    launch = one.launches[0]
    specialisation = launch.specialisation
    found = kernels.get(specialisation.key())
    if found is None:
        raise RunError(
            f"compiled.json has no line for {one.what}: run python -m fastgan.benchmarks.compiled"
        )
    compiled, warps = found[2], specialisation.options.get("num_warps", 4)
    resident, _ = occupancy(target, compiled.registers, compiled.shared, warps)
    constants = specialisation.constants()
    if "BM" not in constants:
        flop = one.flop / math.prod(launch.grid)
        rate = FP32_FLOP_S[target.name]
        return _estimate(target, one, "dots", _Multiplying(flop, rate, resident))
    sides = constants["BM"], constants["BN"], constants["BK"]
    flop = 2.0 * math.prod(sides) * _steps(launch)
    rate = target.flop_s * (1.0 if "wgmma" in compiled.matrix else _MMA_SYNC[target.name])
    way = f"{constants['BM']}x{constants['BN']}"
    return _estimate(target, one, way, _Multiplying(flop, rate, resident))


def _steps(launch: compile_driver.Launch) -> int:
    """How many times a program of Triton's takes another BK of its sum."""
    constants, sizes = launch.specialisation.constants(), launch.numbers
    depth, thin = constants["BK"], constants["THIN"]
    kernel = constants["KH"], constants["KW"]
    stride, padding = constants["STRIDE"], constants["PADDING"]
    if "part_rows" in sizes:
        return int(-(-sizes["part_rows"] // depth))
    if "fprop" in launch.specialisation.name:
        taps = math.prod(kernel)
        if thin:
            return int(-(-taps * sizes["ch"] // depth))
        return int(taps * -(-sizes["ch"] // depth))
    if thin:
        # All classes of a pixel, over the neighbourhood that they share.
        taps = math.prod(
            (stride - 1 + padding) // stride + (k - 1 - padding) // stride + 1 for k in kernel
        )
    else:
        taps = math.prod(-(-k // stride) for k in kernel)
    return int(taps * -(-sizes["cl"] // depth))


_L = TypeVar("_L", Launch, compile_driver.Launch)


def _estimate(target: Target, one: Pass[_L], way: str, first: _Multiplying) -> Estimate:
    blocks = math.prod(one.launches[0].grid)
    times = {
        "FLOP": -(-blocks // target.multiprocessors)
        * first.block_flop
        / (first.flop_s / target.multiprocessors),
        "bytes": one.launches[0].nbytes / target.bytes_s,
    }
    nbytes = sum(launch.nbytes for launch in one.launches)
    return Estimate(
        way=way or "direct",
        blocks=blocks,
        resident=first.resident,
        waves=-(-blocks // (target.multiprocessors * first.resident)),
        padding=1.0 - one.flop / (blocks * first.block_flop),
        bound=max(times, key=times.__getitem__),
        nbytes=nbytes,
        seconds=max(times.values())
        + sum(launch.nbytes for launch in one.launches[1:]) / target.bytes_s,
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A pass by every way of both backends, the likeliest first."""

    what: str
    batch: int
    flop: float
    cuda: list[Estimate]
    triton: list[Estimate]

    @property
    def direction(self) -> str:
        return self.what.partition(": ")[2].partition(",")[0]


def rows(
    target: Target,
    cuda: Iterable[Pass[Launch]],
    triton: Iterable[Pass[compile_driver.Launch]],
    codes: Mapping[tuple[str, str], Code],
    kernels: Mapping[str, tuple[str, str, Compiled]],
) -> list[Row]:
    """Of the convolutions among the passes, those of a way after another.

    Raises:
        RunError: it is not known what a Triton kernel compiles to.
    """
    others = {
        what: [of_triton(target, one, kernels) for one in found] for what, found in _by_what(triton)
    }
    return [
        Row(
            what,
            found[0].table,
            found[0].flop,
            [of_cuda(target, one, codes) for one in found],
            others[what],
        )
        for what, found in _by_what(cuda)
    ]


def _by_what(passes: Iterable[Pass[_L]]) -> Iterator[tuple[str, list[Pass[_L]]]]:
    found = (one for one in passes if one.flop)
    return ((what, list(ways)) for what, ways in itertools.groupby(found, lambda one: one.what))


_SIDE = ("blocks", "resident", "waves", "padding", "MB", "bound", "µs by tile")


def table(found: Sequence[Row]) -> list[str]:
    """Each row of one GPU and one batch."""
    header = ["pass", "GFLOP"]
    for name in ("CUDA", "Triton"):
        header += [f"{name}: {_SIDE[0]}", *_SIDE[1:]]
    return markdown_table(
        header,
        (
            [row.what, f"{row.flop / 1e9:.2f}", *_cells(row.cuda), *_cells(row.triton)]
            for row in found
        ),
    )


def _cells(ways: Sequence[Estimate]) -> list[str]:
    first, best = ways[0], _fastest(ways)
    times = (f"{one.way} {_us(one)}" for one in ways)
    return [
        *(str(first.blocks), str(first.resident), str(first.waves), f"{first.padding:.0%}"),
        *(f"{first.nbytes / 1e6:.1f}", first.bound),
        ", ".join(f"**{t}**" if one is best else t for t, one in zip(times, ways, strict=True)),
    ]


def _us(one: Estimate) -> str:
    return f"{1e6 * one.seconds:.1f}"


def _fastest(ways: Sequence[Estimate]) -> Estimate:
    return min(ways, key=lambda one: one.seconds)


def sums(by_target: Mapping[str, Sequence[Row]]) -> list[str]:
    """Over all rows of a GPU and a batch, by direction."""
    taken: dict[str, Callable[[Row], Estimate]] = {
        "CUDA: first tiles": lambda row: row.cuda[0],
        "CUDA: fastest": lambda row: _fastest(row.cuda),
        "Triton: first tiles": lambda row: row.triton[0],
        "Triton: fastest": lambda row: _fastest(row.triton),
    }
    lines = []
    for name, found in by_target.items():
        for batch in dict.fromkeys(row.batch for row in found):
            of_batch = [row for row in found if row.batch == batch]
            for direction in (*dict.fromkeys(row.direction for row in of_batch), "all"):
                some = [row for row in of_batch if direction in ("all", row.direction)]
                totals = (sum(f(row).seconds for row in some) for f in taken.values())
                times = (f"{1e6 * seconds:.0f}" for seconds in totals)
                lines.append([TARGETS[name].device, str(batch), direction, *times])
    return markdown_table(("GPU", "batch", "direction", *taken), lines)
