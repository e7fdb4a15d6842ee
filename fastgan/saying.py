"""What the user is told once."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger("fastgan")

_said: set[str] = set()


def say_once(message: str) -> None:
    """Log ``message`` as a warning, the first time that it comes up in this process."""
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        logger.warning("%s", message)
