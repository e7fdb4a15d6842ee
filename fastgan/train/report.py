"""``report.html``: one page with a run's settings, curves and samples, complete in itself."""

from __future__ import annotations

import base64
import html
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgan.train.run import sample_step
from fastgan.train.samples import thin

MAX_POINTS = 600
MAX_PICTURES = 12
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 256, 56, 28, 26
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
# What a verdict colours the timeline with; a bad one that is not named, the last.
_STATES = {"starting": "#ddd", "healthy": "#9fd8a4", "D too strong": "#f2c879"}
_STATES |= {"G too strong": "#f2c879", "": "#e59a9a"}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff; }
h1 { font-size: 1.6em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } td { padding: 2px 16px 2px 0; vertical-align: top; }
td:first-child { color: #666; } svg { width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: #555; }
.timeline { display: grid; gap: 16px;
            grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); }
figure { margin: 0; } figure img { width: 100%; image-rendering: pixelated; }
figcaption { color: #666; font-size: 13px; }
"""


def render_report(
    title: str,
    summary: Mapping[str, Any],
    settings: Mapping[str, Any],
    metrics: Sequence[Mapping[str, float]],
    samples: Sequence[Path],
    *,
    skipped: Sequence[tuple[str, str]] = (),
    health: Sequence[Mapping[str, Any]] = (),
    quality: Sequence[Mapping[str, Any]] = (),
    neighbours: Path | None = None,
) -> str:
    """The page.

    Args:
        title: heading.
        summary: what came of the run, name to value.
        settings: its configuration, name to value.
        metrics: the lines of ``metrics.jsonl``.
        samples: grids in order of their steps, named ``step-NNNNNN.png``.
        skipped: ``(name, reason)`` of images that could not be used.
        health: the lines of ``health.jsonl``.
        quality: those of ``quality.jsonl``.
        neighbours: the picture of samples beside the real images nearest to them.
    """
    losses = {"loss D": "loss_d", "loss G": "loss_g"}
    scores = {"D(x)": "d_real", "D(G(z)) before": "d_fake", "D(G(z)) after": "d_fake_g"}
    # Only those of the losses that are probabilities lie in [0, 1].
    bounds = (0.0, 1.0) if settings.get("loss", "bce") in ("bce", "minimax") else (None, None)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>",
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>{_table(summary)}",
        f"<h2>Losses</h2>{_chart(metrics, losses)}",
        "<h2>What D thinks</h2><p>The mean of D over real images, D(x), and over samples, D(G(z)), "
        "before and after D's update. A D that wins has them near 1 and 0; a G that wins has both "
        f"near 0.5.</p>{_chart(metrics, scores, *bounds)}",
        *_health(metrics, health),
        *_quality(quality, neighbours),
        f"<h2>Samples, from the same noise</h2><div class=timeline>{_timeline(samples)}</div>",
        f"<h2>Settings</h2>{_table(settings)}",
    ]
    if skipped:
        parts.append(f"<h2>Skipped images ({len(skipped)})</h2>{_table(dict(skipped))}")
    return "\n".join(parts) + "\n</html>\n"


def _health(
    metrics: Sequence[Mapping[str, float]], health: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The section on the run's health; nothing for a run that was not monitored."""
    rows = [row for row in metrics if "spread" in row]
    if not rows:
        return []
    samples = {"spread": "spread", "coverage": "coverage", "near duplicates": "duplicates"}
    accuracy = {"on real images": "accuracy_real", "on samples": "accuracy_fake"}
    gradients = {"gradient of D": "gradient_d", "of G": "gradient_g"}
    said = [
        f"<li>step {row['step']}: {html.escape(_said(row))}</li>"
        for row in health
        if row.get("verdict") != "starting"
    ]
    return [
        f"<h2>Health</h2>{_verdicts(health, int(rows[-1]['step']))}<ul>{''.join(said)}</ul>",
        "<p>How samples lie among the real images of the same batch: how far apart, as a part of "
        "how far real images are; the share of real images with a sample near them; the share of "
        f"samples with a near duplicate.</p>{_chart(rows, samples, 0.0)}",
        f"<p>The share of images that D takes for what they are.</p>{_chart(rows, accuracy, 0, 1)}",
        f"<p>Norms of the gradients.</p>{_chart(rows, gradients)}",
    ]


def _said(row: Mapping[str, Any]) -> str:
    if "verdict" in row:
        reasons = "; ".join(row["reasons"])
        return f"{row['verdict']}: {reasons}" if reasons else str(row["verdict"])
    return str(row["action"]) if "action" in row else str(row["stop"])


def _verdicts(health: Sequence[Mapping[str, Any]], last: int) -> str:
    """A bar of the run's steps, coloured by the verdict on them."""
    changes = [(int(row["step"]), str(row["verdict"])) for row in health if "verdict" in row]
    changes = [(0, "starting"), *changes, (last, "")]
    width, parts = _WIDTH - _LEFT - 10, [f"<svg viewBox='0 0 {_WIDTH} 30' role=img>"]
    for (step, state), (end, _) in itertools.pairwise(changes):
        at = _LEFT + width * step / max(last, 1)
        parts.append(
            f"<rect x='{at:.1f}' y='4' width='{max(width * (end - step) / max(last, 1), 0):.1f}' "
            f"height='16' fill='{_STATES.get(state, _STATES[''])}'>"
            f"<title>{html.escape(state)} from step {step}</title></rect>"
        )
    return "".join(parts) + "</svg>"


def _quality(quality: Sequence[Mapping[str, Any]], neighbours: Path | None) -> list[str]:
    """The section on the quality of the samples; nothing where it was not measured."""
    if not quality:
        return []
    shares = {name: name for name in ("precision", "recall", "density", "coverage")}
    best = min(quality, key=lambda row: row["frechet"])
    parts = [
        f"<h2>Quality</h2><p>Best at step {best['step']}. {html.escape(best['described'])}</p>",
        _chart(quality, {"Fréchet distance": "frechet"}, 0.0),
        _chart(quality, {"kernel distance": "kernel"}, 0.0),
        _chart(quality, shares, 0.0),
    ]
    if neighbours is not None and neighbours.exists():
        data = base64.b64encode(neighbours.read_bytes()).decode()
        parts.append(
            "<h2>Copies of training images?</h2><p>Samples, each followed by the training images "
            "nearest to it; the nearest pairs first.</p>"
            f"<img alt='samples and their nearest images' src='data:image/png;base64,{data}'>"
        )
    return parts


def _table(values: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _timeline(samples: Sequence[Path]) -> str:
    figures = []
    for path in thin(list(samples), MAX_PICTURES):
        data = base64.b64encode(path.read_bytes()).decode()
        step = sample_step(path)
        figures.append(
            f"<figure><img alt='samples at step {step}' src='data:image/png;base64,{data}'>"
            f"<figcaption>step {step}</figcaption></figure>"
        )
    return "".join(figures) or "<p>None yet.</p>"


def _chart(
    metrics: Sequence[Mapping[str, float]],
    series: Mapping[str, str],
    low: float | None = None,
    high: float | None = None,
) -> str:
    if len(metrics) < 2:
        return "<p>Too few steps yet.</p>"
    stride = max(1, math.ceil(len(metrics) / MAX_POINTS))
    rows = [*metrics[:-1:stride], metrics[-1]]
    # A run of an earlier version has not all of them, and what was not measured is not there.
    rows = [row for row in rows if all(key in row for key in series.values())]
    values = sorted(row[key] for row in rows for key in series.values())
    low = min(0.0, values[0]) if low is None else low
    # A few spikes would flatten all the rest.
    if high is None:
        high = max(values[math.ceil(0.995 * (len(values) - 1))] * 1.1, low + 1e-6)
    first, last = rows[0]["step"], rows[-1]["step"]
    inner_width, inner_height = _WIDTH - _LEFT - 10, _HEIGHT - _TOP - _BOTTOM

    def x(step: float) -> float:
        return _LEFT + inner_width * (step - first) / max(last - first, 1)

    def y(value: float) -> float:
        return _TOP + inner_height * (1.0 - (min(max(value, low), high) - low) / (high - low))

    parts = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img>"]
    for i in range(5):
        value = low + (high - low) * i / 4
        parts.append(
            f"<line x1='{_LEFT}' x2='{_WIDTH - 10}' y1='{y(value):.1f}' y2='{y(value):.1f}' "
            f"stroke='#ddd'/><text x='{_LEFT - 6}' y='{y(value) + 4:.1f}' text-anchor='end'>"
            f"{value:.2f}</text>"
        )
        step = first + (last - first) * i / 4
        anchor = "end" if i == 4 else "middle"
        parts.append(
            f"<text x='{x(step):.1f}' y='{_HEIGHT - 8}' text-anchor='{anchor}'>{step:.0f}</text>"
        )
    for i, (label, key) in enumerate(series.items()):
        points = " ".join(f"{x(row['step']):.1f},{y(row[key]):.1f}" for row in rows)
        colour = _COLOURS[i]
        parts.append(
            f"<polyline fill='none' stroke='{colour}' stroke-width='1.2' points='{points}'/>"
            f"<text x='{_LEFT + 130 * i}' y='{_TOP - 10}' style='fill:{colour}'>{label}</text>"
        )
    return "".join(parts) + "</svg>"
