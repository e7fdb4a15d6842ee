"""What nvcc makes of a CUDA source for a GPU that is not here, kernel by kernel."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastgan.benchmarks import cuda_build

from fastgan.errors import RunError


@dataclasses.dataclass(frozen=True)
class Code:
    """Of a kernel in one of its instances.

    Attributes:
        threads: most that a block may have.
        parameters: bytes of each.
        registers: of a thread.
        stack: bytes of local memory of a thread, spilled registers among them.
        spills: instructions that move anything to or from local memory.
        barriers: of a block.
        shared: bytes of shared memory that the kernel has whatever the launch says.
        fused: multiplications and additions in one instruction, float32.
        products: of small matrices, on tensor cores.
        loads, stores: of global memory, by the bytes that a thread moves.
        copies: from global to shared memory, likewise.
        shared_loads, shared_stores: of shared memory, likewise.
    """

    threads: int
    parameters: list[int]
    registers: int
    stack: int
    spills: int
    barriers: int
    shared: int
    fused: int
    products: int
    loads: dict[int, int]
    stores: dict[int, int]
    copies: dict[int, int]
    shared_loads: dict[int, int]
    shared_stores: dict[int, int]


def sources() -> list[Path]:
    """All that there are."""
    return sorted(cuda_build.FOLDER.glob("*.cu"))


def key(source: Path, target: str) -> str:
    """Of all that the code depends on, but for the compiler with its headers."""
    made_of = [flag for flag in cuda_build.nvcc_flags() if not flag.startswith("-cudart")]
    texts = [path.name + "\n" + path.read_text() for path in _with_includes(source)]
    return hashlib.sha256("\n".join([target, *made_of, *texts]).encode()).hexdigest()[:20]


_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def _with_includes(source: Path) -> list[Path]:
    found = [source]
    for path in found:
        beside = (path.parent / name for name in _INCLUDE.findall(path.read_text()))
        found += [p for p in beside if p not in found and p.exists()]
    return sorted(found)


def compile_source(source: Path, target: str) -> dict[str, Code]:
    """Its kernels by their readable names, compiled for ``target``, as ``sm_90``.

    Raises:
        RunError: nvcc refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "cubin"
        architecture = f"-gencode=arch=compute_{target[3:]},code={target}"
        command = ["nvcc", *cuda_build.nvcc_flags(), architecture, "-Xptxas=-v", "-cubin"]
        done = subprocess.run(
            [*command, str(source), "-o", str(cubin)], capture_output=True, text=True
        )
        said = done.stdout + done.stderr
        if done.returncode:
            first = next((line for line in said.splitlines() if "error" in line), said)
            raise RunError(f"{source.name} does not compile for {target}: {first}")
        tool = cuda_build.cuobjdump()
        assert tool
        sass, elf = (cuda_build.run([tool, how, str(cubin)]) for how in ("-sass", "-elf"))
    return {readable(symbol): code for symbol, code in _read(said, sass, elf).items()}


_USAGE = re.compile(
    r"Function properties for (\S+)\n\s*(\d+) bytes stack frame.*\n"
    r".*Used (\d+) registers(?:, used (\d+) barriers)?(.*)"
)
_STATIC = re.compile(r"(\d+) bytes smem")
_FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_INFO = re.compile(r"^\.nv\.info\.(\S+)$", re.MULTILINE)
_THREADS = re.compile(r"EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s+(\w+) (\w+) (\w+)")
_PARAMETER = re.compile(r"Ordinal : (\w+)\s+Offset\s+: \w+\s+Size\s+: (\w+)")


def _read(said: str, sass: str, elf: str) -> dict[str, Code]:
    counts = {
        name: collections.Counter(_INSTRUCTION.findall(text))
        for name, text in _parts(_FUNCTION, sass)
    }
    infos = dict(_parts(_INFO, elf))
    found = {}
    for name, stack, registers, barriers, rest in _USAGE.findall(said):
        threads = _THREADS.search(infos[name])
        if threads is None:
            raise RunError(f"{readable(name)} has no launch bounds")
        sizes = {int(i, 0): int(size, 0) for i, size in _PARAMETER.findall(infos[name])}
        static = _STATIC.search(rest)
        names = counts[name]
        found[name] = Code(
            int(threads[1], 0) * int(threads[2], 0) * int(threads[3], 0),
            [size for _, size in sorted(sizes.items())],
            int(registers),
            int(stack),
            _count(names, ("LDL", "STL")),
            int(barriers or 0),
            int(static[1]) if static else 0,
            _count(names, ("FFMA", "FFMA2")),
            _count(names, ("HMMA",)),
            _widths(names, ("LDG", "LD")),
            _widths(names, ("STG", "ST")),
            _widths(names, ("LDGSTS",)),
            _widths(names, ("LDS", "LDSM")),
            _widths(names, ("STS",)),
        )
    return found


def _parts(heading: re.Pattern[str], text: str) -> Iterable[tuple[str, str]]:
    """What follows each heading, with what the heading names."""
    parts = heading.split(text)[1:]
    return zip(parts[::2], parts[1::2], strict=True)


def _count(names: collections.Counter[str], kinds: Sequence[str]) -> int:
    return sum(n for name, n in names.items() if name.split(".")[0] in kinds)


def _widths(names: collections.Counter[str], kinds: Sequence[str]) -> dict[int, int]:
    found: collections.Counter[int] = collections.Counter()
    for name, n in names.items():
        kind, *modifiers = name.split(".")
        if kind in kinds:
            bits = (int(m.lstrip("US")) for m in modifiers if m.lstrip("US").isdecimal())
            found[next((b for b in bits if b in (8, 16, 32, 64, 128, 256)), 32) // 8] += n
    return dict(sorted(found.items()))


_DTYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32"}
_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Of a product on tensor cores: the dtype, the passes, the tile, the elements of each operand that
# are copied at once, and whether stages of the sum are whole.
_PRODUCT = re.compile(
    r"<(\w+), (\d), (?:fastgan::)?MmaTile<(\d+), (\d+), [^>]*>, "
    r"(?:fastgan::)?Widths<(\d+), (\d+), (true|false)> ?>"
)
_PRECISIONS = {("fp32", "1"): "tf32", ("fp32", "3"): "tf32x3"}
_SEGMENT_BYTES = 16


def readable(symbol: str) -> str:
    """``bn_stats<bf16, 8>`` of a mangled name.

    A product on tensor cores is named as :class:`Product` says.
    """
    name = cuda_build.short_name(symbol)
    for dtype, short in _DTYPES.items():
        name = re.sub(rf"\b{dtype}\b", short, name)
    name = _PRODUCT.sub(_readable_product, name)
    head, bracket, rest = name.partition("<")
    return head.removesuffix("_kernel") + bracket + rest


def _readable_product(found: re.Match[str]) -> str:
    dtype, passes, rows, columns, *widths, whole = found.groups()
    most = str(_SEGMENT_BYTES // _SIZES[dtype])
    parts = [_PRECISIONS.get((dtype, passes), dtype), f"{rows}x{columns}"]
    if [*widths, whole] != [most, most, "true"]:
        parts.append("+".join(widths))
    return f"<{', '.join(parts)}>"


@dataclasses.dataclass(frozen=True)
class Product:
    """An instance of a product on tensor cores.

    Its name is ``conv_fprop<bf16, 128x128>`` where both operands are copied 16 bytes at a time and
    taps end with a stage of the sum. Else it has the elements that are copied at once, as
    ``conv_fprop<tf32x3, 64x64, 1+4>``, and ``4+4`` where only taps do not end so.

    Attributes:
        rows, columns: of a tile.
        wide: how many of the two operands are copied 16 bytes at a time.
    """

    rows: int
    columns: int
    wide: int


_NAME = re.compile(r"conv_\w+<\w+, (\d+)x(\d+)(?:, (\d+)\+(\d+))?>")


def product_of(kernel: str) -> Product | None:
    """What its readable name says; None where it is no product."""
    found = _NAME.fullmatch(kernel)
    if found is None:
        return None
    rows, columns, *widths = found.groups()
    return Product(int(rows), int(columns), sum(width != "1" for width in widths))


def stage_depth(dtype_bytes: int) -> int:
    """Elements of the sum that a product takes at a time, of which it takes whole stages."""
    text = (cuda_build.FOLDER / "conv.cuh").read_text()
    found = re.search(r"kStageBytes = (\d+);", text)
    if found is None:
        raise RunError("conv.cuh does not say what kStageBytes is")
    return int(found[1]) // dtype_bytes
