"""Everything about fastgan that takes a GPU to find out, in one command, within ten minutes.

``python -m fastgan.benchmarks.gpu_check --output gpu_check.json --markdown gpu_check.md``

Its parts run one after another, each in a process of its own with a time limit, so that a kernel
which crashes or hangs costs its own part only. What a part found is in the JSON file at once. The
parts that check come first, and what they found wrong gets no speeds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastgan.benchmarks.gpu_report import markdown

from fastgan.cli import BAD_INPUT, DONE, FAILED, INTERRUPTED
from fastgan.errors import InputError
from fastgan.files import replace_file

# In this order: the file of each, and what it is about.
TESTS = (
    *("triton*", "conv", "bn_act", "gan_loss", "augment", "block", "engine", "parity"),
    *("accelerate",),
)
# Of these the ops' speeds depend, of the others only those of the whole step.
_KERNEL_TESTS = ("triton", "conv", "bn_act", "gan_loss", "augment", "block")
_DRY_RUN_TESTS = ("augment",)
_QUICK_TESTS = ("triton*",)
_MINUTES = 10.0
# Of compute-sanitizer: accesses beyond what was allocated, and races within a block.
_CHECKERS = ("memcheck", "racecheck")
# Kept for writing down what was found.
_RESERVE_S = 10.0
_TAIL = 30  # lines of output that are kept of what failed

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing to find out.

    Attributes:
        name: of the part.
        what: it is, a few words.
        seconds: its share of the time; what a part leaves, those after it may use.
        run: does it; returns its entry in the record, see :class:`Check`.
    """

    name: str
    what: str
    seconds: float
    run: Callable[[Check, float], Record]


class Check:
    """The parts, and the record of them.

    Args:
        parts: those to run.
        output: where the record is written, after each part.
        dry_run, quick: as the command's options.
        minutes: for all parts together.
        say: takes a line on what is being done.

    Attributes:
        record: ``parts`` has, by name, ``status`` (``passed``, ``failed``, ``skipped``,
            ``unfinished``), ``reason``, ``seconds`` and ``result``, what the part found.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        output: Path,
        *,
        dry_run: bool = False,
        quick: bool = False,
        minutes: float = _MINUTES,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.dry_run, self.quick = dry_run, quick
        self._parts, self._output, self._say = parts, output, say
        self._deadline = time.monotonic() + 60 * minutes - _RESERVE_S
        self.record: Record = {
            "check": "fastgan gpu_check",
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "dry_run": dry_run,
            "quick": quick,
            "interrupted": False,
            "parts": {},
        }

    def run(self) -> int:
        """Run the parts; returns the exit code."""
        entries = self.record["parts"]
        try:
            for i, part in enumerate(self._parts):
                self._say(f"{part.name}: {part.what}")
                entries[part.name] = {"status": "unfinished", "reason": "interrupted"}
                started = time.monotonic()
                entries[part.name] = self._entry(part, self._share(i))
                entries[part.name]["seconds"] = time.monotonic() - started
                self.save()
                self._say(f"{part.name}: {_outcome(entries[part.name])}")
        except KeyboardInterrupt:
            self.record["interrupted"] = True
            self.save()
            return INTERRUPTED
        wrong = {"failed", "unfinished"}
        return FAILED if any(e["status"] in wrong for e in entries.values()) else DONE

    def save(self) -> None:
        replace_file(self._output, json.dumps(self.record, indent=1).encode())

    def keep(self, name: str, entry: Record) -> None:
        """Write down what part ``name`` has so far."""
        self.record["parts"][name] = entry
        self.save()

    def withheld(self, of_step: bool) -> str:
        """Why no speeds are reported of the kernels or, with ``of_step``, of the whole step."""
        reasons = []
        tests = self.record["parts"].get("tests", {})
        for name, found in tests.get("result", {}).get("files", {}).items():
            about = name.removeprefix("test_").removesuffix(".py")
            if found["status"] == "failed" and (of_step or about.startswith(_KERNEL_TESTS)):
                reasons.append(f"{name} failed")
        watched = self.record["parts"].get("sanitizer", {})
        if watched.get("status") == "failed":
            reasons.append(f"compute-sanitizer: {watched['reason']}")
        if of_step and self.record["parts"].get("step", {}).get("status") == "failed":
            reasons.append("the step by the kernels failed its check")
        if of_step and self.record["parts"].get("capture", {}).get("status") == "failed":
            reasons.append("captured steps failed their check")
        return "; ".join(reasons)

    def _share(self, i: int) -> float:
        """Seconds that part ``i`` may take."""
        left = self._deadline - time.monotonic()
        return left * self._parts[i].seconds / sum(part.seconds for part in self._parts[i:])

    def _entry(self, part: Part, seconds: float) -> Record:
        if seconds <= 0.0:
            return {"status": "unfinished", "reason": "the time was up; run it alone with --only"}
        try:
            return part.run(self, seconds)
        except Exception as error:  # one part's failure is not the end of the others
            return {"status": "failed", "reason": f"{type(error).__name__}: {_one_line(error)}"}


def _outcome(entry: Record) -> str:
    reason = f": {entry['reason']}" if entry.get("reason") else ""
    return f"{entry['status']}{reason}"


def run_in_child(name: str, check: Check, seconds: float, *, of_step: bool = False) -> Record:
    """Run a part of :mod:`fastgan.benchmarks.gpu_parts`, and keep what it finds as it finds it."""
    command = [sys.executable, "-m", "fastgan.benchmarks.gpu_parts", name]
    command += ["--dry-run"] * check.dry_run + ["--quick"] * check.quick
    if reason := check.withheld(of_step):
        command += ["--without-own", reason]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"{name}.json"
        done: tuple[int | None, str] = (None, "")
        try:
            done = run_command([*command, "--out", str(out)], seconds, check.dry_run)
        finally:
            result = json.loads(out.read_bytes()) if out.exists() else {}
            entry = _judged(*done, seconds)
            check.keep(name, {**entry, "result": result})
    # Only a check can fail without an error: what was wrong is in the result.
    if entry["status"] == "failed" and done[0] == 1 and result and not _traceback(done[1]):
        entry = {"status": "failed", "reason": "something differs, see its table"}
    return {**entry, "result": result}


def _judged(code: int | None, output: str, seconds: float) -> Record:
    if code == 0:
        return {"status": "passed"}
    lines = output.splitlines()[-_TAIL:]
    if code is None:
        return {
            "status": "unfinished",
            "reason": f"stopped after {seconds:.0f} s",
            "output": lines,
        }
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return {"status": "failed", "reason": f"exit code {code}: {last}", "output": lines}


def _traceback(output: str) -> bool:
    return "Traceback (most recent call last)" in output


def run_command(
    command: Sequence[str], seconds: float, dry_run: bool, **environment: str
) -> tuple[int | None, str]:
    """The exit code of ``command``, None where its time was up, and its output.

    It and all that it started are killed when its time is up or this process is interrupted.
    """
    variables = {**os.environ, **environment}
    variables.pop("TRITON_INTERPRET", None)
    if dry_run:
        variables["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        _kill(process)
        return None, process.communicate()[0]
    except BaseException:
        _kill(process)
        process.wait()
        raise


def _kill(process: subprocess.Popen[str]) -> None:
    # Its own session: the workers that it started go with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_tests(check: Check, seconds: float) -> Record:
    """The GPU's tests, a file at a time; where there is a GPU they run on it."""
    root = Path(__file__).resolve().parents[1]
    names = _DRY_RUN_TESTS if check.dry_run else _QUICK_TESTS if check.quick else TESTS
    found = [p for name in names for p in sorted((root / "tests").glob(f"test_{name}.py"))]
    if not found:
        wanted = ", ".join(f"test_{name}.py" for name in names)
        reason = f"there is no {wanted} at {root / 'tests'}; run it from a checkout"
        return {"status": "skipped", "reason": reason}
    files: dict[str, Record] = {}
    ends = time.monotonic() + seconds
    for path in found:
        left = ends - time.monotonic()
        if left <= 0.0:
            files[path.name] = {"status": "unfinished", "reason": "the time was up"}
            continue
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        started = time.monotonic()
        code, output = run_command([*command, str(path)], left, check.dry_run)
        entry = _judged(code, output, left)
        lines = [line for line in output.splitlines() if line.strip()]
        entry |= {"seconds": time.monotonic() - started, "summary": lines[-1] if lines else ""}
        files[path.name] = entry
        check.keep("tests", {"status": "unfinished", "result": {"files": files}})
    by_status = {
        status: [name for name, entry in files.items() if entry["status"] == status]
        for status in ("failed", "unfinished")
    }
    status = next((status for status, names in by_status.items() if names), "passed")
    reason = "; ".join(f"{key}: {', '.join(v)}" for key, v in by_status.items() if v)
    return {"status": status, "reason": reason, "result": {"files": files}}


def run_sanitizer(check: Check, seconds: float) -> Record:
    """A tiny step under compute-sanitizer, which watches each access to memory."""
    if check.dry_run:
        return {"status": "skipped", "reason": "it watches GPUs"}
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"status": "skipped", "reason": "compute-sanitizer is not on the PATH"}
    ends = time.monotonic() + seconds
    for checker in _CHECKERS:
        left = ends - time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            command = [tool, "--tool", checker, "--error-exitcode", "9", sys.executable, "-m"]
            command += ["fastgan.benchmarks.gpu_parts", "kernels", "--out", f"{folder}/out.json"]
            # torch's own pool would hide an access beyond a tensor.
            done = run_command(command, left, False, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        entry = _judged(*done, left)
        if entry["status"] != "passed":
            return {**entry, "reason": f"{checker}: {entry['reason']}"}
    return entry


def _machine(check: Check, seconds: float) -> Record:
    return run_in_child("machine", check, seconds)


def _compile(check: Check, seconds: float) -> Record:
    if check.dry_run:
        return {"status": "skipped", "reason": "the interpreter compiles nothing"}
    return run_in_child("compile", check, seconds)


def _step(check: Check, seconds: float) -> Record:
    return run_in_child("step", check, seconds)


def _capture(check: Check, seconds: float) -> Record:
    return run_in_child("capture", check, seconds, of_step=True)


def _ops(check: Check, seconds: float) -> Record:
    return run_in_child("ops", check, seconds)


def _passes(check: Check, seconds: float) -> Record:
    return run_in_child("passes", check, seconds)


def _bench(check: Check, seconds: float) -> Record:
    return run_in_child("bench", check, seconds, of_step=True)


def _accelerate(check: Check, seconds: float) -> Record:
    return run_in_child("accelerate", check, seconds, of_step=True)


PARTS = (
    Part("machine", "the GPU, its driver and clocks, the versions", 20.0, _machine),
    Part("tests", "the tests, natively", 120.0, run_tests),
    Part("sanitizer", "tiny steps under compute-sanitizer", 50.0, run_sanitizer),
    Part("compile", "the kernels of the parts after it", 100.0, _compile),
    Part("step", "the whole step against float64", 40.0, _step),
    Part("capture", "steps replayed from CUDA graphs", 40.0, _capture),
    Part("bench", "images a second of the whole step", 160.0, _bench),
    Part("accelerate", "the example's loop on accelerated networks", 30.0, _accelerate),
    Part("passes", "batch norm, loss and images, each way", 20.0, _passes),
    Part("ops", "each convolution of DCGAN-64, each way", 80.0, _ops),
)


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            "torch sees no GPU; --dry-run runs what can be run on the CPU, with the kernels "
            "interpreted"
        )


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A SIGTERM, as a job's time limit sends it, is a Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Check and measure fastgan on this machine's GPU; returns the exit code.

    0 where all passed, 1 where a part failed or did not finish, 2 without a GPU or with wrong
    arguments, 130 when interrupted.
    """
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser("gpu_check", description=(main.__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"), help="JSON file")
    parser.add_argument("--markdown", type=Path, help="a file for the tables, too")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="a few minutes: fewer of everything")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="for all (10)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, tiny")
    args = parser.parse_args(argv)
    try:
        if args.minutes <= 0.0:
            raise InputError(f"--minutes {args.minutes:g} must be greater than 0")
        if not args.dry_run:
            _require_gpu()
    except InputError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return BAD_INPUT
    check = Check(
        [part for part in PARTS if not args.only or part.name in args.only],
        args.output,
        dry_run=args.dry_run,
        quick=args.quick,
        minutes=args.minutes,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    with _terminated_as_interrupted():
        code = check.run()
    text = markdown(check.record)
    print(text)
    if args.markdown is not None:
        replace_file(args.markdown, text.encode())
    print(f"Wrote {args.output}", file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)


if __name__ == "__main__":
    raise SystemExit(main())
