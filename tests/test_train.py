"""Training runs: what a run folder holds, exact resume, and every way in which a run can stop."""

import dataclasses
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from support import kill_and_resume
from support.runs import SMALL, fastgan, listing, run_small, small_data

from fastgan import build_model, register_model
from fastgan.engine.engine import Engine
from fastgan.errors import InputError, RunError
from fastgan.files import replace_file
from fastgan.ops.backend import machine_reasons
from fastgan.train import checkpoint, loop
from fastgan.train.config import TrainConfig
from fastgan.train.run import RunFolder


def test_a_run_folder_holds_what_is_promised(tmp_path):
    out = tmp_path / "runs" / "first"
    result = run_small(out)
    assert (result.step, result.interrupted) == (10, False)
    names = {str(p.relative_to(out)) for p in out.rglob("*")}
    assert {
        *("config.yaml", "metrics.jsonl", "samples.gif", "report.html"),
        *("samples/step-000005.png", "samples/step-000010.png"),
        *(f"checkpoints/step-{s:06d}/netG.safetensors" for s in (4, 8, 10)),
        *(f"checkpoints/step-000010/{n}" for n in ("netD.safetensors", "ema.safetensors")),
        *(f"checkpoints/step-000010/{n}" for n in ("state.pt", "manifest.json")),
    } <= names
    assert any("tfevents" in name for name in names)
    assert not [name for name in names if "/." in name or name.startswith(".")]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    assert rows[0].keys() >= {"loss_d", "loss_g", "d_real", "d_fake", "d_fake_g", "epoch"}
    assert [row["epoch"] for row in rows[:3]] == [0.6667, 1.3333, 2.0]
    assert Image.open(out / "samples" / "step-000010.png").size == (8 * 18 + 2, 8 * 18 + 2)
    assert Image.open(out / "samples.gif").n_frames == 2
    stored = yaml.safe_load((out / "config.yaml").read_text())
    assert stored == dataclasses.asdict(SMALL)
    manifest = json.loads((out / "checkpoints/step-000010/manifest.json").read_text())
    assert manifest["threads"] == torch.get_num_threads()
    assert manifest["step"] == 10


def test_the_report_is_one_self_contained_page(tmp_path):
    run_small(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    # Losses and scores; the verdicts, what is measured among the samples, accuracy, gradients.
    assert page.count("<svg") == 2 + 4 and page.count("<polyline") == 5 + 7
    assert page.count("data:image/png;base64,") == 2
    assert "batch_size" in page and "10 of 10" in page
    assert not re.search(r"(src|href)='?https?:", page)


def test_the_report_escapes_what_it_is_given():
    page = loop.render_report(
        "<b>",
        {"a": "<script>"},
        {},
        [{"step": 1, "spread": 1.0}],
        [],
        skipped=[("<i>.png", "bad")],
        health=[{"step": 1, "verdict": "<i>", "reasons": ["<b>"]}, {"step": 2, "action": "<i>"}],
        quality=[{"step": 1, "frechet": 1.0, "described": "<script>"}],
    )
    assert "<script>" not in page and "<i>" not in page and "<b>" not in page


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_resume_equals_never_having_stopped(tmp_path, stop):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_small(whole)
    run_small(parts, dataclasses.replace(SMALL, steps=stop))
    said = []
    run_small(parts, resume=True, say=said.append)
    assert said == [f"Resuming {parts} at step {stop} of 10."]
    assert kill_and_resume.differences(whole, parts, 10) in ([], ["metrics.jsonl"])
    # The last step of a run is always logged, so a run that ended in between has a line more.
    want = kill_and_resume.metrics(whole)
    assert [row for row in kill_and_resume.metrics(parts) if row["step"] % 2 == 0] == want


def test_epochs_count_the_last_partial_batch(tmp_path):
    config = dataclasses.replace(SMALL, steps=None, epochs=2)
    assert run_small(tmp_path / "run", config).step == 6


def test_keep(tmp_path):
    for keep, want in ((1, [10]), (2, [8, 10]), (0, [4, 8, 10])):
        out = tmp_path / str(keep)
        run_small(out, dataclasses.replace(SMALL, keep=keep))
        assert [int(p.name[5:]) for p in sorted((out / "checkpoints").iterdir())] == want


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    run_small(tmp_path / "run")
    before, said = listing(tmp_path / "run"), []
    run_small(tmp_path / "run", resume=True, say=said.append)
    assert "complete at step 10" in said[-1]
    assert listing(tmp_path / "run") == before


def test_an_existing_run_is_not_overwritten(tmp_path):
    out = tmp_path / "run"
    run_small(out)
    before = listing(out)
    with pytest.raises(InputError, match="--resume goes on with it, --force replaces it"):
        run_small(out)
    assert listing(out) == before
    run_small(out, dataclasses.replace(SMALL, seed=1, steps=4), force=True)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000004"]


def test_force_removes_nothing_that_is_not_the_runs(tmp_path):
    out = tmp_path / "run"
    run_small(out)
    (out / "my-notes.txt").write_text("keep me")
    with pytest.raises(InputError, match="not the run's"):
        run_small(out, force=True)
    assert (out / "my-notes.txt").read_text() == "keep me"
    assert (out / "checkpoints" / "step-000010").is_dir()


def test_a_folder_of_other_files_is_not_used(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(InputError, match="other files"):
            run_small(tmp_path, force=force)
    assert listing(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("change", [{"lr": 0.1}, {"batch_size": 4}, {"seed": 1}, {"ema": 0.5}])
def test_a_resumed_run_keeps_its_settings(tmp_path, change):
    run_small(tmp_path / "run")
    name = next(iter(change)).replace("_", "-")
    with pytest.raises(InputError, match=f"--{name} .*the run has"):
        run_small(tmp_path / "run", dataclasses.replace(SMALL, **change), resume=True)


def test_a_resumed_run_keeps_its_data(tmp_path):
    run_small(tmp_path / "run")
    config = dataclasses.replace(SMALL, steps=20)
    with pytest.raises(InputError, match="digest"):
        loop.train(config, small_data(21), tmp_path / "run", resume=True, progress=False)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    run_small(whole, dataclasses.replace(SMALL, steps=14))
    run_small(out)
    weights = out / "checkpoints" / "step-000010" / "netD.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    said = []
    run_small(out, dataclasses.replace(SMALL, steps=14), resume=True, say=said.append)
    assert "checksum of netD.safetensors is wrong" in said[0]
    assert "at step 8 of 14" in said[1]
    assert (out / "checkpoints" / "damaged-step-000010").is_dir()
    for path in (whole, out):
        for left in (path / "checkpoints").glob("damaged-*"):
            left.rename(tmp_path / left.name)
    assert kill_and_resume.differences(whole, out, 14) == []


def test_only_damaged_checkpoints(tmp_path):
    run_small(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"no checkpoint in .* can be used.*manifest.json"):
        run_small(tmp_path / "run", dataclasses.replace(SMALL, steps=12), resume=True)


def test_a_checkpoint_does_not_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    path = tmp_path / "netG.pth"
    torch.save({"main.0.weight": Evil()}, path)
    with pytest.raises(InputError, match="could run code"):
        checkpoint.load_generator(path)
    assert not (tmp_path / "pwned").exists()


def test_a_later_format_asks_for_an_upgrade(tmp_path):
    run_small(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-000010"
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(InputError, match="upgrade"):
        checkpoint.read_manifest(path)


def test_what_a_kill_left_behind_is_cleaned(tmp_path):
    run_small(tmp_path / "run")
    leftover = tmp_path / "run" / "checkpoints" / ".tmp-step-000011"
    leftover.mkdir()
    (leftover / "netG.safetensors").write_bytes(b"half")
    run_small(tmp_path / "run", dataclasses.replace(SMALL, steps=12), resume=True)
    assert not leftover.exists()


def test_the_thread_count_of_the_run_is_taken_up(tmp_path):
    run_small(tmp_path / "run")
    threads, said = torch.get_num_threads(), []
    try:
        torch.set_num_threads(threads + 1)
        config = dataclasses.replace(SMALL, steps=12)
        run_small(tmp_path / "run", config, resume=True, say=said.append)
        assert torch.get_num_threads() == threads
        assert f"Using {threads} threads" in said[0]
    finally:
        torch.set_num_threads(threads)


def test_two_processes_do_not_train_one_run(tmp_path):
    out, longer = tmp_path / "run", dataclasses.replace(SMALL, steps=12)
    run_small(out)
    before = listing(out)
    with RunFolder(out).lock():
        with pytest.raises(InputError, match="another process"):
            run_small(out, longer, resume=True)
        with pytest.raises(InputError, match="another process"):
            run_small(out, longer, force=True)
    assert listing(out) == before


def test_the_lock_holds_while_a_resumed_run_trains(tmp_path, monkeypatch):
    out, tried = tmp_path / "run", []
    run_small(out)

    class Intruded(Engine):
        def step(self, *args, **kwargs):
            with pytest.raises(InputError, match="another process"), RunFolder(out).lock():
                pass
            tried.append(self.steps)
            return super().step(*args, **kwargs)

    monkeypatch.setattr(loop, "Engine", Intruded)
    run_small(out, dataclasses.replace(SMALL, steps=12), resume=True)
    assert tried == [10, 11]


def test_an_out_that_is_a_link_or_the_present_folder(tmp_path, monkeypatch):
    (tmp_path / "big").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "big")
    run_small(tmp_path / "latest")
    run_small(tmp_path / "latest", dataclasses.replace(SMALL, steps=4), force=True)
    assert [p.name for p in (tmp_path / "big" / "checkpoints").iterdir()] == ["step-000004"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run_small(Path())
    assert Path("checkpoints/step-000010").is_dir()


def test_edited_settings_are_noticed_on_resume(tmp_path):
    run_small(tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.0002", "lr: 0.1"))
    with pytest.raises(InputError, match=r"--lr 0.1 \(the run has 0.0002\)"):
        run_small(tmp_path / "run", dataclasses.replace(SMALL, lr=0.1, steps=12), resume=True)


def test_a_checkpoint_damaged_twice(tmp_path):
    out = tmp_path / "run"
    for _ in range(2):
        run_small(out, resume=out.exists())
        (out / "checkpoints" / "step-000010" / "state.pt").write_bytes(b"")
    said = []
    run_small(out, resume=True, say=said.append)
    assert "at step 8 of 10" in said[-1]
    names = {p.name for p in (out / "checkpoints").glob("damaged-*")}
    assert names == {"damaged-step-000010", "damaged-step-000010-1"}


def test_other_files_among_the_samples(tmp_path):
    run_small(tmp_path / "run", dataclasses.replace(SMALL, steps=5))
    (tmp_path / "run" / "samples" / "step-000005 (1).png").write_bytes(b"a copy")
    run_small(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "samples" / "step-000005 (1).png").read_bytes() == b"a copy"


def test_more_steps_between_logs_than_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "HISTORY", 3)
    run_small(tmp_path / "run", dataclasses.replace(SMALL, log_every=10**12))
    assert [row["step"] for row in kill_and_resume.metrics(tmp_path / "run")] == [10]


def with_dropout(**sizes):
    netG, netD = build_model("dcgan", **sizes)
    netD.main.insert(1, torch.nn.Dropout(0.5))
    return netG, netD


def test_networks_that_draw_random_numbers_resume_exactly_too(tmp_path):
    register_model("test-dropout", with_dropout)
    config = dataclasses.replace(SMALL, model="test-dropout")
    state = torch.get_rng_state()
    run_small(tmp_path / "whole", config)
    run_small(tmp_path / "parts", dataclasses.replace(config, steps=4))
    torch.rand(3)
    run_small(tmp_path / "parts", config, resume=True)
    assert kill_and_resume.differences(tmp_path / "whole", tmp_path / "parts", 10) == []
    torch.set_rng_state(state)


def test_a_run_leaves_the_callers_generator_alone(tmp_path):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    run_small(tmp_path / "run")
    assert torch.equal(state, torch.get_rng_state())


class PlantedNaN(Engine):
    """Goes wrong at step 7: between two reads of the statistics, and after a checkpoint."""

    def step(self, *args, **kwargs):
        if self.steps == 6:
            with torch.no_grad():
                self.netD.main[0].weight[0] = float("nan")
        return super().step(*args, **kwargs)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    run_small(tmp_path / "good", dataclasses.replace(SMALL, steps=4))
    want = listing(tmp_path / "good" / "checkpoints" / "step-000004")
    monkeypatch.setattr(loop, "Engine", PlantedNaN)
    with pytest.raises(RunError, match=r"step 7: loss_d is nan.*step-000004.*--lr"):
        run_small(tmp_path / "run", dataclasses.replace(SMALL, log_every=10))
    folder = tmp_path / "run" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step-000004"]
    got = listing(folder / "step-000004")
    got.pop("manifest.json"), want.pop("manifest.json")  # the settings differ
    assert got == want


class PlantedWeight(Engine):
    """Finite losses, but a weight that its update has spoiled."""

    def step(self, *args, **kwargs):
        stats = super().step(*args, **kwargs)
        if self.steps == 8:
            with torch.no_grad():
                self.netG.main[0].weight[0] = float("inf")
        return stats


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Engine", PlantedWeight)
    with pytest.raises(RunError, match=r"step 8: netG's main.0.weight is no longer finite"):
        run_small(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]


@pytest.mark.parametrize("failing", ["netG.safetensors", "state.pt", "manifest.json"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, failing):
    whole, out = tmp_path / "whole", tmp_path / "run"
    run_small(whole, dataclasses.replace(SMALL, steps=12))
    run_small(out, dataclasses.replace(SMALL, steps=8))
    write = checkpoint.write_synced

    def full(path, data):
        if path.name == failing:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_synced", full)
    with pytest.raises(RunError, match=r"No space left.*step-000008.*--resume"):
        run_small(out, dataclasses.replace(SMALL, steps=12), resume=True)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000004", "step-000008"]
    monkeypatch.setattr(checkpoint, "write_synced", write)
    run_small(out, dataclasses.replace(SMALL, steps=12), resume=True)
    assert kill_and_resume.differences(whole, out, 12) == []


def test_a_limit_on_file_size_from_the_command_line(tmp_path, array_file):
    """The kernel itself refuses the write, in a process of its own."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    common = ("train", "--data", array_file, "--batch-size", 8, "--ngf", 8, "--ndf", 8)
    every = ("--save-every", 2, "--sample-every", 2, "--log-every", 1, "--ema", 0)
    assert fastgan(*common, *every, "--steps", 4, "--out", whole).returncode == 0
    assert fastgan(*common, *every, "--steps", 2, "--out", out).returncode == 0
    size = (out / "checkpoints" / "step-000002" / "state.pt").stat().st_size

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))

    stopped = fastgan("train", "--out", out, "--resume", "--steps", 4, preexec_fn=limit)
    assert stopped.returncode == 1, stopped.stderr
    assert re.fullmatch(
        r"fastgan: cannot write .*File too large.*step-000002; .*\n", stopped.stderr
    )
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000002"]
    assert fastgan("train", "--out", out, "--resume", "--steps", 4).returncode == 0
    assert kill_and_resume.metrics(out) == kill_and_resume.metrics(whole)
    for name in ("netG", "netD"):
        weights = f"checkpoints/step-000004/{name}.safetensors"
        assert (out / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(tmp_path, array_file, number):
    out = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "fastgan", "train", "--data", str(array_file), "--out", str(out)),
        *("--steps", "100000", "--batch-size", "8", "--ngf", "2", "--ndf", "2"),
        *("--save-every", "100000", "--log-every", "1"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.stat().st_size < 500):
        pass
    process.send_signal(number)
    output, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    match = re.search(r"Stopped after step (\d+) of 100000; to go on: fastgan (.*)\n", output)
    assert match, output
    step = int(match[1])
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    again = fastgan(*match[2].split(), "--steps", step + 3)
    assert again.returncode == 0, again.stderr
    assert f"at step {step} of {step + 3}" in again.stdout


@pytest.mark.parametrize("moment", ["step", "write_png", "prune_checkpoints"])
def test_a_signal_at_any_point_of_an_iteration(tmp_path, monkeypatch, moment):
    """While stepping, and between the step and the end of its iteration."""
    owner = Engine if moment == "step" else loop
    original = getattr(owner, moment)

    def signalled(*args, **kwargs):
        result = original(*args, **kwargs)
        if signal.getsignal(signal.SIGTERM) is not before and (
            moment != "step" or args[0].steps == 4
        ):
            signal.raise_signal(signal.SIGTERM)
        return result

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(owner, moment, signalled)
    result = run_small(tmp_path / "run", dataclasses.replace(SMALL, steps=20))
    assert result.interrupted
    assert result.step == (5 if moment == "write_png" else 4)
    newest = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert newest.name == f"step-{result.step:06d}"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_kills_and_as_many_resumes(backend):
    if machine_reasons(backend):
        pytest.skip("no C++ kernels here")
    script = Path(kill_and_resume.__file__)
    command = [sys.executable, script, "--kills", "3", "--backend", backend]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal to the bit" in result.stdout


def test_replacing_a_file_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        replace_file(path, b"new")
    assert listing(tmp_path) == {"file": b"old"}


def test_a_configuration_survives_its_file(tmp_path):
    config = TrainConfig(data="a b", image_size=32, lr=3e-5, epochs=2, flip=True)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "c.yaml") == config
    (tmp_path / "d.yaml").write_text("lr: 2e-4\nema: 0\n")
    assert TrainConfig.from_yaml(tmp_path / "d.yaml") == TrainConfig(lr=2e-4, ema=0.0)
