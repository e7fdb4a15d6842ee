"""Executes PTX on the CPU, so that what a compiler really emitted can be tested without a GPU.

It is stricter than a GPU where a GPU would be wrong in silence. Registers and shared memory start
poisoned, what ``cp.async`` copies is poison until its group is waited for, every access must be
aligned and lie within the buffers given, and all warps must meet at each barrier. From one barrier
to the next the warps of a block run one after the other, in an order that the caller chooses: where
a barrier is missing, some order reads what is not there yet.

Blocks are independent, so the same warp of many blocks runs in lock-step, as one :class:`Crew`:
NumPy then works on many rows of 32 lanes at a time. A crew parts where its blocks take different
branches, and they join again at the next barrier.

What it cannot show: the memory model (accesses take effect at once and in order), anything that
depends on time, and the instructions of sm_90 and later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from support.ptx_conflicts import ConflictCounter
from support.ptx_instructions import Step, decode
from support.ptx_memory import (
    POISON,
    PRED,
    U8,
    U16,
    U32,
    U64,
    Banks,
    GlobalMemory,
    PtxError,
    Region,
)
from support.ptx_text import TYPES, UNSIGNED, Parameter, Registers, parse

WarpOrder = Literal["ascending", "descending"]

LANES = 32
# So many blocks run in lock-step; more save no time.
BLOCKS_AT_ONCE = 64
# A crew that runs longer, and on, will not end: it waits for what another would have to do.
MOST_STEPS = 2_000_000


class Kernel:
    """One kernel of a PTX text, ready to run."""

    def __init__(self, source: str, name: str | None = None):
        text = parse(source, name)
        self.name = text.name
        self.parameters = text.parameters
        self.threads = text.threads
        self.most_threads = text.most_threads
        self.storages = text.storages
        self.special = text.special
        self.constants = text.constants
        self.static_shared = text.static_shared
        self.local = text.local
        self.labels = text.labels
        self.instructions = text.instructions
        self.steps: list[Step] = [decode(i, text.labels) for i in text.instructions]
        self.end = len(self.steps)
        self.steps.append(lambda crew: crew.stop(EXITED))
        self._poison = [
            np.full(s.itemsize, POISON, U8).view(s) if s is not PRED else np.array([True])
            for s in text.storages
        ]

    def poisoned_registers(self) -> Registers:
        return list(self._poison)

    def launch(
        self,
        grid: tuple[int, int, int],
        block: int | tuple[int, int, int],
        arguments: Sequence[int | float | bytes],
        buffers: Sequence[Region],
        *,
        shared: int = 0,
        warp_order: WarpOrder = "ascending",
        conflicts: ConflictCounter | None = None,
    ) -> int:
        """Runs all blocks; returns how many instructions their warps executed.

        Args:
            grid: blocks in x, y, z.
            block: its threads in x, y, z or all in x, whole warps of them.
            arguments: a number for each parameter, or its bytes; a pointer is the address.
            buffers: the only global memory there is.
            shared: bytes of dynamic shared memory.
            warp_order: of the warps of a block, between two barriers.
            conflicts: counts the accesses to shared memory.
        """
        block = (block, 1, 1) if isinstance(block, int) else block
        threads = math.prod(block)
        if threads % LANES or not 0 < threads <= 1024 or self.threads not in (None, threads):
            raise PtxError(f"{threads} threads in a block; {self.threads} are required")
        if threads > self.most_threads:
            raise PtxError(f"{threads} threads in a block; {self.most_threads} are the most")
        if len(arguments) != len(self.parameters):
            raise PtxError(f"{len(arguments)} arguments for {len(self.parameters)} parameters")
        if warp_order not in ("ascending", "descending"):
            raise ValueError(f"no order of warps: {warp_order!r}")
        parameters = GlobalMemory([Region(0, _packed(self.parameters, arguments))])
        memory = GlobalMemory([*buffers, *self.constants])
        blocks = np.arange(grid[0] * grid[1] * grid[2])
        steps = 0
        with np.errstate(all="ignore"):
            for first in range(0, blocks.size, BLOCKS_AT_ONCE):
                some = blocks[first : first + BLOCKS_AT_ONCE]
                gang = _Gang(self, grid, some, block, parameters, memory, shared, conflicts)
                steps += gang.run(warp_order)
        return steps


def _packed(
    parameters: Sequence[Parameter], arguments: Sequence[int | float | bytes]
) -> np.ndarray:
    """The bytes of all arguments, as they lie in the memory of parameters."""
    data = np.zeros(max((p.start + p.size for p in parameters), default=0), U8)
    for (name, type_name, start, size), argument in zip(parameters, arguments, strict=True):
        dtype = TYPES[type_name]
        if isinstance(argument, bytes):
            packed = argument
        elif dtype.kind == "f":
            packed = np.array(argument, dtype).tobytes()
        else:
            bits = int(argument) & ((1 << 8 * dtype.itemsize) - 1)
            packed = np.array(bits, UNSIGNED[dtype.itemsize]).tobytes()
        if len(packed) != size:
            raise PtxError(f"{len(packed)} bytes for the {size} of parameter {name}")
        data[start : start + size] = np.frombuffer(packed, U8)
    return data


# How a crew stops, if not at a barrier: those have numbers from 0 on.
EXITED = -1
PARTED = -2


class _Gang:
    """Some blocks of a launch, with all their warps and their shared memory."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        blocks: np.ndarray,
        block: tuple[int, int, int],
        parameters: GlobalMemory,
        memory: GlobalMemory,
        shared: int,
        conflicts: ConflictCounter | None,
    ):
        self.conflicts = conflicts
        self.kernel = kernel
        self.grid = grid
        self.blocks = blocks
        self.block = block
        self.threads = threads = math.prod(block)
        self.spaces = {
            "param": parameters,
            "global": memory,
            "shared": Banks(blocks.size, kernel.static_shared + shared),
            "local": Banks(blocks.size * threads, kernel.local),
        }
        self.steps = 0
        rows = np.arange(blocks.size)
        self.crews = [
            [Crew(self, warp, rows, kernel.poisoned_registers(), pc=0)]
            for warp in range(threads // LANES)
        ]

    def run(self, warp_order: WarpOrder) -> int:
        """Runs from barrier to barrier until all blocks end; returns the instructions executed."""
        order = list(range(len(self.crews)))
        if warp_order == "descending":
            order.reverse()
        while any(self.crews):
            arrivals = np.full((len(order), self.blocks.size), EXITED)
            for warp in order:
                # The crews that one parts into are appended, and run in turn.
                for crew in self.crews[warp]:
                    crew.run()
                    arrivals[warp, crew.rows] = crew.stopped
            self._check_met(arrivals)
            self.crews = [
                _joined([crew for crew in crews if crew.stopped >= 0]) for crews in self.crews
            ]
        return self.steps

    def _check_met(self, arrivals: np.ndarray) -> None:
        apart = (arrivals != arrivals[0]).any(0)
        if apart.any():
            block = int(apart.argmax())
            where = [
                "ended" if a == EXITED else f"at barrier {a}" for a in arrivals[:, block].tolist()
            ]
            raise PtxError(
                f"barrier divergence in block {self.blocks[block]} of {self.kernel.name}: "
                f"the warps are {', '.join(where)}"
            )


class _Copy:
    """What a ``cp.async`` has read and not written yet."""

    def __init__(self, places: np.ndarray, values: np.ndarray):
        self.places = places
        self.values = values

    def of(self, rows: np.ndarray, stride: int) -> _Copy:
        """The part that goes to the shared memory of those blocks."""
        chosen = np.isin(self.places // U64.type(stride), rows)
        return _Copy(self.places[chosen], self.values[:, chosen])


class Crew:
    """The same warp of several blocks, in lock-step: a row of 32 lanes for each block."""

    def __init__(self, gang: _Gang, warp: int, rows: np.ndarray, registers: Registers, pc: int):
        self.gang = gang
        self.kernel = gang.kernel
        self.warp = warp
        # The blocks, by their position in the gang.
        self.rows = rows
        self.size = rows.size * LANES
        self.registers = registers
        self.pc = pc
        # The instruction that is executed.
        self.at = pc
        # Where each lane is while they are apart; only a crew of one block lets them part.
        self.pcs: np.ndarray | None = None
        # The lanes that take part in an instruction; None means all.
        self.mask: np.ndarray | None = None
        self.stopped: int | None = None
        # Committed groups of asynchronous copies, and the copies of the next one.
        self.groups: list[list[_Copy]] = []
        self.copies: list[_Copy] = []
        # Of the last sum that left one.
        self.carry = np.zeros(1, U64)
        self.steps = 0
        lane = np.tile(np.arange(LANES), rows.size)
        row = rows.repeat(LANES)
        self._set_special(lane, row)
        self._owners = {
            **dict.fromkeys(("param", "global"), np.zeros_like(row)),
            "shared": row.astype(U64),
            "local": (row * gang.threads + warp * LANES + lane).astype(U64),
        }

    def _set_special(self, lane: np.ndarray, row: np.ndarray) -> None:
        values = {"%laneid": lane, "%warpid": np.array([self.warp])}
        thread, block = self.warp * LANES + lane, self.gang.blocks[row]
        for of, index, sizes in (
            ("tid", thread, self.gang.block),
            ("ctaid", block, self.gang.grid),
        ):
            for axis, size in zip("xyz", sizes, strict=True):
                # One value for all lanes costs less than one for each.
                values[f"%{of}.{axis}"] = index % size if size > 1 else np.array([0])
                values[f"%n{of}.{axis}"] = np.array([size])
                index = index // size
        for name, slot in self.kernel.special.items():
            self.registers[slot] = values[name].astype(U32)

    def run(self) -> None:
        """Executes until the next barrier or the end."""
        self.stopped = None
        kernel = self.kernel
        steps = kernel.steps
        before = self.steps
        try:
            while self.stopped is None:
                if self.pcs is None:
                    self.at = pc = self.pc
                    self.pc = pc + 1
                else:
                    self.at = pc = self._behind()
                steps[pc](self)
                self.steps += 1
        except PtxError as error:
            instruction = kernel.instructions[self.at]
            blocks = self.gang.blocks[self.rows].tolist()
            raise PtxError(
                f"{error}\n  in: {instruction.text}\n  from source line {instruction.line} of "
                f"{kernel.name}, warp {self.warp}, one of the blocks {blocks}"
            ) from None
        self.gang.steps += (self.steps - before) * self.rows.size

    def _behind(self) -> int:
        """Next of lanes that are apart are those behind the others, until they are together."""
        pc = int(self.pcs.min())
        active = self.pcs == pc
        if active.all():
            self.pcs = self.mask = None
            self.pc = pc + 1
        else:
            self.mask = active
            self.pcs = np.where(active, pc + 1, self.pcs)
        return pc

    def put(self, slot: int, value: np.ndarray) -> None:
        """Writes a register, where lanes are active; ``value`` is as wide as the register."""
        if self.mask is not None:
            storage = self.kernel.storages[slot]
            old = self.registers[slot]
            value = np.where(self.mask, value.view(storage), old.view(storage))
        self.registers[slot] = value

    def full(self, value: np.ndarray) -> np.ndarray:
        """A register's value for each lane."""
        return value if value.size == self.size else value.repeat(self.size)

    def active(self) -> np.ndarray:
        """Which lanes are active, by row."""
        mask = np.ones(self.size, bool) if self.mask is None else self.mask
        return mask.reshape(-1, LANES)

    def check_together(self) -> None:
        if self.mask is not None:
            raise PtxError("needs all lanes of the warp, and some are elsewhere")

    def stop(self, where: int) -> None:
        """Ends :meth:`run`, at a barrier or at the end."""
        self.check_together()
        self.stopped = where

    def branch(self, target: int, taken: np.ndarray | None = None) -> None:
        """Goes to ``target`` with the lanes that ``taken`` says, or all active ones."""
        if target < self.pc and self.steps > MOST_STEPS:
            raise PtxError(f"no end in sight after {MOST_STEPS} instructions")
        if self.pcs is not None:
            going = self.mask if taken is None else self.mask & taken
            self.pcs = np.where(going, target, self.pcs)
            return
        if taken is None or taken.all():
            self.pc = target
        elif taken.any():
            self._part(target, taken)

    def _part(self, target: int, taken: np.ndarray) -> None:
        by_row = taken.reshape(-1, LANES)
        gone = by_row.all(1)
        mixed = by_row.any(1) & ~gone
        parts = [(np.flatnonzero(gone), target), (np.flatnonzero(~gone & ~mixed), self.pc)]
        parts += [(np.array([i]), None) for i in np.flatnonzero(mixed)]
        for chosen, pc in parts:
            if chosen.size:
                whole = chosen.size == self.rows.size
                crew = self if whole else self._of(chosen)
                if pc is None:
                    crew.pcs = np.where(by_row[chosen[0]], target, self.pc)
                else:
                    crew.pc = pc
                if not whole:
                    self.stopped = PARTED
                    self.gang.crews[self.warp].append(crew)

    def _of(self, chosen: np.ndarray) -> Crew:
        """Some rows of this crew, where it is now."""
        registers = [
            r if r.size == 1 else r.reshape(-1, LANES)[chosen].reshape(-1) for r in self.registers
        ]
        crew = Crew(self.gang, self.warp, self.rows[chosen], registers, self.pc)
        stride = self.gang.spaces["shared"].stride
        crew.groups = [[c.of(crew.rows, stride) for c in group] for group in self.groups]
        crew.copies = [c.of(crew.rows, stride) for c in self.copies]
        return crew

    def read(self, space: str, addresses: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
        """``[count, lanes]``, 0 for lanes that are not active."""
        memory, owners = self.gang.spaces[space], self._owners[space]
        addresses = self.full(addresses)
        if space == "shared":
            self._count(addresses, dtype.itemsize * count)
        if self.mask is None:
            return memory.read(addresses, owners, dtype, count)
        values = np.zeros((count, self.size), dtype)
        values[:, self.mask] = memory.read(addresses[self.mask], owners[self.mask], dtype, count)
        return values

    def read_rows(self, addresses: np.ndarray, lanes: int) -> np.ndarray:
        """``[8, blocks, lanes]``: eight 16-bit elements of shared memory for the first lanes."""
        chosen = np.arange(self.size).reshape(-1, LANES)[:, :lanes].reshape(-1)
        addresses, owners = self.full(addresses)[chosen], self._owners["shared"][chosen]
        self._count(addresses, 16, lanes)
        values = self.gang.spaces["shared"].read(addresses, owners, U16, 8)
        return values.reshape(8, -1, lanes)

    def write(self, space: str, addresses: np.ndarray, values: list[np.ndarray]) -> None:
        memory, owners = self.gang.spaces[space], self._owners[space]
        addresses = self.full(addresses)
        stacked = np.stack([self.full(v) for v in values])
        if space == "shared":
            self._count(addresses, stacked.itemsize * len(stacked))
        if self.mask is not None:
            addresses, owners = addresses[self.mask], owners[self.mask]
            stacked = stacked[:, self.mask]
        memory.write(addresses, owners, stacked)

    def _count(self, addresses: np.ndarray, size: int, lanes: int = LANES) -> None:
        """An access to ``size`` bytes of shared memory by the first lanes, of them the active."""
        conflicts = self.gang.conflicts
        if conflicts is not None:
            active = self.active()[:, :lanes]
            conflicts.count(self.at, addresses.reshape(-1, lanes), active, size)

    def exchange(
        self,
        space: str,
        addresses: np.ndarray,
        operands: list[np.ndarray],
        change: Callable[..., np.ndarray],
    ) -> np.ndarray:
        """What was there, lane by lane; ``change(was, *operands)`` is there for the next."""
        memory, owners = self.gang.spaces[space], self._owners[space]
        old = np.zeros(self.size, operands[0].dtype)
        lanes = np.arange(self.size) if self.mask is None else np.flatnonzero(self.mask)
        addresses = self.full(addresses)
        operands = [self.full(v) for v in operands]
        for now in _one_by_one(lanes, addresses[lanes], owners[lanes]):
            place = addresses[now], owners[now]
            old[now] = memory.read(*place, old.dtype, 1)[0]
            memory.write(*place, change(old[now], *(v[now] for v in operands))[None])
        return old

    def copy_async(self, to: np.ndarray, source: np.ndarray, sizes: np.ndarray, total: int) -> None:
        """Copies ``sizes`` bytes and zeros up to ``total``; nobody may read them before the wait.

        Until then they are poison: the copy may be written at any time, over whatever another warp
        still reads.
        """
        lanes = np.arange(self.size) if self.mask is None else np.flatnonzero(self.mask)
        if not lanes.size:
            return
        to, source, sizes = (self.full(v) for v in (to, source, sizes))
        self._count(to, total)
        to, source, sizes = to[lanes], source[lanes], sizes[lanes]
        shared = self.gang.spaces["shared"]
        places = shared.places(to, self._owners["shared"][lanes], total)
        values = np.zeros((total // 4, lanes.size), U32)
        for size in np.unique(sizes).tolist():
            if size % 4 or size > total:
                raise PtxError(f"copies {size} bytes of {total}")
            if size:
                some = sizes == size
                values[: size // 4, some] = self.gang.spaces["global"].read(
                    source[some], lanes[some], U32, size // 4
                )
        shared.write_at(places, np.full_like(values, 0xFFFFFFFF))
        self.copies.append(_Copy(places, values))

    def commit(self) -> None:
        self.groups.append(self.copies)
        self.copies = []

    def wait(self, pending: int) -> None:
        """Writes what was copied, but for the last ``pending`` groups."""
        while len(self.groups) > pending:
            for copy in self.groups.pop(0):
                self.gang.spaces["shared"].write_at(copy.places, copy.values)


def _one_by_one(
    lanes: np.ndarray, addresses: np.ndarray, owners: np.ndarray
) -> Iterator[np.ndarray]:
    """The lanes in turns, in each of which no two are at the same place."""
    order = np.lexsort((addresses, owners))
    same = (np.diff(addresses[order]) == 0) & (np.diff(owners[order]) == 0)
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    turns = np.arange(lanes.size) - starts.repeat(np.diff(starts, append=lanes.size))
    for turn in range(int(turns.max()) + 1):
        yield lanes[order[turns == turn]]


def _joined(crews: list[Crew]) -> list[Crew]:
    """Crews of one warp that are at the same place go on as one."""
    places: dict[tuple[int, ...], list[Crew]] = {}
    for crew in crews:
        copies = [len(group) for group in (*crew.groups, crew.copies)]
        places.setdefault((crew.pc, *copies), []).append(crew)
    return [_join(alike) if len(alike) > 1 else alike[0] for alike in places.values()]


def _join(crews: list[Crew]) -> Crew:
    first = crews[0]
    registers = [
        _register_of_all(values, crews, storage)
        for values, storage in zip(
            zip(*(c.registers for c in crews), strict=True), first.kernel.storages, strict=True
        )
    ]
    rows = np.concatenate([c.rows for c in crews])
    crew = Crew(first.gang, first.warp, rows, registers, first.pc)
    crew.groups = [
        _copies_of_all(groups) for groups in zip(*(c.groups for c in crews), strict=True)
    ]
    crew.copies = _copies_of_all([c.copies for c in crews])
    return crew


def _register_of_all(
    values: Sequence[np.ndarray], crews: list[Crew], storage: np.dtype
) -> np.ndarray:
    if all(v is values[0] for v in values) and values[0].size == 1:
        return values[0]
    return np.concatenate([c.full(v).view(storage) for c, v in zip(crews, values, strict=True)])


def _copies_of_all(copies: Sequence[list[_Copy]]) -> list[_Copy]:
    return [
        _Copy(
            np.concatenate([c.places for c in alike]),
            np.concatenate([c.values for c in alike], axis=1),
        )
        for alike in zip(*copies, strict=True)
    ]
