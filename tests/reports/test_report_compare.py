"""Several runs on one page, and the command that finds the runs and chooses the file."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_report import EVIL, Page

from forks import HANGS
from lit_methods.cli import report as command
from lit_methods.cli.main import main
from lit_methods.cli.report import find_runs, short_names
from lit_methods.errors import CommandError
from lit_methods.panels import CloudMedia, CloudPanel, Curve, ImageMedia, ImagePanel, TableMedia, TablePanel
from lit_methods.reports.compare import best_of, differences, render_comparison
from lit_methods.reports.html import origin_of, technique_notes
from lit_methods.reports.html import short_names as short_metrics
from lit_methods.reports.page import Record, ReportData, Section, record_line
from lit_methods.reports.record import load_run, save_run

PANELS = (
    Curve("Loss", ("flow/loss",), goal="min"),
    Curve("Score", ("flow/score/*",), goal="max"),
    Curve("Rank", ("flow/rank",)),
    ImagePanel("Camera", "flow/image"),
    CloudPanel("Cloud", "flow/cloud"),
    TablePanel("Classes", "flow/table"),
)


def a_run(losses: list[float], config: str, grey: int = 9, *, extra: str = "", panels=PANELS, points: int = 30_000) -> ReportData:
    """A run with a loss at every tenth step."""
    history = [Record(10 * i + 9, i, {"flow/loss": loss, "flow/score/a": 0.5, "flow/rank": float(i)}) for i, loss in enumerate(losses)]
    if extra:
        history.append(Record(10 * len(losses) + 9, 0, {extra: 1.0}))
    cloud = np.random.default_rng(0).normal(size=(points, 3)).astype(np.float32)
    media = {
        "flow/image": ImageMedia(np.full((4, 6, 3), grey, np.uint8), f"grey {grey}"),
        "flow/cloud": CloudMedia(cloud, np.zeros((points, 3), np.uint8), "many points"),
        "flow/table": TableMedia(("class", "IoU"), (("car", float(grey)),)),
    }
    facts = {"Git": {"commit": f"{grey:040d}", "dirty": "True"}, "Environment": {"torch": "2.6"}}
    return ReportData(
        "t", "finished", (Section("SuperFlow", panels, media),), history, config=config, facts=facts, progress=(("Duration", "3 s"),)
    )


@pytest.fixture(scope="module")
def page() -> Page:
    first = a_run([3.0, 1.0, 2.0], "model: {class_path: x.Net, init_args: {width: 4, depth: 2}}\n", extra="only/first")
    second = a_run([4.0, 1.5], "model: {class_path: x.Net, init_args: {width: 8, depth: 2}}\nseed: 1\n", 77)
    third = dataclasses.replace(a_run([math.nan], "{}", 5), status="interrupted", message=f"why {EVIL}", notes=f"noted {EVIL}", sections=())
    return Page(
        render_comparison([("one", first), (EVIL, second), ("three", third)], f"together {EVIL}", verdict=lambda slug: f"{slug} holds")
    )


def rows(page: Page, text: str) -> dict[str, str]:
    """Rows of a page's tables as plain text, by first cell."""
    found = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", text)
    plain = lambda html: re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html)).strip()  # noqa: E731
    return {re.sub(r" (lower|higher) is better$", "", plain(head)).replace("/ ", "/"): plain(body) for head, body in found}


def test_the_best_value_follows_the_goal() -> None:
    assert best_of([3.0, 1.0, None, math.nan, 1.0], "min") == {1, 4}
    assert best_of([3.0, 1.0, math.inf], "max") == {0}
    assert best_of([3.0, 1.0], None) == set()
    assert best_of([1.0, 1.0], "max") == set()  # no best among equals
    assert best_of([1.0, None], "max") == set()  # nor without another to compare with


def test_differences_of_tables() -> None:
    found = differences([{"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"}])
    assert found.equal == {"a": "1"}
    assert found.different == {"b": ("2", "9"), "c": ("3", None), "d": (None, "4")}


def test_names_lose_the_folders_that_all_share() -> None:
    assert short_metrics(["a/iou/car", "a/iou/road"]) == ["car", "road"]
    assert short_metrics(["a/loss", "b/loss"]) == ["a/loss", "b/loss"]
    assert short_metrics(["a/loss", "a"]) == ["a/loss", "a"]
    assert short_metrics(["a/loss"]) == ["a/loss"]


def test_key_figures_mark_the_best_last_value() -> None:
    runs = [("one", a_run([3.0, 1.0, 2.5], "")), ("two", a_run([4.0, 1.5], ""))]
    table = rows(Page(""), render_comparison(runs))
    assert table["flow/loss"] == "2.5 lowest 1 at step 19 1.5 ★ lowest 1.5 at step 19"
    assert "★" not in table["flow/score/a"]  # equal
    assert "★" not in table["flow/rank"]  # no goal
    best = re.search(r'<td class="number best">1\.5 <span class="star" role="img" aria-label="best">', render_comparison(runs))
    assert best, "bold for the eye, and a word for who doesn't see it"


def test_curves_lie_on_top_of_each_other_in_the_colour_of_their_run(page: Page) -> None:
    curves = [chart for chart in page.charts.values() if chart["kind"] == "curve"]
    loss = next(chart for chart in curves if chart["traces"][0]["name"].startswith("flow/loss"))
    assert [(t["label"], t["color"], t["x"], t["y"]) for t in loss["traces"]] == [
        ("A one", 0, [9, 19, 29], [3.0, 1.0, 2.0]),
        (f"B {EVIL}", 1, [9, 19], [4.0, 1.5]),
        ("C three", 2, [9], [None]),
    ]
    alone = next(chart for chart in curves if chart["traces"][0]["name"].startswith("only/first"))
    assert [trace["color"] for trace in alone["traces"]] == [0]


def test_media_stand_side_by_side(page: Page) -> None:
    assert [image["alt"] for image in page.all("img") if image["alt"].startswith("grey")] == ["grey 9", "grey 77"]
    clouds = [chart for chart in page.charts.values() if chart["kind"] == "cloud"]
    assert len(clouds) == 2
    assert len({chart["group"] for chart in clouds}) == 1  # turned together
    assert page.text.count("20,000 of 30,000 points") == 2
    assert "Nothing to show." in page.text  # the third run has no media


def test_many_clouds_share_the_points() -> None:
    page = Page(render_comparison([(str(i), a_run([1.0], "")) for i in range(8)]))
    assert page.text.count("5,000 of 30,000 points") == 8


def test_only_what_differs_stands_in_the_config_table(page: Page) -> None:
    assert "not set" in page.text
    assert "model.width" in page.text.replace("\u200b", "")
    equal = render_comparison([("a", a_run([1.0], "x: 1\n")), ("b", a_run([1.0], "x: 1\n"))])
    assert "Configuration: the same in all runs." in equal
    assert rows(page, equal)["x"] == "1"
    differ = rows(page, render_comparison([("a", a_run([1.0], "x: 1\ny: 2\n")), ("b", a_run([1.0], "x: 3\ny: 2\n", 8))]))
    assert differ["x"] == "1 3"
    assert differ["y"] == "2"  # once, in the folded table
    assert differ["Git: commit"] == f"{9:040d} {8:040d}"
    assert differ["Environment: torch"] == "2.6"


def test_the_head_says_what_the_runs_are(page: Page) -> None:
    words = re.sub(r"\s+", " ", page.text)
    assert "3 runs compared" in words
    assert [span["class"] for span in page.all("span") if span.get("class", "").startswith("pill")] == [
        "pill finished",
        "pill finished",
        "pill interrupted",
    ]
    assert "Steps40" in words.replace(" ", "")  # 39 is the last step of the first, counted from 0
    assert "0000000000, with uncommitted changes" in words
    assert "The runs ended at different steps." in words


def test_technique_notes_come_from_the_catalogue(page: Page) -> None:
    assert "superflow holds" in page.text
    assert any(link["href"] == "https://arxiv.org/abs/2503.19912" for link in page.all("a"))
    assert "Measured" not in technique_notes(["SuperFlow 2"])
    assert "Claim" in technique_notes(["SuperFlow 2"])
    assert technique_notes(["Nobody"]) == ""
    shared = technique_notes(["ImageSegmentor", "MultiScaleConsistency", "ADELE"])  # AdaWAC's entry names the module, too
    assert shared.count("<strong>Claim.") == 1
    assert "ADELE: Adaptive Early-Learning" in shared


def test_everything_is_escaped(page: Page) -> None:
    assert len(page.scripts) == 3
    for part in ("why ", "noted ", "together "):
        assert f"{part}{EVIL}" in page.text
    assert all(image["alt"] for image in page.all("img"))
    anchors = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(anchors) == len(set(anchors))


def test_runs_with_different_metrics_and_panels() -> None:
    other = a_run([1.0], "", extra="other/metric", panels=(Curve("Other", ("other/metric",), goal="max"),))
    text = render_comparison(
        [("a", a_run([1.0], "")), ("b", dataclasses.replace(other, sections=(Section("Other", other.sections[0].panels),)))]
    )
    assert rows(Page(text), text)["other/metric"] == "not logged 1 highest 1 at step 19"
    assert "No metric" not in render_comparison([("a", ReportData("a", "unknown")), ("b", ReportData("b", "unknown"))])
    with pytest.raises(ValueError, match="names of their own"):
        render_comparison([("a", other), ("a", other)])


# ---- the command -----------------------------------------------------------------------------------------------------------------------


def keep(folder: Path, data: ReportData, written: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(map(record_line, data.history)))
    (folder / "config.yaml").write_text(data.config)
    save_run(folder, data)
    for path in folder.iterdir():
        os.utime(path, (written, written))
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs"
    small = {"points": 50}
    keep(root / "flow" / "20260101-000000", a_run([3.0], "x: 1\n", **small), 3000)
    keep(root / "flow" / "20260102-000000", a_run([2.0], "x: 2\n", **small), 2000)
    keep(root / "probe" / "20260101-000000", a_run([1.0], "x: 3\n", **small), 1000)
    return root


def test_runs_are_found_by_folder_name_and_pattern(runs: Path) -> None:
    first, second, probe = runs / "flow/20260101-000000", runs / "flow/20260102-000000", runs / "probe/20260101-000000"
    root = Path("runs")
    assert find_runs(["flow"], root) == [first]  # the one that was written last, whatever its name
    assert find_runs(["runs/flow/20260102-000000", "probe"], root) == [second, probe]
    assert find_runs(["flow/20260102-000000/"], root) == [second]
    assert find_runs([str(runs / "flow")], root) == [first]
    assert find_runs(["runs/*/*"], root) == [first, second, probe]
    assert find_runs(["*/20260101*"], root) == [first, probe]
    assert find_runs(["runs/*"], root) == [first, probe]  # names: the newest of each
    assert find_runs(["flow", "flow", str(first)], root) == [first]
    assert find_runs([str(second / "report.json")], root) == [second]
    with pytest.raises(CommandError, match=r"no run 'prob'.*\n  nearest: probe"):
        find_runs(["flow", "prob"], root)
    with pytest.raises(CommandError, match=r"no run matches 'zzz\*'"):
        find_runs(["zzz*"], root)
    with pytest.raises(CommandError, match="nothing/ holds no runs"):
        find_runs(["zzz"], Path("nothing"))


def test_names_are_as_short_as_tells_the_runs_apart(tmp_path: Path) -> None:
    assert short_names([tmp_path / "a/1", tmp_path / "b/1"]) == ["a", "b"]
    assert short_names([tmp_path / "a/1", tmp_path / "a/2"]) == ["a/1", "a/2"]
    assert short_names([tmp_path / "x/a/1", tmp_path / "y/a/1"]) == ["x/a/1", "y/a/1"]


def test_one_run_is_drawn_anew(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "flow/20260101-000000/notes.md").write_text("kept <note>")
    assert main(["report", "flow", "--notes", "said <note>"]) == 0
    assert capsys.readouterr().out == "report: runs/flow/20260101-000000/report.html\n"
    page = Page((runs / "flow/20260101-000000/report.html").read_text(encoding="utf-8"))
    assert "said <note>" in page.text
    assert "kept <note>" in page.text
    assert [image["alt"] for image in page.all("img")] == ["grey 9", "many points (from above)"]
    assert main(["report", "flow", "--no-media", "--out", "bare.html"]) == 0
    assert Page(Path("bare.html").read_text(encoding="utf-8")).all("img") == []


def test_several_runs_are_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "flow", "probe"]) == 0
    assert capsys.readouterr().out == "comparison of 2 runs: runs/comparison.html\n"
    assert "flow and probe" in Page((runs / "comparison.html").read_text(encoding="utf-8")).text
    assert main(["report", "probe", "flow"]) == 0  # the same runs: the same file
    assert capsys.readouterr().out == "comparison of 2 runs: runs/comparison.html\n"
    assert main(["report", "runs/*/*"]) == 0  # other runs: a file of their own
    assert capsys.readouterr().out == "comparison of 3 runs: runs/comparison-2.html\n"
    assert main(["report", "runs/flow/*"]) == 0
    assert capsys.readouterr().out == "comparison of 2 runs: runs/flow/comparison.html\n"


def test_only_a_report_of_the_same_runs_is_replaced(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = Path("mine.html")
    mine.write_text("my own page")
    assert main(["report", "flow", "probe", "--out", "mine.html"]) == 2
    assert "mine.html exists and is no report of these runs" in capsys.readouterr().err
    assert mine.read_text() == "my own page"
    assert main(["report", "flow", "probe", "--out", "mine.html", "--force"]) == 0
    assert main(["report", "flow", "probe", "--out", "mine.html"]) == 0
    assert main(["report", "runs/*/*", "--out", "mine.html"]) == 2
    assert main(["report", "flow", "probe", "--out", "runs"]) == 2
    assert "runs is a folder" in capsys.readouterr().err
    assert main(["report", "flow", "--out", "runs/flow/20260101-000000/report.html"]) == 0
    assert main(["report", "flow", "probe", "--out", "new/folder/page.html"]) == 0
    assert origin_of(Path("new/folder/page.html"))


def test_errors_say_what_to_do(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "flaw"]) == 2
    assert capsys.readouterr().err.splitlines()[1].startswith("  nearest: flow")
    assert main(["report"]) == 2
    assert "run" in capsys.readouterr().err
    (image,) = (runs / "probe/20260101-000000/media").glob("*.png")
    image.unlink()
    assert main(["report", "probe"]) == 1
    error = capsys.readouterr().err
    assert image.name in error
    assert "lit report --no-media" in error
    assert main(["report", "probe", "--no-media"]) == 0
    assert load_run(runs / "probe/20260101-000000", media=False).title == "t"


def test_a_verdict_is_read_from_the_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "package_folder", lambda name: tmp_path / name)
    assert command.verdict("flow") == ""
    path = tmp_path / "docs" / "evidence" / "flow.json"
    path.parent.mkdir(parents=True)
    record = {"verdict": {"verdict": "holds", "better": 4}, "seeds": [0, 1, 2, 3, 4], "date": "2026-01-02"}
    path.write_text(json.dumps(record))
    assert command.verdict("flow") == "holds: better in 4 of 5 seeds, measured on 2026-01-02"
    again = record | {"setting": "digits", "verdict": {"verdict": "undecided"}}
    path.write_text(json.dumps(record | {"setting": "drawn", "settings": {"digits": again}}))
    assert command.verdict("flow") == "holds in 1 of 2 (drawn: holds; digits: undecided)"
    path.write_text(json.dumps(record | {"verdict": None}))
    assert command.verdict("flow") == ""


def test_a_report_needs_no_torch(runs: Path) -> None:
    code = (
        "import sys; from lit_methods.cli.main import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'wandb', 'scipy', 'rich'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    for words, status in ((["flow", "probe"], 0), (["flow"], 0), (["flaw"], 2)):
        done = subprocess.run([sys.executable, "-c", code, "report", *words], capture_output=True, text=True, timeout=HANGS, check=False)
        assert done.returncode == status, done.stderr
    code = code.replace("'torch'", "'torch', 'numpy', 'PIL', 'plotly'")
    done = subprocess.run([sys.executable, "-c", code, "report", "--help"], capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr
    assert "--run_root" in done.stdout
