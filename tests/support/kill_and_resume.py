"""Kill a training run with SIGKILL again and again, and compare its end with that of a run left
alone.

    python tests/support/kill_and_resume.py --kills 25

The moments: while the process starts, between checkpoints, and while a checkpoint is being written.
Exits with 0 if the weights, the optimisers' state, the grids and the metrics are equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch

SAVE_EVERY = 5
CHECKPOINTS_A_KILL = 6
SETTINGS = (
    *("--data", "digits", "--image-size", "28", "--ngf", "24", "--ndf", "8", "--nz", "16"),
    *("--batch-size", "8", "--flip", "--save-every", str(SAVE_EVERY), "--sample-every", "25"),
    *("--log-every", "1", "--keep", "2", "--seed", "5"),
)


def start(out: Path, steps: int, backend: str) -> subprocess.Popen[bytes]:
    # A run keeps the backend that it began with.
    begun = (out / "config.yaml").exists()
    resume = ["--resume"] if begun else [*SETTINGS, "--backend", backend]
    command = [sys.executable, "-m", "fastgan", "train", "--out", str(out), "--steps", str(steps)]
    return subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(out: Path, steps: int, backend: str) -> None:
    process = start(out, steps, backend)
    _, complaint = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {complaint.decode()}")


def wait_for(process: subprocess.Popen[bytes], out: Path, mode: str, draw: random.Random) -> None:
    """Return at the moment to kill, or when the process has ended by itself."""
    checkpoints = out / "checkpoints"
    if mode == "starting":
        time.sleep(draw.uniform(0.0, 4.0))
        return
    before = newest(checkpoints)
    ahead = SAVE_EVERY * draw.randint(1, CHECKPOINTS_A_KILL)
    while process.poll() is None:
        if newest(checkpoints) >= before + ahead:
            if mode == "training":
                time.sleep(draw.uniform(0.0, 0.05))
                return
            if caught_writing(process, checkpoints, draw):
                return
        time.sleep(0.0 if mode == "writing" else 0.001)


def caught_writing(
    process: subprocess.Popen[bytes], checkpoints: Path, draw: random.Random
) -> bool:
    """Whether the process is stopped halfway through a checkpoint."""
    if not list(checkpoints.glob(".tmp-step-*")):
        return False
    time.sleep(draw.uniform(0.0, 0.003))
    process.send_signal(signal.SIGSTOP)
    if list(checkpoints.glob(".tmp-step-*")):
        return True
    process.send_signal(signal.SIGCONT)
    return False


def newest(checkpoints: Path) -> int:
    return max((int(p.name[5:]) for p in checkpoints.glob("step-*")), default=0)


def kill_one(out: Path, steps: int, backend: str, mode: str, draw: random.Random) -> str:
    process = start(out, steps, backend)
    wait_for(process, out, mode, draw)
    if process.poll() is not None:
        complaint = process.stderr.read().decode() if process.stderr else ""
        raise SystemExit(f"ended by itself with {process.returncode}: {complaint}")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    half_written = bool(list((out / "checkpoints").glob(".tmp-step-*")))
    return "while writing a checkpoint" if half_written else mode


def differences(want: Path, got: Path, steps: int) -> list[str]:
    found = []
    a, b = (run / "checkpoints" / f"step-{steps:06d}" for run in (want, got))
    for name in ("netG", "netD", "ema"):
        left, right = (safetensors.torch.load_file(p / f"{name}.safetensors") for p in (a, b))
        found += [f"{name} {key}" for key in left if not torch.equal(left[key], right[key])]
    states = [torch.load(p / "state.pt", weights_only=True) for p in (a, b)]
    found += [] if equal(*states) else ["state.pt"]
    for path in sorted((want / "samples").iterdir()):
        if path.read_bytes() != (got / "samples" / path.name).read_bytes():
            found.append(path.name)
    found += [] if metrics(want) == metrics(got) else ["metrics.jsonl"]
    found += [str(p) for p in (got / "checkpoints").glob(".*")]
    return found


def metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timing = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in timing} for row in rows]


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    # Enough that no run can end before its last kill.
    steps = SAVE_EVERY * (CHECKPOINTS_A_KILL + 14) * args.kills
    folder = Path(tempfile.mkdtemp(prefix="fastgan-kill-"))
    os.environ["FASTGAN_CACHE"] = str(folder / "cache")
    moments: Counter[str] = Counter()
    try:
        killed, alone = folder / "killed", folder / "alone"
        for i in range(args.kills):
            mode = ("writing", "training", "starting", "writing", "training")[i % 5]
            moments[kill_one(killed, steps, args.backend, mode, draw)] += 1
        at = newest(killed / "checkpoints")
        steps = at + 4 * SAVE_EVERY
        finish(killed, steps, args.backend)
        finish(alone, steps, args.backend)
        found = differences(alone, killed, steps)
        if args.kills and not moments["while writing a checkpoint"]:
            found.append("the kills: none came while a checkpoint was being written")
        print(f"{args.kills} kills ({dict(moments)}), {steps} steps: ", end="")
        print(f"differences in {', '.join(found)}" if found else "equal to the bit")
        return 1 if found else 0
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
