"""A stand-in for Triton's GPU driver: the launchers run as they are, and nothing runs on a GPU.

Within :func:`recorded` a kernel that is launched goes through Triton's own binder and
specialisation for a named target, and is written down instead of compiled. The tensors may be on
``torch.device("meta")``, so that launches of any size cost nothing. :func:`compile_kernel` then
compiles what was written down and reads the machine code.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from fastgan.kernels import common
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

from fastgan import gpu
from fastgan.errors import RunError

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MOST_PROGRAMS = (2**31 - 1, 2**16 - 1, 2**16 - 1)


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for, and what of it bounds a kernel.

    Attributes:
        name: of its instruction set, as ``sm_90``.
        device: whose figures these are.
        gpu: as Triton knows it.
        multiprocessors: their number.
        shared: bytes of shared memory that one block may have.
        shared_all: bytes of shared memory of a multiprocessor.
        flop_s: 16-bit matrix products, dense, in FLOP/s.
        bytes_s: bandwidth of the memory, in bytes/s.
    """

    name: str
    device: str
    gpu: GPUTarget
    multiprocessors: int
    shared: int
    shared_all: int
    flop_s: float
    bytes_s: float


TARGETS = {
    target.name: target
    for target in (
        Target(
            *("sm_80", "A100", GPUTarget("cuda", 80, 32), 108),
            *(163 * 1024, 164 * 1024, 312e12, 2.0e12),
        ),
        Target(
            *("sm_90", "H100 SXM", GPUTarget("cuda", 90, 32), 132),
            *(227 * 1024, 228 * 1024, 989e12, 3.35e12),
        ),
        Target(
            *("sm_100", "B200", GPUTarget("cuda", 100, 32), 148),
            *(227 * 1024, 228 * 1024, 2250e12, 8.0e12),
        ),
        Target(
            *("gfx942", "MI300X", GPUTarget("hip", "gfx942", 64), 304),
            *(64 * 1024, 64 * 1024, 1307e12, 5.3e12),
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Specialisation:
    """All that the machine code of a kernel depends on but for the compiler: what is compiled.

    Attributes:
        target: name of the target.
        module, name: of the kernel.
        signature: type of each argument.
        constexprs: of each that is constant, by its place, the value.
        attrs: what is known of the others, as their divisibility.
        options: those of the launch that are not the compiler's own.
    """

    target: str
    module: str
    name: str
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def kernel(self) -> JITFunction:
        found: JITFunction = getattr(importlib.import_module(self.module), self.name)
        return found

    def key(self) -> str:
        """The same wherever and by whichever version of Triton it is computed."""
        parts = [
            self.target,
            self.name,
            source_hash(self.kernel),
            list(self.signature.items()),
            [[list(path), repr(value)] for path, value in self.constexprs.items()],
            [[list(path), value] for path, value in self.attrs.items() if value],
            sorted(self.options.items()),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]

    def multiplies_matrices(self) -> bool:
        return any("tl.dot(" in text for text in sources(self.kernel).values())

    def constants(self) -> dict[str, Any]:
        """The constants by name, those of tuples left out."""
        names = list(self.signature)
        return {names[path[0]]: v for path, v in self.constexprs.items() if len(path) == 1}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: of what, on which grid, with which tensors.

    Attributes:
        tensors: of each tensor argument the shape and the size of an element.
        numbers: the other arguments that are not constant.
    """

    specialisation: Specialisation
    grid: tuple[int, int, int]
    tensors: dict[str, tuple[tuple[int, ...], int]]
    numbers: dict[str, Any]
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the code of a specialisation is like.

    Registers, stack and shared memory are the machine code's. Instructions are counted in it for
    AMD, and for NVIDIA in the PTX, of which each of these becomes one of the machine's.

    Attributes:
        registers: of a thread.
        stack: bytes of local memory of a thread, spilled registers among them.
        spills: instructions that spill a register or fetch it back.
        shared: bytes of shared memory of a block.
        matrix: matrix instructions by kind: ``mma``, ``wgmma``, ``tcgen05`` or ``mfma``.
        loads, stores: to and from global memory, by the bytes that a thread moves.
        copies: loads that go to shared memory directly, by the bytes that a thread moves; 0 is
            for those of whole tiles.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    matrix: dict[str, int]
    loads: dict[int, int]
    stores: dict[int, int]
    copies: dict[int, int]


class _Driver:
    """What Triton asks of a driver on the way to a launch."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target.gpu

    def get_current_device(self) -> str:
        # Kernels keep a binder for each device: that of one target must not serve another.
        return self._target.name

    def get_current_stream(self, device: object = None) -> int:
        return 0


class _Recorder:
    """In the place of a compiled kernel."""

    function = None
    packed_metadata = None

    def __init__(self, specialisation: Specialisation, launches: list[Launch]) -> None:
        self._specialisation = specialisation
        self._launches = launches

    def launch_metadata(self, *args: object) -> None:
        return None

    def run(self, x: int, y: int, z: int, *args: Any) -> None:
        # Stream, function, two kinds of metadata and two hooks come before the arguments.
        names = list(self._specialisation.signature)
        values = dict(zip(names, args[-len(names) :], strict=True))
        name, grid = self._specialisation.name, (x, y, z)
        if not all(0 < size <= most for size, most in zip(grid, _MOST_PROGRAMS, strict=True)):
            raise RunError(f"{name}: a grid of {x}x{y}x{z} programs cannot be launched")
        tensors = {n: v for n, v in values.items() if isinstance(v, Tensor)}
        distinct = {id(tensor): tensor for tensor in tensors.values()}
        self._launches.append(
            Launch(
                self._specialisation,
                grid,
                {n: (tuple(v.shape), v.dtype.itemsize) for n, v in tensors.items()},
                {n: v for n, v in values.items() if isinstance(v, (bool, int, float))},
                sum(tensor.numel() * tensor.dtype.itemsize for tensor in distinct.values()),
            )
        )


@contextlib.contextmanager
def recorded(target: Target) -> Iterator[list[Launch]]:
    """Within this context kernels are launched on ``target``, which means: written down.

    Raises:
        RunError: kernels are interpreted in this process.
    """
    if common.INTERPRETED:
        raise RunError("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled")
    launches: list[Launch] = []

    def instead(
        kernel: JITFunction,
        key: str,
        signature: dict[str, Any],
        device: object,
        constexprs: dict[tuple[int, ...], Any],
        options: Any,
        attrs: dict[tuple[int, ...], Any],
        warmup: bool,
    ) -> _Recorder:
        own = _default_options(target).__dict__
        chosen = {n: v for n, v in options.__dict__.items() if v != own[n]}
        specialisation = Specialisation(
            target=target.name,
            module=kernel.__module__,
            name=kernel.__name__,
            signature=signature,
            constexprs=constexprs,
            attrs=attrs,
            options=chosen,
        )
        return _Recorder(specialisation, launches)

    driver = triton.runtime.driver
    before = driver._active, JITFunction._do_compile, gpu.multiprocessors
    driver.set_active(_Driver(target))
    JITFunction._do_compile = instead
    gpu.multiprocessors = lambda device: target.multiprocessors
    try:
        yield launches
    finally:
        driver._active, JITFunction._do_compile, gpu.multiprocessors = before


@functools.cache
def _default_options(target: Target) -> Any:
    return make_backend(target.gpu).parse_options({})


@functools.cache
def sources(kernel: JITFunction) -> dict[str, str]:
    """What a kernel and those it calls compute: without comments, docstrings and places.

    Constants from outside of them have an entry each.
    """
    found: dict[str, str] = {}
    _add_source(kernel, found)
    return dict(sorted(found.items()))


@functools.cache
def source_hash(kernel: JITFunction) -> str:
    """Of :func:`sources`."""
    return hashlib.sha256(json.dumps(sources(kernel)).encode()).hexdigest()


def _add_source(kernel: JITFunction, found: dict[str, str]) -> None:
    name = f"{kernel.__module__}.{kernel.__name__}"
    if name in found:
        return
    tree = ast.parse(kernel.src)
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function) is not None:
        del function.body[0]
    found[name] = ast.unparse(tree)
    for node in ast.walk(tree):
        used = _resolve(node, kernel.fn.__globals__)
        if isinstance(used, JITFunction):
            if not used.__module__.startswith("triton."):
                _add_source(used, found)
        elif isinstance(used, triton.language.constexpr):
            assert isinstance(node, (ast.Name, ast.Attribute))
            found[f"{name}: {ast.unparse(node)}"] = repr(used.value)


def _resolve(node: ast.AST, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolve(node.value, names)
        return getattr(owner, node.attr, None) if inspect.ismodule(owner) else None
    return None


def compile_kernel(specialisation: Specialisation) -> Compiled:
    """Compile it, and read the machine code.

    Raises:
        RunError: the compiler refuses it.
    """
    target = TARGETS[specialisation.target]
    source = ASTSource(
        specialisation.kernel,
        specialisation.signature,
        specialisation.constexprs,
        specialisation.attrs,
    )
    try:
        compiled = triton.compile(source, target=target.gpu, options=specialisation.options)
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(f"{specialisation.name} does not compile: {text[-1]}") from error
    shared = compiled.metadata.shared
    if target.gpu.backend == "hip":
        return _read_amd(compiled.asm["amdgcn"], shared)
    return _read_nvidia(compiled.asm["ptx"], compiled.asm["cubin"], shared)


_PTX_MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_PTX_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[a-zA-Z_0-9:]+?)*?(?:\.v(\d))?\.[bfus](\d+)\s")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\],[^;]*?\], *(0x[0-9a-f]+|\d+)")
_PTX_BULK = re.compile(r"\bcp\.async\.bulk\.")


def _read_nvidia(ptx: str, cubin: bytes, shared: int) -> Compiled:
    """Disassembly takes as long as compilation, so it is left to where registers were spilled."""
    counts: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for what, vector, bits in _PTX_ACCESS.findall(ptx):
        counts[what][int(vector or 1) * int(bits) // 8] += 1
    for size in _PTX_COPY.findall(ptx):
        counts["cp"][int(size, 0)] += 1
    if bulk := len(_PTX_BULK.findall(ptx)):
        counts["cp"][0] = bulk
    matrix = collections.Counter(name.split(".")[0] for name in _PTX_MATRIX.findall(ptx))
    with _file(cubin) as path:
        usage = _tool("cuobjdump", "-res-usage", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack = int(found[1]), int(found[2])
    spills = 0
    if stack:
        code = machine_code(cubin)
        spills = sum(n for name, n in code.items() if name.split(".")[0] in ("LDL", "STL"))
    return Compiled(
        *(registers, stack, spills, shared, _sorted(matrix)),
        *(_sorted(counts[what]) for what in ("ld", "st", "cp")),
    )


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def machine_code(cubin: bytes) -> collections.Counter[str]:
    """The instructions of NVIDIA's machine code by name, as ``LDGSTS.E.BYPASS.128``."""
    with _file(cubin) as path:
        return collections.Counter(_INSTRUCTION.findall(_tool("cuobjdump", "-sass", path)))


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        yield file.name


def _tool(name: str, *args: str) -> str:
    found = subprocess.run([_TOOLS / name, *args], capture_output=True, text=True, check=True)
    return found.stdout + found.stderr


_AMD_ACCESS = re.compile(
    r"^\s*(?:global|buffer|flat)_(load|store)_(lds_)?"
    r"(dwordx4|dwordx3|dwordx2|dword|ushort|sshort|short|ubyte|sbyte|byte)",
    re.MULTILINE,
)
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


def _read_amd(assembly: str, shared: int) -> Compiled:
    def field(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE)
        assert found, name
        return int(found[1])

    matrix = collections.Counter(re.findall(r"^\s*v_(mfma)_", assembly, re.MULTILINE))
    counts: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for what, lds, size in _AMD_ACCESS.findall(assembly):
        width = _AMD_BYTES.get(size, 2 if "short" in size else 1)
        counts["copies" if lds else what + "s"][width] += 1
    return Compiled(
        registers=field("vgpr_count"),
        stack=field("private_segment_fixed_size"),
        # Scalar registers are spilled to lanes of vector registers, not to memory.
        spills=field("vgpr_spill_count"),
        shared=shared,
        matrix=_sorted(matrix),
        loads=_sorted(counts["loads"]),
        stores=_sorted(counts["stores"]),
        copies=_sorted(counts["copies"]),
    )


def _sorted(counts: collections.Counter[Any]) -> dict[Any, int]:
    return dict(sorted(counts.items()))


def occupancy(target: Target, registers: int, shared: int, warps: int) -> tuple[int, float]:
    """Blocks that a multiprocessor of NVIDIA's holds at a time, and its share of warps in use."""
    most_warps, most_blocks, file = 64, 32, 65536
    # Registers are given out to warps by 256, and each block has 1 KiB of shared memory reserved.
    warp = math.ceil(registers * 32 / 256) * 256
    # One of the four parts of a multiprocessor takes whole warps.
    by_registers = file // 4 // warp * 4 // warps
    by_shared = target.shared_all // (shared + 1024)
    blocks = min(by_registers, by_shared, most_warps // warps, most_blocks)
    return blocks, blocks * warps / most_warps
