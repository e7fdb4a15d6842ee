"""The roofline of a training step: that it counts the step's work, and that the file which is kept
of it is of the code as it is."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from fastgan.ops import triton

if any("not installed" in reason for reason in triton.missing_reasons()):
    pytest.skip("needs triton", allow_module_level=True)

from fastgan.benchmarks import roofline
from fastgan.benchmarks.plan import Cell


@pytest.fixture(scope="module")
def steps():
    """The sums by batch size, from a process in which kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    sizes = ["2", *map(str, roofline.BATCHES)]
    command = [sys.executable, "-m", "fastgan.benchmarks.roofline", "--json", "--batch-sizes"]
    done = subprocess.run([*command, *sizes], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {found["batch_size"]: found for found in json.loads(done.stdout)}


@pytest.mark.parametrize("batch", [2, *roofline.BATCHES])
def test_the_convolutions_are_those_of_the_step(steps, batch):
    cell = Cell(batch_size=batch)
    # The gradients of D's weights in G's update are the example's alone.
    left_out = batch * sum(cell._convolutions(cell.ndf, 1)) / 1e9
    assert steps[batch]["gflop"] == pytest.approx(cell.step_gflop() - left_out, rel=1e-9)


def test_a_step_never_waits_for_the_gpu(steps):
    assert {found["waits"] for found in steps.values()} == {0}


def test_the_sums_agree(steps):
    for found in steps.values():
        kernels = found["kernels"].values()
        assert sum(group["launches"] for group in kernels) == found["launches"]
        assert sum(group["us"] for group in kernels) == pytest.approx(found["captured_us"])
        assert sum(found["bound"].values()) == found["launches"] > found["triton"] > 0
        assert found["without_floor_us"] < found["captured_us"] < found["eager_us"]
        assert found["captured_us"] >= 1e6 * roofline.CAPTURED_S * found["launches"]


def test_the_file_is_of_the_kernels_as_they_are(steps):
    text = roofline.DOCUMENT.read_text(encoding="utf-8")
    assert "**Predicted, never measured.**" in text
    again = "python -m fastgan.benchmarks.roofline writes it anew"
    (counts,) = re.findall(r"^\| of these Triton's \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert [*map(int, counts)] == [steps[n]["triton"] for n in roofline.BATCHES], again
    for batch in roofline.BATCHES:
        _, _, section = text.partition(f"## Batch {batch}, by kernel\n")
        section = section.partition("## ")[0]
        kept = dict(re.findall(r"^\| ((?!aten)[a-z][\w ]+) \| (\d+) \|", section, re.MULTILINE))
        kernels = steps[batch]["kernels"].items()
        # torch's own launches are those of its version.
        ours = {name: str(g["launches"]) for name, g in kernels if not name.startswith("aten.")}
        assert {**kept, "kernel": ""} == {**ours, "kernel": ""}, again


def test_what_bounds_a_launch():
    small = roofline.Item("k", "", 0.0, 1000, True)
    large = roofline.Item("k", "", 0.0, int(3.35e9), True)
    product = roofline.Item("k", "", 989e9, int(3.35e6), True)
    assert [item.bound(2e-6) for item in (small, large, product)] == ["launch", "bytes", "FLOP"]
    assert [item.seconds(2e-6) for item in (small, large, product)] == pytest.approx(
        [2e-6, 1e-3, 1e-3]
    )


def test_what_torch_launches_and_moves():
    recorder = roofline._Recorder([])
    x, y = torch.ones(10), torch.zeros(5, 2)
    with recorder:
        y.view(10).detach()[:5]
        torch.cat([x, x])
        y.copy_(x.view(5, 2))
        y.mul_(x[:2])
        torch.empty(3)
        float(y.sum())
    rows = [(item.kernel, item.what, item.nbytes) for item in recorder.items]
    assert rows[:4] == [
        ("aten.cat", "20", 40 + 40 + 80),
        ("aten.copy_", "5x2", 40 + 40),
        ("aten.mul_", "5x2", 40 + 8 + 40),
        ("aten.sum", "5x2", 40 + 4),
    ]
    assert recorder.waits == 1


def test_a_wrong_batch_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        roofline.main(["--batch-sizes", "0"])
    assert stopped.value.code == 2 and "--batch-size 0 must be" in capsys.readouterr().err
