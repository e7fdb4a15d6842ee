"""What ``gpu_check`` asks of a GPU, a part at a time, each in a process of its own.

``python -m fastgan.benchmarks.gpu_parts step --out step.json`` runs one part. A kernel that reads
where it may not takes its process with it, and one that never ends has to be killed: so the parts
are apart, and what a part has found is in its file as soon as it is found. With ``--dry-run`` they
run on the CPU, the kernels interpreted, at sizes that take seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastgan.benchmarks import bench_accelerate, bench_bn_act, bench_conv, bench_engine, machine
from fastgan.benchmarks.plan import VARIANTS, Cell
from torch import Tensor

from fastgan import gpu
from fastgan.choices import Backend, Capture, Precision
from fastgan.data.images import ImageSet
from fastgan.data.loader import Loader
from fastgan.engine.engine import Engine
from fastgan.files import replace_file
from fastgan.nn.dcgan import DCGANDiscriminator, DCGANGenerator
from fastgan.ops import conv, triton, tuning
from fastgan.ops.augment import augment
from fastgan.ops.backend import machine_reasons, use_backend
from fastgan.ops.bn_act import bn_act
from fastgan.ops.gan_loss import gan_loss
from fastgan.seeding import generator

# How a float32 convolution may multiply, and a dtype: what torch's own setting has to be for it.
PRECISIONS = {
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "ieee"),
}
# Of the engine, over float32 weights.
MIXED: tuple[Precision, ...] = ("bf16", "fp16")
# How many times the reference's own rounding a step by the kernels may differ from float64.
STEP_LIMIT = 4.0
_STEP_IMAGES = 32
# Of a convolution, from float64 by norm: a few times what rounding both operands and the result
# comes to, the same for every way.
OP_LIMITS = {"tf32": 2.0**-9, "bf16": 2.0**-8}
# Of the other ops: a few roundings of results that are sums of float32.
PASS_LIMITS = {"float32": 1e-5, "bf16": 2.0**-7}
_OP_BATCH = 128
# The way of torch, and the backend that it is.
_TORCH, _TORCH_BACKEND = "cuDNN", "torch"
_WORKERS = 8
_REPLAYS = 2000
_MOST_TILES = 4  # that an op chooses from
_NVIDIA_SMI = (
    *("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem"),
    *("power.draw", "power.limit", "temperature.gpu", "persistence_mode", "utilization.gpu"),
)

Record = dict[str, Any]
Save = Callable[[Record], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """How to run a part.

    Attributes:
        dry_run: on the CPU, as small as can be.
        quick: the least that says something.
        without_own: why fastgan's own kernels and engine get no speeds; empty where they do.
    """

    dry_run: bool = False
    quick: bool = False
    without_own: str = ""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry_run else "cuda")


def describe(job: Job, save: Save) -> bool:
    """The machine: what has to be the same for figures to be compared."""
    found = machine.describe(job.device)
    found["triton"] = triton.version()
    found["CUDA kernels"] = "; ".join(machine_reasons("cuda")) or "built"
    if not job.dry_run:
        gpu = torch.cuda.get_device_properties(job.device)
        found |= {
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_gib": gpu.total_memory / 2**30,
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
        }
    save({"machine": found, "nvidia_smi": _nvidia_smi()})
    return True


def _nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks and power; None where the tool is not there."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, f"--query-gpu={','.join(_NVIDIA_SMI)}", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        values = done.stdout.splitlines()[0].split(",")
        return dict(zip(_NVIDIA_SMI, map(str.strip, values), strict=True))
    return None


def kernels(job: Job, save: Save) -> bool:
    """A tiny step, for a tool to watch every access that its kernels make."""
    cell, numbers = Cell(16, 1, 8, 8, 8), {}
    for backend in _own():
        numbers[backend] = _one_step(cell, "float32", 0, job.device, backend)
        save({"numbers": numbers})
    return all(math.isfinite(value) for found in numbers.values() for value in found)


def _own() -> list[str]:
    """Our kernels for GPUs that this machine has."""
    return [name for name in ("triton", "cuda") if not machine_reasons(name)]


def _one_step(
    cell: Cell, precision: str, tile: int, device: torch.device, backend: Any = "triton"
) -> list[float]:
    """The five numbers of one step by the kernels, every convolution by the tile so numbered."""
    dtype, multiplied = PRECISIONS[precision]
    netG, netD, batches = bench_engine.inputs(cell, 0)
    with machine.fp32_precision(multiplied), _tile(tile):
        nets = (net.to(device, dtype) for net in (netG, netD))
        trainer = bench_engine.engine_trainer(*nets, backend=backend)
        real, z = batches[0]
        return list(trainer.step(real.to(device, dtype), z.to(device, dtype)))


@contextlib.contextmanager
def _tile(index: int) -> Iterator[None]:
    """Within this context nothing is measured: the way so numbered is taken, or the last."""

    def taken(problem: str, ways: object, among: Sequence[str], device: object) -> str:
        return among[min(index, len(among) - 1)]

    before = tuning.fastest
    tuning.fastest = taken  # type: ignore[assignment]
    try:
        yield
    finally:
        tuning.fastest = before


def compile_all(job: Job, save: Save) -> bool:
    """Compile what the parts after this one launch, in several processes.

    Triton keeps what it has compiled on disk. Measuring the tiles of a step one after another
    would compile them one after another.
    """
    tasks = [(Cell(64, 3, _STEP_IMAGES), name, 0) for name in PRECISIONS]
    tasks += [(cell, "tf32", tile) for cell in _cells(job) for tile in range(_MOST_TILES)]
    rows = []
    for (cell, name, tile), reason in zip(tasks, _in_processes(_compile, tasks), strict=True):
        rows.append({"cell": str(cell), "precision": name, "tile": tile, "reason": reason})
        save({"rows": rows})
    return not any(row["reason"] for row in rows)


def _compile(task: tuple[Cell, str, int]) -> str:
    """Why it failed; empty where it did not."""
    try:
        numbers = _one_step(*task, torch.device("cuda"))
    except Exception as failure:  # whatever a compiler or a driver makes of it
        return f"{type(failure).__name__}: {_one_line(failure)}"
    return "" if all(map(math.isfinite, numbers)) else f"not finite: {numbers}"


def _in_processes(call: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
    workers = min(_WORKERS, os.cpu_count() or 1, len(tasks))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(call, tasks)


def step(job: Job, save: Save) -> bool:
    """The whole step by the kernels and by plain torch, both against float64."""
    cell = Cell(16, 1, 4, 4, 4) if job.dry_run else Cell(64, 3, _STEP_IMAGES)
    # Triton's interpreter multiplies bfloat16 as the integers that it is kept in.
    asked: list[tuple[str, Precision]] = [(name, "fp32") for name in PRECISIONS]
    asked += [("float32", precision) for precision in MIXED]
    rows: list[Record] = []
    for name, precision in asked[:1] if job.dry_run else asked:
        rows += _compare_steps(cell, name, precision, job.device)
        save({"cell": str(cell), "limit": STEP_LIMIT, "rows": rows})
    return all(row["right"] for row in rows)


def _compare_steps(
    cell: Cell, name: str, precision: Precision, device: torch.device
) -> list[Record]:
    """In one of ``PRECISIONS``, the engine's own precision besides."""
    dtype, multiplied = PRECISIONS[name]
    netG, netD, batches = bench_engine.inputs(cell, 0)
    for net in (netG, netD):
        net.to(dtype)

    def seen(backend: Any, device: torch.device, dtype: torch.dtype) -> bench_engine.Observations:
        nets = (net.to(device, dtype) for net in (netG, netD))
        mixed = precision if dtype == torch.float32 else "fp32"
        trainer = bench_engine.engine_trainer(*nets, backend=backend, precision=mixed)
        given = [(real.to(device, dtype), z.to(device, dtype)) for real, z in batches]
        return bench_engine.observe(trainer, given)

    batches = [(real.to(dtype), z.to(dtype)) for real, z in batches]
    with machine.fp32_precision(multiplied), _tile(0):
        by_torch = seen("reference", device, dtype)
        own = {backend: seen(backend, device, dtype) for backend in _own()}
        # Last, as the networks themselves change their dtype.
        truth = seen("reference", device, torch.float64)
    reference = bench_engine.deviations(by_torch, truth)
    ours = {name: bench_engine.deviations(found, truth) for name, found in own.items()}
    rows = []
    for kind, least in bench_engine.LEAST_ROUNDING.items():
        limit = STEP_LIMIT * max(reference[kind], least)
        rows.append(
            {
                "precision": name if precision == "fp32" else f"mixed {precision}",
                "kind": kind,
                "reference": _finite(reference[kind]),
                "own": {name: _finite(found[kind]) for name, found in ours.items()},
                "limit": _finite(limit),
                "right": all(found[kind] <= limit < math.inf for found in ours.values()),
            }
        )
    return rows


def capture(job: Job, save: Save) -> bool:
    """Steps replayed from CUDA graphs against the same ones run an operation at a time.

    With batches of two sizes, each of which has a graph; then whether replays take memory, and what
    they save.
    """
    cell = Cell(16, 1, 4, 4, 4) if job.dry_run else Cell(64, 3, 64)
    steps = 8 if job.dry_run else 200
    asked: list[tuple[Backend, Precision]] = [("reference", "fp32"), ("auto", "fp32")]
    asked += [("auto", precision) for precision in ("tf32", *MIXED)]
    rows: list[Record] = []
    for backend, precision in asked[:2] if job.dry_run or job.quick else asked:
        row: Record = {"backend": backend, "precision": precision}
        rows.append(row)
        try:
            row |= _capture(cell, backend, precision, steps, job)
        except Exception as failure:
            row |= {"right": False, "reason": f"{type(failure).__name__}: {_one_line(failure)}"}
        save({"cell": str(cell), "steps": steps, "replays": _REPLAYS, "rows": rows})
    return all(row["right"] for row in rows)


def _capture(
    cell: Cell, backend: Backend, precision: Precision, steps: int, job: Job
) -> dict[str, Any]:
    uncaptured, captured = (
        _loaded_engine(cell, backend, precision, capture, job.device) for capture in (False, "auto")
    )
    with _deterministic():
        for _ in range(steps):
            uncaptured.step()
            captured.step()
    # Of the ways to compute a thing, one may have been measured more often.
    states = ({**engine.state_dict(), "choices": {}} for engine in (captured, uncaptured))
    differ = bench_engine.differences(*states)
    found: dict[str, Any] = {
        "captures": captured.captures,
        "uncaptured": captured.uncaptured_reason,
        "differ": differ,
        "right": not differ and (job.dry_run or captured.captures == 2),
    }
    if not job.dry_run:
        found["growth"] = _growth(captured)
        found["right"] = found["right"] and found["growth"] == 0
    if found["right"] and not job.without_own:
        for name, engine in (("us_uncaptured", uncaptured), ("us", captured)):
            found[name] = 1e6 * _step_seconds(engine, job)
    return found


def _loaded_engine(
    cell: Cell, backend: Backend, precision: Precision, capture: Capture, device: torch.device
) -> Engine:
    """On images of no meaning, the last batch of each of whose epochs is smaller."""
    draw = np.random.default_rng(0)
    shape = (5 * cell.batch_size // 2, cell.image_size, cell.image_size, cell.nc)
    data = ImageSet(draw.integers(0, 256, shape, dtype=np.uint8), None, (), "noise", "")
    netG, netD, _ = bench_engine.inputs(cell, 0)
    engine = Engine(
        DCGANGenerator.from_state_dict(netG.state_dict()),
        DCGANDiscriminator.from_state_dict(netD.state_dict()),
        backend=backend,
        precision=precision,
        capture=capture,
        ema=0.999,
        device=device,
    )
    engine.attach(Loader(data, cell.batch_size, flip=True, device=device))
    return engine


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """cuDNN may otherwise add in any order."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _growth(engine: Engine) -> int:
    """Bytes of memory that replays have taken and not given back."""
    torch.cuda.synchronize()
    names = ("allocated_bytes.all.current", "reserved_bytes.all.current")
    before = torch.cuda.memory_stats()
    for _ in range(_REPLAYS):
        engine.step()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    return max(after[name] - before[name] for name in names)


def _step_seconds(engine: Engine, job: Job) -> float:
    """The median over rounds of a few steps."""
    taken, steps = [], 1 if job.dry_run else 30
    for _ in range(5):
        machine.synchronize(job.device)
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        machine.synchronize(job.device)
        taken.append((time.perf_counter() - started) / steps)
    return statistics.median(taken)


def ops(job: Job, save: Save) -> bool:
    """Every convolution of DCGAN-64 each way of torch, Triton and CUDA.

    Checked, then timed against what the GPU allows.
    """
    cases = _layers(job)
    precisions = list(OP_LIMITS)[:1] if job.dry_run else list(OP_LIMITS)
    rates = {name: _rates(job, name) for name in precisions}
    record: Record = {"rates": rates, "limits": OP_LIMITS, "rows": []}
    if job.without_own:
        record["withheld"] = job.without_own
    save(record)
    tasks = [(case, name) for name in precisions for case in cases]
    for task, ways in zip(tasks, _check_all(tasks, job), strict=True):
        record["rows"].append(_row(*task, ways))
    save(record)
    right = True
    for (case, name), row in zip(tasks, record["rows"], strict=True):
        for label, found in row["ways"].items():
            if found["right"]:
                with machine.fp32_precision(PRECISIONS[name][1]):
                    run, _ = _setup(case, name, job)
                    seconds = _seconds(functools.partial(run, label), job)
                found |= _speed(row, seconds, rates[name])
            right = right and found["right"]
        save(record)
    return right


def _layers(job: Job) -> list[bench_conv.Case]:
    if job.dry_run:
        sizes = ({"side": 4, "ch": 3}, {"side": 1, "stride": 1, "padding": 0, "ch": 8})
        both = itertools.product(sizes, bench_conv.DIRECTIONS)
        return [bench_conv.Case(direction, n=2, cl=8, **size) for size, direction in both]
    of_64 = [c for c in bench_conv.CASES if c.n == _OP_BATCH and c.side in (1, 4, 8, 16, 32)]
    return [case for case in of_64 if case.direction == "fprop" or not job.quick]


def _check_all(tasks: Sequence[tuple[bench_conv.Case, str]], job: Job) -> list[dict[str, Record]]:
    """What :func:`_check` finds. In several processes, since it compiles kernels."""
    check = functools.partial(_check, job)
    return list((map if job.dry_run else _in_processes)(check, tasks))


def _check(job: Job, task: tuple[bench_conv.Case, str]) -> dict[str, Record]:
    """By label the ``backend``, and the ``error`` or the ``reason`` why there is none."""
    case, name = task
    machine.prepare(job.device)
    found: dict[str, Record] = {}
    with machine.fp32_precision(PRECISIONS[name][1]), _poisoned():
        run, (low, high, weight) = _setup(case, name, job)
        truth = bench_conv._torch(case, low.double(), high.double(), weight.double())
        for label, (backend, _) in _ways(case, name, job).items():
            try:
                error = (run(label).double() - truth).norm() / truth.norm()
                found[label] = {"backend": backend, "error": error.item()}
            except Exception as failure:
                reason = f"{type(failure).__name__}: {_one_line(failure)}"
                found[label] = {"backend": backend, "reason": reason}
    return found


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Within this context what a kernel leaves out of its result is NaN."""
    empty = gpu._empty
    gpu._empty = lambda *args: empty(*args).fill_(torch.nan)
    try:
        yield
    finally:
        gpu._empty = empty


def _ways(case: bench_conv.Case, name: str, job: Job) -> dict[str, tuple[str, str]]:
    """By label the backend and its way."""
    found = {_TORCH: (_TORCH_BACKEND, _TORCH)}
    if not job.without_own:
        for backend, own in _kernels(case, name).items():
            ways = own.ways(case.direction)
            found |= {
                f"{backend} {way}": (backend, way) for way in ways[: 1 if job.quick else None]
            }
    return found


def _kernels(case: bench_conv.Case, name: str) -> dict[str, conv._Kernels]:
    """By backend, those that this machine has."""
    problem, dtype = case.kernels().problem, PRECISIONS[name][0]
    return {backend: conv._KINDS[backend](problem, dtype) for backend in _own()}


def _setup(
    case: bench_conv.Case, name: str, job: Job
) -> tuple[Callable[[str], Tensor], tuple[Tensor, Tensor, Tensor]]:
    """``run(label)``, which computes the case by a way, and its operands."""
    dtype, _ = PRECISIONS[name]
    own, ways = _kernels(case, name), _ways(case, name, job)
    p, draw = case.kernels().problem, generator(0, "gpu_check")
    shapes = (p.low(), p.high(), (p.cl, p.ch, p.kh, p.kw))
    low, high, weight = (
        torch.randn(shape, generator=draw)
        .to(job.device, dtype)
        .to(memory_format=torch.channels_last)
        for shape in shapes
    )
    transposed = case.direction == "dgrad"

    def run(label: str) -> Tensor:
        backend, way = ways[label]
        if backend == _TORCH_BACKEND:
            return bench_conv._torch(case, low, high, weight)
        if case.direction == "wgrad":
            return own[backend].wgrad(way, low, high)
        x = low if transposed else high
        return own[backend].forward(way, transposed, x, weight, conv._Epilogue())

    return run, (low, high, weight)


def _row(case: bench_conv.Case, name: str, ways: dict[str, Record]) -> Record:
    """What :func:`_check` found of them, judged."""
    p, size = case.kernels().problem, PRECISIONS[name][0].itemsize
    elements = math.prod(p.low()) + math.prod(p.high()) + p.cl * p.ch * p.kh * p.kw
    for found in ways.values():
        error = found.get("error", math.nan)
        found["right"] = error <= OP_LIMITS[name]
        if "error" in found:
            found["error"] = _finite(error)
        if not found["right"]:
            found.setdefault("reason", f"off by {error:.1e}, allowed {OP_LIMITS[name]:.1e}")
    return {
        "layer": f"{case.cl}->{case.ch}@{case.side}, batch {case.n}",
        "direction": case.direction,
        "precision": name,
        "gflop": case.gflop(),
        "megabytes": elements * size / 1e6,
        "ways": ways,
    }


def _speed(row: Record, seconds: float, rates: dict[str, float]) -> Record:
    least = max(row["gflop"] / 1e3 / rates["tflop_s"], row["megabytes"] / 1e3 / rates["gb_s"])
    return {
        "us": 1e6 * seconds,
        "tflop_s": row["gflop"] / 1e3 / seconds,
        "of_roofline": least / seconds,
    }


def passes(job: Job, save: Save) -> bool:
    """What goes over memory rather than multiplies, each way: checked, then timed."""
    precisions = list(PASS_LIMITS)[:1] if job.dry_run else list(PASS_LIMITS)
    record: Record = {"gb_s": _rates(job, "float32")["gb_s"], "limits": PASS_LIMITS, "rows": []}
    if job.without_own:
        record["withheld"] = job.without_own
    save(record)
    right = True
    for name in precisions:
        for one in _passes(job, PRECISIONS[name][0]):
            ways: dict[str, Record] = {}
            row = {"what": one.what, "precision": name, "megabytes": one.megabytes, "ways": ways}
            record["rows"].append(row)
            for backend in ["reference", *([] if job.without_own else _own())]:
                ways[backend] = _pass_by(one, backend, PASS_LIMITS[name], record["gb_s"], job)
                right = right and ways[backend]["right"]
                save(record)
    return right


@dataclasses.dataclass(frozen=True)
class Pass:
    """An op on one set of arguments.

    Attributes:
        what: the op and its sizes.
        megabytes: what has to be read and written at least.
        run: its results, on the arguments or on them in float64.
    """

    what: str
    megabytes: float
    run: Callable[[bool], list[Tensor]]


def _pass_by(one: Pass, backend: str, limit: float, gb_s: float, job: Job) -> Record:
    try:
        with use_backend("reference"):
            truth = one.run(True)
        with use_backend(backend), _poisoned():
            got = one.run(False)
        errors = [
            float((g.double() - w).norm() / w.norm()) for g, w in zip(got, truth, strict=True)
        ]
        # Not <=, so that NaN is wrong too.
        if any(not error <= limit for error in errors):
            return {"right": False, "reason": f"off by {max(errors):.1e}, allowed {limit:.1e}"}
        with use_backend(backend):
            seconds = _seconds(lambda: one.run(False), job)
    except Exception as failure:
        return {"right": False, "reason": f"{type(failure).__name__}: {_one_line(failure)}"}
    of_copy = one.megabytes / 1e3 / gb_s / seconds
    return {"right": True, "error": max(errors), "us": 1e6 * seconds, "of_copy": of_copy}


def _passes(job: Job, dtype: torch.dtype) -> Iterator[Pass]:
    cases = [case for case in bench_bn_act.CASES if case.n == 64]
    if job.dry_run:
        cases = [bench_bn_act.Case(2, 8, 4, 2, "leaky_relu")]
    for case in cases[:1] if job.quick else cases:
        yield _batch_norm(case, job, dtype)
    batch, side = (4, 8) if job.dry_run else (1024, 64)
    draw = generator(0, "gpu_check")
    logits = torch.randn(2 * batch, 1, 1, 1, generator=draw).to(job.device, dtype)

    def loss(exact: bool) -> list[Tensor]:
        leaf = (logits.double() if exact else logits).detach().requires_grad_()
        found, d = gan_loss(leaf, (1.0, 0.0))
        return [found.detach(), d, *torch.autograd.grad(found.sum(), leaf)]

    yield Pass(f"loss of 2x{batch}", 4 * batch * dtype.itemsize / 1e6, loss)
    shape = (2 * batch, side, side, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw).to(job.device)
    index = torch.randint(0, 2 * batch, (batch,), generator=draw).to(job.device)

    def batch_of(exact: bool) -> list[Tensor]:
        return [augment(images, index, index % 2 == 0, dtype=torch.float64 if exact else dtype)]

    moved = batch * side * side * 3 * (1 + dtype.itemsize) / 1e6
    yield Pass(f"images {batch}x{side}x{side}x3, gathered, flipped", moved, batch_of)


def _batch_norm(case: bench_bn_act.Case, job: Job, dtype: torch.dtype) -> Pass:
    """Forward and backward, in training."""
    x, dy, weight, bias = (tensor.to(job.device) for tensor in bench_bn_act._inputs(case))
    x, dy = (t.to(dtype, memory_format=torch.channels_last) for t in (x, dy))
    exact = bn_act(*(t.double() for t in (x, weight, bias)), groups=case.groups)
    # Where rounding decides the side of a kink.
    dy = dy * (exact.abs() > 1e-4)

    def run(exact: bool) -> list[Tensor]:
        given = [t.double() if exact else t for t in (x, dy, weight, bias)]
        return bench_bn_act._forward_backward(case, None, *given)

    # x, y, and again x, dy, dx; and x for the statistics and their gradients.
    return Pass(f"batch norm {case}", 7 * x.numel() * dtype.itemsize / 1e6, run)


def _rates(job: Job, name: str) -> dict[str, float]:
    """What this GPU reaches: TFLOP/s of large matrix products so rounded, GB/s of large copies."""
    n, size = (64, 2**12) if job.dry_run else (8192, 2**28)
    dtype, precision = PRECISIONS[name]
    a, b = torch.randn(2, n, n, device=job.device, dtype=dtype)
    source = torch.zeros(size, device=job.device)
    target = torch.empty_like(source)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        product = _seconds(lambda: torch.mm(a, b), job)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    copy = _seconds(lambda: target.copy_(source), job)
    return {"tflop_s": 2 * n**3 / 1e12 / product, "gb_s": 2 * 4 * size / 1e9 / copy}


def _seconds(call: Callable[[], object], job: Job) -> float:
    """The median; on a GPU by replays of a captured graph, which leave out the launches' cost."""
    if not job.dry_run:
        return 1e-3 * tuning._gpu_turn(call)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def bench(job: Job, save: Save) -> bool:
    """Images a second of the whole step, each cell as ``fastgan bench`` measures it."""
    return _measure(_variants(job), _cells(job), job, save)


def accelerate(job: Job, save: Save) -> bool:
    """The example's own loop as it is, and with ``fastgan.accelerate`` on both networks."""
    variants = bench_accelerate.variants()
    if job.without_own:
        variants = [v for v in variants if v.name in VARIANTS]
    return _measure(variants, _cells(job)[:1], job, save)


def _measure(
    variants: Sequence[bench_engine.Variant], cells: Sequence[Cell], job: Job, save: Save
) -> bool:
    effort = bench_engine.Effort(5.0 if job.quick else 15.0)
    if job.dry_run:
        effort = bench_engine.Effort(0.0, rounds=1, turn=0.0)
    record: Record = {
        "machine": machine.describe(job.device),
        "check": bench_engine.CHECK,
        "measured": {"sgemm_gflop_s": 1e3 * _rates(job, "float32")["tflop_s"]},
        "cells": [],
    }
    if job.without_own:
        record["withheld"] = job.without_own
    save(record)
    for cell in cells:
        found = bench_engine.measure_cell(cell, variants, effort, device=job.device)
        record["cells"].append(found)
        save(record)
    return all(v["status"] != "differs" for cell in record["cells"] for v in cell["variants"])


def _cells(job: Job) -> list[Cell]:
    if job.dry_run:
        return [Cell(16, 1, 4, 4, 4)]
    cells = [Cell(64, 3, 128), Cell(28, 1, 128), Cell(64, 3, 1024)]
    return cells[:1] if job.quick else cells


def _variants(job: Job) -> list[bench_engine.Variant]:
    if job.dry_run:
        names = ("example", "example channels_last", "fastgan reference", "fastgan triton")
        found = [bench_engine.make_variant(name) for name in names]
    else:
        found = bench_engine.select_variants(compiled=not job.quick, device=job.device)
    return [v for v in found if not (job.without_own and VARIANTS[v.name].kind == "fastgan")]


def _finite(value: float) -> float | None:
    # JSON has no other numbers.
    return value if math.isfinite(value) else None


def _one_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


PARTS: dict[str, Callable[[Job, Save], bool]] = {
    "machine": describe,
    "kernels": kernels,
    "compile": compile_all,
    "step": step,
    "capture": capture,
    "passes": passes,
    "ops": ops,
    "bench": bench,
    "accelerate": accelerate,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part; its file says how it went. Returns 0 where what was checked is right."""
    parser = argparse.ArgumentParser("gpu_parts", description=main.__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, tiny")
    parser.add_argument("--quick", action="store_true", help="the least that says something")
    parser.add_argument("--without-own", default="", help="why fastgan's own get no speeds")
    args = parser.parse_args(argv)
    job = Job(args.dry_run, args.quick, args.without_own)

    machine.prepare(job.device)

    def save(record: Record) -> None:
        replace_file(args.out, json.dumps(record, allow_nan=False).encode())

    return 0 if PARTS[args.part](job, save) else 1


if __name__ == "__main__":
    raise SystemExit(main())
