"""Malformed input: one line that names the file or flag, exit code 2, nothing written or lost."""

import io
import re
import struct
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import fastgan, listing, run_small

from fastgan import cli

TRAIN = ("train", "--ngf", "2", "--ndf", "2", "--steps", "2", "--batch-size", "2")


def bomb_png(side=20_000):
    """A black PNG of ``side`` x ``side`` pixels in a few hundred kilobytes."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packed = zlib.compressobj(9)
    row = b"\0" * (side + 1)
    pixels = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def good_png(size=20):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (10, 20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def empty_folder(p):
    (p / "empty").mkdir()
    return "empty"


def folder_without_images(p):
    (p / "notes").mkdir()
    (p / "notes" / "readme.txt").write_text("hello")
    return "notes"


def text_file(p):
    (p / "notes.txt").write_text("hello")
    return "notes.txt"


def single_image(p):
    (p / "cat.png").write_bytes(good_png())
    return "cat.png"


def folder_with_a_bomb(p):
    (p / "photos").mkdir()
    (p / "photos" / "a.png").write_bytes(good_png())
    (p / "photos" / "bomb.png").write_bytes(bomb_png())
    return "photos"


def folder_of_truncated_images(p):
    (p / "photos").mkdir()
    for i in range(3):
        (p / "photos" / f"{i}.png").write_bytes(good_png(200)[:100])
    return "photos"


def folder_of_disguised_text(p):
    (p / "photos").mkdir()
    (p / "photos" / "a.jpg").write_text("this is no JPEG")
    return "photos"


def fewer_images_than_a_batch(p):
    (p / "photos").mkdir()
    (p / "photos" / "a.png").write_bytes(good_png())
    return "photos"


def broken_zip(p):
    (p / "photos.zip").write_bytes(b"PK\x03\x04 and then nothing of use")
    return "photos.zip"


def zip_that_climbs_out(p):
    with zipfile.ZipFile(p / "evil.zip", "w") as archive:
        archive.writestr("../../outside.png", good_png())
    return "evil.zip"


def zip_with_an_absolute_path(p):
    with zipfile.ZipFile(p / "evil.zip", "w") as archive:
        archive.writestr("/etc/outside.png", good_png())
    return "evil.zip"


def zip_without_images(p):
    with zipfile.ZipFile(p / "texts.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    return "texts.zip"


def zip_cut_short(p):
    with zipfile.ZipFile(p / "cut.zip", "w") as archive:
        archive.writestr("a.png", good_png())
    data = (p / "cut.zip").read_bytes()
    (p / "cut.zip").write_bytes(data[: len(data) // 2])
    return "cut.zip"


def npy_of_text(p):
    (p / "x.npy").write_text("hello")
    return "x.npy"


def npy_cut_short(p):
    np.save(p / "x.npy", np.zeros((9, 16, 16), np.uint8))
    (p / "x.npy").write_bytes((p / "x.npy").read_bytes()[:500])
    return "x.npy"


def npy_of_floats(p):
    np.save(p / "x.npy", np.zeros((9, 16, 16), np.float32))
    return "x.npy"


def npy_of_vectors(p):
    np.save(p / "x.npy", np.zeros((9, 256), np.uint8))
    return "x.npy"


def npy_without_images(p):
    np.save(p / "x.npy", np.zeros((0, 16, 16), np.uint8))
    return "x.npy"


def npy_of_objects(p):
    np.save(p / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return "x.npy"


def npz_without_images(p):
    np.savez(p / "x.npz", labels=np.zeros(4, np.int64))
    return "x.npz"


def npz_with_two_candidates(p):
    np.savez(p / "x.npz", a=np.zeros((4, 16, 16), np.uint8), b=np.zeros((4, 16, 16), np.uint8))
    return "x.npz"


def npz_with_too_few_labels(p):
    np.savez(p / "x.npz", images=np.zeros((4, 16, 16), np.uint8), labels=np.zeros(3, np.int64))
    return "x.npz"


def npz_with_labels_of_floats(p):
    np.savez(p / "x.npz", images=np.zeros((4, 16, 16), np.uint8), labels=np.zeros(4))
    return "x.npz"


def npz_with_labels_beyond_its_classes(p):
    x = np.zeros((4, 16, 16), np.uint8)
    np.savez(p / "x.npz", images=x, labels=np.arange(4), classes=["a", "b"])
    return "x.npz"


def npz_of_noise(p):
    (p / "x.npz").write_bytes(bytes(range(256)) * 4)
    return "x.npz"


def hdf5_of_noise(p):
    (p / "x.h5").write_bytes(bytes(range(256)) * 4)
    return "x.h5"


def hdf5_without_images(p):
    with h5py.File(p / "x.h5", "w") as file:
        file["weights"] = np.zeros((3, 3))
    return "x.h5"


def idx_with_another_magic(p):
    (p / "train-images-idx3-ubyte").write_bytes(b"\0\0\x0b\x03" + b"\0" * 40)
    return "train-images-idx3-ubyte"


def idx_cut_short(p):
    header = b"\0\0\x08\x03" + struct.pack(">3I", 10, 28, 28)
    (p / "train-images-idx3-ubyte").write_bytes(header + b"\0" * 100)
    return "train-images-idx3-ubyte"


def idx_of_broken_gzip(p):
    (p / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b and no more")
    return "train-images-idx3-ubyte.gz"


def missing_path(p):
    return "no/such/place"


DATA = [
    (empty_folder, "no images in the folder 'empty'"),
    (folder_without_images, "no images in the folder 'notes'"),
    (text_file, "'notes.txt' is not a folder of images"),
    (single_image, "'cat.png' is a single image; give the folder"),
    (folder_with_a_bomb, r"1 of 2 images .*bomb.png.*bomb"),
    (folder_of_truncated_images, r"3 of 3 images .*0.png.*truncated"),
    (folder_of_disguised_text, r"1 of 1 images .*a.jpg: cannot identify"),
    (fewer_images_than_a_batch, r"--batch-size 2 is larger than the 1 images"),
    (broken_zip, "'photos.zip' is not a readable zip"),
    (zip_that_climbs_out, r"'../../outside.png', a path that climbs out"),
    (zip_with_an_absolute_path, r"'/etc/outside.png', a path that climbs out"),
    (zip_without_images, "no images in the zip 'texts.zip'"),
    (zip_cut_short, "'cut.zip' is not a readable zip"),
    (npy_of_text, "'x.npy' is not a readable .npy file"),
    (npy_cut_short, "'x.npy' is not a readable .npy file"),
    (npy_of_floats, r"x.npy has images float32 \[9, 16, 16\]; they must be uint8"),
    (npy_of_vectors, r"x.npy has images uint8 \[9, 256\]; they must be \[N, H, W\]"),
    (npy_without_images, r"x.npy has images uint8 \[0, 16, 16\]"),
    (npy_of_objects, "'x.npy' is not a readable .npy file"),
    (npz_without_images, r"'x.npz' needs one uint8 array .*it holds labels int64 \[4\]"),
    (npz_with_two_candidates, r"'x.npz' needs one uint8 array .*'images'"),
    (npz_with_too_few_labels, r"x.npz has labels int64 \[3\]; they must be integers \[4\]"),
    (npz_with_labels_of_floats, r"x.npz has labels float64"),
    (npz_with_labels_beyond_its_classes, "labels from 0 to 3 for 2 classes"),
    (npz_of_noise, "'x.npz' is not a readable .npz file"),
    (hdf5_of_noise, "'x.h5' is not a readable HDF5 file"),
    (hdf5_without_images, r"'x.h5' needs one uint8 array .*weights float64"),
    (idx_with_another_magic, "is not an idx file of bytes with 3 dimensions"),
    (idx_cut_short, r"is damaged: its header says \[10, 28, 28\], it holds 100 bytes"),
    (idx_of_broken_gzip, "'train-images-idx3-ubyte.gz' cannot be read"),
    (missing_path, "'no/such/place' does not exist"),
]

FLAGS = [
    (("train", "--image-size", "60"), r"--image-size.*60.*nearest are 56 and 64"),
    (("train", "--batch-size", "0"), "--batch-size 0 must be at least 1"),
    (("train", "--batch-size", "many"), "--batch-size.*'many'"),
    (("train", "--lr", "nan"), "--lr nan"),
    (("train", "--lr", "-1"), "--lr -1.0 must be greater than 0"),
    (("train", "--beta1", "1"), "--beta1 1.0"),
    (("train", "--ema", "1.5"), "--ema 1.5"),
    (("train", "--nc", "2"), "--nc 2"),
    (("train", "--max-bad", "2"), "--max-bad 2.0 must be from 0 to 1"),
    (("train", "--keep", "-1"), "--keep -1"),
    (("train", "--seed", "-1"), "--seed -1"),
    (("train", "--steps", "0"), "--steps 0"),
    (("train", "--steps", "5", "--epochs", "5"), "--steps 5 and --epochs 5"),
    (("train", "--model", "stylegan9"), "'stylegan9' is unknown; choose from .*dcgan"),
    (("train", "--device", "tpu9"), "device='tpu9'"),
    (("train", "--device", "meta"), "device='meta'"),
    (("train", "--data", "~nosuchuser/photos"), "'~nosuchuser/photos' cannot be used as a path"),
    (("train", "--data", "x" * 300), "File name too long"),
    (("train", "--out", "x" * 300), "File name too long"),
    (("sample", "run", "--each", "each"), "--each 'each' holds images already"),
    (("train", "--backend", "cuda"), "backend='cuda'"),
    (("train", "--backend", "cudnn"), "'cudnn'.*'--backend'"),
    (("train", "--data", ""), "--data"),
    (("train", "--no-such-flag"), "--no-such-flag"),
    (("train", "--steps"), "--steps"),
    (("train", "stray"), "stray"),
    (("train", "--resume"), r"--resume: there is no run at 'runs.digits'"),
    (("train", "--resume", "--force", "--out", "run"), "--resume"),
    (("train", "--config", "missing.yaml"), "--config 'missing.yaml' cannot be read"),
    (("train", "--out", "a-file"), "--out 'a-file' is a file"),
    (("train", "--out", "a-file/below"), "--out 'a-file/below': .* is a file"),
    (("sample", "no-run"), "'no-run' does not exist"),
    (("sample", "."), "holds no checkpoint"),
    (("sample", "a-file"), "'a-file' is not a"),
    (("sample", "run", "-n", "0"), "-n 0 must be at least 1"),
    (("sample", "run", "-o", "x.jpg"), "-o 'x.jpg' must end in .png"),
    (("sample", "run", "-o", "no/such/x.png"), "'no/such' does not exist"),
    (("sample", "run", "--each", "a-file"), "--each 'a-file' is a file"),
    (("sample",), "RUN"),
    (("dcgan", "--dataset", "folder"), "--dataroot is required"),
    (("dcgan",), "--dataset"),
    (("dcgan", "--dataset", "celeba", "--dataroot", "x"), "--dataset 'celeba'"),
    (("dcgan", "--dataset", "fake", "--imageSize", "65"), "--imageSize.*56 and 64"),
    (("dcgan", "--dataset", "fake", "--netG", "none.pth"), "--netG 'none.pth' does not exist"),
    (("dcgan", "--dataset", "fake", "--netG", "a-file"), "'a-file' is not a"),
    (("dcgan", "--dataset", "folder", "--dataroot", "nowhere"), "'nowhere' does not exist"),
    (("trian",), "unknown command 'trian'; choose from train"),
]

CONFIGS = [
    ("lrate: 0.1", "unknown setting 'lrate'"),
    ("batchsize: 3", "'batchsize'; did you mean 'batch_size'"),
    ("lr: fast", "lr: 'fast' is not of type float"),
    ("batch_size: 2.5", "batch_size: 2.5 is not of type int"),
    ("flip: 1", "flip: 1 is not of type bool"),
    ("backend: gpu", "backend: 'gpu'"),
    ("- a\n- b", "must hold lines"),
    ("a: [", "is not YAML"),
    ("\x00\x01", "is not YAML"),
    ("lr: -1", "--lr -1.0"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a run in it, whose files must stay as they are."""
    monkeypatch.chdir(tmp_path)
    run_small(tmp_path / "run")
    (tmp_path / "a-file").write_text("precious")
    (tmp_path / "each").mkdir()
    (tmp_path / "each" / "000000.png").write_text("precious")
    return tmp_path


def assert_one_line(code, out, err, message):
    assert code == 2, err
    assert err.count("\n") == 1 and err.startswith("fastgan: "), err
    assert "Traceback" not in out + err
    assert re.search(message, err), err


@pytest.mark.parametrize(("make", "message"), DATA, ids=[make.__name__ for make, _ in DATA])
def test_bad_data(place, capsys, make, message):
    source = make(place)
    before = listing(place)
    code = cli.main([*TRAIN, "--data", source])
    assert_one_line(code, *capsys.readouterr(), message)
    assert listing(place) == before
    assert not Path("runs").exists()


@pytest.mark.parametrize(("args", "message"), FLAGS, ids=[" ".join(args) for args, _ in FLAGS])
def test_bad_flags(place, capsys, without_cuda, args, message):
    before = listing(place)
    code = cli.main(list(args))
    assert_one_line(code, *capsys.readouterr(), message)
    assert listing(place) == before
    assert not Path("runs").exists()


@pytest.mark.parametrize(("text", "message"), CONFIGS)
def test_bad_configuration_files(place, capsys, text, message):
    Path("c.yaml").write_text(text)
    before = listing(place)
    code = cli.main(["train", "--config", "c.yaml"])
    assert_one_line(code, *capsys.readouterr(), message)
    assert listing(place) == before


def test_a_damaged_run_is_not_resumed(place, capsys):
    (place / "run" / "config.yaml").write_text("lr: [")
    before = listing(place)
    code = cli.main(["train", "--out", "run", "--resume"])
    assert_one_line(code, *capsys.readouterr(), "config.yaml")
    assert listing(place) == before


def test_an_examples_checkpoint_of_another_network(place, capsys):
    for key in ("fc.weight", 0):
        torch.save({key: torch.zeros(2)}, "netG.pth")
        code = cli.main(["sample", "netG.pth"])
        assert_one_line(code, *capsys.readouterr(), "not a DCGAN generator's")
    assert not Path("grid.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("train", "--bach-size", 3),
            r"^fastgan: Unrecognized options: --bach-size, 3; perhaps you meant --batch-size INT "
            r"\(see fastgan train -h\)$",
        ),
        (("train", "--data", "a-file"), "'a-file' is not a folder"),
        (("sample", "run/checkpoints/step-000010/state.pt"), "state.pt|state dict"),
        (("dcgan", "--dataset", "folder", "--dataroot", "empty"), "no images in the folder"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_in_a_process_of_its_own(place, monkeypatch, args, message, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    Path("empty").mkdir()
    before = listing(place)
    result = fastgan(*args)
    assert_one_line(result.returncode, result.stdout, result.stderr, message)
    assert listing(place) == before
