"""The CUDA kernels by themselves, compiled for the CPU: numbers, races, bounds, complaints.

That the ops on them compute what they should is tested with the ops.
"""

import itertools
import shutil
from typing import NamedTuple

import numpy as np
import pytest
from support import cuda_host
from support.cuda_host import Edit
from support.cuda_kernel_cases import CASES, SLOPE, Kernels, on_host, poisoned, poisoned_images

REASONS = cuda_host.missing_reasons()
pytestmark = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))
SANITIZERS = ("address", "thread")


@pytest.fixture(scope="module")
def kernels():
    return on_host(cuda_host.build_kernels())


def same(got, want):
    return all(got[name].tobytes() == want[name].tobytes() for name in want)


@pytest.mark.parametrize("name", CASES)
def test_against_float64(kernels, name):
    """In outputs full of NaN, and to the bit the same in every order of blocks and threads."""
    results = []
    for order in cuda_host.ORDERS:
        with cuda_host.order(kernels.module, order, seed=1):
            results.append(CASES[name].run(kernels))
        assert CASES[name].wrong(results[-1]) == []
    assert all(same(result, results[0]) for result in results)


def needs(sanitizer):
    reasons = REASONS or cuda_host.missing_reasons(sanitizer)
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))


def run_sanitized(sanitizer, path, names):
    return cuda_host.run_sanitized(sanitizer, "support.cuda_kernel_cases:run_all", path, *names)


@pytest.fixture(scope="module")
def three_passes(kernels, tmp_path_factory):
    """Of the products only those of float32 in three passes, which is half as much to compile."""
    root = tmp_path_factory.mktemp("sources")
    folder = root / cuda_host.KERNELS
    shutil.copytree(cuda_host.ROOT / cuda_host.KERNELS, folder)
    text = (folder / "conv.cuh").read_text(encoding="utf-8")
    assert text.count(ONE_PASS) == 1
    (folder / "conv.cuh").write_text(text.replace(ONE_PASS, ""), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_host, "ROOT", root)
        yield


@pytest.mark.parametrize("sanitizer", [pytest.param(s, marks=needs(s)) for s in SANITIZERS])
def test_nothing_for_a_sanitizer_to_find(three_passes, sanitizer):
    """In float32; the bounds of the others are seen where they run as PTX."""
    names = [n for n in CASES if CASES[n].dtype == "float32" and "TF32" not in n]
    done = run_sanitized(sanitizer, cuda_host.build_kernels(sanitizer), names)
    assert done.returncode == 0, done.stderr[-3000:]


class Fault(NamedTuple):
    """An edit of a source, and the case, in float32, that it makes wrong in some order."""

    edit: Edit
    case: str
    by: str = "orders"


BARRIER = "  __syncthreads();\n"
# Of conv.cuh: makes the products of one pass.
ONE_PASS = "    f(null, std::integral_constant<int, 1>{});\n"
# Of conv.cuh, in the order in which they have to be.
WAIT = "    wait_for_copies<kStages - 2>();\n"
MEET = (
    "    // Of all threads' copies; and all have read the stage that is fetched next.\n"
    "    __syncthreads();\n"
)
FETCH = "    fetch_stage(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);\n"
FAULTS = {
    "a missing barrier before a stage is read": Fault(Edit("conv.cuh", MEET, ""), "4x4, fprop"),
    "a stage that is not waited for": Fault(Edit("conv.cuh", WAIT, ""), "4x4, dgrad"),
    "a wait for a stage too few": Fault(
        Edit("conv.cuh", WAIT, WAIT.replace("- 2", "- 1")), "4x4, wgrad"
    ),
    "a stage that is fetched too early": Fault(
        Edit("conv.cuh", WAIT + MEET + FETCH, WAIT + FETCH + MEET), "4x4, fprop"
    ),
    "a missing barrier after the last stage": Fault(
        Edit("conv.cuh", "stage + 1;\n  }\n  __syncthreads();\n", "stage + 1;\n  }\n"),
        "1x1 in strides, wgrad",
    ),
    "rows that are gathered before the last were written": Fault(
        Edit(
            "conv.cuh",
            "    __syncwarp();\n#pragma unroll\n    for (int j = 0;",
            "#pragma unroll\n    for (int j = 0;",
        ),
        "4x4, fprop",
    ),
    "rows that are written before they were gathered": Fault(
        Edit("conv.cuh", "    __syncwarp();\n    if (columns %", "    if (columns %"), "4x4, wgrad"
    ),
    "a missing barrier before statistics are merged": Fault(
        Edit("conv.cuh", "  __syncthreads();\n  const int together", "  const int together"),
        "128x64, fprop",
    ),
    "a pass that is left out": Fault(
        Edit("conv.cuh", "          multiply_add<T>(left, rest, sums[i][j]);\n", ""),
        "product, fprop",
    ),
    "statistics of another tile": Fault(
        Edit(
            "conv.cuh",
            "first_row % out.group_rows / out.slot_rows, part",
            "first_row % out.group_rows, part",
        ),
        "128x64, fprop",
    ),
    "statistics of another pixel": Fault(
        Edit("conv.cuh", "out.parts + part + at.whole;", "out.parts + part;"), "product, dgrad"
    ),
    "a tap outside of the image": Fault(
        Edit("conv_fprop.cu", "bits(-y, s.high_h - y)", "bits(-y - 1, s.high_h - y)"), "4x4, fprop"
    ),
    "a wrong class": Fault(
        Edit(
            "conv_dgrad.cu",
            "(first + (s.stride - 1) * s.padding) % s.stride",
            "(first + s.padding) % s.stride",
        ),
        "2x5 in threes, dgrad",
    ),
    "a tap that a class has not": Fault(
        Edit("conv_dgrad.cu", "min(y + 1, side_y.taps)", "y + 1"), "5x5, dgrad, infinite"
    ),
    "a part that ends too late": Fault(
        Edit("conv_wgrad.cu", "min(begin + run, s.n * s.h * s.w)", "s.n * s.h * s.w"),
        "4x4, wgrad in parts",
    ),
    "a missing barrier before sums of dots": Fault(
        Edit("conv_dot.cu", BARRIER, ""), "dots of 8, fprop, bias"
    ),
    "a missing barrier before the sums of a block": Fault(
        Edit("gan_loss.cu", BARRIER, ""), "loss, many"
    ),
    "a missing barrier before images are read": Fault(
        Edit("augment.cu", BARRIER, ""), "images of 16"
    ),
    "a barrier that some threads have left": Fault(
        Edit(
            "bn_act.cu",
            "  if (MERGE) {",
            "  if (at.channel >= channels) return;\n  if (MERGE) {",
        ),
        "bn of 8",
    ),
    "a window too many": Fault(
        Edit("conv_fprop.cu", "if (line < rows.left)", "if (line <= rows.left)"),
        "4x4, fprop",
        "address",
    ),
    "a row too many of the weight": Fault(
        Edit("conv_fprop.cu", "row < count", "row <= count"), "4x4, fprop", "address"
    ),
    "a column too many": Fault(
        Edit("conv.cuh", "first + column >= columns)", "first + column > columns)"),
        "4x4, odd, dgrad",
        "address",
    ),
    "a last part as long as the others": Fault(
        Edit("conv_wgrad.cu", "min(begin + run, s.n * s.h * s.w)", "begin + run"),
        "4x4, wgrad in parts",
        "address",
    ),
    "a row too many of a tile of statistics": Fault(
        Edit(
            "bn_act.cu",
            "const int end = min(start + tile_rows, rows);\n  // Relative",
            "const int end = start + tile_rows;\n  // Relative",
        ),
        "bn, many rows",
        "address",
    ),
    "a byte too many": Fault(
        Edit(
            "augment.cu",
            "i < count; i += kThreads * WRITE",
            "i <= count; i += kThreads * WRITE",
        ),
        "images",
        "address",
    ),
    "a vector beyond the end": Fault(
        Edit("elementwise.cu", "if (at + N <= count)", "if (at < count)"),
        "act backward",
        "address",
    ),
    "a part too few": Fault(
        Edit("elementwise.cu", "part < parts; ++part", "part < parts - 1; ++part"),
        "4x4, wgrad in parts",
    ),
    "lanes that are left out": Fault(
        Edit(
            "moments.cuh",
            "offset >= lanes; offset /= 2) {",
            "offset > lanes; offset /= 2) {",
        ),
        "bn of 8",
    ),
    "a shuffle of half the width": Fault(
        Edit(
            "moments.cuh",
            "__shfl_down_sync(kAllLanes, own, offset)",
            "__shfl_down_sync(kAllLanes, own, offset, 16)",
        ),
        "loss",
    ),
    "lanes that a shuffle does not name": Fault(
        Edit("moments.cuh", "kAllLanes, own, offset)", "0xffffu, own, offset)"), "loss"
    ),
    "blocks that write the same statistics": Fault(
        Edit(
            "bn_act.cu",
            "if (blockIdx.x == 0 && channel < channels) {",
            "if (channel < channels) {",
        ),
        "bn, many rows",
        "thread",
    ),
    "blocks that share a tile": Fault(
        Edit("conv_thin.cu", "int64_t(blockIdx.x) * 3 * CH", "int64_t(blockIdx.x / 2) * 3 * CH"),
        "thin of 8, dgrad",
        "thread",
    ),
    "a row of the next group": Fault(
        Edit("conv_fprop.cu", "row < rows.left ?", "row <= rows.left ?"),
        "4x4, fprop",
        "thread",
    ),
    "a missing barrier before a stage is read, by its race": Fault(
        Edit("conv.cuh", MEET, ""), "product, wgrad", "thread"
    ),
    "a missing barrier, by its race": Fault(
        Edit("gan_loss.cu", BARRIER, ""), "loss, many", "thread"
    ),
    "a wrong tap": Fault(
        Edit("conv_thin.cu", "y = (4 - u) / 2,", "y = (3 - u) / 2,"), "thin, dgrad"
    ),
    "plain sums": Fault(Edit("moments.cuh", " + d * d * a.count * share", ""), "bn of 8"),
}


@pytest.mark.parametrize("name", [n for n, fault in FAULTS.items() if fault.by == "orders"])
def test_a_planted_fault_is_found(three_passes, name):
    """The case passes without it: see above."""
    edit, case, _ = FAULTS[name]
    faulty = on_host(cuda_host.build_kernels(edit=edit))
    found = []
    for order in cuda_host.ORDERS:
        with cuda_host.order(faulty.module, order):
            try:
                found += CASES[f"{case} float32"].wrong(CASES[f"{case} float32"].run(faulty))
            except RuntimeError as error:
                # From the emulator, which says where.
                assert ".cu" in str(error)
                found.append(str(error))
    assert found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs(fault.by))
        for name, fault in FAULTS.items()
        if fault.by in SANITIZERS
    ],
)
def test_a_planted_fault_is_found_by_a_sanitizer(three_passes, name):
    edit, case, sanitizer = FAULTS[name]
    path = cuda_host.build_kernels(sanitizer, edit)
    done = run_sanitized(sanitizer, path, [f"{case} float32"])
    assert done.returncode == cuda_host.FOUND, done.stderr[-3000:]
    assert edit.file in done.stderr


def images(shape=(2, 8, 3, 5), dtype="float32"):
    return poisoned_images(*shape, dtype)


PRODUCT = (64, 64, False)


def dgrad(high=(2, 16, 6, 10), weight=(8, 16, 4, 4)):
    """Of conv_dgrad from the images on, but for the statistics."""
    return images(), images(weight), None, 0, SLOPE, images(high)


# Of each, an argument that does not fit, and what is said.
REFUSED = {
    "an empty batch": (
        lambda k: k.call("act_backward", images((0, 8, 3, 5)), images((0, 8, 3, 5)), 1, SLOPE,
                         images((0, 8, 3, 5))),
        r"act_backward: y float32 \(0, 8, 3, 5\) is empty",
    ),
    "another memory format": (
        lambda k: k.call("act_backward", images(), np.ascontiguousarray(images()), 1, SLOPE,
                         images()),
        r"y float32 \(2, 8, 3, 5\) with strides \(120, 15, 5, 1\) is not in the order N, H, W, C: "
        r"pass it as \.contiguous\(memory_format=torch.channels_last\)",
    ),
    "what is not contiguous": (
        lambda k: k.call("bn_update_running", poisoned((1, 8)), poisoned((1, 8)), 9, 0.1,
                         poisoned((8, 2))[:, 0], poisoned((8,))),
        r"running_mean float32 \(8\) with strides \(2\) is not contiguous: pass it as",
    ),
    "another shape": (
        lambda k: k.call("act_backward", images((2, 8, 3, 4)), images(), 1, SLOPE, images()),
        r"dy float32 \(2, 8, 3, 4\) should be \(2, 8, 3, 5\)",
    ),
    "another dtype": (
        lambda k: k.call("act_backward", images(dtype="float16"), images(), 1, SLOPE, images()),
        "dy float16 .* is not float32 as the others are: convert it",
    ),
    "float64": (
        lambda k: k.call("act_backward", images(dtype="float64"), images(), 1, SLOPE, images()),
        "dtype 'float64': the kernels know float32, bfloat16",
    ),
    "bytes": (
        lambda k: k.call("act_backward", images(), images(dtype="uint8"), 1, SLOPE, images()),
        "y uint8 .*: the kernels take float32, bfloat16, float16",
    ),
    "memory that is not aligned": (
        lambda k: k.call("bn_update_running", poisoned((1, 8)), poisoned((1, 8)), 9, 0.1,
                         poisoned((9,))[1:], poisoned((8,))),
        r"running_mean .* does not begin at a multiple of 16 bytes: pass a \.clone\(\)",
    ),
    "an activation": (
        lambda k: k.call("act_backward", images(), images(), 4, SLOPE, images()),
        "activation 4 should be 0 none",
    ),
    "a slope": (
        lambda k: k.call("act_backward", images(), images(), 2, -1.0, images()),
        r"negative_slope -1\.0+ should not be negative",
    ),
    "groups": (
        lambda k: k.call("thin_dgrad", 2, 1, None, 3, images(), images((8, 3, 4, 4)), None, 0,
                         SLOPE, images((2, 3, 6, 10)), None),
        "thin_dgrad: groups 3 should divide the batch of 2",
    ),
    "a side that is not thin": (
        lambda k: k.call("thin_dgrad", 2, 1, None, 1, images(), images((8, 5, 4, 4)), None, 0,
                         SLOPE, images((2, 5, 6, 10)), None),
        "a thin high side .* has at most 4 channels .*: not 5 channels, 4x4, 2, 1",
    ),
    "a thin side of another size": (
        lambda k: k.call("thin_dgrad", 2, 1, None, 1, images(), images((8, 3, 4, 4)), None, 0,
                         SLOPE, images((2, 3, 6, 11)), None),
        "a thin high side is twice as high and wide as the low side",
    ),
    "many dots": (
        lambda k: k.call("dot_fprop", 1, 0, None, 1, images((2, 3, 4, 4)), images((5, 3, 4, 4)),
                         None, 0, SLOPE, images((2, 5, 1, 1)), None),
        "dot_fprop: dot products make a low side of 1x1 with at most 4 .* not 1x1 with 5 channels",
    ),
    "dots at several places": (
        lambda k: k.call("dot_fprop", 1, 0, None, 1, images((2, 3, 4, 4)), images((2, 3, 3, 3)),
                         None, 0, SLOPE, images((2, 2, 2, 2)), None),
        "dot_fprop: .* by a kernel of the high side's size: not 2x2 with 2 channels",
    ),
    "no product": (
        lambda k: k.call("conv_dgrad", 2, 1, None, 1, *dgrad(), None),
        r"conv_dgrad: product None should be \(rows, columns, tf32\)",
    ),
    "no product of a weight's gradient": (
        lambda k: k.call("conv_wgrad", 2, 1, None, images(), images((2, 16, 6, 10)),
                         images((8, 16, 4, 4)), None),
        r"conv_wgrad: product None should be \(rows, columns, tf32\)",
    ),
    "a product": (
        lambda k: k.call("conv_dgrad", 2, 1, (64, 128, True), 1, *dgrad(), None),
        "conv_dgrad: product 64x128: there are 128x128, 128x64 and 64x64",
    ),
    "a product where there is one way": (
        lambda k: k.call("thin_dgrad", 2, 1, PRODUCT, 1, images(), images((8, 3, 4, 4)), None, 0,
                         SLOPE, images((2, 3, 6, 10)), None),
        "thin_dgrad: product should be None: there is one way",
    ),
    "sides that do not fit": (
        lambda k: k.call("conv_dgrad", 2, 2, PRODUCT, 1, *dgrad(), None),
        r"conv_dgrad: low \(2, 8, 3, 5\) and high \(2, 16, 6, 10\) are not the sides of a "
        r"convolution by a weight \(8, 16, 4, 4\) with stride 2 and padding 2",
    ),
    "no stride": (
        lambda k: k.call("conv_dgrad", 0, 1, PRODUCT, 1, *dgrad(), None),
        "conv_dgrad: stride 0, padding 1: at least 1, and at least 0",
    ),
    "a kernel larger than the image": (
        lambda k: k.call("conv_dgrad", 1, 0, PRODUCT, 1, *dgrad(high=(2, 16, 3, 5)), None),
        "are not the sides of a convolution",
    ),
    "many taps": (
        lambda k: k.call("conv_wgrad", 1, 8, PRODUCT, images(), images((2, 3, 3, 5)),
                         images((8, 3, 17, 17)), None),
        "conv_wgrad: kernel 17x17: products take sides to 16",
    ),
    "different batches": (
        lambda k: k.call("conv_dgrad", 2, 1, PRODUCT, 1, *dgrad(high=(3, 16, 6, 10)), None),
        r"low \(2, 8, 3, 5\) and high \(3, 16, 6, 10\) are of different batches",
    ),
    "a weight": (
        lambda k: k.call("conv_dgrad", 2, 1, PRODUCT, 1, *dgrad(weight=(8, 15, 4, 4)), None),
        r"weight float32 \(8, 15, 4, 4\) should be \(8, 16, 4, 4\)",
    ),
    "statistics of other tiles": (
        lambda k: k.call("conv_dgrad", 2, 1, PRODUCT, 1, *dgrad(), poisoned((1, 3, 16))),
        r"stats float32 \(1, 3, 16\) should be \(4, 3, 16\)",
    ),
    "a tile lower than the statistics'": (
        lambda k: k.call("conv_fprop", 1, 0, PRODUCT, 1, images((2, 32, 128, 128)),
                         images((32, 32, 1, 1)), None, 0, SLOPE, images((2, 32, 128, 128)),
                         poisoned((256, 3, 32))),
        "statistics of 128 rows need a tile of as many, not of 64",
    ),
    "shares of another size": (
        lambda k: k.call("conv_wgrad", 2, 1, PRODUCT, images(), images((2, 16, 6, 10)),
                         images((8, 16, 4, 4)), poisoned((2, 2047))),
        r"sums float32 \(2, 2047\) should be \(2, 2048\)",
    ),
    "shares of no parts": (
        lambda k: k.call("conv_wgrad", 2, 1, PRODUCT, images(), images((2, 16, 6, 10)),
                         images((8, 16, 4, 4)), poisoned((2048,))),
        r"sums \(2048\) is not \[parts, size\]",
    ),
    "statistics": (
        lambda k: k.call("bn_stats", images(), poisoned((3, 3, 8)), 2),
        r"stats \(3, 3, 8\) is not \[2 · tiles, 3, 8\]",
    ),
    "too many tiles": (
        lambda k: k.call("bn_act_forward", images(), poisoned((65, 3, 8)), 1e-5, poisoned((1, 8)),
                         poisoned((1, 8)), poisoned((1, 8)), None, None, 0, SLOPE, images()),
        "stats has 65 tiles of a group: fold them to at most 64",
    ),
    "one value": (
        lambda k: k.call("bn_update_running", poisoned((1, 8)), poisoned((1, 8)), 1, 0.1,
                         poisoned((8,)), poisoned((8,))),
        "rows 1: one value has no variance",
    ),
    "targets": (
        lambda k: k.call("gan_loss_forward", poisoned((130,)), [1.0] * 65, 0, poisoned((65,)),
                         poisoned((65,)), poisoned((130,))),
        "65 targets: one launch takes 1 to 64",
    ),
    "targets that do not divide": (
        lambda k: k.call("gan_loss_forward", poisoned((5,)), [1.0, 0.0], 0, poisoned((2,)),
                         poisoned((2,)), poisoned((5,))),
        "2 targets should divide the 5 logits",
    ),
    "a kind of loss": (
        lambda k: k.call("gan_loss_forward", poisoned((4,)), [1.0, 0.0], 4, poisoned((2,)),
                         poisoned((2,)), poisoned((4,))),
        "kind 4 should be 0 bce, 1 lsgan, 2 hinge or 3 wasserstein",
    ),
    "a row of an image": (
        lambda k: k.call("augment_forward", np.zeros((1, 1, 32769, 1), np.uint8), None, None,
                         images((1, 1, 1, 32769))),
        "a row of 32769 bytes is longer than 32768",
    ),
    "an index": (
        lambda k: k.call("augment_forward", np.zeros((2, 3, 4, 1), np.uint8),
                         np.zeros(3, np.int32), None, images((3, 1, 3, 4))),
        "dtype 'int32': the kernels know",
    ),
    "as many images as there are": (
        lambda k: k.call("augment_forward", np.zeros((2, 3, 4, 1), np.uint8), None, None,
                         images((3, 1, 3, 4))),
        r"out \(3, 1, 3, 4\) should be \[N, C, H, W\] of images \(2, 3, 4, 1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(kernels, name):
    """And nothing is launched."""
    call, message = REFUSED[name]
    with cuda_host.recorded(kernels.module) as launches, pytest.raises(ValueError, match=message):
        call(kernels)
    assert not launches


class OnDevices(Kernels):
    """Each array on the next of some devices."""

    def __init__(self, module, devices):
        super().__init__(module)
        self._devices = itertools.cycle(devices)

    def _array(self, array):
        strides = [stride // array.itemsize for stride in array.strides]
        where = array.ctypes.data, str(array.dtype), next(self._devices)
        return self.module.Array(*where, list(array.shape), strides)


def test_one_device(kernels):
    call, _ = REFUSED["an activation"]
    with pytest.raises(
        ValueError, match=r"dy float32 .* is on device 0, the .* on device 1: move it"
    ):
        call(OnDevices(kernels.module, [0, 1]))


def test_a_device_that_is_not_there(kernels):
    x = images()
    with pytest.raises(RuntimeError, match="act_backward: device 3: cudaErrorInvalidDevice"):
        OnDevices(kernels.module, [3]).call("act_backward", x, x, 1, SLOPE, x)
    # And the next call is as if it had not been.
    kernels.call("act_backward", x, x, 1, SLOPE, x)


def test_no_memory(kernels):
    array = kernels.module.Array(0, "float32", 0, [1, 1, 1, 1], [1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"y float32 \(1, 1, 1, 1\) has no memory"):
        kernels.module.act_backward(array, array, 1, SLOPE, array, 0)


def test_strides_of_another_length(kernels):
    with pytest.raises(ValueError, match=r"shape \(1, 1\) and strides \(1\) should be as long"):
        kernels.module.Array(4096, "float32", 0, [1, 1], [1])


def test_too_many_elements(kernels):
    shape, strides = [2**16, 2**15, 1, 1], [2**15, 1, 2**15, 2**15]
    array = kernels.module.Array(4096, "float32", 0, shape, strides)
    with pytest.raises(ValueError, match="has more than 2147483647 elements: split the batch"):
        kernels.module.act_backward(array, array, 1, SLOPE, array, 0)
