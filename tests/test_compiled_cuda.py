"""The CUDA kernels compile for GPUs that are not here, to code that keeps the rules."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed, and the tables compare with it")

from fastgan.benchmarks import compiled_cuda, conv_times, cuda_build, cuda_code
from fastgan.benchmarks.compile_driver import TARGETS
from fastgan.benchmarks.cuda_code import Code
from fastgan.benchmarks.cuda_launches import Launch, Pass

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
    products=0,
    loads={2: 1, 16: 2},
    stores={16: 1},
    copies={},
    shared_loads={4: 1},
    shared_stores={4: 1},
)
# Of a product on tensor cores, whose loads are copies to shared memory.
RIGHT_PRODUCT = dataclasses.replace(RIGHT, products=16, loads={}, copies={16: 2}, stores={16: 2})


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


@pytest.mark.parametrize(
    ("kernel", "change", "fault"),
    [
        ("conv_fprop<bf16, 128x128>", {"products": 0}, "has no product on tensor cores"),
        ("conv_fprop<bf16, 64x64, 8+8>", {"copies": {16: 1}}, "1 copies of 16 bytes, and needs 2"),
        ("conv_dgrad<tf32, 64x64>", {"copies": {4: 1, 16: 2}}, "copies of less than 16 bytes"),
        ("conv_dgrad<tf32, 64x64, 1+4>", {"copies": {4: 9}}, "0 copies of 16 bytes, and needs 1"),
        ("conv_dgrad<fp16, 64x64, 1+1>", {"stores": {2: 9}}, "0 stores of 16 bytes, and needs 1"),
        ("conv_wgrad<tf32x3, 128x64>", {"stores": {16: 1}}, "1 stores of 16 bytes, and needs 2"),
        ("conv_wgrad<bf16, 128x64>", {"spills": 1}, "spills registers"),
    ],
)
def test_finds_the_planted_row_of_a_product(kernel, change, fault):
    assert compiled_cuda.faults(kernel, RIGHT_PRODUCT, (256, 48 * 1024)) == []
    (found,) = compiled_cuda.faults(kernel, dataclasses.replace(RIGHT_PRODUCT, **change), None)
    assert fault in found


def test_a_product_has_a_name_that_is_understood():
    (found,) = compiled_cuda.faults("conv_fprop<bf16, 1, MmaTile<64, 64>>", RIGHT_PRODUCT, None)
    assert "is not understood" in found


def test_instances_for_other_shapes_may_take_elements():
    narrow = dataclasses.replace(RIGHT, loads={2: 9}, stores={2: 9})
    for kernel in ("bn_act_fwd<bf16, 1, true>", "thin_dgrad<bf16, 3, 1>", "bn_fold"):
        assert compiled_cuda.faults(kernel, narrow, None) == []
    # What they write is wide where the result's rows are.
    elements = dataclasses.replace(RIGHT_PRODUCT, loads={2: 9}, copies={}, stores={2: 9, 16: 2})
    assert compiled_cuda.faults("conv_wgrad<bf16, 64x64, 1+1>", elements, None) == []


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
        ("conv_fprop<bf16, 128x64>", "has no product on tensor cores"),
        ("conv_fprop<tf32, 64x64, 4+4>", "has 0 copies of 16 bytes, and needs 2"),
        ("conv_fprop<tf32x3, 64x64, 1+4>", "has 0 copies of 16 bytes, and needs 1"),
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


def ledger_pass(what, target="sm_90"):
    """A pass of the committed ledger, every way."""
    found = compiled_cuda.Ledger.read(LEDGER).passes[target]
    return {one.way: one for one in found if one.what == what}


def test_bytes_are_those_of_all_tensors_of_each_launch():
    """The weight gradient of the generator's last layer: parts are written, and read again."""
    (one,) = ledger_pass("G 64-3@32 n128: weight gradient").values()
    first, second = one.launches
    low, high, dweight = 128 * 64 * 32 * 32 * 2, 128 * 3 * 64 * 64 * 2, 64 * 3 * 4 * 4 * 2
    parts = first.grid[1] * (64 * 3 * 4 * 4) * 4
    assert first.nbytes == low + high + parts + dweight
    assert second.nbytes == parts + dweight
    assert one.flop == 2 * 128 * 32 * 32 * 64 * 3 * 16


def test_every_way_of_a_convolution_is_recorded():
    ways = ledger_pass("G 64-3@32 n128: forward, tanh")
    assert list(ways) == ["direct", "64x64"]
    assert [one.launches[0].kernel for one in ways.values()] == [
        *("thin_dgrad<bf16, 3, 8>", "conv_dgrad<bf16, 64x64, 8+1>")
    ]
    ways = ledger_pass("D 512-256@4 n2048 in 2: forward, statistics")
    for way, one in ways.items():
        (launch,) = one.launches
        assert launch.kernel == f"conv_fprop<bf16, {way}>"
        rows, columns = map(int, way.split("x"))
        assert launch.grid == (2048 * 4 * 4 // rows * 512 // columns, 1, 1)
        assert (one.table, one.depth) == (1024, 256 * 16)


def test_blocks_are_as_many_as_the_product_has_tiles():
    """So that what the model takes for padding is none of the work."""
    seen = set()
    for target, found in compiled_cuda.Ledger.read(LEDGER).passes.items():
        for one in found:
            product = cuda_code.product_of(one.launches[0].kernel)
            if product is None:
                continue
            blocks = one.launches[0].grid[0]
            # Rows x columns, in all classes of a transposed convolution together.
            outputs = one.flop / 2 / one.depth
            assert blocks * product.rows * product.columns >= outputs
            seen.add((target, one.what.split(": ")[1], product.rows))
    assert len(seen) > 2 * 4


def test_a_prediction_counts_whole_tiles_of_the_busiest_multiprocessor():
    gpu = TARGETS["sm_90"]
    kernel = "conv_wgrad<bf16, 128x64>"
    # A sum of 1000 in three parts is 334 each, which is 11 stages of 32.
    multiplies = Launch(kernel, (100, 3, 1), 128, 36864, 10**6)
    adds = Launch("add_parts<bf16>", (12, 1, 1), 256, 0, 3 * 10**6)
    flop = 2.0 * 100 * 128 * 64 * 1000
    one = Pass("G 1-2@3 n4: weight gradient", "128x64", (multiplies, adds), flop, 1000, 128)
    code = dataclasses.replace(RIGHT_PRODUCT, threads=128, registers=128, shared=0)
    found = conv_times.of_cuda(gpu, one, {("sm_90", kernel): code})
    # 300 blocks on 132 multiprocessors are three on the busiest, and four fit it.
    of_block = 2.0 * 128 * 64 * 11 * 32
    by_flop = 3 * of_block / (0.63 * 989e12 / 132)
    assert found.seconds == pytest.approx(by_flop + 3e6 / 3.35e12)
    assert (found.blocks, found.resident, found.waves, found.bound) == (300, 4, 1, "FLOP")
    assert found.padding == pytest.approx(1 - 1000 / (3 * 11 * 32))
    assert found.nbytes == 4 * 10**6
    much = dataclasses.replace(multiplies, nbytes=10**9)
    by_bytes = conv_times.of_cuda(
        gpu, dataclasses.replace(one, launches=(much,)), {("sm_90", kernel): code}
    )
    assert (by_bytes.bound, by_bytes.seconds) == ("bytes", pytest.approx(1e9 / 3.35e12))


def test_the_tables_are_marked_as_predicted():
    page = (ROOT / "benchmarks" / "compiled_cuda.md").read_text()
    for name, batch in itertools.product(("A100 (sm_80)", "H100 SXM (sm_90)"), (128, 1024)):
        assert f"### {name}, batch {batch}, predicted: " in page
    assert "**Predicted, not measured.**" in page
