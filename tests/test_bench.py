"""``fastgan bench``: what it checks, what it writes, how it stops and goes on; the benchmarks of
single ops and the profile of a step: that there is a figure for what is right and for nothing else.
No times here.
"""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastgan.benchmarks import (
    bench_block,
    bench_bn_act,
    bench_conv,
    bench_engine,
    bench_gan_loss,
    machine,
    plan,
    profile_step,
    report,
    single_op,
)
from fastgan.benchmarks import example_dcgan as example
from fastgan.benchmarks.bench_engine import Effort, Variant, engine_trainer, measure_cell
from fastgan.benchmarks.plan import Cell
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from fastgan import Engine, cli
from fastgan.errors import NotBuiltError, RunError

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


def _wrong_momentum(netG, netD):
    netG.main[1].momentum = 0.2


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


@pytest.fixture
def one_gpu(monkeypatch):
    """A machine whose GPU has what the Triton kernels want."""
    monkeypatch.setattr(bench_engine, "machine_reasons", lambda name: ["no"] * (name == "cuda"))


def test_the_variants_of_a_gpu_are_offered_there_alone(one_gpu):
    on_gpu = [v.name for v in bench_engine.select_variants(device=torch.device("cuda"))]
    assert on_gpu == [
        *("example", "example channels_last", "example amp"),
        *("compile channels_last", "compile reduce-overhead"),
        *("fastgan reference", "fastgan triton", "fastgan auto"),
        *("fastgan uncaptured", "fastgan bf16"),
    ]
    on_cpu = [v.name for v in bench_engine.select_variants(device=CPU)]
    assert on_cpu == [v.name for v in bench_engine.select_variants()]
    assert on_cpu == [
        *("example", "example channels_last", "compile", "compile channels_last"),
        *("fastgan reference", "fastgan cpp", "fastgan auto"),
    ]
    with pytest.raises(NotBuiltError, match="for cpu, the device is cuda: the C"):
        bench_engine.select_variants(["fastgan cpp"], device=torch.device("cuda"))


def test_autocast_passes_its_own_limits_and_not_those_of_float32():
    def build(*nets):
        return bench_engine.example_trainer(*nets, channels_last=True, amp=True)

    entry = measured(Variant("amp", build, limits=bench_engine.AMP_LIMITS))
    assert (entry["status"], entry["own_limits"]) == ("ok", True)
    assert entry["limits"] == bench_engine.AMP_LIMITS
    least = bench_engine.LIMIT * bench_engine.LEAST_ROUNDING["numbers"]
    assert entry["deviation"]["numbers"] > least


@pytest.mark.parametrize(
    "fault", ["learning rate", "a gradient without terms", "not a number", "running statistics"]
)
def test_what_autocast_is_allowed_covers_no_fault(fault):
    faults = {**FAULTS, "a gradient without terms": _hooked(lambda grad: grad * 0.5)}
    faults["running statistics"] = _changed(_wrong_momentum)
    entry = measured(Variant(fault, faults[fault], limits=bench_engine.AMP_LIMITS))
    assert entry["status"] == "differs"


def test_a_variant_that_cannot_run_says_why(capsys):
    def build(netG, netD):
        raise RuntimeError("\nno compiler\nand much more")

    entry = measured(Variant("compile", build, (RuntimeError,)))
    assert entry == {"name": "compile", "status": "cannot run", "reason": "no compiler"}
    with pytest.raises(RuntimeError):
        measured(Variant("fastgan cpp", build))


def test_a_wrong_variant_fails_the_command(tmp_path, capsys, monkeypatch):
    wrong = FAULTS["learning rate"]
    monkeypatch.setattr(bench_engine, "engine_trainer", lambda *nets, **_: wrong(*nets))
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


def test_the_table_says_where_more_was_allowed():
    record = _record(1)
    record["cells"][0]["variants"][2] |= {"own_limits": True, "limits": {"numbers": 0.02}}
    last = report.table(record["cells"][0], 100.0).splitlines()[-1]
    assert last.startswith("  fastgan cpp was allowed to differ") and "0.02 (numbers)" in last


def test_a_gpu_says_which_float32_it_had(monkeypatch, fp32_precision):
    fp32_precision("tf32")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    record = _record(1)
    record["machine"] = machine.describe(torch.device("cuda"))
    second = report.machine_lines(record)[1]
    assert second.startswith("float32 (convolutions in TF32, matrix products in float32; for every")
    assert "TF32" not in report.machine_lines(_record(1))[1]


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
        (("--variants", "fastgan triton"), "the device is cpu: the Triton kernels run on a GPU"),
        (("--variants", "example amp"), "the device is cpu: autocast to bfloat16 is for tensor"),
        (("--variants", "compile reduce-overhead"), "the device is cpu: what it adds are CUDA"),
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


INNERMOST = {"side": 1, "stride": 1, "padding": 0}
TINY_CONVS = [{"side": 3}, {"side": 4, "ch": 3}, INNERMOST]
TINY_CASES = {
    bench_bn_act: bench_bn_act.Case(4, 8, 6, 2, "relu"),
    bench_gan_loss: bench_gan_loss.Case((8,), (1.0, 0.0)),
    bench_block: bench_block.Case("D", 4, 16, 8, 6),
}


def tiny_conv(direction, sizes):
    return bench_conv.Case(direction, **{"n": 2, "cl": 5, "ch": 8, **sizes})


@pytest.mark.parametrize("direction", bench_conv.DIRECTIONS)
@pytest.mark.parametrize("sizes", TINY_CONVS, ids=str)
def test_every_way_of_a_convolution_gets_its_figures(sizes, direction):
    case = tiny_conv(direction, sizes)
    entry = bench_conv.measure(case, rounds=1)
    assert tuple(entry["ways"]) == bench_conv.ways(case)
    for way, figures in entry["ways"].items():
        assert figures["ms"] is not None, f"{way} is wrong by {figures['error']:.1e}"
    assert not entry["candidates"] or entry["chosen"] in entry["candidates"]
    assert "x oneDNN" in entry["why"] or not entry["candidates"]
    line = bench_conv.row(entry, bench_conv.speed_cell)
    assert line.count("|") == bench_conv.header().splitlines()[0].count("|")
    assert line.count(" ms, ") == len(entry["ways"])
    json.dumps(entry, allow_nan=False)


def test_the_convolutions_are_those_of_the_networks():
    with FlopCounterMode(display=False) as counter:
        for n, size, nc in ((1, 64, 3), (1, 28, 1)):
            example.Generator(plan.NZ, 64, nc, size)(torch.randn(n, plan.NZ, 1, 1))
    cases = [case for case in bench_conv.CASES if case.direction == "dgrad" and case.cl > 1]
    of_64 = sum(case.gflop() / 64 for case in cases if case.n == 64)
    of_28 = sum(case.gflop() / 128 for case in cases if case.side in (7, 14))
    innermost_of_28 = 2e-9 * plan.NZ * 128 * 7 * 7
    assert of_64 + of_28 + innermost_of_28 == pytest.approx(counter.get_total_flops() / 1e9)


@pytest.mark.parametrize("module", TINY_CASES, ids=lambda module: module.__name__)
def test_every_way_of_an_op_gets_its_figures(module):
    case = TINY_CASES[module]
    runs = {way: module.setup(case, way) for way in module.ways(case)}
    for way, figures in single_op.compare(runs, module.truth(case), rounds=1).items():
        assert figures.ms is not None, f"{way} is wrong by {figures.error:.1e}"


def _nothing(right):
    return [torch.empty_like(result).fill_(torch.nan) for result in right]


def _a_missing_term(right):
    return [result * 0.9 for result in right]


@pytest.mark.parametrize("fault", [_nothing, _a_missing_term])
@pytest.mark.parametrize("part", [0, -1])
def test_a_wrong_way_gets_no_figure(fault, part):
    case = TINY_CASES[bench_bn_act]
    right = bench_bn_act.setup(case, "torch NHWC")

    def wrong():
        results = list(right())
        results[part] = fault([results[part]])[0]
        return results

    truth = bench_bn_act.truth(case)
    figures = single_op.compare({"right": right, "wrong": wrong}, truth, rounds=1)
    assert figures["right"].ms is not None
    assert figures["wrong"].ms is None and figures["wrong"].peak_bytes is None
    with pytest.raises(RunError, match="no figure"):
        single_op.speed(None, case, wrong, truth)


def test_a_kernel_that_writes_nothing_does_not_pass_on_what_another_left():
    memory = torch.ones(4)
    assert np.isnan(single_op.error(lambda: [memory], [torch.ones(4).double()]))


def test_a_wrong_convolution_has_no_number_in_the_table(monkeypatch):
    case = tiny_conv("fprop", INNERMOST)
    setup = bench_conv.setup

    def wrong(case, way):
        run = setup(case, way)
        return (lambda: [run()[0] + 1]) if way == "oneDNN NCHW" else run

    monkeypatch.setattr(bench_conv, "setup", wrong)
    line = bench_conv.row(bench_conv.measure(case, rounds=1), bench_conv.speed_cell)
    cells = line.split(" | ")
    assert " ms, " in cells[2]
    assert cells[3].startswith("wrong, ") and " ms" not in cells[3]
    assert "oneDNN NCHW" not in cells[-1]


@pytest.mark.skipif(not single_op._CLEAR_REFS.exists(), reason="the system does not tell")
def test_the_memory_of_a_call_is_its_peak():
    def run():
        scratch = torch.ones(40 * 2**20, dtype=torch.uint8)
        return [scratch[: 2**20].clone()]

    assert single_op.peak_bytes(run) / 2**20 == pytest.approx(41, abs=4)


def test_the_table_of_convolutions_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(bench_conv, "CASES", (tiny_conv("fprop", {"side": 4}),))
    bench_conv.main(["--rounds", "1"])
    out = capsys.readouterr().out
    assert out.count("| 5->8@4, batch 2 | fprop |") == 2  # times, and memory
    bench_conv.main(["--rounds", "1", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["machine"] == machine.describe(CPU) and len(record["cases"]) == 1
    with pytest.raises(SystemExit) as stopped:
        bench_conv.main(["--only", "nothing"])
    assert stopped.value.code == 2


def test_pytest_runs_the_benchmarks_of_an_op():
    root = Path(__file__).parents[1]
    command = ["pytest", "benchmarks/bench_gan_loss.py", "--benchmark-only", "-k", "64 and G"]
    brief = ["--benchmark-max-time", "0", "--benchmark-min-rounds", "1", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", *command, *brief], cwd=root, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
    assert "test_speed[64 G bce, torch]" in result.stdout
    assert "test_memory[64 G bce, torch]: " in result.stdout


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("by_shape", [False, True])
def test_the_profile_of_a_step(backend, by_shape):
    cell = Cell(16, 1, 8, 8, 8)
    record = profile_step.measure(cell, backend, steps=2, by_shape=by_shape)
    rows = record["rows"]
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert sum(row["ms"] for row in rows) == pytest.approx(record["profiled_step_ms"])
    assert rows[-1]["op"].startswith("other (")
    shares = [row["share"] for row in rows[:-1]]
    assert shares == sorted(shares, reverse=True)
    table = profile_step.table(record)
    for row in rows:
        assert row["op"] in table
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_profile_counts_the_flop_of_the_step(backend, monkeypatch):
    monkeypatch.setattr(profile_step, "_LEAST_SHARE", 0.0)
    cell = Cell(16, 1, 8, 8, 8)
    rows = profile_step.measure(cell, backend, steps=2)["rows"]
    gflop = sum(row["gflop_s"] * row["ms"] / 1e3 for row in rows if row["gflop_s"])
    # The gradients of D's weights in G's update are the example's alone.
    left_out = cell.batch_size * sum(cell._convolutions(cell.ndf, 1)) / 1e9
    assert gflop == pytest.approx(cell.step_gflop() - left_out)
    adam = next(row for row in rows if row["op"] == "aten::_fused_adam_")
    assert adam["calls"] == 2 and adam["gb_s"] > 0 and adam["of_limit"] > 0


def test_the_profile_is_printed(capsys):
    tiny = [*map(str, TINY_FLAGS), "--steps", "1"]
    profile_step.main(tiny)
    out = capsys.readouterr().out
    assert str(TINY) in out and "without the profiler a step takes" in out
    profile_step.main([*tiny, "--json"])
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    for wrong in (["--image-size", "30"], ["--steps", "0"], ["--backend", "abacus"]):
        with pytest.raises(SystemExit) as stopped:
            profile_step.main(wrong)
        assert stopped.value.code == 2
