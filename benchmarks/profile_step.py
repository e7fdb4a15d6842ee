"""Where a step's time goes, op by op, and how far each op is from what the machine allows.

``python -m fastgan.benchmarks.profile_step --image-size 64 --batch-size 64 --backend auto``

The limit of an op is the longer of two times: its multiplications at the measured peak of sgemm,
of which Winograd's tiles of m need ``(m+1)²/4m²``; and the bytes that it must read and write at the
measured bandwidth of a copy. What the cores' caches hold between two ops can be read faster than
that, so a small tensor may come out above 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fastgan.benchmarks import machine, report
from fastgan.benchmarks.plan import Cell
from torch.profiler import ProfilerActivity, profile

from fastgan.engine.engine import Engine
from fastgan.errors import InputError, NotBuiltError
from fastgan.nn.dcgan import DCGANDiscriminator, DCGANGenerator
from fastgan.ops import conv
from fastgan.seeding import generator

_FLOAT = 4  # bytes
_WARM_UP = 2
# What is under this share of the step is summed.
_LEAST_SHARE = 0.005

# How many tensors of the size of its first argument an op reads and writes at least. Batch norm has
# to have seen all of them before it can begin with the first, so it reads its input twice.
_TENSORS_MOVED = {
    "fastgan::act_backward": 3,
    "fastgan::gan_loss_forward": 2,
    "fastgan::bn_act_backward": 5,
    "aten::batch_norm": 3,
    "aten::native_batch_norm_backward": 5,
    "aten::relu": 2,
    "aten::leaky_relu": 2,
    "aten::tanh": 2,
    "aten::threshold_backward": 3,
    "aten::leaky_relu_backward": 3,
    "aten::tanh_backward": 3,
    "aten::copy_": 2,
}
# Weight, both moments: read and written; gradient: read.
_ADAM_TENSORS_MOVED = 7
_ADAM = "aten::_fused_adam_"
_CONVOLUTIONS = (
    "fastgan::conv_forward",
    "fastgan::conv_wgrad",
    "aten::convolution",
    "aten::convolution_backward",
)
_GENERATED = re.compile(r"GeneratedBackwardFor_fastgan_(\w+)_default(Backward)?$")


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call has to do at least.

    Attributes:
        detail: direction of a convolution.
        shape: its sizes, and the way that was taken.
        flop: of the direct convolution; 0 for what is not one.
        saving: how many times fewer multiplications the way needs.
        moved: bytes.
    """

    detail: str = ""
    shape: str = ""
    flop: int = 0
    saving: float = 1.0
    moved: int = 0


@dataclasses.dataclass
class Row:
    """One line of the table, sums over the steps that were profiled."""

    calls: int = 0
    seconds: float = 0.0
    flop: int = 0
    moved: int = 0
    limit_s: float = 0.0


class _Step:
    """Charges the events of profiled steps to ops."""

    def __init__(self, engine: Engine, rates: dict[str, Any], by_shape: bool) -> None:
        self.rows: defaultdict[str, Row] = defaultdict(Row)
        self._engine, self._by_shape = engine, by_shape
        self._flop_s, self._bytes_s = rates["sgemm_gflop_s"] * 1e9, rates["copy_gb_s"] * 1e9
        nets = (engine.netG, engine.netD)
        # The profiler does not show the shapes in lists: of two optimisers, the mean.
        parameters = sum(p.numel() for net in nets for p in net.parameters())
        self._adam = Work(moved=_ADAM_TENSORS_MOVED * parameters * _FLOAT // len(nets))

    def charge(self, event: Any, owner: str | None = None, closed: bool = False) -> None:
        """Charge ``event`` and what it called.

        Args:
            event: a ``FunctionEvent``.
            owner: the row that its caller is charged to, None where that is no op.
            closed: whether all that is called there is part of that op; another op of fastgan's
                never is.
        """
        generated = _GENERATED.match(event.name)
        if generated:
            # Within an op, the op itself; in the backward pass, what is around the ops there.
            owner = owner or f"fastgan::{generated[1]}, around its backward"
        elif event.name.startswith("fastgan::") or not closed:
            work = self._work(event)
            if work is not None:
                owner, closed = self._count(event.name, work), True
            elif owner is None and event.name.startswith("aten::"):
                owner = event.name
                self.rows[owner].calls += 1
        self.rows[owner or "autograd and optimiser, in Python"].seconds += (
            1e-6 * event.self_cpu_time_total
        )
        for called in event.cpu_children:
            self.charge(called, owner, closed)

    def _count(self, name: str, work: Work) -> str:
        parts = (name, work.detail, work.shape if self._by_shape else "")
        label = " ".join(filter(None, parts))
        row = self.rows[label]
        row.calls += 1
        row.flop += work.flop
        row.moved += work.moved
        row.limit_s += max(work.flop / work.saving / self._flop_s, work.moved / self._bytes_s)
        return label

    def _work(self, event: Any) -> Work | None:
        """The work of ``event``; None where it is not known."""
        if event.name in _CONVOLUTIONS:
            return _convolution(event, self._engine.backend)
        if event.name == _ADAM:
            return self._adam
        shapes = event.input_shapes
        tensors = _TENSORS_MOVED.get(event.name)
        if event.name == "fastgan::bn_act_forward":
            has_statistics = bool(shapes[5]) and shapes[5][0] > 0
            tensors = 2 if has_statistics else 3
        if tensors is None or not shapes or not shapes[0]:
            return None
        size = "x".join(map(str, shapes[0]))
        return Work(shape=size, moved=tensors * _FLOAT * math.prod(shapes[0]))


def _convolution(event: Any, backend: str) -> Work:
    name, shapes, values = event.name, event.input_shapes, event.concrete_inputs
    passes = 1
    if name == "fastgan::conv_wgrad":
        (low, high), (kernel, stride, padding) = shapes[:2], values[2:5]
        problem = conv._problem(low, high, (low[1], high[1], *kernel), stride, padding)
        direction = "wgrad"
    else:
        if name == "fastgan::conv_forward":
            x, weight = shapes[:2]
            stride, padding, transposed, groups = values[3], values[4], values[5], values[8]
        elif name == "aten::convolution":
            x, weight = shapes[:2]
            (stride, _), (padding, _), transposed, groups = values[3], values[4], values[6], 0
        else:
            x, weight = shapes[1:3]
            (stride, _), (padding, _), transposed, groups = values[4], values[5], values[7], 0
            passes = sum(values[10][:2])  # gradients of the input and of the weight
        x, weight = (torch.empty(shape, device="meta") for shape in (x, weight))
        problem = conv._forward_problem(x, weight, stride, padding, transposed, groups)
        direction = "dgrad" if transposed else "fprop"
    way, detail = "torch", direction
    if name.startswith("fastgan::"):
        way = conv._Cpp(problem, torch.float32).choose(
            direction, backend, torch.device("cpu"), _unmeasured
        )
    if name in ("fastgan::conv_wgrad", "aten::convolution_backward"):
        detail = ""  # the name says it
    p = problem
    low_size, high_size = p.n * p.cl * p.h * p.w, p.n * p.ch * p.high_h * p.high_w
    taps = p.cl * p.ch * p.kh * p.kw
    tile = conv._TILES.get(way, 0)
    return Work(
        detail=detail,
        shape=f"{p.cl}->{p.ch}@{p.h} n{p.n} {way}",
        flop=passes * 2 * p.n * p.h * p.w * taps,
        saving=4 * tile**2 / (tile + 1) ** 2 if tile else 1.0,
        moved=passes * _FLOAT * (low_size + high_size + taps),
    )


def _unmeasured(way: str) -> None:
    raise AssertionError(f"the step took a way that was not measured before it: {way}")


def measure(
    cell: Cell, backend: Any = "auto", *, steps: int = 10, by_shape: bool = False
) -> dict[str, Any]:
    """The table as numbers, strings, lists and dicts.

    Args:
        cell: the workload.
        backend: as of :class:`fastgan.Engine`.
        steps: how many are profiled; as many are timed before it and as many after it.
        by_shape: whether calls of an op on different shapes have rows of their own.
    """
    device = torch.device("cpu")
    rates = machine.measure(device)
    netG = DCGANGenerator(ngf=cell.ngf, nc=cell.nc, image_size=cell.image_size)
    netD = DCGANDiscriminator(ndf=cell.ndf, nc=cell.nc, image_size=cell.image_size)
    engine = Engine(netG, netD, backend=backend, device=device)
    shape = (cell.batch_size, cell.nc, cell.image_size, cell.image_size)
    real = torch.rand(shape, generator=generator(0, "profile_step")) * 2 - 1

    def step() -> float:
        started = time.perf_counter()
        engine.step(real).to_dict()
        return time.perf_counter() - started

    for _ in range(_WARM_UP):
        step()
    with machine.no_collection():
        plain = [step() for _ in range(steps)]
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            profiled = [step() for _ in range(steps)]
        plain += [step() for _ in range(steps)]
    charged = _Step(engine, rates, by_shape)
    with engine._running():  # the choices are looked up as it looks them up
        for event in profiler.events() or ():
            if event.cpu_parent is None:
                charged.charge(event)
    total = sum(profiled)
    inside = sum(row.seconds for row in charged.rows.values())
    charged.rows["between ops, in Python"].seconds = total - inside
    return {
        "machine": machine.describe(device),
        "measured": rates,
        **dataclasses.asdict(cell),
        "backend": engine.backend,
        "steps": steps,
        "step_ms": 1e3 * statistics.median(plain),
        "profiled_step_ms": 1e3 * total / steps,
        "rows": list(_rows(charged.rows, steps, total)),
    }


def _rows(rows: dict[str, Row], steps: int, total: float) -> Iterator[dict[str, Any]]:
    small = Row()
    kinds = 0
    for name, row in sorted(rows.items(), key=lambda item: -item[1].seconds):
        if row.seconds >= _LEAST_SHARE * total:
            yield _figures(name, row, steps, total)
        else:
            kinds += 1
            small.calls += row.calls
            small.seconds += row.seconds
    yield _figures(f"other ({kinds} ops)", small, steps, total)


def _figures(name: str, row: Row, steps: int, total: float) -> dict[str, Any]:
    known = row.limit_s > 0.0
    return {
        "op": name,
        "calls": row.calls / steps,
        "ms": 1e3 * row.seconds / steps,
        "share": row.seconds / total,
        "gflop_s": row.flop / 1e9 / row.seconds if row.flop else None,
        "gb_s": row.moved / 1e9 / row.seconds if known and not row.flop else None,
        "of_limit": row.limit_s / row.seconds if known else None,
    }


def table(record: dict[str, Any]) -> str:
    """What :func:`measure` returned, as text."""
    width = max(len(row["op"]) for row in record["rows"])
    lines = [f"{'':<{width}}{'calls':>7}{'ms a step':>11}{'share':>8}{'rate':>15}{'of limit':>10}"]
    for row in record["rows"]:
        calls = f"{row['calls']:g}" if row["calls"] else ""
        rate = ""
        if row["gflop_s"] is not None:
            rate = f"{row['gflop_s']:.1f} GFLOP/s"
        elif row["gb_s"] is not None:
            rate = f"{row['gb_s']:.1f} GB/s   "
        of_limit = "" if row["of_limit"] is None else f"{row['of_limit']:.2f}"
        lines.append(
            f"{row['op']:<{width}}{calls:>7}{row['ms']:>11.3f}{row['share']:>8.1%}{rate:>15}"
            f"{of_limit:>10}"
        )
    profiled, plain = record["profiled_step_ms"], record["step_ms"]
    lines += [
        f"{'total':<{width}}{'':>7}{profiled:>11.3f}{1.0:>8.1%}",
        f"without the profiler a step takes {plain:.3f} ms, with it {profiled / plain:.2f} times "
        "as long",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print where the time of a training step on the CPU goes."""
    parser = argparse.ArgumentParser("profile_step", description=main.__doc__)
    for field in dataclasses.fields(Cell):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--backend", default="auto", help="as of fastgan.Engine (auto)")
    parser.add_argument("--steps", type=int, default=10, help="how many are profiled (10)")
    parser.add_argument("--by-shape", action="store_true", help="rows for each shape of an op")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    args = parser.parse_args(argv)
    try:
        cell = Cell(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Cell)})
        cell.check()
        if args.steps < 1:
            raise InputError(f"--steps {args.steps} must be at least 1")
        record = measure(cell, args.backend, steps=args.steps, by_shape=args.by_shape)
    except (InputError, NotBuiltError) as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps(record, indent=1))
        return
    print("\n".join(report.machine_lines(record)))
    print(f"\n{cell}, backend {record['backend']}\n")
    print(table(record))


if __name__ == "__main__":
    main()
