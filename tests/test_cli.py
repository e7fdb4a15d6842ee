"""The command line as a user meets it; bad input has a file of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fastgan.benchmarks import example_dcgan as example
from PIL import Image
from safetensors.torch import load_file
from support.numerics import error, needs_cuda, needs_kernels, needs_triton
from support.runs import fastgan, run_small

from fastgan import Engine, cli
from fastgan.cli import train as train_command
from fastgan.data import sources
from fastgan.errors import InputError
from fastgan.machine import cache_folder
from fastgan.ops import cpp, cuda, triton, tuning
from fastgan.ops.backend import BACKENDS, unsupported_reasons
from fastgan.train import loop


@pytest.fixture
def run(tmp_path):
    run_small(tmp_path / "run")
    return tmp_path / "run"


def call(capsys, *args):
    code = cli.main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_importing_is_light_and_quiet():
    """Without triton, compiler or GPU; nothing heavy is loaded, nothing is warned of."""
    program = (
        "import sys; sys.modules['triton'] = None; import fastgan; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; "
        "assert set(fastgan.__all__) <= set(dir(fastgan)); "
        "[getattr(fastgan, n) for n in fastgan.__all__]"
    )
    for flags, code in ((["-W", "error"], program.split("; [")[0]), ([], program)):
        command = [sys.executable, *flags, "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""}, cwd="/")
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_wrong_flag_is_answered_without_torch():
    program = (
        "import sys; from fastgan.cli import main; code = main(['train', '--bach-size', '3']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 2
    assert "perhaps you meant --batch-size" in result.stderr


def test_help(capsys):
    code, out, _ = call(capsys, "-h")
    assert code == 0
    for name in ("train", "sample", "dcgan", "bench", "doctor"):
        assert name in out
        with pytest.raises(SystemExit) as stopped:
            cli.main([name, "-h"])
        assert stopped.value.code == 0
        assert f"usage: fastgan {name}" in capsys.readouterr().out


def test_version(capsys):
    code, out, _ = call(capsys, "--version")
    assert code == 0 and re.fullmatch(r"fastgan \d+\.\d+\.\d+\n", out)


def test_doctor(capsys, monkeypatch, without_cuda):
    code, out, err = call(capsys, "doctor")
    assert (code, err) == (0, "")
    assert re.search(r"reference +yes", out)
    assert re.search(r"triton +(yes|no: )", out)
    assert re.search(r"cuda +no: ", out)
    assert torch.__version__.split("+")[0] in out
    assert f"cache: {cache_folder()}\n" in out
    if not torch.cuda.is_available():
        assert re.search(r"captured +no: CUDA graphs are of GPUs", out)
        assert re.search(r"fp16 +no: needs a GPU", out) and re.search(r"bf16 +yes", out)
    monkeypatch.setenv("FASTGAN_BACKEND", "bogus")
    code, out, err = call(capsys, "doctor")
    assert (code, err) == (0, "") and re.search(r"auto +no: .*'bogus'", out)
    monkeypatch.setenv("FASTGAN_BACKEND", "reference")
    assert "reference, by FASTGAN_BACKEND" in call(capsys, "doctor")[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_doctor_without_a_gpu(monkeypatch):
    """And without triton's interpreter, which the tests have asked for."""
    monkeypatch.delenv("TRITON_INTERPRET")
    result = fastgan("doctor")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(
        r"triton +no: (triton is not installed|torch sees no GPU; TRITON)", result.stdout
    )
    assert "GPU: none that torch can use" in result.stdout
    assert re.search(r"augment +yes +no +no +no\n", result.stdout)


@needs_cuda
def test_doctor_on_the_cuda_kernels(capsys):
    code, out, _ = call(capsys, "doctor")
    assert code == 0 and re.search(r"cuda +yes", out)
    where = "compiled for the CPU" if cuda.on_host() else "in .*_cuda"
    assert re.search(rf"CUDA kernels: {where}", out)


@needs_triton
def test_doctor_on_the_triton_kernels(capsys):
    code, out, _ = call(capsys, "doctor")
    assert code == 0 and re.search(r"triton +yes", out)
    where = "interpreted on the CPU" if triton.interpreted() else "compiled when first used"
    assert f"Triton kernels: {where}" in out


@needs_kernels
def test_doctor_on_the_kernels(capsys):
    code, out, _ = call(capsys, "doctor")
    assert code == 0 and re.search(r"cpp +yes", out)
    table = re.search(r"^ops: +(.*\n)((?:  \w+ .*\n)+)", out, re.MULTILINE)
    assert table[1].split() == list(BACKENDS)
    cells = {op: cells for op, *cells in map(str.split, table[2].splitlines())}
    assert set(cells) == {"conv", "bn_act", "gan_loss", "augment"}
    for op, row in cells.items():
        assert row == ["no" if unsupported_reasons(op, name) else "yes" for name in BACKENDS]
    assert "cpp: augment has no C++ kernel" in out
    assert f"C++ kernels: for {cpp.kernels().isa()}" in out
    path = tuning.tuning_file()
    assert f"measured choices: 0 in {path}" in out
    path.write_text('{"a": {"torch": 1.0}, "b": {"torch": 2.0}}')
    assert f"measured choices: 2 in {path}" in call(capsys, "doctor")[1]


@pytest.mark.parametrize(
    ("reason", "said"),
    [(["no compiler"], "no: no compiler"), (InputError("FASTGAN_CPU_ISA='x'"), "no: FASTGAN_CPU")],
)
def test_doctor_without_kernels(capsys, monkeypatch, without_cuda, reason, said):
    def missing():
        if isinstance(reason, Exception):
            raise reason
        return reason

    monkeypatch.setattr(cpp, "missing_reasons", missing)
    code, out, err = call(capsys, "doctor")
    assert (code, err) == (0, "") and said in out
    assert re.search(r"conv +yes +no +(yes|no) +no\n", out) and "C++ kernels: for" not in out


def test_train_from_the_command_line_and_again(tmp_path, array_file, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ("--data", array_file, "--batch-size", 8, "--ngf", 2, "--ndf", 2)
    code, out, _ = call(capsys, "train", *args, "--steps", 3)
    assert code == 0
    assert "16x16x1 on 40 images" in out and "Done: step 3" in out
    assert Path("runs/small/checkpoints/step-000003").is_dir()
    code, out, _ = call(capsys, "train", "--data", array_file, "--resume", "--steps", 5)
    assert code == 0 and "at step 3 of 5" in out
    code, out, _ = call(capsys, "train", "--data", array_file, "--resume", "--epochs", 2)
    assert code == 0 and "at step 5 of 10" in out
    code, _, err = call(capsys, "train", "--data", array_file, "--steps", 3)
    assert code == 2 and "--resume" in err


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the two differ by TF32")
def test_the_triton_kernels_train_from_the_command_line(tmp_path, array_file, capsys, monkeypatch):
    args = ("--data", array_file, "--batch-size", 4, "--ngf", 2, "--ndf", 2, "--nz", 4)
    args += ("--ema", 0, "--steps", 2, "--log-every", 1)
    monkeypatch.setattr(loop, "GRID", 4)
    rows, weights = {}, {}
    for backend in ("reference", "triton"):
        out = tmp_path / backend
        monkeypatch.setenv("FASTGAN_BACKEND", backend)
        code, _, err = call(capsys, "train", *args, "--out", out)
        assert (code, err) == (0, "")
        lines = (out / "metrics.jsonl").read_text().splitlines()
        rows[backend] = [json.loads(line) for line in lines]
        weights[backend] = {
            f"{name} {key}": value
            for name in ("netG", "netD")
            for key, value in load_file(
                out / "checkpoints" / "step-000002" / f"{name}.safetensors"
            ).items()
        }
    for want, got in zip(rows["reference"], rows["triton"], strict=True):
        for name in ("loss_d", "loss_g", "d_real", "d_fake", "d_fake_g"):
            assert got[name] == pytest.approx(want[name], rel=1e-4), name
    assert weights["triton"].keys() == weights["reference"].keys()
    for name, want in weights["reference"].items():
        assert error(weights["triton"][name], want.double()) < 1e-5, name


@pytest.mark.parametrize(
    ("shape", "want"),
    [((3, 28, 28), 32), ((3, 16, 16), 16), ((3, 9, 9, 3), 16), ((3, 64, 64), 64), ((3, 20, 30), 64),
     ((3, 300, 300), 64)],
)  # fmt: skip
def test_the_size_that_is_taken_where_none_is_given(shape, want):
    assert train_command._natural_size(sources.open_source(np.zeros(shape, np.uint8))) == want


def test_a_configuration_file_and_flags_before_it(tmp_path, array_file, capsys):
    (tmp_path / "c.yaml").write_text(
        f"data: {array_file}\nbatch_size: 8\nngf: 2\nndf: 2\nsteps: 9\n"
    )
    code, out, _ = call(
        capsys, "train", "--config", tmp_path / "c.yaml", "--steps", 2, "--out", tmp_path / "run"
    )
    assert code == 0 and "2 steps of 8" in out


def test_a_length_given_comes_before_that_of_the_file(tmp_path, array_file, capsys):
    (tmp_path / "c.yaml").write_text(
        f"data: {array_file}\nbatch_size: 8\nngf: 2\nndf: 2\nsteps: 9\n"
    )
    args = ("train", "--config", tmp_path / "c.yaml", "--out", tmp_path / "run")
    code, out, _ = call(capsys, *args, "--epochs", 1)
    assert code == 0 and "5 steps of 8" in out
    code, _, err = call(capsys, *args, "--epochs", 2, "--steps", 3, "--force")
    assert code == 2 and "give one of the two" in err


def test_resuming_from_another_folder(tmp_path, array_file, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ("--data", array_file.name, "--batch-size", 8, "--ngf", 2, "--ndf", 2)
    assert call(capsys, "train", *args, "--steps", 1, "--out", "run")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = call(capsys, "train", "--out", "../run", "--resume", "--steps", 2)
    assert code == 0 and "at step 1 of 2" in out, err


def test_names_that_are_not_unicode(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / os.fsdecode(b"dir\xe9")
    folder.rename(source)
    (source / os.fsdecode(b"bad\xe9.png")).write_bytes(b"no image")
    args = ("--image-size", 16, "--batch-size", 4, "--ngf", 2, "--ndf", 2, "--max-bad", 0.1)
    code, _, err = call(capsys, "train", "--data", source, *args, "--steps", 1, "--out", "run")
    assert code == 0, err
    assert "bad" in Path("run/skipped.txt").read_text()
    code, out, err = call(capsys, "train", "--out", "run", "--resume", "--steps", 2)
    assert code == 0 and "at step 1 of 2" in out, err


def test_too_little_memory_is_one_line(tmp_path, array_file, capsys):
    code, _, err = call(
        capsys,
        "train",
        "--data",
        array_file,
        "--batch-size",
        8,
        "--ngf",
        10**8,
        "--out",
        tmp_path / "run",
    )
    assert code == 1 and err.startswith("fastgan: out of memory") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_dry_run_that_is_stopped_says_so(tmp_path, array_file, capsys, monkeypatch):
    step = Engine.step

    def stopped(self, *args):
        signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(Engine, "step", stopped)
    code, out, _ = call(
        capsys, "train", "--data", array_file, "--batch-size", 8, "--ngf", 2, "--dry-run"
    )
    assert code == 130 and "nothing was kept" in out


def test_a_dry_run_writes_nothing(tmp_path, array_file, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = call(
        capsys, "train", "--data", array_file, "--batch-size", 8, "--ngf", 2, "--dry-run"
    )
    assert code == 0 and "2000 steps would take" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_images_are_named_and_the_run_goes_on(tmp_path, folder, capsys):
    (folder / "cats" / "04.png").write_bytes(b"no image")
    out_folder = tmp_path / "run"
    code, out, _ = call(
        capsys, "train", "--data", folder, "--image-size", 16, "--batch-size", 4, "--ngf", 2,
        "--ndf", 2, "--steps", 1, "--max-bad", 0.1, "--out", out_folder,
    )  # fmt: skip
    assert code == 0
    assert "Skipped 1 bad images; the first, cats/04.png" in out
    assert "cats/04.png: " in (out_folder / "skipped.txt").read_text()
    assert "cats/04.png" in (out_folder / "report.html").read_text()


def test_sample_grid_each_and_interpolation(run, tmp_path, capsys):
    grid = tmp_path / "grid.png"
    assert call(capsys, "sample", run, "-n", 9, "-o", grid, "--each", tmp_path / "each")[0] == 0
    assert Image.open(grid).size == (3 * 18 + 2, 3 * 18 + 2)
    files = sorted((tmp_path / "each").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(9)]
    first = np.asarray(Image.open(files[0]))
    np.testing.assert_array_equal(first, np.asarray(Image.open(grid))[2:18, 2:18, 0])
    data = grid.read_bytes()
    call(capsys, "sample", run, "-n", 9, "-o", grid)
    assert grid.read_bytes() == data
    call(capsys, "sample", run, "-n", 9, "-o", grid, "--seed", 1)
    assert grid.read_bytes() != data
    call(capsys, "sample", run, "-n", 20, "-o", grid, "--interpolate")
    assert Image.open(grid).size == (8 * 18 + 2, 3 * 18 + 2)


def test_sample_takes_a_run_a_checkpoint_or_the_examples_weights(run, tmp_path, capsys):
    newest = run / "checkpoints" / "step-000010"
    for source in (run, newest, newest / "ema.safetensors"):
        code, _, err = call(capsys, "sample", source, "-o", tmp_path / f"{source.stem}.png")
        assert (code, err) == (0, "")
    grids = {(tmp_path / f"{n}.png").read_bytes() for n in ("run", "step-000010", "ema")}
    assert len(grids) == 1
    netG = example.Generator(10, 4, 3, 64)
    torch.save(netG.state_dict(), tmp_path / "netG_epoch_24.pth")
    code, _, _ = call(capsys, "sample", tmp_path / "netG_epoch_24.pth", "-o", tmp_path / "x.png")
    assert code == 0
    assert Image.open(tmp_path / "x.png").size == (8 * 66 + 2, 8 * 66 + 2)


def test_sampling_passes_over_a_damaged_checkpoint(run, tmp_path, capsys):
    (run / "checkpoints" / "step-000010" / "ema.safetensors").write_bytes(b"")
    assert call(capsys, "sample", run, "-o", tmp_path / "g.png")[0] == 0


def test_dcgan_is_the_example(tmp_path, folder, capsys):
    """Its flags, its log line, its files; and its checkpoints load into its own networks."""
    out = tmp_path / "out"
    code, printed, err = call(
        capsys, "dcgan", "--dataset", "folder", "--dataroot", folder, "--workers", 2,
        "--batchSize", 8, "--imageSize", 32, "--nz", 5, "--ngf", 3, "--ndf", 4, "--niter", 2,
        "--lr", 0.0002, "--beta1", 0.5, "--ngpu", 1, "--outf", out, "--manualSeed", 3, "--accel",
    )  # fmt: skip
    assert (code, err) == (0, "")
    number = r"\d+\.\d{4}"
    pattern = (
        rf"\[(\d)/2\]\[(\d)/2\] Loss_D: {number} Loss_G: {number} D\(x\): {number} "
        rf"D\(G\(z\)\): {number} / {number}"
    )
    assert re.findall(pattern, printed) == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert "Random Seed:  3" in printed and "Using device:" in printed
    assert {p.name for p in out.iterdir()} == {
        *("real_samples.png", "fake_samples_epoch_000.png", "fake_samples_epoch_001.png"),
        *("netG_epoch_0.pth", "netG_epoch_1.pth", "netD_epoch_0.pth", "netD_epoch_1.pth"),
    }
    netG, netD = example.Generator(5, 3, 3, 32), example.Discriminator(4, 3, 32)
    netG.load_state_dict(torch.load(out / "netG_epoch_1.pth", weights_only=True))
    netD.load_state_dict(torch.load(out / "netD_epoch_1.pth", weights_only=True))
    code, printed, _ = call(
        capsys, "dcgan", "--dataset", "folder", "--dataroot", folder, "--imageSize", 32, "--nz", 5,
        "--ngf", 3, "--ndf", 4, "--netG", out / "netG_epoch_1.pth", "--netD",
        out / "netD_epoch_1.pth", "--dry-run", "--outf", tmp_path / "more", "--batchSize", 4,
    )  # fmt: skip
    assert code == 0
    assert len(re.findall(r"Loss_D", printed)) == 1


def test_dcgan_starts_from_the_examples_weights(tmp_path, monkeypatch, capsys, folder):
    """The same --manualSeed gives the networks that the example would start with."""
    seen = []
    monkeypatch.setattr("fastgan.engine.engine.Engine.step", lambda self, real: seen.append(self))
    with pytest.raises(AttributeError):
        cli.main(
            ["dcgan", "--dataset", "folder", "--dataroot", str(folder), "--imageSize", "32",
             "--ngf", "4", "--ndf", "4", "--manualSeed", "11", "--outf", str(tmp_path / "o")]
        )  # fmt: skip
    torch.manual_seed(11)
    netG = example.Generator(100, 4, 3, 32).apply(example.weights_init)
    netD = example.Discriminator(4, 3, 32).apply(example.weights_init)
    for mine, theirs in ((seen[0].netG, netG), (seen[0].netD, netD)):
        for key, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value)


def test_dcgan_on_fake_data(tmp_path, capsys):
    code, printed, err = call(
        capsys, "dcgan", "--dataset", "fake", "--imageSize", 16, "--ngf", 2, "--ndf", 2,
        "--dry-run", "--outf", tmp_path,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "[0/1][0/16] Loss_D" in printed


def test_a_closed_pipe_is_no_traceback(tmp_path):
    command = f"{sys.executable} -m fastgan doctor | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.stderr == ""


def test_ctrl_c_before_training_is_one_line(monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "_open_path", stop)
    code, _, err = call(capsys, "train", "--dry-run")
    assert (code, err) == (130, "fastgan: interrupted\n")


def test_the_embedded_digits_are_the_documented_ones():
    path = Path(sources.__file__).with_name("digits.npz")
    assert path.stat().st_size < 2.5e6
    with np.load(path) as archive:
        assert archive["images"].shape == (10_000, 28, 28)
        assert zlib.crc32(archive["images"].tobytes()) == 1262408013


def test_the_command_is_installed():
    result = fastgan("--version")
    assert result.returncode == 0
