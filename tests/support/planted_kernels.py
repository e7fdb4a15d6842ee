"""Kernels that break one rule each, and one that breaks none, compiled and judged.

A script, because kernels cannot be compiled in a process in which they are interpreted: prints, as
JSON, what :func:`fastgan.benchmarks.compiled.faults` says of each on the target that is named, or
of one that is named too its code.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from fastgan.benchmarks.compile_driver import (
    TARGETS,
    Target,
    compile_kernel,
    machine_code,
    recorded,
)
from fastgan.benchmarks.compiled import faults
from fastgan.benchmarks.compiled_launches import Use
from triton.compiler import ASTSource

_CHANNELS = 256


@triton.jit
def _product(x_ptr, weight_ptr, y_ptr, c, PRECISION: tl.constexpr, BM, BN, BK):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, c, BK):
        inner = k + tl.arange(0, BK)
        x = tl.load(x_ptr + (row * c)[:, None] + inner[None, :])
        weight = tl.load(weight_ptr + (column * c)[None, :] + inner[:, None])
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    at = y_ptr + (row * c)[:, None] + column[None, :]
    tl.store(at, acc.to(y_ptr.dtype.element_ty))


@triton.jit
def _right_kernel(
    x_ptr, weight_ptr, y_ptr, c, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    _product(x_ptr, weight_ptr, y_ptr, c, P, BM, BN, BK)


@triton.jit(do_not_specialize=["c"])
def _unhinted_kernel(
    x_ptr, weight_ptr, y_ptr, c, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    _product(x_ptr, weight_ptr, y_ptr, c, P, BM, BN, BK)


# Of the tiles, that of "shared" is more than any multiprocessor has, and that of "spills" more than
# its threads' registers.
_PLANTED = {
    "right": (_right_kernel, torch.bfloat16, (128, 128, 64), {"num_warps": 8, "num_stages": 2}),
    "narrow": (_unhinted_kernel, torch.bfloat16, (64, 64, 64), {"num_warps": 4}),
    "shared": (_right_kernel, torch.bfloat16, (128, 256, 128), {"num_warps": 8, "num_stages": 4}),
    "spills": (_right_kernel, torch.bfloat16, (128, 128, 16), {"num_warps": 2, "num_stages": 2}),
    "matrix": (_right_kernel, torch.float32, (64, 64, 32), {"num_warps": 4}),
}


def _use(target: Target, name: str) -> Use:
    kernel, dtype, (m, n, k), options = _PLANTED[name]
    if name == "spills" and target.gpu.backend == "hip":
        n, k = 2 * n, 2 * k  # a thread has 512 registers there, and elsewhere 255
    x, weight, y = (
        torch.empty(_CHANNELS, _CHANNELS, 1, 1, dtype=dtype, device="meta") for _ in range(3)
    )
    with recorded(target) as launches:
        grid = (_CHANNELS // m, _CHANNELS // n)
        kernel[grid](x, weight, y, _CHANNELS, "ieee", m, n, k, **options)
    return Use(launches[0], name, "", 0.0, False)


def _code(use: Use) -> tuple[dict[str, Any], dict[str, int]]:
    """What is read of the code, and NVIDIA's machine code by instruction."""
    s = use.launch.specialisation
    source = ASTSource(s.kernel, s.signature, s.constexprs, s.attrs)
    compiled = triton.compile(source, target=TARGETS[s.target].gpu, options=s.options)
    return dataclasses.asdict(compile_kernel(s)), machine_code(compiled.asm["cubin"])


def main() -> None:
    target = TARGETS[sys.argv[1]]
    if sys.argv[2:]:
        print(json.dumps(_code(_use(target, sys.argv[2]))))
        return
    found = {}
    for name in _PLANTED:
        use = _use(target, name)
        found[name] = faults(use, compile_kernel(use.launch.specialisation))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
