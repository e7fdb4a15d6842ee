"""The CUDA kernels by themselves, compiled for the CPU: numbers, races, bounds, complaints.

That the ops on them compute what they should is tested with the ops.
"""

import itertools
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


@pytest.mark.parametrize("sanitizer", [pytest.param(s, marks=needs(s)) for s in SANITIZERS])
def test_nothing_for_a_sanitizer_to_find(sanitizer):
    names = [name for name in CASES if name.endswith("float32")]
    path = cuda_host.build_kernels(sanitizer)
    done = cuda_host.run_sanitized(sanitizer, "support.cuda_kernel_cases:run_all", path, *names)
    assert done.returncode == 0, done.stderr[-3000:]


class Fault(NamedTuple):
    """An edit of a source, and the case, in float32, that it makes wrong in some order."""

    edit: Edit
    case: str
    by: str = "orders"


BARRIER = "  __syncthreads();\n"
FAULTS = {
    "a missing barrier before a product": Fault(
        Edit(
            "product.cuh",
            "(bs, b, k, end);\n    __syncthreads();",
            "(bs, b, k, end);",
        ),
        "thin, fprop",
    ),
    "a missing barrier after a product": Fault(
        Edit(
            "product.cuh",
            "sums[i][j]);\n    }\n    __syncthreads();",
            "sums[i][j]);\n    }",
        ),
        "thin, fprop",
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
    "a row too many of a tile": Fault(
        Edit("product.cuh", "if (row >= rows ||", "if (row > rows ||"), "thin, fprop", "address"
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
        "thin, wgrad in parts",
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
    "a missing barrier, by its race": Fault(
        Edit("gan_loss.cu", BARRIER, ""), "loss, many", "thread"
    ),
    "a wrong tap": Fault(
        Edit("conv_thin.cu", "y = (4 - u) / 2,", "y = (3 - u) / 2,"), "thin, dgrad"
    ),
    "plain sums": Fault(Edit("moments.cuh", " + d * d * a.count * share", ""), "bn of 8"),
}


@pytest.mark.parametrize("name", [n for n, fault in FAULTS.items() if fault.by == "orders"])
def test_a_planted_fault_is_found(name):
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
def test_a_planted_fault_is_found_by_a_sanitizer(name):
    edit, case, sanitizer = FAULTS[name]
    path = cuda_host.build_kernels(sanitizer, edit)
    run = "support.cuda_kernel_cases:run_all"
    done = cuda_host.run_sanitized(sanitizer, run, path, f"{case} float32")
    assert done.returncode == cuda_host.FOUND, done.stderr[-3000:]
    assert edit.file in done.stderr


def images(shape=(2, 8, 3, 5), dtype="float32"):
    return poisoned_images(*shape, dtype)


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
        lambda k: k.call("thin_fprop", 3, images((2, 3, 6, 10)), images((8, 3, 4, 4)), None, 0,
                         SLOPE, images(), None),
        "thin_fprop: groups 3 should divide the batch of 2",
    ),
    "a side that is not thin": (
        lambda k: k.call("thin_dgrad", 1, images(), images((8, 5, 4, 4)), None, 0, SLOPE,
                         images((2, 5, 6, 10)), None),
        "a thin high side has at most 4 channels",
    ),
    "a side of another size": (
        lambda k: k.call("thin_dgrad", 1, images(), images((8, 3, 4, 4)), None, 0, SLOPE,
                         images((2, 3, 6, 11)), None),
        "a thin high side is twice as high and wide as the low side",
    ),
    "a low side that is not 1x1": (
        lambda k: k.call("projection_wgrad", images(), images((2, 3, 4, 4)), images((8, 3, 4, 4)),
                         None),
        "a projection's low side is 1x1",
    ),
    "different batches": (
        lambda k: k.call("projection_wgrad", images((3, 8, 1, 1)), images((2, 3, 4, 4)),
                         images((8, 3, 4, 4)), None),
        "are of different batches",
    ),
    "a weight": (
        lambda k: k.call("projection_dgrad", 1, images((2, 8, 1, 1)), images((8, 3, 3, 3)), None, 0,
                         SLOPE, images((2, 3, 4, 4)), None),
        r"weight float32 \(8, 3, 3, 3\) should be \(8, 3, 4, 4\)",
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
        lambda k: k.call("bce_forward", poisoned((130,)), [1.0] * 65, poisoned((65,)),
                         poisoned((65,)), poisoned((130,))),
        "65 targets: one launch takes 1 to 64",
    ),
    "targets that do not divide": (
        lambda k: k.call("bce_forward", poisoned((5,)), [1.0, 0.0], poisoned((2,)), poisoned((2,)),
                         poisoned((5,))),
        "2 targets should divide the 5 logits",
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
