"""The CUDA kernels run as the PTX that nvcc makes of them for sm_80, a case by each name.

A program, see :mod:`support.ptx_runs`, without torch, which brings a CUDA runtime of its own. The
host code of the extension chooses kernels and grids, and the results are compared with those of the
build for the CPU.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import numpy as np
from support import cuda_host
from support.cuda_build import build_extension, ptx_of
from support.cuda_driver import in_kernel, running_cuda, short_name
from support.cuda_kernel_cases import CASES, SLOPE, Arrays, Case, Kernels, on_host, to_float
from support.ptx_conflicts import SharedAccess
from support.ptx_launches import Launch
from support.ptx_memory import PtxError
from support.ptx_runs import ORDERS, Edit, Outcome, count, serve, without

KERNELS = "kernels"
# All but one that takes a tenth of the time, and differs in its size alone.
EXECUTED = tuple(name for name in CASES if name != "many rows, dgrad bfloat16")
_PRODUCT = re.compile(r"\bmma\.sync\.[\w.]+")
# A case for each kernel with a barrier, which is wrong in some order without it.
FAULTS = {
    "bn_stats_kernel": "bn of 8",
    "bn_act_fwd_kernel": "bn of 8",
    "bn_act_bwd_reduce_kernel": "bn of 8",
    "bn_act_bwd_kernel": "bn of 8",
    "gan_loss_fwd_kernel": "loss, many",
    "augment_fwd_kernel": "images of 16",
    "thin_dgrad_kernel": "thin, dgrad",
    "dot_fprop_kernel": "dots of 8, fprop, bias",
    "conv_fprop_kernel": "4x4, fprop",
    "conv_dgrad_kernel": "4x4, dgrad",
    "conv_wgrad_kernel": "4x4, wgrad",
}
# Of those, the kernels that copy asynchronously.
COPYING = tuple(name for name in FAULTS if name.startswith("conv_"))
WITHOUT_BARRIER = "without a barrier: "
WITHOUT_WAIT = "without a wait: "
WITHOUT_SWIZZLE = "without a swizzle: "
ERRORS = ("refused launch", "no such device", "recorded")
# Accesses of shared memory that bring what is multiplied.
_OF_PRODUCTS = (
    *("cp.async", "st.shared.u16", "ldmatrix"),
    *("ld.shared.u32", "ld.shared.b32", "ld.shared.f32"),
)


def run(
    case: Case, order: str, edit: Edit | None = None, count_conflicts: bool = False
) -> tuple[Arrays, list[Launch]]:
    """What the kernels wrote, and their launches."""
    how = {"warp_order": order, "edit_ptx": edit, "count_conflicts": count_conflicts}
    with running_cuda(build_extension(), **how) as running:
        got = case.run(Kernels(running.library, running.give))
        return got, list(running.launches)


def in_products(launches: list[Launch]) -> list[SharedAccess]:
    """The accesses of shared memory in loops, and of the products' in what is unrolled."""
    return [
        access
        for launch in launches
        if launch.name.startswith(COPYING)
        for access in launch.shared_accesses
        if access.in_loop or access.opcode.startswith(_OF_PRODUCTS)
    ]


def conflicting(accesses: list[SharedAccess]) -> list[str]:
    return [f"{x.opcode} at line {x.line}: {x.conflicts}" for x in accesses if x.conflicts]


def compared(name: str) -> Outcome:
    case = CASES[name]
    want = case.run(on_host(cuda_host.build_kernels()))
    outcome: Outcome = {"different": {}, "wrong": {}, "kernels": [], "off": 0.0}
    for order in ORDERS:
        # Which lanes meet in a bank does not depend on the order of warps.
        first = order == ORDERS[0]
        got, launches = run(case, order, count_conflicts=first)
        if first:
            accesses = in_products(launches)
            outcome["products"] = sorted({p for x in launches for p in _PRODUCT.findall(x.ptx)})
            outcome["accesses"] = sum(x.accesses for x in accesses)
            outcome["conflicts"] = conflicting(accesses)
        outcome["kernels"] = [launch.name for launch in launches]
        outcome["wrong"][order] = case.wrong(got)
        outcome["different"][order] = [
            key for key in want if got[key].tobytes() != want[key].tobytes()
        ]
        for key in want:
            a, b = to_float(got[key]), to_float(want[key])
            off = np.abs(a - b).max() / np.abs(b).max()
            outcome["off"] = max(outcome["off"], float(off))
    return outcome


def planted(kernel: str, opcode: str) -> Outcome:
    """Without any instruction of that name: what is wrong, in each order."""
    case = CASES[f"{FAULTS[kernel]} float32"]
    found = {}
    for order in ORDERS:
        try:
            got, _ = run(case, order, in_kernel(kernel, without(opcode)))
            found[order] = case.wrong(got)
        except PtxError as error:
            found[order] = [str(error)]
    return {"wrong": found}


def without_swizzle(kernel: str) -> Outcome:
    """The conflicts of a kernel where each exclusive or gives one of what it is given."""
    case = CASES[f"{FAULTS[kernel]} bfloat16"]
    found = []
    for which in (2, 3):
        edit = functools.partial(
            re.sub, r"\bxor\.b32\s+(%\w+), (%\w+), (%?-?\w+);", rf"mov.b32 \1, \{which};"
        )
        _, launches = run(case, ORDERS[0], in_kernel(kernel, edit), count_conflicts=True)
        found += conflicting(in_products(launches))
    return {"conflicts": found}


def kernels() -> Outcome:
    with running_cuda(build_extension()):  # which the PTX is taken from
        found = {short_name(symbol): text for symbol, text in ptx_of(build_extension()).items()}
    having = {
        opcode: [name for name, text in found.items() if count(opcode, text)]
        for opcode in ("bar.sync", "cp.async.wait_group", "cp.async.cg.shared.global")
    }
    return {"kernels": list(found), **having}


def refused_launch() -> Outcome:
    """719 is cudaErrorLaunchFailure; the next launch is as if nothing had been."""
    case = CASES["loss float32"]
    with running_cuda(build_extension()) as running:
        running.fail_next_launch(719)
        try:
            case.run(Kernels(running.library, running.give))
        except RuntimeError as error:
            return {
                "said": str(error),
                "then": case.wrong(case.run(Kernels(running.library, running.give))),
            }
    return {"said": ""}


def no_such_device() -> Outcome:
    with running_cuda(build_extension()) as running:
        x = running.library.Array(4096, "float32", 5, [1, 4, 2, 2], [16, 1, 8, 4])
        try:
            running.library.act_backward(x, x, 1, SLOPE, x, 0)
        except RuntimeError as error:
            return {"said": str(error), "launches": len(running.launches)}
    return {"said": ""}


def recorded() -> Outcome:
    """A launch of a size that training has: its grid, threads, shared memory and stream."""
    with running_cuda(build_extension(), execute=False) as running:
        x = running.library.Array(4096, "bfloat16", 0, [256, 64, 32, 32], [65536, 1, 2048, 64])
        stats = running.library.Array(4096, "float32", 0, [128, 3, 64], [192, 64, 1])
        running.library.bn_stats(x, stats, 2, 7)
        (launch,) = running.launches
        return {
            "name": launch.name,
            "grid": launch.grid,
            "block": launch.block,
            "shared": launch.shared,
            "stream": launch.stream,
        }


def cases() -> Iterator[tuple[str, Callable[[], Outcome]]]:
    yield KERNELS, kernels
    for name in EXECUTED:
        yield name, functools.partial(compared, name)
    for kernel in FAULTS:
        yield WITHOUT_BARRIER + kernel, functools.partial(planted, kernel, "bar.sync")
    for kernel in COPYING:
        yield WITHOUT_WAIT + kernel, functools.partial(planted, kernel, "cp.async.wait_group")
        yield WITHOUT_SWIZZLE + kernel, functools.partial(without_swizzle, kernel)
    yield from zip(ERRORS, (refused_launch, no_such_device, recorded), strict=True)


if __name__ == "__main__":
    serve(dict(cases()))
