"""``gpu_check`` without a GPU: its dry run, what it makes of parts that fail, hang or are
interrupted, what it then reports no speeds of, and its tables, from made-up results.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fastgan.benchmarks import bench_conv, gpu_check, gpu_parts
from fastgan.benchmarks.gpu_check import Check, Part
from fastgan.benchmarks.gpu_report import markdown
from support.numerics import needs_cuda

from fastgan.ops import conv, cuda, triton, tuning

NEEDS_TRITON = pytest.mark.skipif(
    any("not installed" in reason for reason in triton.missing_reasons()), reason="needs triton"
)


def part(name, run):
    return Part(name, "for a test", 1.0, run)


def found(status, **more):
    return lambda check, seconds: {"status": status, **more}


def checked(tmp_path, *parts, **options):
    """The check after its run, its exit code, and the file that it left."""
    check = Check(parts, tmp_path / "check.json", **options)
    code = check.run()
    return check, code, json.loads((tmp_path / "check.json").read_text())


def raising(check, seconds):
    raise RuntimeError("no\nluck")


def interrupting(check, seconds):
    check.keep("b", {"status": "unfinished", "result": {"rows": [1]}})
    raise KeyboardInterrupt


@NEEDS_TRITON
def test_a_dry_run_checks_the_kernels(tmp_path, capsys):
    output, tables = tmp_path / "check.json", tmp_path / "check.md"
    args = ["--dry-run", "--only", "sanitizer", "compile", "step", "passes", "ops"]
    code = gpu_check.main([*args, "--output", str(output), "--markdown", str(tables)])
    parts = json.loads(output.read_text())["parts"]
    assert {name: entry["status"] for name, entry in parts.items()} == {
        **dict.fromkeys(("step", "passes", "ops"), "passed"),
        **dict.fromkeys(("sanitizer", "compile"), "skipped"),
    }
    assert code == 0
    assert {row["right"] for row in parts["step"]["result"]["rows"]} == {True}
    assert len(parts["ops"]["result"]["rows"]) == 2 * 3
    for row in parts["ops"]["result"]["rows"]:
        assert [way["backend"] for way in row["ways"].values()] == ["torch", "triton"]
        assert all(way["right"] and way["us"] > 0 for way in row["ways"].values())
    assert "times torch's speed, geometric mean of 6; fastest: torch " in tables.read_text()
    for row in parts["passes"]["result"]["rows"]:
        assert row["ways"].keys() == {"reference", "triton"}
        assert all(way["right"] and way["us"] > 0 for way in row["ways"].values())
    assert tables.read_text().strip() == capsys.readouterr().out.strip()
    assert "A dry run on the CPU" in tables.read_text()


@NEEDS_TRITON
@needs_cuda
@pytest.mark.parametrize("part", ["kernels", "step", "passes", "ops"])
def test_the_cuda_kernels_are_checked_too(part):
    """Where they are built, as the tests build them for the CPU."""
    records = []
    assert gpu_parts.PARTS[part](gpu_parts.Job(dry_run=True), records.append)
    found = records[-1]
    if part == "kernels":
        assert found["numbers"].keys() == {"triton", "cuda"}
    elif part == "step":
        assert all(row["own"].keys() == {"triton", "cuda"} for row in found["rows"])
        assert "| triton | cuda | allowed |" in markdown(made_up(step=found))
    elif part == "passes":
        assert all(row["ways"].keys() == {"reference", "triton", "cuda"} for row in found["rows"])
        assert all(way["right"] for row in found["rows"] for way in row["ways"].values())
        assert "| batch norm " in markdown(made_up(passes=found))
    else:
        ways = [row["ways"] for row in found["rows"]]
        assert all(way["right"] and way["us"] > 0 for row in ways for way in row.values())
        for row in ways:
            assert {way["backend"] for way in row.values()} == {"torch", "triton", "cuda"}
            assert "cuda 64x64" in row
        # Of a backend all ways, where there are several.
        assert sum("cuda direct" in row for row in ways) == 1
        assert "| torch | triton | times torch's speed | cuda | times" in markdown(
            made_up(ops=found)
        )


@needs_cuda
@NEEDS_TRITON
def test_a_way_is_of_one_backend(monkeypatch):
    """Where all are chosen from, the way's name says whose it is."""
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    # What is cached is of an interpreter's choice.
    monkeypatch.setattr(conv, "_tiles_of", conv._tiles_of.__wrapped__)
    for case in bench_conv.CASES:
        by_backend = gpu_parts._kernels(case, "bf16")
        ways = {name: own.ways(case.direction) for name, own in by_backend.items()}
        assert ways["triton"] and ways["cuda"] and not {*ways["triton"]} & {*ways["cuda"]}
        assert "torch" not in ways["triton"] + ways["cuda"]


@needs_cuda
def test_a_wrong_pass_has_no_speed(monkeypatch):
    launch = cuda.launch

    def wrong(name, *arguments):
        launch(name, *arguments)
        if name == "gan_loss_forward":
            arguments[-1].add_(1.0)

    monkeypatch.setattr(cuda, "launch", wrong)
    records = []
    assert not gpu_parts.passes(gpu_parts.Job(dry_run=True), records.append)
    (row,) = (row for row in records[-1]["rows"] if row["what"].startswith("loss"))
    assert row["ways"]["cuda"].keys() == {"right", "reason"}
    assert row["ways"]["cuda"]["reason"].startswith("off by ")
    assert row["ways"]["reference"]["right"]


@NEEDS_TRITON
def test_the_machine_is_described():
    records = []
    assert gpu_parts.describe(gpu_parts.Job(dry_run=True), records.append)
    assert records[0]["machine"]["triton"] == triton.version()
    assert "- triton: " in markdown(made_up(machine=records[0]))


def test_without_a_gpu_it_says_so_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--output", str(tmp_path / "check.json")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "torch sees no GPU; --dry-run" in err
    assert gpu_check.main(["--dry-run", "--minutes", "0"]) == 2
    assert "--minutes 0 must be" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--only", "nothing"])
    assert stopped.value.code == 2


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path):
    said = []
    parts = (part("a", raising), part("b", found("passed")), part("c", found("skipped")))
    _, code, record = checked(tmp_path, *parts, say=said.append)
    assert code == 1
    assert [entry["status"] for entry in record["parts"].values()] == [
        *("failed", "passed", "skipped")
    ]
    assert record["parts"]["a"]["reason"] == "RuntimeError: no luck"
    assert "a: failed: RuntimeError: no luck" in said
    assert checked(tmp_path, *parts[1:])[1] == 0
    assert checked(tmp_path, part("d", found("unfinished")))[1] == 1


def test_ctrl_c_leaves_what_was_done(tmp_path):
    parts = (part("a", found("passed")), part("b", interrupting), part("c", raising))
    _, code, record = checked(tmp_path, *parts)
    assert code == 130 and record["interrupted"]
    assert record["parts"]["a"]["status"] == "passed"
    assert record["parts"]["b"] == {"status": "unfinished", "result": {"rows": [1]}}
    assert "c" not in record["parts"]
    assert "Interrupted" in markdown({**record, "parts": {}})


def test_a_part_has_its_share_of_the_time_and_what_others_left(tmp_path):
    given = []

    def run(check, seconds):
        given.append(seconds)
        return {"status": "passed"}

    parts = (part("a", run), Part("b", "", 2.0, run), part("c", run))
    checked(tmp_path, *parts, minutes=1.0)
    assert given == pytest.approx([12.5, 50 * 2 / 3, 50.0], rel=0.05)
    *_, record = checked(tmp_path, *parts, minutes=0.1)
    assert record["parts"]["a"]["status"] == "unfinished"
    assert "the time was up" in record["parts"]["a"]["reason"]


def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path):
    mark = tmp_path / "child"
    code = (
        "import subprocess, sys, time; print('hello', flush=True);"
        f"c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(mark)!r}, 'w').write(str(c.pid)); time.sleep(60)"
    )
    started = time.monotonic()
    assert gpu_check.run_command([sys.executable, "-c", code], 3.0, False) == (None, "hello\n")
    assert time.monotonic() - started < 30
    if mark.exists() and mark.read_text():
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.kill(int(mark.read_text()), 0)
                time.sleep(0.1)
    entry = gpu_check._judged(None, "hello\n", 3.0)
    assert (entry["status"], entry["reason"]) == ("unfinished", "stopped after 3 s")


def test_the_kernels_are_interpreted_in_a_dry_run_alone(monkeypatch):
    code = "import os; print(os.environ.get('TRITON_INTERPRET'), os.environ.get('MORE'))"
    command = [sys.executable, "-c", code]
    assert gpu_check.run_command(command, 60.0, True, MORE="1") == (0, "1 1\n")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_check.run_command(command, 60.0, False) == (0, "None None\n")


def test_sigterm_is_ctrl_c(tmp_path):
    code = (
        "from fastgan.benchmarks import gpu_check as g;"
        "g.PARTS = (g.Part('machine', 'waits', 1.0, lambda c, s: print('up', flush=True)"
        " or g.run_command(['sleep', '60'], s, False)),);"
        f"raise SystemExit(g.main(['--dry-run', '--output', {str(tmp_path / 'c.json')!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 130
    assert json.loads((tmp_path / "c.json").read_text())["interrupted"]


@pytest.fixture
def child(monkeypatch):
    """Has parts answer with a code, an output and a file; returns the commands that they got."""
    commands = []

    def answer(code, output="", written=None):
        def run(command, seconds, dry_run, **environment):
            commands.append(command)
            if written is not None:
                Path(command[command.index("--out") + 1]).write_text(json.dumps(written))
            if code == "interrupted":
                raise KeyboardInterrupt
            return code, output

        monkeypatch.setattr(gpu_check, "run_command", run)
        return commands

    return answer


@pytest.mark.parametrize(
    ("code", "output", "written", "status", "reason"),
    [
        (0, "", {"rows": []}, "passed", None),
        (1, "", {"rows": [1]}, "failed", "something differs, see its table"),
        (1, "Traceback (most recent call last):\nOops: x", {"a": 1}, "failed", "exit code 1: Oops"),
        (-11, "", None, "failed", "exit code -11: no output"),
        (None, "so far", {"rows": [1]}, "unfinished", "stopped after"),
    ],
)
def test_what_a_part_found_is_kept_however_it_ends(
    tmp_path, child, code, output, written, status, reason
):
    child(code, output, written)
    *_, record = checked(tmp_path, part("step", gpu_check._step))
    entry = record["parts"]["step"]
    assert entry["status"] == status and entry["result"] == (written or {})
    assert reason is None or reason in entry["reason"]


def test_an_interrupted_part_keeps_what_it_found(tmp_path, child):
    child("interrupted", written={"rows": [1]})
    *_, record = checked(tmp_path, part("ops", gpu_check._ops))
    assert record["interrupted"]
    assert record["parts"]["ops"]["result"] == {"rows": [1]}


def failed_tests(*names):
    files = {f"test_{name}.py": {"status": "failed", "summary": "1 failed"} for name in names}
    return part("tests", found("failed", result={"files": files}))


@pytest.mark.parametrize(
    ("earlier", "ops", "bench"),
    [
        (failed_tests("triton"), "test_triton.py failed", "test_triton.py failed"),
        (failed_tests("engine"), None, "test_engine.py failed"),
        (part("step", found("failed")), None, "the step by the kernels failed its check"),
        (part("capture", found("failed")), None, "captured steps failed their check"),
        (part("sanitizer", found("failed", reason="bad")), "sanitizer: bad", "sanitizer: bad"),
        (part("step", found("unfinished")), None, None),
    ],
)
def test_what_failed_gets_no_speeds(tmp_path, child, earlier, ops, bench):
    commands = child(0, written={})
    checked(tmp_path, earlier, part("ops", gpu_check._ops), part("bench", gpu_check._bench))
    for command, reason in zip(commands, (ops, bench), strict=True):
        told = "--without-own" in command
        assert told == (reason is not None)
        assert not told or reason in command[command.index("--without-own") + 1]


def test_without_own_the_others_are_measured(tmp_path):
    records = []
    job = gpu_parts.Job(dry_run=True, without_own="test_triton.py failed")
    assert gpu_parts.bench(job, records.append)
    names = [v["name"] for v in records[-1]["cells"][0]["variants"]]
    assert names == ["example", "example channels_last"]
    lines = markdown(made_up(bench=records[-1]))
    assert "No speeds of fastgan: test_triton.py failed." in lines and "channels_last" in lines
    assert list(gpu_parts._ways(gpu_parts._layers(job)[0], "tf32", job)) == ["cuDNN"]


def test_accelerated_networks_are_measured(tmp_path):
    records = []
    assert gpu_parts.accelerate(gpu_parts.Job(dry_run=True), records.append)
    (cell,) = records[-1]["cells"]
    assert [v["status"] for v in cell["variants"]] == ["ok"] * 4
    assert "accelerate channels_last" in markdown(made_up(accelerate=records[-1]))
    job = gpu_parts.Job(dry_run=True, without_own="test_triton.py failed")
    assert gpu_parts.accelerate(job, records.append)
    assert len(records[-1]["cells"][0]["variants"]) == 2


def test_captured_steps_are_compared():
    """Here as they are written; with a stand-in for graphs in tests/test_capture.py."""
    records = []
    assert gpu_parts.capture(gpu_parts.Job(dry_run=True), records.append)
    rows = records[-1]["rows"]
    assert [(row["backend"], row["captures"]) for row in rows] == [("reference", 0), ("auto", 0)]
    lines = markdown(made_up(capture=records[-1]))
    assert "| auto | fp32 | 0 |" in lines and "CUDA graphs are of GPUs" in lines


def test_the_layers_are_those_of_dcgan_64():
    cases = gpu_parts._layers(gpu_parts.Job())
    assert len({str(case) for case in cases}) == len(cases) == 6 * 3
    assert {case.n for case in cases} == {128}
    assert len(gpu_parts._layers(gpu_parts.Job(quick=True))) == 6


def test_every_tile_is_compiled_and_what_fails_is_said(monkeypatch):
    def one_step(cell, precision, tile, device):
        assert device.type == "cuda"
        if tile == 3:
            raise RuntimeError("out of\nregisters")
        return [1.0, float("nan") if precision == "bf16" else 2.0]

    monkeypatch.setattr(gpu_parts, "_one_step", one_step)
    monkeypatch.setattr(gpu_parts, "_in_processes", map)
    records = []
    assert not gpu_parts.compile_all(gpu_parts.Job(), records.append)
    rows = records[-1]["rows"]
    assert len(rows) == len(records) == 3 + 3 * 4
    reasons = [row["reason"] for row in rows if row["reason"]]
    assert reasons == ["not finite: [1.0, nan]", *["RuntimeError: out of"] * 3]


def test_workers_answer_in_order():
    assert list(gpu_parts._in_processes(abs, [-1, 2, -3])) == [1, 2, 3]


def test_the_tile_so_numbered_is_taken():
    with gpu_parts._tile(2):
        assert [tuning.fastest("", {}, names, None) for names in ("abcd", "ab")] == ["c", "b"]
    assert tuning.fastest("", {}, ["a"]) == "a"


def test_tests_run_a_file_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "_DRY_RUN_TESTS", ("a", "b", "c"))
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "benchmarks" / "gpu_check.py"))
    tests = part("tests", gpu_check.run_tests)
    _, code, record = checked(tmp_path, tests, dry_run=True)
    assert code == 0 and "run it from a checkout" in record["parts"]["tests"]["reason"]
    (tmp_path / "tests").mkdir()
    for name, line in (("a", "assert True"), ("b", "assert 1 == 2"), ("c", "while True: pass")):
        (tmp_path / "tests" / f"test_{name}.py").write_text(f"def test_it():\n    {line}\n")
    monkeypatch.setattr(gpu_check, "_RESERVE_S", 0.0)
    _, code, record = checked(tmp_path, tests, dry_run=True, minutes=0.15)
    entry = record["parts"]["tests"]
    assert (code, entry["status"]) == (1, "failed")
    assert entry["reason"] == "failed: test_b.py; unfinished: test_c.py"
    assert "1 passed" in entry["result"]["files"]["test_a.py"]["summary"]
    assert "assert 1 == 2" in markdown(record)


def made_up(**results):
    parts = {name: {"status": "failed", "result": result} for name, result in results.items()}
    return {"started": "now", "dry_run": False, "interrupted": False, "parts": parts}


def test_the_tables():
    text = markdown(
        made_up(
            machine={"machine": {"device": "H100", "memory_gib": 79.6}, "nvidia_smi": None},
            compile={
                "rows": [
                    {"cell": "64x64x3", "precision": "bf16", "tile": 0, "reason": ""},
                    {"cell": "28x28x1", "precision": "tf32", "tile": 3, "reason": "no registers"},
                ]
            },
            step={
                "cell": "64x64x3, batch 32",
                "limit": 4.0,
                "rows": [
                    {
                        "precision": "bf16",
                        "kind": "gradients",
                        "reference": 1e-2,
                        "own": {"triton": None, "cuda": 2e-2},
                        "limit": 4e-2,
                        "right": False,
                    }
                ],
            },
            ops={
                "rates": {"bf16": {"tflop_s": 700.0, "gb_s": 2900.0}},
                "limits": {"bf16": 2.0**-8},
                "rows": [
                    {
                        "layer": "512->256@4",
                        "direction": "dgrad",
                        "precision": "bf16",
                        "ways": {
                            "cuDNN": speed("torch", 20.0),
                            "triton 128x128x64": speed("triton", 10.0),
                            "triton 64x64x64": {
                                "backend": "triton",
                                "right": False,
                                "reason": "off | by much",
                            },
                            "cuda 64x64": speed("cuda", 50.0),
                            "cuda 128x64": speed("cuda", 40.0),
                        },
                    },
                    {
                        "layer": "64->3@32",
                        "direction": "wgrad",
                        "precision": "bf16",
                        "ways": {
                            "cuDNN": speed("torch", 40.0),
                            "triton 64x64x64": speed("triton", 50.0),
                            "cuda 64x64": speed("cuda", 5.0),
                        },
                    },
                    {
                        "layer": "64->3@32",
                        "direction": "fprop",
                        "precision": "tf32",
                        "ways": {
                            "cuDNN": speed("torch", 7.0),
                            "cuda 64x64": {
                                "backend": "cuda",
                                "right": False,
                                "reason": "off by much",
                            },
                        },
                    },
                ],
            },
        )
    )
    assert "- memory_gib: 79.6" in text and "- nvidia-smi: not there" in text
    assert "1 steps compiled and ran, 1 did not." in text
    assert "- 28x28x1, tf32, tile 3: no registers" in text
    assert "| bf16 | gradients | 1.0e-02 |  | 2.0e-02 | 4.0e-02 | wrong |" in text
    assert "| cuDNN | 1.0e-03 | 20.0 | 300.0 | 0.50 |  |" in text
    assert "| triton 128x128x64 | 1.0e-03 | 10.0 | 300.0 | 0.50 | fastest |" in text
    assert "| triton 64x64x64 |  |  |  |  | off \\| by much |" in text
    # 20/10 and 40/50; 20/40 and 40/5.
    assert (
        "bf16: triton 1.26 times torch's speed, geometric mean of 2; "
        "cuda 2.00 times torch's speed, geometric mean of 2; fastest: torch 0, triton 1, cuda 1."
    ) in text
    assert "tf32: fastest: torch 1, triton 0, cuda 0." in text
    assert (
        "| 512->256@4 | dgrad | bf16 | 20.0 µs, cuDNN | **10.0 µs, triton 128x128x64** | 2.00 "
        "| 40.0 µs, cuda 128x64 | 0.50 |"
    ) in text
    assert "| tf32 | **7.0 µs, cuDNN** |  |  |  |  |" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def speed(backend, us):
    figures = {"error": 1e-3, "us": us, "tflop_s": 300.0, "of_roofline": 0.5}
    return {"backend": backend, "right": True, **figures}


def test_a_wrong_op_has_no_speed():
    case, name = gpu_parts._layers(gpu_parts.Job(dry_run=True))[0], "tf32"
    errors = {"right": 1e-4, "wrong": 1.0, "nan": float("nan")}
    found = {label: {"backend": "cuda", "error": error} for label, error in errors.items()}
    found["none"] = {"backend": "triton", "reason": "OutOfResources: shared"}
    ways = gpu_parts._row(case, name, found)["ways"]
    assert [way["right"] for way in ways.values()] == [True, False, False, False]
    assert [way["reason"].split(" ")[0] for way in list(ways.values())[1:]] == [
        *("off", "off", "OutOfResources:")
    ]
    json.dumps(ways, allow_nan=False)
    figures = gpu_parts._speed(
        {"gflop": 1e3, "megabytes": 1e3}, 2e-3, {"tflop_s": 1e3, "gb_s": 1e3}
    )
    assert figures == pytest.approx({"us": 2e3, "tflop_s": 500.0, "of_roofline": 0.5})
