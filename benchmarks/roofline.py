"""What a whole training step would cost on an H100 at the least, launch by launch: a prediction.

``python -m fastgan.benchmarks.roofline`` writes ``benchmarks/roofline.md``.

The engine's own step is run on the CPU by the Triton backend. Its kernels are launched on a
stand-in driver, which writes them down and runs nothing, and torch's own operations are written
down as they pass. So the launches are those of the code as it is, in its order; only their times
are computed, from their bytes and FLOP.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from fastgan.benchmarks.compile_driver import TARGETS, Launch, recorded
from fastgan.benchmarks.plan import Cell
from fastgan.benchmarks.report import markdown_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgan.engine.engine import Engine
from fastgan.errors import InputError
from fastgan.files import replace_file
from fastgan.nn.dcgan import DCGANDiscriminator, DCGANGenerator
from fastgan.ops import augment, bn_act, conv, gan_loss, triton

GPU = TARGETS["sm_90"]
BATCHES = (128, 1024)
# Seconds from one kernel to the next, at least: replayed from a graph, and launched from Python.
CAPTURED_S, EAGER_S = 2e-6, 6e-6
DOCUMENT = Path(__file__).with_name("roofline.md")

# torch's fused Adam: elements of a chunk, and chunks of a launch.
_ADAM_CHUNK, _ADAM_CHUNKS = 65536, 320
# These write their first argument without having read it.
_OVERWRITES = frozenset({"copy_", "zero_", "fill_", "normal_"})
_WAITS = frozenset({"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"})

# By kernel, what would make it cost less.
_REMEDIES = {
    "bn act bwd": "it reads both tensors a second time, after the sums over them; where a tile "
    "of the batch stays in L2 or in shared memory (a cluster's), once would do; with the "
    "convolution's own epilogue doing the sums, the reduce pass falls away",
    "bn act bwd reduce": "summing in the epilogue of the convolution that makes `dy` would "
    "leave it out: `x` is then read there, and `dy` not again",
    "bn act fwd": "normalising as the next convolution loads its operand would leave out one "
    "write and one read of each activation; what it costs is the arithmetic again for each tap",
    "conv dgrad": "most are bound by FLOP: Winograd's F(2, 2) has 1.78 times fewer "
    "multiplications, FP8 twice the rate; the layers at the image are bound by the bytes of their "
    "64-channel side",
    "conv fprop": "as `conv dgrad`; in D's update real and generated images could be read where "
    "they are, without `aten.cat`",
    "conv wgrad": "Winograd and FP8 as for the others; the parts that its sum is cut into are "
    "written in float32 and read again, and fewer of them are less traffic",
    "act bwd": "applying it as the two convolutions load `dy` would leave it out",
    "aten.add_": "the counts of batches, one number each: one launch for all of them",
    "aten._fused_adam_": "every byte is needed; sharding it over GPUs is what is left",
    "conv wgrad sum": "fewer parts, or adding them up in the last program that finishes",
    "bn running": "one launch for all layers at the end of the step",
    "bn merge": "merging in the first programs of the pass that normalises",
}


@dataclasses.dataclass(frozen=True)
class Item:
    """One launch of a kernel.

    Attributes:
        kernel: its name.
        what: the sizes.
        flop: of its matrix product.
        nbytes: each operand read once, each result written once.
        ours: whether it is a Triton kernel.
    """

    kernel: str
    what: str
    flop: float
    nbytes: int
    ours: bool

    @property
    def times(self) -> dict[str, float]:
        """Seconds by what bounds it: ``FLOP`` or ``bytes``."""
        return {"FLOP": self.flop / GPU.flop_s, "bytes": self.nbytes / GPU.bytes_s}

    def seconds(self, floor: float) -> float:
        return max(floor, *self.times.values())

    def bound(self, floor: float) -> str:
        times = {"launch": floor, **self.times}
        return max(times, key=times.__getitem__)


class _Recorder(TorchDispatchMode):
    """Writes down what torch launches, and between it what is launched by Triton."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.items: list[Item] = []
        self.waits = 0
        self._launches = launches
        self._ops = _custom_ops()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.take()
        kwargs = kwargs or {}
        if func in self._ops:
            # Its body, with this mode switched on again: below it torch's operations are seen too.
            with self:
                result = self._ops[func](*args, **kwargs)
            self.take()
            return result
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.waits += name in _WAITS
        if func.namespace == "aten" and not name.startswith(("empty", "new_empty")):
            self.items += _torch_items(func, name, args, kwargs, result)
        return result

    def take(self) -> None:
        """Write down what Triton has launched since the last time."""
        self.items += map(_triton_item, self._launches)
        self._launches.clear()


def _custom_ops() -> dict[Any, Any]:
    """By overload, the bodies of fastgan's ops."""
    kind = torch._library.custom_ops.CustomOpDef
    found = (v for m in (augment, bn_act, conv, gan_loss) for v in vars(m).values())
    return {op._opoverload: op._init_fn for op in found if isinstance(op, kind)}


def _torch_items(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> list[Item]:
    results = func._schema.returns
    if results and all(r.alias_info is not None and not r.alias_info.is_write for r in results):
        return []  # a view
    label, given = f"aten.{name}", _tensors((args, kwargs))
    if name == "_fused_adam_":
        weights, gradients, *moments = args[:4]
        chunks = sum(math.ceil(w.numel() / _ADAM_CHUNK) for w in weights)
        launches = math.ceil(chunks / _ADAM_CHUNKS)
        nbytes = _bytes(gradients) + 2 * _bytes([*weights, *moments[0], *moments[1]])
        count = sum(w.numel() for w in weights)
        return [Item(label, f"{count} weights", 0.0, nbytes // launches, False)] * launches
    written = [
        tensor
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value)
    ]
    read = given[1:] if name in _OVERWRITES else given
    fresh = [] if written else _tensors(result)
    if not any(tensor.numel() for tensor in (*written, *fresh)):
        return []
    largest = max((*given, *fresh), key=Tensor.numel)
    nbytes = _bytes(read) + _bytes([*written, *fresh])
    return [Item(label, _sizes(largest.shape), 0.0, nbytes, False)]


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "1"


def _triton_item(launch: Launch) -> Item:
    name = launch.specialisation.name.strip("_").removesuffix("_kernel").replace("_", " ")
    shapes = {key: shape for key, (shape, _) in launch.tensors.items()}
    low, high = shapes.get("low_ptr"), shapes.get("high_ptr")
    if low is None or high is None:
        largest = max(shapes.values(), key=math.prod)
        return Item(name, _sizes(largest), 0.0, launch.nbytes, True)
    (n, cl, h, w), ch = low, high[1]
    kh, kw = _kernel_sides(launch, high)
    flop = 2.0 * n * h * w * cl * ch * kh * kw
    return Item(name, f"{cl}->{ch}@{h}, batch {n}", flop, launch.nbytes, True)


def _kernel_sides(launch: Launch, high: Sequence[int]) -> tuple[int, int]:
    constants = launch.specialisation.constants()
    kh, kw = constants.get("KH", 1), constants.get("KW", 1)
    # A low side of 1x1 is seen as a plain product, of which the taps are channels.
    return (high[2], high[3]) if (kh, kw) == (1, 1) else (kh, kw)


@contextlib.contextmanager
def as_on_a_gpu(*, every_way: bool = False) -> Iterator[None]:
    """Within this context the ops believe that Triton can run here, and take the first tiles.

    Args:
        every_way: they have all tiles to choose from.
    """
    before = triton._missing_reason, triton.interpreted
    triton._missing_reason = lambda: ""
    triton.interpreted = lambda: not every_way
    conv._tiles_of.cache_clear()
    try:
        yield
    finally:
        triton._missing_reason, triton.interpreted = before
        conv._tiles_of.cache_clear()


def record_step(cell: Cell) -> tuple[list[Item], int]:
    """The launches of one step in bfloat16, and how many times it waits for the GPU.

    Raises:
        RunError: the kernels are interpreted in this process.
    """
    shape = (cell.batch_size, cell.image_size, cell.image_size, cell.nc)
    real = torch.zeros(shape, dtype=torch.uint8)
    with recorded(GPU) as launches, as_on_a_gpu():
        netG = DCGANGenerator(ngf=cell.ngf, nc=cell.nc, image_size=cell.image_size)
        netD = DCGANDiscriminator(ndf=cell.ndf, nc=cell.nc, image_size=cell.image_size)
        engine = Engine(netG.bfloat16(), netD.bfloat16(), backend="triton", device="cpu")
        engine.step(real)  # what is found out and made once
        launches.clear()
        with _Recorder(launches) as recorder:
            engine.step(real)
        recorder.take()
    return recorder.items, recorder.waits


def summary(cell: Cell, items: Sequence[Item], waits: int) -> dict[str, Any]:
    """The sums over a step, and its launches by kernel."""
    groups: dict[str, dict[str, float]] = {}
    for item in items:
        group = groups.setdefault(item.kernel, {"launches": 0, "us": 0.0})
        group["launches"] += 1
        group["us"] += 1e6 * item.seconds(CAPTURED_S)
    captured, eager, without = (
        sum(item.seconds(floor) for item in items) for floor in (CAPTURED_S, EAGER_S, 0.0)
    )
    return {
        "batch_size": cell.batch_size,
        "launches": len(items),
        "triton": sum(item.ours for item in items),
        "waits": waits,
        "gflop": sum(item.flop for item in items) / 1e9,
        "gigabytes": sum(item.nbytes for item in items) / 1e9,
        "captured_us": 1e6 * captured,
        "eager_us": 1e6 * eager,
        "without_floor_us": 1e6 * without,
        "bound": dict(Counter(item.bound(CAPTURED_S) for item in items)),
        "kernels": groups,
    }


def document(steps: Sequence[tuple[Cell, Sequence[Item], dict[str, Any]]]) -> str:
    """The Markdown file."""
    cell = steps[0][0]
    weights = sum(
        p.numel()
        for net in (DCGANGenerator(ngf=cell.ngf), DCGANDiscriminator(ndf=cell.ndf))
        for p in net.parameters()
    )
    lines = [
        "# What a training step would cost on an H100, at the least",
        "",
        "**Predicted, never measured.** Written by `python -m fastgan.benchmarks.roofline`; "
        "nothing here has run on a GPU. Real kernels reach a part of these rates, so a real step "
        "takes longer.",
        "",
        f"One step of the engine on DCGAN-{cell.image_size} (ngf {cell.ngf}, ndf {cell.ndf}) from "
        "a batch of uint8 images on the device, backend `triton`, networks in bfloat16. The "
        "launches are those that the code makes, recorded as it runs, in its order.",
        "",
        *_assumptions(weights),
        "",
        "## Sums",
        "",
        *markdown_table(("", *(f"batch {s['batch_size']}" for *_, s in steps)), _sum_rows(steps)),
        "",
    ]
    for cell, _, found in steps:
        lines += _largest(cell, found)
    for cell, _, found in steps:
        lines += ["", f"## Batch {cell.batch_size}, by kernel", "", *_by_kernel(found)]
    for cell, items, _ in steps:
        lines += ["", f"## Batch {cell.batch_size}, in order", "", *_in_order(items)]
    return "\n".join([*lines, ""])


def _assumptions(weights: int) -> list[str]:
    now, master = 7 * 2, 2 + 6 * 4 + 2
    return [
        "## Assumptions",
        "",
        f"- {GPU.device}: {GPU.flop_s / 1e12:.0f} TFLOP/s in bfloat16, dense, "
        f"{GPU.bytes_s / 1e12:.2f} TB/s, {GPU.multiprocessors} multiprocessors: NVIDIA's data "
        "sheet. Clocks under load, and the share of the peak that a kernel can reach, are left "
        "out.",
        "- FLOP: `2·N·h·w·Cl·Ch·kh·kw` of each convolution, in whichever direction; other "
        "arithmetic is not counted. Those of D's weights in G's update, which the example "
        "computes and discards, are not made.",
        "- Bytes: each operand of a launch read once and each result written once, to and from "
        "memory. What the 50 MB of L2 hold from one launch to the next is moved faster; at batch "
        "128 the largest tensor, of 34 MB, fits.",
        f"- A launch takes at least {1e6 * CAPTURED_S:.0f} µs replayed from a CUDA graph, and "
        f"{1e6 * EAGER_S:.0f} µs launched from Python: what a small kernel and the gap to the "
        "next come to by rule of thumb. [NVIDIA's example]"
        "(https://developer.nvidia.com/blog/cuda-graphs/) of a 2.9 µs kernel on a V100 has 3.4 µs "
        "from one to the next in a graph, 3.8 µs launched from C; Python and the custom ops' "
        "dispatch come on top, so that the second figure is too low for this code. A captured "
        "step is one launch of one graph for the host. "
        "This version captures nothing yet.",
        "- A launch takes the longest of these three times; launches follow one another.",
        "- Convolutions take the first of the tiles that they choose from; where the sum of a "
        "weight gradient is cut into parts depends on it.",
        "- torch's fused Adam and its other operations are one kernel each on a GPU; views and "
        "allocations are none.",
        "- The sizes of a convolution are low-resolution channels -> high-resolution channels @ "
        "side of the low resolution, whichever its direction.",
        "",
        "This version has no mixed precision: these networks, their gradients and Adam's moments "
        f"are bfloat16 throughout, which is too coarse to train with. Float32 weights and moments "
        f"for the {weights / 1e6:.2f} million parameters would make Adam move "
        f"{master * weights / 1e6:.0f} MB a step where it now moves {now * weights / 1e6:.0f} MB, "
        f"the bfloat16 copies for the next step included, and so add "
        f"{1e6 * (master - now) * weights / GPU.bytes_s:.0f} µs to a step of any batch; no "
        "launches, where the copies are written by the kernel that updates, or else one a network.",
    ]


def _sum_rows(steps: Sequence[tuple[Cell, Sequence[Item], dict[str, Any]]]) -> list[list[str]]:
    found = [s for *_, s in steps]

    def row(name: str, form: str, *values: float) -> list[str]:
        return [name, *(format(value, form) for value in values)]

    return [
        row("launches, eager", "d", *(s["launches"] for s in found)),
        row("of these Triton's", "d", *(s["triton"] for s in found)),
        row("launches, captured", "d", *(1 for _ in found)),
        row("times that the host waits for the GPU", "d", *(s["waits"] for s in found)),
        row("GFLOP", ".1f", *(s["gflop"] for s in found)),
        row("GB", ".3f", *(s["gigabytes"] for s in found)),
        *(
            row(f"launches bound by {what}", "d", *(s["bound"].get(name, 0) for s in found))
            for name, what in (("FLOP", "FLOP"), ("bytes", "bytes"), ("launch", "the launch"))
        ),
        row("predicted, captured, µs", ".0f", *(s["captured_us"] for s in found)),
        row("predicted, eager, µs", ".0f", *(s["eager_us"] for s in found)),
        row("without the floor of a launch, µs", ".0f", *(s["without_floor_us"] for s in found)),
        row(
            "images/s, captured",
            ",.0f",
            *(s["batch_size"] / s["captured_us"] * 1e6 for s in found),
        ),
    ]


def _largest(cell: Cell, found: dict[str, Any]) -> list[str]:
    lines = [f"The three largest items of batch {cell.batch_size}, captured:", ""]
    for i, (name, group) in enumerate(_ranked(found)[:3]):
        share = group["us"] / found["captured_us"]
        remedy = _REMEDIES.get(name, "nothing is known yet")
        lines.append(
            f"{i + 1}. `{name}`: {group['launches']} launches, {group['us']:.0f} µs, {share:.0%}. "
            f"To shrink it: {remedy}."
        )
    return [*lines, ""]


def _ranked(found: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    return sorted(found["kernels"].items(), key=lambda entry: -entry[1]["us"])


def _by_kernel(found: dict[str, Any]) -> list[str]:
    rows = [
        (
            name,
            str(group["launches"]),
            f"{group['us']:.1f}",
            f"{group['us'] / found['captured_us']:.1%}",
            _REMEDIES.get(name, ""),
        )
        for name, group in _ranked(found)
    ]
    return markdown_table(("kernel", "launches", "µs, captured", "share", "to shrink it"), rows)


def _in_order(items: Sequence[Item]) -> list[str]:
    rows = [
        (
            str(i + 1),
            item.kernel,
            item.what,
            f"{item.flop / 1e9:.2f}" if item.flop else "",
            f"{item.nbytes / 1e6:.3f}",
            f"{1e6 * item.seconds(CAPTURED_S):.1f}",
            item.bound(CAPTURED_S),
        )
        for i, item in enumerate(items)
    ]
    return markdown_table(("", "kernel", "sizes", "GFLOP", "MB", "µs, captured", "bound by"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Predict the time of a training step on an H100, and write the file that says so."""
    parser = argparse.ArgumentParser("roofline", description=main.__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCHES, help="(128 1024)")
    parser.add_argument("--output", type=Path, default=DOCUMENT, help="(benchmarks/roofline.md)")
    parser.add_argument("--json", action="store_true", help="print the sums as JSON instead")
    args = parser.parse_args(argv)
    steps = []
    for batch in args.batch_sizes:
        cell = Cell(batch_size=batch)
        try:
            cell.check()
        except InputError as error:
            parser.error(str(error))
        items, waits = record_step(cell)
        steps.append((cell, items, summary(cell, items, waits)))
    if args.json:
        print(json.dumps([found for *_, found in steps], indent=1))
        return
    replace_file(args.output, document(steps).encode())
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
