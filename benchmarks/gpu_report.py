"""What ``gpu_check`` found, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    return lines + report.markdown_table(
        ("layer", "direction", "precision", "way", "error", "µs", "TFLOP/s", "of roofline", ""),
        (cells for row in result["rows"] for cells in _op_rows(row)),
    )


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
    "bench": _bench,
    "passes": _passes,
    "ops": _ops,
}


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
