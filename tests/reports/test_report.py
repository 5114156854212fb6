"""The report as a document: what stands in it, that it is safe, that it needs nothing else; and the history on disk."""

import base64
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from lit_methods.files import write_atomically
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
from lit_methods.reports import html
from lit_methods.reports.html import subsample, thin
from lit_methods.reports.page import Record, ReportData, Section, read_history, record_line, render_report

EVIL = "<script>alert('x')</script>&\"{{plotly}}"


class Page(HTMLParser):
    """What a browser would see: elements with attributes, the text outside scripts, the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._stack: list[str] = []
        self.feed(text)
        self.close()
        assert not self._stack, f"never closed: {self._stack}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "img", "input", "wbr"):
            self._stack.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self._stack, f"</{tag}> closes nothing"
        assert self._stack.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if self._stack and self._stack[-1] == "script":
            self.scripts[-1] += data
        elif not self._stack or self._stack[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def charts(self) -> dict[str, dict]:
        return json.loads(self.scripts[0])


def floats(packed: dict[str, str]) -> np.ndarray:
    assert packed["dtype"] == "f4"
    return np.frombuffer(base64.b64decode(packed["bdata"]), dtype="<f4")


@pytest.fixture(scope="module")
def cloud() -> CloudMedia:
    points = np.array([[0, 0, 0], [1, 2, 3], [4, 5, 6], [np.nan, 0, 0]], dtype=np.float32)
    colors = np.array([[255, 0, 0], [255, 0, 0], [0, 128, 255], [0, 0, 0]], dtype=np.uint8)
    return CloudMedia(points, colors, f"scan {EVIL}", labels=np.array([0, 0, 7, 1]), class_names=(f"car {EVIL}", "road"))


@pytest.fixture(scope="module")
def data(cloud: CloudMedia) -> ReportData:
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[5, 7] = (10, 200, 30)
    section = Section(
        "Flow",
        (
            Curve("Loss", ("flow/loss",), note=f"falls {EVIL}", goal="min"),
            Curve("Accuracy", ("flow/accuracy/*",), goal="max"),
            Curve("Absent", ("flow/absent",)),
            HistogramPanel("Sizes", "flow/sizes"),
            CloudPanel("Cloud", "flow/cloud"),
            ImagePanel("Camera", "flow/image"),
            TablePanel("Classes", "flow/table"),
            ImagePanel("Later", "flow/later"),
        ),
        {
            "flow/sizes": HistogramMedia(np.array([3, 0, 5]), np.array([0.0, 1.0, 2.0, 4.0])),
            "flow/cloud": cloud,
            "flow/image": ImageMedia(pixels, f"a green dot {EVIL}"),
            "flow/table": TableMedia(("class", "IoU"), ((EVIL, 0.123456), ("road", 1.0))),
        },
        summary="Follows groups through time.",
        url="https://arxiv.org/abs/0000.00000",
    )
    history = [
        Record(9, 0, {"flow/loss": 3.0, "flow/accuracy/a": 0.1, f"own/{EVIL}": 1.0}),
        Record(19, 0, {"flow/loss": 1.0, "flow/accuracy/a": 0.7, "flow/accuracy/b": 0.2}),
        Record(29, 1, {"flow/loss": 2.0, "flow/accuracy/a": 0.6, "bad": math.nan}),
    ]
    return ReportData(
        title=f"run {EVIL}",
        status="interrupted",
        sections=(section,),
        history=history,
        message=f"OSError: {EVIL}",
        progress=(("Epoch", "2 of 9"),),
        config=f"model: {EVIL}\n",
        checkpoints=(("checkpoints/last.ckpt", "best", "loss 1"),),
        facts={"Git": {"commit": EVIL}, "Nothing": {}},
    )


@pytest.fixture(scope="module")
def text(data: ReportData) -> str:
    return render_report(data)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_every_panel_and_fact_is_there(page: Page, data: ReportData) -> None:
    for panel in data.sections[0].panels:
        assert panel.title in page.text
    for expected in ("Follows groups", "Not logged yet: flow/absent", "Nothing to show yet.", "checkpoints/last.ckpt", "2 of 9", "0.1235"):
        assert expected in page.text
    assert "Nothing\n" not in page.text  # a table of facts without facts is left out
    assert {"class": "pill interrupted"} in page.all("span")


def test_key_figures_name_the_best_value_by_goal(page: Page) -> None:
    words = re.sub(r"\s+", " ", page.text)
    assert re.search(r"flow/loss ?2 ?lowest 1 at step 19", words), words[:600]
    assert re.search(r"flow/accuracy/a ?0\.6 ?highest 0\.7 at step 19", words)
    assert "bad: 1 of 1, first at step 29" in words


@pytest.mark.parametrize(("goal", "columns"), [(None, "Metric Last"), ("min", "Metric Last Best At step")])
def test_key_figures_have_no_empty_columns(goal: Literal["min"] | None, columns: str) -> None:
    section = Section("Own", (Curve("Loss", ("loss",), goal=goal),), {})
    shown = Page(render_report(ReportData("run", "finished", (section,), [Record(9, 0, {"loss": 3.0})])))
    head = shown.text.partition("All declared metrics (1)")[2]
    assert re.match(columns.replace(" ", r"\s*") + r"\s*loss", head.strip()), head[:80]


def test_charts_hold_the_logged_values(page: Page) -> None:
    curves = [chart for chart in page.charts.values() if chart["kind"] == "curve"]
    assert curves[0]["traces"] == [{"name": "flow/loss", "label": "flow/loss", "x": [9, 19, 29], "y": [3.0, 1.0, 2.0], "color": 0}]
    assert [trace["name"] for trace in curves[1]["traces"]] == ["flow/accuracy/a", "flow/accuracy/b"]
    assert [trace["label"] for trace in curves[1]["traces"]] == ["a", "b"]  # what all share is in the heading
    assert len(curves) == 2 + 5  # two declared ones with values, and one for each of all metrics
    assert [c["traces"][0]["y"] for c in curves if c["traces"][0]["name"] == "bad"] == [[None]]
    (histogram,) = (chart for chart in page.charts.values() if chart["kind"] == "histogram")
    assert histogram == {"kind": "histogram", "counts": [3.0, 0.0, 5.0], "edges": [0.0, 1.0, 2.0, 4.0], "color": 0}


def test_a_cloud_has_one_trace_per_class_in_its_own_colours(page: Page) -> None:
    (chart,) = (chart for chart in page.charts.values() if chart["kind"] == "cloud")
    car, unknown = chart["traces"]
    assert car["name"] == f"car {EVIL}"
    assert car["color"] == "#ff0000"
    np.testing.assert_array_equal([floats(car[axis]) for axis in "xyz"], [[0, 1], [0, 2], [0, 3]])
    assert unknown["name"] == "class 7"
    assert unknown["color"] == "#0080ff"
    assert "3 of 4 points" in page.text  # the NaN point is left out, and the reader is told


def test_pictures_are_embedded_with_alternative_texts(page: Page) -> None:
    pictures = page.all("img")
    assert [picture["alt"] for picture in pictures] == [f"scan {EVIL} (from above)", f"a green dot {EVIL}"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[1]["src"].partition("base64,")[2]))))
    assert pixels.shape == (20, 30, 3)
    assert tuple(pixels[5, 7]) == (10, 200, 30)
    assert all(box["aria-label"] for box in page.all("div") if box.get("role") == "img")


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    loading = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src", "object": "data"}
    addresses = [attributes[loading[tag]] for tag, attributes in page.elements if tag in loading and loading[tag] in attributes]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "@import" not in Path(html.__file__).with_name("template.html").read_text(encoding="utf-8")


def test_user_text_is_escaped_everywhere(page: Page, text: str) -> None:
    assert len(page.scripts) == 3  # the data, plotly, ours: no fourth one from a name
    assert "<script>alert" not in text
    for part in ("run ", "OSError: ", "falls ", "model: ", "own/"):
        assert f"{part}{EVIL}" in page.text
    assert text.count("plotly.js v") == 1  # included once, although a text asks for {{plotly}}


def test_it_is_a_decent_document(page: Page, text: str) -> None:
    assert text.startswith("<!doctype html>")
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert {link["href"][1:] for link in page.all("a") if link["href"].startswith("#")} <= set(names)
    assert set(page.charts) <= set(names)


def test_without_metrics_and_media() -> None:
    empty = Page(render_report(ReportData("empty", "running")))
    assert "No metric was logged" in empty.text
    assert empty.charts == {}
    cloud = CloudMedia(np.zeros((0, 3)), np.zeros((0, 3), dtype=np.uint8), "no point")
    bare = Page(render_report(ReportData("bare", "running", (Section("Bare", (CloudPanel("Cloud", "c"),), {"c": cloud}),))))
    assert "0 points" in bare.text


def test_history_survives_the_disk(tmp_path: Path) -> None:
    records = [Record(1, 0, {"a": 0.1, "b": math.inf}), Record(2, None, {"a": -math.inf, "c": math.nan})]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(map(record_line, records)) + '{"step": 3, "epo', encoding="utf-8")  # killed while writing
    first, second = read_history(path)
    assert first == records[0]
    assert second.epoch is None
    assert second.metrics["a"] == -math.inf
    assert math.isnan(second.metrics["c"])
    path.write_text("{}\n" + record_line(records[0]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1: not a record"):
        read_history(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_atomically(path, "old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full_disk)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_thinning_keeps_spikes_ends_and_order() -> None:
    steps = np.arange(10_007)
    values = np.sin(steps / 500)
    values[4321], values[777], values[9000] = 50.0, -40.0, np.nan
    kept, thinned = thin(steps, values, limit=500)
    assert len(kept) <= 500
    assert (np.diff(kept) > 0).all()
    assert {777, 4321, 10_006} <= set(kept.tolist())
    np.testing.assert_array_equal(thinned, values[kept])
    whole, same = thin(steps[:500], values[:500], limit=500)
    assert len(whole) == len(same) == 500


def test_a_large_cloud_is_thinned_out_the_same_way_each_time() -> None:
    points = np.random.default_rng(0).normal(size=(1000, 3))
    large = CloudMedia(points, np.zeros((1000, 3), dtype=np.uint8), "many", labels=np.arange(1000))
    small = subsample(large, 100)
    assert small.labels is not None
    np.testing.assert_array_equal(small.points, points[small.labels])
    assert len(np.unique(small.labels)) == 100
    np.testing.assert_array_equal(subsample(large, 100).points, small.points)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageMedia(np.zeros((3, 4, 5), np.uint8), "x"), r"pixels must be \(H, W, 3\) uint8, got \(3, 4, 5\)"),
        (lambda: ImageMedia(np.zeros((4, 5, 3), np.uint8), " "), "alt is empty"),
        (lambda: CloudMedia(np.zeros((4, 4)), np.zeros((4, 3), np.uint8), ""), r"points must be \(N, 3\)"),
        (lambda: CloudMedia(np.zeros((4, 3)), np.zeros((3, 3), np.uint8), ""), r"colors must be \(4, 3\) uint8"),
        (lambda: CloudMedia(np.zeros((4, 3)), np.zeros((4, 3), np.uint8), "", np.zeros(3, np.int64)), r"labels must be \(4,\) integers"),
        (lambda: TableMedia(("a", "b"), ((1, 2), (3,))), r"rows\[1\] has 1 cells, but there are 2 columns"),
        (lambda: HistogramMedia(np.zeros(3), np.zeros(3)), "numpy.histogram"),
        (lambda: HistogramMedia(np.array([1.0, np.nan]), np.zeros(3)), "must be finite"),
        (lambda: Curve("x", "loss"), "add a comma"),  # type: ignore[arg-type]
        (lambda: Curve("x", ("a*b",)), "only a last"),
        (lambda: Curve("x", ("a",), goal="low"), "goal must be"),  # type: ignore[arg-type]
    ],
)
def test_wrong_panels_and_media_say_what_is_wrong(make, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_curve_finds_lightnings_forms_of_a_name() -> None:
    names = ["loss_epoch", "loss", "loss_step", "lossy", "iou/car", "iou/road"]
    assert Curve("", ("loss",)).select(names) == ["loss_epoch", "loss", "loss_step"]
    assert Curve("", ("iou/*", "loss_step", "iou/car")).select(names) == ["iou/car", "iou/road", "loss_step"]


# ---- the style sheet -------------------------------------------------------------------------------------------------------------------


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2.1 of a colour such as ``#1a2b3c`` or ``#fff``."""
    digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2.1, 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_texts_and_lines_stand_out_in_every_scheme() -> None:
    assert contrast("#000000", "#fff") == pytest.approx(21)
    style = Path(html.__file__).with_name("template.html").read_text(encoding="utf-8")
    schemes = [dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{3,6});", block)) for block in re.findall(r":root[^{]*\{([^}]*)\}", style)]
    schemes = [scheme for scheme in schemes if "ink" in scheme]
    assert len(schemes) == 3  # light, dark, paper
    for scheme in schemes:
        texts = {name: scheme[name] for name in ("ink", "soft", "accent", "bad", "good")}
        wrong = {f"{name} on {on}": contrast(color, scheme[on]) for name, color in texts.items() for on in ("page", "card")}
        wrong |= {f"{name} on wash": contrast(texts[name], scheme["wash"]) for name in ("ink", "soft")}
        # a run's letter is written in the card's colour on the run's colour
        wrong |= {f"c{i} on card": contrast(scheme[f"c{i}"], scheme["card"]) for i in range(10)}
        assert {name: ratio for name, ratio in wrong.items() if ratio < 4.5} == {}
        assert len({scheme[f"c{i}"] for i in range(10)}) == 10


def test_notes_are_shown_as_they_are() -> None:
    page = Page(render_report(ReportData("t", "unknown", notes=f"first\n\nsecond {EVIL}\n")))
    assert f"first\n\nsecond {EVIL}" in page.text
    assert {"class": "pill unknown"} in page.all("span")
    assert "Notes" not in Page(render_report(ReportData("t", "running", notes=" \n"))).text


def test_a_link_leads_to_the_web_alone() -> None:
    sections = (Section("A", (), summary="s", url="javascript:alert(1)"), Section("B", (), summary="s", url="https://example.org/a"))
    page = Page(render_report(ReportData("t", "running", sections)))
    assert [link["href"] for link in page.all("a") if not link["href"].startswith("#")] == ["https://example.org/a"]
