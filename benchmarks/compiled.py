"""Compile every kernel that training can launch, for GPUs that are not here, and read the code.

``python -m fastgan.benchmarks.compiled`` brings ``compiled.json`` and ``compiled.md`` beside this
file up to date: the ledger has a line for each kernel in each of its specialisations, found by a
hash of its source and of what it was specialised on, and the table shows those of DCGAN at 64x64.
Only what the ledger lacks is compiled. ``--check`` changes no file, and fails where the ledger or
the table is out of date, or a kernel breaks one of the rules in :func:`faults`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from fastgan.benchmarks import compiled_launches
from fastgan.benchmarks.compile_driver import (
    TARGETS,
    Compiled,
    Specialisation,
    Target,
    compile_kernel,
    occupancy,
)
from fastgan.benchmarks.compiled_launches import Use
from fastgan.benchmarks.report import markdown_row
from fastgan.kernels import common
from tqdm import tqdm

from fastgan.errors import RunError
from fastgan.files import replace_file

LEDGER = Path(__file__).with_name("compiled.json")
TABLE = Path(__file__).with_name("compiled.md")
TABLE_TARGETS = ("sm_80", "sm_90")

_WORKERS = 2
_MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
# Rows of the smallest tile that wgmma and tcgen05 can take; smaller ones are left to mma.
_LEAST_ROWS = 64
# Arguments that are tensors of images or weights, whose channels are next to each other.
_IMAGES = frozenset(f"{name}_ptr" for name in ("x", "y", "dy", "dx", "low", "high", "weight"))


@dataclasses.dataclass
class Ledger:
    """What was found of each specialisation, by its key.

    Attributes:
        versions: of what made it.
        kernels: target, kernel and code of each.
    """

    versions: dict[str, str]
    kernels: dict[str, tuple[str, str, Compiled]]

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """From a file; empty where there is none.

        Raises:
            RunError: the file is not a ledger.
        """
        if not path.exists():
            return cls(versions(), {})
        try:
            record = json.loads(path.read_text())
            kernels = {key: _from_row(row) for key, row in record["kernels"].items()}
            return cls(dict(record["versions"]), kernels)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is not a ledger ({error}): delete it to make it anew") from None

    def text(self) -> str:
        """The file: sorted, a line for each specialisation."""
        rows = sorted(self.kernels.items(), key=lambda item: (item[1][0], item[1][1], item[0]))
        lines = [f"  {json.dumps(key)}: {json.dumps(_to_row(*entry))}" for key, entry in rows]
        head = [
            f' "versions": {json.dumps(self.versions)},',
            f' "columns": {json.dumps(_COLUMNS)},',
        ]
        return "\n".join(["{", *head, ' "kernels": {', ",\n".join(lines), " }", "}", ""])


_COLUMNS = ["target", "kernel", *(field.name for field in dataclasses.fields(Compiled))]


def _to_row(target: str, kernel: str, compiled: Compiled) -> list[Any]:
    return [target, kernel, *dataclasses.astuple(compiled)]


def _from_row(row: Sequence[Any]) -> tuple[str, str, Compiled]:
    target, kernel, *values = row
    *head, loads, stores, copies = values
    by_bytes = ({int(size): n for size, n in counts.items()} for counts in (loads, stores, copies))
    return target, kernel, Compiled(*head, *by_bytes)


def versions() -> dict[str, str]:
    """Of what decides the machine code, given the source."""
    return {"triton": importlib.metadata.version("triton")}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What has to be compiled.

    Attributes:
        uses: one use of each specialisation, by key.
        table: key and use of each launch that the table shows, in order.
    """

    uses: dict[str, Use]
    table: list[tuple[str, Use]]


def plan_of(target: str) -> Plan:
    """Everything that can be launched on ``target``."""
    plan, shown = Plan({}, []), set()
    for use in compiled_launches.uses(TARGETS[target]):
        key = use.launch.specialisation.key()
        plan.uses.setdefault(key, use)
        row = key, use.what, use.launch.grid
        if use.tabled and target in TABLE_TARGETS and row not in shown:
            shown.add(row)
            plan.table.append((key, use))
    return plan


def faults(use: Use, compiled: Compiled) -> list[str]:
    """Which rules a kernel breaks.

    It spills no registers; its shared memory is within the target's limit; where it multiplies
    matrices it does so by the target's own instruction; and where the channels of all its images
    are a multiple of 16 bytes it reads 16 bytes at a time. TF32 matrix products that sum across
    rows of memory are excepted from the last: the instructions take such operands only transposed.
    """
    specialisation = use.launch.specialisation
    target = TARGETS[specialisation.target]
    constants = specialisation.constants()
    broken = []
    if compiled.stack or compiled.spills:
        broken.append(
            f"spills registers: {compiled.stack} bytes of stack a thread, {compiled.spills} "
            "instructions"
        )
    if compiled.shared > target.shared:
        broken.append(f"takes {compiled.shared} bytes of shared memory of {target.shared}")
    product = specialisation.multiplies_matrices()
    if product:
        wanted = {_MATRIX[target.name]}
        if constants.get("BM", _LEAST_ROWS) < _LEAST_ROWS and target.gpu.backend == "cuda":
            wanted.add("mma")
        if not wanted & compiled.matrix.keys():
            broken.append(f"has no {' or '.join(sorted(wanted))} instruction")
    if _aligned(use) and not (product and _sums_across_rows_in_fp32(specialisation)):
        if not any(size >= 16 or not size for size in (*compiled.loads, *compiled.copies)):
            broken.append("reads no 16 bytes at a time")
        elif product:
            narrow = sum(n for size, n in compiled.copies.items() if 0 < size < 16)
            # The bias is read by channel, as the threads come to lie.
            if constants.get("bias_ptr", "given") is None or "bias_ptr" not in (
                specialisation.signature
            ):
                narrow += sum(n for size, n in compiled.loads.items() if size < 16)
            if narrow:
                broken.append(f"has {narrow} loads of less than 16 bytes")
    return broken


def _aligned(use: Use) -> bool:
    """Whether the channels of all images are a multiple of 16 bytes."""
    widths = [
        shape[1] * size
        for name, (shape, size) in use.launch.tensors.items()
        if name in _IMAGES and len(shape) == 4
    ]
    return bool(widths) and all(width % 16 == 0 for width in widths)


def _sums_across_rows_in_fp32(specialisation: Specialisation) -> bool:
    across = specialisation.name in ("_conv_dgrad_kernel", "_conv_wgrad_kernel")
    return across and specialisation.signature["low_ptr"] == "*fp32"


def compile_all(
    missing: Mapping[str, Use], pool: Executor, entries: dict[str, tuple[str, str, Compiled]]
) -> list[str]:
    """Put those of ``missing`` into ``entries`` as they are done; what the compiler refused."""
    refused = []
    running = {
        pool.submit(_compile, key, use.launch.specialisation): key for key, use in missing.items()
    }
    for future in tqdm(
        as_completed(running), total=len(running), unit="kernel", disable=None, leave=False
    ):
        key = running[future]
        use = missing[key]
        try:
            compiled = future.result()
        except RunError as error:
            refused.append(f"{_name(use)}: {error}")
            continue
        specialisation = use.launch.specialisation
        entries[key] = (specialisation.target, specialisation.name, compiled)
    return refused


def _compile(key: str, specialisation: Specialisation) -> Compiled:
    if specialisation.key() != key:
        raise RunError("its source was changed meanwhile; try again")
    return compile_kernel(specialisation)


def _name(use: Use) -> str:
    s = use.launch.specialisation
    dtypes = [kind[1:] for kind in s.signature.values() if str(kind).startswith("*")]
    tile = f", {use.tile}" if use.tile else ""
    return f"{s.target} {s.name} ({dtypes[0] if dtypes else ''}{tile}; {use.what})"


@contextlib.contextmanager
def workers() -> Iterator[Executor]:
    """Processes that compile; what Triton caches goes when they go."""
    # Forked processes would have torch's threads without their locks.
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(_WORKERS, context, _cache_in, (folder,)) as pool,
    ):
        yield pool


def _cache_in(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def table(plans: Iterable[Plan], ledger: Ledger) -> str:
    """``compiled.md``."""
    rows = collections.defaultdict(list)
    for plan in plans:
        for key, use in plan.table:
            name = use.launch.specialisation.target
            rows[name].append(_row(TARGETS[name], use, ledger.kernels[key][2]))
    lines = [
        "# What the Triton kernels compile to",
        "",
        f"Made by `python -m fastgan.benchmarks.compiled` with triton "
        f"{ledger.versions['triton']}. **Computed, not measured: no GPU has run any of it.** "
        f"DCGAN at 64x64, batch {compiled_launches.TABLE_BATCH}, bf16. Layers are low-resolution "
        "channels-high-resolution channels@low side; the discriminator sees real and generated "
        "images in one pass of two parts.",
        "",
        "Registers of a thread, KiB of shared memory of a block, bytes of stack of a thread "
        "(spilled registers), blocks that fit a multiprocessor and the share of its warps that "
        "they are; MB is every tensor of the launch once, and `at least` the time by the larger "
        "of these and the FLOP over the device's rates.",
    ]
    for name in TABLE_TARGETS:
        target = TARGETS[name]
        lines += [
            "",
            f"## {name}: {target.device}, {target.flop_s / 1e12:.0f} TFLOP/s, "
            f"{target.bytes_s / 1e12:.2f} TB/s",
            "",
            "| launch | kernel | tile | registers | shared | stack | blocks | warps | MB | GFLOP "
            "| at least |",
            "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
            *rows[name],
        ]
    return "\n".join([*lines, ""])


def _row(target: Target, use: Use, compiled: Compiled) -> str:
    launch = use.launch
    warps = launch.specialisation.options.get("num_warps", 4)
    blocks, share = occupancy(target, compiled.registers, compiled.shared, warps)
    microseconds = 1e6 * max(use.flop / target.flop_s, launch.nbytes / target.bytes_s)
    cells = (
        use.what,
        f"`{launch.specialisation.name.strip('_').removesuffix('_kernel')}`",
        use.tile,
        str(compiled.registers),
        f"{compiled.shared / 1024:.0f}",
        str(compiled.stack),
        str(blocks),
        f"{share:.0%}",
        f"{launch.nbytes / 1e6:.1f}",
        f"{use.flop / 1e9:.1f}" if use.flop else "",
        f"{microseconds:.1f} µs",
    )
    return markdown_row(cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Bring the ledger and the table up to date."""
    parser = argparse.ArgumentParser("compiled", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="change no file, fail if that is due")
    parser.add_argument(
        "--target", action="append", choices=tuple(TARGETS), help="only this one; may be repeated"
    )
    parser.add_argument("--fresh", action="store_true", help="compile also what the ledger has")
    args = parser.parse_args(argv)
    if common.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled")
    targets = [name for name in TARGETS if not args.target or name in args.target]
    try:
        return _run(targets, check=args.check, fresh=args.fresh)
    except RunError as error:
        print(f"compiled: {error}", file=sys.stderr)
        return 1


def _run(targets: Sequence[str], *, check: bool, fresh: bool) -> int:
    ledger = Ledger.read(LEDGER)
    other = ledger.versions != versions()
    if other and not check:
        # Lines of different compilers would not compare.
        ledger = Ledger(versions(), {})
    with workers() as pool:
        plans = dict(zip(targets, pool.map(plan_of, targets), strict=True))
        uses = {key: use for plan in plans.values() for key, use in plan.uses.items()}
        missing = {key: use for key, use in uses.items() if fresh or key not in ledger.kernels}
        entries: dict[str, tuple[str, str, Compiled]] = {}
        try:
            problems = compile_all(missing, pool, entries)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            if not check:
                kept = Ledger(ledger.versions, ledger.kernels | entries)
                replace_file(LEDGER, kept.text().encode())
                print(
                    f"\nstopped; {len(entries)} of {len(missing)} are kept, run it again to go on"
                )
            return 130
    unused = {
        key
        for key, (target, _, _) in ledger.kernels.items()
        if target in targets and key not in uses
    }
    kernels = {key: entry for key, entry in ledger.kernels.items() if key not in unused} | entries
    for key, use in uses.items():
        if key in kernels:
            problems += [f"{_name(use)} {text}" for text in faults(use, kernels[key][2])]
    made = Ledger(ledger.versions, kernels)
    complete = set(TABLE_TARGETS) <= set(targets) and not uses.keys() - kernels.keys()
    page = table(plans.values(), made) if complete else None
    if check:
        problems += _stale(made, page, other)
    else:
        replace_file(LEDGER, made.text().encode())
        if page is not None:
            replace_file(TABLE, page.encode())
    for problem in problems:
        print(problem)
    print(
        f"{len(uses)} kernels for {', '.join(targets)}; {len(entries)} compiled now, "
        f"{len(unused)} no longer used; {len(problems)} problems"
    )
    return 1 if problems else 0


def _stale(made: Ledger, page: str | None, other: bool) -> list[str]:
    """What of the committed files is out of date."""
    if other:
        # Another compiler's figures are right for it, and not to be held against these files.
        print(f"{LEDGER.name} was made with {made.versions}, and here is {versions()}")
        return []
    mend = "run python -m fastgan.benchmarks.compiled"
    problems = []
    if not LEDGER.exists() or LEDGER.read_text() != made.text():
        problems.append(f"{LEDGER.name} is out of date: {mend}")
    if page is not None and (not TABLE.exists() or TABLE.read_text() != page):
        problems.append(f"{TABLE.name} is out of date: {mend}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
