"""Counts how often the lanes of a warp want different words of one bank of shared memory at once.

Of 32 banks each gives one word of 4 bytes to any number of lanes in a wavefront. A warp's access of
up to 4 bytes a lane is one pass, of 8 bytes it is two of 16 lanes, of 16 bytes four of 8 lanes, as
is each matrix that ``ldmatrix`` loads; a pass takes as many wavefronts as the most words that it
wants of one bank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from support.ptx_text import Instruction

BANKS = 32
WORD_BYTES = 4


class SharedAccess(NamedTuple):
    """What all warps of a launch did with one instruction.

    Attributes:
        opcode: with its modifiers.
        line: in the text of the launch, from 1 on.
        in_loop: whether a branch goes back over it.
        accesses: of a warp, with any of its lanes.
        wavefronts: that they took.
        least: that as many accesses of that size would take without conflicts.
    """

    opcode: str
    line: int
    in_loop: bool
    accesses: int
    wavefronts: int
    least: int

    @property
    def conflicts(self) -> int:
        return self.wavefronts - self.least


class ConflictCounter:
    """Of a launch, by the index of the instruction."""

    def __init__(self) -> None:
        self._counts: dict[int, np.ndarray] = {}

    def count(self, index: int, addresses: np.ndarray, active: np.ndarray, size: int) -> None:
        """``addresses`` and ``active`` are ``[warps, lanes]``, and ``size`` is bytes a lane."""
        words = max(size // WORD_BYTES, 1)
        lanes = min(BANKS // words, addresses.shape[1])
        first = addresses.reshape(-1, lanes, 1).astype(np.int64) // WORD_BYTES
        wanted = np.where(active.reshape(-1, lanes, 1), first + np.arange(words), -1)
        most = _most_of_one_bank(wanted.reshape(len(first), -1))
        counts = [active.any(1).sum(), most.sum(), np.count_nonzero(most)]
        self._counts[index] = self._counts.get(index, 0) + np.array(counts)

    def listed(
        self, instructions: Sequence[Instruction], labels: Mapping[str, int]
    ) -> tuple[SharedAccess, ...]:
        """What was executed, in the order of the text."""
        in_loop = _in_loops(instructions, labels)
        return tuple(
            SharedAccess(
                instructions[i].opcode,
                instructions[i].text_line,
                bool(in_loop[i]),
                *counts.tolist(),
            )
            for i, counts in sorted(self._counts.items())
        )


def _most_of_one_bank(words: np.ndarray) -> np.ndarray:
    """By pass, of ``[passes, words]``; negative words are of lanes that are not active."""
    words = np.sort(words, axis=1)
    different = np.diff(words, axis=1, prepend=-1) > 0
    place = np.arange(len(words))[:, None] * BANKS + words % BANKS
    in_bank = np.bincount(place[different], minlength=len(words) * BANKS)
    return in_bank.reshape(-1, BANKS).max(1)


def _in_loops(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> np.ndarray:
    inside = np.zeros(len(instructions), bool)
    for i, instruction in enumerate(instructions):
        if instruction.name in ("bra", "brx") and instruction.operands:
            target = labels[instruction.operands[-1].text]
            inside[target : i + 1] = True
    return inside
