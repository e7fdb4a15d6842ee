"""Which implementation runs an op.

Only ``reference`` (plain torch, any device) is built in this version; the names of the others are
known so that asking for one is answered with the reason and not with "unknown".
"""

from __future__ import annotations

import os
from typing import get_args

from fastgan.choices import Backend
from fastgan.errors import InputError, NotBuiltError

BACKENDS: tuple[str, ...] = tuple(name for name in get_args(Backend) if name != "auto")

_NOT_BUILT = {
    "cpp": "the C++ CPU kernels are not part of this version",
    "triton": "the Triton kernels are not part of this version",
    "cuda": "the CUDA C++ kernels are not part of this version",
}


def unsupported_reasons(backend: str) -> list[str]:
    """Why ``backend`` cannot run here; an empty list means that it can.

    Raises:
        InputError: ``backend`` is not one of ``BACKENDS``.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend: unknown {backend!r}; choose auto, {', '.join(BACKENDS)}")
    return [_NOT_BUILT[backend]] if backend in _NOT_BUILT else []


def resolve_backend(requested: str = "auto") -> str:
    """The backend to use for ``requested``; ``auto`` takes the first that runs here.

    ``auto`` yields to the environment variable ``FASTGAN_BACKEND`` where that is set.

    Raises:
        InputError: the name is unknown.
        NotBuiltError: a backend was named that cannot run here; the message says why.
    """
    if requested == "auto":
        requested = os.environ.get("FASTGAN_BACKEND") or "auto"
    if requested == "auto":
        return next(name for name in BACKENDS if not unsupported_reasons(name))
    reasons = unsupported_reasons(requested)
    if reasons:
        raise NotBuiltError(f"backend={requested!r}: {'; '.join(reasons)}; use 'reference'")
    return requested
