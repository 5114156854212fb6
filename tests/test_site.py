"""The site builds without a warning, every link in it leads somewhere, and nothing public is left out of it."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

from forks import HANGS
from lit_methods.catalog import Technique, public_names, published
from lit_methods.claims.records import verdict_words, verdicts

ROOT = Path(__file__).resolve().parents[1]
GALLERY = ROOT / "docs" / "gallery"
needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings_handlers")),
    reason='mkdocs isn\'t installed: pip install -e ".[docs]"',
)


# ---- reading the built pages -----------------------------------------------------------------------------------------------------------


@dataclass
class Page:
    """What a built page links to and can be linked to."""

    title: str = ""
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)  # scripts, styles, pictures: fetched by the browser on its own
    images: list[dict[str, str]] = field(default_factory=list)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page, self.in_title = Page(), False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.page.anchors.update(given[name] for name in ("id", "name") if given.get(name))
        self.in_title = self.in_title or (tag == "title" and not self.page.title)
        if tag == "a" and given.get("href"):
            self.page.links.append(given["href"])
        if tag == "link" and given.get("href") and given.get("rel") != "canonical":
            self.page.loaded.append(given["href"])
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.page.loaded.append(given["src"])
        if tag == "img":
            self.page.images.append(given)

    def handle_endtag(self, tag: str) -> None:
        self.in_title = self.in_title and tag != "title"

    def handle_data(self, data: str) -> None:
        if self.in_title:
            self.page.title += data


def read(html: str) -> Page:
    reader = _Reader()
    reader.feed(html)
    return reader.page


@cache
def read_file(path: Path) -> Page:
    return read(path.read_text(encoding="utf-8"))


def broken_links(site: Path) -> list[str]:
    """Links and loaded files of all pages that lead nowhere inside the site, and what is loaded from elsewhere."""
    found = []
    for path in sorted(site.rglob("*.html")):
        page = read_file(path)
        for target in [*page.links, *page.loaded]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loaded and parts.scheme != "data":
                    found.append(f"{path.relative_to(site)} loads {target}")
                continue
            file = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            if not file.is_file() or not file.is_relative_to(site):
                if path.name != "404.html":  # its links are those of the server's root
                    found.append(f"{path.relative_to(site)} -> {target}: no such file")
            elif parts.fragment and file.suffix == ".html" and unquote(parts.fragment) not in read_file(file).anchors:
                found.append(f"{path.relative_to(site)} -> {target}: no such anchor")
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]  # --quiet would hide warnings from --strict
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert built.returncode == 0, f"mkdocs build --strict:\n{built.stdout[-2000:]}{built.stderr[-4000:]}"
    return folder


# ---- the built site --------------------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@needs_mkdocs
def test_every_link_leads_somewhere_and_nothing_comes_from_the_network(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) > 15
    assert broken_links(site) == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?https?://", styles)


@pytest.mark.thorough
@needs_mkdocs
def test_every_public_name_has_an_entry(site: Path, hooks: ModuleType) -> None:
    anchors = set().union(*(read_file(path).anchors for path in (site / "api").glob("*.html")))
    assert {f"{package}.{name}" for name, package in public_names().items()} <= anchors
    functions = [name for names in hooks.core_functions().values() for name in names]
    assert len(functions) > 150
    assert {f"lit_methods.functional.{name}" for name in functions} <= anchors
    text = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    assert "Factor of the term" in text  # docstrings of arguments, not just names
    assert ":class:" not in text


@pytest.mark.thorough
@needs_mkdocs
def test_every_technique_has_a_page_and_a_picture_that_is_described(site: Path) -> None:
    home = read_file(site / "index.html")
    for slug in published():
        page = read_file(site / "techniques" / f"{slug}.html")
        shown = [image for image in page.images if f"gallery/{slug}." in image["src"]]
        assert shown, f"docs/techniques/{slug}.md doesn't show its picture: ![alternative text](../gallery/{slug}.webp)"
        assert len(shown[0].get("alt", "")) > 40, f"docs/techniques/{slug}.md: say what the picture shows"
        assert f"techniques/{slug}.html" in home.links
        on_home = [image for image in home.images if f"gallery/{slug}." in image["src"]]
        assert [image["alt"] for image in on_home] == [" ".join(shown[0]["alt"].split())]


@pytest.mark.thorough
@needs_mkdocs
def test_every_picture_has_an_alternative_text(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert all(image.get("alt", "").strip() for image in read_file(path).images), path


@pytest.mark.thorough
@needs_mkdocs
def test_pages_of_the_repository_are_there_and_read_well(site: Path) -> None:
    pages = "quick_start attach notebooks configs errors techniques/index benchmarks add_a_technique design changes"
    for page in pages.split():
        assert (site / f"{page}.html").is_file(), page
    for path in site.rglob("*.html"):
        text = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.S)
        assert "```" not in text, f"{path.name}: a fence that isn't a block"
        assert not re.search(r"<p>[^<]*\n[-*] \S", text), f"{path.name}: a list that isn't one"
        assert not re.search(r"<p>[^<]*\n\|.*\|", text), f"{path.name}: a table that isn't one"
    quick = (site / "quick_start.html").read_text(encoding="utf-8")
    assert "lit fit --config configs/superflow.yaml" in re.sub(r"<[^>]+>", "", quick)
    assert 'filename">my_project.py' in (site / "attach.html").read_text(encoding="utf-8")
    assert not list(site.rglob("*.py"))


@pytest.mark.thorough
@needs_mkdocs
def test_the_search_works_without_a_server(site: Path) -> None:
    assert (site / "search" / "search_index.js").is_file()
    assert "assets/iframe-worker.js" in read_file(site / "index.html").loaded


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h2 id="one">x</h2><a href="b.html#two"></a><a href="#one"></a><a href="https://x.org"></a>')
    (tmp_path / "b.html").write_text('<a href="a.html#gone"></a><a href="c.html"></a><script src="https://cdn.org/x.js"></script>')
    assert broken_links(tmp_path.resolve()) == [
        "a.html -> b.html#two: no such anchor",
        "b.html -> a.html#gone: no such anchor",
        "b.html -> c.html: no such file",
        "b.html loads https://cdn.org/x.js",
    ]


# ---- the gallery -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", published())
def test_every_technique_has_a_small_picture(slug: str) -> None:
    from PIL import Image

    found = [path for path in GALLERY.glob(f"{slug}.*") if path.suffix in (".webp", ".png", ".svg")]
    assert len(found) == 1, f"docs/gallery/{slug}.webp: python docs/make_gallery.py {slug}"
    assert found[0].stat().st_size <= 100_000
    if found[0].suffix != ".svg":
        with Image.open(found[0]) as picture:
            assert picture.width >= 600
            assert len(picture.convert("RGB").resize((32, 18)).getcolors(32 * 18)) > 20, "the picture is all but empty"


def test_no_picture_is_left_behind() -> None:
    assert {path.stem for path in GALLERY.iterdir() if path.is_file()} <= set(published())


def _script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_picture_comes_out_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest picture of the run, else its curve, on a canvas of one shape and small enough."""
    import json

    import numpy as np
    from PIL import Image

    make = _script(ROOT / "docs" / "make_gallery.py")
    entry = Technique("none", "None", "", "lidar", "module", (), (), (), "", "")
    with pytest.raises(FileNotFoundError, match="folder of a run"):
        make.draw(entry, tmp_path)
    lines = [{"step": step, "epoch": 0, "metrics": {"none/loss": 10.0 - step}} for step in range(10)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    curve = np.asarray(make.draw(entry, tmp_path)).astype(int)
    line = (curve == make.LINE).all(axis=-1)
    rows, columns = line.nonzero()
    assert rows[columns.argmin()] < 100 < 500 < rows[columns.argmax()]  # a falling loss
    (tmp_path / "media").mkdir()
    Image.new("RGB", (20, 10), (200, 30, 40)).save(tmp_path / "media" / "picture.png")
    picture = make.draw(entry, tmp_path)
    assert picture.size == make.SIZE
    assert picture.getpixel((576, 324)) == (200, 30, 40)
    assert picture.getpixel((576, 5)) == make.BACKGROUND
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
    best = len(make.encoded(noise))
    monkeypatch.setattr(make, "MAX_BYTES", best - 1)
    assert 0 < len(make.encoded(noise)) < best
    monkeypatch.setattr(make, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="less detail"):
        make.encoded(noise)


def test_the_picture_is_the_first_panel_that_the_technique_declares(tmp_path: Path) -> None:
    """A chart with ticks and labels on both axes, although the run has a picture and another section comes first."""
    import json

    import numpy as np

    from lit_methods.panels import CloudMedia, CloudPanel, Curve, HistogramMedia, HistogramPanel, ImageMedia, ImagePanel, TablePanel
    from lit_methods.reports.page import ReportData, Section
    from lit_methods.reports.record import save_run

    make = _script(ROOT / "docs" / "make_gallery.py")
    entry = Technique("none", "None", "", "lidar", "module", ("lit_methods.Main", "lit_methods.Other"), (), (), "", "")
    picture = ImageMedia(np.full((20, 10, 3), (200, 30, 40), np.uint8), "red")
    points = np.stack([np.linspace(-9, 9, 50), np.zeros(50), np.zeros(50)], axis=1)
    media = {
        "picture": picture,
        "counts": HistogramMedia(np.array([0, 10, 5]), np.array([0.0, 1.0, 2.0, 3.0])),
        "cloud": CloudMedia(points, np.full((50, 3), (9, 200, 9), np.uint8), "a line"),
    }
    curve = Curve("Loss", ("main/loss",))
    panels = (TablePanel("Table", "table"), Curve("Not logged", ("main/none",)), curve, ImagePanel("Picture", "picture"))
    sections = (Section("Stranger", (ImagePanel("P", "picture"),), media), Section("Other", (), {}), Section("Main", panels, media))
    lines = [{"step": step, "epoch": 0, "metrics": {"main/loss": 1000.0 - 100 * step if step else "NaN"}} for step in range(10)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    save_run(tmp_path, ReportData("run", "finished", sections))
    pixels = np.asarray(make.draw(entry, tmp_path)).astype(int)
    left, top, right, bottom = make.BOX
    text, line = (pixels > 100).all(axis=-1), (pixels == make.LINE).all(axis=-1)
    assert line[top:bottom, left:right].sum() > 1000
    assert text[bottom + 5 : bottom + 35, left:right].any(), "ticks of the steps"
    assert text[bottom + 45 :, left:right].any(), "what the horizontal axis shows"
    assert text[top - 10 : bottom + 10, 50:left].any(), "ticks of the values"
    assert text[top:bottom, :45].any(), "what the vertical axis shows"
    for panel, colour in ((HistogramPanel("H", "counts"), make.LINE), (CloudPanel("C", "cloud"), (9, 200, 9))):
        save_run(tmp_path, ReportData("run", "finished", (Section("Main 2", (panel, curve), media),)))
        pixels = np.asarray(make.draw(entry, tmp_path)).astype(int)
        shown = (pixels == colour).all(axis=-1)
        assert shown.sum() > 300
        assert not shown[: top - 1].any()
        assert not shown[bottom + 3 :].any()
    alone = np.asarray(make.curves("One value", {"main/loss": (np.array([3]), np.array([2.0]))})).astype(int)
    assert (alone == make.LINE).all(axis=-1).sum() > 20, "a single value is a dot"
    assert make.draw(entry, tmp_path, "C").getpixel((576, 324)) != (200, 30, 40)
    with pytest.raises(FileNotFoundError, match="nothing for a panel 'Picture'; declared are: C, Loss"):
        make.draw(entry, tmp_path, "Picture")
    save_run(tmp_path, ReportData("run", "finished", (Section("Main", (ImagePanel("Picture", "picture"), curve), media),)))
    assert make.draw(entry, tmp_path).getpixel((576, 324)) == (200, 30, 40)


# ---- links of the repository as links of the site --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs", reason='mkdocs isn\'t installed: pip install -e ".[docs]"')
    return _script(ROOT / "docs" / "tools" / "hooks.py")


PRESENT = {"index.md", "design.md", "quick_start.md", "attach.md", "configs.md", "techniques/index.md", "techniques/superflow.md"}
PRESENT |= {"add_a_technique.md", "gallery/superflow.webp", "benchmarks.md", "changes.md"}


@pytest.mark.parametrize(
    ("page", "target", "wanted"),
    [
        ("design.md", "techniques/superflow.md#claim", "techniques/superflow.md#claim"),
        ("design.md", "../CONTRIBUTING.md", "add_a_technique.md"),
        ("design.md", "../configs/README.md#rules", "configs.md#rules"),
        ("design.md", "../README.md", "index.md"),
        ("techniques/superflow.md", "../../README.md#techniques", "index.md"),
        ("techniques/superflow.md", "../gallery/superflow.webp", "../gallery/superflow.webp"),
        ("add_a_technique.md", "docs/design.md#shared-pieces", "design.md#shared-pieces"),
        ("quick_start.md", "configs/README.md", "configs.md"),
        ("attach.md", "docs/techniques/superflow.md", "techniques/superflow.md"),
        ("index.md", "../README.md#2-attach-a-callback-to-your-own-module", "attach.md"),
        ("index.md", "../README.md#3-compare-two-runs", "quick_start.md#compare-two-runs"),
        ("index.md", "../LICENSE", "https://example.org/blob/main/LICENSE"),
        ("techniques/superflow.md", "../../configs/full", "https://example.org/tree/main/configs/full"),
        ("index.md", "../README.md#tests", "https://example.org/blob/main/README.md#tests"),
        ("index.md", "https://arxiv.org/abs/2503.19912", "https://arxiv.org/abs/2503.19912"),
        ("index.md", "#techniques", "#techniques"),
        ("index.md", "../no_such_file.md", "../no_such_file.md"),  # left as it is: mkdocs reports it
    ],
)
def test_a_link_of_the_repository_becomes_one_of_the_site(hooks: ModuleType, page: str, target: str, wanted: str) -> None:
    assert hooks.rewritten(target, page, PRESENT, "https://example.org") == wanted


def test_the_verdict_stands_wherever_the_claim_stands(hooks: ModuleType) -> None:
    for slug, entry in published().items():
        verdict = verdicts()[slug]["verdict"]
        assert f"<b>Claim</b>: {verdict}</span>" in hooks.gallery([entry])
        assert f"**does it hold?:** [{verdict_words(slug)}](../evidence.md#{slug})" in hooks.at_a_glance(entry)
        (row,) = [line for line in hooks.techniques_page().splitlines() if line.startswith(f"| [{entry.name}]({slug}.md)")]
        assert row.endswith(f"| {entry.claim} | {verdict_words(slug)} |")


def test_markdown_for_the_site(hooks: ModuleType) -> None:
    text = "See [`code`](a.md):\n- one\n- two\n  more\n\n1. first\n2. second\n\n`[no](link.md)`\n"
    assert hooks.prose_for_the_site(text, lambda target: f"<{target}>") == (
        "See [`code`](<a.md>):\n\n- one\n- two\n  more\n\n1. first\n2. second\n\n`[no](link.md)`\n"
    )
    assert hooks.fence_for_the_site("```yaml fit\n# my_run.yaml\nmodel: A\n```") == '```yaml title="my_run.yaml"\nmodel: A\n```'
    assert hooks.fence_for_the_site("```bash\nlit list\n```") == "```bash\nlit list\n```"


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe", reason='griffe isn\'t installed: pip install -e ".[docs]"')
    to_markdown = _script(ROOT / "docs" / "tools" / "docstrings.py").to_markdown
    assert to_markdown("See :class:`~a.B` and :mod:`c`::\n\n    x = 1 <y>\n\nmean(1 - <k, q>), ``<k>``, 1 < 2") == (
        "See `a.B` and `c`:\n\n    x = 1 <y>\n\nmean(1 - &lt;k, q>), ``<k>``, 1 < 2"
    )


def test_new_pages_find_their_place(hooks: ModuleType) -> None:
    present = {"index.md", "design.md", "errors.md", "brand_new.md", "techniques/index.md", "api/index.md"}
    nav = hooks.navigation(present)
    assert nav[0] == {"Home": "index.md"}
    assert nav[-1] == {"More": ["brand_new.md"]}
    assert {"Guide": ["errors.md"]} in nav
    listed = str(nav)
    assert all(f"techniques/{slug}.md" in listed for slug in published())
    assert "evidence.md" not in listed  # not there: not in the navigation


def test_the_readme_keeps_the_parts_that_the_site_shows(hooks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from mkdocs.exceptions import PluginError

    for page, part in hooks.README_PARTS.items():
        assert len(hooks.readme_page(*part)) > 500, page
    with pytest.raises(PluginError, match="no heading 'Gone'"):
        hooks.readme_page("Title", ("Gone",))


def test_every_technique_is_chosen_for_something(hooks: ModuleType) -> None:
    chosen = hooks.what_one_has()
    assert len(chosen) > 5
    assert {slug for slugs in chosen.values() for slug in slugs} == set(published())


def test_a_name_ends_at_a_colon_with_a_space() -> None:
    def name(title: str, short: str = "") -> str:
        return Technique("", title, "", "", "", (), (), (), "", "", short=short).name

    assert name("TCM: A loss") == "TCM"
    assert name("Robust N:M Sparsity") == "Robust N:M Sparsity"
    assert name("Improved Techniques", "iCT") == "iCT"
