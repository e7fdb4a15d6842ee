"""What nvcc makes of the CUDA kernels, as PTX executed on the CPU by the extension's own host code.

It computes to the bit what the build for the CPU does, but for ``expf``, ``log1pf`` and ``tanhf``,
of which a GPU and a CPU have their own. Without its barriers a kernel does not.
"""

import pytest
from support import cuda_build, cuda_host
from support.cuda_kernel_cases import CASES
from support.cuda_ptx_cases import (
    COPYING,
    ERRORS,
    EXECUTED,
    FAULTS,
    KERNELS,
    WITHOUT_BARRIER,
    WITHOUT_SWIZZLE,
    WITHOUT_WAIT,
)
from support.ptx_runs import ORDERS, outcomes

REASONS = [*filter(None, [cuda_build.missing_reason()]), *cuda_host.missing_reasons()]
pytestmark = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))
# By how much an inexact result may differ, of the largest: a few units in the last place of the
# functions, which 1 - tanh² takes from its own small difference.
INEXACT = {"float32": 2.0**-20, "bfloat16": 2.0**-7, "float16": 2.0**-10}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    # Once, before two processes ask for them.
    cuda_build.build_stand_in()
    cuda_build.build_extension()
    cuda_host.build_kernels()
    names = [KERNELS, *ERRORS, *EXECUTED]
    names += [WITHOUT_BARRIER + kernel for kernel in FAULTS]
    names += [fault + kernel for fault in (WITHOUT_WAIT, WITHOUT_SWIZZLE) for kernel in COPYING]
    return outcomes("support.cuda_ptx_cases", names, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", EXECUTED)
def test_agrees_with_the_build_for_the_cpu(results, name):
    result = results[name]
    assert "raised" not in result, result["raised"]
    for order in ORDERS:
        assert result["wrong"][order] == []
    if CASES[name].inexact:
        assert result["off"] <= INEXACT[CASES[name].dtype]
    else:
        assert result["different"] == {order: [] for order in ORDERS}


def test_no_kernel_is_left_out(results):
    assert set(results[KERNELS]["kernels"]) == {
        k for name in EXECUTED for k in results[name]["kernels"]
    }


@pytest.mark.parametrize("kernel", FAULTS)
def test_missing_barriers_show(results, kernel):
    """In some order of warps."""
    assert any(results[WITHOUT_BARRIER + kernel]["wrong"].values())


def test_kernels_with_barriers(results):
    """Those above, and no others."""
    assert {name.partition("<")[0] for name in results[KERNELS]["bar.sync"]} == set(FAULTS)


@pytest.mark.parametrize("kernel", COPYING)
def test_missing_waits_show(results, kernel):
    assert any(results[WITHOUT_WAIT + kernel]["wrong"].values())


def test_kernels_with_copies(results):
    """All products copy asynchronously what is 4 bytes or more, and 16 bytes wherever that fits."""
    found = results[KERNELS]
    products = [name for name in found["kernels"] if name.startswith(COPYING)]
    assert set(found["cp.async.wait_group"]) == set(products)
    narrow = [name for name in products if name.endswith("Widths<1, 1, false> >")]
    assert set(found["cp.async.cg.shared.global"]) == set(products) - set(narrow)


@pytest.mark.parametrize(
    ("dtype", "product"),
    [
        ("bfloat16", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
        ("float16", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
        ("float32", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"),
    ],
)
def test_products_are_of_tensor_cores(results, dtype, product):
    names = [name for name in with_products(results) if CASES[name].dtype == dtype]
    assert names and all(results[name]["products"] == [product] for name in names)


def with_products(results):
    """The cases of kernels that copy asynchronously, which are all of those above."""
    return [
        name
        for name in EXECUTED
        if any(kernel.startswith(COPYING) for kernel in results[name]["kernels"])
    ]


def test_no_lanes_meet_in_a_bank(results):
    """As products are copied and read; of what is written after them some do."""
    for name in with_products(results):
        assert results[name]["accesses"] and results[name]["conflicts"] == [], name


@pytest.mark.parametrize("kernel", COPYING)
def test_lanes_that_meet_in_a_bank_show(results, kernel):
    assert results[WITHOUT_SWIZZLE + kernel]["conflicts"]


def test_a_launch_that_is_refused(results):
    said = results["refused launch"]["said"]
    assert said.startswith(
        "gan_loss_forward: launching a grid of 2 x 1 x 1 blocks of 512 threads with "
    )
    assert said.endswith("cudaErrorLaunchFailure, unspecified launch failure")
    assert results["refused launch"]["then"] == []


def test_a_device_that_is_not_there(results):
    assert results["no such device"]["launches"] == 0
    assert results["no such device"]["said"] == (
        "act_backward: device 5: cudaErrorInvalidDevice, invalid device ordinal"
    )


def test_what_is_launched(results):
    """64 tiles of each of 2 groups, and 2 blocks of 32 of 64 channels, which 4 lanes read."""
    threads, tiles, width, warps = 512, 64, 32, 512 // 32
    assert results["recorded"] == {
        "name": "bn_stats_kernel<__nv_bfloat16, 8>",
        "grid": [2 * tiles, 2, 1],
        "block": [threads, 1, 1],
        "shared": 4 * (warps * 3 * width + width),
        "stream": 7,
    }
