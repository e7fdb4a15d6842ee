"""The small classifier, what it says of samples, and ``fastgan augment``."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import SMALL, run_small
from torch import nn

from fastgan import cli, files, load_images
from fastgan.cli import augment
from fastgan.data.images import ImageSet
from fastgan.errors import InputError
from fastgan.metrics import classifier as module
from fastgan.metrics.classifier import (
    Classifier,
    ModeHistogram,
    StackedClassifier,
    accuracy,
    class_accuracy,
    classification_accuracy_score,
    generated_set,
    join,
    load_classifier,
    mode_histogram,
    subset,
    train_classifier,
)
from fastgan.metrics.features import load_features
from fastgan.train.loop import train


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", 16, progress=False)


def part(data, start, end):
    return subset(data, np.arange(start, end))


@pytest.fixture(scope="module")
def trained(digits):
    return train_classifier(part(digits, 0, 1000), steps=100)


def test_it_learns_digits(trained, digits):
    assert accuracy(trained, part(digits, 5000, 6000)) > 0.9


def test_images_of_any_size():
    classifier = Classifier(3, 2, width=4).eval()
    for size in (1, 5, 28):
        x = torch.zeros(2, 2, size, size)
        assert classifier(x).shape == (2, 3) and classifier.features(x).shape == (2, 16)


def test_it_learns_from_few():
    """Of 20 images a class: else whatever is added to them would look good."""
    digits = load_images("digits", 32, progress=False)
    few = np.concatenate([np.flatnonzero(digits.labels == c)[:20] for c in range(10)])
    found = train_classifier(subset(digits, few), steps=60)
    assert accuracy(found, part(digits, 5000, 5500)) > 0.8


def test_the_same_seed_gives_the_same_classifier_and_leaves_the_global_generator(digits):
    few = part(digits, 0, 200)
    before = torch.get_rng_state()
    a, b, c = (train_classifier(few, steps=4, seed=seed, augmentation=True) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    for x, y, z in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y) and not torch.equal(x, z)


def test_augmentation_moves_images_a_little():
    draw = torch.Generator().manual_seed(0)
    image = torch.full((200, 1, 32, 32), -1.0)
    image[:, :, 14:18, 14:18] = 1.0
    moved = module._augmented(image, draw)
    assert not torch.equal(moved[0], moved[1])
    at = torch.arange(32.0)
    mass = (moved + 1).sum(dim=1)
    for axis in (1, 2):
        centre = (mass.sum(dim=axis) * at).sum(dim=1) / mass.sum(dim=(1, 2))
        # Up to 7 % of a side of 32 in both directions, scaled by a tenth and turned by 10 degrees.
        assert (centre - 15.5).abs().max() <= 0.07 * 32 * 1.1 * (0.985 + 0.174) + 0.1
        assert centre.std() > 0.5


def test_it_is_trained_once(digits, monkeypatch, caplog, tmp_path):
    few = part(digits, 0, 120)
    monkeypatch.setattr(module, "_SEEN", 400)
    first = load_classifier(few, cache_dir=tmp_path, progress=False)
    assert 0.0 <= first.held_out_accuracy <= 1.0

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_classifier", refuse)
        again = load_classifier(few, cache_dir=tmp_path, progress=False)
        with pytest.raises(AssertionError, match="trained again"):
            load_classifier(part(digits, 0, 121), cache_dir=tmp_path, progress=False)
    assert again.held_out_accuracy == first.held_out_accuracy
    x = torch.rand(3, 1, 32, 32)
    assert torch.equal(first(x), again(x)) and not again.training
    (path,) = tmp_path.glob("classifier-*")
    path.write_bytes(path.read_bytes()[:-100])
    mended = load_classifier(few, cache_dir=tmp_path, progress=False)
    assert torch.equal(first(x), mended(x)) and "trained anew" in caplog.text


def test_its_features(digits, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_SEEN", 400)
    few = part(digits, 0, 120)
    features = load_features("classifier", cache_dir=tmp_path, data=few)
    x = torch.rand(3, 1, 32, 32)
    assert features(x).shape == (3, 128) and features.name == "classifier"
    with pytest.raises(InputError, match="features='classifier' are trained on a labelled set"):
        load_features("classifier")


def test_without_labels_there_is_none(digits):
    bare = dataclasses.replace(digits, labels=None, class_names=())
    for call in (load_classifier, train_classifier, lambda data: accuracy(Classifier(2, 1), data)):
        with pytest.raises(InputError, match="embedded set digits has no labels"):
            call(bare)
    with pytest.raises(InputError, match="5 images are too few"):
        load_classifier(part(digits, 0, 5))


class Shown(nn.Module):
    """Takes an image for the class that its mean says: -1 is 0, 1 is the last."""

    def __init__(self, n_classes):
        super().__init__()
        self.n_classes = n_classes

    def forward(self, x):
        found = ((x.mean(dim=(1, 2, 3)) + 1) / 2 * (self.n_classes - 1)).round().long()
        return nn.functional.one_hot(found, self.n_classes).float()


def plain(labels, n_classes=4, size=8):
    """Images that :class:`Shown` takes for ``labels``."""
    level = labels.float() / (n_classes - 1) * 2 - 1
    return level.view(-1, 1, 1, 1).expand(-1, 1, size, size).clone()


def test_modes_and_their_divergence():
    batches = [plain(torch.tensor(labels)) for labels in ([0, 0, 1], [3, 0, 1])]
    found = mode_histogram(batches, Shown(4), np.array([0, 1, 2, 3] * 5))
    assert found.counts == (3, 2, 0, 1) and found.covered == 3
    want = sum(p * math.log(p / 0.25) for p in (1 / 2, 1 / 3, 1 / 6))
    assert found.kl == pytest.approx(want)
    even = ModeHistogram.of(torch.tensor([5, 5]), np.array([0, 1]))
    assert even.kl == pytest.approx(0.0, abs=1e-12)


def test_stacked_digits_are_read_as_numbers():
    found = StackedClassifier(Shown(10))
    digits = torch.tensor([[1, 2, 3], [9, 0, 7]])
    images = plain(digits.flatten(), 10).view(2, 3, 8, 8)
    assert found(images).shape == (2, 1000)
    assert found(images).argmax(dim=1).tolist() == [123, 907]


def test_the_class_asked_for():
    """Of a sampler that makes a 2 where a 1 is asked for."""

    def sampler(labels):
        return plain(torch.where(labels == 1, 2, labels))

    found = class_accuracy(sampler, Shown(4), 4, 1202)
    assert found.of_class == (1.0, 0.0, 1.0, 1.0) and found.n == 1202
    assert found.share == pytest.approx(1 - 301 / 1202)
    with pytest.raises(InputError, match="n=3 samples are fewer than the 4 classes"):
        class_accuracy(sampler, Shown(4), 4, 3)


def test_the_score_of_a_perfect_and_of_a_useless_generator(digits, monkeypatch):
    monkeypatch.setattr(module, "_SEEN", 60 * 128)
    real, test = part(digits, 0, 600), part(digits, 5000, 5500)
    by_class = [np.flatnonzero(digits.labels[2000:4000] == c) + 2000 for c in range(10)]

    def perfect(labels):
        index = [by_class[c][i % len(by_class[c])] for i, c in enumerate(labels.tolist())]
        pixels = torch.from_numpy(digits.images[index]).permute(0, 3, 1, 2)
        return pixels.float() / 127.5 - 1

    good = classification_accuracy_score(perfect, real, test)
    useless = classification_accuracy_score(lambda y: torch.zeros(len(y), 1, 16, 16), real, test)
    assert (good.n_train, good.n_test) == (600, 500) and good.real == useless.real
    assert good.generated > good.real - 0.1 and good.real > 0.6 and useless.generated < 0.3


def test_sets_generated_and_joined(digits):
    labels = torch.tensor([2, 0, 1])
    made = generated_set(lambda y: plain(y, size=16), labels, digits)
    assert made.images.shape == (3, 16, 16, 1) and made.labels.tolist() == [2, 0, 1]
    assert made.images[:, 0, 0, 0].tolist() == [170, 0, 85]
    both = join(part(digits, 0, 5), made)
    assert len(both) == 8 and both.labels.tolist()[5:] == [2, 0, 1]


@pytest.fixture(scope="module")
def conditional_run(tmp_path_factory, digits):
    """On 60 of the digits, at 16x16."""
    folder = tmp_path_factory.mktemp("conditional")
    few = part(digits, 0, 60)
    np.savez(folder / "few.npz", images=few.images[..., 0], labels=few.labels)
    config = dataclasses.replace(SMALL, steps=2, condition="planes", data=str(folder / "few.npz"))
    data = load_images(config.data, 16, progress=False)
    assert isinstance(data, ImageSet) and data.n_classes == 10
    train(config, data, folder / "run", progress=False, say=lambda line: None)
    return folder / "run"


class TestAugmentCommand:
    def test_a_balanced_labelled_set(self, conditional_run, tmp_path, capsys):
        out = tmp_path / "more"
        assert (
            cli.main(["augment", str(conditional_run), "--out", str(out), "--per-class", "3"]) == 0
        )
        made = load_images(str(out), 16, progress=False)
        assert len(made) == 30 and made.class_names == tuple(map(str, range(10)))
        assert np.bincount(made.labels).tolist() == [3] * 10
        capsys.readouterr()
        assert cli.main(["augment", str(conditional_run), "--out", str(out)]) == 2
        assert "holds files already" in capsys.readouterr().err

    def test_the_report(self, conditional_run, tmp_path, capsys):
        flags = ["--real-per-class", "2", "--per-class", "3", "--seeds", "2", "--steps", "3"]
        command = ["augment", str(conditional_run), "--report", *flags]
        assert cli.main([*command, "--json", str(tmp_path / "r.json")]) == 0
        out = capsys.readouterr().out
        for text in ("real + generated", "20 real images to train on", "30 generated", "40 real"):
            assert text in out
        assert (
            "The GAN was trained on 60 images, those of the test among them, more than the 20"
            in out
        )
        found = json.loads((tmp_path / "r.json").read_text())
        assert {len(values) for values in found["accuracy"].values()} == {2}
        assert (found["n_real"], found["n_test"], found["gan_trained_on"]) == (20, 40, 60)

    def test_other_images_to_test_on(self, conditional_run, digits, tmp_path, capsys):
        """Classes are matched by their names: here 3 and 7 are numbers 0 and 1."""
        chosen = np.concatenate([np.flatnonzero(digits.labels == c)[-15:] for c in (3, 7)])
        np.savez(
            tmp_path / "two.npz", images=digits.images[chosen, ..., 0], labels=digits.labels[chosen]
        )
        data = load_images(str(tmp_path / "two.npz"), 16, progress=False)
        like = dataclasses.replace(data, labels=None, class_names=digits.class_names)
        matched = augment._with_classes_of(digits, data, "two.npz")
        assert np.array_equal(matched.labels, digits.labels[chosen]) and data.labels.max() == 1
        with pytest.raises(InputError, match=r"--test 'x' has no labels"):
            augment._with_classes_of(digits, like, "x")
        command = ["augment", str(conditional_run), "--report", "--per-class", "1", "--seeds", "1"]
        command += ["--steps", "2", "--test", str(tmp_path / "two.npz")]
        assert cli.main(command) == 0
        out = capsys.readouterr().out
        assert "tested on 30 real images; 60 real" in out
        assert "The GAN was trained" not in out and "±" not in out
        np.savez(tmp_path / "odd.npz", images=data.images[..., 0], labels=np.arange(30) + 5)
        assert cli.main([*command[:-1], str(tmp_path / "odd.npz")]) == 2
        assert "has the class '10', which is none of 0, 1" in capsys.readouterr().err

    def test_folders_of_classes(self):
        folders = augment._folders
        assert folders(("T-shirt/top", "été", "../x"), 3) == ["T-shirt_top", "été", "_x"]
        # On some systems 'a' and 'A' are one.
        for names in ((), ("a", "A"), ("..", "b"), ("a/b", "a:b")):
            assert folders(names, 2) == ["0", "1"]
        assert folders((), 11)[::10] == ["00", "10"]

    def test_no_image_is_half_written(self, conditional_run, monkeypatch, tmp_path):
        synced = files.sync_file
        written = []

        def full(file):
            written.append(file.name)
            if sum(".png" in name for name in written) == 3:
                raise OSError(28, "No space left on device", file.name)
            synced(file)

        monkeypatch.setattr(files, "sync_file", full)
        command = ["augment", str(conditional_run), "--out", str(tmp_path / "x")]
        assert cli.main(command) == 2
        found = [path for path in (tmp_path / "x").rglob("*") if path.is_file()]
        assert {path.name for path in found} == {"000000.png", "000001.png"}
        for path in found:
            Image.open(path).load()

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ([], "give either --out, a folder to write images to, or --report"),
            (["--report", "--out", "x"], "give either --out"),
            (["--out", "x", "--per-class", "0"], "--per-class 0 must be at least 1"),
            (["--out", "x", "--test", "digits"], "--test digits is of --report"),
            (["--report", "--real-per-class", "99"], "--real-per-class 99: .* has . images of"),
            (["--report", "--steps", "1"], "no image left to test on"),
        ],
    )
    def test_wrong_flags(self, conditional_run, capsys, flags, message):
        assert cli.main(["augment", str(conditional_run), *flags]) == 2
        assert re.search(message, capsys.readouterr().err)

    def test_a_run_without_classes(self, tmp_path, capsys):
        run_small(tmp_path / "run")
        command = ["augment", str(tmp_path / "run"), "--out", str(tmp_path / "x")]
        assert cli.main(command) == 2
        assert "was trained without classes" in capsys.readouterr().err


def test_values_out_of_range(digits):
    few = part(digits, 0, 50)
    with pytest.raises(InputError, match="n_classes=0 must be at least 1"):
        Classifier(0, 1)
    with pytest.raises(InputError, match=r"n_classes=3: .* has 10 classes"):
        train_classifier(few, n_classes=3)
    with pytest.raises(InputError, match="steps=0 must be at least 1"):
        train_classifier(few, steps=0)
    for n in (0, 51):
        with pytest.raises(InputError, match=f"n={n} must be from 1 to the 50 images"):
            classification_accuracy_score(plain, few, few, n=n)
