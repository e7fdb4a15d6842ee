"""From a set of uint8 images to a batch: the reference against the formula, the kernel too."""

import numpy as np
import pytest
import torch
from support.numerics import CUDA, DTYPES, GPU_DEVICE, TRITON, compiled, error, limit, needs_cuda
from support.planted_faults import NUMBERS, OUTSIDE, RACE, Fault, faults, planted

from fastgan import augment
from fastgan.errors import NotBuiltError
from fastgan.ops import cuda, triton
from fastgan.ops.augment import augment_forward
from fastgan.ops.backend import use_backend


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_equals_the_formula(rng, channels):
    images = rng.integers(0, 256, (5, 6, 7, channels), dtype=np.uint8)
    index, flip = np.array([4, 0, 0, 2]), np.array([True, False, True, False])
    got = augment(
        torch.from_numpy(images),
        torch.from_numpy(index),
        torch.from_numpy(flip),
        dtype=torch.float64,
    )
    for i, (source, mirrored) in enumerate(zip(index, flip, strict=True)):
        want = images[source].astype(np.float64) / 127.5 - 1
        want = want[:, ::-1] if mirrored else want
        np.testing.assert_allclose(got[i].permute(1, 2, 0), want, rtol=0, atol=1e-15)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert got.dtype == torch.float64


def test_equals_the_examples_transform(rng):
    images = torch.from_numpy(rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8))
    want = (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(augment(images), want, rtol=0, atol=2.5e-7)


def test_leaves_its_input(rng):
    images = torch.from_numpy(rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8))
    before = images.clone()
    augment(images, None, torch.tensor([True, True, False]))
    assert torch.equal(images, before)


ON_GPUS = pytest.mark.parametrize("backend", [TRITON, CUDA])


def check(images, index, flip, dtype, backend="triton"):
    """The kernel against float64, each value of it."""
    want, own = (augment(images, index, flip, dtype=d) for d in (torch.float64, dtype))
    on_device = (None if t is None else t.to(GPU_DEVICE) for t in (images, index, flip))
    with use_backend(backend):
        got = augment(*on_device, dtype=dtype)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert error(got.cpu(), want) <= limit(own, want)
    # Between -1 and 1, and so to two roundings there.
    assert (got.cpu() - want).abs().max() <= torch.finfo(dtype).eps


@ON_GPUS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (5, 6, 7, 3), (3, 19, 19, 4), (2, 33, 64, 2)], ids=str
)
def test_on_gpus(nan_outputs, honest_triton, rng, shape, index, flip, dtype, backend):
    images = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    n = 4 if index else len(images)
    at = torch.from_numpy(rng.integers(0, len(images), n)) if index else None
    mirrored = torch.arange(n) % 2 == 0 if flip else None
    check(images, at, mirrored, dtype, backend)


@planted
@faults(
    Fault(
        "_augment_fwd_kernel", "mask=at < size, other=0", "mask=at <= size, other=0", "", OUTSIDE
    ),
    Fault("_augment_fwd_kernel", "element_ty), mask=at < size", "element_ty)", "", RACE),
    Fault("_augment_fwd_kernel", "(w - 1 - 2 * x) * c", "(w - 2 * x) * c", "", OUTSIDE),
    Fault("_augment_fwd_kernel", "tl.program_id(1) * BLOCK", "0", "", RACE),
    Fault("_augment_fwd_kernel", "(w - 1 - 2 * x) * c", "(w - 1 - x) * c", "", NUMBERS),
    Fault(
        "_augment_fwd_kernel",
        "image = tl.load(index_ptr + i)",
        "image = tl.load(index_ptr)",
        "",
        NUMBERS,
    ),
)
def test_a_planted_fault_is_found(monkeypatch, tmp_path, nan_outputs, honest_triton, fault, rng):
    """Without it ``check`` passes above."""
    fault.plant(monkeypatch, "augment", tmp_path)
    images = torch.from_numpy(rng.integers(0, 256, (3, 19, 19, 4), dtype=np.uint8))
    with pytest.raises(AssertionError, match=fault.found):
        check(images, torch.tensor([0, 2, 2]), torch.tensor([False, True, True]), torch.float32)


@ON_GPUS
def test_each_byte(honest_triton, backend):
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    check(images, None, torch.tensor([True]), torch.float32, backend)
    with use_backend(backend):
        assert torch.equal(augment(images.to(GPU_DEVICE)).cpu(), augment(images))


@ON_GPUS
def test_what_is_not_contiguous_is_copied(nan_outputs, honest_triton, rng, backend):
    images = torch.from_numpy(rng.integers(0, 256, (10, 3, 6, 14), dtype=np.uint8))
    index, flip = torch.tensor([4, 9, 0, 9, 2, 9])[::2], (torch.arange(6) % 2 == 0)[::2]
    check(images[::2, :, :, ::2].permute(0, 2, 3, 1), index, flip, torch.float32, backend)


@ON_GPUS
def test_images_beyond_int32(honest_triton, backend):
    """Of more bytes than that holds; what no one touches takes no memory on the CPU."""
    images = torch.empty(2**31 // 12 + 2, 2, 2, 3, dtype=torch.uint8, device=GPU_DEVICE)
    images[-1] = torch.arange(12).view(2, 2, 3)
    last = torch.tensor([len(images) - 1], device=GPU_DEVICE)
    with use_backend(backend):
        got = augment(images, last)
    assert error(got.cpu(), augment(images[-1:].cpu(), dtype=torch.float64)) < 1e-6


@ON_GPUS
def test_opcheck(rng, backend):
    images = torch.from_numpy(rng.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)).to(GPU_DEVICE)
    index = torch.tensor([2, 0], device=GPU_DEVICE)
    for arguments in (
        (images, index, index == 0, torch.float16),
        (images, None, None, torch.float32),
    ):
        torch.library.opcheck(augment_forward, (*arguments, backend))


@ON_GPUS
def test_compiled_whole(rng, backend):
    images = torch.from_numpy(rng.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)).to(GPU_DEVICE)
    index = torch.tensor([2, 0], device=GPU_DEVICE)
    with use_backend(backend):
        want = augment(images, index, index == 0)
        assert torch.equal(compiled(augment)(images, index, index == 0), want)


@ON_GPUS
def test_what_the_kernel_does_not_make_is_the_references(rng, monkeypatch, backend):
    monkeypatch.setattr(triton, "kernels", None)
    monkeypatch.setattr(cuda, "launch", None)
    images = torch.from_numpy(rng.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8))
    with use_backend(backend):
        assert augment(images, dtype=torch.float64).dtype == torch.float64


@needs_cuda
def test_a_row_that_a_block_has_no_room_for():
    images = torch.zeros(1, 1, 40000, 1, dtype=torch.uint8, device=GPU_DEVICE)
    with (
        use_backend("cuda"),
        pytest.raises(NotBuiltError, match=r"a row of an image has 40000 bytes, .* takes 32768"),
    ):
        augment(images)
