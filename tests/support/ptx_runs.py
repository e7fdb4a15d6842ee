"""How cases that run PTX are run: by name, in processes that do not interpret kernels.

A program of such cases ends in :func:`serve`, and a test has :func:`outcomes` of what it prints.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ORDERS = ("ascending", "descending")

PROCESSES = 2

Edit = Callable[[str], str]
Outcome = dict[str, Any]


def outcomes(program: str, names: Sequence[str], cache: Path) -> dict[str, Outcome]:
    """Of the cases ``names`` of the module ``program``, which a few processes share.

    ``TRITON_INTERPRET`` is taken away from them, and what they compile goes to ``cache``.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    env["TRITON_CACHE_DIR"] = str(cache)

    def run(part: Sequence[str]) -> Iterator[list[Any]]:
        command = [sys.executable, "-m", program, *part]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return map(json.loads, done.stdout.splitlines())

    with ThreadPoolExecutor(PROCESSES) as pool:
        parts = pool.map(run, (names[i::PROCESSES] for i in range(PROCESSES)))
        return {name: outcome for part in parts for name, outcome in part}


def serve(cases: Mapping[str, Callable[[], Outcome]]) -> None:
    """Prints a line of JSON for each case that the command line names."""
    # There are programs that must not import it.
    torch = sys.modules.get("torch")
    if torch:
        torch.set_num_threads(1)
    for name in sys.argv[1:]:
        if torch:
            torch.manual_seed(0)
        try:
            outcome = cases[name]()
        except Exception as error:
            outcome = {"raised": f"{type(error).__name__}: {error}"}
        print(json.dumps([name, outcome]), flush=True)


def without(opcode: str, which: slice = slice(None)) -> Edit:
    """Deletes some instructions of a name from a text."""

    def edit(ptx: str) -> str:
        found = list(re.finditer(rf"^\s*{opcode}\b[^;]*;", ptx, re.M))[which]
        for match in reversed(found):
            ptx = ptx[: match.start()] + ptx[match.end() :]
        return ptx

    return edit


def count(opcode: str, ptx: str) -> int:
    return len(re.findall(rf"\b{re.escape(opcode)}\b", ptx))
