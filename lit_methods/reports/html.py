"""Pieces of HTML that a run's report and a comparison of runs are made of: tables, figures, charts, media, and the page around them."""

import base64
import functools
import html
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_methods.catalog import Technique, techniques_in
from lit_methods.panels import CloudMedia, HistogramMedia, ImageMedia, Media, TableMedia

Series = tuple[NDArray[np.int64], NDArray[np.float64]]  # steps (n,), values (n,)

MAX_CURVE_POINTS = 2000  # a chart is at most some 1000 pixels wide: lowest and highest value per pixel
MAX_CLOUD_POINTS = 20_000  # what a phone still turns smoothly
MAX_IMAGE_WIDTH = 1600
MAX_PNG_PIXELS = 300_000  # a larger picture goes as JPEG: 20 times faster to write, and a tenth of the size for a photograph
MAX_TABLE_ROWS = 500
COLORS = 10  # of lines, in the page's style sheet


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


escape = functools.partial(html.escape, quote=True)


def breakable(name: str) -> str:
    """A metric's name that may go on in a new line after / and _."""
    return re.sub(r"([/_])", r"\1<wbr>", escape(name))


def number(value: float) -> str:
    if 1e4 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"  # also nan and inf


def cell(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)) or value is None:
        return f"<td>{'–' if value is None else 'yes' if value else 'no'}</td>"
    if isinstance(value, (int, float, np.integer, np.floating)):
        return f'<td class="number">{number(float(value)) if isinstance(value, (float, np.floating)) else f"{value:,}"}</td>'
    return f"<td>{escape(str(value))}</td>"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], label: str) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows[:MAX_TABLE_ROWS])
    more = f"<p class='note'>The first {MAX_TABLE_ROWS:,} of {len(rows):,} rows.</p>" if len(rows) > MAX_TABLE_ROWS else ""
    # tabindex: a box that scrolls must be reachable by keyboard
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table><thead><tr>{head}</tr></thead>'
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


# ---- charts and figures ----------------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One line of a chart: what it is called, what the legend says, its values, and the number of its colour (and dash from 10 on)."""

    name: str
    label: str
    series: Series
    color: int


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the folders that all of them share: ``iou/car`` and ``iou/road`` become ``car`` and ``road``."""
    if len(names) < 2:
        return list(names)
    folders = [name.split("/")[:-1] for name in names]
    shared = 0
    while all(len(parts) > shared and parts[shared] == folders[0][shared] for parts in folders):
        shared += 1
    return ["/".join(name.split("/")[shared:]) for name in names]


class Charts:
    """Collects the charts' data while the page is written."""

    def __init__(self) -> None:
        self.data: dict[str, dict[str, Any]] = {}

    def plot(self, label: str, chart: dict[str, Any], keys: Sequence[tuple[str, str, str]] = ()) -> str:
        """A place for a chart, and its legend: label, CSS colour and form (``solid``, ``dash``, ``dot``, ``point``) of each trace.

        The legend is HTML under the chart: it wraps at any width, stays clear of the axes, and its keys can be reached with Tab.
        """
        name = f"chart-{len(self.data)}"
        self.data[name] = chart
        legend = "".join(
            f'<li><button type="button" class="key" aria-pressed="true" data-index="{index}">'
            f'<i class="{form}" style="--k:{color}"></i>{escape(text)}</button></li>'
            for index, (text, color, form) in enumerate(keys)
        )
        listed = f'<ul class="legend" data-chart="{name}" aria-label="Legend: a key shows or hides its line">{legend}</ul>' if keys else ""
        return f'<div class="plot {chart["kind"]}" id="{name}" role="img" aria-label="{escape(label)}"></div>{listed}'

    def curve(self, title: str, lines: Sequence[Line], note: str = "", level: int = 3, overlaid: bool = False) -> str:
        """A figure of lines over the step; ``overlaid``: lines of the same values must both be seen."""
        traces, keys = [], []
        for name, label, series, color in lines:
            steps, values = thin(*series)
            rounded = [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]
            traces.append({"name": name, "label": label, "x": steps.tolist(), "y": rounded, "color": color})
            keys.append((label, f"var(--c{color % COLORS})", ("solid", "dash", "dot")[color // COLORS % 3]))
        button = '<button type="button" class="log" aria-pressed="false" title="Logarithmic vertical axis">log</button>'
        plot = self.plot(_curve_text(lines), {"kind": "curve", "traces": traces, "overlaid": overlaid}, keys if len(keys) > 1 else ())
        return figure(title, plot, note, level=level, tools=button)

    def media(self, title: str, item: Media, color: int = 0, limit: int = MAX_CLOUD_POINTS) -> str:
        """A picture, table, histogram or cloud; ``limit``: points of a cloud."""
        if isinstance(item, ImageMedia):
            height, width = item.pixels.shape[:2]
            return f'<img src="{_data_uri(item.pixels)}" alt="{escape(item.alt)}" width="{width}" height="{height}">'
        if isinstance(item, TableMedia):
            return table(item.columns, item.rows, title)
        if isinstance(item, HistogramMedia):
            counts, edges = np.asarray(item.counts, dtype=np.float64), np.asarray(item.edges, dtype=np.float64)
            chart = {"kind": "histogram", "counts": counts.tolist(), "edges": edges.tolist(), "color": color}
            return self.plot(
                f"Histogram, {len(counts)} bins from {number(edges[0])} to {number(edges[-1])}, total {number(counts.sum())}", chart
            )
        cloud = subsample(item, limit)
        total, left = len(item.points), len(cloud.points)
        shown = f"{left:,} of {total:,} points" if left < total else f"{total:,} points"
        view = _top_view(cloud.points, cloud.colors)
        alt = escape(f"{item.caption} (from above)")
        flat = f'<img class="flat" src="{_data_uri(view)}" alt="{alt}" width="{view.shape[1]}" height="{view.shape[0]}">'
        traces = _cloud_traces(cloud)
        keys = [(t["name"], t["color"] if isinstance(t["color"], str) else "var(--soft)", "point") for t in traces if t["name"]]
        plot = self.plot(f"Point cloud: {item.caption}", {"kind": "cloud", "traces": traces}, keys)
        views = "".join(f'<button type="button" class="view" data-view="{view}">{view}</button>' for view in ("orbit", "above", "side"))
        hint = f'<span class="muted">· {shown}<span class="screen">; drag to turn, scroll to zoom</span></span>'
        return f'{plot}{flat}<p class="caption">{escape(item.caption)} {hint} <span class="views">{views}</span></p>'


def _curve_text(lines: Sequence[Line]) -> str:
    parts = []
    for _, label, (steps, values), _ in lines[:6]:
        parts.append(f"{label} from {number(values[0])} at step {steps[0]} to {number(values[-1])} at step {steps[-1]}")
    return "Line chart: " + "; ".join(parts) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")


def fold(summary: str, content: str, is_open: bool = False) -> str:
    """A block that opens on a click."""
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{content}</details>"


def nothing(text: str) -> str:
    """What stands where there is nothing yet."""
    return f'<p class="empty">{escape(text)}</p>'


def figure(title: str, content: str, note: str = "", level: int = 3, wide: bool = False, tools: str = "") -> str:
    """A card with a heading, HTML, and a sentence under it."""
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return (
        f'<figure class="card{" wide" if wide else ""}"><div class="head"><h{level}>{escape(title)}</h{level}>{tools}</div>'
        f"{content}{caption}</figure>"
    )


def link(url: str, text: str) -> str:
    """A link to a web page; "" for what is no web address."""
    return f'<a href="{escape(url)}" rel="noopener noreferrer">{escape(text)}</a>' if re.match(r"https?://", url) else ""


def slug(text: str) -> str:
    """A text as an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


def summary(series: Series, goal: str | None) -> tuple[float, float | None, int | None]:
    """Last value; best value and its step, where there is a goal and a finite value."""
    steps, values = series
    finite = np.flatnonzero(np.isfinite(values))
    if goal is None or not len(finite):
        return float(values[-1]), None, None
    best = finite[values[finite].argmin() if goal == "min" else values[finite].argmax()]
    return float(values[-1]), float(values[best]), int(steps[best])


def not_finite(series: Mapping[str, Series]) -> str:
    """A warning that lists the metrics with NaN or infinite values; "" without any."""
    lines = []
    for name, (steps, values) in series.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            lines.append(f"<li><code>{escape(name)}</code>: {len(bad):,} of {len(values):,}, first at step {steps[bad[0]]:,}</li>")
    return f'<div class="box bad" role="note"><strong>Values that are not finite</strong><ul>{"".join(lines)}</ul></div>' if lines else ""


def notes(text: str, heading: str = "Notes") -> str:
    """The user's own words, as they are; "" without any."""
    return f'<div class="box"><strong>{escape(heading)}</strong><p class="words">{escape(text.strip())}</p></div>' if text.strip() else ""


def technique_notes(titles: Sequence[str], verdict: Callable[[str], str] = lambda slug: "") -> str:
    """What the catalogue says about the techniques of a run, as HTML; "" for classes that aren't in the catalogue.

    Args:
        titles: Titles of the run's sections, each named after a class (``SuperFlow``, or ``SuperFlow 2``).
        verdict: The measured verdict on a technique's claim in words, by slug; "" where none is known.
    """
    return "".join(_technique_note(technique, verdict) for technique in techniques_in(title.split(" ")[0] for title in titles))


def _technique_note(technique: Technique, verdict: Callable[[str], str]) -> str:
    paper = link(f"https://arxiv.org/abs/{technique.arxiv}", f"arXiv:{technique.arxiv}") if technique.arxiv else ""
    claim = f"<p><strong>Claim.</strong> {escape(technique.claim)}</p>" if technique.claim else ""
    judged = verdict(technique.slug) if technique.claim else ""
    measured = f"<p><strong>Measured.</strong> {escape(judged)}</p>" if judged else ""
    return (
        f'<div class="box"><strong>{technique.names[0]}: {escape(technique.title)}</strong> {paper}<p>{escape(technique.summary)}</p>'
        f"{claim}{measured}</div>"
    )


# ---- the page --------------------------------------------------------------------------------------------------------------------------


@functools.cache
def _template() -> str:
    return (Path(__file__).parent / "template.html").read_text(encoding="utf-8")


def page(title: str, head: str, parts: Sequence[str], targets: Sequence[tuple[str, str]], charts: Charts, origin: str = "") -> str:
    """The whole document.

    Args:
        title: Heading, plain text.
        head: HTML under the heading.
        parts: HTML, in order; empty ones are left out.
        targets: Anchor and text of each entry of the navigation.
        charts: What the parts' charts draw.
        origin: Mark of the runs that the page shows, readable by :func:`origin_of`; "" for none.

    Returns:
        HTML that loads nothing from outside itself.
    """
    from plotly.offline import get_plotlyjs

    fill = {
        "title": escape(title),
        "origin": escape(origin),
        "head": head,
        "navigation": "".join(f'<li><a href="#{target}">{escape(text)}</a></li>' for target, text in targets),
        "body": "\n".join(part for part in parts if part),
        # "<" can't open a tag inside a script once it is written as an escape
        "data": json.dumps(charts.data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "plotly": get_plotlyjs() if charts.data else "",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fill[match[1]], _template())


def origin_of(path: Path) -> str | None:
    """The mark of a page that :func:`page` wrote; None for another's file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        mark = re.search(r'<meta name="generator" content="lit-methods ?([^"]*)">', file.read(4000))
    return mark[1] if mark else None
