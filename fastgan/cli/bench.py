"""``fastgan bench``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from fastgan.benchmarks.plan import COUNT, VARIANTS, Cell, default_cells, full_grid
from fastgan.cli import DONE, FAILED, INTERRUPTED
from fastgan.cli.parse import parse
from fastgan.errors import InputError
from fastgan.files import replace_file

_BENCHMARK = "fastgan bench"
_JSON, _PNG = "bench.json", "bench.png"
# Seconds of rounds in each cell. What comes before takes about as long again.
_QUICK_S, _DEFAULT_S = 6.0, 40.0

OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT")]


@dataclasses.dataclass(frozen=True)
class BenchArgs:
    """Measure the whole alternating step, in images a second, against the PyTorch example's.

    By default at 64x64x3 in batches of 64 and 28x28x1 in batches of 128. A variant whose numbers
    are not the example's gets no figure. Ctrl-C keeps the cells that are finished.

    Attributes:
        quick: Within a minute: fewer rounds, nothing compiled.
        full: Sizes 28, 32, 64, 128; batches of 16, 64, 128; 1 and 3 channels.
        image_size: Measure one cell, with images of this side (64).
        nc: Measure one cell, with images of so many channels (3).
        batch_size: Measure one cell, with batches of so many images (64).
        ngf: Channels of the generator's last hidden layer.
        ndf: Channels of the discriminator's first hidden layer.
        variants: What to measure beside the example, such as --variants compile "fastgan cpp"; by
            default all that this machine has.
        no_compile: Leave torch.compile out.
        rounds: Turns of each variant; by default as many as fit, at least 3.
        threads: Of torch; by default as many as it takes.
        device: auto, cpu, cuda, cuda:1, ...
        seed: Of the weights, images and noise.
        out: A folder for bench.json and bench.png.
        resume: Go on with the measurement in --out: its finished cells are not measured again.
    """

    quick: bool = False
    full: bool = False
    image_size: OptionalInt = None
    nc: OptionalInt = None
    batch_size: OptionalInt = None
    ngf: int = Cell.ngf
    ndf: int = Cell.ndf
    variants: tuple[str, ...] = ()
    no_compile: bool = False
    rounds: OptionalInt = None
    threads: OptionalInt = None
    device: str = "auto"
    seed: int = 0
    out: Annotated[Path, tyro.conf.arg(metavar="PATH")] = Path("runs/bench")
    resume: bool = False

    def cells(self) -> list[Cell]:
        """What to measure.

        Raises:
            InputError: names the flag, its value and what it takes.
        """
        own = {
            name: getattr(self, name)
            for name in ("image_size", "nc", "batch_size")
            if getattr(self, name) is not None
        }
        if self.full and (own or self.quick):
            other = f"--{next(iter(own), 'quick').replace('_', '-')}"
            raise InputError(f"--full and {other}: give one of them")
        if own:
            cells = [Cell(**own, ngf=self.ngf, ndf=self.ndf)]
        else:
            cells = (full_grid if self.full else default_cells)(self.ngf, self.ndf)
        for cell in cells:
            cell.check()
        return cells

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            InputError: names the flag, its value and what it takes.
        """
        for name in self.variants:
            if name not in VARIANTS:
                known = ", ".join(map(repr, VARIANTS))
                raise InputError(f"--variants {name!r} is unknown; choose from {known}")
        if self.variants and self.no_compile:
            raise InputError("--variants and --no-compile: give one of them")
        for flag in ("rounds", "threads"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise InputError(f"--{flag} {value} must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed} must be from 0 to 2^63 - 1")


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = parse(BenchArgs, "fastgan bench", argv)
    args.check()
    cells = args.cells()
    earlier = _earlier(args.out)
    if args.resume and earlier is None:
        raise InputError(f"--resume: there is no bench.json at {str(args.out)!r}; leave it out")

    import torch

    from fastgan.benchmarks import bench_engine, machine, report
    from fastgan.engine.engine import resolve_device

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    machine.prepare(device)
    compiled = not (args.quick or args.no_compile)
    variants = bench_engine.select_variants(args.variants, compiled=compiled, device=device)
    effort = bench_engine.Effort(_QUICK_S if args.quick else _DEFAULT_S, args.rounds)
    record: dict[str, Any] = {
        "benchmark": _BENCHMARK,
        "machine": machine.describe(device),
        "settings": {
            "variants": [variant.name for variant in variants],
            "seed": args.seed,
            "seconds": effort.seconds,
            "rounds": effort.rounds,
            "FASTGAN_BACKEND": os.environ.get("FASTGAN_BACKEND"),
        },
        "flop_count": COUNT,
        "check": bench_engine.CHECK,
    }
    if args.resume and earlier is not None:
        _check_same(args.out, earlier, record)
        record = earlier
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        record |= {"measured": machine.measure(device), "cells": []}
    for line in (*report.machine_lines(record), f"FLOP: {COUNT}", f"check: {record['check']}"):
        print(line, flush=True)

    finished = {_cell(entry): entry for entry in record["cells"]}
    interrupted = False
    with tqdm(total=len(cells), unit="cell", disable=None, leave=False) as bar:
        try:
            for cell in cells:
                if cell not in finished:
                    finished[cell] = bench_engine.measure_cell(
                        cell, variants, effort, device=device, seed=args.seed,
                        say=lambda doing: bar.set_postfix_str(doing),
                    )  # fmt: skip
                    record["cells"].append(finished[cell])
                    replace_file(args.out / _JSON, json.dumps(record, indent=1).encode())
                bar.write(f"\n{report.table(finished[cell], record['measured']['sgemm_gflop_s'])}")
                bar.update()
        except KeyboardInterrupt:
            interrupted = True
    if record["cells"]:
        _draw(args.out, record)
    if interrupted:
        done = sum(cell in finished for cell in cells)
        more = f"; to go on: the same with --resume --out {args.out}" if done else ""
        print(f"Stopped after {done} of {len(cells)} cells{more}")
        return INTERRUPTED
    wrong = any(v["status"] == "differs" for c in record["cells"] for v in c["variants"])
    return FAILED if wrong else DONE


def _earlier(out: Path) -> dict[str, Any] | None:
    """The measurement in the folder ``out``, None where there is none yet.

    Raises:
        InputError: there is something else.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {str(out)!r} is a file; give a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return None
    record = None
    with contextlib.suppress(FileNotFoundError, ValueError):
        record = json.loads((out / _JSON).read_bytes())
    if not isinstance(record, dict) or record.get("benchmark") != _BENCHMARK:
        raise InputError(
            f"--out {str(out)!r} is a folder with other files in it and no bench.json of this "
            "command; give a new one"
        )
    return record


def _check_same(out: Path, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to put figures beside others which they cannot be compared with."""
    for part in ("machine", "settings"):
        for name, value in now[part].items():
            if earlier[part].get(name) != value:
                raise InputError(
                    f"--resume: {str(out)!r} was measured with {name} {earlier[part].get(name)}, "
                    f"now it is {value}; measure anew, into another --out or without --resume"
                )


def _cell(entry: dict[str, Any]) -> Cell:
    return Cell(**{field.name: entry[field.name] for field in dataclasses.fields(Cell)})


def _draw(out: Path, record: dict[str, Any]) -> None:
    from fastgan.benchmarks import report

    try:
        replace_file(out / _PNG, report.chart(record))
    except ImportError:
        print(f"\nWrote {out / _JSON}; no chart without matplotlib: pip install 'fastgan[bench]'")
    else:
        print(f"\nWrote {out / _JSON} and {out / _PNG}")
