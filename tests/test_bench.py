"""``fastgan bench``: what it checks, what it writes, how it stops and goes on. No times here."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from fastgan.benchmarks import bench_engine, machine, plan, report
from fastgan.benchmarks import example_dcgan as example
from fastgan.benchmarks.bench_engine import Effort, Variant, engine_trainer, measure_cell
from fastgan.benchmarks.plan import Cell
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from fastgan import Engine, cli

CPU = torch.device("cpu")
TINY = Cell(16, 1, 8, 4, 4)
TINY_FLAGS = ("--image-size", 16, "--nc", 1, "--batch-size", 8, "--ngf", 4, "--ndf", 4)
BRIEF = Effort(seconds=0.0, rounds=2, turn=0.0)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(bench_engine, "Effort", lambda seconds, rounds: BRIEF)
    rates = {"sgemm_gflop_s": 100.0, "sgemm_by_size": {}, "copy_gb_s": 10.0, "load": 0.0}
    monkeypatch.setattr(machine, "measure", lambda device: rates)


def bench(capsys, out, *args):
    code = cli.main(["bench", "--out", str(out), *map(str, args)])
    return code, *capsys.readouterr()


def measured(variant):
    """The entry of ``variant``, measured beside the example, on networks wide enough to learn."""
    first = bench_engine.select_variants(["example"])
    cell = Cell(16, 1, 8, 32, 32)
    return measure_cell(cell, [*first, variant], BRIEF, device=CPU)["variants"][1]


@pytest.mark.parametrize(
    "cell", [Cell(64, 3, 4, 8, 4), Cell(28, 1, 2, 3, 5), Cell(96, 2, 1, 2, 3)], ids=str
)
def test_the_flop_count_is_that_of_the_examples_step(cell):
    netG = example.Generator(plan.NZ, cell.ngf, cell.nc, cell.image_size)
    netD = example.Discriminator(cell.ndf, cell.nc, cell.image_size)
    trainer = example.ExampleTrainer(netG, netD)
    real = torch.rand(cell.batch_size, cell.nc, cell.image_size, cell.image_size)
    with FlopCounterMode(display=False) as counter:
        trainer.step(real, torch.randn(cell.batch_size, plan.NZ, 1, 1))
    assert cell.step_gflop() == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-12)


def test_a_full_sized_step_is_what_it_is_known_to_be():
    assert Cell(64, 3, 1).step_gflop() == pytest.approx(12 * 0.21, rel=0.02)


def test_the_grids():
    assert plan.default_cells(64, 64) == [Cell(64, 3, 64), Cell(28, 1, 128)]
    assert len(set(plan.full_grid(64, 64))) == 24


@pytest.mark.parametrize("cell", [TINY, Cell(32, 3, 20, 6, 4), Cell(28, 1, 3, 4, 8)], ids=str)
def test_what_this_machine_has_passes_the_check(cell):
    variants = bench_engine.select_variants(compiled=False)
    entry = measure_cell(cell, variants, BRIEF, device=CPU)
    assert {v["name"]: v.get("reason") for v in entry["variants"]} == {
        variant.name: None for variant in variants
    }
    # The yardstick is that of float32, not of a mistake.
    assert entry["rounding"] == pytest.approx(bench_engine.LEAST_ROUNDING, rel=5)


def _engine_with(**arguments):
    def build(netG, netD):
        trainer = engine_trainer(netG, netD, backend="reference")
        engine = Engine(trainer.netG, trainer.netD, **arguments)
        step = lambda real, z: list(engine.step(real, noise=z).to_dict().values())  # noqa: E731
        return bench_engine.Trainer(step, engine.netG, engine.netD, engine.opt_g, engine.opt_d)

    return build


def _changed(change):
    def build(netG, netD):
        change(netG, netD)
        return bench_engine.example_trainer(netG, netD)

    return build


def _hooked(hook):
    """The example with ``hook`` on the gradient of a batch norm's bias in D."""

    def change(netG, netD):
        netD.main[3].bias.register_hook(hook)

    return _changed(change)


def _half_precision(netG, netD):
    def rounded(module, inputs, output):
        return output.bfloat16().float()

    netD.main[2].register_forward_hook(rounded)


def _one_batch_statistics(netG, netD):
    netD.main[3].eval()


def _momentum(netG, netD):
    netG.main[1].momentum = 0.11


def _reporting(change):
    """The example, the numbers of each step put through ``change``."""

    def build(netG, netD):
        trainer = bench_engine.example_trainer(netG, netD)
        return trainer._replace(step=lambda real, z: change(*trainer.step(real, z)))

    return build


FAULTS = {
    "learning rate": _engine_with(lr=3e-4),
    "betas": _engine_with(betas=(0.9, 0.999)),
    "the learning rate of D": _engine_with(lr_d=4e-4),
    "a gradient without a term": _hooked(lambda grad: grad * 0.9),
    "not a number": _reporting(lambda *numbers: (float("nan"), *numbers[1:])),
    "half precision": _changed(_half_precision),
    "no batch statistics": _changed(_one_batch_statistics),
    "running statistics": _changed(_momentum),
    "scores of before the update": _reporting(lambda *numbers: (*numbers[:4], numbers[3])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_variant_gets_no_figure(fault):
    entry = measured(Variant(fault, FAULTS[fault]))
    assert entry["status"] == "differs" and "allowed" in entry["reason"]
    assert "images_per_second" not in entry
    json.dumps(entry, allow_nan=False)


def test_the_engine_as_it_is_passes_where_its_faults_do_not():
    assert measured(Variant("right", _engine_with()))["status"] == "ok"


def test_the_check_leaves_the_learning_rates():
    (variant,) = bench_engine.select_variants(["fastgan reference"])[1:]
    trainers = []

    def build(*nets):
        trainers.append(variant.build(*nets))
        return trainers[0]

    assert measured(Variant("kept", build))["status"] == "ok"
    for optimizer in (trainers[0].opt_g, trainers[0].opt_d):
        assert float(optimizer.param_groups[0]["lr"]) == 2e-4


def test_a_variant_that_cannot_run_says_why(capsys):
    def build(netG, netD):
        raise RuntimeError("\nno compiler\nand much more")

    entry = measured(Variant("compile", build, (RuntimeError,)))
    assert entry == {"name": "compile", "status": "cannot run", "reason": "no compiler"}
    with pytest.raises(RuntimeError):
        measured(Variant("fastgan cpp", build))


def test_a_wrong_variant_fails_the_command(tmp_path, capsys, monkeypatch):
    wrong = FAULTS["learning rate"]
    monkeypatch.setattr(bench_engine, "engine_trainer", lambda *nets, backend: wrong(*nets))
    code, out, _ = bench(capsys, tmp_path, *TINY_FLAGS, "--variants", "fastgan auto")
    assert code == 1
    assert "no figure: differs from the example: weight updates" in " ".join(out.split())
    entry = json.loads((tmp_path / "bench.json").read_text())["cells"][0]["variants"][1]
    assert entry["status"] == "differs" and "ratio" not in entry


def test_the_file_the_table_and_the_chart(tmp_path, capsys):
    code, out, err = bench(capsys, tmp_path / "new" / "bench", *TINY_FLAGS, "--no-compile")
    assert (code, err) == (0, "")
    folder = tmp_path / "new" / "bench"
    assert {p.name for p in folder.iterdir()} == {"bench.json", "bench.png"}
    record = json.loads((folder / "bench.json").read_text())
    assert record["machine"] == machine.describe(CPU)
    assert record["flop_count"] == plan.COUNT and record["flop_count"] in out
    assert record["check"] == bench_engine.CHECK and record["check"] in out
    (cell,) = record["cells"]
    assert cell["rounds"] == 2 and cell["gflop_per_step"] == TINY.step_gflop()
    names = [v["name"] for v in cell["variants"]]
    assert names[:3] == ["example", "example channels_last", "fastgan reference"]
    assert names[-1] == "fastgan auto" and not {"compile", "fastgan triton"} & set(names)
    for variant in cell["variants"]:
        speed = variant["images_per_second"]
        assert 0 < speed["p10"] <= speed["median"] <= speed["p90"]
        assert len(variant["seconds_per_step"]) == 2
        per_image = cell["gflop_per_step"] / 8
        assert variant["gflop_per_second"] == pytest.approx(speed["median"] * per_image)
        assert variant["ratio_to"] in names[:2]
        assert f"{speed['median']:.1f}   [{speed['p10']:.1f}, {speed['p90']:.1f}]" in out
    for line in report.machine_lines(record):
        assert line in out


def test_ratios_are_of_rounds_and_to_the_best_of_the_others():
    seconds = {
        "example": [4.0, 2.0, 4.0],
        "compile": [2.0, 1.0, 2.0],
        "fastgan auto": [1.0, 0.5, 4.0],
    }
    figures = bench_engine._figures("fastgan auto", seconds, TINY)
    assert (figures["ratio"], figures["ratio_to"]) == (2.0, "compile")
    assert figures["images_per_second"]["median"] == 8.0
    figures = bench_engine._figures("compile", seconds, TINY)
    assert (figures["ratio"], figures["ratio_to"]) == (2.0, "example")


def test_rounds_fill_the_time_there_is():
    effort = Effort(seconds=10.0)
    assert bench_engine._go_on(2, 100.0, effort)  # there are three at least
    assert bench_engine._go_on(4, 8.0, effort) and not bench_engine._go_on(5, 10.0, effort)
    assert not bench_engine._go_on(2, 0.0, Effort(10.0, rounds=2))


def _record(cells):
    variants = [
        {
            "name": name,
            "status": "ok",
            "images_per_second": {"median": 100.0, "p10": 90.0, "p90": 120.0},
            "ratio": 1.5,
            "ratio_to": "example",
            "gflop_per_second": 50.0,
        }
        for name in ("example", "compile", "fastgan cpp")
    ]
    variants[1] = {"name": "compile", "status": "cannot run", "reason": "no compiler"}
    sizes = {"image_size": 64, "nc": 3, "batch_size": 64, "ngf": 64, "ndf": 64}
    cell = {**sizes, "gflop_per_step": 160.0, "rounds": 3, "variants": variants}
    rates = {"sgemm_gflop_s": 100.0, "copy_gb_s": 10.0, "load": None}
    return {"machine": machine.describe(CPU), "measured": rates, "cells": [cell] * cells}


def test_the_table():
    lines = report.table(_record(1)["cells"][0], 100.0).splitlines()
    assert lines[0] == "64x64x3, batch 64: 160 GFLOP a step, 3 rounds"
    assert lines[3].split(maxsplit=1) == ["compile", "no figure: no compiler"]
    cells = ["fastgan", "cpp", "100.0", "[90.0,", "120.0]", "50.0", "0.50", "1.50x", "example"]
    assert lines[4].split() == cells


@pytest.mark.parametrize("cells", [1, 2, 5])
def test_the_chart_has_a_panel_for_each_cell(cells, monkeypatch):
    drawn = []
    panel = report._panel
    monkeypatch.setattr(report, "_panel", lambda axes, cell: drawn.append(panel(axes, cell)))
    picture = np.asarray(Image.open(io.BytesIO(report.chart(_record(cells)))).convert("RGB"))
    assert len(drawn) == cells
    fastgan, other = [(picture == c).all(-1).mean() for c in ((0x1F, 0x6F, 0xEB), (182, 190, 200))]
    assert fastgan > 0.01 and other == pytest.approx(fastgan, rel=0.05)


def test_without_matplotlib_the_figures_are_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, _ = bench(capsys, tmp_path, *TINY_FLAGS, "--variants", "example")
    assert code == 0 and out.splitlines()[-1].endswith("pip install 'fastgan[bench]'")
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]


@pytest.fixture
def two_cells(monkeypatch):
    """A default of two tiny cells; returns those that are measured."""
    cells = [TINY, Cell(16, 3, 8, 4, 4)]
    monkeypatch.setattr("fastgan.cli.bench.default_cells", lambda ngf, ndf: cells)
    seen = []

    def counted(cell, *args, **kwargs):
        seen.append(cell)
        return measure_cell(cell, *args, **kwargs)

    monkeypatch.setattr(bench_engine, "measure_cell", counted)
    return seen


def test_ctrl_c_keeps_finished_cells_and_resume_goes_on(tmp_path, capsys, monkeypatch, two_cells):
    def stopped(cell, *args, **kwargs):
        if cell != TINY:
            raise KeyboardInterrupt
        return measure_cell(cell, *args, **kwargs)

    args = ("--variants", "example channels_last")
    with monkeypatch.context() as patch:
        patch.setattr(bench_engine, "measure_cell", stopped)
        code, out, _ = bench(capsys, tmp_path, *args)
    assert code == 130 and "Stopped after 1 of 2 cells" in out and "--resume" in out
    first = json.loads((tmp_path / "bench.json").read_text())["cells"]
    assert [c["nc"] for c in first] == [1]
    assert (tmp_path / "bench.png").is_file()

    code, out, _ = bench(capsys, tmp_path, *args, "--resume")
    assert code == 0 and [c.nc for c in two_cells] == [3]
    cells = json.loads((tmp_path / "bench.json").read_text())["cells"]
    assert cells[0] == first[0] and [c["nc"] for c in cells] == [1, 3]
    assert "16x16x1" in out and "16x16x3" in out

    code, _, err = bench(capsys, tmp_path, *args, "--resume", "--seed", 1)
    assert code == 2 and "measured with seed 0, now it is 1" in err
    code, _, err = bench(capsys, tmp_path, "--no-compile", "--resume")
    assert code == 2 and "measured with variants" in err
    code, _, _ = bench(capsys, tmp_path, *args, "--seed", 1)
    assert code == 0 and [c.nc for c in two_cells] == [3, 1, 3]


def test_ctrl_c_in_the_first_cell_leaves_nothing(tmp_path, capsys, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_engine, "measure_cell", stopped)
    code, out, _ = bench(capsys, tmp_path, *TINY_FLAGS, "--variants", "example")
    assert code == 130 and out.endswith("Stopped after 0 of 1 cells\n")
    assert not any(tmp_path.iterdir())


def test_what_is_not_its_own_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "bench.json").write_text('{"mine": 1}')
    (tmp_path / "file").touch()
    for name, said in (("notes", "other files"), ("file", "is a file")):
        code, _, err = bench(capsys, tmp_path / name, *TINY_FLAGS)
        assert code == 2 and said in err and err.count("\n") == 1
    assert (tmp_path / "notes" / "bench.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--variants", "fastgan cpu"), "'fastgan cpu' is unknown; choose from 'example'"),
        (("--variants", "fastgan cuda"), "'fastgan cuda' cannot run here: "),
        (("--variants", "compile", "--no-compile"), "give one of them"),
        (("--full", "--nc", 1), "--full and --nc"),
        (("--full", "--quick"), "--full and --quick"),
        (("--image-size", 30), "the nearest are 28 and 32"),
        (("--batch-size", 0), "--batch-size 0 must be at least 1"),
        (("--ndf", 0), "--ndf 0 must be at least 1"),
        (("--rounds", 0), "--rounds 0 must be at least 1"),
        (("--threads", -1), "--threads -1 must be at least 1"),
        (("--seed", -1), "--seed -1 must be"),
        (("--device", "abacus"), "abacus"),
        (("--resume",), "there is no bench.json"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, args, said):
    code, out, err = bench(capsys, tmp_path / "out", *args)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_variant(tmp_path, capsys):
    args = (*TINY_FLAGS, "--variants", "compile channels_last")
    assert bench(capsys, tmp_path, *args)[0] == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [v.get("reason") for v in record["cells"][0]["variants"]] == [None, None]


def test_the_rates_of_the_machine(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(machine, "_COPY_BYTES", 4 * 10**5)
    monkeypatch.setattr(machine, "_AT_LEAST_S", 0.0)
    rates = machine.measure(CPU)
    assert rates["sgemm_gflop_s"] == max(rates["sgemm_by_size"].values()) > 0
    assert rates["copy_gb_s"] > 0
