"""The command ``fastgan``, one file a command; torch is imported once the arguments are good."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from types import FrameType

from fastgan._version import __version__
from fastgan.errors import InputError, NotBuiltError, RunError

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_COMMANDS = {
    "train": "train a GAN on a folder of images, an archive, an array, or the embedded digits",
    "sample": "make images with a trained generator",
    "eval": "how good a trained generator is: Fréchet distance, precision, recall, copies, ...",
    "augment": "a labelled set of generated images, or what one would be worth to a classifier",
    "dcgan": "the flags, log and files of pytorch/examples/dcgan: replaces 'python main.py'",
    "bench": "images a second of the whole step, against the example's, eager and compiled",
    "doctor": "what this machine can do, and why not the rest",
}

_HELP = f"""usage: fastgan COMMAND [OPTIONS]

A fast, deterministic, resumable GAN trainer.

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in _COMMANDS.items())}

  fastgan train                         trains on the embedded digits, a few minutes on 2 CPU cores
  fastgan train --data photos/ --image-size 64
  fastgan sample runs/digits -n 64 -o grid.png
  fastgan COMMAND -h                    the options of a command

exit codes: 0 done; 1 the run had to stop (a loss that is not finite, a full disk); 2 bad usage or
input; 130 interrupted
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be printable
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _dispatch(arguments)
    except (InputError, NotBuiltError) as error:
        return _complain(error, BAD_INPUT)
    except RunError as error:
        return _complain(error, FAILED)
    except BrokenPipeError:
        # The reader of our output has left; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        named = f"{error.filename!r}: " if error.filename else ""
        return _complain(f"{named}{error.strerror or error}", BAD_INPUT)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        return _complain(f"out of memory; take a smaller model or batch ({reason})", FAILED)
    except KeyboardInterrupt:
        print("fastgan: interrupted", file=sys.stderr)
        return INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return DONE if arguments else BAD_INPUT
    if arguments[0] == "--version":
        print(f"fastgan {__version__}")
        return DONE
    if arguments[0] not in _COMMANDS:
        raise InputError(f"unknown command {arguments[0]!r}; choose from {', '.join(_COMMANDS)}")
    command = importlib.import_module(f"fastgan.cli.{arguments[0]}")
    return int(command.run(arguments[1:]))


def _is_out_of_memory(error: Exception) -> bool:
    # torch has a class for a GPU's memory, and none for the CPU's.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "allocate memory" in str(error)
    )


def _complain(error: Exception | str, code: int) -> int:
    print(f"fastgan: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
