"""A report and a comparison in a real browser: charts are drawn, nothing overflows on a phone, the dark is dark, paper is white."""

import base64
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from forks import HANGS
from lit_methods.panels import (
    CloudMedia,
    CloudPanel,
    Curve,
    HistogramMedia,
    HistogramPanel,
    ImageMedia,
    ImagePanel,
    Media,
    Panel,
    TableMedia,
    TablePanel,
)
from lit_methods.reports.compare import render_comparison
from lit_methods.reports.page import Record, ReportData, Section, render_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH")

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--allow-file-access-from-files", "--enable-logging=stderr",
]  # fmt: skip
FLAT = "--disable-3d-apis"  # WebGL in software takes a minute for a page of clouds; one test has it
GOES_ROUND = "--enable-unsafe-swiftshader"
WIDTHS = (1280, 390)
HEIGHT = 2200
FIRST_LINE = {"light": (0x25, 0x63, 0xEB), "dark": (0x7A, 0xA2, 0xFF)}  # --c0 of the style sheet

# Put before the page's own scripts: collects what goes wrong, and tells the outer page what can be seen.
PROBE = """<script>
const wrong = [];
addEventListener("error", (event) => wrong.push(String(event.message)));
for (const level of ["error", "warn"]) console[level] = (...words) => wrong.push(words.join(" ").slice(0, 200));
const box = (element) => { const { left, right, top, bottom } = element.getBoundingClientRect(); return { left, right, top, bottom }; };
const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top + 0.5 || b.bottom <= a.top + 0.5;
addEventListener("load", () => setTimeout(() => {
  const plots = [...document.querySelectorAll(".plot")].filter((plot) => plot.clientWidth && plot.checkVisibility());
  const apart_from = ".scroll, pre, .bar, .plot"; // those that scroll by themselves
  const all = [...document.querySelectorAll("body *")].filter((element) => element.clientWidth && !element.closest(apart_from));
  const buttons = [...document.querySelectorAll("button, input")];
  const touching = plots.flatMap((plot) => {
    const title = plot.querySelector(".xtitle"), legend = plot.parentElement.querySelector(".legend");
    return !title || !legend || [...legend.querySelectorAll("button")].every((key) => apart(box(title), box(key))) ? [] : [plot.id];
  });
  const off = document.querySelector(".legend button"), before = document.querySelectorAll(".plot.curve .trace.scatter").length;
  if (off) off.click();
  parent.postMessage({
    width: innerWidth, scroll: document.documentElement.scrollWidth, wrong, touching,
    wide: all.filter((element) => box(element).right > innerWidth + 1).map((element) => element.outerHTML.slice(0, 60)).slice(0, 5),
    plots: plots.map((plot) => [plot.classList[1], plot.querySelectorAll(".trace path, .point path, .bars path, canvas").length]),
    flat: document.body.classList.contains("flatten"), lines: [before, document.querySelectorAll(".plot.curve .trace.scatter").length],
    pressed: off && off.getAttribute("aria-pressed"), alts: [...document.images].map((image) => image.alt.trim()),
    labels: plots.map((plot) => plot.getAttribute("aria-label")), names: buttons.map((b) => b.textContent.trim() || b.ariaLabel),
    ink: getComputedStyle(document.querySelector("svg.main-svg text") || document.body).fill,
  }, "*");
}, 1500));
</script>"""

OUTER = """<!doctype html><body style="margin:0;display:flex"><script>
addEventListener("message", (event) => console.log("SEEN " + btoa(unescape(encodeURIComponent(JSON.stringify(event.data))))));
</script>{frames}"""

CLASSES = [f"construction_vehicle_{i}" if i % 5 == 0 else f"class_{i}" for i in range(16)]
PANELS: tuple[Panel, ...] = (
    Curve("Loss", ("seg/loss",), note="Falls.", goal="min"),
    Curve("IoU per class", ("seg/iou/*",), goal="max"),
    HistogramPanel("Sizes", "seg/sizes"),
    ImagePanel("Camera", "seg/image"),
    CloudPanel("Cloud", "seg/cloud"),
    TablePanel("Classes", "seg/table"),
)


def a_run(seed: int) -> ReportData:
    """A run with one of everything, 16 classes and long names."""
    rng = np.random.default_rng(seed)
    history = [
        Record(step, step // 50, {"seg/loss": 3 / (1 + step / 20) + seed, **{f"seg/iou/{name}": rng.random() for name in CLASSES}})
        for step in range(0, 200, 10)
    ]
    points = rng.normal(size=(3000, 3)).astype(np.float32) * (20, 20, 1)
    labels = np.arange(3000) % 16
    media: dict[str, Media] = {
        "seg/sizes": HistogramMedia(*np.histogram(points, bins=12)),
        "seg/image": ImageMedia(rng.integers(0, 255, (60, 900, 3), dtype=np.uint8), "noise"),
        "seg/cloud": CloudMedia(
            points.astype(np.float32), rng.integers(0, 255, (16, 3), dtype=np.uint8)[labels], "scan", labels, tuple(CLASSES)
        ),
        "seg/table": TableMedia(
            ("class", "IoU, %", "a very long heading of a column", "points"), tuple((n, 1.5, "x" * 40, 7) for n in CLASSES)
        ),
    }
    config = f"model: {{class_path: a.B, init_args: {{path: /a/long/path/{'x' * 60}, seed: {seed}}}}}\n"
    facts = {"Git": {"commit": f"{seed}" * 40}, "Environment": {"command": "lit fit --config " + "x" * 90}}
    progress = (("Epoch", "4 of 4"), ("Duration", "3 min 20 s"))
    return ReportData(
        f"PointSegmentor · {'long_name_' * 4}{seed}", "finished", (Section("Segmentor", PANELS, media),), history, config=config,
        facts=facts, progress=progress, notes="Two words.",
    )  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two pages, each also framed in both widths."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [("baseline", a_run(0)), ("superflow_with_a_long_name/20260101-120000", a_run(1)), ("third", a_run(2))]
    texts = {"report": render_report(a_run(0)), "comparison": render_comparison(runs)}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
        (folder / f"{name}-probed.html").write_text(text.replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
        frames = "".join(f'<iframe src="{name}-probed.html" style="border:0;width:{w}px;height:{HEIGHT}px"></iframe>' for w in WIDTHS)
        (folder / f"{name}-framed.html").write_text(OUTER.format(frames=frames), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


def browse(page: Path, tmp_path: Path, *flags: str) -> str:
    """Run the browser on a page; what it says."""
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=6000", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True).stderr


def seen(page: Path, scheme: str, tmp_path: Path) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """What the probes report at each of WIDTHS, and the pictures."""
    shot = tmp_path / "shot.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    framed = page.with_name(f"{page.stem}-framed.html")
    said = browse(framed, tmp_path, f"--screenshot={shot}", f"--window-size={sum(WIDTHS)},{HEIGHT}", FLAT, *dark)
    found = [json.loads(base64.b64decode(text)) for text in re.findall(r"SEEN ([\w+/=]+)", said)]
    by_width = {entry["width"]: entry for entry in found}
    assert set(by_width) == set(WIDTHS), said[-2000:]
    assert "Uncaught" not in said
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    edges = np.cumsum([0, *WIDTHS])
    return [by_width[width] for width in WIDTHS], [pixels[:, a:b] for a, b in itertools.pairwise(edges)]


SLOW = pytest.mark.slow  # half of the combinations shows most faults; each takes some 5 seconds


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("report", "dark"),
        ("comparison", "light"),
        pytest.param("report", "light", marks=SLOW),
        pytest.param("comparison", "dark", marks=SLOW),
    ],
)
def test_a_page_is_whole_on_a_desktop_and_a_phone(name: str, scheme: str, pages: dict[str, Path], tmp_path: Path) -> None:
    found, pictures = seen(pages[name], scheme, tmp_path)
    for entry, pixels in zip(found, pictures, strict=True):
        assert entry["wrong"] == []
        assert entry["scroll"] == entry["width"], f"wider than the screen: {entry['wide']}"
        assert entry["wide"] == []
        assert entry["flat"]  # without WebGL the clouds are pictures from above
        assert {kind for kind, _ in entry["plots"]} == {"curve", "histogram"}
        near = [drawn for kind, drawn in entry["plots"] if kind == "curve"][:2]  # the rest is drawn when it comes near the screen
        assert min(near) > 0, entry["plots"]
        assert entry["touching"] == []  # the legend of 16 classes stays clear of the axis
        assert entry["lines"][1] < entry["lines"][0]  # a key of the legend hides its line
        assert entry["pressed"] == "false"
        assert all(entry["alts"])
        assert entry["alts"]
        assert all(entry["labels"])
        assert all(entry["names"])
        assert (pixels[:200].mean() < 60) == (scheme == "dark")
        assert (np.abs(pixels - FIRST_LINE[scheme]).max(axis=2) < 12).sum() > 100, "no line in the first colour"
        channels = [int(channel) for channel in re.findall(r"\d+", entry["ink"])[:3]]
        assert (min(channels) > 180) == (scheme == "dark"), "the charts' texts must follow the scheme"


@pytest.mark.parametrize("name", ["comparison", pytest.param("report", marks=SLOW)])
def test_paper_is_white_with_charts_also_from_a_dark_screen(name: str, pages: dict[str, Path], tmp_path: Path) -> None:
    paper = tmp_path / "page.pdf"
    browse(pages[name], tmp_path, f"--print-to-pdf={paper}", "--no-pdf-header-footer", FLAT, "--blink-settings=preferredColorScheme=0")
    assert paper.read_bytes().startswith(b"%PDF")
    reader = shutil.which("pdftoppm")
    if reader is None:
        pytest.skip("no pdftoppm (poppler-utils) on the PATH to look at the paper")
    subprocess.run([reader, "-r", "40", "-png", str(paper), str(tmp_path / "sheet")], check=True, timeout=HANGS)
    sheets = [np.asarray(Image.open(path).convert("RGB")).astype(int) for path in sorted(tmp_path.glob("sheet-*.png"))]
    assert 2 <= len(sheets) <= 20
    assert all((sheet.min(axis=2) > 240).mean() > 0.3 for sheet in sheets)
    assert all((sheet[:, [0, -1]] > 250).all() for sheet in sheets)  # nothing runs off the paper
    lines = [(np.abs(sheet - FIRST_LINE["light"]).max(axis=2) < 70).sum() for sheet in sheets]
    assert sum(lines) > 20, "no line in the first colour on paper"


TURN = """<script>addEventListener("load", () => setTimeout(() => {
  document.querySelector('button[data-view="above"]').click();
  setTimeout(() => document.querySelectorAll(".plot.cloud").forEach((p) => console.log("EYE " + p.layout.scene.camera.eye.z + " .")), 1000);
}, 1500));</script>"""


def test_clouds_are_drawn_and_turn_together_where_there_is_webgl(tmp_path: Path) -> None:
    points = np.random.default_rng(0).uniform(-5, 5, size=(4000, 3)).astype(np.float32)
    cloud = CloudMedia(points, np.full((4000, 3), (255, 40, 200), dtype=np.uint8), "a pink cloud")
    run = ReportData("t", "finished", (Section("S", (CloudPanel("Cloud", "c"),), {"c": cloud}),))
    page, shot = tmp_path / "cloud.html", tmp_path / "shot.png"
    page.write_text(render_comparison([("a", run), ("b", run)]).replace("<head>", f"<head>{TURN}", 1), encoding="utf-8")
    said = browse(page, tmp_path, f"--screenshot={shot}", "--window-size=900,900", GOES_ROUND)
    assert re.findall(r"EYE ([\d.]+) ", said) == ["1.7", "1.7"]  # the button of the first turned both
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert (np.abs(pixels - (255, 40, 200)).max(axis=2) < 60).sum() > 500
