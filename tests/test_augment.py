"""From a set of uint8 images to a batch."""

import numpy as np
import pytest
import torch

from fastgan import augment


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
