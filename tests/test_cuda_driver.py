"""CUDA kernels run by their own host code, as PTX: right numbers, and a GPU's limits and errors."""

import math

import pytest
from support import cuda_build
from support.ptx_runs import ORDERS, outcomes

REASON = cuda_build.missing_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = {"float32": "float", "bfloat16": "__nv_bfloat16", "float16": "__half"}
IN_BOTH_ORDERS = ["row sums", "without a barrier", "halves", "chosen", "without waiting"]
IN_ONE = [
    *("rounded", "integers", "out of bounds", "read only", "recorded", "outside", "devices"),
    *("grids", "no rows", "too many threads", "against launch bounds", "much shared memory"),
    *("shared memory allowed", "injected", "as they come", "pieces"),
]
INVALID_VALUE, INVALID_CONFIGURATION, LAUNCH_FAILURE = 1, 9, 719


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    # Once, before two processes ask for it.
    cuda_build.build_stand_in()
    cuda_build.build_library(cuda_build.TOYS)
    names = [f"{name} {order}" for name in IN_BOTH_ORDERS for order in ORDERS]
    names += [
        f"{name} {dtype} {order}"
        for name in ("functions", "products")
        for dtype in DTYPES
        for order in ORDERS
    ]
    return outcomes(
        "support.cuda_driver_cases", [*names, *IN_ONE], tmp_path_factory.mktemp("triton")
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_of_any_dtype(results, dtype, order):
    """In units in the last place of sums up to 8, with arguments in a struct."""
    result = results[f"functions {dtype} {order}"]
    assert "raised" not in result, result["raised"]
    assert result["returned"] == 0
    assert result["error"] < 1
    assert result["kept"]
    assert result["launches"] == [[f"functions<{DTYPES[dtype]}>", [8, 1, 1], [128, 1, 1], 0, 0]]
    assert result["argument"] == 40


@pytest.mark.parametrize("order", ORDERS)
def test_a_reduction_in_shared_memory(results, order):
    result = results[f"row sums {order}"]
    assert result["same"]
    assert result["launches"] == [["row_sums", [5, 1, 1], [64, 1, 1], 64 * 16 + 4 * 4, 9]]
    assert result["instructions"] > 0


def test_a_missing_barrier_shows(results):
    """In some order: the sums are made by the first warp, which is last in the other."""
    assert results["without a barrier ascending"] == {"same": [False, False, True]}
    assert results["without a barrier descending"] == {"same": [False, True, True]}


@pytest.mark.parametrize("order", ORDERS)
def test_16_bytes_of_halves(results, order):
    assert results[f"halves {order}"] == {"same": True, "converted": True, "wide": True}


@pytest.mark.parametrize("order", ORDERS)
def test_threads_in_three_dimensions_part(results, order):
    assert results[f"chosen {order}"] == {
        "same": True,
        "launches": [["chosen", [3, 2, 1], [8, 4, 2], 0, 0]],
    }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_tiles(results, dtype, order):
    """By 4 warps of 6 blocks; each multiplies half of what it has of a step's tiles at a time."""
    result = results[f"products {dtype} {order}"]
    assert "raised" not in result, result["raised"]
    assert result["returned"] == 0
    assert result["error"] < 3
    assert result["kept"]
    assert result["transposed"] == (dtype != "float32")
    steps = 11 if dtype == "float32" else 6
    assert result["loads"] == 6 * 4 * steps * 4
    # Each copies a piece of each factor, and no factor has all of them.
    assert 0 < result["copies"] <= 6 * 4 * steps * 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_conflicts_of_tiles(results, dtype, order):
    """None where the pieces of rows are moved about, in the loop and after it."""
    result = results[f"products {dtype} {order}"]
    assert result["in loop"] > 0
    assert result["wavefronts a load"] == [4]
    assert result["conflicts of copies"] == 0
    assert results["as they come"]["wavefronts a load"] == [16]
    assert results["as they come"]["error"] < 3


@pytest.mark.parametrize("order", ORDERS)
def test_missing_waits_show(results, order):
    assert all(map(math.isnan, results[f"without waiting {order}"]["errors"]))


def test_copies_of_4_and_8_bytes(results):
    assert results["pieces"] == {
        "close": True,
        "counted": [
            ["cp.async.ca.shared.global", 3, 3, 3],
            ["cp.async.ca.shared.global", 3, 6, 6],
            ["ld.shared.f32", 3, 3, 3],
            ["ld.shared.v2.f32", 3, 6, 6],
        ],
    }


def test_every_operation_rounds_once(results):
    assert results["rounded"] == {"wrong": {}}


def test_integers_of_64_bits(results):
    assert results["integers"] == {"wrong": []}


def test_memory_that_a_kernel_may_not_touch(results):
    raised = results["out of bounds"]["raised"]
    assert raised.startswith("PtxError: out of bounds: 1 lanes access 16 bytes")
    assert "ld.global.v4" in raised
    assert "PtxError: writes to memory that may only be read" in results["read only"]["raised"]


def test_launches_of_any_size_are_recorded(results):
    assert results["recorded"] == {
        "multiprocessors": 132,
        "launches": [["row_sums", [2**31 - 1, 1, 1], [256, 1, 1], 256 * 16 + 16 * 4, 0]],
        "arguments": [4096, 2**40],
        "instructions": 0,
    }


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("no rows", INVALID_CONFIGURATION),
        ("too many threads", INVALID_CONFIGURATION),
        ("much shared memory", INVALID_VALUE),
        ("injected", LAUNCH_FAILURE),
    ],
)
def test_a_launch_that_is_refused(results, name, error):
    """The error is told twice, by the launch and by the next that asks."""
    result = results[name]
    assert "raised" not in result, result["raised"]
    assert (result["returned"], result["last"], result["launches"]) == (error, [error, 0], [])


def test_the_sizes_of_a_grid(results):
    """Blocks have 64 threads in z at most."""
    assert results["grids"] == {
        "returned": [0, *[INVALID_CONFIGURATION] * 2, 0, INVALID_CONFIGURATION],
        "grids": [[1, 65535, 1], [1, 1, 1]],
    }


def test_launch_bounds(results):
    raised = results["against launch bounds"]["raised"]
    assert raised.startswith("PtxError: 512 threads in a block; 256 are the most")


def test_shared_memory_that_is_asked_for(results):
    result = results["shared memory allowed"]
    assert result["did"] == [0, INVALID_VALUE]
    assert (result["returned"], result["same"]) == (0, True)


def test_nothing_runs_outside_of_the_context(results):
    assert results["outside"] == {"returned": 46}


def test_the_only_device(results):
    assert results["devices"] == {"chosen": [0, 101, 101], "multiprocessors": 108}


def test_the_runtime_must_not_be_loaded(monkeypatch):
    from support import cuda_driver

    # The C library is always there.
    monkeypatch.setattr(cuda_driver, "runtime_name", lambda: "libc.so.6")
    cuda_driver._stand_in.cache_clear()
    with pytest.raises(RuntimeError, match=r"libc.so.6 is loaded already.*another process"):
        cuda_driver._stand_in()
