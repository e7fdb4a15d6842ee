"""Compile the CUDA kernels for GPUs that are not here, read the code, and list the launches.

``python -m fastgan.benchmarks.compiled_cuda`` brings ``compiled_cuda.json`` and
``compiled_cuda.md`` beside this file up to date: the ledger has a line for each instance of each
kernel and each architecture that setup.py builds for, found by a hash of the source with what it
includes, and of the flags; the tables show these, and DCGAN at 64x64 on both backends, its
convolutions with the times that :mod:`fastgan.benchmarks.conv_times` predicts. Only what the ledger
lacks is compiled. ``--check`` changes no file, and fails where the ledger or the tables
are out of date, or a kernel breaks one of the rules in :func:`faults`; without nvcc it goes by the
ledger.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from fastgan.benchmarks import (
    compile_driver,
    compiled,
    compiled_launches,
    conv_times,
    cuda_build,
    cuda_code,
    cuda_launches,
)
from fastgan.benchmarks.compile_driver import TARGETS, Target, occupancy
from fastgan.benchmarks.cuda_code import Code, Product
from fastgan.benchmarks.cuda_launches import Launch, Pass
from fastgan.benchmarks.report import markdown_table
from fastgan.kernels import common
from tqdm import tqdm

from fastgan.errors import RunError
from fastgan.files import replace_file

LEDGER = Path(__file__).with_name("compiled_cuda.json")
TABLE = Path(__file__).with_name("compiled_cuda.md")
TABLE_TARGETS = ("sm_80", "sm_90")

_MOST_SHARED = 48 * 1024
_REGISTER_FILE = 65536

# Tensors that an instance for whole vectors reads and writes 16 bytes at a time. What a product on
# tensor cores reads so, its name says.
_WIDE = {
    "act_bwd": (2, 1),
    "augment_fwd": (1, 1),
    "bn_act_bwd": (2, 1),
    "bn_act_bwd_reduce": (2, 0),
    "bn_act_fwd": (1, 1),
    "bn_stats": (1, 0),
    "conv_dgrad": (0, 1),
    "conv_fprop": (0, 1),
    # The gradient, and the shares of it that are added up.
    "conv_wgrad": (0, 2),
    "dot_fprop": (2, 0),
    "thin_dgrad": (1, 1),
}
# What goes element by element although there are vectors.
_SINGLE = {
    "conv_* with 1+ or +1 in the name": "that operand, whose runs of channels are no multiples of "
    "16 bytes",
    "conv_*": "results whose rows are no multiples of 16 bytes, by the same instances",
    "thin_dgrad": "the weight, which a block reads once",
    "all with a bias, a weight or statistics": "values by channel, of any dtype",
    "bn_stats, bn_act_bwd_reduce, bn_fold, bn_running, add_parts": "float32 by channel or by "
    "weight, neighbours by neighbouring lanes",
    "act_bwd": "the last elements, where they are no whole vector",
    "gan_loss_fwd": "the logits, which are few",
}


@dataclasses.dataclass
class Ledger:
    """What was found.

    Attributes:
        versions: of what made it.
        files: by target and source the key, and of each kernel its code.
        launched: of each kernel the threads of a block, and the most shared memory of a launch.
        passes: those of the table, by target.
    """

    versions: dict[str, str]
    files: dict[tuple[str, str], tuple[str, dict[str, Code]]]
    launched: dict[str, tuple[int, int]]
    passes: dict[str, list[Pass[Launch]]]

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """From a file; empty where there is none.

        Raises:
            RunError: the file is not a ledger.
        """
        if not path.exists():
            return cls({}, {}, {}, {})
        try:
            record = json.loads(path.read_text())
            files: dict[tuple[str, str], tuple[str, dict[str, Code]]] = {}
            for name, key in record["files"].items():
                target, source = name.split(" ")
                files[target, source] = key, {}
            for name, (source, *values) in record["kernels"].items():
                target, kernel = name.split(" ", 1)
                files[target, source][1][kernel] = _to_code(values)
            launched = {name: (row[0], row[1]) for name, row in record["launched"].items()}
            passes: dict[str, list[Pass[Launch]]] = {}
            for target, what, way, launches, *rest in record["passes"]:
                made = tuple(Launch(k, (g[0], g[1], g[2]), *more) for k, g, *more in launches)
                passes.setdefault(target, []).append(Pass(what, way, made, *rest))
            return cls(dict(record["versions"]), files, launched, passes)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise RunError(f"{path} is not a ledger ({error}): delete it to make it anew") from None

    def kernels(self) -> dict[tuple[str, str], Code]:
        """The code of each, by target and kernel."""
        return {
            (target, kernel): code
            for (target, _), (_, codes) in self.files.items()
            for kernel, code in codes.items()
        }

    def text(self) -> str:
        """The file: sorted, a line for each kernel and each pass."""
        files = {f"{t} {s}": key for (t, s), (key, _) in sorted(self.files.items())}
        kernels = {
            f"{target} {kernel}": [source, *dataclasses.astuple(code)]
            for (target, source), (_, codes) in sorted(self.files.items())
            for kernel, code in sorted(codes.items())
        }
        passes = [
            [target, *dataclasses.astuple(one)]
            for target, found in sorted(self.passes.items())
            for one in found
        ]
        columns = ["source", *(field.name for field in dataclasses.fields(Code))]
        parts = [
            f' "versions": {json.dumps(self.versions)}',
            _lines("files", files),
            f' "columns": {json.dumps(columns)}',
            _lines("kernels", kernels),
            _lines("launched", dict(sorted(self.launched.items()))),
            ' "passes": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in passes) + "\n ]",
        ]
        return "{\n" + ",\n".join(parts) + "\n}\n"


def _lines(name: str, rows: Mapping[str, Any]) -> str:
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
    return f' "{name}": {{\n{lines}\n }}'


def _to_code(values: Sequence[Any]) -> Code:
    return Code(*({int(k): n for k, n in v.items()} if isinstance(v, dict) else v for v in values))


def faults(kernel: str, code: Code, launched: tuple[int, int] | None) -> list[str]:
    """Which rules an instance of a kernel breaks.

    It spills no registers and has no stack; its blocks fit a multiprocessor; a launch takes no more
    than 48 KiB of shared memory, so that none has to ask for more; where its shapes are whole
    vectors it has an access of 16 bytes for each tensor in ``_WIDE``; and a product multiplies on
    tensor cores, and copies 16 bytes at a time of the operands that its name says so of.

    Args:
        launched: threads of a block and most shared memory, where anything launches it.
    """
    broken = []
    if code.stack or code.spills:
        broken.append(
            f"spills registers: {code.stack} bytes of stack a thread, {code.spills} instructions"
        )
    threads, shared = launched or (code.threads, 0)
    if threads > code.threads:
        broken.append(f"is launched with {threads} threads of {code.threads}")
    registers = _registers_of_warp(code.registers) * -(-code.threads // 32)
    if registers > _REGISTER_FILE:
        broken.append(f"takes {registers} registers a block of {_REGISTER_FILE}")
    if shared + code.shared > _MOST_SHARED:
        broken.append(f"takes {shared + code.shared} bytes of shared memory of {_MOST_SHARED}")
    product, name = cuda_code.product_of(kernel), kernel.split("<")[0]
    if product is not None:
        broken += _product_faults(product, code)
    elif name.startswith("conv_"):
        broken.append(
            "is a product on tensor cores by its name, and what follows is not understood"
        )
    if name in _WIDE and (product or _vectorised(kernel)):
        found = (_wide(code.loads) + _wide(code.copies), _wide(code.stores))
        for what, has, least in zip(("loads", "stores"), found, _WIDE[name], strict=True):
            if has < least:
                broken.append(f"has {has} {what} of 16 bytes, and needs {least}")
    return broken


def _product_faults(product: Product, code: Code) -> list[str]:
    broken = []
    if not code.products:
        broken.append("has no product on tensor cores")
    wide = _wide(code.copies)
    if wide < product.wide:
        broken.append(f"has {wide} copies of 16 bytes, and needs {product.wide}")
    if product.wide == 2 and wide < sum(code.copies.values()):
        broken.append("has copies of less than 16 bytes")
    return broken


def _registers_of_warp(registers: int) -> int:
    return -(-registers * 32 // 256) * 256


def _vectorised(kernel: str) -> bool:
    """Whether an instance is for whole vectors: of one element are those for other shapes."""
    sizes = re.findall(r"\b\d+(?=[,>])", kernel)
    return not sizes or int(sizes[-1]) > 1


def _wide(counts: Mapping[int, int]) -> int:
    return sum(n for size, n in counts.items() if size >= 16)


def compile_all(
    missing: Mapping[tuple[str, str], str],
    entries: dict[tuple[str, str], tuple[str, dict[str, Code]]],
) -> list[str]:
    """Put those of ``missing`` into ``entries`` as they are done; what the compiler refused."""
    refused = []
    pool = ThreadPoolExecutor(cuda_build.WORKERS)
    try:
        running = {
            pool.submit(cuda_code.compile_source, cuda_build.FOLDER / name, target): (target, name)
            for target, name in missing
        }
        done = as_completed(running)
        for future in tqdm(done, total=len(running), unit="file", disable=None, leave=False):
            target, name = running[future]
            try:
                found = future.result()
            except RunError as error:
                refused.append(str(error))
                continue
            if cuda_code.key(cuda_build.FOLDER / name, target) != missing[target, name]:
                refused.append(f"{name} was changed meanwhile; try again")
                continue
            entries[target, name] = missing[target, name], found
    finally:
        pool.shutdown(cancel_futures=True)
    return refused


def record(ledger: Ledger) -> None:
    """Run the host code, and write down in the ledger what it launches."""
    path = cuda_build.build_recorder()
    parameters = {kernel: code.parameters for (_, kernel), code in ledger.kernels().items()}
    launched: dict[str, tuple[int, int]] = {}
    for name in TABLE_TARGETS:
        ledger.passes[name] = []
        for one in cuda_launches.cuda_passes(TARGETS[name], path, parameters):
            for launch in one.launches:
                threads, shared = launched.get(launch.kernel, (0, 0))
                most = max(threads, launch.threads), max(shared, launch.shared)
                launched[launch.kernel] = most
            if one.table:
                ledger.passes[name].append(one)
    ledger.launched = launched


def table(ledger: Ledger) -> str:
    """``compiled_cuda.md``.

    Raises:
        RunError: it is not known what the Triton kernels compile to.
    """
    triton = {name: list(cuda_launches.triton_passes(TARGETS[name])) for name in TABLE_TARGETS}
    lines = [
        "# What the CUDA kernels compile to",
        "",
        f"Made by `python -m fastgan.benchmarks.compiled_cuda` with nvcc "
        f"{ledger.versions['nvcc']}. **Computed, not measured: no GPU has run any of it.** "
        "DCGAN at 64x64 in bf16. Layers are low-resolution channels-high-resolution channels@low "
        "side; the discriminator sees real and generated images in one pass of two parts. The "
        "launches are those of the ops' own host code.",
        "",
        *_convolutions(ledger, triton),
        "",
        "## The other ops of DCGAN at 64x64",
        "",
        f"Batch {compiled_launches.TABLE_BATCH}. MB is every tensor of each launch once, what goes "
        "from one launch to the next among them; `at least` is these over the device's bandwidth. "
        "What a launch costs by itself is left out. Batch norm with the statistics of the "
        "convolution before it, and with its own, are alternatives.",
    ]
    for name in TABLE_TARGETS:
        target = TARGETS[name]
        header = (
            *("pass", "CUDA kernels", "blocks", "launches: Triton", "CUDA", "MB: Triton", "CUDA"),
            *("at least: Triton", "CUDA"),
        )
        others = {one.what: one for one in triton[name]}
        rows = [
            _pass_row(target, others[one.what], one) for one in ledger.passes[name] if not one.flop
        ]
        rate = f"{target.bytes_s / 1e12:.2f} TB/s"
        lines += ["", f"### {target.device} ({name}), {rate}", "", *markdown_table(header, rows)]
    lines += [
        "",
        "## Kernels",
        "",
        "Threads of a block, KiB of shared memory of the largest launch; in the code for sm_90 "
        "products on tensor cores, and loads, copies to shared memory among them, and stores of "
        "global memory, those of 16 bytes before the slash; for each GPU the "
        "registers of a thread, the blocks that fit a multiprocessor and the share of its warps "
        "that they are.",
        "",
        *_kernel_table(ledger),
        "",
        "What is read and written in single elements, by design:",
        "",
        *(f"- {where}: {what}." for where, what in _SINGLE.items()),
        "",
    ]
    idle = sorted({kernel for _, kernel in ledger.kernels()} - ledger.launched.keys())
    if idle:
        lines += [f"No shape leads to {', '.join(f'`{kernel}`' for kernel in idle)}.", ""]
    return "\n".join(lines)


def _convolutions(
    ledger: Ledger, triton: Mapping[str, Sequence[Pass[compile_driver.Launch]]]
) -> list[str]:
    codes, kernels = ledger.kernels(), compiled.Ledger.read(compiled.LEDGER).kernels
    found = {
        name: conv_times.rows(TARGETS[name], ledger.passes[name], triton[name], codes, kernels)
        for name in TABLE_TARGETS
    }
    lines = [
        "## Convolutions of DCGAN at 64x64, predicted",
        "",
        conv_times.MODEL,
        "",
        "Of the ways that there are the tile taken first is named first, and the figures are its; "
        "in bold is the one that is predicted to be fastest, of equals the first. `resident` are "
        "the blocks that a multiprocessor has registers, shared memory and warps for. Triton's "
        "registers and shared memory are those of `compiled.json`.",
        "",
        "Sums over all layers of both networks, µs:",
        "",
        *conv_times.sums(found),
    ]
    for name, rows in found.items():
        target = TARGETS[name]
        for batch in cuda_launches.CONV_BATCHES:
            of_batch = [row for row in rows if row.batch == batch]
            lines += [
                "",
                f"### {target.device} ({name}), batch {batch}, predicted: "
                f"{target.flop_s / 1e12:.0f} TFLOP/s in bf16, "
                f"{conv_times.FP32_FLOP_S[name] / 1e12:.1f} in float32 on ordinary cores, "
                f"{target.bytes_s / 1e12:.2f} TB/s",
                "",
                *conv_times.table(of_batch),
            ]
    return lines


def _pass_row(target: Target, triton: Pass[compile_driver.Launch], cuda: Pass[Launch]) -> list[str]:
    names = " + ".join(f"`{x.kernel}`" for x in cuda.launches)
    blocks = " + ".join("x".join(str(n) for n in _sizes(x.grid)) for x in cuda.launches)
    nbytes = [sum(x.nbytes for x in one.launches) for one in (triton, cuda)]
    return [
        *(cuda.what, names, blocks, str(len(triton.launches)), str(len(cuda.launches))),
        *(f"{n / 1e6:.1f}" for n in nbytes),
        *(f"{1e6 * n / target.bytes_s:.1f} µs" for n in nbytes),
    ]


def _sizes(grid: tuple[int, int, int]) -> tuple[int, ...]:
    return grid[:1] if grid[1:] == (1, 1) else grid[:2] if grid[2] == 1 else grid


def _kernel_table(ledger: Ledger) -> list[str]:
    kernels = ledger.kernels()
    header = ["kernel", "threads", "shared", "products", "loads", "stores"]
    for target in TABLE_TARGETS:
        header += [f"{target}: registers", "blocks", "warps"]
    rows = []
    for kernel in sorted({kernel for _, kernel in kernels}):
        code = kernels[TABLE_TARGETS[-1], kernel]
        threads, dynamic = ledger.launched.get(kernel, (code.threads, 0))
        row = [
            *(f"`{kernel}`", str(threads), f"{(dynamic + code.shared) / 1024:.1f}"),
            str(code.products or ""),
            f"{_wide(code.loads) + _wide(code.copies)}"
            f"/{sum(code.loads.values()) + sum(code.copies.values())}",
            f"{_wide(code.stores)}/{sum(code.stores.values())}",
        ]
        for target in TABLE_TARGETS:
            code = kernels[target, kernel]
            warps = -(-threads // 32)
            shared = dynamic + code.shared
            blocks, share = occupancy(TARGETS[target], code.registers, shared, warps)
            row += [str(code.registers), str(blocks), f"{share:.0%}"]
        rows.append(row)
    return markdown_table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Bring the ledger and the tables up to date."""
    parser = argparse.ArgumentParser("compiled_cuda", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="change no file, fail if that is due")
    parser.add_argument("--fresh", action="store_true", help="compile also what the ledger has")
    args = parser.parse_args(argv)
    if common.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled")
    try:
        return _run(check=args.check, fresh=args.fresh)
    except RunError as error:
        print(f"compiled_cuda: {error}", file=sys.stderr)
        return 1


def _run(*, check: bool, fresh: bool) -> int:
    ledger = Ledger.read(LEDGER)
    keys = {
        (f"sm_{architecture}", source.name): cuda_code.key(source, f"sm_{architecture}")
        for architecture in cuda_build.architectures()
        for source in cuda_code.sources()
    }
    reason = cuda_build.missing_reason()
    if reason is not None:
        if not check:
            raise RunError(f"{reason}: install the CUDA toolkit, or take --check")
        print(f"{reason}: nothing is compiled, the ledger is checked as it is")
        return _check_as_it_is(ledger, keys)
    here = {"nvcc": cuda_build.nvcc_version()}
    if check and ledger.versions != here:
        # Another compiler's figures are right for it, and not to be held against these files.
        print(f"{LEDGER.name} was made with {ledger.versions}, and here is {here}")
        return _check_as_it_is(ledger, keys)
    kept = ledger.files if ledger.versions == here else {}
    missing = {
        name: key for name, key in keys.items() if fresh or name not in kept or kept[name][0] != key
    }
    entries: dict[tuple[str, str], tuple[str, dict[str, Code]]] = {}
    try:
        problems = compile_all(missing, entries)
        files = {name: entry for name, entry in (kept | entries).items() if name in keys}
        made = Ledger(here, files, dict(ledger.launched), dict(ledger.passes))
        if not problems:
            record(made)
    except KeyboardInterrupt:
        if not check:
            stopped = Ledger(here, kept | entries, ledger.launched, ledger.passes)
            replace_file(LEDGER, stopped.text().encode())
            print(f"\nstopped; {len(entries)} of {len(missing)} are kept, run it again to go on")
        return 130
    page = "" if problems else table(made)
    problems += _broken(made)
    if check:
        problems += _stale(made, page)
    else:
        replace_file(LEDGER, made.text().encode())
        if page:
            replace_file(TABLE, page.encode())
    return _said(problems, made, f"{len(entries)} files compiled now")


def _check_as_it_is(ledger: Ledger, keys: Mapping[tuple[str, str], str]) -> int:
    """Whether the ledger is of these sources, and keeps the rules, and the tables are of it."""
    problems = [
        f"{LEDGER.name} is not of {source} as it is, for {target}: {_MEND}"
        for (target, source), key in keys.items()
        if ledger.files.get((target, source), ("",))[0] != key
    ]
    page = "" if problems else table(ledger)
    problems += _broken(ledger)
    if page:
        problems += _stale(ledger, page)
    return _said(problems, ledger, "none compiled")


_MEND = "run python -m fastgan.benchmarks.compiled_cuda where there is nvcc"


def _broken(ledger: Ledger) -> list[str]:
    return [
        f"{target} {kernel} {text}"
        for (target, kernel), code in sorted(ledger.kernels().items())
        for text in faults(kernel, code, ledger.launched.get(kernel))
    ]


def _stale(made: Ledger, page: str) -> list[str]:
    """What of the committed files is out of date."""
    wanted: Iterable[tuple[Path, str]] = ((LEDGER, made.text()), (TABLE, page))
    return [
        f"{path.name} is out of date: {_MEND}"
        for path, text in wanted
        if not path.exists() or path.read_text() != text
    ]


def _said(problems: Sequence[str], ledger: Ledger, did: str) -> int:
    for problem in problems:
        print(problem)
    targets = sorted({target for target, _ in ledger.kernels()})
    print(
        f"{len(ledger.kernels())} kernels for {', '.join(targets)}; {did}; {len(problems)} problems"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
