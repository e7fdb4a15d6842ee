"""Runs of the GAN family from the command line: classes, losses, quality, verdicts, actions."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from support import kill_and_resume
from support.runs import SMALL
from torch import nn

from fastgan import cli, load_images
from fastgan.errors import InputError, RunError
from fastgan.metrics import classifier
from fastgan.metrics import features as features_module
from fastgan.train import loop
from fastgan.train.checkpoint import list_checkpoints, load_generator, read_manifest
from fastgan.train.config import TrainConfig
from fastgan.train.loop import settle, train
from fastgan.train.run import RunFolder, read_lines

CLASSES = ("bird", "cat", "dog")
CONDITIONAL = dataclasses.replace(SMALL, condition="planes")


class Moments(nn.Module):
    """Features that cost nothing: means of the image's quarters."""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.fixture(autouse=True)
def cheap_measures(monkeypatch):
    monkeypatch.setitem(features_module._builders, "moments", lambda data, cache: Moments())
    monkeypatch.setattr(classifier, "_SEEN", 256)


@pytest.fixture
def labelled(tmp_path):
    """A folder of three classes, of bright, medium and dark noise."""
    draw = np.random.default_rng(0)
    for i, name in enumerate(CLASSES):
        folder = tmp_path / "animals" / name
        folder.mkdir(parents=True)
        for k in range(8):
            pixels = draw.integers(80 * i, 80 * i + 90, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{k}.png")
    return tmp_path / "animals"


def data_of(folder):
    return load_images(str(folder), 16, progress=False)


def run(config, folder, out, **kwargs):
    kwargs.setdefault("say", lambda line: None)
    return train(config, data_of(folder), out, progress=False, **kwargs)


@pytest.mark.parametrize("condition", ["planes", "projection"])
def test_a_conditional_run_and_samples_of_a_class(labelled, tmp_path, capsys, condition):
    out = tmp_path / "run"
    flags = "--image-size 16 --nz 4 --ngf 2 --ndf 2 --batch-size 8 --steps 4 --save-every 2"
    command = ["train", "--data", str(labelled), "--out", str(out), "--condition", condition]
    assert cli.main([*command, *flags.split()]) == 0
    manifest = read_manifest(list_checkpoints(out / "checkpoints")[0])
    assert manifest["class_names"] == list(CLASSES) and manifest["images"] == 24
    assert manifest["settings"]["n_classes"] == 3
    # A grid with a row of eight for each class, of 16 pixels and lines of 2.
    with Image.open(RunFolder(out).sample_path(4)) as grid:
        assert grid.size == (8 * 18 + 2, 3 * 18 + 2)
    each = tmp_path / "each"
    for asked in ("cat", "1"):
        command = ["sample", str(out), "--class", asked, "-n", "3", "--each", str(each / asked)]
        assert cli.main(command) == 0
    netG = load_generator(out)
    assert netG.n_classes == 3 and netG.class_names == CLASSES
    for i in range(3):
        by_name, by_number = (
            (each / asked / f"{i:06d}.png").read_bytes() for asked in ("cat", "1")
        )
        assert by_name == by_number
    assert cli.main(["sample", str(out), "-n", "6", "-o", str(tmp_path / "g.png")]) == 0
    with Image.open(tmp_path / "g.png") as grid:
        assert grid.size == (2 * 18 + 2, 3 * 18 + 2)
    capsys.readouterr()
    assert cli.main(["sample", str(out), "--class", "cow"]) == 2
    assert "--class 'cow' is none of the 3 classes: bird, cat, dog" in capsys.readouterr().err


def test_a_class_of_a_run_without_classes_is_refused(labelled, tmp_path, capsys):
    run(SMALL, labelled, tmp_path / "run")
    assert cli.main(["sample", str(tmp_path / "run"), "--class", "1"]) == 2
    assert "was trained without classes" in capsys.readouterr().err


def test_classes_need_labels(tmp_path):
    images = load_images(np.zeros((9, 16, 16, 1), np.uint8), 16)
    with pytest.raises(InputError, match=r"--condition planes: .* has no labels; give a folder"):
        train(CONDITIONAL, images, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_too_few_classes_are_refused(labelled):
    few = dataclasses.replace(CONDITIONAL, n_classes=2)
    with pytest.raises(InputError, match=r"--n-classes 2: .* has 3"):
        settle(few, data_of(labelled))


FAMILY = {
    "conditional": {"condition": "projection"},
    "wgan-gp": {"loss": "wgan-gp", "norm_d": "none", "n_d": 2},
    "hinge, spectral norm": {"loss": "hinge", "spectral_norm": True, "norm_d": "none"},
    "lazy R1, DiffAugment": {"r1": 1.0, "r1_every": 4, "diff_augment": "color,translation,cutout"},
    "lsgan, noise, smooth": {"loss": "lsgan", "instance_noise": 0.1, "label_smoothing": 0.1},
    "mlp, minimax, TTUR": {"model": "mlp", "loss": "minimax", "lr_d": 4e-4},
    "resnet": {"model": "resnet", "loss": "hinge", "spectral_norm": True, "n_d": 2},
    "deeper": {"extra_layers": 1},
}


@pytest.mark.parametrize("name", FAMILY)
def test_resume_equals_never_having_stopped(labelled, tmp_path, name):
    config = dataclasses.replace(
        SMALL, eval_every=5, eval_samples=16, features="moments", **FAMILY[name]
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(config, labelled, whole)
    run(dataclasses.replace(config, steps=6), labelled, parts)
    run(config, labelled, parts, resume=True)
    differing = kill_and_resume.differences(whole, parts, 10)
    # The last step of a run is measured and logged, so one that ended in between has a line more.
    assert set(differing) <= {"metrics.jsonl", "quality.jsonl"}
    for path in ("metrics.jsonl", "quality.jsonl"):
        rows = {row["step"]: row for row in read_lines(parts / path)}
        for row in read_lines(whole / path):
            timed = {"images_per_second": 0, "seconds": 0}
            assert rows[row["step"]] | timed == row | timed


class TestQuality:
    CONFIG = dataclasses.replace(
        SMALL, steps=12, eval_every=3, eval_samples=20, features="moments", save_every=12
    )

    def test_the_best_checkpoint_is_kept(self, labelled, tmp_path, capsys):
        said = []
        run(self.CONFIG, labelled, tmp_path / "run", say=said.append)
        folder = RunFolder(tmp_path / "run")
        rows = read_lines(folder.quality)
        assert [row["step"] for row in rows] == [3, 6, 9, 12]
        best = min(rows, key=lambda row: row["frechet"])
        assert [path.name for path in list_checkpoints(folder.best)] == [f"step-{best['step']:06d}"]
        assert {"kernel", "kernel_error", "precision", "recall", "copy_rate"} < set(best)
        for text in ("moments features", "20 samples against 24 images", "resized"):
            assert text in best["described"]
        assert sum("the best so far" in line for line in said) >= 1
        page = folder.report.read_text()
        assert f"Best at step {best['step']}" in page and "Copies of training images?" in page

        assert cli.main(["sample", str(folder.path), "--best", "-o", str(tmp_path / "g.png")]) == 0
        capsys.readouterr()
        command = ["eval", str(folder.path), "--best", "-n", "20", "--features", "moments"]
        command += ["--data", str(labelled), "--json", str(tmp_path / "q.json")]
        assert cli.main([*command, "--neighbours", str(tmp_path / "n.png")]) == 0
        out = capsys.readouterr().out
        assert f"best/step-{best['step']:06d}" in out and "Frechet distance" in out
        # The very samples of the run's own measurement, by the seed that both have.
        measured = json.loads((tmp_path / "q.json").read_text())
        assert measured["frechet"] == pytest.approx(best["frechet"], rel=1e-3)
        with Image.open(tmp_path / "n.png") as picture:
            assert picture.size[0] == 4 * 18 + 2

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["-n", "3"], "-n 3 must be at least 10"),
            (["--features", "resnet99"], "features='resnet99' are unknown; choose from"),
            (["--json", "nowhere/q.json"], "the folder 'nowhere' does not exist"),
            (["--data", "nowhere"], "'nowhere' does not exist"),
        ],
    )
    def test_wrong_flags_of_eval(self, labelled, tmp_path, capsys, flags, message):
        run(dataclasses.replace(SMALL, steps=1), labelled, tmp_path / "run")
        capsys.readouterr()
        command = ["eval", str(tmp_path / "run"), "--data", str(labelled), *flags]
        assert cli.main(command) == 2
        assert message in capsys.readouterr().err

    def test_a_run_may_stop_by_itself(self, labelled, tmp_path, monkeypatch):
        calls = []

        def add(self, step, metric, health):
            calls.append(step)
            self.reason = "it may stop: enough" if step == 6 else self.reason
            return step == 6

        monkeypatch.setattr(loop.StoppingRule, "add", add)
        stopped = dataclasses.replace(self.CONFIG, stop=True)
        result = run(stopped, labelled, tmp_path / "stops")
        assert (result.step, result.stopped, result.interrupted) == (6, True, False)
        assert list_checkpoints(tmp_path / "stops" / "checkpoints")[0].name == "step-000006"
        calls.clear()
        result = run(self.CONFIG, labelled, tmp_path / "goes on")
        assert result.step == 12 and not result.stopped and calls == [3, 6, 9, 12]
        notes = read_lines(RunFolder(tmp_path / "goes on").health)
        assert {"step": 6, "stop": "it may stop: enough"} in notes


class TestActions:
    """What is done about bad verdicts, which here are given by the step."""

    @pytest.fixture
    def verdicts(self, monkeypatch):
        given = {}
        monkeypatch.setattr(loop, "_JUDGE_EVERY", 1)
        monkeypatch.setattr(loop, "_REST", 3)

        def verdict(self):
            return loop.Verdict(given.get(self._step, "healthy"), ("as given",))

        monkeypatch.setattr(loop.Health, "verdict", verdict)
        return given

    def go(self, labelled, out, on_bad, **settings):
        said, made = [], []
        config = dataclasses.replace(SMALL, on_bad=on_bad, save_every=2, **settings)
        make = loop._Run.__init__

        def watched(self, *args):
            make(self, *args)
            made.append(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop._Run, "__init__", watched)
            run(config, labelled, out, say=said.append)
        return made[0].engine, read_lines(RunFolder(out).health), said

    def test_nothing_is_done_by_default(self, labelled, tmp_path, verdicts):
        verdicts |= {3: "D too strong", 5: "collapsing"}
        plain, notes, said = self.go(labelled, tmp_path / "a", "")
        verdicts.clear()
        other, _, _ = self.go(labelled, tmp_path / "b", "")
        assert not any("action" in note for note in notes)
        assert [note["verdict"] for note in notes if note["step"] in (3, 4, 5)] == [
            *("D too strong", "healthy", "collapsing"),
        ]
        assert "Step 3: D too strong: as given." in said
        for a, b in zip(plain.netG.parameters(), other.netG.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_d_is_held_back(self, labelled, tmp_path, verdicts):
        verdicts |= {3: "D too strong", 4: "D too strong", 7: "D too strong"}
        engine, notes, _ = self.go(labelled, tmp_path / "a", "lower-lr-d,instance-noise")
        acted = [note["step"] for note in notes if "action" in note]
        assert acted == [3, 7]  # and rested in between
        assert float(engine.opt_d.param_groups[0]["lr"]) == pytest.approx(SMALL.lr / 4)
        assert float(engine.opt_g.param_groups[0]["lr"]) == pytest.approx(SMALL.lr)
        assert float(engine._instance_noise) == pytest.approx(0.1)

    def test_a_collapse_is_rolled_back(self, labelled, tmp_path, verdicts):
        verdicts |= {5: "collapsing"}
        _, notes, said = self.go(labelled, tmp_path / "a", "roll-back")
        assert [note["action"] for note in notes if "action" in note] == [
            "back to the networks of step-000004"
        ]
        assert any("back to the networks of step-000004" in line for line in said)
        assert len(read_lines(RunFolder(tmp_path / "a").metrics)) == 5

    def test_a_run_that_diverges_goes_on_from_the_last_good_checkpoint(
        self, labelled, tmp_path, verdicts, monkeypatch
    ):
        step = loop.Engine.step

        def poisoned(self):
            if self.steps == 4 and not getattr(self, "poisoned", False):
                self.poisoned = True
                next(self.netG.parameters()).data.fill_(math.nan)
            return step(self)

        monkeypatch.setattr(loop.Engine, "step", poisoned)
        engine, notes, _ = self.go(labelled, tmp_path / "a", "roll-back")
        assert engine.steps == 10
        assert all(bool(p.isfinite().all()) for p in engine.netG.parameters())
        assert any("action" in note for note in notes)
        with pytest.raises(RunError, match="is nan"):
            self.go(labelled, tmp_path / "b", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"diff_augment": "color,blur"}, "--diff-augment: 'blur' is not one of color, translat"),
        ({"on_bad": "panic"}, "--on-bad: 'panic' is not one of lower-lr-d"),
        ({"stop": True}, "--stop needs --eval-every"),
        ({"lr_d": -1.0}, "--lr-d -1.0 must be"),
        ({"n_d": 0}, "--n-d 0 must be at least 1"),
        ({"r1": -1.0}, "--r1 -1.0 must be at least 0"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "--loss hinge has no target"),
        ({"eval_samples": 2}, "--eval-samples 2 must be at least 10"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**settings).check()
