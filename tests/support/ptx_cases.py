"""Triton kernels run as the PTX that they compile to, a case by each name in the command line.

Prints a line of JSON for each case. It is a program, because kernels are compiled only in a process
that does not interpret them (``TRITON_INTERPRET``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from support.numerics import error
from support.ptx_driver import Launch, running_ptx
from support.ptx_runs import ORDERS, Edit, count, serve, without


@triton.jit
def elementwise_kernel(x, y, out, n, scales, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=0).to(tl.float32) * scales[0] + scales[1]
    b = tl.load(y + i, mask=i < n, other=0.0)
    z = tl.where(a < b, tl.sigmoid(a) * b, tl.exp(-tl.abs(a)) / (1.0 + b * b))
    z += tl.log(1.0 + tl.abs(b)) * tl.sqrt(tl.abs(a)) + (i // 7 % 5).to(tl.float32)
    tl.store(out + i, z.to(out.dtype.element_ty), mask=i < n)


@triton.jit
def softmax_kernel(x, out, total, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    v = tl.load(x + row * n + i, mask=i < n, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + row * n + i, e / tl.sum(e, 0), mask=i < n)
    tl.atomic_add(total + i % 4, e, mask=i < n)


@triton.jit
def matmul_kernel(
    a,
    b,
    c,
    M,
    N,
    K,
    stride_a,
    stride_b,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    # The blocks of the first row have less to add.
    end = tl.where(tl.program_id(0) == 0, K // 2, K)
    for start in range(0, end, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(
            a + m[:, None] * stride_a + k[None, :],
            mask=(m[:, None] < M) & (k[None, :] < end),
            other=0.0,
        )
        if TRANSPOSED:
            mask = (n[:, None] < N) & (k[None, :] < end)
            y = tl.trans(tl.load(b + n[:, None] * stride_b + k[None, :], mask=mask, other=0.0))
        else:
            mask = (k[:, None] < end) & (n[None, :] < N)
            y = tl.load(b + k[:, None] * stride_b + n[None, :], mask=mask, other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], acc, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def rows_kernel(x, out, stride, BLOCK: tl.constexpr):
    """Says that rows begin at multiples of 16 elements."""
    i = tl.arange(0, BLOCK)
    row = tl.multiple_of(tl.program_id(0) * stride, 16)
    tl.store(out + tl.program_id(0) * BLOCK + i, tl.load(x + row + i))


@triton.autotune([triton.Config({"BLOCK": size}) for size in (64, 128)], key=["n"])
@triton.jit
def tuned_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2.0 * tl.load(x + i, mask=i < n), mask=i < n)


def elementwise(order: str, n: int = 1000) -> dict[str, object]:
    x, y = torch.randint(0, 256, (n,), dtype=torch.uint8), torch.randn(n)
    # Beyond the last element nothing may be written.
    out = torch.full((n + 24,), 7.0)
    scale, offset = 2 / 255, -1.0
    with running_ptx(warp_order=order) as launches:
        elementwise_kernel[(triton.cdiv(n, 256),)](x, y, out, n, (scale, offset), 256)
    a, b = x.double() * scale + offset, y.double()
    want = torch.where(a < b, a.sigmoid() * b, (-a.abs()).exp() / (1 + b * b))
    want += (1 + b.abs()).log() * a.abs().sqrt() + (torch.arange(n) // 7 % 5)
    return {
        "error": error(out[:n], want),
        "kept": bool((out[n:] == 7).all()),
        "launches": [[launch.name, *launch.grid] for launch in launches],
    }


def softmax(order: str, edit: Edit | None = None, rows: int = 9, n: int = 300) -> dict[str, object]:
    x = torch.randn(rows, n)
    out, total = torch.full((rows, n), torch.nan), torch.zeros(4)
    with running_ptx(warp_order=order, edit_ptx=edit) as launches:
        softmax_kernel[(rows,)](x, out, total, n, 512)
    v = x.double()
    e = (v - v.max(1, keepdim=True).values).exp()
    sums = torch.stack([e[:, i::4].sum() for i in range(4)])
    return {
        "error": error(out, e / e.sum(1, keepdim=True)),
        "atomic_error": error(total, sums),
        **opcodes(launches),
    }


def matmul(
    order: str,
    dtype: torch.dtype,
    transposed: bool = False,
    precision: str = "tf32",
    edit: Edit | None = None,
    tile: tuple[int, int, int] = (64, 64, 32),
) -> dict[str, object]:
    M, N, K = 100, 80, 144
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    given = b.T.contiguous() if transposed else b
    out = torch.full((M, N), torch.nan)
    grid = (triton.cdiv(M, tile[0]), triton.cdiv(N, tile[1]))
    with running_ptx(warp_order=order, edit_ptx=edit) as launches:
        matmul_kernel[grid](
            *(a, given, out, M, N, K, K, K if transposed else N),
            *(*tile, transposed, precision),
            num_stages=3,
        )
    want = a.double() @ b.double()
    want[: tile[0]] = a[: tile[0], : K // 2].double() @ b[: K // 2].double()
    return {"error": error(out, want), **opcodes(launches)}


def opcodes(launches: list[Launch]) -> dict[str, object]:
    (launch,) = launches
    names = ("bar.sync", "cp.async.cg", "cp.async.wait_group", "ldmatrix", "mma", "shfl")
    return {
        "opcodes": {name: count(name, launch.ptx) for name in names},
        "warps": launch.warps,
        "instructions": launch.instructions,
    }


def each_removed(opcode: str, run: Callable[[str, Edit | None], dict]) -> dict[str, object]:
    """The errors without such an instruction, in both orders: without each, and without all."""
    found = run("ascending", None)["opcodes"][opcode]
    chosen = [*(slice(i, i + 1) for i in range(found)), slice(None)]
    errors = [[run(order, without(opcode, some))["error"] for order in ORDERS] for some in chosen]
    return {"each": errors[:-1], "all": errors[-1]}


def out_of_bounds(size: int) -> dict[str, object]:
    x, out = torch.zeros(size), torch.zeros(1000)
    with running_ptx():
        tuned_kernel.fn[(4,)](x, out, 1000, BLOCK=256)
    return {}


def misaligned(stride: int) -> dict[str, object]:
    x, out = torch.randn(4 * stride), torch.zeros(3, 128)
    with running_ptx():
        rows_kernel[(3,)](x, out, stride, 128, num_warps=1)
    return {"error": error(out, x.view(4, stride)[:3, :128].double())}


def autotuned() -> dict[str, object]:
    x, out = torch.randn(300), torch.zeros(300)
    with running_ptx() as launches:
        tuned_kernel[lambda meta: (triton.cdiv(300, meta["BLOCK"]),)](x, out, 300)
    return {"error": error(out, 2 * x.double()), "grids": sorted({x.grid[0] for x in launches})}


def grid(*sizes: int) -> dict[str, object]:
    with running_ptx() as launches:
        tuned_kernel.fn[sizes](torch.zeros(1), torch.zeros(1), 0, BLOCK=64)
    return {"instructions": launches[0].instructions}


def cases() -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    for order in ORDERS:
        yield f"elementwise {order}", lambda order=order: elementwise(order)
        yield f"softmax {order}", lambda order=order: softmax(order)
        for name in ("bfloat16", "float16", "float32"):
            for transposed in (False, True):
                yield (
                    f"matmul {name}{' transposed' * transposed} {order}",
                    lambda order=order, name=name, transposed=transposed: matmul(
                        order, getattr(torch, name), transposed
                    ),
                )
        for precision in ("tf32x3", "ieee"):
            yield (
                f"matmul {precision} {order}",
                lambda order=order, precision=precision: matmul(
                    order, torch.float32, precision=precision
                ),
            )
    yield "softmax without a barrier", lambda: each_removed("bar.sync", softmax)
    for opcode, what in (("bar.sync", "a barrier"), ("cp.async.wait_group", "a wait")):
        yield (
            f"matmul without {what}",
            lambda opcode=opcode: each_removed(
                opcode, lambda order, edit: matmul(order, torch.bfloat16, edit=edit)
            ),
        )
    yield "within bounds", lambda: out_of_bounds(1000)
    yield "out of bounds", lambda: out_of_bounds(999)
    yield "aligned", lambda: misaligned(160)
    yield "misaligned", lambda: misaligned(150)
    yield "autotuned", autotuned
    yield "empty grid", lambda: grid(0)
    yield "grid too large", lambda: grid(1, 65536)
    yield (
        "too much shared memory",
        lambda: matmul("ascending", torch.float32, tile=(256, 128, 64)),
    )


if __name__ == "__main__":
    serve(dict(cases()))
