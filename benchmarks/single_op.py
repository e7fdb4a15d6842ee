"""What the benchmarks of single ops share: the check, the turns, the memory.

A benchmark has cases, for each the ways to compute it, and ``setup(case, way)``, which makes a
:data:`Run` of them. One and the same run is checked against float64, timed, and watched for the
memory that it takes; a run that fails the check is neither timed nor watched.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastgan.benchmarks.machine import no_collection
from torch import Tensor

from fastgan.errors import RunError
from fastgan.ops import cpp

# Computes the case once, and returns fresh tensors: the result, then the gradients if there are
# any.
Run = Callable[[], Sequence[Tensor]]

# By norm, relative to float64. Winograd's own rounding is about 2e-6.
LIMIT = 1e-5
# Rounding moves an activation in a million across its kink, which changes a gradient by the root of
# that.
GRADIENT_LIMIT = 1e-2

# Seconds that a turn takes at least: short calls are timed several at a time.
_TURN_S = 2e-3
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Figures(NamedTuple):
    """What was found of one way.

    Attributes:
        error: the largest difference from float64, as a fraction of its limit.
        ms: median over the rounds; None where ``error`` is over 1.
        peak_bytes: see :func:`peak_bytes`.
    """

    error: float
    ms: float | None = None
    peak_bytes: int | None = None


def compare(runs: Mapping[str, Run], truth: Sequence[Tensor], rounds: int) -> dict[str, Figures]:
    """Check every way, then let the right ones take turns, A B C A B C, then watch their memory."""
    errors = {way: error(run, truth) for way, run in runs.items()}
    right = {way: run for way, run in runs.items() if errors[way] <= 1.0}
    ms = _median_ms(right, rounds)
    return {
        way: Figures(errors[way], ms[way], peak_bytes(run))
        if way in right
        else Figures(errors[way])
        for way, run in runs.items()
    }


def error(run: Run, truth: Sequence[Tensor]) -> float:
    """The largest difference of what ``run`` returns from ``truth``, as a fraction of its limit."""
    # A kernel that writes nothing would find the right result where another way has left it: the
    # pool hands the same memory out again.
    for result in run():
        result.fill_(torch.nan)
    limits = (LIMIT, *[GRADIENT_LIMIT] * (len(truth) - 1))
    of_limit = [
        (result.double() - true).norm() / true.norm() / limit
        for result, true, limit in zip(run(), truth, limits, strict=True)
    ]
    return torch.stack(of_limit).max().item()  # which passes on a NaN, as Python's max does not


def peak_bytes(run: Run) -> int | None:
    """By how much the resident memory of the process grows at the peak of ``run``.

    That is all that the call takes beyond its arguments: results, what is saved for the backward
    pass, and the scratch of torch, of oneDNN and of the C++ kernels alike, which no allocator's own
    count has together. What is idle in the pools is given back before. None where the system does
    not tell (Linux does).
    """
    if not _CLEAR_REFS.exists():
        return None
    run()  # what is made once and kept: code, threads, oneDNN's primitives
    gc.collect()
    if not cpp.missing_reasons():
        cpp.kernels().trim()
    with contextlib.suppress(AttributeError, OSError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")  # lets the peak begin anew
    before = _status_bytes("VmRSS")
    results = run()
    peak = _status_bytes("VmHWM")
    del results
    return peak - before


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def _median_ms(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    calls = {way: max(1, round(_TURN_S / _seconds(run, 1))) for way, run in runs.items()}
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    with no_collection():
        for _ in range(rounds):
            for way, run in runs.items():
                seconds[way].append(_seconds(run, calls[way]))
    return {way: 1e3 * statistics.median(taken) for way, taken in seconds.items()}


def _seconds(run: Run, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls


def parametrize(metafunc: Any, cases: Iterable[Any], ways: Callable[[Any], Iterable[str]]) -> None:
    """For ``pytest_generate_tests``: every way of every case."""
    both = [(case, way) for case in cases for way in ways(case)]
    ids = [f"{case}, {way}" for case, way in both]
    metafunc.parametrize(("case", "way"), both, ids=ids)


def speed(benchmark: Any, case: Any, run: Run, truth: Sequence[Tensor]) -> None:
    """The speed benchmark, by the fixture of pytest-benchmark."""
    _require_right(run, truth)
    benchmark.group = str(case)
    benchmark(run)


def memory(benchmark: Any, case: Any, run: Run, truth: Sequence[Tensor]) -> None:
    """The memory benchmark: :func:`peak_bytes` in the name and in the JSON."""
    _require_right(run, truth)
    peak = peak_bytes(run)
    benchmark.group = f"{case}, memory"
    benchmark.extra_info["peak_bytes"] = peak
    benchmark.name += ": not known here" if peak is None else f": {peak / 2**20:.1f} MiB"
    # pytest-benchmark wants a time from each of its tests.
    benchmark.pedantic(run)


def _require_right(run: Run, truth: Sequence[Tensor]) -> None:
    of_limit = error(run, truth)
    if not of_limit <= 1.0:
        raise RunError(f"differs from float64 by {of_limit:.1e} times what is allowed: no figure")
