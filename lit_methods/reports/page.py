"""The report of a run: one HTML file that opens anywhere, offline, and the metric history that it is drawn from.

:func:`render_report` is a pure function of :class:`ReportData`. The file holds everything it needs (plotly.js once, about 4.8 MB),
loads nothing from the network, and reads on a phone, in the dark, in print and without JavaScript (figures as tables, clouds from above).
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lit_methods.panels import CloudPanel, Curve, Media, Panel
from lit_methods.reports.html import (
    Charts,
    Line,
    Series,
    breakable,
    escape,
    figure,
    fold,
    link,
    not_finite,
    notes,
    nothing,
    number,
    page,
    short_names,
    slug,
    summary,
    table,
    technique_notes,
)

Status = Literal["running", "finished", "interrupted", "unknown"]  # unknown: read from a folder that holds only metrics

MAX_TILES = 8


class Record(NamedTuple):
    """What was logged at one call: the training step, the epoch if known, and the values."""

    step: int
    epoch: int | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Section:
    """The panels of one technique.

    Attributes:
        title: Heading.
        panels: What to show, in order.
        media: What ``dashboard_media()`` returned, by key. A panel without its key shows that there is nothing yet.
        summary: One or two sentences about the technique.
        url: Address of its paper, or "".
    """

    title: str
    panels: tuple[Panel, ...]
    media: Mapping[str, Media] = field(default_factory=dict)
    summary: str = ""
    url: str = ""


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows; all texts are plain (not HTML).

    Attributes:
        title: Name of the run.
        status: ``running``, ``finished``, ``interrupted`` or ``unknown``.
        sections: One per technique.
        history: What was logged, in order.
        message: Why the run was interrupted, or "".
        progress: Lines such as ``("Epoch", "3 of 10")`` under the title.
        config: The resolved configuration as YAML, or "".
        checkpoints: Rows of path, role and score.
        facts: Tables of facts by heading, such as ``{"Git": {"commit": "..."}}``.
        notes: The user's own words about the run, or "".
    """

    title: str
    status: Status
    sections: tuple[Section, ...] = ()
    history: Sequence[Record] = ()
    message: str = ""
    progress: tuple[tuple[str, str], ...] = ()
    config: str = ""
    checkpoints: tuple[tuple[str, str, str], ...] = ()
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: str = ""


# ---- history on disk -------------------------------------------------------------------------------------------------------------------


def record_line(record: Record) -> str:
    """One line of ``metrics.jsonl``: strict JSON, so that a value that isn't finite stands as the string NaN, Infinity or -Infinity."""
    words = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
    values = {name: value if math.isfinite(value) else words[str(value)] for name, value in record.metrics.items()}
    return json.dumps({"step": record.step, "epoch": record.epoch, "metrics": values}, allow_nan=False) + "\n"


def read_history(path: Path) -> list[Record]:
    """Read ``metrics.jsonl``; a last line that was cut off by a kill is left out.

    Raises:
        ValueError: A line before the last is not a record; the message names file and line.
    """
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for count, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            records.append(Record(int(entry["step"]), entry["epoch"], {k: float(v) for k, v in entry["metrics"].items()}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if count == len(lines):
                break
            raise ValueError(
                f"{path}, line {count}: not a record with step, epoch and metrics ({error}): mend or delete the line"
            ) from error
    return records


def series_by_name(history: Iterable[Record]) -> dict[str, Series]:
    """Steps and values of every metric, names in the order of first appearance."""
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for record in history:
        for name, value in record.metrics.items():
            steps.setdefault(name, []).append(record.step)
            values.setdefault(name, []).append(value)
    return {name: (np.asarray(steps[name], dtype=np.int64), np.asarray(values[name], dtype=np.float64)) for name in steps}


# ---- sections --------------------------------------------------------------------------------------------------------------------------


def _lines(names: Sequence[str], series: Mapping[str, Series]) -> list[Line]:
    return [Line(name, label, series[name], i) for i, (name, label) in enumerate(zip(names, short_names(names), strict=True))]


def _panel(charts: Charts, series: Mapping[str, Series], panel: Panel, media: Mapping[str, Media]) -> str:
    if isinstance(panel, Curve):
        names = panel.select(list(series))
        if names:
            return charts.curve(panel.title, _lines(names, series), panel.note)
        return figure(panel.title, nothing(f"Not logged yet: {', '.join(panel.metrics)}"), panel.note)
    item = media.get(panel.key)
    if item is None:
        return figure(panel.title, nothing("Nothing to show yet."), panel.note)
    return figure(panel.title, charts.media(panel.title, item), panel.note, wide=isinstance(panel, CloudPanel))


def _tiles(series: Mapping[str, Series], sections: Sequence[Section]) -> str:
    """Key figures: every declared metric, those with a goal as large tiles."""
    tiles: list[str] = []
    rows: list[tuple[Any, ...]] = []
    seen: set[str] = set()
    for curve in (panel for section in sections for panel in section.panels if isinstance(panel, Curve)):
        names = curve.select(list(series))
        for name in names:
            if name in seen:
                continue
            seen.add(name)
            last, best, at = summary(series[name], curve.goal)
            rows.append((name, last, best, at))
            if best is not None and len(names) <= MAX_TILES // 2 + 1 and len(tiles) < MAX_TILES:  # not every class of a data set
                word = "lowest" if curve.goal == "min" else "highest"
                tiles.append(
                    f'<div class="tile"><dt>{breakable(name)}</dt><dd>{number(last)}</dd>'
                    f'<dd class="muted">{word} {number(best)} at step {at:,}</dd></div>'
                )
    if not rows:
        return ""
    width = 4 if any(row[2] is not None for row in rows) else 2  # without a goal nothing is best
    listed = table(("Metric", "Last", "Best", "At step")[:width], [row[:width] for row in rows], "Key figures")
    shown = f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""
    return (
        f'<section id="key-figures"><h2>Key figures</h2>{shown}'
        f"{fold(f'All declared metrics ({len(rows)})', listed, is_open=not shown)}</section>"
    )


def _all_metrics(charts: Charts, series: Mapping[str, Series]) -> str:
    if not series:
        return ""
    rows = []
    for name, (_, values) in series.items():
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (math.nan, math.nan)
        rows.append((name, float(values[0]), float(values[-1]), low, high, len(values)))
    listed = table(("Metric", "First", "Last", "Lowest", "Highest", "Values"), rows, "All metrics")
    drawn = "".join(charts.curve(name, _lines([name], series)) for name in series)
    content = fold(f"{len(rows)} metrics, each in a chart of its own", f'{listed}<div class="grid small">{drawn}</div>')
    return f'<section id="all-metrics"><h2>All metrics</h2>{content}</section>'


def _section(charts: Charts, series: Mapping[str, Series], section: Section, anchor: str) -> str:
    paper = link(section.url, "Paper")
    words = f"<p>{escape(section.summary)} {paper}</p>" if section.summary or paper else ""
    panels = "".join(_panel(charts, series, panel, section.media) for panel in section.panels)
    return f'<section id="{anchor}"><h2>{escape(section.title)}</h2>{words}<div class="grid">{panels}</div></section>'


def status_and_progress(data: ReportData) -> str:
    """The run's status and its lines of progress, as HTML."""
    lines = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in data.progress)
    return f'<span class="pill {data.status}">{data.status}</span><dl class="progress">{lines}</dl>'


def interrupted(data: ReportData) -> str:
    """Why the run broke off; "" if it didn't."""
    if data.status != "interrupted":
        return ""
    return f'<div class="box bad" role="alert"><strong>Interrupted.</strong> {escape(data.message)}</div>'


def render_report(data: ReportData, origin: str = "", verdict: Callable[[str], str] = lambda slug: "") -> str:
    """The whole report as one HTML document.

    Args:
        data: What to show. Texts are escaped here. Clouds are thinned out to 20,000 points, curves to 2,000 points each.
        origin: Mark of the run for :func:`lit_methods.reports.html.origin_of`.
        verdict: The measured verdict on a technique's claim in words, by slug; "" where none is known.

    Returns:
        HTML, about 5 MB, that refers to nothing outside itself (links to papers apart).
    """
    charts, series = Charts(), series_by_name(data.history)
    anchors = [f"{slug(section.title)}-{index}" for index, section in enumerate(data.sections)]
    figures = _tiles(series, data.sections)
    parts = [interrupted(data), notes(data.notes), not_finite(series), figures]
    parts += [_section(charts, series, section, anchor) for section, anchor in zip(data.sections, anchors, strict=True)]
    if not series and not data.sections:
        parts.append(nothing("No metric was logged and no panel is declared. self.log(...) in the module makes curves appear here."))
    parts.append(_all_metrics(charts, series))

    about = []
    if known := technique_notes([section.title for section in data.sections], verdict):
        about.append(fold("Techniques", known))
    if data.config:
        about.append(fold("Configuration", f'<pre tabindex="0"><code>{escape(data.config)}</code></pre>'))
    if data.checkpoints:
        listed = table(("File", "Role", "Score"), data.checkpoints, "Checkpoints")
        about.append(fold(f"Checkpoints ({len(data.checkpoints)})", listed, is_open=True))
    for heading, facts in data.facts.items():
        if facts:
            about.append(fold(heading, table(("Name", "Value"), list(facts.items()), heading)))
    if about:
        parts.append(f'<section id="about"><h2>About this run</h2>{"".join(about)}</section>')

    targets = [("key-figures", "Key figures")] if figures else []
    targets += [(anchor, section.title) for anchor, section in zip(anchors, data.sections, strict=True)]
    targets += [("all-metrics", "All metrics")] if series else []
    targets += [("about", "About this run")] if about else []
    return page(data.title, status_and_progress(data), parts, targets, charts, origin)
