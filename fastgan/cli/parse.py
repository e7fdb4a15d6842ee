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


def check_folder_of(flag: str, path: Path) -> None:
    """Refuse a file to write whose folder is not there.

    Raises:
        InputError: names the flag, the file and the folder.
    """
    if not path.absolute().parent.is_dir():
        raise InputError(f"{flag} {str(path)!r}: the folder {str(path.parent)!r} does not exist")


def _one_line(message: str) -> str:
    """What tyro's message says, without its title, its frame and the help below it.

    Where the terminal cannot show a frame, the title has a line and a rule of its own.
    """
    framed = message.startswith("╭")
    sections: list[list[str]] = [[]]
    for line in message.splitlines():
        text = line.strip(_FRAME)
        if line[:1] in ("╭", "╰") or not text:
            continue
        if not text.strip("─-"):
            sections.append([])
        else:
            sections[-1].append(text)
    said, *rest = sections if framed else sections[1:]
    hint = rest[0] if rest and rest[0][0].startswith("Perhaps you meant") else []
    return " ".join(said) + (f"; perhaps you meant {hint[1]}" if hint else "")
