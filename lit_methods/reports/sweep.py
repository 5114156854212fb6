"""The page of a sweep: its trials in a table that sorts, and as lines through parallel axes."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_methods.reports.html import Charts, breakable, escape, figure, number, page

SUMMARY = "sweep.json"
STATES = {"finished": "finished", "stopped early": "unknown", "failed": "interrupted", "running": "running"}  # -> pill of the page


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What ``lit sweep`` has kept of a sweep; None where the folder is none's.

    Raises:
        ValueError: The file is damaged.
    """
    file = folder / SUMMARY
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("trials"), list):
        raise ValueError(f"{file} holds no trials")
    return content


def render_sweep(summary: Mapping[str, Any], folder: Path, place: Path, origin: str = "") -> str:
    """HTML of a sweep, which loads nothing from outside itself; links lead to the reports of its runs.

    Args:
        summary: As ``sweep.json`` holds it.
        folder: The sweep's folder.
        place: The folder that the page will lie in.
        origin: Mark of the page for :func:`~lit_methods.reports.html.origin_of`.
    """
    charts = Charts()
    trials, better = summary["trials"], "lower" if summary["goal"] == "minimize" else "higher"
    states = [trial["state"] for trial in trials]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none yet"
    facts = {"Trials": counted, "Metric": f"{summary['metric']}, {better} is better", "Method": summary["method"]}
    facts["Every trial"] = "lit " + " ".join(summary["words"])
    head = '<dl class="progress">' + "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items()) + "</dl>"
    body = [
        _section("Parallel coordinates", _coordinates(charts, summary)),
        _section("Trials", f'<div class="card">{_table(summary, folder, place)}</div>'),
    ]
    return page(f"{summary['name']}: {len(trials)} trials", head, body, [("coordinates", "Plot"), ("trials", "Trials")], charts, origin)


def _section(heading: str, content: str) -> str:
    anchor = heading.split()[-1].lower()
    return f'<section id="{anchor}"><h2>{heading}</h2>{content}</section>' if content else ""


def _ordered(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Best first, those without a value last."""
    sign = 1 if summary["goal"] == "minimize" else -1
    return sorted(summary["trials"], key=lambda trial: (trial["value"] is None, sign * (trial["value"] or 0.0)))


def _table(summary: Mapping[str, Any], folder: Path, place: Path) -> str:
    columns = ["Trial", "State", summary["metric"], *(_short(key) for key in summary["parameters"]), "Logged", "Seconds"]
    keys = "".join(f'<th scope="col"><button type="button" class="sort">{breakable(column)}</button></th>' for column in columns)
    rows = "".join(f"<tr>{''.join(_cells(trial, summary, folder, place))}</tr>" for trial in _ordered(summary))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Trials"><table class="sortable">'
        f"<thead><tr>{keys}</tr></thead><tbody>{rows}</tbody></table></div>"
        '<p class="note">A heading sorts; the best trial stands first. The number leads to the report of the run.</p>'
    )


def _cells(trial: Mapping[str, Any], summary: Mapping[str, Any], folder: Path, place: Path) -> list[str]:
    run = trial.get("run")
    name = f"{trial['number']}"
    if run and (report := folder / run / "report.html").is_file():
        name = f'<a href="{escape(os.path.relpath(report, place))}">{name}</a>'
    why = f'<small class="muted">{escape(trial["why"])}</small>' if trial.get("why") else ""
    return [
        f'<td data-value="{trial["number"]}">{name}</td>',
        f'<td data-value="{escape(trial["state"])}"><span class="pill {STATES[trial["state"]]}">{trial["state"]}</span> {why}</td>',
        _cell(trial["value"]),
        *(_cell(trial["values"].get(key)) for key in summary["parameters"]),
        _cell(trial.get("logged")),
        _cell(trial.get("seconds")),
    ]


def _cell(value: Any) -> str:
    if value is None:
        return '<td data-value="">–</td>'
    if isinstance(value, bool | str | list | dict):
        text = value if isinstance(value, str) else json.dumps(value)
        return f'<td data-value="{escape(text)}">{escape(text)}</td>'
    return f'<td class="number" data-value="{value!r}">{number(value) if isinstance(value, float) else value}</td>'


def _short(key: str) -> str:
    return key.replace(".init_args.", ".")


def _coordinates(charts: Charts, summary: Mapping[str, Any]) -> str:
    """One line a trial with a value, through an axis for each parameter that differs, and one for the metric."""
    trials = [trial for trial in summary["trials"] if trial["value"] is not None]
    axes = []
    for key in summary["parameters"]:
        values = [trial["values"].get(key) for trial in trials]
        if len({json.dumps(value) for value in values}) > 1:
            axes.append(_axis(_short(key), values, key in summary.get("logarithmic", ())))
    if len(trials) < 2 or not axes:
        return ""
    found = [trial["value"] for trial in trials]
    axes.append(_axis(summary["metric"], found, False))
    chart = {"kind": "parallel", "axes": axes, "color": found, "reversed": summary["goal"] == "maximize"}
    text = f"Parallel coordinates of {len(trials)} trials; {summary['metric']} from {number(min(found))} to {number(max(found))}"
    note = "A line for each trial; the darkest are the best. Drag along an axis to choose trials, drag a name to move its axis."
    return figure("Values of the trials, and what came of them", charts.plot(text, chart), note, wide=True)


def _axis(label: str, values: list[Any], logarithmic: bool) -> dict[str, Any]:
    """Numbers as they are, or their logarithm with ticks; other values by their place in a list."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        if not logarithmic or min(values) <= 0:
            return {"label": label, "values": values}
        low, high = (math.log10(end(values)) for end in (min, max))
        ticks = [low + (high - low) * part / 4 for part in range(5)]
        return {"label": label, "values": [math.log10(value) for value in values], "ticks": ticks, "texts": [f"{10**t:.2g}" for t in ticks]}
    texts = list(dict.fromkeys(value if isinstance(value, str) else json.dumps(value) for value in values))
    places = [texts.index(value if isinstance(value, str) else json.dumps(value)) for value in values]
    return {"label": label, "values": places, "ticks": list(range(len(texts))), "texts": texts}
