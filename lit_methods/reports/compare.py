"""Several runs side by side on one page: key figures, curves on top of each other, media next to each other, what differs in the config.

:func:`render_comparison` is a pure function of what :func:`lit_methods.reports.record.load_run` read.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lit_methods.panels import CloudMedia, CloudPanel, Curve, Panel, TablePanel
from lit_methods.reports.html import (
    COLORS,
    MAX_CLOUD_POINTS,
    Charts,
    Line,
    Series,
    breakable,
    escape,
    fold,
    not_finite,
    notes,
    nothing,
    number,
    page,
    slug,
    summary,
    technique_notes,
)
from lit_methods.reports.page import ReportData, Section, interrupted, series_by_name
from lit_methods.reports.record import flat_config

Goal = Literal["min", "max"] | None

MAX_CLOUDS_POINTS = 40_000  # of all runs of one panel together
MANY_CHARTS = 6  # a panel with more metrics than this is folded


@dataclass(frozen=True)
class Run:
    """One of the compared runs: its name on the page, and what its report shows."""

    name: str
    data: ReportData

    @cached_property
    def series(self) -> dict[str, Series]:
        """Steps and values of every metric."""
        return series_by_name(self.data.history)

    @property
    def steps(self) -> int | None:
        """The last step at which something was logged, counted from 1; None without metrics."""
        return max((record.step for record in self.data.history), default=-1) + 1 or None


@dataclass(frozen=True)
class Difference:
    """Keys whose values are not the same in all runs, and those that are.

    Attributes:
        different: Key -> value in each run, None where it isn't set.
        equal: Key -> value that all runs share.
    """

    different: dict[str, tuple[str | None, ...]]
    equal: dict[str, str]


def differences(tables: Sequence[Mapping[str, str]]) -> Difference:
    """Compare tables of texts key by key, keys in the order of their first appearance."""
    keys = dict.fromkeys(key for entries in tables for key in entries)
    values = {key: tuple(entries.get(key) for entries in tables) for key in keys}
    equal = {key: row[0] for key, row in values.items() if row[0] is not None and len(set(row)) == 1}
    return Difference({key: row for key, row in values.items() if key not in equal}, equal)


def best_of(values: Sequence[float | None], goal: Goal) -> set[int]:
    """Positions of the best value: several if it is there more than once; none without a goal, or where all (or less than two) are equal.

    Args:
        values: One per run; None or NaN where a run has none.
        goal: ``min``: lower is better; ``max``: higher.
    """
    known = {i: value for i, value in enumerate(values) if value is not None and math.isfinite(value)}
    if goal is None or len(set(known.values())) < 2:
        return set()
    best = (min if goal == "min" else max)(known.values())
    return {i for i, value in known.items() if value == best}


def merged_sections(runs: Sequence[Run]) -> list[Section]:
    """Sections of all runs by title, each with the panels of all; media stay with the runs."""
    merged: dict[str, Section] = {}
    for section in (section for run in runs for section in run.data.sections):
        known = merged.get(section.title, Section(section.title, (), {}, section.summary, section.url))
        panels = tuple(dict.fromkeys((*known.panels, *section.panels)))
        merged[section.title] = Section(known.title, panels, {}, known.summary or section.summary, known.url or section.url)
    return list(merged.values())


# ---- parts of the page -----------------------------------------------------------------------------------------------------------------


def _letter(index: int) -> str:
    """A, B, ..., Z, A1, ...: a sign of the run that isn't its colour."""
    return chr(ord("A") + index % 26) + (str(index // 26) if index >= 26 else "")


def _named(index: int, run: Run) -> str:
    return f'<span class="chip" style="--k:var(--c{index % COLORS})">{_letter(index)}</span>{breakable(run.name)}'


def _head(runs: Sequence[Run]) -> str:
    cards = []
    for index, run in enumerate(runs):
        progress, git = dict(run.data.progress), run.data.facts.get("Git", {})
        commit = git.get("commit", "")[:10] + (", with uncommitted changes" if git.get("dirty") == "True" else "")
        facts = {
            "Steps": "–" if run.steps is None else f"{run.steps:,}",
            "Epoch": progress.get("Epoch", ""),
            "Duration": progress.get("Duration", ""),
            "Started": progress.get("Started", run.data.facts.get("Environment", {}).get("started", "")),
            "Device": progress.get("Device", ""),
            "Commit": commit,
        }
        lines = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value)
        cards.append(
            f'<li style="--k:var(--c{index % COLORS})"><h2>{_named(index, run)}</h2>'
            f'<span class="pill {run.data.status}">{run.data.status}</span><dl>{lines}</dl></li>'
        )
    return f'<ul class="runs">{"".join(cards)}</ul>'


def _table(label: str, first: str, runs: Sequence[Run], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows of (HTML of the heading, a <td> for each run); without runs one column for what all share."""
    head = "".join(f'<th scope="col">{_named(index, run)}</th>' for index, run in enumerate(runs)) or '<th scope="col">All runs</th>'
    body = "".join(f'<tr><th scope="row">{heading}</th>{"".join(cells)}</tr>' for heading, cells in rows)
    return (
        f'<div class="scroll compare" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f'<thead><tr><th scope="col">{escape(first)}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _declared(runs: Sequence[Run], sections: Sequence[Section]) -> tuple[dict[str, Goal], set[str]]:
    """Declared metrics that at least one run has logged, with their goal; and those of them that aren't key figures."""
    names = _all_names(runs)
    goals: dict[str, Goal] = {}
    key: set[str] = set()
    for curve in (panel for section in sections for panel in section.panels if isinstance(panel, Curve)):
        selected = curve.select(names)
        for name in selected:
            goals[name] = goals.get(name) or curve.goal
            if curve.goal and len(selected) < MANY_CHARTS:
                key.add(name)
    return goals, set(goals) - key if key else set()


def _all_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.series))


def _figures_row(name: str, goal: Goal, runs: Sequence[Run]) -> tuple[str, list[str]]:
    figures = [summary(run.series[name], goal) if name in run.series else None for run in runs]
    best = best_of([row[0] if row else None for row in figures], goal)
    word = {"min": "lowest", "max": "highest", None: ""}[goal]
    cells = []
    for index, row in enumerate(figures):
        if row is None:
            cells.append('<td><span class="muted">not logged</span></td>')
            continue
        star = ' <span class="star" role="img" aria-label="best">★</span>' if index in best else ""
        more = f"<small>{word} {number(row[1])} at step {row[2]:,}</small>" if row[1] is not None else ""
        cells.append(f'<td class="number{" best" if index in best else ""}">{number(row[0])}{star}{more}</td>')
    better = {"min": "<small>lower is better</small>", "max": "<small>higher is better</small>", None: ""}[goal]
    return breakable(name) + better, cells


def _key_figures(runs: Sequence[Run], sections: Sequence[Section]) -> str:
    goals, minor = _declared(runs, sections)
    shown = [_figures_row(name, goal, runs) for name, goal in goals.items() if name not in minor]
    folded = [_figures_row(name, goal, runs) for name, goal in goals.items() if name in minor]
    if not shown:
        return ""
    steps = {run.steps for run in runs}
    ended = " The runs ended at different steps." if len(steps) > 1 else ""
    more = fold(f"Further metrics ({len(folded)})", _table("Further figures", "Metric", runs, folded)) if folded else ""
    listed = f'<div class="card">{_table("Key figures", "Metric", runs, shown)}</div>'
    note = f"The last logged value of each run, and its best one below; ★ and bold: the best last value.{ended}"
    return f'<section id="key-figures"><h2>Key figures</h2>{listed}<p class="note">{note}</p>{more}</section>'


def _overlaid(charts: Charts, name: str, title: str, runs: Sequence[Run], note: str = "", level: int = 3) -> str:
    lines = [
        Line(f"{name} · {run.name}", f"{_letter(index)} {run.name}", run.series[name], index)
        for index, run in enumerate(runs)
        if name in run.series
    ]
    return charts.curve(title, lines, note, level, overlaid=True)


def _curves(charts: Charts, panel: Curve, runs: Sequence[Run]) -> str:
    names = panel.select(_all_names(runs))
    if not names:
        return ""
    if len(names) == 1:
        return _overlaid(charts, names[0], panel.title, runs, panel.note)
    grid = f'<div class="grid small">{"".join(_overlaid(charts, name, name, runs, level=4) for name in names)}</div>'
    if len(names) > MANY_CHARTS:
        grid = fold(f"{len(names)} metrics, each in a chart of its own", grid)
    note = f'<p class="note">{escape(panel.note)}</p>' if panel.note else ""
    return f'<div class="card wide group"><h3>{escape(panel.title)}</h3>{note}{grid}</div>'


def _side_by_side(charts: Charts, title: str, panel: Panel, runs: Sequence[Run]) -> str:
    if isinstance(panel, Curve):
        return ""
    items = [next((s.media[panel.key] for s in run.data.sections if s.title == title and panel.key in s.media), None) for run in runs]
    if all(item is None for item in items):
        return ""
    clouds = sum(isinstance(item, CloudMedia) for item in items)
    limit = max(2000, min(MAX_CLOUD_POINTS, MAX_CLOUDS_POINTS // max(1, clouds)))
    columns = []
    for index, (run, item) in enumerate(zip(runs, items, strict=True)):
        before = len(charts.data)
        content = nothing("Nothing to show.") if item is None else charts.media(f"{panel.title}, {run.name}", item, index, limit)
        if isinstance(panel, CloudPanel):
            for chart in list(charts.data.values())[before:]:
                chart["group"] = f"{title} {panel.key}"
        columns.append(f"<div><h4>{_named(index, run)}</h4>{content}</div>")
    note = f"<figcaption>{escape(panel.note)}</figcaption>" if panel.note else ""
    wide = " tables" if isinstance(panel, TablePanel) else ""
    return (
        f'<figure class="card wide"><div class="head"><h3>{escape(panel.title)}</h3></div>'
        f'<div class="side{wide}">{"".join(columns)}</div>{note}</figure>'
    )


def _section(charts: Charts, section: Section, runs: Sequence[Run], anchor: str) -> str:
    curves = [panel for panel in section.panels if isinstance(panel, Curve)]
    panels = [_curves(charts, panel, runs) for panel in curves]
    panels += [_side_by_side(charts, section.title, panel, runs) for panel in section.panels]
    if not any(panels):
        return ""
    return f'<section id="{anchor}"><h2>{escape(section.title)}</h2><div class="grid">{"".join(panels)}</div></section>'


def _difference(label: str, first: str, runs: Sequence[Run], difference: Difference) -> str:
    def cell(value: str | None) -> str:
        return '<td><span class="muted">not set</span></td>' if value is None else f'<td class="value">{escape(value)}</td>'

    rows = [(breakable(key), [cell(value) for value in values]) for key, values in difference.different.items()]
    shown = f'<div class="card">{_table(label, first, runs, rows)}</div>' if rows else f"<p>{escape(label)}: the same in all runs.</p>"
    if not difference.equal:
        return shown
    count = len(difference.equal)
    same = [(breakable(key), [cell(value)]) for key, value in difference.equal.items()]
    folded = _table(f"{label}, equal", first, (), same)
    return shown + fold(f"{count:,} {'entry is' if count == 1 else 'entries are'} the same in all runs", folded)


def _config(runs: Sequence[Run]) -> str:
    difference = differences([flat_config(run.data.config) for run in runs])
    if not difference.different and not difference.equal:
        return ""
    return f'<section id="config"><h2>Configuration</h2>{_difference("Configuration", "Key", runs, difference)}</section>'


def _facts(runs: Sequence[Run]) -> str:
    tables = [{f"{heading}: {name}": value for heading, facts in run.data.facts.items() for name, value in facts.items()} for run in runs]
    difference = differences(tables)
    if not difference.different and not difference.equal:
        return ""
    return f'<section id="facts"><h2>Code and environment</h2>{_difference("Code and environment", "Fact", runs, difference)}</section>'


def render_comparison(
    runs: Sequence[tuple[str, ReportData]], note: str = "", origin: str = "", verdict: Callable[[str], str] = lambda slug: ""
) -> str:
    """Several runs on one page.

    Args:
        runs: Names, no two alike, and what the runs' reports show; at least two. Texts are escaped here.
        note: The user's own words about the comparison.
        origin: Mark of the runs for :func:`lit_methods.reports.html.origin_of`.
        verdict: The measured verdict on a technique's claim in words, by slug; "" where none is known.

    Returns:
        HTML that refers to nothing outside itself (links to papers apart).

    Raises:
        ValueError: Fewer than two runs, or two of the same name.
    """
    if len(runs) < 2 or len({name for name, _ in runs}) < len(runs):
        raise ValueError(f"a comparison needs two or more runs with names of their own, got {[name for name, _ in runs]}")
    compared, charts = [Run(name, data) for name, data in runs], Charts()
    sections = merged_sections(compared)
    anchors = [f"{slug(section.title)}-{index}" for index, section in enumerate(sections)]
    bodies = [_section(charts, section, compared, anchor) for section, anchor in zip(sections, anchors, strict=True)]
    names = _all_names(compared)
    drawn = "".join(_overlaid(charts, name, name, compared) for name in names)
    folded = fold(f"{len(names)} metrics, each in a chart of its own", f'<div class="grid small">{drawn}</div>')
    technique = technique_notes([section.title for section in sections], verdict)
    parts = {
        "key-figures": ("Key figures", _key_figures(compared, sections)),
        **{anchor: (section.title, body) for anchor, section, body in zip(anchors, sections, bodies, strict=True)},
        "all-metrics": ("All metrics", f'<section id="all-metrics"><h2>All metrics</h2>{folded}</section>' if names else ""),
        "config": ("Configuration", _config(compared)),
        "facts": ("Code and environment", _facts(compared)),
        "techniques": ("Techniques", f'<section id="techniques"><h2>Techniques</h2>{technique}</section>' if technique else ""),
    }
    said = [notes(note)]
    for index, run in enumerate(compared):
        warnings = interrupted(run.data) + notes(run.data.notes) + not_finite(run.series)
        said.append(f'<section aria-label="{escape(run.name)}"><h2>{_named(index, run)}</h2>{warnings}</section>' if warnings else "")
    targets = [(anchor, text) for anchor, (text, body) in parts.items() if body]
    title = f"{len(compared)} runs compared" if len(compared) > 2 else f"{compared[0].name} and {compared[1].name}"
    return page(title, _head(compared), [*said, *(body for _, body in parts.values())], targets, charts, origin)
