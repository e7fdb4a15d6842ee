"""Measured choices between the ways to compute one thing.

The first time a shape is met, every way is timed on it; the times are kept for this process, and on
disk for the machine, so that the next run takes the same ways and computes the same numbers. A
checkpoint carries those that its run used (:func:`snapshot`), and a resume takes them over
(:func:`adopt`) wherever it runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastgan._version import __version__
from fastgan.files import replace_file
from fastgan.machine import cache_folder, cpu_name
from fastgan.ops import cpp

logger = logging.getLogger("fastgan")

_ROUNDS = 4

# Milliseconds of each way, by problem.
Times = dict[str, dict[str, float]]

_lock = threading.RLock()
_times: Times = {}
_loaded: set[Path] = set()


def fastest(problem: str, ways: dict[str, Callable[[], object]], among: Sequence[str]) -> str:
    """Which of ``among`` was fastest at ``problem``; measures ``ways`` where that is not known.

    Args:
        problem: names the computation, its shapes and the number of threads.
        ways: each computes it, without other effects, by the name of the way.
        among: those to choose from, some of ``ways``.
    """
    if len(among) == 1:
        return among[0]
    with _lock:
        path = _path()
        if path not in _loaded:
            _loaded.add(path)
            for known, times in _read(path).items():
                _times.setdefault(known, times)
        times = _times.get(problem, {})
        if not all(name in times for name in among):
            times = _measure(ways)
            _times[problem] = times
            _write(path, problem, times)
    return min(among, key=times.__getitem__)


def snapshot() -> Times:
    """The choices made or adopted in this process."""
    with _lock:
        return {problem: dict(times) for problem, times in _times.items()}


def adopt(times: Times) -> None:
    """Take over the choices of a :func:`snapshot`, in this process; the disk keeps its own."""
    with _lock:
        _times.update({problem: dict(ways) for problem, ways in times.items()})


def _measure(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    best = dict.fromkeys(ways, float("inf"))
    # The first round warms up; the rest are interleaved, so that a disturbance meets all alike.
    for round_ in range(_ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            elapsed = 1e3 * (time.perf_counter() - started)
            if round_:
                best[name] = min(best[name], elapsed)
    return {name: round(ms, 4) for name, ms in best.items()}


def _path() -> Path:
    isa = cpp.kernels().isa() if not cpp.missing_reasons() else "none"
    machine = f"{cpu_name()} {isa} torch {torch.__version__} fastgan {__version__}"
    return cache_folder() / f"tuning-{hashlib.sha256(machine.encode()).hexdigest()[:12]}.json"


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
