"""The Triton kernels compile for GPUs that are not here, to code that keeps the rules.

All in subprocesses: kernels cannot be compiled in a process in which they are interpreted.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed, so nothing can be compiled")

ROOT = Path(__file__).parents[1]
PLANTED = Path(__file__).parent / "support" / "planted_kernels.py"
LEDGER = ROOT / "benchmarks" / "compiled.json"
# Of one process each; what is in the ledger is not compiled again.
SECONDS = 1200

WHAT = {
    "narrow": "reads no 16 bytes",
    "shared": "of shared memory of",
    "spills": "spills registers",
    "matrix": "instruction",
}


def run(folder, *arguments, expect=0):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """What is said of the planted kernels, by target."""
    folder = tmp_path_factory.mktemp("planted")
    return {
        target: json.loads(run(folder, PLANTED, target).splitlines()[-1])
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    }


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_says_nothing_of_a_kernel_that_keeps_the_rules(planted, target):
    assert planted[target]["right"] == []


# AMD has matrix instructions for float32 as it is.
@pytest.mark.parametrize(
    ("target", "fault"),
    [(target, fault) for target in ("sm_80", "sm_90", "sm_100") for fault in WHAT]
    + [("gfx942", fault) for fault in WHAT if fault != "matrix"],
)
def test_finds_the_planted_fault(planted, target, fault):
    assert any(WHAT[fault] in text for text in planted[target][fault]), planted[target]


def test_counts_in_the_ptx_are_those_of_the_machine_code(tmp_path):
    for target, product, copy in (
        ("sm_80", "HMMA", "LDGSTS"),
        ("sm_90", "HGMMA", "LDGSTS"),
        ("sm_100", "UTCHMMA", "LDGSTS"),
    ):
        compiled, code = json.loads(run(tmp_path, PLANTED, target, "right").splitlines()[-1])
        assert sum(n for name, n in code.items() if name.split(".")[0] == product) == sum(
            compiled["matrix"].values()
        )
        copies = sum(n for name, n in code.items() if name.split(".")[0] == copy)
        wide = sum(n for name, n in code.items() if name.startswith(copy) and ".128" in name)
        assert copies == wide == compiled["copies"]["16"]


def test_the_key_is_that_of_the_meaning(tmp_path):
    source = (
        "import triton, triton.language as tl\n"
        "from fastgan.benchmarks.compile_driver import source_hash\n"
        "FACTOR = tl.constexpr(2)\n"
        "@triton.jit\n"
        "def helper(x):\n"
        "    return x * FACTOR\n"
        "@triton.jit\n"
        "def kernel(x_ptr):\n"
        "    tl.store(x_ptr, helper(tl.load(x_ptr)))\n"
        "print(source_hash(kernel))\n"
    )
    changed = {
        "same": source,
        "moved": source.replace("FACTOR =", "\n\nFACTOR ="),
        "commented": source.replace("    tl.store", '    """Doubles."""\n    # x\n    tl.store'),
        "helper": source.replace("x * FACTOR", "FACTOR + x"),
        "constant": source.replace("constexpr(2)", "constexpr(3)"),
    }
    keys = {}
    for name, text in changed.items():
        (tmp_path / f"{name}.py").write_text(text)
        # Under one name, as the module's is part of the source's.
        (tmp_path / "source.py").write_text(text)
        keys[name] = run(tmp_path, tmp_path / "source.py")
    assert keys["same"] == keys["moved"] == keys["commented"]
    assert len(set(keys.values())) == 3


def test_refuses_a_grid_that_no_gpu_has(tmp_path):
    (tmp_path / "grid.py").write_text(
        "import torch, triton\n"
        "from fastgan.benchmarks.compile_driver import TARGETS, recorded\n"
        "@triton.jit\n"
        "def kernel(x_ptr):\n"
        "    pass\n"
        "with recorded(TARGETS['sm_80']):\n"
        "    kernel[(1, 65536)](torch.empty(1, device='meta'))\n"
    )
    with pytest.raises(AssertionError, match="grid of 1x65536x1 programs"):
        run(tmp_path, tmp_path / "grid.py")


def test_does_not_compile_where_kernels_are_interpreted(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastgan.benchmarks.compiled", "--check"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


def test_every_kernel_keeps_the_rules(tmp_path):
    made = json.loads(LEDGER.read_text())["versions"]["triton"]
    here = importlib.metadata.version("triton")
    if made != here:
        pytest.skip(f"the ledger is triton {made}'s, and here is {here}")
    run(tmp_path, "-m", "fastgan.benchmarks.compiled", "--check")
