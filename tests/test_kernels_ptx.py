"""The PTX of every Triton kernel, executed on the CPU, computes what torch computes.

And the tests can tell: without a barrier, without a wait for asynchronous copies, or with a
displaced address it does not.
"""

import pytest

pytest.importorskip("triton", reason="triton is not installed, so nothing can be compiled")

from support.ptx_kernel_cases import CASES, FAULTS, LAUNCHED, NUMBERS, OPCODES
from support.ptx_runs import ORDERS, outcomes

# The type of a matrix product's factors.
FACTORS = {"bf16": "bf16", "fp16": "f16", "tf32": "tf32", "tf32x3": "tf32"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    names = [LAUNCHED, *FAULTS, *CASES]
    return outcomes("support.ptx_kernel_cases", names, tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def kernels(results):
    """By name, what each kernel consists of in each case that launches it."""
    found = {name: {} for name in results[LAUNCHED]["kernels"]}
    for case in CASES:
        for name, parts in results[case].get("kernels", {}).items():
            found[name][case] = parts
    return found


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(results, name):
    """In both orders of warps, to what the dtype leaves."""
    assert "raised" not in results[name], results[name]["raised"]
    for order in ORDERS:
        compared = results[name]["errors"][order]
        assert compared
        assert [c for c in compared if not c[1] <= c[2]] == []


def test_no_kernel_is_left_out(kernels):
    dtypes = {numbers.dtype for numbers in NUMBERS.values()}
    for name, cases in kernels.items():
        # Statistics are float32, whatever they are of.
        ran = {NUMBERS[CASES[case].numbers].dtype for case in cases}
        assert ran == dtypes, f"{name}: {ran}"
    for name in ("_conv_fprop_kernel", "_conv_dgrad_kernel", "_conv_wgrad_kernel"):
        assert {CASES[case].numbers for case in kernels[name]} == set(NUMBERS), name


def test_products_are_made_as_asked(kernels):
    for cases in kernels.values():
        for case, parts in cases.items():
            factor = FACTORS[CASES[case].numbers]
            assert all(f".f32.{factor}.{factor}.f32" in product for product in parts["products"])
    for name in ("_conv_fprop_kernel", "_conv_dgrad_kernel", "_conv_wgrad_kernel"):
        assert all(parts["products"] for parts in kernels[name].values())


def test_every_kernel_has_faults(kernels):
    assert {fault.kernel for fault in FAULTS.values()} == set(kernels)


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_missing_shows(results, kernels, name):
    """All of it, and the most of it singly: some barriers guard what nobody touches."""
    fault = FAULTS[name]
    assert "raised" not in results[name], results[name]["raised"]
    parts = kernels[fault.kernel][fault.case]
    guards = {opcode for opcode in OPCODES if parts[opcode]}
    assert bool(parts["shared"]) == bool(guards)
    assert set(results[name]["all"]) == guards
    assert all(results[name]["all"].values())
    for opcode, shown in results[name]["each"].items():
        assert any(shown), f"{opcode}: {shown}"


@pytest.mark.parametrize("name", FAULTS)
def test_a_displaced_address_shows(results, name):
    assert results[name].get("shifted") == {"load": True, "store": True}


def test_most_barriers_and_waits_show_singly(results):
    each = [shown for name in FAULTS for shown in results[name].get("each", {}).values()]
    assert each
    assert 2 * sum(map(sum, each)) > sum(map(len, each))


def test_waits_before_and_in_the_loop_show(results):
    """Of what is pipelined, nothing is read without a wait at the start, or one round later."""
    shown = [
        results[name]["each"]["cp.async.wait_group"]
        for name in FAULTS
        if "cp.async.wait_group" in results[name].get("each", {})
    ]
    assert len(shown) == 3
    assert all(sum(waits) >= 2 for waits in shown)
