"""The convolutions of DCGAN, in each direction and every way that there is.

``pytest benchmarks/bench_conv.py --benchmark-only`` measures each by itself;
``python -m fastgan.benchmarks.bench_conv`` lets the ways take turns and prints, for each layer and
direction, what was chosen and why.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fastgan.benchmarks import machine, report, single_op
from fastgan.benchmarks.single_op import Figures, Run
from torch import Tensor
from tqdm import tqdm

from fastgan.ops import conv, cpp
from fastgan.seeding import generator

DIRECTIONS = ("fprop", "dgrad", "wgrad")
# What a user of torch has; its convolutions in float32 on the CPU are oneDNN's.
TORCH = {"oneDNN NHWC": torch.channels_last, "oneDNN NCHW": torch.contiguous_format}
# The table's columns: the way and its heading.
COLUMNS = {
    **{way: way for way in TORCH},
    "winograd2": "Winograd m=2",
    "winograd3": "m=3",
    "winograd4": "m=4",
    "thin": "direct, few channels",
    "matmul": "matrix product",
    "torch": "oneDNN within the op",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One convolution: ``[n, cl, side, side]`` and ``[n, ch, ...]``, and its direction."""

    direction: str
    n: int
    cl: int
    ch: int
    side: int
    kernel: int = 4
    stride: int = 2
    padding: int = 1

    def kernels(self) -> conv._Cpp:
        high = (self.side - 1) * self.stride - 2 * self.padding + self.kernel
        problem = conv._Problem(
            n=self.n, cl=self.cl, h=self.side, w=self.side, ch=self.ch, high_h=high, high_w=high,
            kh=self.kernel, kw=self.kernel, stride=self.stride, padding=self.padding, groups=0,
        )  # fmt: skip
        return conv._Cpp(problem, torch.float32)

    def gflop(self) -> float:
        """Of the direct convolution, the same for every way and direction."""
        return 2e-9 * self.n * self.cl * self.ch * (self.side * self.kernel) ** 2

    def __str__(self) -> str:
        # pytest's -k takes these characters.
        return f"{self.cl}-{self.ch} {self.side}x{self.side} n{self.n} {self.direction}"


def _cases() -> Iterator[Case]:
    innermost: dict[str, Any] = {"side": 1, "stride": 1, "padding": 0}
    of_64 = [
        {"cl": 100, "ch": 512, **innermost},
        *({"cl": 8192 >> i, "ch": 4096 >> i, "side": 1 << (i - 2)} for i in (4, 5, 6)),
        {"cl": 64, "ch": 3, "side": 32},
        {"cl": 1, "ch": 512, **innermost},
    ]
    of_28 = [{"cl": 128, "ch": 64, "side": 7}, {"cl": 64, "ch": 1, "side": 14}]
    for batch, layers in ((64, of_64), (128, of_64 + of_28)):
        for layer in layers:
            for direction in DIRECTIONS:
                yield Case(direction, batch, **layer)


CASES = tuple(_cases())


def ways(case: Case) -> tuple[str, ...]:
    """Every way that can compute it, also those that fastgan does not consider."""
    if cpp.missing_reasons():
        return tuple(TORCH)
    own = case.kernels().ways(case.direction)
    if "matmul" not in own:
        own = tuple(dict.fromkeys(("winograd2", "winograd3", "winograd4", *own)))
    return (*TORCH, *own, "torch")


@functools.lru_cache(maxsize=1)
def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Low side, high side, weight."""
    p, draw = case.kernels().problem, generator(0, "bench_conv")
    shapes = (
        (p.n, p.cl, p.h, p.w),
        (p.n, p.ch, p.high_h, p.high_w),
        (p.cl, p.ch, p.kh, p.kw),
    )
    low, high, weight = (torch.randn(shape, generator=draw) for shape in shapes)
    return low, high, weight


@functools.lru_cache(maxsize=1)
def truth(case: Case) -> list[Tensor]:
    """The case in float64."""
    low, high, weight = (tensor.double() for tensor in _inputs(case))
    return [_torch(case, low, high, weight)]


def setup(case: Case, way: str) -> Run:
    """Computes the case that way, into a new tensor."""
    if way in TORCH:
        low, high, weight = (
            tensor.contiguous(memory_format=TORCH[way]) for tensor in _inputs(case)
        )
        return lambda: [_torch(case, low, high, weight)]

    kernels = case.kernels()
    low, high, weight = map(cpp.dense, _inputs(case))

    def run() -> list[Tensor]:
        if case.direction == "wgrad":
            out = kernels.wgrad(way, low, high)
        else:
            transposed = case.direction == "dgrad"
            x = low if transposed else high
            out = kernels.forward(way, transposed, x, weight, conv._Epilogue())
        return [out]

    return run


def _torch(case: Case, low: Tensor, high: Tensor, weight: Tensor) -> Tensor:
    if case.direction == "fprop":
        return F.conv2d(high, weight, stride=case.stride, padding=case.padding)
    if case.direction == "dgrad":
        return F.conv_transpose2d(low, weight, stride=case.stride, padding=case.padding)
    stride, padding = [case.stride] * 2, [case.padding] * 2
    return torch.ops.aten.convolution_backward(
        low, high, weight, None, stride, padding, [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]


def pytest_generate_tests(metafunc: Any) -> None:
    single_op.parametrize(metafunc, CASES, ways)


def test_speed(benchmark: Any, case: Case, way: str) -> None:
    single_op.speed(benchmark, case, setup(case, way), truth(case))


def test_memory(benchmark: Any, case: Case, way: str) -> None:
    single_op.memory(benchmark, case, setup(case, way), truth(case))


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One row of the table: numbers, strings, lists and dicts only."""
    figures = single_op.compare({way: setup(case, way) for way in ways(case)}, truth(case), rounds)
    candidates: tuple[str, ...] = ()
    chosen = None
    if not cpp.missing_reasons():
        kernels = case.kernels()
        candidates = (*kernels.ways(case.direction), "torch")
        chosen = kernels.choose(
            case.direction, "auto", torch.device("cpu"), lambda way: setup(case, way)()
        )
    return {
        **dataclasses.asdict(case),
        "gflop": case.gflop(),
        "ways": {way: found._asdict() for way, found in figures.items()},
        "candidates": candidates,
        "chosen": chosen,
        "why": _why(chosen, candidates, figures),
    }


def _why(chosen: str | None, candidates: Sequence[str], figures: dict[str, Figures]) -> str:
    """How many times as fast as the best of torch, and as the best of the other candidates."""
    if chosen is None:
        return "there are no C++ kernels here"
    taken = figures[chosen].ms
    if taken is None:
        return f"measured before; now {chosen} is wrong"
    reasons = []
    for others in (TORCH, [way for way in candidates if way not in (chosen, "torch")]):
        times = {way: ms for way in others if (ms := figures[way].ms) is not None}
        if times:
            best = min(times, key=times.__getitem__)
            reasons.append(f"{times[best] / taken:.2f}x {best}")
    return ", ".join(reasons)


def header() -> str:
    titles = ("layer", "direction", *COLUMNS.values(), "chosen", "why")
    return "\n".join(report.markdown_table(titles, ()))


def row(entry: dict[str, Any], cell: Callable[[dict[str, Any], float], str]) -> str:
    """A line of the table; ``cell`` shows one way's figures, given the GFLOP of the case."""
    cells = []
    for way in COLUMNS:
        found = entry["ways"].get(way)
        if found is None:
            text = ""
        elif found["ms"] is None:
            text = f"wrong, {found['error']:.1e} times the limit"
        else:
            text = cell(found, entry["gflop"])
        considered = way in TORCH or way in entry["candidates"]
        cells.append(text if considered or not text else f"({text})")
    layer = f"{entry['cl']}->{entry['ch']}@{entry['side']}, batch {entry['n']}"
    return report.markdown_row(
        (layer, entry["direction"], *cells, entry["chosen"] or "", entry["why"])
    )


def speed_cell(found: dict[str, Any], gflop: float) -> str:
    return f"{found['ms']:.3f} ms, {1e3 * gflop / found['ms']:.1f}"


def memory_cell(found: dict[str, Any], gflop: float) -> str:
    return "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 2**20:.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser("bench_conv", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=11, help="turns of each way (11)")
    parser.add_argument("--only", default="", help="cases with this in their name, such as 'n64 f'")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    args = parser.parse_args(argv)
    cases = [case for case in CASES if args.only in str(case)]
    if args.rounds < 1 or not cases:
        parser.error(
            "--rounds must be at least 1, and --only fit one case, such as " + str(CASES[0])
        )

    device = torch.device("cpu")
    record: dict[str, Any] = {
        "machine": machine.describe(device),
        "measured": machine.measure(device),
        "rounds": args.rounds,
        "cases": [],
    }
    if not args.json:
        print("  \n".join(report.machine_lines(record)))
        print(
            f"\nMedian of {args.rounds} interleaved rounds, and GFLOP/s by the count of the direct "
            "convolution. Layers are low-resolution channels -> high-resolution channels @ low "
            "side. In parentheses: not considered. `why`: how many times as fast as the best of "
            "oneDNN, and as the best other candidate.\n"
        )
        print(header())
    for case in tqdm(cases, unit="case", disable=None, leave=False):
        record["cases"].append(measure(case, args.rounds))
        if not args.json:
            tqdm.write(row(record["cases"][-1], speed_cell))
    if args.json:
        print(json.dumps(record, indent=1))
        return
    print("\nMiB by which the resident memory grows at most, the result included:\n")
    print("\n".join((header(), *(row(entry, memory_cell) for entry in record["cases"]))))


if __name__ == "__main__":
    main()
