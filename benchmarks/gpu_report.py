"""What ``gpu_check`` found, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastgan.benchmarks import report

Record = dict[str, Any]


def markdown(record: Record) -> str:
    """The record of :class:`fastgan.benchmarks.gpu_check.Check`, a section for each part."""
    lines = [f"# GPU check, {record['started']}", ""]
    if record["dry_run"]:
        lines += ["A dry run on the CPU, the kernels interpreted: its times say nothing.", ""]
    if record["interrupted"]:
        lines += ["Interrupted: what follows is what was done before.", ""]
    lines += report.markdown_table(
        ("part", "result", "seconds", ""),
        (
            (name, entry["status"], _number(entry.get("seconds"), ".0f"), entry.get("reason", ""))
            for name, entry in record["parts"].items()
        ),
    )
    for name, write in _SECTIONS.items():
        result = record["parts"].get(name, {}).get("result")
        if result:
            lines += ["", f"## {name}", "", *write(result)]
    return "\n".join([*lines, ""])


def _machine(result: Record) -> Iterator[str]:
    facts = {**result["machine"], **(result["nvidia_smi"] or {"nvidia-smi": "not there"})}
    for name, value in facts.items():
        text = f"{value:.1f}" if isinstance(value, float) else str(value)
        yield f"- {name}: {text}"


def _tests(result: Record) -> list[str]:
    rows = (
        (name, entry["status"], entry.get("summary", entry.get("reason", "")))
        for name, entry in result["files"].items()
    )
    lines = report.markdown_table(("file", "result", ""), rows)
    for name, entry in result["files"].items():
        if entry.get("output"):
            lines += ["", f"{name}:", "", "```", *entry["output"], "```"]
    return lines


def _compile(result: Record) -> Iterator[str]:
    failed = [row for row in result["rows"] if row["reason"]]
    yield f"{len(result['rows']) - len(failed)} steps compiled and ran, {len(failed)} did not."
    for row in failed:
        yield f"- {row['cell']}, {row['precision']}, tile {row['tile']}: {row['reason']}"


def _step(result: Record) -> list[str]:
    own = list(result["rows"][0]["own"]) if result["rows"] else []
    rows = [
        (
            row["precision"],
            row["kind"],
            _number(row["reference"], ".1e"),
            *(_number(row["own"][name], ".1e") for name in own),
            _number(row["limit"], ".1e"),
            "" if row["right"] else "wrong",
        )
        for row in result["rows"]
    ]
    head = ("", "largest difference from float64", "reference", *own, "allowed", "")
    said = (
        f"{result['cell']}. The kernels may differ from float64 by {result['limit']:g} times what "
        "plain torch on the same device differs by."
    )
    return [said, "", *report.markdown_table(head, rows)]


def _capture(result: Record) -> list[str]:
    rows = []
    for row in result["rows"]:
        differ = row.get("differ", [])
        wrong = [f"{len(differ)} differ, {differ[0]} first"] if differ else []
        wrong += [row[key] for key in ("uncaptured", "reason") if row.get(key)]
        both = _number(row.get("us_uncaptured"), ".0f"), _number(row.get("us"), ".0f")
        counts = (_number(row.get(key), "d") for key in ("captures", "growth"))
        rows.append((row["backend"], row["precision"], *counts, *both, "; ".join(wrong)))
    said = (
        f"{result['cell']}. After {result['steps']} steps with batches of two sizes, all that a "
        f"checkpoint holds is to be the same to the bit; {result['replays']:,} replays may take no "
        "memory."
    )
    head = ("backend", "precision", "graphs", "bytes taken", "µs uncaptured", "µs captured", "")
    return [said, "", *report.markdown_table(head, rows)]


def _ops(result: Record) -> list[str]:
    lines = [
        "Reached here: "
        + "; ".join(
            f"{name} matrix products {rates['tflop_s']:.3g} TFLOP/s, copies "
            f"{rates['gb_s'] / 1e3:.3g} TB/s"
            for name, rates in result["rates"].items()
        )
        + ". The share of the roofline is of the longer of the two times that these allow, each "
        "operand moved once; what fits the L2 cache can be moved faster, and the share be above "
        "1. FLOP are those of the direct convolution. Launches are not in the times. An error "
        "from float64 by norm of at most "
        + ", ".join(f"{limit:.1e} ({name})" for name, limit in result["limits"].items())
        + " is allowed.",
        "",
    ]
    if result.get("withheld"):
        lines += [f"No speeds of fastgan's own: {result['withheld']}.", ""]
    head = ("way", "error", "µs", "TFLOP/s", "of roofline", "")
    return [
        *lines,
        *_backends(result["rows"]),
        *report.markdown_table(
            (*_SHAPE, *head), (cells for row in result["rows"] for cells in _op_rows(row))
        ),
    ]


# Of a row of `ops`.
_SHAPE = ("layer", "direction", "precision")
_BACKENDS = ("torch", "triton", "cuda")


def _backends(rows: Sequence[Record]) -> list[str]:
    """The fastest way of each backend, with how many times as fast as torch's it is."""
    best = [(row, _fastest_by_backend(row)) for row in rows]
    names = [name for name in _BACKENDS if any(name in found for _, found in best)]
    if len(names) < 2:
        return []
    lines = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        of_precision = [found for row, found in best if row["precision"] == precision]
        lines += [f"{precision}: {_summary(of_precision, names)}.", ""]
    header = [*_SHAPE, names[0]]
    for name in names[1:]:
        header += [name, "times torch's speed"]
    return [
        *lines,
        *report.markdown_table(header, (_backend_row(row, found, names) for row, found in best)),
        "",
    ]


def _fastest_by_backend(row: Record) -> dict[str, tuple[float, str]]:
    """Of each backend that has a time: µs and the label of the way."""
    found: dict[str, tuple[float, str]] = {}
    for label, way in row["ways"].items():
        if "us" in way:
            one = way["us"], label
            found[way["backend"]] = min(one, found.get(way["backend"], one))
    return found


def _summary(best: Sequence[Mapping[str, tuple[float, str]]], names: Sequence[str]) -> str:
    """The geometric mean of the speed as a multiple of torch's, and where a backend is fastest."""
    parts = []
    for name in names[1:]:
        both = (found for found in best if found.keys() >= {"torch", name})
        ratios = [found["torch"][0] / found[name][0] for found in both]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            parts.append(f"{name} {mean:.2f} times torch's speed, geometric mean of {len(ratios)}")
    won = [min(found, key=lambda name: found[name][0]) for found in best if found]
    wins = (f"{name} {won.count(name)}" for name in names)
    return "; ".join((*parts, f"fastest: {', '.join(wins)}"))


def _backend_row(
    row: Record, found: Mapping[str, tuple[float, str]], names: Sequence[str]
) -> list[str]:
    cells = [row[key] for key in _SHAPE]
    for name in names:
        us, label = found.get(name, (None, ""))
        best = bool(found) and us == min(us for us, _ in found.values())
        text = f"{us:.1f} µs, {label}" if us is not None else ""
        cells.append(f"**{text}**" if best else text)
        if name != names[0]:
            torch = found.get("torch")
            cells.append(f"{torch[0] / us:.2f}" if torch and us is not None else "")
    return cells


def _op_rows(row: Record) -> Iterator[Sequence[str]]:
    timed = [found["us"] for found in row["ways"].values() if "us" in found]
    for way, found in row["ways"].items():
        fastest = "us" in found and found["us"] == min(timed)
        yield (
            row["layer"],
            row["direction"],
            row["precision"],
            way,
            _number(found.get("error"), ".1e"),
            _number(found.get("us"), ".1f"),
            _number(found.get("tflop_s"), ".1f"),
            _number(found.get("of_roofline"), ".2f"),
            found.get("reason", "fastest" if fastest else ""),
        )


def _passes(result: Record) -> list[str]:
    limits = ", ".join(f"{limit:.1e} ({name})" for name, limit in result["limits"].items())
    lines = [
        f"A copy moves {result['gb_s'] / 1e3:.3g} TB/s here; `of a copy` is the share of that at "
        "which what has to be read and written was. Forward and backward. Launches are not in the "
        f"times. An error from float64 by norm of at most {limits} is allowed.",
        "",
    ]
    if result.get("withheld"):
        lines += [f"No speeds of fastgan's own: {result['withheld']}.", ""]
    rows = []
    for row in result["rows"]:
        timed = [found["us"] for found in row["ways"].values() if "us" in found]
        for way, found in row["ways"].items():
            fastest = "us" in found and found["us"] == min(timed)
            rows.append(
                (
                    *(row["what"], row["precision"], way, _number(found.get("error"), ".1e")),
                    *(_number(found.get("us"), ".1f"), _number(found.get("of_copy"), ".2f")),
                    found.get("reason", "fastest" if fastest else ""),
                )
            )
    head = ("op", "precision", "way", "error", "µs", "of a copy", "")
    return lines + report.markdown_table(head, rows)


def _bench(result: Record) -> list[str]:
    lines = [f"{report.precision(result['machine'])}. Check: {result['check']}.", ""]
    if result.get("withheld"):
        lines += [f"No speeds of fastgan: {result['withheld']}.", ""]
    peak = result["measured"]["sgemm_gflop_s"]
    for cell in result["cells"]:
        lines += ["```", report.table(cell, peak), "```"]
    return lines


_SECTIONS = {
    "machine": _machine,
    "tests": _tests,
    "compile": _compile,
    "step": _step,
    "capture": _capture,
    "bench": _bench,
    "accelerate": _bench,
    "passes": _passes,
    "ops": _ops,
}


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
