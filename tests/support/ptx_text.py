"""PTX text taken apart: the instructions of one kernel, with their operands resolved."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from support.ptx_memory import PRED, U8, U16, U32, U64, PtxError, Region

TYPES = {
    "pred": PRED,
    "b8": U8,
    "u8": U8,
    "s8": np.dtype("i1"),
    "b16": U16,
    "u16": U16,
    "s16": np.dtype("i2"),
    "b32": U32,
    "u32": U32,
    "s32": np.dtype("i4"),
    "f32": np.dtype("f4"),
    "b64": U64,
    "u64": U64,
    "s64": np.dtype("i8"),
    "f64": np.dtype("f8"),
    # NumPy computes with none of these: see the formats in ptx_instructions.
    "f16": U16,
    "bf16": U16,
    "f16x2": U32,
    "bf16x2": U32,
    "tf32": U32,
}
UNSIGNED = {1: U8, 2: U16, 4: U32, 8: U64}

# The values of a warp's registers: one for each lane, or a single one for all lanes.
Registers = list[np.ndarray]
Reader = Callable[[Registers], np.ndarray]


@dataclass(frozen=True)
class Register:
    """A place among the registers; ``slot`` None takes what is written to ``_``."""

    slot: int | None
    storage: np.dtype

    def reader(self, dtype: np.dtype) -> Reader:
        slot, storage = self.slot, self.storage
        if storage.itemsize == dtype.itemsize:

            def read(registers: Registers) -> np.ndarray:
                value = registers[slot]
                return value if value.dtype is dtype else value.view(dtype)
        else:
            # Only the low bits are meant, as where a byte of a wider register is stored.
            bits = UNSIGNED[dtype.itemsize]

            def read(registers: Registers) -> np.ndarray:
                return registers[slot].view(storage).astype(bits).view(dtype)

        return read


@dataclass(frozen=True)
class Immediate:
    """A number in the text, or what a name stands for."""

    bits: int

    def reader(self, dtype: np.dtype) -> Reader:
        if dtype is PRED:
            value = np.array([self.bits != 0])
        else:
            mask = (1 << 8 * dtype.itemsize) - 1
            value = np.array([self.bits & mask], UNSIGNED[dtype.itemsize]).view(dtype)
        return lambda registers: value


@dataclass(frozen=True)
class Negated:
    """``!%p``."""

    register: Register

    def reader(self, dtype: np.dtype) -> Reader:
        read = self.register.reader(dtype)
        return lambda registers: ~read(registers)


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Immediate
    offset: int

    def reader(self) -> Reader:
        """Reads 64-bit addresses; sums wrap in the width of the base."""
        narrow = isinstance(self.base, Register) and self.base.storage is U32
        read = self.base.reader(U32 if narrow else U64)
        if self.offset:
            start = read
            offset = Immediate(self.offset).reader(U32 if narrow else U64)([])

            def read(registers: Registers) -> np.ndarray:
                return start(registers) + offset

        if not narrow:
            return read
        base = read
        return lambda registers: base(registers).astype(U64)


@dataclass(frozen=True)
class Name:
    """A label or a parameter."""

    text: str


@dataclass(frozen=True)
class Group:
    """``{a, b}``, or the two results ``a|b``."""

    parts: tuple[Operand, ...]


Operand = Register | Immediate | Negated | Address | Name | Group


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@guard name.modifiers operands``."""

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | Negated | None
    text: str
    # Of the source that it was compiled from, and of the PTX.
    line: int
    text_line: int

    @property
    def opcode(self) -> str:
        return ".".join((self.name, *self.modifiers))

    @property
    def type(self) -> str:
        """The last modifier, which of most instructions names the type of the operands."""
        return self.modifiers[-1] if self.modifiers else ""

    def only(self, *known: str) -> None:
        """Raises where there is a modifier besides the type that is not ``known``."""
        for modifier in self.modifiers[:-1]:
            if modifier not in known:
                raise PtxError(f"unknown modifier .{modifier}")


class Parameter(NamedTuple):
    """Where the bytes of a parameter lie among those of all; ``b8`` ones are structs."""

    name: str
    type: str
    start: int
    size: int


@dataclass
class Text:
    """A kernel as it is written."""

    name: str
    parameters: list[Parameter]
    # That a block must have, and may have at most.
    threads: int | None
    most_threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    # What each register holds, by slot.
    storages: list[np.dtype] = field(default_factory=list)
    # Slots of %tid.x and the like.
    special: dict[str, int] = field(default_factory=dict)
    constants: list[Region] = field(default_factory=list)
    static_shared: int = 0
    local: int = 0


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_LINE = re.compile(r"^[^\S\n]*\.loc\s+\d+\s+(\d+)[^\n]*$", re.M)
_BRACE = re.compile(r"[{}]")
_ENTRY = re.compile(r"(?:\.(?:visible|weak)\s+)?\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{")
_FUNCTION = re.compile(r"(?:\.(?:visible|weak|extern)\s+)?\.func\b[^{;]*([{;])")
_OUTERMOST = re.compile(f"{_ENTRY.pattern}|{_FUNCTION.pattern}")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s[^,]*?([\w$]+)\s*(?:\[(\d+)\])?\s*(?:,|$)"
)
_THREADS = re.compile(r"\.(reqntid|maxntid)((?:\s*,?\s*\d+){1,3})")
_VARIABLE = re.compile(
    r"\.(global|const|shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)"
    r"(\s*\[\s*\d*\s*\])?\s*(?:=\s*(\{[^}]*\}|[^;]*))?;"
)
_STATEMENT = re.compile(r"\s*(?:([$\w]+):(?!:)|([{}])|([^;]+);)")
_GUARD = re.compile(r"@(!?)(%?[\w$]+)\s+")
_DECLARED = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_ADDRESS = re.compile(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")

_SPECIAL = re.compile(r"%(laneid|warpid|(tid|ntid|ctaid|nctaid)\.[xyz])")


def parse(source: str, name: str | None = None) -> Text:
    """The kernel called ``name`` in ``source``, or its only one."""
    if name is not None:
        kernels = split(source)
        if name not in kernels:
            raise PtxError(f"no kernel {name} in the text")
        source = kernels[name]
    source = _LINE.sub(r".loc \1;", _without_comments(source))
    entries = list(_ENTRY.finditer(source))
    if len(entries) != 1:
        raise PtxError(f"{len(entries)} kernels in the text to choose from, not one")
    (entry,) = entries
    limits = {
        kind: math.prod(map(int, re.findall(r"\d+", sizes)))
        for kind, sizes in _THREADS.findall(entry.group(3))
    }
    text = Text(
        entry.group(1),
        _parameters(entry.group(2) or ""),
        limits.get("reqntid"),
        limits.get("maxntid", 1024),
    )
    body = source[entry.end() : _closing(source, entry.end())]
    first_line = source.count("\n", 0, entry.end()) + 1
    _Parser(text, _variables(text, source)).read(body, first_line)
    return text


def _without_comments(source: str) -> str:
    """With as many lines as before."""
    return _COMMENT.sub(lambda comment: "\n" * comment.group().count("\n"), source)


def split(source: str) -> dict[str, str]:
    """By the name of each kernel in ``source`` a text with it and what all kernels share."""
    source = _without_comments(source)
    shared, start = [], 0
    kernels = {}
    while found := _OUTERMOST.search(source, start):
        shared.append(source[start : found.start()])
        start = found.end()
        if found.group().endswith("{"):
            start = _closing(source, start) + 1
        name = found.group(1)
        if name:
            kernels[name] = source[found.start() : start]
    head = "".join([*shared, source[start:]])
    return {name: f"{head}\n{text}\n" for name, text in kernels.items()}


def _parameters(text: str) -> list[Parameter]:
    parameters, start = [], 0
    for align, type_name, name, count in _PARAMETER.findall(text):
        item = TYPES[type_name].itemsize
        start = _aligned(start, int(align or item))
        parameters.append(Parameter(name, type_name, start, int(count or 1) * item))
        start += parameters[-1].size
    return parameters


def _aligned(size: int, align: int) -> int:
    return -(-size // align) * align


def _closing(source: str, start: int) -> int:
    depth = 1
    for brace in _BRACE.finditer(source, start):
        depth += 1 if brace.group() == "{" else -1
        if not depth:
            return brace.start()
    raise PtxError("the kernel's last brace is missing")


def _variables(text: Text, source: str) -> dict[str, int]:
    """Addresses of the variables; those in shared memory come in order, the sizeless one last."""
    addresses = {parameter.name: parameter.start for parameter in text.parameters}
    dynamic = []
    for space, align, type_name, name, count, values in _VARIABLE.findall(source):
        dtype = TYPES[type_name]
        align = int(align or dtype.itemsize)
        digits = count.strip(" []")
        size = int(digits or 1) * dtype.itemsize
        if space == "shared" and count and not digits:
            dynamic.append(name)
        elif space == "shared":
            addresses[name] = _aligned(text.static_shared, align)
            text.static_shared = addresses[name] + size
        elif space == "local":
            addresses[name] = _aligned(text.local, align)
            text.local = addresses[name] + size
        else:
            data = np.zeros(size // dtype.itemsize, dtype)
            numbers = [
                _number(v.strip(), dtype) for v in values.strip("{} \n").split(",") if v.strip()
            ]
            data.view(UNSIGNED[dtype.itemsize])[: len(numbers)] = numbers
            # What one kernel wrote there another would not see: each has its own.
            data.flags.writeable = False
            addresses[name] = data.ctypes.data
            text.constants.append(Region(data.ctypes.data, data.view(np.uint8)))
    text.static_shared = _aligned(text.static_shared, 16)
    addresses.update(dict.fromkeys(dynamic, text.static_shared))
    return addresses


def _number(text: str, dtype: np.dtype) -> int:
    """The bits of a number that a variable starts with."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return int(text[2:], 16)
    if not _INTEGER.fullmatch(text):
        raise PtxError(f"a variable starts with {text}, which is not a number")
    return int(text.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)


class _Scope:
    """The registers declared between two braces."""

    def __init__(self) -> None:
        self.registers: dict[str, Register] = {}
        # What %name<count> declared: any register of that name with a number.
        self.families: dict[str, np.dtype] = {}


class _Parser:
    """Reads the statements of one kernel into ``text``."""

    def __init__(self, text: Text, addresses: dict[str, int]):
        self._text = text
        self._addresses = addresses
        self._scopes = [_Scope()]
        self._line = self._text_line = 0
        # The labels that a brx.idx goes to, by the name of their list.
        self._targets: dict[str, tuple[Name, ...]] = {}

    def read(self, body: str, first_line: int) -> None:
        at = before = 0
        self._text_line = first_line
        body = body.rstrip()
        while at < len(body):
            statement = _STATEMENT.match(body, at)
            if statement is None:
                raise PtxError(f"cannot read: {body[at : at + 80].strip()}")
            at = statement.end()
            begins = statement.start(statement.lastindex)
            self._text_line += body.count("\n", before, begins)
            before = begins
            label, brace, rest = statement.groups()
            if label:
                last = label
                self._text.labels[label] = len(self._text.instructions)
            elif brace == "{":
                self._scopes.append(_Scope())
            elif brace == "}":
                self._scopes.pop()
            elif rest.startswith(".loc "):
                self._line = int(rest.split()[1])
            elif rest.startswith(".reg"):
                self._declare(rest)
            elif rest.startswith(".branchtargets"):
                names = rest.removeprefix(".branchtargets").split(",")
                self._targets[last] = tuple(Name(name.strip()) for name in names)
            elif not rest.startswith("."):
                instruction = self._instruction(" ".join(rest.split()))
                if instruction.name == "brx":
                    self._choose(instruction)
                else:
                    self._text.instructions.append(instruction)

    def _choose(self, instruction: Instruction) -> None:
        """A ``brx.idx`` becomes a branch for each of its labels, and one for no label."""
        index, name = instruction.operands
        if name.text not in self._targets:
            raise PtxError(f"no labels, in: {instruction.text}")
        choices = [(index, Immediate(i), to) for i, to in enumerate(self._targets[name.text])]
        for operands in (*choices, ()):
            self._text.instructions.append(replace(instruction, operands=operands))

    def _declare(self, statement: str) -> None:
        type_name, names = _DECLARED.fullmatch(statement).groups()
        scope = self._scopes[-1]
        for declared in names.split(","):
            name, numbered, _ = declared.strip().partition("<")
            if numbered:
                scope.families[name] = self._storage(type_name)
            else:
                scope.registers[name] = self._new(self._storage(type_name))

    def _storage(self, type_name: str) -> np.dtype:
        dtype = TYPES[type_name]
        return dtype if dtype is PRED else UNSIGNED[dtype.itemsize]

    def _new(self, storage: np.dtype) -> Register:
        self._text.storages.append(storage)
        return Register(len(self._text.storages) - 1, storage)

    def _instruction(self, text: str) -> Instruction:
        rest = text
        guard = None
        match = _GUARD.match(rest)
        if match:
            guard = self._register(match.group(2))
            if match.group(1):
                guard = Negated(guard)
            rest = rest[match.end() :]
        opcode, _, operands = rest.partition(" ")
        name, *modifiers = opcode.split(".")
        try:
            parsed = tuple(self._operand(o) for o in _split(operands))
        except PtxError as error:
            raise PtxError(f"{error}, in: {text}") from None
        return Instruction(name, tuple(modifiers), parsed, guard, text, self._line, self._text_line)

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Group(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            match = _ADDRESS.fullmatch(text)
            if match is None:
                raise PtxError(f"cannot read the address {text}")
            base, offset = match.groups()
            return Address(self._operand(base), int(offset or "0", 0))
        if "|" in text:
            return Group(tuple(self._operand(part.strip()) for part in text.split("|")))
        if text.startswith("!"):
            return Negated(self._register(text[1:]))
        if text[:2] in ("0f", "0F", "0d", "0D"):
            return Immediate(int(text[2:], 16))
        if _INTEGER.fullmatch(text):
            return Immediate(int(text.rstrip("U"), 0))
        if text == "_":
            return Register(None, U32)
        if text in self._addresses:
            return Immediate(self._addresses[text])
        return self._known(text) or Name(text)

    def _register(self, name: str) -> Register:
        found = self._known(name)
        if found is None:
            raise PtxError(f"no register {name} is declared")
        return found

    def _known(self, name: str) -> Register | None:
        """The innermost register of that name."""
        if _SPECIAL.fullmatch(name):
            outermost = self._scopes[0].registers
            if name not in outermost:
                outermost[name] = self._new(U32)
                self._text.special[name] = outermost[name].slot
            return outermost[name]
        family = name.rstrip("0123456789")
        for scope in reversed(self._scopes):
            if name not in scope.registers and family != name and family in scope.families:
                scope.registers[name] = self._new(scope.families[family])
            if name in scope.registers:
                return scope.registers[name]
        return None


def _split(operands: str) -> list[str]:
    """The parts between the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(operands):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and not depth:
            parts.append(operands[start:i].strip())
            start = i + 1
    rest = operands[start:].strip()
    return [*parts, rest] if rest else parts
