"""The executor of PTX: what Triton emits computes what torch computes, and faults are caught."""

import importlib.util
import math
import sys

import numpy as np
import pytest
from support.ptx import Kernel
from support.ptx_conflicts import ConflictCounter
from support.ptx_memory import PtxError, Region
from support.ptx_runs import ORDERS, outcomes
from support.ptx_text import split

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sys.platform != "linux",
    reason="triton is not installed",
)

# What the sums of the products leave in float32; TF32 reads 10 bits of the mantissa.
MATMUL_TOLERANCE = {"bfloat16": 1e-6, "float16": 1e-6, "float32": 2e-3}
MATMULS = [
    f"matmul {dtype}{' transposed' * transposed} {order}"
    for dtype in MATMUL_TOLERANCE
    for transposed in (False, True)
    for order in ORDERS
]
FLOAT32_MATMULS = [f"matmul {p} {order}" for p in ("tf32x3", "ieee") for order in ORDERS]
ELEMENTWISE = [f"elementwise {order}" for order in ORDERS]
SOFTMAXES = [f"softmax {order}" for order in ORDERS]
FAULTS = ["softmax without a barrier", "matmul without a barrier", "matmul without a wait"]
OTHERS = [
    *("within bounds", "out of bounds", "aligned", "misaligned", "autotuned"),
    *("empty grid", "grid too large", "too much shared memory"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of all cases, which two processes that do not interpret run."""
    names = [*MATMULS, *FLOAT32_MATMULS, *FAULTS, *ELEMENTWISE, *SOFTMAXES, *OTHERS]
    return outcomes("support.ptx_cases", names, tmp_path_factory.mktemp("triton"))


@needs_triton
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_with_a_tail(results, name):
    assert results[name]["error"] < 1e-6
    assert results[name]["kept"]
    assert results[name]["launches"] == [["elementwise_kernel", 4, 1, 1]]


@needs_triton
@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_reduction_across_warps(results, name):
    assert results[name]["error"] < 1e-6
    assert results[name]["atomic_error"] < 1e-6
    assert min(results[name]["opcodes"][o] for o in ("shfl", "bar.sync")) > 0


@needs_triton
@pytest.mark.parametrize("name", MATMULS)
def test_a_pipelined_product(results, name):
    """Ragged rows and columns, and blocks that add up different numbers of tiles."""
    assert results[name]["error"] < MATMUL_TOLERANCE[name.split()[1]]
    used = results[name]["opcodes"]
    assert min(used["mma"], used["cp.async.cg"], used["cp.async.wait_group"]) > 0
    assert used["ldmatrix"] > 0


@needs_triton
@pytest.mark.parametrize("name", FLOAT32_MATMULS)
def test_a_product_in_float32(results, name):
    assert results[name]["error"] < 2e-6


def is_wrong(error):
    return math.isnan(error) or error > 1e-3


@needs_triton
@pytest.mark.parametrize(
    ("name", "least"),
    list(zip(FAULTS, (3, 5, 1), strict=True)),
)
def test_what_is_missing_shows(results, name, least):
    """In some order at least, and but for what guards nothing: a first barrier, a second wait."""
    shown = [any(map(is_wrong, errors)) for errors in results[name]["each"]]
    assert sum(shown) >= least
    assert all(map(is_wrong, results[name]["all"]))


@needs_triton
def test_memory_ends_with_the_storage(results):
    assert results["within bounds"] == {}
    assert "PtxError: out of bounds: 1 lanes" in results["out of bounds"]["raised"]


@needs_triton
def test_a_false_promise_of_divisibility(results):
    assert results["aligned"] == {"error": 0.0}
    assert "PtxError: misaligned: an access of 16 bytes" in results["misaligned"]["raised"]


@needs_triton
def test_the_autotuner_runs_all_configurations(results):
    assert results["autotuned"] == {"error": 0.0, "grids": [3, 5]}


@needs_triton
def test_limits_of_a_launch(results):
    assert results["empty grid"] == {"instructions": 0}
    assert "PtxError: a grid of (1, 65536, 1)" in results["grid too large"]["raised"]
    assert results["too much shared memory"]["raised"].startswith("OutOfResources")


HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 p, .param .u64 q, .param .f32 f)
{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<20>;
    .reg .b64 %d<20>;
    // Thread, block, and the addresses of this thread's input and output.
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mad.lo.s32 %r3, %r1, %r2, %r0;
    ld.param.b64 %d0, [p];
    ld.param.b64 %d1, [q];
    mad.wide.u32 %d2, %r3, 8, %d0;
    mad.wide.u32 %d3, %r3, 8, %d1;
    mov.b64 %d4, 0;
"""


def region(array):
    return Region(array.ctypes.data, array.view(np.uint8).reshape(-1))


def kernel_with(body):
    return Kernel(f"{HEAD}{body}\n    ret;\n}}\n")


def run(body, inputs=None, warps=2, blocks=1, order="ascending", shared=256, conflicts=None):
    """``[blocks, threads]``: the 64-bit output of each thread, which has one of the inputs."""
    size = blocks * warps * 32
    out = np.full(size, -7, np.int64)
    given = np.zeros(size, np.int64)
    if inputs is not None:
        given[: len(inputs)] = inputs
    kernel_with(body).launch(
        (blocks, 1, 1),
        32 * warps,
        [given.ctypes.data, out.ctypes.data, 0.5],
        [region(given), region(out)],
        shared=shared,
        warp_order=order,
        conflicts=conflicts,
    )
    return out.reshape(blocks, -1)


def caught(message):
    return pytest.raises(PtxError, match=message)


# Each thread passes a number to the next, in a ring through all warps.
RING = """
    shl.b32 %r4, %r0, 2;
    mov.b32 %r5, memory;
    add.s32 %r6, %r5, %r4;
    ld.global.b32 %r7, [%d2];
    st.shared.b32 [%r6], %r7;
    bar.sync 0;
    add.s32 %r8, %r4, 4;
    sub.s32 %r9, %r2, 1;
    setp.eq.s32 %p1, %r0, %r9;
    selp.b32 %r8, 0, %r8, %p1;
    add.s32 %r8, %r8, %r5;
    ld.shared.b32 %r10, [%r8];
    cvt.s64.s32 %d5, %r10;
    st.global.b64 [%d3], %d5;
"""


@pytest.mark.parametrize("order", ORDERS)
def test_a_barrier_orders_warps(order):
    values = np.arange(100, 164)
    assert np.array_equal(run(RING, values, order=order)[0], np.roll(values, -1))


@pytest.mark.parametrize("order", ORDERS)
def test_without_the_barrier_memory_is_poison(order):
    """Of the two threads that read another warp's number, the order decides which is too early."""
    values = np.arange(100, 164)
    wrong = run(RING.replace("bar.sync 0;", ""), values, order=order)[0] != np.roll(values, -1)
    assert np.flatnonzero(wrong) == [31 if order == "ascending" else 63]


@pytest.mark.parametrize("condition", ["setp.lt.s32 %p1, %r0, 32", "setp.lt.s32 %p1, %r1, 1"])
def test_a_barrier_that_some_warps_miss(condition):
    """Whole blocks may miss one."""
    body = f"{condition};\n @!%p1 bra $after;\n bar.sync 0;\n $after:\n"
    if "%r0" in condition:
        with caught("barrier divergence in block 0 of kernel: .* at barrier 0, ended"):
            run(body)
    else:
        run(body, blocks=3)


def test_a_barrier_that_some_lanes_miss():
    body = "setp.lt.s32 %p1, %r0, 5;\n @%p1 bra $after;\n bar.sync 0;\n $after:\n"
    with caught("needs all lanes of the warp.*\n.*bar.sync 0"):
        run(body)


def test_lanes_part_and_meet():
    """As many rounds as the thread's number, then a shuffle that needs all lanes."""
    body = """
        mov.b32 %r5, 0;
        mov.b32 %r4, %r3;
    $round:
        setp.eq.s32 %p1, %r4, 0;
        @%p1 bra $end;
        add.s32 %r5, %r5, %r4;
        sub.s32 %r4, %r4, 1;
        bra.uni $round;
    $end:
        shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1;
        cvt.u64.u32 %d5, %r6;
        st.global.b64 [%d3], %d5;
    """
    thread = np.arange(96 * 3) ^ 1
    got = run(body, warps=3, blocks=3)
    assert np.array_equal(got.reshape(-1), thread * (thread + 1) // 2)


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_part_and_meet(order):
    """Asynchronous copies are under way meanwhile, and blocks meet again at barriers."""
    body = """
        mov.b32 %r5, memory;
        shl.b32 %r4, %r0, 3;
        add.s32 %r5, %r5, %r4;
        cp.async.ca.shared.global [%r5], [%d2], 8;
        cp.async.commit_group;
        mov.b32 %r6, 0;
        mov.b32 %r7, %r1;
    $round:
        add.s32 %r6, %r6, 1;
        bar.sync 0;
        sub.s32 %r7, %r7, 1;
        setp.ge.s32 %p1, %r7, 0;
        @%p1 bra $round;
        cp.async.wait_group 0;
        ld.shared.b64 %d5, [%r5];
        cvt.u64.u32 %d6, %r6;
        add.s64 %d5, %d5, %d6;
        st.global.b64 [%d3], %d5;
    """
    values = np.arange(70 * 64) * 1000
    got = run(body, values, blocks=70, order=order, shared=512)
    assert np.array_equal(got, values.reshape(70, 64) + np.arange(1, 71)[:, None])


def test_a_copy_is_poison_until_the_wait():
    body = """
        mov.b32 %r5, memory;
        shl.b32 %r4, %r0, 3;
        add.s32 %r5, %r5, %r4;
        st.shared.b64 [%r5], %d4;
        cp.async.ca.shared.global [%r5], [%d2], 8, 4;
        cp.async.commit_group;
        ld.shared.b64 %d5, [%r5];
        cp.async.wait_group 0;
        ld.shared.b64 %d6, [%r5];
        shl.b64 %d6, %d6, 32;
        shr.u64 %d5, %d5, 48;
        or.b64 %d5, %d5, %d6;
        st.global.b64 [%d3], %d5;
    """
    got = run(body, np.full(64, (9 << 32) + 5), shared=512)
    assert (got == (5 << 32) + 0xFFFF).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b64 %d5, [%d2+4];", "misaligned: an access of 8 bytes"),
        ("ld.global.b64 %d5, [%d2+8];", "out of bounds: 1 lanes access 8 bytes"),
        ("st.global.b64 [%d2+-8], %d4;", "out of bounds: 1 lanes access 8 bytes"),
        ("ld.global.b64 %d5, [%d9];", "misaligned|out of bounds"),
        ("mov.b32 %r5, memory;\n st.shared.b32 [%r5+256], %r0;", "out of bounds: 32 lanes"),
        ("mov.b32 %r5, memory;\n ld.shared.b64 %d5, [%r5+252];", "misaligned"),
        ("setp.eq.s32 %p1, %r0, 3;\n @%p1 shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;", "member mask"),
        ("$again:\n bra.uni $again;", "no end in sight"),
        ("trap;", "gave up"),
        ("add.s32 %r4, %r99x, 1;", "not a register or a number"),
        ("frobnicate.b32 %r4, %r0;", "unknown instruction: frobnicate.b32 %r4, %r0"),
        ("add.rna.f32 %r4, %r0, %r0;", "unknown modifier .rna: add.rna.f32"),
        ("div.rz.f32 %r4, %r0, %r0;", "unknown rounding: div.rz.f32"),
        ("wgmma.fence.sync.aligned;", "unknown instruction: wgmma.fence"),
        ("cvta.shared.u64 %d5, %d4;\n ld.b32 %r4, [%d5];", "out of bounds: 32 lanes"),
        (
            "cvta.to.shared.u64 %d5, %d0;\n cvt.u32.u64 %r4, %d5;\n ld.shared.b8 %r4, [%r4];",
            "out of bounds: 32 lanes access 1 bytes outside of the 256",
        ),
        ("brx.idx %r0, $nowhere;", "no labels, in: brx.idx"),
    ],
)
def test_what_is_refused(body, message, monkeypatch):
    monkeypatch.setattr("support.ptx.MOST_STEPS", 1000)
    with caught(message):
        run(body)


def test_generic_addresses_of_shared_memory():
    body = """
        mov.u64 %d5, memory;
        cvta.shared.u64 %d6, %d5;
        mad.wide.u32 %d6, %r0, 4, %d6;
        cvta.to.shared.u64 %d7, %d6;
        cvt.u32.u64 %r4, %d7;
        st.shared.b32 [%r4], %r0;
        ld.shared.b32 %r5, [%d7];
        cvt.u64.u32 %d5, %r5;
        st.global.b64 [%d3], %d5;
    """
    assert np.array_equal(run(body)[0], np.arange(64))


def accesses(body, **how):
    """Those to shared memory; %r9 is its address, and %d4 to %d6 are 0."""
    counter = ConflictCounter()
    start = "mov.b32 %r9, memory;\n mov.b64 %d5, 0;\n mov.b64 %d6, 0;\n"
    how = {"warps": 1, "shared": 4096, **how}
    run(start + body, conflicts=counter, **how)
    kernel = kernel_with(start + body)
    return counter.listed(kernel.instructions, kernel.labels)


def bytes_apart(count):
    return f"mad.lo.u32 %r5, %r0, {count}, %r9;\n"


COPY = "cp.async.ca.shared.global [%r5], [%d2]"
WIDE = "{%d4, %d5}"
MATRICES = "ldmatrix.sync.aligned.m8n8.x{count}.shared.b16"


@pytest.mark.parametrize(
    ("distance", "instruction", "wavefronts", "least"),
    [
        (4, "ld.shared.b32 %r6, [%r5]", 1, 1),
        (8, "ld.shared.b32 %r6, [%r5]", 2, 1),
        (12, "ld.shared.b32 %r6, [%r5]", 1, 1),
        (128, "ld.shared.b32 %r6, [%r5]", 32, 1),
        (132, "ld.shared.b32 %r6, [%r5]", 1, 1),
        (0, "ld.shared.b32 %r6, [%r5]", 1, 1),
        (0, "ld.shared.b32 %r6, [memory]", 1, 1),
        (0, "st.shared.b32 [%r5], %r0", 1, 1),
        (128, "st.shared.b32 [%r5], %r0", 32, 1),
        # Two lanes share a word.
        (2, "st.shared.b16 [%r5], %r0", 1, 1),
        (64, "ld.shared.u8 %r6, [%r5]", 16, 1),
        (8, "ld.shared.b64 %d5, [%r5]", 2, 2),
        (16, "st.shared.b64 [%r5], %d4", 4, 2),
        (8, "ld.shared.v2.b32 {%r6, %r7}, [%r5]", 2, 2),
        (16, "ld.shared.v2.b64 {%d5, %d6}, [%r5]", 4, 4),
        (16, "st.shared.v4.b32 [%r5], {%r0, %r0, %r0, %r0}", 4, 4),
        (128, "ld.shared.v2.b64 {%d5, %d6}, [%r5]", 32, 4),
        (0, f"st.shared.v2.b64 [%r5], {WIDE}", 4, 4),
        (4, f"{COPY}, 4", 1, 1),
        (128, f"{COPY}, 4", 32, 1),
        (16, f"{COPY}, 8", 4, 2),
        # Zeros are written, too.
        (16, f"{COPY}, 8, 0", 4, 2),
        (16, f"{MATRICES.format(count=4)} {{%r6, %r7, %r8, %r10}}, [%r5]", 4, 4),
        (64, f"{MATRICES.format(count=4)} {{%r6, %r7, %r8, %r10}}, [%r5]", 16, 4),
        (128, f"{MATRICES.format(count=2)} {{%r6, %r7}}, [%r5]", 16, 2),
        (80, f"{MATRICES.format(count=1)} {{%r6}}, [%r5]", 1, 1),
    ],
)
def test_conflicts_of_banks(distance, instruction, wavefronts, least):
    """Of two blocks of two warps."""
    body = f"{bytes_apart(distance)} {instruction};"
    (access,) = accesses(body, warps=2, blocks=2, shared=9000)
    assert access.opcode == instruction.split(" ")[0]
    assert access[3:] == (4, 4 * wavefronts, 4 * least)
    assert access.conflicts == 4 * (wavefronts - least)


def test_rows_that_are_moved_about_have_no_conflicts():
    """Where bits 4 and 5 of a row's addresses are changed by bits 1 and 2 of its number."""
    body = f"""
        {bytes_apart(64)}
        bfe.u32 %r6, %r0, 1, 2;
        shl.b32 %r6, %r6, 4;
        xor.b32 %r5, %r5, %r6;
        {MATRICES.format(count=4)} {{%r6, %r7, %r8, %r10}}, [%r5];
    """
    (access,) = accesses(body)
    assert (access.wavefronts, access.least) == (4, 4)


def test_lanes_that_are_not_active_have_no_conflicts():
    """8 lanes of 32, by a guard and by a branch, and no lane at all."""
    body = f"""
        {bytes_apart(128)}
        setp.lt.u32 %p1, %r0, 8;
        setp.gt.u32 %p2, %r0, 99;
        @%p1 ld.shared.b32 %r6, [%r5];
        @%p1 st.shared.v2.b64 [%r5], {WIDE};
        @%p1 {COPY}, 8;
        @%p2 st.shared.b32 [%r5], %r0;
        @%p1 bra $after;
        ld.shared.b64 %d5, [%r5];
    $after:
    """
    assert [x[3:] for x in accesses(body)] == [(1, 8, 1), (1, 8, 1), (1, 8, 1), (1, 24, 2)]


def test_instructions_in_loops():
    """Between a branch and the label before it that it goes to, as often as it is executed."""
    body = """
        ld.shared.b32 %r6, [%r9];
        mov.b32 %r4, 3; /* Over
        two lines. */
    $outer:
        .loc 1 7 3
        ld.shared.b32 %r6, [%r9+4];
        setp.eq.s32 %p1, %r4, 2;
        @%p1 bra $over;
        // A comment, and a blank line.

        st.shared.b32
            [%r9], %r4;
    $over:
        sub.s32 %r4, %r4, 1;
        setp.ne.s32 %p2, %r4, 0;
        @%p2 bra $outer;
        st.shared.b32 [%r9], %r4; ld.shared.b16 %r6, [%r9];
    """
    found = accesses(body)
    assert [(x.opcode[:4] + x.opcode[-3:], x.in_loop, x.accesses) for x in found] == [
        ("ld.sb32", False, 1),
        ("ld.sb32", True, 3),
        ("st.sb32", True, 2),
        ("st.sb32", False, 1),
        ("ld.sb16", False, 1),
    ]
    first = found[0].line
    assert [x.line - first for x in found] == [0, 5, 10, 16, 16]
    assert first == HEAD.count("\n") + 5


def test_scopes_have_registers_of_their_own():
    body = """
        mov.b64 %d5, 1;
        { .reg .b64 %d<9>; .reg .b32 low, high;
        mov.b64 %d5, 2;
        mov.b64 {low, high}, %d5;
        mov.b64 %d4, {high, low}; }
        st.global.b64 [%d3], %d5;
    """
    assert (run(body) == 1).all()


def test_parameters_and_the_wide_store():
    body = """
        ld.param.f32 %r4, [f];
        st.global.v2.b32 [%d3], {%r4, %r0};
    """
    got = run(body)[0].view(np.uint32).reshape(-1, 2)
    assert (got[:, 0].view(np.float32) == 0.5).all()
    assert np.array_equal(got[:, 1], np.arange(64))


SEVERAL = """
.version 9.0
.target sm_80
.address_size 64
.const .align 4 .b8 table[16] = {0, 0, 128, 63, 0, 0, 0, 64, 0, 0, 64, 64};
.extern .shared .align 16 .b8 memory[];
.func (.param .b32 out) unused(.param .b32 in) { .local .align 4 .b8 large[4000]; ret; }
.visible .entry first(.param .u64 .ptr .align 1 first_0) .maxntid 32, 1, 1
{
    .shared .align 4 .b8 own[400];
    ret;
}
.entry second(
    .param .u32 second_0,
    .param .align 8 .b8 second_1[24],
    .param .f32 second_2
)
{
    .reg .b32 %r<20>;
    .reg .f32 %f<9>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [second_1+16];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %tid.y;
    mov.u32 %r3, %tid.z;
    mov.u32 %r4, %ntid.y;
    mad.lo.u32 %r5, %r3, %r4, %r2;
    mov.u32 %r6, %ntid.x;
    mad.lo.u32 %r5, %r5, %r6, %r1;
    mul.wide.u32 %rd2, %r5, 4;
    add.s64 %rd3, %rd1, %rd2;
    // A number of the struct for each thread, one of the table for each in x, and the argument.
    and.b32 %r7, %r5, 3;
    mul.wide.u32 %rd4, %r7, 4;
    mov.b64 %rd5, second_1;
    add.s64 %rd6, %rd5, %rd4;
    ld.param.f32 %f1, [%rd6];
    mul.wide.u32 %rd7, %r1, 4;
    mov.u64 %rd8, table;
    add.s64 %rd8, %rd8, %rd7;
    ld.const.f32 %f2, [%rd8];
    ld.param.f32 %f3, [second_2];
    add.f32 %f4, %f1, %f2;
    add.f32 %f4, %f4, %f3;
    st.global.f32 [%rd3], %f4;
    ret;
}
"""


def test_one_kernel_of_several():
    """With a struct for an argument, and threads in three dimensions."""
    out = np.zeros(64, np.float32)
    struct = np.array([10, 20, 30, 40], np.float32).tobytes() + np.uint64(out.ctypes.data).tobytes()
    kernel = Kernel(SEVERAL, "second")
    assert (kernel.static_shared, kernel.local) == (0, 0)
    kernel.launch((1, 1, 1), (4, 8, 2), [7, struct, 0.5], [region(out)])
    thread = np.arange(64)
    want = 10 * (thread % 4 + 1) + np.array([1, 2, 3, 0])[thread % 4] + 0.5
    assert np.array_equal(out, want)
    with caught("20 bytes for the 24 of parameter second_1"):
        kernel.launch((1, 1, 1), 32, [7, struct[4:], 0.5], [])
    with caught("out of bounds: 1 lanes access 8 bytes"):
        Kernel(SEVERAL.replace("second_1+16", "second_1+32"), "second").launch(
            (1, 1, 1), 32, [7, struct, 0.5], [region(out)]
        )


def test_kernels_have_names():
    assert set(split(SEVERAL)) == {"first", "second"}
    assert Kernel(SEVERAL, "first").static_shared == 400
    with caught("no kernel third"):
        Kernel(SEVERAL, "third")
    with caught("2 kernels in the text"):
        Kernel(SEVERAL)


def test_launch_bounds():
    first = Kernel(SEVERAL, "first")
    assert first.launch((1, 1, 1), 32, [0], []) == 2
    with caught("64 threads in a block; 32 are the most"):
        first.launch((1, 1, 1), 64, [0], [])


CHOICE = """
    @{guard} bra.uni $after;
    $list: .branchtargets $zero, $one, $zero, $three;
    and.b32 %r4, %r0, {mask};
    mov.b32 %r5, 50;
    {choose}brx.idx %r4, $list;
    bra.uni $end;
    $zero: mov.b32 %r5, 10; bra.uni $end;
    $one: mov.b32 %r5, 11; bra.uni $end;
    $three: mov.b32 %r5, 13;
    $end:
    bar.warp.sync -1;
    cvt.u64.u32 %d5, %r5;
    st.global.b64 [%d3], %d5;
    $after:
"""


def test_a_jump_to_a_place_for_each_thread():
    skip = "setp.ge.s32 %p1, %r1, 2;\n setp.lt.u32 %p2, %r0, 40;\n"
    choice = CHOICE.replace("{guard}", "%p1")
    body = skip + choice.format(mask=3, choose="")
    want = np.array([10, 11, 10, 13])[np.arange(64) % 4]
    assert np.array_equal(run(body, blocks=3), [want, want, np.full(64, -7)])
    some = skip + choice.format(mask=3, choose="@%p2 ")
    assert np.array_equal(run(some)[0], np.where(np.arange(64) < 40, want, 50))
    with caught("gave up"):
        run(skip + choice.format(mask=7, choose=""))


def test_atomics_take_turns():
    """All lanes of all blocks at one place: each gets another number, and none is lost."""
    body = """
        atom.global.gpu.acq_rel.add.u64 %d5, [%d0], 1;
        st.global.b64 [%d3], %d5;
    """
    got = run(body, blocks=3)
    assert np.array_equal(np.sort(got.reshape(-1)), np.arange(192))


NUMBERS = [0, 1, 2, 3, 5, 7, 31, 32, 0x7F, 0x80, 0xFF, 0x1234, 0x7FFF, 0x8000, 0xFFFF, 0x12345678]
NUMBERS += [0x7FFFFFFF, 0x80000000, 0x80000001, 0xDEADBEEF, 0xFFFFFFFE, 0xFFFFFFFF]


def signed(x, bits=32):
    return x - (1 << bits) if x >> bits - 1 & 1 else x


def quotient(a, b):
    return -1 if not b else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(x, start, length, is_signed):
    x = (signed(x) if is_signed else x) >> start
    if not length:
        return 0
    x &= (1 << length) - 1
    return signed(x, length) if is_signed else x


def bytes_picked(a, b, selector):
    both, result = a | b << 32, 0
    for i in range(4):
        picked = selector >> 4 * i & 15
        byte = both >> 8 * (picked & 7) & 255
        result |= (byte >> 7) * 255 << 8 * i if picked & 8 else byte << 8 * i
    return result


INTEGER = {
    "add.s32 %r6, %r4, %r5": lambda a, b: a + b,
    "sub.s32 %r6, %r4, %r5": lambda a, b: a - b,
    "neg.s32 %r6, %r4": lambda a, b: -a,
    "abs.s32 %r6, %r4": lambda a, b: abs(signed(a)),
    "min.s32 %r6, %r4, %r5": lambda a, b: min(signed(a), signed(b)),
    "max.u32 %r6, %r4, %r5": max,
    "mul.lo.s32 %r6, %r4, %r5": lambda a, b: a * b,
    "mul.hi.u32 %r6, %r4, %r5": lambda a, b: a * b >> 32,
    "mul.hi.s32 %r6, %r4, %r5": lambda a, b: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %r6, %r4, %r5, 9": lambda a, b: a * b + 9,
    "mad.hi.u32 %r6, %r4, %r5, 9": lambda a, b: (a * b >> 32) + 9,
    "mul.wide.u32 %d5, %r4, -5;\n shr.u64 %d5, %d5, 33;\n cvt.u32.u64 %r6, %d5": lambda a, b: (
        a * (2**32 - 5) >> 33
    ),
    "mul.wide.s32 %d5, %r4, %r5;\n shr.s64 %d5, %d5, 17;\n cvt.u32.u64 %r6, %d5": lambda a, b: (
        signed(a) * signed(b) >> 17
    ),
    "mul.wide.u16 %r6, %r4, %r5": lambda a, b: (a & 0xFFFF) * (b & 0xFFFF),
    "div.s32 %r6, %r4, %r5": lambda a, b: quotient(signed(a), signed(b)),
    "div.u32 %r6, %r4, %r5": quotient,
    "rem.s32 %r6, %r4, %r5": lambda a, b: (
        signed(a) - quotient(signed(a), signed(b)) * signed(b) if b else a
    ),
    "and.b32 %r6, %r4, %r5": lambda a, b: a & b,
    "xor.b32 %r6, %r4, -2": lambda a, b: a ^ -2,
    "not.b32 %r6, %r4": lambda a, b: ~a,
    "shl.b32 %r6, %r4, %r5": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 %r6, %r4, %r5": lambda a, b: a >> min(b, 32),
    "shr.s32 %r6, %r4, %r5": lambda a, b: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 %r6, %r4, %r5, 11": lambda a, b: (b << 32 | a) << 11 >> 32,
    "shf.r.clamp.b32 %r6, %r4, %r5, 40": lambda a, b: b,
    "bfe.u32 %r6, %r4, 5, 9": lambda a, b: field(a, 5, 9, False),
    "bfe.s32 %r6, %r4, 27, 9": lambda a, b: signed(a) >> 27,
    "bfe.s32 %r6, %r4, 3, 4": lambda a, b: field(a, 3, 4, True),
    "bfi.b32 %r6, %r4, %r5, 8, 8": lambda a, b: b & ~0xFF00 | (a & 0xFF) << 8,
    "popc.b32 %r6, %r4": lambda a, b: bin(a).count("1"),
    "clz.b32 %r6, %r4": lambda a, b: 32 - a.bit_length(),
    "brev.b32 %r6, %r4": lambda a, b: int(f"{a:032b}"[::-1], 2),
    "lop3.b32 %r6, %r4, %r5, 0x0F0F3355, 0x78": lambda a, b: a ^ b & 0x0F0F3355,
    "prmt.b32 %r6, %r4, %r5, 0x7A14": lambda a, b: bytes_picked(a, b, 0x7A14),
    "cvt.s32.s8 %r6, %r4": lambda a, b: signed(a & 255, 8),
    "cvt.u32.u16 %r6, %r4": lambda a, b: a & 0xFFFF,
    "cvt.sat.u8.s32 %r6, %r4": lambda a, b: min(max(signed(a), 0), 255),
    "cvt.rzi.s32.f32 %r6, %r4": lambda a, b: truncated(a, -(2**31), 2**31 - 1),
    "cvt.rzi.u32.f32 %r6, %r4": lambda a, b: truncated(a, 0, 2**32 - 1),
}


def as_float(bits):
    return float(np.array(bits, np.uint32).view(np.float32))


def truncated(bits, low, high):
    x = as_float(bits)
    return 0 if math.isnan(x) else int(min(max(x, low), high))


def pairs_of(numbers):
    return [(a, b) for a in numbers for b in numbers]


def results_of(instruction, pairs):
    """The low 32 bits of ``%r6`` after ``instruction``, for each ``%r4`` and ``%r5``."""
    body = f"""
        ld.global.v2.b32 {{%r4, %r5}}, [%d2];
        mov.b32 %r6, 0;
        {instruction};
        cvt.u64.u32 %d5, %r6;
        st.global.b64 [%d3], %d5;
    """
    given = np.array([a | b << 32 for a, b in pairs], np.uint64).view(np.int64)
    got = run(body, given, warps=4, blocks=-(-len(pairs) // 128))
    return got.reshape(-1)[: len(pairs)].tolist()


@pytest.mark.parametrize("instruction", INTEGER)
def test_integers(instruction):
    pairs = pairs_of(NUMBERS)
    want = [INTEGER[instruction](a, b) & 0xFFFFFFFF for a, b in pairs]
    assert results_of(instruction, pairs) == want


@pytest.mark.parametrize("is_signed", [False, True])
def test_high_products_of_64_bits(is_signed):
    numbers = [0, 1, 3, 2**32 - 1, 2**32, 2**63 - 1, -1, -5, -(2**32), -(2**63)]
    kind = "s" if is_signed else "u"
    for b in numbers:
        body = f"""
            ld.global.b64 %d5, [%d2];
            mul.hi.{kind}64 %d6, %d5, {b};
            st.global.b64 [%d3], %d6;
        """
        got = run(body, numbers)[0][: len(numbers)]
        base = 0 if is_signed else 1 << 64
        want = [(a % base if base else a) * (b % base if base else b) >> 64 for a in numbers]
        assert [x % 2**64 for x in got.tolist()] == [x % 2**64 for x in want]


FLOATS = [0.0, -0.0, 1.0, -1.5, 2.5, 0.1, 3e38, -3e38, 1e-40, math.inf, -math.inf, math.nan]


def bits_of(x):
    return int(np.array(x, np.float32).view(np.uint32))


def ordered(a, b):
    return not (math.isnan(a) or math.isnan(b))


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: ordered(a, b) and a != b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: not ordered(a, b) or a == b,
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: not a >= b,
    "leu": lambda a, b: not a > b,
    "gtu": lambda a, b: not a <= b,
    "geu": lambda a, b: not a < b,
    "num": ordered,
    "nan": lambda a, b: not ordered(a, b),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_with_nan(name):
    pairs = pairs_of(FLOATS)
    instruction = f"setp.{name}.f32 %p1, %r4, %r5;\n selp.b32 %r6, 1, 0, %p1"
    got = results_of(instruction, [(bits_of(a), bits_of(b)) for a, b in pairs])
    single = [tuple(float(np.float32(x)) for x in pair) for pair in pairs]
    assert got == [int(COMPARISONS[name](a, b)) for a, b in single]


def test_a_comparison_with_two_results():
    instruction = """
        setp.ne.s32 %p2, %r5, 0;
        setp.lt.and.s32 %p1|%p3, %r4, 4, %p2;
        selp.b32 %r6, 1, 0, %p1;
        selp.b32 %r7, 2, 0, %p3;
        or.b32 %r6, %r6, %r7"""
    pairs = [(a, b) for a in (3, 5) for b in (0, 1)]
    assert results_of(instruction, pairs) == [0, 1, 0, 2]


@np.errstate(all="ignore")
def test_arithmetic_of_float32():
    for instruction, function in {
        "add.f32 %r6, %r4, %r5": np.add,
        "mul.rn.f32 %r6, %r4, %r5": np.multiply,
        "div.full.f32 %r6, %r4, %r5": np.divide,
        "max.f32 %r6, %r4, %r5": np.fmax,
        "max.NaN.f32 %r6, %r4, %r5": np.maximum,
        "neg.f32 %r6, %r4": lambda a, b: -a,
        "sqrt.approx.f32 %r6, %r4": lambda a, b: np.sqrt(a),
        "rcp.approx.f32 %r6, %r4": lambda a, b: np.float32(1) / a,
        "cvt.rmi.f32.f32 %r6, %r4": lambda a, b: np.floor(a),
        "mul.ftz.f32 %r6, %r4, 0f3F800000": lambda a, b: np.where(a == np.float32(1e-40), 0, a),
    }.items():
        pairs = pairs_of(FLOATS)
        got = results_of(instruction, [(bits_of(a), bits_of(b)) for a, b in pairs])
        a, b = np.array(pairs, np.float32).T
        got = np.array(got, np.uint32).view(np.float32)
        assert np.array_equal(got, function(a, b).astype(np.float32), equal_nan=True), instruction


def test_sums_and_products_are_rounded_once():
    """``a * b`` is 1 + 2^-11 + 2^-24, halfway between two numbers; what is added decides."""
    a = 1 + 2**-12
    near, up = 1 + 2**-11, 1 + 2**-11 + 2**-23
    for instruction, c, want in [
        ("fma.rn", 2**-60, up),
        ("fma.rn", -(2**-60), near),
        ("fma.rn", 0.0, near),
        ("fma.rm", 2**-60, near),
        ("fma.rp", -(2**-60), up),
        ("fma.rz", 2**-60, near),
    ]:
        got = results_of(f"{instruction}.f32 %r6, %r4, %r4, %r5", [(bits_of(a), bits_of(c))])
        assert list(map(as_float, got)) == [want], (instruction, c)
    pairs = [(bits_of(x), bits_of(y)) for x, y in ((1.0, 2**-40), (-1.0, -(2**-40)))]
    for instruction, want in {
        "add.rm": [1, -1 - 2**-23],
        "add.rp": [1 + 2**-23, -1],
        "add.rz": [1, -1],
        "sub.rz": [1 - 2**-24, -1 + 2**-24],
    }.items():
        got = results_of(f"{instruction}.f32 %r6, %r4, %r5", pairs)
        assert list(map(as_float, got)) == want, instruction
    values = [(bits_of(x), 0) for x in (-1.0, 0.25, 3.0, math.nan)]
    got = results_of("cvt.sat.f32.f32 %r6, %r4", values)
    assert list(map(as_float, got)) == [0, 0.25, 1, 0]


def test_halves():
    """Rounding to even, and arithmetic of two numbers in a register."""
    torch = pytest.importorskip("torch")
    a, b = torch.randn(2, 400)
    a[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, math.inf, 70000.0])
    pairs = [(bits_of(x), bits_of(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        packed = f"cvt.rn.{name}x2.f32 %r7, %r5, %r4"
        low, high = a.to(dtype), b.to(dtype)
        for then, want in {
            "mov.b32 %r6, %r7": (low, high),
            f"add.{name}x2 %r6, %r7, %r7": (low + low, high + high),
            f"max.{name}x2 %r6, %r7, 0": (low.clamp(min=0), high.clamp(min=0)),
            f"mov.b32 {{%h1, %h2}}, %r7;\n cvt.f32.{name} %r6, %h1": low.float(),
        }.items():
            got = torch.tensor(results_of(f"{packed};\n {then}", pairs)).to(torch.int32)
            if isinstance(want, tuple):
                want = torch.stack(want, 1).view(torch.int32).reshape(-1)
            assert torch.equal(got, want.view(torch.int32)), then


def test_tf32_rounds_halves_away_from_zero():
    values = [1 + 2**-11, -1 - 2**-11, 1 + 2**-12]
    got = results_of("cvt.rna.tf32.f32 %r6, %r4", [(bits_of(x), 0) for x in values])
    assert list(map(as_float, got)) == [1 + 2**-10, -1 - 2**-10, 1]


def test_tf32_of_no_number():
    bits = [0xFFFFFFFF, 0x7FFFFFFF, 0x7F800001, 0x7F800000, 0x7F7FFFFF]
    got = results_of("cvt.rna.tf32.f32 %r6, %r4", [(x, 0) for x in bits])
    assert got == [0x7FFFFFFF] * 3 + [0x7F800000] * 2


def multiplied(types, a, b, c):
    """The first sum. Lane 0's first registers have elements of A's first row and of B's first
    column; all others are zeros.
    """
    k = 8 if types == "tf32" else 16
    body = f"""
        setp.eq.u32 %p1, %r0, 0;
        selp.b32 %r4, {a}, 0, %p1;
        selp.b32 %r5, {b}, 0, %p1;
        mov.b32 %r6, 0;
        mov.b32 %r7, {bits_of(c)};
        mma.sync.aligned.m16n8k{k}.row.col.f32.{types}.{types}.f32
            {{%r8, %r9, %r10, %r11}}, {{%r4, %r6, %r6, %r6}}, {{%r5, %r6}}, {{%r7, %r6, %r6, %r6}};
        cvt.u64.u32 %d5, %r8;
        st.global.b64 [%d3], %d5;
    """
    return as_float(int(run(body, warps=1)[0, 0]))


def test_sums_of_products_are_rounded_once():
    def packed(low, high):
        return bits_of(low) >> 16 | bits_of(high)

    ones = packed(1, 1)
    # In float32 2^24 + 1 is 2^24.
    assert multiplied("bf16", ones, ones, 2**24) == 2**24 + 2
    assert multiplied("bf16", packed(2**24, 1), ones, 1) == 2**24 + 2
    assert multiplied("bf16", packed(2**24, 1), ones, -(2**24)) == 1
    assert multiplied("bf16", packed(2**24, 1), packed(1, 0), 1) == 2**24


def test_products_take_19_bits_of_tf32():
    one = bits_of(1.0)
    assert multiplied("tf32", one + 0x1FFF, one + 0x3FFF, 0.0) == 1 + 2**-10
    assert multiplied("tf32", one + 0x2000, one + 0x2000, 0.0) == (1 + 2**-10) ** 2


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode):
    """By 3 within segments of 8 lanes; where there is no such lane, a lane keeps its own."""
    clamp = 0x1800 | (0 if mode == "up" else 7)
    body = f"""
        shfl.sync.{mode}.b32 %r4|%p1, %r0, 3, {clamp}, -1;
        selp.b32 %r5, 1, 0, %p1;
        shl.b32 %r5, %r5, 8;
        or.b32 %r4, %r4, %r5;
        cvt.u64.u32 %d5, %r4;
        st.global.b64 [%d3], %d5;
    """
    own = np.arange(32)
    other = {"up": own - 3, "down": own + 3, "bfly": own ^ 3, "idx": own // 8 * 8 + 3}[mode]
    inside = other // 8 == own // 8
    assert np.array_equal(run(body, warps=1)[0], np.where(inside, other, own) + 256 * inside)


def test_votes_and_reductions():
    body = """
        setp.lt.u32 %p1, %r0, 5;
        vote.sync.ballot.b32 %r4, %p1, -1;
        redux.sync.add.s32 %r5, %r0, -1;
        shl.b32 %r5, %r5, 8;
        add.s32 %r4, %r4, %r5;
        cvt.u64.u32 %d5, %r4;
        st.global.b64 [%d3], %d5;
    """
    assert (run(body, warps=1) == 31 + (496 << 8)).all()
