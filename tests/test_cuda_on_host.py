"""The emulator that the CUDA kernels are tested on: right ones run right, each fault is found."""

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import cuda_host
from support.cuda_toys import SOURCE, Toys, build_toys, numbers

pytestmark = pytest.mark.skipif(
    bool(cuda_host.missing_reasons()), reason="; ".join(cuda_host.missing_reasons())
)
ORDERS = [("ascending", 0), ("descending", 0), *(("random", seed) for seed in range(3))]
in_every_order = pytest.mark.parametrize("order", ORDERS, ids="{0[0]}-{0[1]}".format)
GRID, BLOCK = (5, 1, 1), (128, 1, 1)


@pytest.fixture(scope="module")
def toys():
    return Toys(build_toys())


def launched(toys, kernel, x, order=("ascending", 0), *, size=None, **shape):
    shape = {"grid": GRID, "block": BLOCK, "shared": 512, **shape}
    y = np.full(x.size if size is None else size, np.nan, np.float32)
    with cuda_host.order(toys.library, *order):
        assert toys.launch(kernel, x, y, **shape) == "cudaSuccess"
    return y


def turned(x):
    return np.concatenate([x[first : first + 128][::-1] for first in range(0, x.size, 128)])


def lines(kernel):
    """Where the kernel's calls are that are refused, as messages name them."""
    source = (cuda_host.ROOT / SOURCE).read_text().splitlines()
    return [f"{SOURCE}:{n}:" for n, line in enumerate(source, 1) if f"// refused: {kernel}" in line]


@in_every_order
def test_barriers(toys, order):
    x = numbers(600)
    assert np.array_equal(launched(toys, "turn<true>", x, order), turned(x))


def test_a_missing_barrier_shows_in_some_order(toys):
    x = numbers(600)
    results = [launched(toys, "turn<false>", x, order) for order in ORDERS]
    assert not any(np.array_equal(y, turned(x)) for y in results)


@in_every_order
@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_sums_by_shuffles(toys, order, threads):
    x = np.round(100 * numbers(4 * threads))
    y = launched(toys, "add<32, true>", x, order, size=4, grid=(4, 1, 1), block=(threads, 1, 1))
    assert np.array_equal(y, x.reshape(4, threads).sum(1))


@pytest.mark.parametrize("kernel", ["add<16, true>", "add<32, false>"])
def test_a_wrong_width_or_a_missing_barrier_spoils_a_sum(toys, kernel):
    x = np.round(100 * numbers(640))
    want = x.reshape(5, 128).sum(1)
    results = [launched(toys, kernel, x, order, size=5) for order in ORDERS]
    assert not all(np.array_equal(y, want) for y in results)


@in_every_order
def test_lanes_of_a_warp_meet_at_syncwarp(toys, order):
    x = numbers(640)
    want = np.roll(x.reshape(-1, 32), -7, axis=1).ravel()
    assert np.array_equal(launched(toys, "neighbour<true>", x, order), want)


def test_a_missing_syncwarp_shows(toys):
    x = numbers(640)
    want = np.roll(x.reshape(-1, 32), -7, axis=1).ravel()
    results = [launched(toys, "neighbour<false>", x, order) for order in ORDERS]
    assert not any(np.array_equal(y, want) for y in results)


def shuffled(mode, lane, operand, width):
    """The lane that is read, in the words of PTX on ``shfl.sync``; CUDA sets c from the width."""
    b, segment_mask = operand & 31, 32 - width
    clamp = 0 if mode == "up" else 31
    max_lane = (lane & segment_mask) | (clamp & ~segment_mask & 31)
    min_lane = lane & segment_mask
    if mode == "up":
        source = lane - b
        return source if source >= max_lane else lane
    if mode == "down":
        source = lane + b
    elif mode == "bfly":
        source = lane ^ b
    else:
        source = min_lane | (b & ~segment_mask & 31)
    return source if source <= max_lane else lane


@in_every_order
@pytest.mark.parametrize(
    ("kernel", "width"),
    [
        ("shuffles<float, 32>", 32),
        ("shuffles<int, 8>", 8),
        ("shuffles<double, 16>", 16),
        ("shuffles<long long, 1>", 1),
    ],
)
def test_shuffles_read_the_lane_that_ptx_names(toys, kernel, width, order):
    x = np.random.default_rng(0).permutation(64).astype(np.float32)
    y = launched(
        toys, kernel, x, order, size=81 * 4 * 64, grid=(1, 1, 1), block=(64, 1, 1)
    ).reshape(81, 4, 2, 32)
    warps = x.reshape(2, 32)
    for (row, operand), (column, mode) in itertools.product(
        enumerate(range(-40, 41)), enumerate(("idx", "up", "down", "bfly"))
    ):
        lanes = [shuffled(mode, lane, operand, width) for lane in range(32)]
        assert np.array_equal(y[row, column], warps[:, lanes]), (mode, operand)


@in_every_order
def test_parts_of_a_warp_and_votes(toys, order):
    x = numbers(640)
    lane = np.arange(32)
    halves = np.where(lane < 16, lane ^ 3, lane ^ 4)[lane ^ 16]
    assert np.array_equal(launched(toys, "halves", x, order), x.reshape(-1, 32)[:, halves].ravel())
    votes = ((x.reshape(-1, 32) > 0) << np.arange(32)).sum(1) & 0xFFFFFF
    assert np.array_equal(launched(toys, "ballot", x, order), np.repeat(votes, 32))


def turned_in_tiles(toys, stages, width, lacks, order):
    """What a pipeline makes of numbers that end within a tile, and what it should make of them."""
    x = numbers(9 * 64 * width + 5 * width)
    shape = {"grid": (1, 1, 1), "block": (64, 1, 1), "shared": 4 * stages * 64 * width}
    kernel = f"pipeline<{stages}, {width}, {lacks}>"
    tiles = np.concatenate([x, np.zeros(59 * width, np.float32)]).reshape(10, 64 * width)
    return launched(toys, kernel, x, order, size=tiles.size, **shape), tiles[:, ::-1].ravel()


@in_every_order
@pytest.mark.parametrize(("stages", "width"), [(2, 1), (3, 2), (4, 4)])
def test_copies_have_landed_where_they_are_waited_for(toys, stages, width, order):
    got, want = turned_in_tiles(toys, stages, width, "kNothing", order)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("lacks", ["kCommit", "kWait", "kGroup", "kBarrier", "kOrder"])
def test_what_a_pipeline_lacks_shows_in_some_order(toys, lacks):
    results = [turned_in_tiles(toys, 3, 4, lacks, order) for order in ORDERS]
    assert not all(np.array_equal(got, want) for got, want in results)


def test_copies_are_made_at_once_or_when_they_are_waited_for(toys):
    x = numbers(640)
    late, early, *mixed = (launched(toys, "copies_what_changes", x, order) for order in ORDERS)
    assert (late == 9).all() and np.array_equal(early, x)
    for y in mixed:
        assert 200 < (y == 9).sum() < 440 and ((y == 9) | (y == x)).all()


@in_every_order
def test_copies_that_nobody_waits_for_stay_in_their_block(toys, order):
    assert np.isnan(launched(toys, "leaves_copies", numbers(640), order)).all()


@in_every_order
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_as_ptx_has_it(toys, transposed, order):
    words = np.random.default_rng(0).integers(0, 2**16, (32, 8), dtype=np.uint16)
    kernel = f"matrices<{str(transposed).lower()}, true>"
    shape = {"grid": (1, 1, 1), "block": (32, 1, 1)}
    got = launched(toys, kernel, words.reshape(-1).view(np.float32), order, **shape)
    lane = np.arange(32)
    matrices = words[(5 * lane + 3) % 32].reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    # The rows one after another, two elements to a lane.
    want = matrices.reshape(4, 32, 2).transpose(1, 0, 2)
    assert np.array_equal(got.view(np.uint16).reshape(32, 4, 2), want)


def bfloat16_values(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def tf32_values(bits):
    return (bits // 2**13 * 2**13).view(np.float32).astype(np.float64)


def half_values(bits):
    return bits.view(np.float16).astype(np.float64)


def fragments(bits):
    """Where the lanes hold A [16, k], B [k, 8] and C, in the words of PTX on ``mma``.

    As [row, column] of each element that a lane holds of A, B and C.
    """
    group, member = np.arange(32)[:, None] // 4, np.arange(32)[:, None] % 4
    i = np.arange(4)
    c = group + 8 * (i >= 2), member * 2 + (i & 1)
    if bits == 32:
        a = group + 8 * ((i == 1) | (i == 3)), member + 4 * (i >= 2)
        return a, (member + 4 * (i[:2] == 1), group + 0 * i[:2]), c
    b = member * 2 + (i & 1) + 8 * (i >= 2), group + 0 * i
    i = np.arange(8)
    upper = (i < 2) | ((i >= 4) & (i < 6))
    return (np.where(upper, group, group + 8), member * 2 + (i & 1) + 8 * (i >= 4)), b, c


PRODUCTS = {
    "__nv_bfloat16": (np.uint16, 16, bfloat16_values),
    "__half": (np.uint16, 16, half_values),
    "float": (np.uint32, 8, tf32_values),
}


@in_every_order
@pytest.mark.parametrize("any_bits", [False, True], ids=["normal", "any bits"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_ptx(toys, name, any_bits, order):
    dtype, depth, values = PRODUCTS[name]
    draw = np.random.default_rng(0)
    a, b = (
        draw.integers(0, 2 ** (8 * dtype().itemsize), (20, *shape), dtype=dtype)
        for shape in ((16, depth), (depth, 8))
    )
    c = draw.standard_normal((20, 16, 8)).astype(np.float32)
    if any_bits:
        c[:, 3:5] = draw.integers(0, 2**32, (20, 2, 8), dtype=np.uint32).view(np.float32)
        c[:, 5, :3] = np.inf, -np.inf, np.nan
    else:
        # Exponents from -8 to 7.
        scale = {"__nv_bfloat16": 7, "__half": 10, "float": 23}[name]
        bias = 15 if name == "__half" else 127
        for bits in (a, b):
            sign = bits & dtype(1 << (8 * bits.itemsize - 1))
            exponent = draw.integers(bias - 8, bias + 8, bits.shape).astype(dtype)
            bits[:] = sign | exponent << dtype(scale) | bits & dtype((1 << scale) - 1)
    x = np.concatenate(
        [
            np.ascontiguousarray(matrix[:, row, column]).view(np.float32)
            for matrix, (row, column) in zip((a, b, c), fragments(8 * a.itemsize), strict=True)
        ],
        axis=2,
    )
    shape = {"grid": (5, 1, 1), "block": (128, 1, 1)}
    got = launched(toys, f"products<{name}>", x.ravel(), order, size=20 * 128, **shape)
    sums = np.zeros(c.shape)
    with np.errstate(all="ignore"):
        for k in range(depth):
            sums += values(a)[:, :, k, None] * values(b)[:, k, None]
        sums = (sums + c).astype(np.float32)
    assert any_bits or np.isfinite(sums).all()
    row, column = fragments(8 * a.itemsize)[2]
    assert same_bits_or_nan(got, sums[:, row, column].ravel())


def test_rounding_to_tf32(toys):
    below, ends = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF]), np.arange(0, 2**31, 2**13)
    # Around each number of the format, or a 64th of them and the last, the infinities and NaNs.
    ends = np.concatenate([ends[:: 2**6], ends[ends >= 0x7F7FC000][:8]])
    bits = (ends[:, None] + below).ravel().astype(np.uint32)
    bits = np.concatenate([bits, bits | np.uint32(2**31), np.uint32([0x7FFFFFFF, 2**32 - 1])])
    got = np.zeros_like(bits)
    call(toys.library.toy_to_tf32, bits.view(np.float32), got)
    size, sign = bits % 2**31, bits // 2**31 * 2**31
    down, rest = size // 2**13 * 2**13, size % 2**13
    want = sign + np.where(rest < 2**12, down, down + 2**13)
    want = np.where(size > 0x7F800000, 0x7FFFFFFF, want)
    assert np.array_equal(got, want)


@in_every_order
def test_every_block_and_thread_has_its_index(toys, order):
    grid, block = (3, 4, 5), (6, 2, 7)
    y = launched(toys, "grid_of_blocks", numbers(1), order, size=60 * 84, grid=grid, block=block)
    want = np.arange(84) + 1000 * np.arange(60)[:, None]
    assert np.array_equal(y, want.ravel())


def test_unwritten_shared_memory_is_nan_in_every_block(toys):
    launched(toys, "turn<true>", numbers(640))
    y = np.zeros(640, np.float32)
    assert toys.launch("unwritten", y, y, grid=GRID, block=BLOCK, shared=512) == "cudaSuccess"
    assert np.isnan(y).all()
    assert np.isnan(launched(toys, "past_shared", y, grid=(1, 1, 1))[0])


@in_every_order
@pytest.mark.parametrize(
    ("kernel", "threads", "why"),
    [
        ("some_at_barrier", 128, "has returned"),
        ("two_barriers", 64, "which is at"),
        ("barrier_and_shuffle", 64, "which waits at"),
        ("returned_lane", 64, "lane 31, which has returned"),
        ("all_lanes", 48, "lane 16, which the block has not"),
        ("lane_outside_its_mask", 32, "which its mask 0x0000ffff leaves out"),
        ("reads_outside_its_mask", 32, "which its mask 0x0000ffff leaves out"),
        ("other_masks", 32, "with the mask 0x"),
        ("two_shuffles", 32, "which is at the __shfl_sync of"),
        ("width_of_five", 32, "the width 5"),
        ("copies_to_misaligned", 32, "copy_async writes where it is not aligned"),
        ("copies_from_misaligned", 32, "copy_async reads where it is not aligned"),
        ("copies_past_shared", 128, "copy_async writes outside of shared memory"),
        ("copies_before_shared", 32, "copy_async writes outside of shared memory"),
        ("copies_to_global", 32, "copy_async writes outside of shared memory"),
        ("matrices_misaligned", 32, "load_matrices reads where it is not aligned"),
        ("matrices_past_shared", 128, "load_matrices reads outside of shared memory"),
        ("matrices_without_lane", 32, "lane 31, which has returned"),
        ("product_without_lane", 32, "lane 3, which waits at"),
        ("two_products", 32, "which is at the multiply_add of"),
    ],
)
def test_what_cuda_leaves_undefined_is_refused(toys, kernel, threads, why, order):
    x = numbers(128)
    with pytest.raises(RuntimeError) as refused:
        launched(toys, kernel, x, order, block=(threads, 1, 1))
    where = lines(kernel)
    assert where and any(place in str(refused.value) for place in where), refused.value
    assert why in str(refused.value) and "(block (" in str(refused.value)
    # The next launch is as good as ever.
    assert np.array_equal(launched(toys, "turn<true>", x, order), turned(x))


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ({"grid": (0, 1, 1)}, "cudaErrorInvalidConfiguration"),
        ({"grid": (1, 65536, 1)}, "cudaErrorInvalidConfiguration"),
        ({"grid": (1, 1, 65536)}, "cudaErrorInvalidConfiguration"),
        ({"grid": (2**31, 1, 1)}, "cudaErrorInvalidConfiguration"),
        ({"block": (0, 1, 1)}, "cudaErrorInvalidConfiguration"),
        ({"block": (1025, 1, 1)}, "cudaErrorInvalidConfiguration"),
        ({"block": (1, 1, 65)}, "cudaErrorInvalidConfiguration"),
        ({"block": (32, 64, 1)}, "cudaErrorInvalidConfiguration"),
        ({"shared": 48 * 1024 + 1}, "cudaErrorInvalidValue"),
        ({"shared": 48 * 1024}, "cudaSuccess"),
        ({"grid": (1, 65535, 1), "block": (1, 1, 1)}, "cudaSuccess"),
    ],
    ids=str,
)
def test_the_limits_of_a_launch(toys, shape, error):
    x = numbers(1)
    y = np.zeros(65536, np.float32)
    assert toys.launch("grid_of_blocks", x, y, **shape) == error
    # It is told once more, and then forgotten.
    last = toys.library.toy_last_error
    assert toys.library.toy_error_name(last()) == error.encode() and last() == 0


def test_there_is_one_device(toys):
    names = [toys.library.toy_error_name(toys.library.toy_set_device(d)) for d in (0, 1)]
    assert names == [b"cudaSuccess", b"cudaErrorInvalidDevice"]
    assert toys.library.toy_last_error() == 101


def test_launches_are_recorded(toys):
    with cuda_host.recorded(toys.library) as launches:
        launched(toys, "turn<true>", numbers(640))
        toys.launch("turn<true>", numbers(1), numbers(1), grid=(0, 1, 1))
        launched(toys, "unwritten", numbers(64), grid=(1, 1, 1), block=(8, 4, 2), shared=256)
    assert launches == [
        cuda_host.Launch(GRID, BLOCK, 512),
        cuda_host.Launch((1, 1, 1), (8, 4, 2), 256),
    ]


def test_half_precision_is_read_as_torch_reads_it(toys):
    bits = np.arange(65536, dtype=np.uint16)
    half, bfloat16 = (np.zeros(65536, np.float32) for _ in range(2))
    call(toys.library.toy_to_float, bits, half, bfloat16)
    for got, dtype in ((half, torch.float16), (bfloat16, torch.bfloat16)):
        want = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
        assert same_bits_or_nan(got, want)


def test_half_precision_is_rounded_as_torch_rounds_it(toys):
    every = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16))
    # Where a rounding begins to overflow.
    values = [np.array([65520, 2.0**128 - 2.0**119], np.float32)]
    for dtype in (torch.float16, torch.bfloat16):
        exact = every.view(dtype).float().numpy()
        with np.errstate(all="ignore"):
            middle = ((exact.astype(np.float64) + np.roll(exact, -1)) / 2).astype(np.float32)
        values += [exact, middle]
    with np.errstate(all="ignore"):
        values += [np.nextafter(x, np.float32(end)) for x in values for end in (-np.inf, np.inf)]
    draw = np.random.default_rng(0)
    values.append(draw.integers(0, 2**32, 2**20, dtype=np.uint32).view(np.float32))
    x = np.concatenate(values)
    x = np.concatenate([x, -x])
    half, bfloat16 = (np.zeros(x.size, np.uint16) for _ in range(2))
    call(toys.library.toy_from_float, x, half, bfloat16)
    for got, dtype in ((half, torch.float16), (bfloat16, torch.bfloat16)):
        rounded = torch.from_numpy(got.view(np.int16)).view(dtype)
        want = torch.from_numpy(x).to(dtype)
        assert same_bits_or_nan(rounded.float().numpy(), want.float().numpy())


def call(function, *arrays):
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in arrays)
    function(*pointers, ctypes.c_size_t(arrays[0].size))


def same_bits_or_nan(got, want):
    nan = np.isnan(got) & np.isnan(want)
    return bool(np.all(nan | (got.view(np.uint32) == want.view(np.uint32))))


def sanitized(sanitizer, function, *arguments):
    reasons = cuda_host.missing_reasons(sanitizer)
    if reasons:
        pytest.skip("; ".join(reasons))
    toys = build_toys(sanitizer)
    return cuda_host.run_sanitized(sanitizer, f"support.cuda_toys:{function}", toys, *arguments)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_are_quiet_on_kernels_that_are_right(sanitizer):
    result = sanitized(sanitizer, "run_right_ones")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("kernel", "grid", "threads", "found"),
    [
        ("writes_past_end", 2, 64, "heap-buffer-overflow"),
        ("reads_before_start", 1, 64, "heap-buffer-overflow"),
        ("past_shared", 1, 33, "use-after-poison"),
        ("before_shared", 1, 32, "use-after-poison"),
        ("misaligned", 1, 1, "misaligned address"),
    ],
)
def test_accesses_out_of_bounds_are_found(kernel, grid, threads, found):
    result = sanitized("address", "run", kernel, 100, grid, threads)
    assert result.returncode == cuda_host.FOUND, result.stderr
    assert found in result.stderr and "toy.cu:" in result.stderr


def test_copies_out_of_bounds_are_found():
    result = sanitized("address", "run", "copies_past_end", 100, 1, 32, 4)
    assert result.returncode == cuda_host.FOUND, result.stderr
    assert "heap-buffer-overflow" in result.stderr and "toy.cu:" in result.stderr


@pytest.mark.parametrize(
    ("kernel", "grid", "threads"),
    [
        ("turn<false>", 1, 64),
        ("add<32, false>", 1, 64),
        ("neighbour<false>", 1, 32),
        ("race_in_block", 1, 64),
        ("race_in_warp", 1, 32),
        ("race_in_shared", 1, 64),
        ("race_of_halves", 1, 32),
        ("race_after_barrier", 1, 64),
        ("race_of_blocks", 2, 64),
        ("race_with_block_before", 2, 1),
        ("pipeline<3, 4, kBarrier>", 1, 64),
        ("pipeline<3, 4, kOrder>", 1, 64),
        ("matrices<false, false>", 1, 32),
        ("race_over_product", 1, 32),
    ],
)
def test_races_are_found(kernel, grid, threads):
    result = sanitized("thread", "run", kernel, 1024, grid, threads, 12)
    assert result.returncode == cuda_host.FOUND, result.stderr
    assert "data race" in result.stderr and "toy.cu:" in result.stderr


def small_module(root, value):
    folder = root / cuda_host.KERNELS
    folder.mkdir(parents=True)
    (folder / "kernels.h").write_text("int value();\n")
    (folder / "kernels.cu").write_text(
        "#include <cuda_runtime.h>\n"
        '#include "kernels.h"\n'
        "__global__ void wait(int) {\n  if (threadIdx.x) __syncthreads();\n}\n"
        "int value() {\n"
        "  cudaLaunchConfig_t config{};\n  config.blockDim = dim3(64);\n"
        f"  return cudaLaunchKernelEx(&config, wait, 0) == cudaSuccess ? {value} : -1;\n"
        "}\n"
    )
    (folder / "bindings.cpp").write_text(
        "#include <pybind11/pybind11.h>\n"
        '#include "kernels.h"\n'
        'PYBIND11_MODULE(_cuda, m) { m.def("value", &value); }\n'
    )


def test_builds_with_faults_live_side_by_side(tmp_path, monkeypatch):
    """One is refused, with the line of its file; one with the barrier for all runs."""
    small_module(tmp_path, 5)
    monkeypatch.setattr(cuda_host, "ROOT", tmp_path)
    as_it_is = cuda_host.build_kernels()
    edit = cuda_host.Edit("kernels.cu", "if (threadIdx.x) ", "")
    edited = cuda_host.build_kernels(edit=edit)
    assert as_it_is != edited and cuda_host.build_kernels(edit=edit) == edited
    faulty, mended = cuda_host.load(as_it_is), cuda_host.load(edited)
    assert cuda_host.load(as_it_is) is faulty
    assert mended.value() == 5
    with pytest.raises(RuntimeError, match=r"^csrc/cuda/kernels.cu:4: __syncthreads"):
        faulty.value()
    with cuda_host.recorded(mended) as launches:
        mended.value()
    assert launches == [cuda_host.Launch((1, 1, 1), (64, 1, 1), 0)]


@pytest.mark.parametrize("old", ["nowhere", "threadIdx"])
def test_an_edit_names_one_place(tmp_path, monkeypatch, old):
    small_module(tmp_path, "threadIdx.x")
    monkeypatch.setattr(cuda_host, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"kernels\.cu has [02] times"):
        cuda_host.build_kernels(edit=cuda_host.Edit("kernels.cu", old, ""))


def test_two_processes_build_at_once(tmp_path):
    source = tmp_path / "own.cu"
    source.write_text("#include <cuda_runtime.h>\n")
    build = (
        "import pathlib, sys; from support import cuda_host\n"
        "cuda_host.build_folder = lambda: pathlib.Path(sys.argv[1])\n"
        "print(cuda_host.build('own', [pathlib.Path('own.cu')], root=pathlib.Path(sys.argv[1])))"
    )
    environment = {**os.environ, "PYTHONPATH": str(cuda_host.TESTS)}
    command = [sys.executable, "-c", build, str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    paths = {process.communicate()[0].strip() for process in processes}
    assert len(paths) == 1 and Path(paths.pop()).is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]


def test_a_source_that_does_not_compile_says_so(tmp_path):
    (tmp_path / "wrong.cu").write_text("#error not today\n")
    with pytest.raises(RuntimeError, match="not today"):
        cuda_host.build("wrong", [Path("wrong.cu")], root=tmp_path)


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cuda_host.missing_reasons.__wrapped__() == ["there is no g++"]
