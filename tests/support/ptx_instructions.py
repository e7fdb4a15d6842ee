"""What each PTX instruction does: decoded once into a function that runs it for a crew of warps.

Whatever is not known here, a modifier included, raises when the kernel is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from support.ptx_memory import PRED, U16, U32, U64, PtxError
from support.ptx_text import (
    TYPES,
    UNSIGNED,
    Address,
    Group,
    Immediate,
    Instruction,
    Name,
    Operand,
    Reader,
    Register,
)

if TYPE_CHECKING:
    from support.ptx import Crew

Step = Callable[["Crew"], None]
Put = Callable[["Crew", np.ndarray], None]
Function = Callable[..., np.ndarray]
Decoder = Callable[[Instruction], Step]

F16, F32, F64 = (np.dtype(f"f{size}") for size in (2, 4, 8))
I32, I64 = np.dtype("i4"), np.dtype("i8")

_decoders: dict[str, Decoder] = {}


def decode(instruction: Instruction, labels: dict[str, int]) -> Step:
    """The function that runs ``instruction``."""
    try:
        if instruction.name == "bra":
            return _branch(instruction, labels)
        if instruction.name in ("ret", "exit"):
            return _leave(instruction)
        if instruction.name == "brx":
            step = _branch_if_equal(instruction, labels)
        else:
            decoder = _decoders.get(instruction.name)
            if decoder is None:
                raise PtxError("unknown instruction")
            step = decoder(instruction)
    except PtxError as error:
        raise PtxError(f"{error}: {instruction.text}") from None
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise PtxError(f"cannot decode ({error!r}): {instruction.text}") from error
    return step if instruction.guard is None else _guarded(step, instruction.guard.reader(PRED))


def _decodes(*names: str) -> Callable[[Decoder], Decoder]:
    def register(decoder: Decoder) -> Decoder:
        _decoders.update(dict.fromkeys(names, decoder))
        return decoder

    return register


# Operands and results.


class _Format:
    """How numbers that NumPy does not compute with lie in a register, and are computed as."""

    def __init__(self, decode: Function, encode: Function):
        self.decode = decode
        self.encode = encode


def _bf16_to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(U32) << np.uint32(16)).view(F32)


def _float_to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, F32).view(U32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(values), U16.type(0x7FFF), (rounded >> np.uint32(16)).astype(U16))


def _f16_to_float(bits: np.ndarray) -> np.ndarray:
    return bits.view(F16).astype(F32)


def _float_to_f16(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), U16.type(0x7FFF), values.astype(F16).view(U16))


def _pairs(single: _Format) -> _Format:
    """Two numbers in a register: ``[lanes, 2]``, the low half first."""
    return _Format(
        lambda bits: single.decode(np.ascontiguousarray(bits).view(U16)).reshape(-1, 2),
        lambda values: np.ascontiguousarray(single.encode(values)).view(U32).reshape(-1),
    )


_BF16 = _Format(_bf16_to_float, _float_to_bf16)
_F16 = _Format(_f16_to_float, _float_to_f16)
_FORMATS = {"bf16": _BF16, "f16": _F16, "bf16x2": _pairs(_BF16), "f16x2": _pairs(_F16)}
_FLOATS = ("f32", "f64", *_FORMATS)


def _reader(operand: Operand, type_name: str) -> Reader:
    """Reads ``operand`` as numbers that NumPy computes with."""
    if isinstance(operand, (Name, Group, Address)):
        raise PtxError("not a register or a number")
    bits = operand.reader(TYPES[type_name])
    number = _FORMATS.get(type_name)
    if number is None:
        return bits
    return lambda registers: number.decode(bits(registers))


def _put(operand: Operand, type_name: str) -> Put:
    """Writes such numbers; a register that is wider is filled up with the sign or zeros."""
    if not isinstance(operand, Register):
        raise PtxError("the result is not a register")
    slot, storage, dtype = operand.slot, operand.storage, TYPES[type_name]
    number = _FORMATS.get(type_name)
    if slot is None:
        return lambda crew, value: None
    if (storage is PRED) != (dtype is PRED) or storage.itemsize < dtype.itemsize:
        raise PtxError(f"a result of type .{type_name} does not fit the register")
    if number is not None:

        def put(crew: Crew, value: np.ndarray) -> None:
            crew.put(slot, number.encode(value))
    elif storage.itemsize == dtype.itemsize:

        def put(crew: Crew, value: np.ndarray) -> None:
            crew.put(slot, value)
    else:

        def put(crew: Crew, value: np.ndarray) -> None:
            crew.put(slot, value.astype(storage))

    return put


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Group) else (operand,)


def _same(value: np.ndarray) -> np.ndarray:
    return value


def _elementwise(put: Put, function: Function, readers: list[Reader]) -> Step:
    if len(readers) == 1:
        (a,) = readers
        return lambda crew: put(crew, function(a(crew.registers)))
    if len(readers) == 2:
        a, b = readers

        def two(crew: Crew) -> None:
            registers = crew.registers
            put(crew, function(a(registers), b(registers)))

        return two
    return lambda crew: put(crew, function(*(r(crew.registers) for r in readers)))


# Control.


def _guarded(step: Step, guard: Reader) -> Step:
    def run(crew: Crew) -> None:
        active = guard(crew.registers)
        outer = crew.mask
        if active.size == 1:
            if active[0]:
                step(crew)
            return
        if outer is not None:
            active = active & outer
        count = np.count_nonzero(active)
        if count == active.size:
            step(crew)
        elif count:
            crew.mask = active
            step(crew)
            crew.mask = outer

    return run


def _branch(instruction: Instruction, labels: dict[str, int]) -> Step:
    instruction.only("uni")
    (label,) = instruction.operands
    target = labels[label.text]
    return _jump(instruction, lambda crew: target)


def _branch_if_equal(instruction: Instruction, labels: dict[str, int]) -> Step:
    """One label of a ``brx.idx``, or the end of the list."""
    if not instruction.operands:
        return _trap(instruction)
    index, number, label = instruction.operands
    read, wanted, target = index.reader(U32), U32.type(number.bits), labels[label.text]

    def step(crew: Crew) -> None:
        taken = crew.full(read(crew.registers) == wanted)
        # A guard has narrowed the mask, which branch() knows of lanes that are apart only.
        crew.branch(target, taken if crew.mask is None else taken & crew.mask)

    return step


def _leave(instruction: Instruction) -> Step:
    return _jump(instruction, lambda crew: crew.kernel.end)


def _jump(instruction: Instruction, target: Callable[[Crew], int]) -> Step:
    if instruction.guard is None:
        return lambda crew: crew.branch(target(crew))
    guard = instruction.guard.reader(PRED)
    return lambda crew: crew.branch(target(crew), crew.full(guard(crew.registers)))


@_decodes("trap", "brkpt")
def _trap(instruction: Instruction) -> Step:
    def step(crew: Crew) -> None:
        raise PtxError("the kernel gave up")

    return step


@_decodes("bar", "barrier")
def _barrier(instruction: Instruction) -> Step:
    modifiers = [m for m in instruction.modifiers if m not in ("cta", "aligned")]
    if modifiers == ["warp", "sync"]:
        return lambda crew: crew.check_together()
    if modifiers != ["sync"]:
        raise PtxError("unknown barrier")
    number = instruction.operands[0].bits
    count = instruction.operands[1].bits if len(instruction.operands) > 1 else None

    def step(crew: Crew) -> None:
        if count not in (None, crew.gang.threads):
            raise PtxError("a barrier for some of the threads only")
        crew.stop(number)

    return step


@_decodes("fence", "membar", "prefetch", "prefetchu", "nanosleep", "applypriority", "discard")
def _nothing(instruction: Instruction) -> Step:
    return lambda crew: None


# Moving data.


@_decodes("mov")
def _mov(instruction: Instruction) -> Step:
    to, source = instruction.operands
    if isinstance(source, Group):
        return _pack(instruction, to, source.parts)
    if isinstance(to, Group):
        return _unpack(instruction, to.parts, source)
    return _elementwise(_put(to, instruction.type), _same, [_bits(source, instruction.type)])


def _bits(operand: Operand, type_name: str) -> Reader:
    if isinstance(operand, Name):
        raise PtxError(f"no variable {operand.text}")
    return operand.reader(TYPES[type_name])


def _pack(instruction: Instruction, to: Operand, parts: tuple[Operand, ...]) -> Step:
    whole = UNSIGNED[TYPES[instruction.type].itemsize]
    part = UNSIGNED[whole.itemsize // len(parts)]
    put = _put(to, instruction.type)
    reads = [p.reader(part) for p in parts]
    shifts = [whole.type(8 * part.itemsize * i) for i in range(len(parts))]

    def step(crew: Crew) -> None:
        value = reads[0](crew.registers).astype(whole)
        for read, shift in zip(reads[1:], shifts[1:], strict=True):
            value = value | (read(crew.registers).astype(whole) << shift)
        put(crew, value)

    return step


def _unpack(instruction: Instruction, parts: tuple[Operand, ...], source: Operand) -> Step:
    whole = UNSIGNED[TYPES[instruction.type].itemsize]
    part = UNSIGNED[whole.itemsize // len(parts)]
    read = source.reader(whole)
    puts = [_put(p, f"b{8 * part.itemsize}") for p in parts]
    shifts = [whole.type(8 * part.itemsize * i) for i in range(len(parts))]

    def step(crew: Crew) -> None:
        value = read(crew.registers)
        for put, shift in zip(puts, shifts, strict=True):
            put(crew, (value >> shift).astype(part))

    return step


@_decodes("cvta")
def _cvta(instruction: Instruction) -> Step:
    to, source = instruction.operands
    function = {"to.shared": _from_generic, "shared": _to_generic}.get(
        ".".join(instruction.modifiers[:-1]), _same
    )
    return _elementwise(_put(to, "b64"), function, [_bits(source, "b64")])


# Generic addresses of shared memory begin here, where no buffer is: only their arithmetic is known.
_SHARED = U64.type(1 << 60)


def _to_generic(address: np.ndarray) -> np.ndarray:
    return address + _SHARED


def _from_generic(address: np.ndarray) -> np.ndarray:
    """All bits are set where it is none of shared memory, even if only some are used."""
    inside = (address >= _SHARED) & (address < _SHARED + U64.type(1 << 32))
    return np.where(inside, address - _SHARED, ~U64.type(0))


@_decodes("createpolicy")
def _createpolicy(instruction: Instruction) -> Step:
    put = _put(instruction.operands[0], "b64")
    zero = np.zeros(1, U64)
    return lambda crew: put(crew, zero)


@_decodes("selp")
def _selp(instruction: Instruction) -> Step:
    to, a, b, choice = instruction.operands
    raw = f"b{8 * TYPES[instruction.type].itemsize}"
    read_a, read_b, chosen = _bits(a, raw), _bits(b, raw), choice.reader(PRED)

    def select(p: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.where(p, x, y)

    return _elementwise(_put(to, raw), select, [chosen, read_a, read_b])


# Memory.

# What changes the order of accesses, or what is kept in caches, and nothing here.
_ORDERS = (
    *("weak", "volatile", "relaxed", "acquire", "release", "acq_rel"),
    *("gpu", "sys", "cta", "cluster"),
    *("ca", "cg", "cs", "cv", "lu", "wb", "wt", "nc", "noftz"),
)


def _space(instruction: Instruction) -> str:
    """The memory of a load, store or atomic; its other modifiers must be known."""
    space = "global"
    for modifier in instruction.modifiers[:-1]:
        name = modifier.split("::")[0]
        if name in ("global", "shared", "local", "param"):
            space = name
        elif name == "const":
            space = "global"
        elif name not in _ORDERS and name not in ("L1", "L2", "v2", "v4", *_ATOMIC):
            raise PtxError(f"unknown modifier .{modifier}")
    return space


@_decodes("ld", "ldu")
def _ld(instruction: Instruction) -> Step:
    space, type_name = _space(instruction), instruction.type
    to, source = instruction.operands[:2]
    # No arithmetic is done on what is loaded: bf16 and the like move as bits.
    raw = type_name if type_name in ("s8", "s16", "s32") else f"b{_bits_of(type_name)}"
    puts = [_put(part, raw) for part in _parts(to)]
    address, dtype = source.reader(), TYPES[raw]

    def step(crew: Crew) -> None:
        at = address(crew.registers)
        if space == "param" and at.size == 1:
            values = crew.gang.spaces[space].read(at, at, dtype, len(puts))
        else:
            values = crew.read(space, at, dtype, len(puts))
        for put, value in zip(puts, values, strict=True):
            put(crew, value)

    return step


def _bits_of(type_name: str) -> int:
    return 8 * TYPES[type_name].itemsize


@_decodes("st")
def _st(instruction: Instruction) -> Step:
    space, dtype = _space(instruction), UNSIGNED[TYPES[instruction.type].itemsize]
    to, source = instruction.operands[:2]
    address = to.reader()
    reads = [part.reader(dtype) for part in _parts(source)]

    def step(crew: Crew) -> None:
        registers = crew.registers
        crew.write(space, address(registers), [read(registers) for read in reads])

    return step


def _swap_if_equal(was: np.ndarray, compared: np.ndarray, new: np.ndarray) -> np.ndarray:
    return np.where(was == compared, new, was)


_REDUCED: dict[str, Function] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_ATOMIC: dict[str, Function] = {
    **_REDUCED,
    "exch": lambda was, new: new,
    "cas": _swap_if_equal,
}


@_decodes("atom", "red")
def _atom(instruction: Instruction) -> Step:
    space, type_name = _space(instruction), instruction.type
    (operation,) = (m for m in instruction.modifiers if m in _ATOMIC)
    change = _ATOMIC[operation]
    count = 2 if operation == "cas" else 1
    operands = list(instruction.operands)
    raw = f"b{_bits_of(type_name)}"
    to = operands.pop(0) if instruction.name == "atom" else Register(None, U32)
    if any(isinstance(o, Group) for o in operands):
        raise PtxError("vectors of atomics are unknown")
    address, reads = operands[0].reader(), [o.reader(TYPES[raw]) for o in operands[1 : 1 + count]]
    put = _put(to, raw)

    number = _FORMATS.get(type_name)
    dtype = TYPES[type_name]

    def apply(*bits: np.ndarray) -> np.ndarray:
        if number is not None:
            return number.encode(change(*(number.decode(b) for b in bits)))
        return change(*(b.view(dtype) for b in bits)).view(TYPES[raw])

    def step(crew: Crew) -> None:
        values = [read(crew.registers) for read in reads]
        put(crew, crew.exchange(space, address(crew.registers), values, apply))

    return step


@_decodes("cp")
def _cp(instruction: Instruction) -> Step:
    kind = [m for m in instruction.modifiers if not m.startswith("L2::")]
    if kind == ["async", "commit_group"]:
        return _commit
    if kind == ["async", "wait_group"]:
        pending = instruction.operands[0].bits
        return lambda crew: _wait(crew, pending)
    if kind == ["async", "wait_all"]:
        return _wait_all
    if kind not in (["async", c, "shared", "global"] for c in ("ca", "cg")):
        raise PtxError("unknown copy")
    to, source = (o.reader() for o in instruction.operands[:2])
    total = instruction.operands[2].bits
    if total not in ((16,) if kind[1] == "cg" else (4, 8, 16)):
        raise PtxError(f"copies {total} bytes")
    has_size = len(instruction.operands) > 3
    size = (instruction.operands[3] if has_size else Immediate(total)).reader(U32)

    def step(crew: Crew) -> None:
        registers = crew.registers
        crew.copy_async(to(registers), source(registers), size(registers), total)

    return step


def _commit(crew: Crew) -> None:
    crew.check_together()
    crew.commit()


def _wait(crew: Crew, pending: int) -> None:
    crew.check_together()
    crew.wait(pending)


def _wait_all(crew: Crew) -> None:
    _commit(crew)
    crew.wait(0)


# Between the lanes of a warp.


def _check_members(crew: Crew, members: np.ndarray) -> np.ndarray:
    """Raises unless each warp's active lanes are those that the mask names; returns these."""
    active = crew.active()
    bits = (crew.full(members).reshape(-1, 32) >> np.arange(32, dtype=U32)) & U32.type(1) != 0
    if ((active != bits) & active.any(1, keepdims=True)).any():
        raise PtxError("the lanes that are here are not those of the member mask")
    return active


@_decodes("shfl")
def _shfl(instruction: Instruction) -> Step:
    _, mode, _ = instruction.modifiers
    to, source, lane, clamp, members = instruction.operands
    results = _parts(to)
    put = _put(results[0], "b32")
    put_valid = _put(results[1], "pred") if len(results) > 1 else None
    read, read_lane, read_clamp, read_members = (
        o.reader(U32) for o in (source, lane, clamp, members)
    )
    if mode not in ("up", "down", "bfly", "idx"):
        raise PtxError("unknown shuffle")

    def step(crew: Crew) -> None:
        registers = crew.registers
        active = _check_members(crew, read_members(registers))
        own = np.arange(32)
        b = crew.full(read_lane(registers)).reshape(-1, 32).astype(I64) & 31
        c = crew.full(read_clamp(registers)).reshape(-1, 32).astype(I64)
        segment = (c >> 8) & 31
        first = own & segment
        last = first | (c & 31 & ~segment)
        other = {"up": own - b, "down": own + b, "bfly": own ^ b, "idx": first | (b & ~segment)}
        from_lane = other[mode]
        valid = from_lane >= last if mode == "up" else from_lane <= last
        from_lane = np.where(valid, from_lane, own)
        if not np.take_along_axis(active, from_lane, 1)[active].all():
            raise PtxError("a shuffle from a lane that is not here")
        value = crew.full(read(registers)).reshape(-1, 32)
        put(crew, np.take_along_axis(value, from_lane, 1).reshape(-1))
        if put_valid:
            put_valid(crew, valid.reshape(-1))

    return step


@_decodes("redux")
def _redux(instruction: Instruction) -> Step:
    _, operation, type_name = instruction.modifiers
    to, source, members = instruction.operands
    put, read = _put(to, type_name), source.reader(TYPES[type_name])
    read_members = members.reader(U32)
    reduce = _REDUCED[operation]

    def step(crew: Crew) -> None:
        active = _check_members(crew, read_members(crew.registers))
        values = crew.full(read(crew.registers)).reshape(-1, 32)
        result = np.zeros(len(values), values.dtype)
        for i in np.flatnonzero(active.any(1)):
            result[i] = reduce.reduce(values[i, active[i]], dtype=values.dtype)
        put(crew, result.repeat(32))

    return step


@_decodes("vote")
def _vote(instruction: Instruction) -> Step:
    _, operation, type_name = instruction.modifiers
    to, source, members = instruction.operands
    put, read, read_members = _put(to, type_name), source.reader(PRED), members.reader(U32)
    decide = {
        "ballot": lambda yes, active: _as_mask(yes & active),
        "any": lambda yes, active: (yes & active).any(1),
        "all": lambda yes, active: (yes | ~active).all(1),
    }[operation]

    def step(crew: Crew) -> None:
        active = _check_members(crew, read_members(crew.registers))
        yes = crew.full(read(crew.registers)).reshape(-1, 32)
        put(crew, decide(yes, active).repeat(32))

    return step


def _as_mask(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(U32) << np.arange(32, dtype=U32)).sum(1, dtype=U32)


@_decodes("activemask")
def _activemask(instruction: Instruction) -> Step:
    put = _put(instruction.operands[0], "b32")
    return lambda crew: put(crew, _as_mask(crew.active()).repeat(32))


# Matrices. Lane 4 * i + j of a warp holds row (of B: column) i of each 8 x 8 tile, and there the
# elements of register j of those side by side.


@_decodes("ldmatrix")
def _ldmatrix(instruction: Instruction) -> Step:
    known = ("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta")
    instruction.only(*known)
    if instruction.type != "b16" or "m8n8" not in instruction.modifiers:
        raise PtxError("unknown matrix")
    to, source = instruction.operands
    puts = [_put(part, "b32") for part in _parts(to)]
    if f"x{len(puts)}" not in instruction.modifiers:
        raise PtxError("as many registers as matrices are needed")
    address = source.reader()
    row, column = np.arange(32) // 4, np.arange(32) % 4 * 2
    transposed = "trans" in instruction.modifiers

    def step(crew: Crew) -> None:
        crew.check_together()
        rows = crew.read_rows(address(crew.registers), 8 * len(puts))
        # Column, block, matrix, row.
        elements = rows.reshape(8, -1, len(puts), 8)
        if transposed:
            elements = elements.transpose(3, 1, 2, 0)
        elements = elements.astype(U32)
        for i, put in enumerate(puts):
            matrix = elements[:, :, i]
            low, high = matrix[column, :, row], matrix[column + 1, :, row]
            put(crew, (low | high << np.uint32(16)).T.reshape(-1))

    return step


def _widened_tf32(bits: np.ndarray) -> np.ndarray:
    """Tensor cores read 19 bits of a float32, whatever the others are."""
    return (bits & np.uint32(0xFFFFE000)).view(F32)


# How elements lie in a 32-bit register, and what they are multiplied as.
_ELEMENTS: dict[str, tuple[np.dtype, Function]] = {
    "bf16": (U16, _bf16_to_float),
    "f16": (U16, _f16_to_float),
    "tf32": (U32, _widened_tf32),
}
_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")


@_decodes("mma")
def _mma(instruction: Instruction) -> Step:
    sync, aligned, shape, row, col, *types = instruction.modifiers
    of_d, of_a, of_b, of_c = types
    m, n, k = map(int, _SHAPE.fullmatch(shape).groups())
    if (sync, aligned, row, col, m, n) != ("sync", "aligned", "row", "col", 16, 8):
        raise PtxError("unknown shape of a product")
    if of_a not in _ELEMENTS or of_a != of_b or of_d != of_c or of_d not in ("f32", "f16"):
        raise PtxError("unknown types of a product")
    per = 4 // _ELEMENTS[of_a][0].itemsize
    d, a, b, c = (_parts(o) for o in instruction.operands)
    if (len(a), len(b)) != (2 * k // (4 * per), k // (4 * per)):
        raise PtxError("another number of registers is needed")
    read_a = _fragment(a, of_a, _row_fragments(m, k, per))
    read_b = _fragment(b, of_b, _row_fragments(n, k, per))
    halves = of_d == "f16"
    at = _sum_fragments(m, n)
    back = np.argsort(at.reshape(-1))
    puts = [_put(part, "b32") for part in d]
    reads = [part.reader(U32) for part in c]
    dtype = U16 if halves else U32

    def step(crew: Crew) -> None:
        crew.check_together()
        added = _stacked(crew, reads).view(dtype).reshape(crew.rows.size, -1)[:, at]
        added = _f16_to_float(added) if halves else added.view(F32)
        # Summed in float64 and rounded once, as the emulator of CUDA for CPUs does.
        result = read_a(crew) @ read_b(crew).transpose(0, 2, 1) + added.astype(F64)
        result = _float_to_f16(result) if halves else result.astype(F32)
        lanes = result.reshape(crew.rows.size, -1)[:, back]
        words = np.ascontiguousarray(lanes).view(U32).reshape(crew.size, -1)
        for put, word in zip(puts, words.T, strict=True):
            put(crew, np.ascontiguousarray(word))

    return step


def _stacked(crew: Crew, reads: list[Reader]) -> np.ndarray:
    """``[lanes, registers]``, row after row."""
    return np.stack([crew.full(read(crew.registers)) for read in reads], axis=1)


def _fragment(
    parts: tuple[Operand, ...], type_name: str, at: np.ndarray
) -> Callable[[Crew], np.ndarray]:
    """Reads ``[blocks, rows, k]``; ``at`` says where each element is among those of a warp."""
    bits, widened = _ELEMENTS[type_name]
    reads = [part.reader(U32) for part in parts]

    def read(crew: Crew) -> np.ndarray:
        elements = _stacked(crew, reads).view(bits).reshape(crew.rows.size, -1)
        return widened(elements).astype(F64)[:, at]

    return read


def _row_fragments(rows: int, k: int, per: int) -> np.ndarray:
    """``[rows, k]``: where A (or B, as columns) is, ``per`` elements to a register."""
    r, c = np.indices((rows, k))
    tile_row, tile_column = r // 8, c // (4 * per)
    lane = r % 8 * 4 + c % (4 * per) // per
    register = tile_row + rows // 8 * tile_column
    registers = rows // 8 * (k // (4 * per))
    return (lane * registers + register) * per + c % per


def _sum_fragments(m: int, n: int) -> np.ndarray:
    """``[m, n]``: where the sum is, in elements."""
    r, c = np.indices((m, n))
    return (r % 8 * 4 + c // 2) * 4 + r // 8 * 2 + c % 2


# Comparisons.

_COMPARED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, is_float: bool) -> Function:
    if not is_float:
        return _COMPARED[name]
    if name in ("num", "nan"):
        ordered = name == "num"
        return lambda a, b: (np.isnan(a) | np.isnan(b)) != ordered
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name in _COMPARED:
        return _COMPARED[name]
    # Those that end in u are true where one is NaN: what is not true of the opposite.
    opposite = {"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}
    compare = _comparison(opposite[name.removesuffix("u")], True)
    return lambda a, b: ~compare(a, b)


@_decodes("setp")
def _setp(instruction: Instruction) -> Step:
    name, *rest = instruction.modifiers[:-1]
    logic = [_LOGIC[m] for m in rest if m != "ftz"]
    compare = _comparison(name, instruction.type in _FLOATS)
    if instruction.type in ("f16x2", "bf16x2"):
        raise PtxError("comparisons of pairs are unknown")
    to, a, b = instruction.operands[:3]
    reads = [_reader(o, instruction.type) for o in (a, b)]
    results = _parts(to)
    if not logic and len(results) == 1:
        return _elementwise(_put(results[0], "pred"), compare, reads)
    puts = [_put(part, "pred") for part in results]
    third = instruction.operands[3].reader(PRED) if logic else None

    def step(crew: Crew) -> None:
        registers = crew.registers
        value = compare(*(read(registers) for read in reads))
        values = [value, ~value]
        if third is not None:
            values = [logic[0](v, third(registers)) for v in values]
        for put, result in zip(puts, values, strict=False):
            put(crew, result)

    return step


# Arithmetic of floating-point numbers.


def _sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In float64; what is not exact becomes the neighbour that ends in a set bit.

    To round that again, to fewer bits, gives what one rounding of the exact sum does (Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    total, error = _two_sum(a, b)
    bits = total.view(I64)
    even = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    return np.where(even, bits + np.where((error > 0) == (total > 0), 1, -1), bits).view(F64)


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c``, rounded once."""
    if a.dtype == F64:
        return _fused_double(a, b, c)
    # The product is exact.
    product, c = a.astype(F64) * b, c.astype(F64)
    total = product + c
    halfway = (total.view(I64) & 0x1FFFFFFF) == 0x10000000
    subnormal = (np.abs(total) < np.finfo(F32).tiny) & (total != 0)
    if (halfway | subnormal).any():
        total = _sum_to_odd(product, c)
    return total.astype(F32)


def _fused_double(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """By the same paper, from the product's rounding error."""
    high_a, high_b = _upper_half(a), _upper_half(b)
    low_a, low_b = a - high_a, b - high_b
    product = a * b
    rest = low_a * low_b - (product - high_a * high_b - low_a * high_b - high_a * low_b)
    first, error = _two_sum(c, rest)
    total, last = _two_sum(product, first)
    exact = total + _sum_to_odd(error, last)
    return np.where(np.isfinite(exact), exact, product + c)


def _upper_half(a: np.ndarray) -> np.ndarray:
    """The first 26 bits of the mantissa, rounded (Veltkamp)."""
    scaled = a * float(2**27 + 1)
    return scaled - (scaled - a)


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum, and what rounding it lost."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


# Exact sums and products, in float64 or rounded to odd there.
_EXACT: dict[str, Function] = {
    "add": _sum_to_odd,
    "sub": lambda a, b: _sum_to_odd(a, -b),
    "mul": np.multiply,
    "fma": lambda a, b, c: _sum_to_odd(a * b, c),
}


def _directed(name: str, modifier: str) -> Function:
    """Of float32, rounded down, up or towards zero."""
    exact = _EXACT[name]

    def compute(*values: np.ndarray) -> np.ndarray:
        result = exact(*(v.astype(F64) for v in values))
        nearest = result.astype(F32)
        if modifier == "rz":
            return _next_if(np.abs(nearest) > np.abs(result), nearest, 0)
        if modifier == "rm":
            return _next_if(nearest > result, nearest, -np.inf)
        return _next_if(nearest < result, nearest, np.inf)

    return compute


def _next_if(wrong: np.ndarray, values: np.ndarray, towards: float) -> np.ndarray:
    return np.where(wrong, np.nextafter(values, F32.type(towards)), values)


def _copysign(sign: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    return np.copysign(magnitude, sign)


_FLOAT: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": _fused,
    "mad": _fused,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "sqrt": np.sqrt,
    "rcp": lambda a: np.ones(1, a.dtype) / a,
    "rsqrt": lambda a: np.ones(1, a.dtype) / np.sqrt(a),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "copysign": _copysign,
}
_NAN_WINS = {"min": np.minimum, "max": np.maximum}


def _flushed(values: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zeros."""
    return np.where(np.abs(values) < np.finfo(F32).tiny, np.copysign(F32.type(0), values), values)


def _saturated(values: np.ndarray) -> np.ndarray:
    """In 0 to 1; NaN becomes 0."""
    return np.clip(np.where(np.isnan(values), 0, values), 0, 1).astype(values.dtype)


def _float_arithmetic(instruction: Instruction) -> Step:
    instruction.only("rn", "rm", "rp", "rz", "ftz", "approx", "full", "NaN", "sat", "relu")
    name, modifiers, type_name = instruction.name, instruction.modifiers, instruction.type
    function = _NAN_WINS[name] if "NaN" in modifiers else _FLOAT[name]
    for modifier in {"rm", "rp", "rz"}.intersection(modifiers):
        if name not in _EXACT or type_name != "f32":
            raise PtxError("unknown rounding")
        function = _directed(name, modifier)
    to, *operands = instruction.operands
    reads = [_reader(o, type_name) for o in operands]
    if "ftz" in modifiers and type_name == "f32":
        exact = function

        def function(*values: np.ndarray) -> np.ndarray:
            return _flushed(exact(*map(_flushed, values)))

    if "sat" in modifiers:
        unlimited = function

        def function(*values: np.ndarray) -> np.ndarray:
            return _saturated(unlimited(*values))

    if "relu" in modifiers:
        signed = function

        def function(*values: np.ndarray) -> np.ndarray:
            return np.maximum(signed(*values), 0)

    return _elementwise(_put(to, type_name), function, reads)


# Arithmetic of integers.


def _double(type_name: str) -> str:
    return f"{type_name[0]}{2 * int(type_name[1:])}"


def _high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product."""
    dtype = a.dtype
    if dtype.itemsize < 8:
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        return (a.astype(wide) * b.astype(wide) >> 8 * dtype.itemsize).astype(dtype)
    x, y, half = a.view(U64), b.view(U64), np.uint64(32)
    low = np.uint64(0xFFFFFFFF)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    high = x1 * y1 + (middle >> half) + (((middle & low) + x0 * y1) >> half)
    if dtype.kind == "i":
        high = high - np.where(a < 0, y, U64.type(0)) - np.where(b < 0, x, U64.type(0))
    return high.view(dtype)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """With the sign of ``a``, as in C."""
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, a.dtype.type(1), b)))


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    divisor = np.where(b == 0, a.dtype.type(1), b)
    ones = np.array([-1]).astype(a.dtype)
    return np.where(b == 0, ones, (a - np.fmod(a, divisor)) // divisor)


def _shift_left(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    moved = a << np.minimum(count, bits - 1).astype(a.dtype)
    return np.where(count < bits, moved, a.dtype.type(0))


def _shift_right(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    moved = a >> np.minimum(count, bits - 1).astype(a.dtype)
    if a.dtype.kind == "i":
        return moved
    return np.where(count < bits, moved, a.dtype.type(0))


def _single_bits(a: np.ndarray) -> np.ndarray:
    """``[lanes, bits]``, the highest first."""
    size = a.dtype.itemsize
    return np.unpackbits(a.view(np.uint8).reshape(-1, size)[:, ::-1], axis=1)


def _leading_zeros(a: np.ndarray) -> np.ndarray:
    bits = _single_bits(a)
    return np.where(bits.any(1), bits.argmax(1), bits.shape[1]).astype(U32)


def _reversed(a: np.ndarray) -> np.ndarray:
    size = a.dtype.itemsize
    packed = np.packbits(_single_bits(a)[:, ::-1], axis=1)[:, ::-1]
    return np.ascontiguousarray(packed).view(UNSIGNED[size]).reshape(-1)


_INTEGER: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "div": _quotient,
    "rem": _remainder,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "cnot": lambda a: (a == 0).astype(a.dtype),
}


@_decodes(*_FLOAT, *_INTEGER)
def _arithmetic(instruction: Instruction) -> Step:
    if instruction.type in _FLOATS:
        return _float_arithmetic(instruction)
    if instruction.name in ("mul", "mad"):
        return _product(instruction)
    if "cc" in instruction.modifiers:
        return _carrying(instruction)
    instruction.only()
    function = _INTEGER[instruction.name]
    if instruction.type == "pred" and instruction.name not in ("and", "or", "xor", "not"):
        raise PtxError("no arithmetic of predicates")
    to, *operands = instruction.operands
    reads = [_reader(o, instruction.type) for o in operands]
    return _elementwise(_put(to, instruction.type), function, reads)


def _product(instruction: Instruction) -> Step:
    half, type_name = instruction.modifiers[0], instruction.type
    if "cc" in instruction.modifiers:
        return _carrying(instruction)
    instruction.only("lo", "hi", "wide")
    result = _double(type_name) if half == "wide" else type_name
    wide = TYPES[result]
    to, *operands = instruction.operands
    reads = [_reader(o, t) for o, t in zip(operands, (type_name, type_name, result), strict=False)]

    def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if half == "hi":
            return _high_product(a, b)
        return a * b if half == "lo" else a.astype(wide) * b.astype(wide)

    if instruction.name == "mul":
        return _elementwise(_put(to, result), multiply, reads)
    return _elementwise(_put(to, result), lambda a, b, c: multiply(a, b) + c, reads)


@_decodes("addc", "subc", "madc")
def _carrying(instruction: Instruction) -> Step:
    """Sums of numbers in several registers: with the carry of the one before, and on to the next.

    Only for 32 bits, in the order that a compiler writes them: one right after the other.
    """
    instruction.only("cc", "lo", "hi")
    if instruction.name in ("sub", "subc") or TYPES[instruction.type].itemsize != 4:
        raise PtxError("unknown carry")
    to, *operands = instruction.operands
    put = _put(to, "u32")
    reads = [_reader(o, "u32") for o in operands]
    takes, leaves = instruction.name.endswith("c"), "cc" in instruction.modifiers
    high = "hi" in instruction.modifiers

    def step(crew: Crew) -> None:
        *factors, total = (read(crew.registers).astype(U64) for read in reads)
        if len(factors) == 2:
            product = factors[0] * factors[1]
            total = total + (product >> np.uint64(32) if high else product & U64.type(0xFFFFFFFF))
        else:
            total = total + factors[0]
        if takes:
            total = total + crew.carry
        if leaves:
            crew.carry = total >> np.uint64(32)
        put(crew, total.astype(U32))

    return step


@_decodes("shl", "shr")
def _shift(instruction: Instruction) -> Step:
    instruction.only()
    function = _shift_left if instruction.name == "shl" else _shift_right
    to, a, count = instruction.operands
    reads = [_reader(a, instruction.type), _reader(count, "u32")]
    return _elementwise(_put(to, instruction.type), function, reads)


@_decodes("shf")
def _funnel_shift(instruction: Instruction) -> Step:
    direction, mode, _ = instruction.modifiers
    to, low, high, count = instruction.operands
    most = np.uint64({"wrap": 31, "clamp": 32}[mode])
    down = np.uint64({"l": 32, "r": 0}[direction])

    def shift(a: np.ndarray, b: np.ndarray, by: np.ndarray) -> np.ndarray:
        by = by & most if mode == "wrap" else np.minimum(by, most)
        both = b << np.uint64(32) | a
        # Shifted left by 32 the upper half is the lower one, which 64-bit shifts can hold.
        return ((both << by if direction == "l" else both >> by) >> down).astype(U32)

    reads = [_wide(_reader(o, "u32")) for o in (low, high, count)]
    return _elementwise(_put(to, "b32"), shift, reads)


def _wide(read: Reader) -> Reader:
    return lambda registers: read(registers).astype(U64)


@_decodes("bfe")
def _bit_field(instruction: Instruction) -> Step:
    instruction.only()
    to, a, start, length = instruction.operands
    dtype = TYPES[instruction.type]
    wide = I64 if dtype.kind == "i" else U64

    def extract(value: np.ndarray, first: np.ndarray, count: np.ndarray) -> np.ndarray:
        count = np.minimum(count & np.uint32(255), 64).astype(wide)
        value = _shift_right(value.astype(wide), first & np.uint32(255))
        unused = 64 - count
        moved = _shift_right(_shift_left(value, unused), unused)
        return np.where(count == 0, 0, moved).astype(dtype)

    reads = [_reader(a, instruction.type), _reader(start, "u32"), _reader(length, "u32")]
    return _elementwise(_put(to, instruction.type), extract, reads)


@_decodes("bfi")
def _bit_field_insert(instruction: Instruction) -> Step:
    instruction.only()
    to, a, b, start, length = instruction.operands

    def insert(
        value: np.ndarray, into: np.ndarray, first: np.ndarray, count: np.ndarray
    ) -> np.ndarray:
        one = into.dtype.type(1)
        field = _shift_left(one, count & np.uint32(255)) - one
        field = _shift_left(field, first & np.uint32(255))
        return into & ~field | _shift_left(value, first & np.uint32(255)) & field

    types = (instruction.type, instruction.type, "u32", "u32")
    reads = [_reader(o, t) for o, t in zip((a, b, start, length), types, strict=True)]
    return _elementwise(_put(to, instruction.type), insert, reads)


@_decodes("popc", "clz")
def _count_bits(instruction: Instruction) -> Step:
    instruction.only()
    to, a = instruction.operands
    function = {"popc": lambda x: _single_bits(x).sum(1, dtype=U32), "clz": _leading_zeros}
    return _elementwise(_put(to, "u32"), function[instruction.name], [_reader(a, instruction.type)])


@_decodes("brev")
def _reverse_bits(instruction: Instruction) -> Step:
    instruction.only()
    to, a = instruction.operands
    return _elementwise(_put(to, instruction.type), _reversed, [_reader(a, instruction.type)])


@_decodes("lop3")
def _three_way_logic(instruction: Instruction) -> Step:
    instruction.only()
    to, *operands, table = instruction.operands
    combinations = [i for i in range(8) if table.bits >> i & 1]

    def combine(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.zeros(1, U32)
        for i in combinations:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return result

    return _elementwise(_put(to, "b32"), combine, [_reader(o, "b32") for o in operands])


@_decodes("prmt")
def _permute_bytes(instruction: Instruction) -> Step:
    instruction.only()
    to, a, b, choice = instruction.operands

    def permute(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = low | high << np.uint64(32)
        result = np.zeros(1, U64)
        for i in range(4):
            picked = selector >> np.uint64(4 * i)
            byte = both >> (picked & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(picked & np.uint64(8), sign, byte)
            result = result | byte << np.uint64(8 * i)
        return result.astype(U32)

    return _elementwise(
        _put(to, "b32"), permute, [_wide(_reader(o, "u32")) for o in (a, b, choice)]
    )


# Conversions.

_ROUNDED = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@_decodes("cvt")
def _cvt(instruction: Instruction) -> Step:
    instruction.only(*_ROUNDED, *TYPES, "rn", "rna", "ftz", "sat", "relu")
    *modifiers, target, source = instruction.modifiers
    if target not in TYPES or ("sat" in modifiers and target in ("bf16x2", "f16x2", "tf32")):
        raise PtxError("unknown conversion")
    to, *operands = instruction.operands
    if target in ("bf16x2", "f16x2"):
        return _cvt_pair(to, operands, target, source, modifiers)
    function = _conversion(target, source, modifiers)
    return _elementwise(_put(to, target), function, [_reader(operands[0], source)])


def _cvt_pair(
    to: Operand, operands: list[Operand], target: str, source: str, modifiers: list[str]
) -> Step:
    high, low = (_reader(o, source) for o in operands)

    def pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        values = np.stack(np.broadcast_arrays(b, a), axis=1)
        return np.maximum(values, 0) if "relu" in modifiers else values

    return _elementwise(_put(to, target), pair, [high, low])


def _float_to_tf32(values: np.ndarray) -> np.ndarray:
    """To the nearest, halves away from zero. The bits of poison would wrap to those of zero."""
    rounded = (values.view(U32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(values), U32.type(0x7FFFFFFF), rounded)


def _conversion(target: str, source: str, modifiers: list[str]) -> Function:
    dtype = TYPES[target]
    if target == "tf32":
        return _float_to_tf32
    rounding = [_ROUNDED[m] for m in modifiers if m in _ROUNDED]
    if target in _FLOATS:
        # The formats take float32, and round it.
        computed = F64 if target == "f64" else F32
        if "rna" in modifiers:
            raise PtxError("unknown rounding")

        def to_float(x: np.ndarray) -> np.ndarray:
            for function in rounding:
                x = function(x)
            x = x.astype(computed)
            if "sat" in modifiers:
                x = _saturated(x)
            return np.maximum(x, 0) if "relu" in modifiers else x

        return to_float
    limits = np.iinfo(dtype) if dtype is not PRED else None
    if limits is None:
        raise PtxError("unknown conversion")
    if source not in _FLOATS:
        if "sat" not in modifiers:
            return lambda x: x.astype(dtype)

        def saturate(x: np.ndarray) -> np.ndarray:
            low = max(limits.min, np.iinfo(x.dtype).min)
            return np.clip(x, low, min(limits.max, np.iinfo(x.dtype).max)).astype(dtype)

        return saturate
    if not rounding:
        raise PtxError("unknown rounding")

    def to_integer(x: np.ndarray) -> np.ndarray:
        """What is out of range becomes the nearest number in it, NaN zero."""
        x = rounding[0](x.astype(F64))
        above = x >= float(limits.max)
        inside = np.where(above | np.isnan(x), 0.0, np.maximum(x, float(limits.min)))
        return np.where(above, dtype.type(limits.max), inside.astype(dtype))

    return to_integer
