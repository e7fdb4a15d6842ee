"""What ``fastgan.accelerate`` makes of the example's own loop, with nothing else changed.

``python -m fastgan.benchmarks.bench_accelerate``, or with ``--batch-sizes 16 --ngf 8 --ndf 8
--image-size 16 --rounds 3`` to see that it works.

Networks, loss, optimisers and loop are the example's; check, turns and table are those of
:mod:`fastgan.benchmarks.bench_engine`: a variant that differs from the example gets no figure.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

import torch
from fastgan.benchmarks import bench_engine, machine, report
from fastgan.benchmarks.bench_engine import Effort, Trainer, Variant, example_trainer, make_variant
from fastgan.benchmarks.plan import Cell
from torch import nn

from fastgan.errors import InputError
from fastgan.nn.accelerate import accelerate, explain


def accelerated_trainer(netG: nn.Module, netD: nn.Module, *, channels_last: bool) -> Trainer:
    """The example's loop on its networks, accelerated."""
    return example_trainer(accelerate(netG), accelerate(netD), channels_last=channels_last)


def variants() -> list[Variant]:
    """The example as it is and in ``torch.channels_last``; each of them accelerated."""
    return [
        make_variant("example"),
        make_variant("example channels_last"),
        *(
            Variant(name, functools.partial(accelerated_trainer, channels_last=channels_last))
            for name, channels_last in (
                ("accelerate", False),
                ("accelerate channels_last", True),
            )
        ),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--ngf", type=int, default=64)
    parser.add_argument("--ndf", type=int, default=64)
    parser.add_argument("--nc", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120.0, help="a batch size")
    parser.add_argument("--rounds", type=int, help="so many instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    cells = [
        Cell(args.image_size, args.nc, batch, args.ngf, args.ndf) for batch in args.batch_sizes
    ]
    try:
        for cell in cells:
            cell.check()
    except InputError as error:
        parser.error(str(error))

    machine.prepare(device)
    record = {"machine": machine.describe(device), "measured": machine.measure(device)}
    print("\n".join([*report.machine_lines(record), f"check: {bench_engine.CHECK}"]), flush=True)
    for name, net in zip(("netG", "netD"), bench_engine.inputs(cells[0], 0), strict=False):
        print(f"\n{name}\n{explain(accelerate(net))}", flush=True)
    for cell in cells:
        effort = Effort(args.seconds, args.rounds)
        figures = bench_engine.measure_cell(cell, variants(), effort, device=device)
        print(f"\n{report.table(figures, record['measured']['sgemm_gflop_s'])}", flush=True)


if __name__ == "__main__":
    main()
