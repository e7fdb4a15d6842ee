"""The interpreter's guard: each fault that it is there for is planted and found."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.numerics import EPS, error, laid_out

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)
tl = pytest.importorskip("triton.language")
guard = pytest.importorskip("support.interpreter_guard")
errors = pytest.importorskip("triton.runtime.errors")

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def guarded():
    with guard.guarded():
        yield


def caught(message):
    return pytest.raises(guard.KernelMemoryError, match=message)


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        k_row, k_column = k[None, :], k[:, None]
        x = tl.load(a + m * K + k_row, mask=(m < M) & (k_row < K), other=0.0)
        y = tl.load(b + k_column * N + n, mask=(k_column < K) & (n < N), other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    tl.store(c + m * N + n, acc, mask=(m < M) & (n < N))


def matmul(a, b, precision="ieee", bk=16, bm=16):
    M, K, N = *a.shape, b.shape[1]
    c = torch.full((M, N), torch.nan)
    grid = (triton.cdiv(M, bm), triton.cdiv(N, 32))
    matmul_kernel[grid](a, b, c, M, N, K, bm, 32, bk, precision)
    return c


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_half_precision_dot_is_exact_where_float32_is(dtype):
    a = torch.randint(-128, 129, (23, 50)).to(dtype) / 64
    b = torch.randint(-128, 129, (50, 41)).to(dtype) / 64
    assert torch.equal(matmul(a, b).double(), a.double() @ b.double())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_half_precision_dot_sums_in_float32(dtype):
    a, b = torch.randn(23, 50).to(dtype), torch.randn(50, 41).to(dtype)
    assert error(matmul(a, b), a.double() @ b.double()) < 4 * EPS


def test_tf32_reads_ten_bits_of_the_mantissa():
    def read(x):
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    a, b = torch.rand(23, 50) - 0.5, torch.rand(50, 41) - 0.5
    got = matmul(a, b, "tf32")
    assert error(got, read(a).double() @ read(b).double()) < 4 * EPS
    assert 2**-13 < error(got, a.double() @ b.double()) < 2**-9


def test_three_tf32_products_are_nearly_float32():
    a, b = torch.randn(64, 512), torch.randn(512, 32)
    want = a.double() @ b.double()
    ieee, three, one = (error(matmul(a, b, p, bm=64), want) for p in ("ieee", "tf32x3", "tf32"))
    assert ieee < 4 * EPS
    assert three < 8 * EPS
    assert one > 500 * three
    # Without the sums' own errors, what the three leave out shows.
    a, b = torch.randn(64, 16), torch.eye(16, 32) * (1 + 2**-12 + 2**-23)
    want = a.double() @ b.double()
    ieee, three = (error(matmul(a, b, p, bm=64), want) for p in ("ieee", "tf32x3"))
    assert ieee < EPS / 2 < three < 4 * EPS
    # Rounding up leaves 2^-23 - 2^-11, of which eleven bits are read; cut off, it would be 2^-11.
    a = torch.full((16, 16), 1 + 2**-11 + 2**-23)
    assert (matmul(a, torch.eye(16, 32), "tf32x3")[:, :16] == 1 + 2**-11 + 2**-22).all()


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_dot_keeps_what_is_not_finite(precision, value):
    a, b = torch.rand(16, 16) + 1, torch.rand(16, 32) + 1
    a[3] = value
    # The guard's own poison.
    a[4] = torch.full((16,), -1, dtype=torch.int32).view(torch.float32)
    got = matmul(a, b, precision)
    assert torch.equal(got.isfinite(), (a @ b).isfinite())
    assert torch.equal(got[3:5].isnan(), (a @ b)[3:5].isnan())


@pytest.mark.parametrize(("dtype", "bk"), [(torch.float16, 8), (torch.float32, 4)], ids=str)
def test_a_dot_needs_as_many_k_as_on_a_gpu(dtype, bk):
    with pytest.raises(errors.InterpreterError, match="K >="):
        matmul(torch.zeros(16, 16, dtype=dtype), torch.zeros(16, 32, dtype=dtype), bk=bk)


@triton.jit
def cast_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@pytest.mark.parametrize("src", [torch.float32, torch.float64, torch.int32], ids=str)
def test_a_cast_to_bfloat16_rounds_to_nearest(src):
    x = torch.randn(512) * torch.logspace(-42, 38.6, 512)
    if src.is_floating_point:
        ties = torch.arange(8.0) * 2**-8 + 1
        x[:12] = torch.cat([ties, torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])])
        # NaN that the rounding of their bits would make 0 and infinity.
        x[12:14] = torch.tensor([-1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    else:
        x = torch.arange(512) * 127
    x = x.to(src)
    y = torch.empty(512, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, 512)
    torch.testing.assert_close(y, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(512)
    cast_kernel[(1,)](y, back, 512)
    torch.testing.assert_close(back, y.float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def arithmetic_kernel(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + BLOCK + i, a * 0.7)
    tl.store(out + 2 * BLOCK + i, -a)
    tl.store(out + 3 * BLOCK + i, tl.where(a > b, a, b))
    tl.store(out + 4 * BLOCK + i, tl.maximum(a, 0.0))
    tl.store(out + 5 * BLOCK + i, tl.full([BLOCK], 0.3, out.dtype.element_ty))
    tl.store(out + 6 * BLOCK + i, tl.fma(a, b, a))
    tl.store(out + 7 * BLOCK + i, tl.zeros([BLOCK], tl.float32) + tl.sum(a, 0))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_arithmetic_in_half_precision(dtype):
    x, y = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    out = torch.empty(8, 64, dtype=dtype)
    arithmetic_kernel[(1,)](x, y, out, 64)
    scale = torch.tensor(0.7, dtype=dtype)
    want = [x + y, x * scale, -x, torch.maximum(x, y), x.relu(), torch.full_like(x, 0.3)]
    assert torch.equal(out[:6], torch.stack(want))
    assert error(out[6].float(), x.double() * y.double() + x.double()) < 2**-8
    assert (out[7] - x.float().sum()).abs().max() < 2**-5


@triton.jit
def overflow_kernel(x, n):
    tl.store(x, (tl.program_id(0) + 1) * n * n)


def test_integers_that_overflow_raise():
    x = torch.zeros(1, dtype=torch.int32)
    overflow_kernel[(1,)](x, 46340)
    assert x.item() == 46340**2
    with pytest.raises(errors.InterpreterError, match="int32 overflow"):
        overflow_kernel[(1,)](x, 46341)


@triton.jit
def assert_kernel(x):
    tl.device_assert(tl.load(x) == 1, "one is wanted")


def test_a_device_assert_is_looked_at():
    assert_kernel[(1,)](torch.ones(1))
    with pytest.raises(errors.InterpreterError, match="one is wanted"):
        assert_kernel[(1,)](torch.zeros(1))


@triton.jit
def histogram_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.histogram(tl.load(x + i), BLOCK))


def test_what_the_interpreter_holds_in_another_size_is_not_stored():
    x, y = torch.arange(16) // 2, torch.zeros(16, dtype=torch.int32)
    histogram_kernel[(1,)](x.int(), y, 16)
    assert torch.equal(y, x.bincount(minlength=16).int())
    with pytest.raises(errors.InterpreterError, match="int16 stored as int32"):
        histogram_kernel[(1,)](x.short(), y, 16)


@triton.jit
def copy_kernel(x, y, n_load, n_store, offset, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offset + i, mask=i < n_load, other=0)
    tl.store(y + i, value, mask=i < n_store)


@triton.jit
def unmasked_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))


def test_a_right_kernel_passes():
    x, y = torch.randn(100), torch.full((100,), torch.nan)
    copy_kernel[(4,)](x, y, 100, 100, 0, 32)
    assert torch.equal(x, y)
    a, b = torch.randn(23, 50), torch.randn(50, 41)
    assert error(matmul(a, b), a.double() @ b.double()) < 4 * EPS


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((128, 100, 0), r"out-of-bounds load: 28 of 32 lanes, the first at byte 400 of 400"),
        ((100, 128, 0), r"out-of-bounds store: 28 of 32 lanes"),
        ((100, 101, 0), r"out-of-bounds store: 1 of 5 lanes"),
        ((100, 100, 1), r"out-of-bounds load: 1 of 4 lanes"),
        ((100, 100, -1), r"out-of-bounds load: 1 of 32 lanes, the first at byte -4 of 400"),
    ],
    ids=["load", "store", "store one more", "one too far", "one too early"],
)
def test_out_of_bounds(limits, message):
    x, y = torch.randn(100), torch.empty(100)
    program = 0 if limits[2] < 0 else 3
    with caught(rf"kernel copy_kernel, program \({program}, 0, 0\): {message}"):
        copy_kernel[(4,)](x, y, *limits, 32)


def test_a_missing_mask():
    with caught("out-of-bounds load: 28 of 32 lanes.*float32 tensor"):
        unmasked_kernel[(4,)](torch.zeros(100), torch.zeros(128), 32)
    with caught("out-of-bounds store: 28 of 32 lanes"):
        unmasked_kernel[(4,)](torch.zeros(128), torch.zeros(100), 32)
    unmasked_kernel[(4,)](torch.zeros(128), torch.zeros(128), 32)


def test_a_neighbour_in_memory_is_out_of_bounds():
    x, y = torch.zeros(128).chunk(2)
    with caught("out-of-bounds load: 1 of 32 lanes"):
        copy_kernel[(2,)](x, y, 64, 64, 1, 32)
    copy_kernel[(2,)](x, y, 64, 64, 0, 32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_elements_of_other_sizes(dtype):
    x, y = torch.randint(0, 2, (100,)).to(dtype), torch.zeros(100, dtype=dtype)
    copy_kernel[(4,)](x, y, 100, 100, 0, 32)
    assert torch.equal(x, y)
    with caught("out-of-bounds store: 1 of 5 lanes"):
        copy_kernel[(4,)](x, y, 100, 101, 0, 32)


@triton.jit
def flagged_kernel(x, y, size, limit, programs, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (i >= limit) & (i < size) & (tl.program_id(0) < programs)
    tl.store(y + i, tl.load(x + i, mask=mask, other=0.0), mask=mask)


def test_a_mask_that_a_single_flag_has_part_in():
    """The interpreter makes numbers of it, which are no indices of lanes."""
    x, y = torch.randn(100), torch.zeros(100)
    flagged_kernel[(9,)](x, y, 100, 3, 4, 32)
    assert torch.equal(y[3:], x[3:])
    assert not y[:3].any()
    with caught("out-of-bounds load: 1 of 5 lanes"):
        flagged_kernel[(9,)](x, y, 101, 3, 4, 32)
    with caught(r"program \(3, 0, 0\): out-of-bounds load: 28 of 32 lanes"):
        flagged_kernel[(9,)](x, y, 140, 3, 5, 32)


@triton.jit
def strided_kernel(x, y, rows, columns, x_row, x_column, BLOCK: tl.constexpr):
    r, c = tl.program_id(0), tl.arange(0, BLOCK)
    mask = c < columns
    tl.store(y + r * columns + c, tl.load(x + r * x_row + c * x_column, mask=mask), mask=mask)


def copied(x):
    y = torch.full(x.shape, torch.nan)
    strided_kernel[(x.shape[0],)](x, y, *x.shape, *x.stride(), 16)
    return y


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.T,
        lambda x: x[2:, 3:],
        lambda x: x[::3, ::2],
        lambda x: x[0].expand(5, -1),
        lambda x: x[:0],
        lambda x: laid_out(x.view(1, 10, 12, 1), "strided")[0, :, :, 0],
    ],
    ids=["whole", "transposed", "offset", "strided", "expanded", "empty", "no order"],
)
def test_views(view):
    x = view(torch.randn(10, 12))
    assert torch.equal(copied(x), x)


def test_between_the_elements_of_a_view_is_out_of_bounds():
    x, y = torch.randn(10, 12), torch.empty(5, 12)
    with caught(r"out-of-bounds load: 6 of 12 lanes.* \[5, 6\] of strides \[24, 2\]"):
        strided_kernel[(5,)](x[::2, ::2], y, 5, 12, 24, 1, 16)


def test_an_empty_tensor_has_no_element():
    y = torch.empty(100)
    copy_kernel[(4,)](torch.empty(0), y, 0, 100, 0, 32)
    assert torch.equal(y, torch.zeros(100))
    with caught("out-of-bounds load: 1 of 1 lanes"):
        copy_kernel[(4,)](torch.empty(0), y, 1, 100, 0, 32)


@triton.jit
def scaled_kernel(tensors, scale, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    value = tl.load(tensors[0] + i, mask=mask) + tl.load(tensors[1] + i, mask=mask)
    if scale is not None:
        value *= tl.load(scale)
    tl.store(y + i, value, mask=mask)


def test_tuples_none_and_keywords():
    a, b, y = torch.randn(50), torch.randn(50), torch.empty(50)
    scaled_kernel[(2,)]((a, b), None, y, n=50, BLOCK=32)
    assert torch.equal(y, a + b)
    scaled_kernel[(2,)]((a, a), torch.tensor(2.0), y=a, n=50, BLOCK=32)
    with caught("out-of-bounds load: 1 of 18 lanes"):
        scaled_kernel[(2,)]((a, b[:49]), None, y, n=50, BLOCK=32)
    with caught("out-of-bounds load: 1 of 1 lanes"):
        scaled_kernel[(2,)]((a, b), b[:0], y, n=50, BLOCK=32)


@triton.jit
def either_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    pointers = tl.where(i % 2 == 0, x + i, y + i)
    tl.store(out + i, tl.load(pointers, mask=i < n), mask=i < n)


def test_pointers_into_two_tensors():
    x, y, out = torch.zeros(30), torch.ones(30), torch.empty(31)
    either_kernel[(1,)](x, y, out, 30, 32)
    assert torch.equal(out[:30], torch.arange(30.0) % 2)
    with caught("out-of-bounds load: 1 of 16 lanes, the first at byte 120 of 120"):
        either_kernel[(1,)](x, y, out, 31, 32)


@triton.jit
def pointer_table_kernel(table, y):
    tl.store(y, tl.load(tl.load(table).to(tl.pointer_type(tl.float32))))


def test_a_pointer_from_memory_is_of_no_argument():
    x = torch.ones(1)
    with caught("a pointer of no argument"):
        pointer_table_kernel[(1,)](torch.tensor([x.data_ptr()]), x)


@triton.jit
def misaligned_kernel(x, y):
    shifted = (x.to(tl.pointer_type(tl.int8)) + 2).to(tl.pointer_type(tl.float32))
    tl.store(y, tl.load(shifted))


def test_a_misaligned_access():
    with caught("misaligned load: 1 of 1 lanes, not at 4 bytes"):
        misaligned_kernel[(1,)](torch.zeros(4), torch.zeros(1))


@triton.jit
def no_other_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=str)
def test_masked_lanes_are_nan(dtype):
    x, y = torch.ones(20, dtype=dtype), torch.zeros(32, dtype=dtype)
    no_other_kernel[(1,)](x, y, 20, 32)
    assert torch.equal(y[:20], x)
    assert y[20:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8], ids=str)
def test_masked_lanes_of_integers_are_all_ones(dtype):
    x, y = torch.ones(20, dtype=dtype), torch.zeros(32, dtype=dtype)
    no_other_kernel[(1,)](x, y, 20, 32)
    assert torch.equal(y[:20], x)
    assert (y[20:] == -1).all()


@triton.jit
def scatter_kernel(index, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index + i, mask=i < n, other=0)
    tl.store(y + at, i.to(tl.float32), mask=i < n)


def test_duplicate_addresses_in_one_store():
    y = torch.empty(32)
    scatter_kernel[(1,)](torch.randperm(32), y, 32, 32)
    with caught("store to duplicate addresses: 16 of 32 lanes"):
        scatter_kernel[(1,)](torch.arange(32) // 2, y, 32, 32)
    with caught("store to duplicate addresses: 1 of 30 lanes"):
        scatter_kernel[(1,)](torch.cat([torch.arange(29), torch.tensor([7] * 3)]), y, 30, 32)


def test_two_programs_write_one_place():
    index = torch.arange(64)
    index[40] = 3
    with caught(r"program \(1, 0, 0\): race: store of what program \(0, 0, 0\) stored"):
        scatter_kernel[(2,)](index, torch.empty(64), 64, 32)
    scatter_kernel[(1,)](index[:32], torch.empty(32), 32, 32)


@triton.jit
def shift_kernel(x, y, n, offset, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = i + offset
    value = tl.load(x + at, mask=(i < n) & (at >= 0) & (at < n), other=0.0)
    tl.store(y + i, value, mask=i < n)


@pytest.mark.parametrize(
    ("offset", "message"),
    [(-1, "race: load of what program .* stored"), (1, "race: store of what program .* loaded")],
)
def test_a_race_between_reading_and_writing(offset, message):
    x = torch.randn(100)
    shift_kernel[(4,)](x, torch.empty(100), 100, offset, 32)
    with caught(message):
        shift_kernel[(4,)](x, x, 100, offset, 32)
    # By whatever argument they come to the place.
    with caught(message):
        shift_kernel[(4,)](x.view(10, 10), x.detach(), 100, offset, 32)


def test_in_place_is_no_race():
    x = torch.randn(100)
    want = x.clone()
    shift_kernel[(4,)](x, x, 100, 0, 32)
    shift_kernel[(1,)](x, x, 100, 0, 128)
    assert torch.equal(x, want)


def test_one_launch_after_another_is_no_race():
    x, y = torch.randn(100), torch.empty(100)
    for _ in range(2):
        shift_kernel[(4,)](x, y, 100, 1, 32)
        shift_kernel[(4,)](y, x, 100, -1, 32)


@triton.jit
def reread_kernel(x, y, z):
    program = tl.program_id(0)
    if program == 2:
        tl.store(x, 1.0)
    else:
        tl.store(y + program, tl.load(x) + tl.load(z))


def test_a_race_with_one_of_several():
    with caught("race: store of what other programs loaded"):
        reread_kernel[(3,)](torch.zeros(1), torch.zeros(3), torch.zeros(1))
    reread_kernel[(2,)](torch.zeros(1), torch.zeros(3), torch.zeros(1))


@triton.jit
def words_kernel(halves, words):
    program = tl.program_id(0)
    if program == 0:
        tl.store(words, 7)
    else:
        tl.store(halves + program, 1.0)


def test_a_race_of_accesses_of_two_sizes():
    halves = torch.zeros(8, dtype=torch.float16)
    with caught("race: store of what program .* stored"):
        words_kernel[(2,)](halves, halves.view(torch.int32))
    words_kernel[(2,)](halves[2:], halves.view(torch.int32))


@triton.jit
def atomic_kernel(x, total, LOAD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total + i % 2, tl.load(x + i))
    if LOAD:
        tl.store(x + i, tl.load(total) + i)


def test_atomics_may_meet():
    x, total = torch.randn(64), torch.zeros(2)
    atomic_kernel[(2,)](x, total, False, 32)
    torch.testing.assert_close(total, x.view(32, 2).sum(0))


def test_atomics_and_plain_accesses_race():
    with caught("race: (load|atomic) of what program .* (changed atomically|loaded)"):
        atomic_kernel[(2,)](torch.randn(64), torch.zeros(2), True, 32)
    with caught("out-of-bounds atomic: 16 of 32 lanes"):
        atomic_kernel[(2,)](torch.randn(64), torch.zeros(1), False, 32)


def test_atomics_of_bfloat16_are_refused():
    x = torch.zeros(64, dtype=torch.bfloat16)
    with pytest.raises(errors.InterpreterError, match="bfloat16"):
        atomic_kernel[(2,)](x, x[:2], False, 32)


@triton.jit
def swap_kernel(x, y):
    tl.store(y + tl.program_id(0), tl.atomic_cas(x, 0, tl.program_id(0) + 1))


def test_compare_and_swap():
    x, y = torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    swap_kernel[(3,)](x, y)
    assert x.item() == 1
    assert y.tolist() == [0, 1, 1]
    with caught("out-of-bounds atomic: 1 of 1 lanes"):
        swap_kernel[(3,)](x[:0], y)


def test_races_may_be_left_to_the_kernel():
    x, y = torch.randn(64), torch.empty(64)
    with guard.guarded(races=False):
        atomic_kernel[(2,)](x, torch.zeros(2), True, 32)
        with caught("out-of-bounds load"):
            unmasked_kernel[(2,)](x[:60], y, 32)
    with caught("race"):
        atomic_kernel[(2,)](x, torch.zeros(2), True, 32)


@triton.jit
def descriptor_kernel(x, y, rows, columns, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [rows, columns], [columns, 1], [BLOCK, WIDTH])
    target = tl.make_tensor_descriptor(y, [rows, columns], [columns, 1], [BLOCK, WIDTH])
    first = tl.program_id(0) * BLOCK
    target.store([first, 0], source.load([first, 0]))


def test_tensor_descriptors():
    x, y = torch.randn(40, 28), torch.zeros(40, 28)
    descriptor_kernel[(3,)](x, y, 40, 28, 16, 32)
    assert torch.equal(y, x)
    with caught("out-of-bounds load: 28 of 224 lanes"):
        descriptor_kernel[(3,)](x[:39], y, 40, 28, 16, 32)
    with caught("out-of-bounds store: 28 of 224 lanes"):
        descriptor_kernel[(3,)](x, y[:39], 40, 28, 16, 32)


@triton.jit
def helper(x, i):
    return tl.load(x + i)


@triton.jit
def calling_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, helper(x, i))


def test_a_function_of_a_kernel_is_guarded():
    with caught("kernel calling_kernel, .*out-of-bounds load: 2 of 32 lanes"):
        calling_kernel[(1,)](torch.zeros(30), torch.zeros(32), 32)


def test_a_context_ends_and_an_installed_guard_stays(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, triton, triton.language as tl\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from support import interpreter_guard as guard\n"
        "@triton.jit\n"
        "def kernel(x):\n"
        "    tl.store(x + tl.program_id(0) * 0, 1.0)\n"
        "def is_guarded():\n"
        "    try:\n"
        "        kernel[(2,)](torch.zeros(1))\n"
        "    except guard.KernelMemoryError:\n"
        "        return True\n"
        "    return False\n"
        "states = [is_guarded()]\n"
        "with guard.guarded():\n"
        "    states.append(is_guarded())\n"
        "states.append(is_guarded())\n"
        "guard.install()\n"
        "guard.install()\n"
        "with guard.guarded():\n"
        "    states.append(is_guarded())\n"
        "states.append(is_guarded())\n"
        "print(*map(int, states))\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["0", "1", "0", "1", "1"]
