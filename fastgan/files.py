"""Files that are whole or not there: written under a temporary name, synced, renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


def write_synced(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        sync_file(file)


def sync_file(file: BinaryIO) -> None:
    """Wait until what was written to the open ``file`` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in ``path`` are on the disk."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, in place of what is there; a failure leaves that as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_synced(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
