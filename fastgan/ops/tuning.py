"""Measured choices between the ways to compute one thing.

The first time a shape is met, every way is timed on it; the times are kept for this process, and on
disk for the machine or its GPU, so that the next run takes the same ways and computes the same
numbers. An engine keeps those that it met for itself (:func:`use_choices`): its checkpoints carry
them, and a resume takes the same ways whatever the machine measures then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

import torch

from fastgan._version import __version__
from fastgan.files import replace_file
from fastgan.machine import cache_folder, cpu_name
from fastgan.ops import cpp, triton

logger = logging.getLogger("fastgan")

_ROUNDS = 3
# A turn of a way is as many calls as take this long, and at least one.
_TURN_SECONDS = 1e-3

_GPU_TURN_MS = 20
_GPU_CALLS = 50
_CPU = torch.device("cpu")

# Milliseconds of each way, by problem.
Times = dict[str, dict[str, float]]

_choices: ContextVar[Times | None] = ContextVar("fastgan_choices", default=None)

_lock = threading.RLock()
# What each file holds that has been read.
_times: dict[Path, Times] = {}


def fastest(
    problem: str,
    ways: dict[str, Callable[[], object]],
    among: Sequence[str],
    device: torch.device = _CPU,
) -> str:
    """Which of ``among`` was fastest at ``problem``; measures ``ways`` where that is not known.

    Args:
        problem: names the computation, its shapes and the number of threads.
        ways: each computes it, without other effects, by the name of the way.
        among: those to choose from, some of ``ways``.
        device: where they compute. While a CUDA graph is being captured there, nothing is measured:
            a problem that is not known takes the first of ``among``.
    """
    if len(among) == 1:
        return among[0]
    own = _choices.get()
    times = own.get(problem, {}) if own is not None else {}
    if not all(name in times for name in among):
        times = _lookup(problem, ways, among, device)
        if not times:
            return among[0]
        if own is not None:
            own[problem] = times
    return min(among, key=times.__getitem__)


@contextlib.contextmanager
def use_choices(choices: Times) -> Iterator[None]:
    """Within this context choices are taken from ``choices`` first, and those made added to it."""
    token = _choices.set(choices)
    try:
        yield
    finally:
        _choices.reset(token)


def tuning_file(device: torch.device = _CPU) -> Path:
    """Where times are kept: a JSON file by CPU and instruction set, or by GPU, and by versions."""
    if device.type == "cuda":
        found = "none" if triton.missing_reasons() else triton.version()
        machine = f"{torch.cuda.get_device_name(device)} triton {found}"
    else:
        machine = f"{cpu_name()} {cpp.kernels().isa() if not cpp.missing_reasons() else 'none'}"
    machine += f" torch {torch.__version__} fastgan {__version__}"
    return cache_folder() / f"tuning-{hashlib.sha256(machine.encode()).hexdigest()[:12]}.json"


def _lookup(
    problem: str,
    ways: dict[str, Callable[[], object]],
    among: Sequence[str],
    device: torch.device,
) -> dict[str, float]:
    with _lock:
        path = tuning_file(device)
        if path not in _times:
            _times[path] = _read(path)
        known = _times[path]
        times = known.get(problem, {})
        if not all(name in times for name in among):
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return {}
            times = known[problem] = _measure(ways, device)
            _write(path, problem, times)
        return times


def _measure(ways: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    turn = _gpu_turn if device.type == "cuda" else _cpu_turn
    best = dict.fromkeys(ways, float("inf"))
    names = list(ways)
    # The first round warms up. In the others each way begins once, so that a disturbance, and the
    # cache as another way left it, meet all alike.
    for round_ in range(_ROUNDS + 1):
        for name in names:
            elapsed = turn(ways[name])
            if round_:
                best[name] = min(best[name], elapsed)
        names.append(names.pop(0))
    return {name: round(ms, 5) for name, ms in best.items()}


def _cpu_turn(way: Callable[[], object]) -> float:
    calls, started = 0, time.perf_counter()
    while not calls or time.perf_counter() - started < _TURN_SECONDS:
        way()
        calls += 1
    return 1e3 * (time.perf_counter() - started) / calls


def _gpu_turn(way: Callable[[], object]) -> float:
    """By replays of a captured graph: a launch from Python takes longer than a small kernel."""
    if triton.missing_reasons():
        return _launched_turn(way)
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(way, rep=_GPU_TURN_MS, return_mode="median"))


def _launched_turn(way: Callable[[], object]) -> float:
    """By events around as many calls as hide their launches behind one another, without triton."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    way()
    start.record()
    for _ in range(_GPU_CALLS):
        way()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _GPU_CALLS


def _read(path: Path) -> Times:
    try:
        times = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(problem): {str(name): float(ms) for name, ms in ways.items()}
            for problem, ways in times.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        logger.warning("%s: cannot be read (%s); measuring again", path, error)
        return {}


def _write(path: Path, problem: str, times: dict[str, float]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may have added to it.
        merged = {**_read(path), problem: times}
        replace_file(path, json.dumps(merged, indent=0, sort_keys=True).encode())
    except OSError as error:
        logger.warning("%s: cannot be written (%s); the next run measures again", path, error)
