"""What this machine is called, and where fastgan keeps what it finds out on it."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path


def cache_folder() -> Path:
    """Where decoded images and measured choices are kept: ``$FASTGAN_CACHE`` or a default."""
    override = os.environ.get("FASTGAN_CACHE")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgan"


@functools.cache  # asked for by each op that is measured
def cpu_name() -> str:
    """The CPU's model name, as far as the system says."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
