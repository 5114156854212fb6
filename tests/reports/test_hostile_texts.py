"""Whatever stands in a run's names, texts and files is shown as text in its report, and changes no element of the page."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import Page

from lit_methods.panels import (
    CloudMedia,
    CloudPanel,
    Curve,
    HistogramMedia,
    HistogramPanel,
    ImageMedia,
    ImagePanel,
    TableMedia,
    TablePanel,
)
from lit_methods.reports.compare import render_comparison
from lit_methods.reports.page import Record, ReportData, Section, record_line, render_report
from lit_methods.reports.record import load_run, save_run

EVIL = "</h1></code></script><script>alert(1)</script><img src=x onerror='alert(2)'>\" onload=\"alert(3)\" '&lt;{{data}}javascript:"
TAME = EVIL.replace("<", "(").replace(">", ")").replace('"', "~").replace("'", "~").replace("&", "+")


def a_run(word: str) -> ReportData:
    """``word`` wherever a report shows a text that comes from a user, a run or a file."""
    panels = (
        Curve(f"c{word}", (f"m{word}", f"n{word}/*"), f"note{word}", "min"),
        HistogramPanel(f"h{word}", f"h/{word}"),
        CloudPanel(f"p{word}", f"p/{word}"),
        ImagePanel(f"i{word}", f"i/{word}"),
        TablePanel(f"t{word}", f"t/{word}"),
        ImagePanel(f"later{word}", f"l/{word}"),
    )
    points = np.arange(12, dtype=np.float32).reshape(4, 3)
    media = {
        f"h/{word}": HistogramMedia(np.array([3, 1]), np.array([0.0, 1.0, 2.0])),
        f"p/{word}": CloudMedia(points, np.zeros((4, 3), np.uint8), f"cap{word}", np.array([0, 0, 1, 1]), (f"a{word}", f"b{word}")),
        f"i/{word}": ImageMedia(np.zeros((4, 5, 3), np.uint8), f"alt{word}"),
        f"t/{word}": TableMedia((f"col{word}", "value"), ((f"cell{word}", 1.0), (f"other{word}", float("nan")))),
    }
    history = [Record(step, 0, {f"m{word}": 1.0 * step, f"own/{word}": float("nan") if step == 2 else 1.0}) for step in range(4)]
    return ReportData(
        title=f"title{word}",
        status="interrupted",
        sections=(Section(f"s{word}", panels, media, f"summary{word}", f"https://example.org/{word}"), Section("u", (), {}, "s", word)),
        history=history,
        message=f"message{word}",
        progress=((f"Epoch{word}", f"1{word}"), ("Device", word), ("Duration", word)),
        config=f"model: {{class_path: {json.dumps(word)}}}\n{json.dumps(word)}: {json.dumps(word)}\n",
        checkpoints=((f"file{word}", f"role{word}", f"score{word}"),),
        facts={f"F{word}": {f"k{word}": f"v{word}"}, "Git": {"commit": word, "dirty": "True"}, "Environment": {"started": word}},
        notes=f"notes{word}",
    )


def elements(text: str) -> list[Any]:
    """The page's elements with the names of their attributes."""
    page = Page(text)
    assert page.charts, "the data of the charts can be read"
    return [(tag, sorted(attributes)) for tag, attributes in page.elements]


@pytest.mark.parametrize("kind", ["one run", "several runs", "a run from its files"])
def test_no_text_makes_an_element(kind: str, tmp_path: Path) -> None:
    pages = []
    for word in (EVIL, TAME):
        data = a_run(word)
        if kind == "a run from its files":
            folder = tmp_path / str(len(pages))
            folder.mkdir()
            save_run(folder, data)
            (folder / "metrics.jsonl").write_text("".join(map(record_line, data.history)))
            (folder / "notes.md").write_text(data.notes)
            data = load_run(folder)
        if kind == "several runs":
            other = dataclasses.replace(a_run(word), config=f"x: {json.dumps(word)}\n", title="other")
            pages.append(
                render_comparison([(f"one{word}", data), (f"two{word}", other)], f"title{word}", verdict=lambda _, word=word: word)
            )
        else:
            pages.append(render_report(data))
    evil, tame = map(elements, pages)
    assert evil == tame
    links = [attributes["href"] for attributes in Page(pages[0]).all("a")]
    assert all(link.startswith(("#", "https://")) for link in links), links


def test_a_name_in_a_record_leads_nowhere(tmp_path: Path) -> None:
    save_run(tmp_path, a_run("x"))
    (tmp_path / "secret.json").write_text(json.dumps({"columns": ["secret"], "rows": []}))
    record = json.loads((tmp_path / "report.json").read_text())
    entry = next(entry for entry in record["sections"][0]["media"].values() if entry["kind"] == "TableMedia")
    entry["file"] = "../secret.json"
    (tmp_path / "report.json").write_text(json.dumps(record))
    with pytest.raises(FileNotFoundError, match="media"):
        load_run(tmp_path)
