"""What the drivers share that run launched kernels as PTX: of Triton's, and of CUDA's runtime."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from support.ptx import LANES, Kernel, WarpOrder
from support.ptx_conflicts import ConflictCounter, SharedAccess
from support.ptx_memory import Region

# Of one block, by the architecture.
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
GRID_LIMITS = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Launch:
    """What was launched, and what it took."""

    name: str
    grid: tuple[int, int, int]
    warps: int
    shared: int
    # Of all warps together; 0 where it was recorded only.
    instructions: int
    ptx: str = field(repr=False)
    # Threads in x, y, z.
    block: tuple[int, int, int]
    # Structs as bytes, pointers as addresses.
    arguments: tuple[int | float | bytes, ...]
    stream: int = 0
    # What was executed, where it was counted.
    shared_accesses: tuple[SharedAccess, ...] = ()


# To decode a long kernel takes a tenth of a second.
@functools.lru_cache(maxsize=512)
def _decoded(ptx: str) -> Kernel:
    return Kernel(ptx)


class Runner:
    """Runs kernels in one way, and keeps a list of them."""

    def __init__(
        self,
        warp_order: WarpOrder,
        edit_ptx: Callable[[str], str] | None,
        count_conflicts: bool = False,
    ):
        self.launches: list[Launch] = []
        self._warp_order = warp_order
        self._edit_ptx = edit_ptx
        self._count_conflicts = count_conflicts

    def kernel(self, ptx: str) -> tuple[str, Kernel]:
        """The text as it is run, and its only kernel."""
        edited = ptx if self._edit_ptx is None else self._edit_ptx(ptx)
        return edited, _decoded(edited)

    def run(
        self,
        name: str,
        ptx: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[int | float | bytes],
        buffers: Sequence[Region] | None,
        *,
        shared: int,
        stream: int = 0,
    ) -> None:
        """Runs a kernel, or records it only where there are no ``buffers``."""
        edited, kernel = self.kernel(ptx)
        executed = 0
        conflicts = ConflictCounter() if self._count_conflicts else None
        if buffers is not None:
            executed = kernel.launch(
                *(grid, block, arguments, buffers),
                shared=shared,
                warp_order=self._warp_order,
                conflicts=conflicts,
            )
        accesses = conflicts.listed(kernel.instructions, kernel.labels) if conflicts else ()
        warps = -(-block[0] * block[1] * block[2] // LANES)
        self.launches.append(
            Launch(
                *(name, grid, warps, shared, executed, edited, block, tuple(arguments)),
                stream=stream,
                shared_accesses=accesses,
            )
        )
