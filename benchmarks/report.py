"""What ``fastgan bench`` shows of its figures: the machine, a table for each cell, a chart."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from fastgan.benchmarks.plan import OTHERS, Cell

_INK, _GREY, _PALE = "#22272e", "#6e7781", "#d8dee4"
_COLOURS = {"example": "#b6bec8", "compile": "#8796a8", "fastgan": "#1f6feb"}
# Inches: a panel's width, a bar with the gap to the next, what is between panels.
_PANEL, _BAR, _BETWEEN = 6.4, 0.34, 0.75
_CAPTION_WIDTH = 105  # characters a panel's width


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [*map(markdown_row, (head, ["---"] * len(head))), *map(markdown_row, rows)]


def markdown_row(cells: Sequence[str]) -> str:
    """A line of it; a bar in a cell is no end of the cell."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def machine_lines(record: dict[str, Any]) -> list[str]:
    """The machine and its measured rates, a line each."""
    machine, measured = record["machine"], record["measured"]
    on = "" if machine["device"] == "cpu" else f", {machine['device']}"
    lines = [
        f"{machine['cpu']} ({machine['instruction_set']}){on}, {_count(machine['cpus'], 'CPU')}, "
        f"{_count(machine['threads'], 'thread')}, {machine['system']}, Python {machine['python']}, "
        f"torch {machine['torch']}, fastgan {machine['fastgan']}",
        f"{precision(machine)}; measured here: sgemm "
        f"{measured['sgemm_gflop_s']:.0f} GFLOP/s, copy {measured['copy_gb_s']:.1f} GB/s",
    ]
    if measured["load"] is not None:
        lines[1] += f"; load average before the start {measured['load']:.1f}"
    return lines


def precision(machine: dict[str, Any]) -> str:
    """What float32 was, of which GPUs have more than one; torch's ``none`` is its own rounding."""
    taken = machine.get("fp32_precision", {})
    names = {"tf32": "in TF32", "ieee": "in float32", "none": "in float32"}
    said = [f"{what} {names.get(how, how)}" for what, how in taken.items()]
    if machine.get("cudnn_benchmark"):
        said.append("cuDNN picks its kernels by measurement")
    return f"float32 ({', '.join(said)}; for every variant)" if said else "float32"


def table(cell: dict[str, Any], sgemm_gflop_s: float) -> str:
    """One cell of ``bench.json`` as text.

    Args:
        cell: as :func:`fastgan.benchmarks.bench_engine.measure_cell` returns it: the fields of
            :class:`~fastgan.benchmarks.plan.Cell`; ``gflop_per_step``; ``rounds``; ``rounding``,
            the yardstick of the check by kind; ``variants``, each with ``name``, ``status``
            (``ok``, ``differs`` or ``cannot run``) and ``reason`` or, where it is ok,
            ``images_per_second`` (``median``, ``p10``, ``p90``), ``ratio`` to ``ratio_to``,
            ``gflop_per_second``, ``seconds_per_step`` of each round; where it was checked,
            ``limits`` by kind, and ``own_limits`` where they are not the check's.
        sgemm_gflop_s: the peak that fractions are of.
    """
    width = max(len(v["name"]) for v in cell["variants"])
    lines = [
        f"{_title(cell)}: {cell['gflop_per_step']:.4g} GFLOP a step, "
        f"{_count(cell['rounds'], 'round')}",
        f"  {'':<{width}}{'img/s':>10}   {'10 to 90 %':<18}{'GFLOP/s':>8}{'of sgemm':>10}  ratio",
    ]
    for variant in cell["variants"]:
        start = f"  {variant['name']:<{width}}"
        if variant["status"] != "ok":
            lines.append(f"{start}  no figure: {variant['reason']}")
            continue
        speed = variant["images_per_second"]
        spread = f"[{speed['p10']:.1f}, {speed['p90']:.1f}]"
        ratio = "" if variant["name"] == OTHERS[0] else f"  {_ratio(variant)}"
        lines.append(
            f"{start}{speed['median']:>10.1f}   {spread:<18}{variant['gflop_per_second']:>8.1f}"
            f"{variant['gflop_per_second'] / sgemm_gflop_s:>10.2f}{ratio}"
        )
    for variant in cell["variants"]:
        if variant.get("own_limits"):
            limits = ", ".join(f"{size:g} ({kind})" for kind, size in variant["limits"].items())
            lines.append(
                f"  {variant['name']} was allowed to differ from the example by {limits}: the "
                "rounding of bfloat16"
            )
    return "\n".join(lines)


def chart(record: dict[str, Any]) -> bytes:
    """The figures of ``bench.json`` as a PNG: a panel for each cell, a bar for each variant.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.figure import Figure

    cells = record["cells"]
    columns = min(len(cells), 2 if len(cells) <= 4 else 3)
    rows = -(-len(cells) // columns)
    bars = max(len(cell["variants"]) for cell in cells)
    wrap = _CAPTION_WIDTH * columns
    caption = [line for text in machine_lines(record) for line in textwrap.wrap(text, wrap)]
    head, foot = 0.8, 0.3 + 0.15 * len(caption)
    height = head + rows * (bars * _BAR + _BETWEEN) + foot
    figure = Figure(figsize=(_PANEL * columns, height), dpi=150, facecolor="white")
    left = 0.2 / figure.get_figwidth()
    title: dict[str, Any] = {"x": left, "va": "top"}
    figure.text(
        y=1 - 0.2 / height, s="DCGAN training, images a second", **title,
        fontsize=13, fontweight="bold", color=_INK,
    )  # fmt: skip
    figure.text(
        y=1 - 0.46 / height,
        s="The whole step: median, 10th to 90th percentile; ratio to the example, fastgan's to the "
        "best of the others",
        **title, fontsize=8, color=_GREY,
    )  # fmt: skip
    text = "\n".join(caption)
    figure.text(left, 0.15 / height, text, fontsize=7, color=_GREY, va="bottom", linespacing=1.3)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_visible(False)
    for axes, cell in zip(panels, cells, strict=False):
        axes.set_visible(True)
        _panel(axes, cell)
    figure.tight_layout(rect=(0, foot / height, 1, 1 - head / height), h_pad=1.2, w_pad=2.0)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _panel(axes: Any, cell: dict[str, Any]) -> None:
    variants = cell["variants"]
    fastest = max(v["images_per_second"]["p90"] for v in variants if v["status"] == "ok")
    for i, variant in enumerate(variants):
        if variant["status"] != "ok":
            text = textwrap.shorten(f"no figure: {variant['reason']}", 60, placeholder=" …")
            axes.text(fastest * 0.01, i, text, va="center", fontsize=8, style="italic", color=_GREY)
            continue
        speed = variant["images_per_second"]
        median, p10, p90 = (speed[name] for name in ("median", "p10", "p90"))
        axes.barh(i, median, height=0.66, color=_COLOURS[variant["name"].split()[0]])
        axes.errorbar(
            median, i, xerr=[[median - p10], [p90 - median]],
            ecolor=_INK, elinewidth=1, capsize=3, capthick=1,
        )  # fmt: skip
        label = f"{median:,.0f}" if median >= 100 else f"{median:.1f}"
        if variant["name"] != OTHERS[0]:
            label += f"  ({variant['ratio']:.2f}x)"
        axes.text(p90 + fastest * 0.02, i, label, va="center", fontsize=9, color=_INK)
    axes.set_yticks(range(len(variants)), [v["name"] for v in variants], fontsize=9, color=_INK)
    axes.set_ylim(len(variants) - 0.4, -0.6)
    axes.set_xlim(0, fastest * 1.35)
    axes.set_title(_title(cell), loc="left", fontsize=10, color=_INK)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, labelcolor=_GREY, length=0)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.grid(axis="x", color=_PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.spines["left"].set(visible=True, color=_PALE)


def _title(cell: dict[str, Any]) -> str:
    names = ("image_size", "nc", "batch_size", "ngf", "ndf")
    return str(Cell(**{name: cell[name] for name in names}))


def _ratio(variant: dict[str, Any]) -> str:
    return f"{variant['ratio']:.2f}x {variant['ratio_to']}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")
