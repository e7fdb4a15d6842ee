"""Sources, decoding, the cache and the loader."""

import gzip
import io
import os
import struct
import zipfile

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from fastgan import ImageSet, Loader, load_images
from fastgan.data import images as images_module
from fastgan.data.decode import to_pixels
from fastgan.errors import InputError


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_digits_are_there():
    data = load_images("digits", 28)
    assert data.images.shape == (10_000, 28, 28, 1)
    assert np.bincount(data.labels).tolist() == [1000] * 10
    assert data.class_names == tuple("0123456789")


def test_a_folder_with_class_subfolders(folder):
    data = load_images(folder, 16)
    assert data.images.shape == (12, 16, 16, 3)
    assert data.images.dtype == np.uint8
    assert data.class_names == ("cats", "dogs")
    assert data.labels.tolist() == [0] * 8 + [1] * 4
    assert data.bad == ()


def test_a_folder_without_classes_and_any_depth(folder):
    (folder / "dogs" / "00.png").rename(folder / "loose.png")
    (folder / "cats" / "deep" / "er").mkdir(parents=True)
    (folder / "cats" / "01.png").rename(folder / "cats" / "deep" / "er" / "01.png")
    data = load_images(folder, 16)
    assert len(data) == 12
    assert data.labels is None and data.class_names == ()


def test_folders_that_all_images_share_are_no_class(folder, tmp_path):
    outer = tmp_path / "outer" / "archive" / "train"
    outer.parent.mkdir(parents=True)
    folder.rename(outer)
    assert load_images(tmp_path / "outer", 16).class_names == ("cats", "dogs")


def test_hidden_and_other_files_are_not_images(folder):
    (folder / ".hidden.png").write_bytes(b"no")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "x.png").write_bytes(b"no")
    (folder / "notes.txt").write_text("no")
    assert len(load_images(folder, 16, max_bad=0)) == 12


def test_a_zip_is_the_folder(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, f"photos/{path.relative_to(folder)}")
    zipped, plain = load_images(tmp_path / "photos.zip", 16), load_images(folder, 16)
    assert zipped.digest == plain.digest
    assert zipped.class_names == plain.class_names


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
def test_npy_layouts(tmp_path, rng, layout):
    nc = 1 if layout == "NHW" else 3
    want = rng.integers(0, 256, (5, 16, 16, nc), dtype=np.uint8)
    saved = {"NHW": want[..., 0], "NHWC": want, "NCHW": want.transpose(0, 3, 1, 2)}[layout]
    np.save(tmp_path / "x.npy", saved)
    data = load_images(tmp_path / "x.npy", 16)
    np.testing.assert_array_equal(data.images, want)
    assert data.labels is None


def test_npz_with_labels_and_classes(tmp_path, rng):
    x = rng.integers(0, 256, (6, 20, 20), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=x, labels=[3, 7, 7, 3, 9, 3])
    data = load_images(tmp_path / "x.npz", 16)
    assert data.labels.tolist() == [0, 1, 1, 0, 2, 0]
    assert data.class_names == ("3", "7", "9")
    np.savez(tmp_path / "y.npz", pictures=x, labels=[0, 1, 1, 0, 1, 0], classes=["a", "b"])
    data = load_images(tmp_path / "y.npz", 20)
    assert data.class_names == ("a", "b")
    np.testing.assert_array_equal(data.images[..., 0], x)


def test_hdf5(tmp_path, rng):
    x = rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"], file["labels"] = x, np.arange(6)
    data = load_images(tmp_path / "x.h5", 16)
    np.testing.assert_array_equal(data.images, x)
    assert data.labels.tolist() == list(range(6))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw"])
def test_mnist_idx_files(tmp_path, rng, packed, place):
    x, y = rng.integers(0, 256, (7, 28, 28), dtype=np.uint8), np.arange(7, dtype=np.uint8)
    root = tmp_path / "mnist" / place
    root.mkdir(parents=True)
    suffix, pack = (".gz", gzip.compress) if packed else ("", bytes)
    for stem, array in (("images-idx3", x), ("labels-idx1", y)):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        path = root / f"train-{stem}-ubyte{suffix}"
        path.write_bytes(pack(header + array.tobytes()))
    for source in (tmp_path / "mnist", root / f"train-images-idx3-ubyte{suffix}"):
        data = load_images(source, 28)
        np.testing.assert_array_equal(data.images[..., 0], x)
        assert data.labels.tolist() == y.tolist()


class Listed(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a,
        Image.fromarray,
        lambda a: (Image.fromarray(a), 1),
        lambda a: torch.from_numpy(a).permute(2, 0, 1),
        lambda a: torch.from_numpy(a).permute(2, 0, 1).float() / 255,
        lambda a: torch.from_numpy(a).permute(2, 0, 1).float() / 127.5 - 1,
        lambda a: (a, torch.tensor(0), "more"),
    ],
)
def test_any_data_set_of_images(rng, convert):
    arrays = list(rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8))
    data = load_images(Listed([convert(a) for a in arrays]), 16)
    np.testing.assert_array_equal(data.images, arrays)


def test_data_sets_labels_and_classes(rng):
    items = [(Image.fromarray(a), i % 2) for i, a in enumerate(
        rng.integers(0, 256, (4, 16, 16), dtype=np.uint8))]  # fmt: skip
    dataset = Listed(items)
    dataset.classes = ["even", "odd"]
    data = load_images(dataset, 16)
    assert data.labels.tolist() == [0, 1, 0, 1]
    assert data.class_names == ("even", "odd")
    assert data.nc == 1


def test_unknown_labels_are_none(rng):
    items = [(a, -1) for a in rng.integers(0, 256, (4, 16, 16), dtype=np.uint8)]
    assert load_images(Listed(items), 16).labels is None


def test_arrays_and_tensors_in_memory(rng):
    x = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    assert load_images(x, 16).digest == load_images(torch.from_numpy(x), 16).digest


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([16, 28, 64]), st.booleans())
def test_decoding_equals_the_examples_transform(width, height, size, grey):
    rng = np.random.default_rng(width * 100 + height)
    shape = (height, width) if grey else (height, width, 3)
    image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    transform = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
    if max(width, height) > 16 * min(width, height):
        assert to_pixels(image, size, 3).shape == (size, size, 3)
    else:
        want = np.asarray(transform(image.convert("RGB")))
        np.testing.assert_array_equal(to_pixels(image, size, 3), want)


def test_slivers_do_not_blow_up():
    assert to_pixels(Image.new("RGB", (1, 60_000)), 64, 3).shape == (64, 64, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("nc", [1, 3])
def test_every_mode_of_image(mode, nc):
    image = Image.new("RGB", (20, 20), (200, 200, 200)).convert(mode)
    pixels = to_pixels(image, 16, nc)
    assert pixels.shape == (16, 16, nc)
    if mode not in ("1", "P"):
        assert abs(int(pixels[8, 8, 0]) - 200) <= 2


def test_sixteen_bits_keep_their_high_bytes():
    image = Image.fromarray(np.full((20, 20), 0xABCD, np.uint16))
    assert to_pixels(image, 16, 1)[3, 3, 0] == 0xAB


@pytest.mark.parametrize(("level", "want"), [(200, 200), (0xABCD, 0xAB)])
def test_thirty_two_bits_hold_bytes_or_sixteen(level, want):
    image = Image.fromarray(np.full((20, 20), level, np.int32))
    assert image.mode == "I"
    assert to_pixels(image, 16, 1)[3, 3, 0] == want
    with pytest.raises(ValueError, match="70000"):
        to_pixels(Image.fromarray(np.full((20, 20), 70_000, np.int32)), 16, 1)


def test_exif_turns_the_image_upright():
    array = np.zeros((16, 16, 3), np.uint8)
    array[:4] = 255
    image = Image.fromarray(array)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(to_pixels(Image.open(buffer), 16, 3), array[::-1])


def test_grey_folders_have_one_channel(tmp_path, rng):
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    assert load_images(tmp_path, 16).nc == 1
    assert load_images(tmp_path, 16, nc=3).nc == 3
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "c.png")
    assert load_images(tmp_path, 16).nc == 3


def test_odd_names(folder, tmp_path):
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / os.fsdecode(b"bad\xe9.png")).write_bytes(b"no image")
    (folder / "größe 猫.png").write_bytes(png(np.zeros((20, 20, 3), np.uint8)))
    data = load_images(folder, 16, max_bad=0.2)
    assert len(data) == 13
    assert [name for name, _ in data.bad] == [os.fsdecode(b"bad\xe9.png"), "gone.png"]


def test_a_zip_with_odd_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        for name in (".", "2024-01-01T12:30:00.png", "./a.png"):
            archive.writestr(name, png(np.zeros((20, 20, 3), np.uint8)))
    assert len(load_images(tmp_path / "odd.zip", 16)) == 2


def test_bad_images_are_skipped_and_named(folder):
    good = load_images(folder, 16)
    broken = (folder / "cats" / "04.png").read_bytes()
    (folder / "cats" / "04.png").write_bytes(broken[: len(broken) // 2])
    (folder / "cats" / "05.png").write_bytes(b"")
    data = load_images(folder, 16, max_bad=0.2)
    assert [name for name, _ in data.bad] == ["cats/04.png", "cats/05.png"]
    assert len(data) == 10
    kept = [i for i in range(12) if i not in (2, 3)]
    np.testing.assert_array_equal(data.images, good.images[kept])
    np.testing.assert_array_equal(data.labels, good.labels[kept])
    # From the cache too, and no less strict than when it was built.
    assert load_images(folder, 16, max_bad=0.2).bad == data.bad
    with pytest.raises(InputError, match=r"2 of 12 images .*max_bad=0.01.*cats/04.png"):
        load_images(folder, 16)


def test_the_cache_is_used_and_keyed_by_contents(folder, monkeypatch):
    first = load_images(folder, 16)
    assert isinstance(first.images, np.memmap)
    decoded = []
    monkeypatch.setattr(images_module, "to_pixels", lambda *a: decoded.append(1) or to_pixels(*a))
    assert load_images(folder, 16).digest == first.digest
    assert not decoded
    assert load_images(folder, 20).images.shape == (12, 20, 20, 3)
    assert len(decoded) == 12
    path = folder / "cats" / "04.png"
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time of change
    load_images(folder, 16, max_bad=1.0)
    assert len(decoded) == 24


def test_a_damaged_cache_is_built_anew(folder, tmp_path):
    cache = tmp_path / "own-cache"
    first = load_images(folder, 16, cache_dir=cache)
    (entry,) = cache.iterdir()
    for damage in (
        lambda: (entry / "images.npy").write_bytes(b"x" * 50),
        lambda: (entry / "meta.json").write_text("{"),
        lambda: (entry / "labels.npy").write_bytes(b""),
        lambda: (entry / "images.npy").unlink(),
    ):
        damage()
        assert load_images(folder, 16, cache_dir=cache).digest == first.digest
    assert [p.name for p in cache.iterdir()] == [entry.name]


def test_a_cache_that_cannot_be_written_says_so(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="FASTGAN_CACHE"):
        load_images(folder, 16, cache_dir=tmp_path / "file")


def test_an_interrupted_build_leaves_nothing(folder, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    cache = tmp_path / "own-cache"
    monkeypatch.setattr(images_module, "to_pixels", stop)
    with pytest.raises(KeyboardInterrupt):
        load_images(folder, 16, cache_dir=cache, workers=2)
    assert list(cache.iterdir()) == []


def small_set(n, labels=True):
    images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1).repeat(2, 1).repeat(2, 2)
    return ImageSet(images, np.arange(n) if labels else None, (), "test", f"digest{n}")


def test_an_epoch_is_every_image_once():
    loader = Loader(small_set(10), 4, seed=1)
    assert len(loader) == 3
    batches = list(loader)
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == list(range(10))
    for x, y in batches:
        torch.testing.assert_close(x[:, 0, 0, 0], y.float() / 127.5 - 1)
    second = torch.cat([y for _, y in loader])
    assert sorted(second.tolist()) == list(range(10))
    assert second.tolist() != torch.cat([y for _, y in batches]).tolist()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(0, 30), st.booleans(), st.integers(0, 2**63)
)
def test_a_position_is_exact(n, batch_size, position, flip, seed):
    batch_size = min(batch_size, n)
    whole = Loader(small_set(n), batch_size, seed=seed, flip=flip)
    for _ in range(position):
        whole.next_batch()
    resumed = Loader(small_set(n), batch_size, seed=seed, flip=flip)
    resumed.load_state_dict(whole.state_dict())
    for _ in range(3):
        for want, got in zip(whole.next_batch(), resumed.next_batch(), strict=True):
            assert torch.equal(want, got)


def test_flips_are_of_half_the_images():
    images = np.zeros((400, 2, 2, 1), np.uint8)
    images[:, :, 1] = 255
    loader = Loader(ImageSet(images, None, (), "test", "d"), 400, flip=True)
    flipped = (loader.next_batch()[0][:, 0, 0, 0] > 0).float().mean()
    assert 0.4 < flipped < 0.6


def test_without_shuffling_the_order_is_the_sets():
    _, labels = Loader(small_set(5), 5, shuffle=False).next_batch()
    assert labels.tolist() == list(range(5))


def test_a_device_by_its_index():
    images, labels = Loader(small_set(5), 5, device="cpu:0").next_batch()
    assert images.shape == (5, 1, 2, 2) and labels.shape == (5,)


def test_a_position_in_other_data_is_refused():
    state = Loader(small_set(10), 4).state_dict()
    with pytest.raises(InputError, match="batch_size=4, this loader 5"):
        Loader(small_set(10), 5).load_state_dict(state)
    with pytest.raises(InputError, match="digest='digest10'"):
        Loader(small_set(11), 4).load_state_dict(state)


def test_a_batch_larger_than_the_set():
    with pytest.raises(InputError, match="batch_size=11 is larger than the 10 images"):
        Loader(small_set(10), 11)


def test_the_data_are_not_written_to():
    data = load_images("digits", 28)
    before = data.images[:100].copy()
    for images, _ in [Loader(data, 100, shuffle=False).next_batch()]:
        images.fill_(0)
    np.testing.assert_array_equal(data.images[:100], before)
