"""The report of a run: one HTML file that opens anywhere, offline, and the metric history that it is drawn from.

:func:`render_report` is a pure function of :class:`ReportData`. The file holds everything it needs (plotly.js once, about 4.8 MB),
loads nothing from the network, and reads on a phone, in the dark, in print and without JavaScript (figures as tables, clouds from above).
"""

import base64
import functools
import html
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_methods.panels import CloudMedia, CloudPanel, Curve, HistogramMedia, ImageMedia, Media, Panel, TableMedia

Status = Literal["running", "finished", "interrupted"]
Series = tuple[NDArray[np.int64], NDArray[np.float64]]  # steps (n,), values (n,)

MAX_CURVE_POINTS = 2000  # a chart is at most some 1000 pixels wide: lowest and highest value per pixel
MAX_CLOUD_POINTS = 20_000  # what a phone still turns smoothly
MAX_IMAGE_WIDTH = 1600
MAX_PNG_PIXELS = 300_000  # a larger picture goes as JPEG: 20 times faster to write, and a tenth of the size for a photograph
MAX_TABLE_ROWS = 500


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
        status: ``running``, ``finished`` or ``interrupted``.
        sections: One per technique.
        history: What was logged, in order.
        message: Why the run was interrupted, or "".
        progress: Lines such as ``("Epoch", "3 of 10")`` under the title.
        config: The resolved configuration as YAML, or "".
        checkpoints: Rows of path, role and score.
        facts: Tables of facts by heading, such as ``{"Git": {"commit": "..."}}``.
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
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            records.append(Record(int(entry["step"]), entry["epoch"], {k: float(v) for k, v in entry["metrics"].items()}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: not a record with step, epoch and metrics ({error}): mend or delete the line"
            ) from error
    return records


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing: a reader never sees half of it, and a crash leaves the old one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def series_by_name(history: Iterable[Record]) -> dict[str, Series]:
    """Steps and values of every metric, names in the order of first appearance."""
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for record in history:
        for name, value in record.metrics.items():
            steps.setdefault(name, []).append(record.step)
            values.setdefault(name, []).append(value)
    return {name: (np.asarray(steps[name], dtype=np.int64), np.asarray(values[name], dtype=np.float64)) for name in steps}


def thin(steps: NDArray[np.int64], values: NDArray[np.float64], limit: int = MAX_CURVE_POINTS) -> Series:
    """At most ``limit`` of the points: the lowest and the highest of each stretch, so that spikes stay, and the last point.

    Args:
        steps: (n,) int64.
        values: (n,) float64, NaN allowed.
        limit: Points to keep, >= 4.

    Returns:
        Steps and values, (m,) each with m <= limit, in the given order.
    """
    if len(steps) <= limit:
        return steps, values
    stretches = (limit - 1) // 2
    width = len(steps) // stretches + (len(steps) % stretches > 0)
    padded = np.full(width * stretches, np.nan)
    padded[: len(values)] = values
    table = padded.reshape(stretches, width)
    low = np.where(np.isnan(table), np.inf, table).argmin(axis=1)
    high = np.where(np.isnan(table), -np.inf, table).argmax(axis=1)
    offset = np.arange(stretches) * width
    keep = np.unique(np.concatenate([offset + low, offset + high, [len(steps) - 1]]))
    keep = keep[keep < len(steps)]
    return steps[keep], values[keep]


# ---- pieces of HTML --------------------------------------------------------------------------------------------------------------------

_escape = functools.partial(html.escape, quote=True)


def _breakable(name: str) -> str:
    """A metric's name that may go on in a new line after / and _."""
    return re.sub(r"([/_])", r"\1<wbr>", _escape(name))


def _number(value: float) -> str:
    if 1e4 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"  # also nan and inf


def _cell(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)) or value is None:
        return f"<td>{'–' if value is None else 'yes' if value else 'no'}</td>"
    if isinstance(value, (int, float, np.integer, np.floating)):
        return f'<td class="number">{_number(float(value)) if isinstance(value, (float, np.floating)) else f"{value:,}"}</td>'
    return f"<td>{_escape(str(value))}</td>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]], label: str) -> str:
    head = "".join(f'<th scope="col">{_escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:MAX_TABLE_ROWS])
    more = f"<p class='note'>The first {MAX_TABLE_ROWS:,} of {len(rows):,} rows.</p>" if len(rows) > MAX_TABLE_ROWS else ""
    # tabindex: a box that scrolls must be reachable by keyboard
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_escape(label)}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{more}"
    )


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    """PNG, or JPEG where PNG would be large, as a data: address; wide pictures are made smaller."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    if image.width > MAX_IMAGE_WIDTH:
        image = image.resize((MAX_IMAGE_WIDTH, max(1, round(image.height * MAX_IMAGE_WIDTH / image.width))))
    buffer = io.BytesIO()
    kind = "png" if image.width * image.height <= MAX_PNG_PIXELS else "jpeg"
    image.save(buffer, kind.upper(), **({} if kind == "png" else {"quality": 92, "subsampling": 0}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _top_view(points: NDArray[Any], colors: NDArray[np.uint8], size: int = 640) -> NDArray[np.uint8]:
    """The cloud from above, higher points over lower ones, 2 x 2 pixels each: for print and where there is no WebGL.

    Returns:
        (H, W, 3) uint8 with x to the right and y up; the longer side has ``size`` pixels, the shorter at least a quarter of that.
    """
    low, high = np.percentile(points[:, :2], [1, 99], axis=0) if len(points) else np.zeros((2, 2))
    scale = (size - 2) / max(float((high - low).max()), 1e-6)
    width, height = np.clip(np.ceil((high - low) * scale).astype(np.int64) + 2, size // 4, size)
    canvas = np.full((height, width, 3), (17, 20, 27), dtype=np.uint8)
    column, row = ((points[:, :2] - (low + high) / 2) * scale + (width / 2, height / 2)).astype(np.int64).T
    row = height - 1 - row
    order = np.argsort(points[:, 2], kind="stable")
    inside = order[((row >= 0) & (row < height - 1) & (column >= 0) & (column < width - 1))[order]]
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        canvas[row[inside] + down, column[inside] + right] = colors[inside]
    return canvas


def _packed(values: NDArray[Any]) -> dict[str, str]:
    """Plotly's form of a typed array."""
    return {"dtype": "f4", "bdata": base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()}


def _hex(colors: NDArray[np.uint8]) -> str | list[str]:
    """One colour if all are the same, else one a point."""
    if (colors == colors[:1]).all():
        return "#" + colors[0].tobytes().hex()
    text = np.ascontiguousarray(colors).tobytes().hex()
    return ["#" + text[i : i + 6] for i in range(0, len(text), 6)]


def subsample(cloud: CloudMedia, limit: int) -> CloudMedia:
    """At most ``limit`` of the cloud's finite points, always the same ones, in order."""
    rows = np.flatnonzero(np.isfinite(cloud.points).all(axis=1))
    if len(rows) > limit:
        rows = np.sort(np.random.default_rng(0).choice(rows, limit, replace=False))
    return replace(cloud, points=cloud.points[rows], colors=cloud.colors[rows], labels=None if cloud.labels is None else cloud.labels[rows])


def _cloud_traces(cloud: CloudMedia) -> list[dict[str, Any]]:
    """One trace per class; one in all without labels."""
    labels = np.zeros(len(cloud.points), dtype=np.int64) if cloud.labels is None else cloud.labels
    traces = []
    for label in np.unique(labels):  # classes, not points
        rows = labels == label
        known = 0 <= label < len(cloud.class_names)
        name = "" if cloud.labels is None else cloud.class_names[label] if known else f"class {label}"
        x, y, z = (_packed(axis) for axis in cloud.points[rows].T)
        traces.append({"name": name, "x": x, "y": y, "z": z, "color": _hex(cloud.colors[rows])})
    return traces


def _summary(series: Series, goal: str | None) -> tuple[float, float | None, int | None]:
    """Last value; best value and its step, where there is a goal and a finite value."""
    steps, values = series
    finite = np.flatnonzero(np.isfinite(values))
    if goal is None or not len(finite):
        return float(values[-1]), None, None
    best = finite[values[finite].argmin() if goal == "min" else values[finite].argmax()]
    return float(values[-1]), float(values[best]), int(steps[best])


def _curve_text(names: Sequence[str], series: Mapping[str, Series]) -> str:
    parts = []
    for name in names[:6]:
        steps, values = series[name]
        parts.append(f"{name} from {_number(values[0])} at step {steps[0]} to {_number(values[-1])} at step {steps[-1]}")
    return "Line chart: " + "; ".join(parts) + (f"; and {len(names) - 6} more" if len(names) > 6 else "")


class _Page:
    """Collects the charts' data while the sections are written."""

    def __init__(self, history: Iterable[Record]) -> None:
        self.series = series_by_name(history)
        self.names = list(self.series)
        self.charts: dict[str, dict[str, Any]] = {}

    def plot(self, label: str, chart: dict[str, Any]) -> str:
        name = f"chart-{len(self.charts)}"
        self.charts[name] = chart
        return f'<div class="plot {chart["kind"]}" id="{name}" role="img" aria-label="{_escape(label)}"></div>'

    def curve(self, title: str, names: Sequence[str], note: str = "", level: int = 3) -> str:
        traces = []
        for name in names:
            steps, values = thin(*self.series[name])
            rounded = [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]
            traces.append({"name": name, "x": steps.tolist(), "y": rounded})
        button = '<button type="button" class="log" aria-pressed="false" title="Logarithmic vertical axis">log</button>'
        plot = self.plot(_curve_text(names, self.series), {"kind": "curve", "traces": traces})
        return _figure(title, plot, note, level=level, tools=button)

    def panel(self, panel: Panel, media: Mapping[str, Media]) -> str:
        if isinstance(panel, Curve):
            names = panel.select(self.names)
            if names:
                return self.curve(panel.title, names, panel.note)
            return _figure(panel.title, _nothing(f"Not logged yet: {', '.join(panel.metrics)}"), panel.note)
        item = media.get(panel.key)
        wide = isinstance(panel, CloudPanel)
        if item is None:
            return _figure(panel.title, _nothing("Nothing to show yet."), panel.note)
        return _figure(panel.title, self.media(panel.title, item), panel.note, wide=wide)

    def media(self, title: str, item: Media) -> str:
        if isinstance(item, ImageMedia):
            height, width = item.pixels.shape[:2]
            return f'<img src="{_data_uri(item.pixels)}" alt="{_escape(item.alt)}" width="{width}" height="{height}">'
        if isinstance(item, TableMedia):
            return _table(item.columns, item.rows, title)
        if isinstance(item, HistogramMedia):
            counts, edges = np.asarray(item.counts, dtype=np.float64), np.asarray(item.edges, dtype=np.float64)
            chart = {"kind": "histogram", "counts": counts.tolist(), "edges": edges.tolist()}
            label = f"Histogram, {len(counts)} bins from {_number(edges[0])} to {_number(edges[-1])}, total {_number(counts.sum())}"
            return self.plot(label, chart)
        cloud = subsample(item, MAX_CLOUD_POINTS)
        total, left = len(item.points), len(cloud.points)
        shown = f"{left:,} of {total:,} points" if left < total else f"{total:,} points"
        alt = _escape(f"{item.caption} (from above)")
        view = _top_view(cloud.points, cloud.colors)
        flat = f'<img class="flat" src="{_data_uri(view)}" alt="{alt}" width="{view.shape[1]}" height="{view.shape[0]}">'
        plot = self.plot(f"Point cloud: {item.caption}", {"kind": "cloud", "traces": _cloud_traces(cloud)})
        hint = f'<span class="muted">· {shown}<span class="screen">; drag to turn, scroll to zoom</span></span>'
        return f'{plot}{flat}<p class="caption">{_escape(item.caption)} {hint}</p>'


def _fold(summary: str, content: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{_escape(summary)}</summary>{content}</details>"


def _interrupted(message: str) -> str:
    return f'<div class="box bad" role="alert"><strong>Interrupted.</strong> {_escape(message)}</div>'


def _nothing(text: str) -> str:
    return f'<p class="empty">{_escape(text)}</p>'


def _figure(title: str, content: str, note: str, level: int = 3, wide: bool = False, tools: str = "") -> str:
    caption = f"<figcaption>{_escape(note)}</figcaption>" if note else ""
    return (
        f'<figure class="card{" wide" if wide else ""}"><div class="head"><h{level}>{_escape(title)}</h{level}>{tools}</div>'
        f"{content}{caption}</figure>"
    )


def _tiles(page: _Page, sections: Sequence[Section]) -> str:
    """Key figures: every declared metric, those with a goal as large tiles."""
    tiles: list[str] = []
    rows: list[tuple[Any, ...]] = []
    seen: set[str] = set()
    for curve in (panel for section in sections for panel in section.panels if isinstance(panel, Curve)):
        for name in curve.select(page.names):
            if name in seen:
                continue
            seen.add(name)
            last, best, at = _summary(page.series[name], curve.goal)
            rows.append((name, last, best, at))
            if best is not None and len(tiles) < 8:
                word = "lowest" if curve.goal == "min" else "highest"
                tiles.append(
                    f'<div class="tile"><dt>{_breakable(name)}</dt><dd>{_number(last)}</dd>'
                    f'<dd class="muted">{word} {_number(best)} at step {at:,}</dd></div>'
                )
    if not rows:
        return ""
    table = _table(("Metric", "Last", "Best", "At step"), rows, "Key figures")
    shown = f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""
    fold = _fold(f"All declared metrics ({len(rows)})", table, is_open=not shown)
    return f'<section id="key-figures"><h2>Key figures</h2>{shown}{fold}</section>'


def _all_metrics(page: _Page) -> str:
    if not page.names:
        return ""
    rows = []
    for name, (steps, values) in page.series.items():
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (math.nan, math.nan)
        rows.append((name, float(values[0]), float(values[-1]), low, high, len(steps)))
    table = _table(("Metric", "First", "Last", "Lowest", "Highest", "Values"), rows, "All metrics")
    charts = "".join(page.curve(name, [name]) for name in page.names)
    return (
        '<section id="all-metrics"><h2>All metrics</h2>'
        f'{_fold(f"{len(rows)} metrics, each in a chart of its own", f"""{table}<div class="grid small">{charts}</div>""")}</section>'
    )


def _warnings(page: _Page) -> str:
    lines = []
    for name, (steps, values) in page.series.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            lines.append(f"<li><code>{_escape(name)}</code>: {len(bad):,} of {len(values):,}, first at step {steps[bad[0]]:,}</li>")
    return f'<div class="box bad" role="note"><strong>Values that are not finite</strong><ul>{"".join(lines)}</ul></div>' if lines else ""


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


def _section(page: _Page, section: Section, anchor: str) -> str:
    link = f' <a href="{_escape(section.url)}" rel="noopener noreferrer">Paper</a>' if section.url else ""
    summary = f"<p>{_escape(section.summary)}{link}</p>" if section.summary or link else ""
    panels = "".join(page.panel(panel, section.media) for panel in section.panels)
    return f'<section id="{anchor}"><h2>{_escape(section.title)}</h2>{summary}<div class="grid">{panels}</div></section>'


@functools.cache
def _template() -> str:
    return (Path(__file__).parent / "report_template.html").read_text(encoding="utf-8")


def render_report(data: ReportData) -> str:
    """The whole report as one HTML document.

    Args:
        data: What to show. Texts are escaped here. Clouds are thinned out to 20,000 points, curves to 2,000 points each.

    Returns:
        HTML, about 5 MB, that refers to nothing outside itself (links to papers apart).
    """
    from plotly.offline import get_plotlyjs

    page = _Page(data.history)
    anchors = [f"{_slug(section.title)}-{index}" for index, section in enumerate(data.sections)]
    figures = _tiles(page, data.sections)
    parts = [_interrupted(data.message) if data.status == "interrupted" else "", _warnings(page), figures]
    parts += [_section(page, section, anchor) for section, anchor in zip(data.sections, anchors, strict=True)]
    if not page.names and not data.sections:
        parts.append(_nothing("No metric was logged and no panel is declared. self.log(...) in the module makes curves appear here."))
    parts.append(_all_metrics(page))

    about = []
    if data.config:
        about.append(_fold("Configuration", f'<pre tabindex="0"><code>{_escape(data.config)}</code></pre>'))
    if data.checkpoints:
        table = _table(("File", "Role", "Score"), data.checkpoints, "Checkpoints")
        about.append(_fold(f"Checkpoints ({len(data.checkpoints)})", table, is_open=True))
    for heading, facts in data.facts.items():
        if facts:
            about.append(_fold(heading, _table(("Name", "Value"), list(facts.items()), heading)))
    if about:
        parts.append(f'<section id="about"><h2>About this run</h2>{"".join(about)}</section>')

    targets = [("key-figures", "Key figures")] if figures else []
    targets += [(anchor, section.title) for anchor, section in zip(anchors, data.sections, strict=True)]
    targets += [("all-metrics", "All metrics")] if page.names else []
    targets += [("about", "About this run")] if about else []
    fill = {
        "title": _escape(data.title),
        "status": data.status,
        "progress": "".join(f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in data.progress),
        "navigation": "".join(f'<li><a href="#{target}">{_escape(text)}</a></li>' for target, text in targets),
        "body": "\n".join(part for part in parts if part),
        # "<" can't open a tag inside a script once it is written as an escape
        "data": json.dumps(page.charts, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "plotly": get_plotlyjs() if page.charts else "",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fill[match[1]], _template())
