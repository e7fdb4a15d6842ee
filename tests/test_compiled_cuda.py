"""The CUDA kernels compile for GPUs that are not here, to code that keeps the rules."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed, and the tables compare with it")

from fastgan.benchmarks import compiled_cuda, cuda_build, cuda_code
from fastgan.benchmarks.cuda_code import Code

REASON = cuda_build.missing_reason()
with_nvcc = pytest.mark.skipif(REASON is not None, reason=str(REASON))

ROOT = Path(__file__).parents[1]
LEDGER = ROOT / "benchmarks" / "compiled_cuda.json"
PLANTED = Path(__file__).parent / "support" / "planted_cuda.cu"
SECONDS = 600

RIGHT = Code(
    threads=256,
    parameters=[8, 8],
    registers=64,
    stack=0,
    spills=0,
    barriers=1,
    shared=0,
    fused=8,
    loads={2: 1, 16: 2},
    stores={16: 1},
    copies={},
    shared_loads={4: 1},
    shared_stores={4: 1},
)


def check(folder, *arguments, nvcc=True, ledger=LEDGER, expect=0):
    """What the program says, in a process in which kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    if not nvcc:
        environment["PATH"] = str(folder)
    program = (
        "import pathlib, sys\n"
        "from fastgan.benchmarks import compiled_cuda\n"
        "compiled_cuda.LEDGER = pathlib.Path(sys.argv[1])\n"
        "sys.exit(compiled_cuda.main(sys.argv[2:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ledger), *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@with_nvcc
def test_every_kernel_keeps_the_rules(tmp_path):
    made = json.loads(LEDGER.read_text())["versions"]["nvcc"]
    here = cuda_build.nvcc_version()
    if made != here:
        pytest.skip(f"the ledger is nvcc {made}'s, and here is {here}")
    check(tmp_path, "--check")


def test_the_ledger_is_of_the_sources_without_nvcc(tmp_path):
    assert "nvcc is not on the PATH: nothing is compiled" in check(tmp_path, "--check", nvcc=False)


def test_without_nvcc_nothing_is_made(tmp_path):
    said = check(tmp_path, nvcc=False, expect=1)
    assert said.strip().endswith(
        "nvcc is not on the PATH: install the CUDA toolkit, or take --check"
    )


def changed_ledger(folder, change):
    record = json.loads(LEDGER.read_text())
    change(record)
    path = folder / LEDGER.name
    path.write_text(json.dumps(record))
    return path


def test_a_source_that_changed_shows_without_nvcc(tmp_path):
    ledger = changed_ledger(
        tmp_path, lambda record: record["files"].update({"sm_90 bn_act.cu": ""})
    )
    said = check(tmp_path, "--check", nvcc=False, ledger=ledger, expect=1)
    assert "compiled_cuda.json is not of bn_act.cu as it is, for sm_90" in said


def test_a_row_that_breaks_a_rule_shows_without_nvcc(tmp_path):
    def spill(record):
        record["kernels"]["sm_80 bn_fold"][record["columns"].index("stack")] = 8

    ledger = changed_ledger(tmp_path, spill)
    said = check(tmp_path, "--check", nvcc=False, ledger=ledger, expect=1)
    assert "sm_80 bn_fold spills registers: 8 bytes of stack" in said


def test_what_is_no_ledger_is_named(tmp_path):
    (tmp_path / "wrong.json").write_text("{}")
    said = check(tmp_path, "--check", ledger=tmp_path / "wrong.json", expect=1)
    assert "is not a ledger" in said


@pytest.mark.parametrize(
    ("kernel", "change", "launched", "fault"),
    [
        ("bn_stats<bf16, 8>", {"stack": 8}, None, "spills registers"),
        ("bn_stats<bf16, 8>", {"spills": 2}, None, "spills registers"),
        ("bn_stats<bf16, 8>", {"registers": 129, "threads": 512}, None, "registers a block"),
        ("bn_stats<bf16, 8>", {}, (512, 0), "launched with 512 threads of 256"),
        ("bn_stats<bf16, 8>", {"shared": 16}, (256, 48 * 1024), "shared memory of"),
        ("bn_stats<bf16, 8>", {"loads": {8: 9}}, None, "has 0 loads of 16 bytes, and needs 1"),
        ("act_bwd<bf16>", {"loads": {16: 1, 2: 9}}, None, "has 1 loads of 16 bytes, and needs 2"),
        ("thin_dgrad<fp32, 3, 4>", {"stores": {4: 9}}, None, "has 0 stores of 16 bytes"),
    ],
)
def test_finds_the_planted_row(kernel, change, launched, fault):
    assert compiled_cuda.faults(kernel, RIGHT, (256, 48 * 1024)) == []
    (found,) = compiled_cuda.faults(kernel, dataclasses.replace(RIGHT, **change), launched)
    assert fault in found


def test_instances_for_other_shapes_may_take_elements():
    narrow = dataclasses.replace(RIGHT, loads={2: 9}, stores={2: 9})
    for kernel in ("bn_act_fwd<bf16, 1, true>", "thin_dgrad<bf16, 3, 1>", "bn_fold"):
        assert compiled_cuda.faults(kernel, narrow, None) == []


@pytest.fixture(scope="module")
def planted():
    return cuda_code.compile_source(PLANTED, "sm_90")


@with_nvcc
def test_says_nothing_of_a_kernel_that_keeps_the_rules(planted):
    code = planted["act_bwd<bf16, 8>"]
    assert compiled_cuda.faults("act_bwd<bf16, 8>", code, None) == []
    assert (code.threads, code.parameters, code.loads) == (256, [8, 8, 8], {16: 2})


@with_nvcc
@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("spills", "spills registers"),
        ("bn_act_bwd<fp32, 4>", "has 0 stores of 16 bytes"),
        ("shared", "bytes of shared memory of"),
    ],
)
def test_finds_the_planted_kernel(planted, kernel, fault):
    # What the launch adds is nothing, or what takes it beyond the limit.
    launched = planted[kernel].threads, 1024 if kernel == "shared" else 0
    assert any(fault in text for text in compiled_cuda.faults(kernel, planted[kernel], launched))


@with_nvcc
def test_a_kernel_needs_launch_bounds(tmp_path):
    source = tmp_path / "unbounded.cu"
    source.write_text("__global__ void some_kernel(float* x) { x[threadIdx.x] = 0; }\n")
    with pytest.raises(Exception, match="some has no launch bounds"):
        cuda_code.compile_source(source, "sm_80")


def test_the_key_is_of_all_that_is_compiled(tmp_path, monkeypatch):
    source, header, other = (tmp_path / name for name in ("a.cu", "a.cuh", "b.cuh"))
    source.write_text('#include "a.cuh"\n')
    header.write_text('#include <cuda_runtime.h>\n#include "b.cuh"\n')
    other.write_text("")
    (tmp_path / "c.cuh").write_text("")
    keys = [cuda_code.key(source, "sm_80"), cuda_code.key(source, "sm_90")]
    (tmp_path / "c.cuh").write_text("// not included\n")
    assert cuda_code.key(source, "sm_80") == keys[0]
    other.write_text("// included by what is included\n")
    keys.append(cuda_code.key(source, "sm_80"))
    monkeypatch.setattr(cuda_build, "nvcc_flags", lambda: ["-O2"])
    keys.append(cuda_code.key(source, "sm_80"))
    assert len(set(keys)) == 4


def test_flags_and_architectures_are_those_of_setup():
    assert "-fmad=false" in cuda_build.nvcc_flags()
    assert {"80", "90"} <= set(cuda_build.architectures())


def test_bytes_are_those_of_all_tensors_of_each_launch():
    """The weight gradient of the generator's last layer: parts are written, and read again."""
    what = "G 64-3@32 n128: weight gradient"
    (one,) = (one for one in compiled_cuda.Ledger.read(LEDGER).passes["sm_90"] if one.what == what)
    first, second = one.launches
    low, high, dweight = 128 * 64 * 32 * 32 * 2, 128 * 3 * 64 * 64 * 2, 64 * 3 * 4 * 4 * 2
    parts = first.grid[1] * (64 * 3 * 4 * 4) * 4
    assert first.nbytes == low + high + parts + dweight
    assert second.nbytes == parts + dweight
    assert one.flop == 2 * 128 * 32 * 32 * 64 * 3 * 16
