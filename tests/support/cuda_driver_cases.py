"""The toys of ``cuda_driver_toys.cu`` run as PTX, a case by each name in the command line.

A program, see :mod:`support.ptx_runs`, because torch brings a CUDA runtime of its own. No name
here may import it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
from support.cuda_build import TOYS, build_library
from support.cuda_driver import A100, H100, Running, in_kernel, running_cuda
from support.ptx_launches import Launch
from support.ptx_runs import ORDERS, Edit, Outcome, serve, without

# A unit in the last place.
EPS = {"float32": 2**-23, "bfloat16": 2**-8, "float16": 2**-10}


def pointers(*arrays: np.ndarray) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(array.ctypes.data) for array in arrays]


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest, of finite numbers."""
    bits = values.astype(np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_tf32(values: np.ndarray) -> np.ndarray:
    """The nearest with 10 bits of mantissa, ties away from zero."""
    return (values.view(np.uint32) + 0x1000 & 0xFFFFE000).astype(np.uint32).view(np.float32)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def listed(launches: list[Launch]) -> list[list[object]]:
    return [[x.name, list(x.grid), list(x.block), x.shared, x.stream] for x in launches]


def functions(dtype: str, order: str, size: int = 1000) -> Outcome:
    exact = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}[dtype]
    x = 3 * random(size)
    x = as_bfloat16(x) if dtype == "bfloat16" else x.astype(exact)
    y = np.full(size + 24, 7, exact)
    offset = random(5)
    for given in (x, offset):
        given.flags.writeable = False
    with running_cuda(build_library(TOYS), warp_order=order) as run:
        run.give(x, y, offset)
        error = run.library.run_functions(
            list(EPS).index(dtype),
            *pointers(x, y),
            ctypes.c_int64(size),
            5,
            ctypes.c_float(0.75),
            *pointers(offset),
        )
    i = np.arange(size)
    number = from_bfloat16(x) if dtype == "bfloat16" else x
    v = number.astype(float) * 0.75 + offset.astype(float)[i % 5] + np.array([0, 0.25, -0.5])[i % 3]
    small = np.exp(-np.abs(v))
    want = np.tanh(v) + np.log1p(small) + 1 / (1 + small) + np.sqrt(np.abs(v))
    want += 1 / np.sqrt(1 + v * v) + np.log(2 + small) + np.array([0.5, 1.5, 2.5, -1])[i % 4]
    got = from_bfloat16(y[:size]) if dtype == "bfloat16" else y[:size].astype(float)
    return {
        "returned": error,
        "error": float(np.abs(got - want).max() / 8 / EPS[dtype]),
        "kept": bool((y[size:] == 7).all()),
        "launches": listed(run.launches),
        "argument": len(run.launches[0].arguments[2]),
    }


def row_sums(
    order: str,
    edit: Edit | None = None,
    *,
    rows: int = 5,
    short: int = 0,
    threads: int = 64,
    more_shared: int = 0,
    act: Callable[[Running], object] = lambda run: None,
) -> Outcome:
    """Whole numbers, whose sums are exact in any order."""
    x = np.arange(rows * threads * 4, dtype=np.float32) % 37
    out = np.full(rows, np.nan, np.float32)
    with running_cuda(build_library(TOYS), warp_order=order, edit_ptx=edit) as run:
        run.give(x[: x.size - short], out)
        did = act(run)
        returned = run.library.run_row_sums(
            *pointers(x, out), rows, threads, ctypes.c_size_t(more_shared), ctypes.c_void_p(9)
        )
        last = run.library.last_error()
        again = run.library.last_error()
    return {
        "returned": returned,
        "last": [last, again],
        "did": did,
        "same": bool(np.array_equal(out, x.reshape(rows, 4 * threads).sum(1))),
        "launches": listed(run.launches),
        "instructions": sum(launch.instructions for launch in run.launches),
    }


def each_barrier(order: str) -> Outcome:
    """Whether the sums are right without each barrier, or without those of another kernel."""
    edits = [in_kernel("row_sums", without("bar.sync", slice(i, i + 1))) for i in (0, 1)]
    edits.append(in_kernel("functions<float>", without("bar.sync")))
    return {"same": [row_sums(order, edit)["same"] for edit in edits]}


def halves(order: str) -> Outcome:
    x = as_bfloat16(random(2 * 64 * 8))
    y, z = np.zeros_like(x), np.zeros(x.size, np.float16)
    with running_cuda(build_library(TOYS), warp_order=order) as run:
        run.give(x, y, z)
        run.library.run_halves(*pointers(x, y, z), 2)
    want = as_bfloat16(from_bfloat16(x) * np.float32(1.01))
    return {
        "same": bool(np.array_equal(y, want)),
        "converted": bool(np.array_equal(z, from_bfloat16(x).astype(np.float16))),
        "wide": "ld.global.v4" in run.launches[0].ptx,
    }


def rounded() -> Outcome:
    """Against exact fractions, near halfway cases too."""
    x = random(128, 3)
    x[:32, 0] = 1 + 2.0**-12
    x[:32, 1] = 1 + np.arange(32) * 2.0**-12
    x[:16, 2] = 2.0**-30
    x[16:32, 2] = -(2.0**-50)
    y = np.zeros((128, 8), np.float32)
    with running_cuda(build_library(TOYS)) as run:
        run.give(x, y)
        run.library.run_rounded(*pointers(x, y), 2)
    a, b, c = x.T
    wrong = {
        "mul, add": y[:, 1] != a * b + c,
        "div": y[:, 2] != a / b,
        "sqrt": y[:, 3] != np.sqrt(np.abs(a)),
    }
    exact = [[Fraction(float(v)) for v in row] for row in x]
    products = [p * q for p, q, _ in exact]
    sums = [p * q + r for p, q, r in exact]
    wrong["fma"] = [not _nearest(v, s) for v, s in zip(y[:, 0], sums, strict=True)]
    down = [p + r for p, _, r in exact]
    wrong["down"] = [not _next(v, s, -np.inf) for v, s in zip(y[:, 4], down, strict=True)]
    wrong["up"] = [not _next(v, s, np.inf) for v, s in zip(y[:, 5], products, strict=True)]
    wrong["to zero"] = [
        not _next(v, s, -np.inf if s > 0 else np.inf) for v, s in zip(y[:, 6], sums, strict=True)
    ]
    double = [float(s) - float(p) for s, p in zip(sums, products, strict=True)]
    wrong["double"] = y[:, 7] != np.array(double, np.float32)
    return {"wrong": {name: int(np.sum(w)) for name, w in wrong.items() if np.any(w)}}


def _nearest(value: np.float32, exact: Fraction) -> bool:
    there = abs(Fraction(float(value)) - exact)
    for to in (-np.inf, np.inf):
        other = abs(Fraction(float(np.nextafter(value, np.float32(to)))) - exact)
        even = value.view(np.uint32) & 1 == 0
        if other < there or (other == there and not even):
            return False
    return True


def _next(value: np.float32, exact: Fraction, side: float) -> bool:
    """Whether ``value`` is on that side of the exact number, and the last that is."""
    further = Fraction(float(np.nextafter(value, np.float32(-side))))
    value = Fraction(float(value))
    return value <= exact < further if side < 0 else further < exact <= value


def integers() -> Outcome:
    rng = np.random.default_rng(1)
    x = rng.integers(-(2**63), 2**63, (128, 2), np.int64)
    x[:40, 1] >>= 40
    x[:4] = [[5, 0], [-7, 2], [-(2**31), -1], [2**31, 2**31 - 1]]
    y = np.zeros((128, 8), np.int64)
    with running_cuda(build_library(TOYS)) as run:
        run.give(x, y)
        run.library.run_integers(*pointers(x, y), 2)
    want = np.array([_integers(int(a), int(b)) for a, b in x], np.int64)
    return {"wrong": np.unique(np.argwhere(y != want)[:, 1]).tolist()}


def _integers(a: int, b: int) -> list[int]:
    def signed(v: int, bits: int = 32) -> int:
        v &= (1 << bits) - 1
        return v - (1 << bits) if v >> bits - 1 else v

    def quotient(p: int, q: int) -> int:
        return abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)

    low, high = a & 0xFFFFFFFF, b & 0xFFFFFFFF
    both = low | high << 32
    picked = sum((both >> 8 * byte & 255) << 8 * i for i, byte in enumerate((1, 4, 2, 5)))
    s, t = signed(low), signed(high)
    return [
        quotient(a, b) if b else 0,
        a - b * quotient(a, b) if b else 0,
        picked << 1,
        (high << 13 & 0xFFFFFFFF | low >> 19) ^ int(f"{low:032b}"[::-1], 2),
        bin(low).count("1") * 100 + 32 - high.bit_length(),
        quotient(s, 7) + t - 10 * quotient(t, 10),
        (low >> 5 & 0x1FF) + (signed(high << 20) >> 24) & 0xFFFFFFFF,
        a * b >> 64,
    ]


def chosen(order: str) -> Outcome:
    """Blocks and grids of several dimensions, too."""
    grid, block, most = (3, 2), (8, 4, 2), 11
    x = np.random.default_rng(2).integers(0, 9, 3 * 2 * 64).astype(np.int32)
    y = np.zeros_like(x)
    with running_cuda(build_library(TOYS), warp_order=order) as run:
        run.give(x, y)
        run.library.run_chosen(*pointers(x, y), most, *grid, *block)
    i = np.arange(x.size)
    seen = np.arange(8) ** 2 + most
    ways = [most * 3, i // 3, 0, seen[i % 8], 17 - i, i % 5 * most, -i, i ^ most]
    v = np.choose(np.minimum(x, 7), [np.broadcast_to(w, i.shape) for w in ways])
    v = np.where(x > 7, x, v)
    want = np.where(x == 2, -5, v + seen[v & 7])
    return {"same": bool(np.array_equal(y, want)), "launches": listed(run.launches)}


def products(
    dtype: str, order: str, edit: Edit | None = None, moved: bool = True, k: int = 168
) -> Outcome:
    """Against the sums in float64; tiles stick out at every end."""
    m, n = 48, 80
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal(shape, np.float32) for shape in ((m, k), (k, n)))
    c = np.full((m + 1, n), np.nan, np.float32)
    narrow = {"float32": np.copy, "bfloat16": as_bfloat16, "float16": np.float16}[dtype]
    widen = {"float32": as_tf32, "bfloat16": from_bfloat16, "float16": np.float64}[dtype]
    given = narrow(a), np.ascontiguousarray(narrow(b).T if dtype == "float32" else narrow(b))
    with running_cuda(
        build_library(TOYS), warp_order=order, edit_ptx=edit, count_conflicts=True
    ) as run:
        run.give(*given, c)
        returned = run.library.run_products(
            list(EPS).index(dtype), moved, *pointers(*given, c), m, n, k
        )
    a, b = (widen(narrow(x)).astype(float) for x in (a, b))
    (launch,) = run.launches
    loaded = [x for x in launch.shared_accesses if x.opcode.startswith("ldmatrix")]
    copied = [x for x in launch.shared_accesses if x.opcode.startswith("cp.async")]
    return {
        "returned": returned,
        # A step that rounds a sum adds half a unit of its last place at most.
        "error": float(np.abs(c[:m] - a @ b).max() / np.abs(a @ b).max() / EPS["float32"]),
        "kept": bool(np.isnan(c[m]).all()),
        "transposed": any(".trans" in x.opcode for x in loaded),
        "loads": sum(x.accesses for x in loaded),
        "in loop": max(x.accesses for x in loaded if x.in_loop),
        "wavefronts a load": sorted({x.wavefronts / x.accesses for x in loaded}),
        "copies": sum(x.accesses for x in copied),
        "conflicts of copies": sum(x.conflicts for x in copied),
    }


def without_waiting(order: str) -> Outcome:
    """Of the products without the waits, and without the barriers."""
    edits = [without(r"cp\.async\.wait_group"), without("bar.sync")]
    return {"errors": [products(dtype, order, edit)["error"] for dtype in EPS for edit in edits]}


def pieces() -> Outcome:
    x, y, z = random(96), random(96, 2), np.zeros(96, np.float32)
    with running_cuda(build_library(TOYS), count_conflicts=True) as run:
        # A copy of zeros does not read.
        run.give(x, y[:95], z)
        run.library.run_pieces(*pointers(x, y, z), 96)
    i = np.arange(96)
    x[i % 3 == 0] = 0
    y[i % 3 == 2] = 0
    want = x + 10 * y[:, 0] + 100 * y[:, 1]
    accesses = run.launches[0].shared_accesses
    return {
        "close": bool(np.allclose(z, want, rtol=1e-6)),
        "counted": [[x.opcode, x.accesses, x.wavefronts, x.least] for x in accesses],
    }


def grids() -> Outcome:
    """Up to the limit and beyond it."""
    with running_cuda(build_library(TOYS), execute=False) as run:
        nowhere = ctypes.c_void_p(4096)
        returned = [
            run.library.run_chosen(nowhere, nowhere, 0, *grid, 32, 1, z)
            for grid, z in (((1, 65535), 1), ((1, 65536), 1), ((2**31, 1), 1), ((1, 1), 32))
        ]
        returned.append(run.library.run_chosen(nowhere, nowhere, 0, 1, 1, 1, 1, 65))
    return {"returned": returned, "grids": [launch.grid for launch in run.launches]}


def read_only() -> Outcome:
    x, out = np.zeros(256, np.float32), np.zeros(1, np.float32)
    out.flags.writeable = False
    with running_cuda(build_library(TOYS)) as run:
        run.give(x, out)
        run.library.run_row_sums(*pointers(x, out), 1, 64, 0, None)
    return {}


def recorded() -> Outcome:
    """Of any size, at addresses where there is nothing."""
    with running_cuda(build_library(TOYS), execute=False, device=H100) as run:
        count = run.library.multiprocessors()
        run.library.run_row_sums(
            ctypes.c_void_p(4096), ctypes.c_void_p(2**40), 2**31 - 1, 256, 0, None
        )
    (launch,) = run.launches
    return {
        "multiprocessors": count,
        "launches": listed(run.launches),
        "arguments": launch.arguments,
        "instructions": launch.instructions,
    }


def outside() -> Outcome:
    """After the context there is nothing that would run what is launched."""
    x = np.zeros(256, np.float32)
    with running_cuda(build_library(TOYS)) as run:
        library = run.library
    return {"returned": library.run_row_sums(*pointers(x, x), 1, 64, 0, None)}


def devices() -> Outcome:
    with running_cuda(build_library(TOYS), device=A100) as run:
        chosen = [run.library.choose_device(device) for device in (0, 1, -1)]
        return {"chosen": chosen, "multiprocessors": run.library.multiprocessors()}


def cases() -> Iterator[tuple[str, Callable[[], Outcome]]]:
    for order in ORDERS:
        for dtype in EPS:
            yield (
                f"functions {dtype} {order}",
                lambda dtype=dtype, order=order: functions(dtype, order),
            )
            yield (
                f"products {dtype} {order}",
                lambda dtype=dtype, order=order: products(dtype, order),
            )
        yield f"without waiting {order}", lambda order=order: without_waiting(order)
        yield f"row sums {order}", lambda order=order: row_sums(order)
        yield f"without a barrier {order}", lambda order=order: each_barrier(order)
        yield f"halves {order}", lambda order=order: halves(order)
        yield f"chosen {order}", lambda order=order: chosen(order)
    yield "as they come", lambda: products("float16", "ascending", moved=False)
    yield "pieces", pieces
    yield "rounded", rounded
    yield "integers", integers
    yield "out of bounds", lambda: row_sums("ascending", short=4)
    yield "grids", grids
    yield "read only", read_only
    yield "recorded", recorded
    yield "outside", outside
    yield "devices", devices
    yield "no rows", lambda: row_sums("ascending", rows=0)
    yield "too many threads", lambda: row_sums("ascending", rows=1, threads=2048)
    yield "against launch bounds", lambda: row_sums("ascending", rows=1, threads=512)
    yield "much shared memory", lambda: row_sums("ascending", rows=1, more_shared=90000)
    yield (
        "shared memory allowed",
        lambda: row_sums(
            "ascending",
            rows=1,
            more_shared=90000,
            act=lambda run: [run.library.allow_shared(n) for n in (100000, 163 * 1024 + 1)],
        ),
    )
    yield (
        "injected",
        lambda: row_sums("ascending", rows=1, act=lambda run: run.fail_next_launch(719)),
    )


if __name__ == "__main__":
    serve(dict(cases()))
