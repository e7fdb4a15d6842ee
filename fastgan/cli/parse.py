"""From a command line to a typed dataclass; a mistake is one line."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from fastgan.errors import InputError

T = TypeVar("T")

OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]

_FRAME = "╭╮╰╯│ "


def parse(cls: type[T], prog: str, argv: list[str], default: T | None = None) -> T:
    """``argv`` as an instance of the dataclass ``cls``; ``-h`` prints the help and exits.

    Args:
        cls: its fields are the flags, their docstrings the help.
        prog: what the command is called in messages.
        argv: the arguments.
        default: takes the place of the fields' defaults.

    Raises:
        InputError: says which argument is wrong.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                cls,
                prog=prog,
                args=argv,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
                default=tyro.MISSING_NONPROP if default is None else default,
            )
    except SystemExit as error:
        if not error.code:
            raise
        raise InputError(f"{_one_line(complaint.getvalue())} (see {prog} -h)") from None


def _one_line(box: str) -> str:
    """What tyro's framed message says, without the frame and the help below it."""
    lines = [line.strip(_FRAME) for line in box.splitlines() if line[:1] not in ("╭", "╰")]
    sections: list[list[str]] = [[]]
    for line in lines:
        if line and not line.strip("─"):
            sections.append([])
        elif line:
            sections[-1].append(line)
    message = " ".join(sections[0])
    if len(sections) > 1 and sections[1] and sections[1][0].startswith("Perhaps you meant"):
        message += f"; perhaps you meant {sections[1][1]}"
    return message
