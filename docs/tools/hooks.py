"""Makes the site out of the repository: pages that are no files of ``docs/``, the navigation, links that work on GitHub and on the site.

One text has one home. ``README.md``, ``CONTRIBUTING.md``, ``CHANGELOG.md`` and the READMEs of folders become pages as they are; parts of
the README become pages of their own (``README_PARTS``). The gallery, the list of techniques, the table of parts, the box at the head of
a technique's page and the API reference are written from the catalogue, the stubs and the docstrings. Nothing of the package but what
reads them is imported: neither torch nor Lightning.

Called by mkdocs (``hooks`` in ``mkdocs.yml``): ``on_config``, ``on_files``, ``on_page_markdown``.
"""

import ast
import html
import posixpath
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from lit_methods.catalog import PACKAGES, Technique, family_title, package_folder, public_names, published  # noqa: E402
from lit_methods.claims.records import verdict_over_all, verdict_words  # noqa: E402
from lit_methods.parts import KINDS, parts  # noqa: E402

# page of the site <- file of the repository outside docs/
WHOLE_FILES = {
    "add_a_technique.md": "CONTRIBUTING.md",
    "configs.md": "configs/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "authors.md": "benchmarks/authors.md",
    "changes.md": "CHANGELOG.md",
    "notebooks.md": "notebooks/README.md",
}
# page of the site <- (title, headings of the README); a single heading becomes the title itself
README_PARTS = {
    "quick_start.md": ("Quick start", ("Install", "1. Run a config", "3. Compare two runs", "4. Share a model")),
    "attach.md": ("Attach to your own module", ("2. Attach a callback to your own module",)),
}
# (section, pages in order); pages that aren't there are left out, files of docs/ that stand nowhere come last
NAVIGATION: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Guide",
        (
            "quick_start.md",
            "attach.md",
            "choose.md",
            "foreign_modules.md",
            "notebooks.md",
            "configs.md",
            "parts.md",
            "driving_data.md",
            "image_classification.md",
            "sparse_training.md",
            "sparse_autoencoders.md",
            "super_resolution.md",
            "dashboards.md",
            "reports.md",
            "sweeps.md",
            "long_runs.md",
            "full_recipes.md",
            "errors.md",
        ),
    ),
    ("Evidence", ("evidence.md", "benchmarks.md", "authors.md")),
    ("Develop", ("add_a_technique.md", "design.md", "testing.md", "changes.md")),
)
API_MODULES = ("lit_methods.panels", "lit_methods.datamodules.errors")  # public beside the stubs: what one writes panels and data with
PICTURES = ("webp", "png", "svg")

_slug: Callable[[str, str], str] = slugify(case="lower")


# ---- the catalogue ---------------------------------------------------------------------------------------------------------------------


def families() -> dict[str, list[Technique]]:
    """Techniques by family, both sorted."""
    found: dict[str, list[Technique]] = {}
    for entry in sorted(published().values(), key=lambda entry: (entry.family, entry.slug)):
        found.setdefault(entry.family, []).append(entry)
    return found


def picture(slug: str) -> Path | None:
    """The technique's picture in the gallery."""
    return next((path for kind in PICTURES if (path := ROOT / "docs" / "gallery" / f"{slug}.{kind}").is_file()), None)


def picture_alt(slug: str) -> str:
    """The picture's alternative text, from the technique's own page; "" where the page doesn't show it."""
    page = ROOT / "docs" / "techniques" / f"{slug}.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    found = re.search(rf"!\[([^\]]*)\]\(\.\./gallery/{re.escape(slug)}\.\w+\)", text)
    return " ".join(found[1].split()) if found else ""


# ---- generated pages -------------------------------------------------------------------------------------------------------------------


def gallery(entries: list[Technique], to_docs: str = "") -> str:
    """Cards of techniques as HTML; ``to_docs`` leads from the page to the site's root."""
    cards = []
    for entry in entries:
        image = picture(entry.slug)
        shown = ""
        if image is not None:
            shown = f'<img src="{to_docs}gallery/{image.name}" alt="{html.escape(picture_alt(entry.slug))}" loading="lazy">'
        form = "module" if entry.form == "module" else "callback for any module"
        claim = f"<span><b>Claim</b>: {html.escape(verdict_over_all(entry.slug))}</span>"
        cards.append(
            f'<a href="{to_docs}techniques/{entry.slug}.html" data-slug="{entry.slug}" data-form="{entry.form}">{shown}'
            f"<strong>{html.escape(entry.name)}</strong><span>{html.escape(entry.summary)}</span>{claim}"
            f"<em>{html.escape(family_title(entry.family))}, {form}</em></a>"
        )
    return '<div class="gallery">\n' + "\n".join(cards) + "\n</div>\n"


def what_one_has() -> dict[str, list[str]]:
    """Headings of ``docs/choose.md`` -> slugs of the techniques that stand below them."""
    text = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    sections = re.split(r"^## (.+)$", text, flags=re.M)[1:]
    return {heading: re.findall(r"\(techniques/(\w+)\.md\)", below) for heading, below in zip(sections[::2], sections[1::2], strict=True)}


def whole_gallery() -> str:
    """The cards of all techniques, family by family, with fields that leave some of them out (``assets/gallery.js``)."""
    having = "".join(f'<option value="{" ".join(slugs)}">{html.escape(heading)}</option>' for heading, slugs in what_one_has().items())
    fields = (
        '<div class="gallery-filter" hidden>\n<label>I have <select><option value="">anything</option>' + having + "</select></label>\n"
        '<label>it is <select><option value="">a callback or a module</option><option value="callback">a callback for a module of mine'
        '</option><option value="module">a module</option></select></label>\n'
        '<label>with the word <input type="search" placeholder="pruning, LiDAR, iCT"></label>\n<output></output>\n</div>\n'
    )
    return fields + gallery([entry for entries in families().values() for entry in entries])


def techniques_page() -> str:
    """The list of all techniques: a table for each family."""
    parts = [
        "# Techniques\n",
        "By family; [with pictures](../index.md#techniques), or [by what you have](../choose.md). `lit list` prints them, "
        "`lit info <technique>` says more about one.\n",
    ]
    for family, entries in families().items():
        parts += [
            f"## {family_title(family)}\n",
            "| technique | what it does | form | claim that is re-shown | [does it hold?](../evidence.md) |",
        ]
        parts.append("|---|---|---|---|---|")
        for entry in entries:
            name = f"[{entry.name}]({entry.slug}.md)<br>`{entry.slug}`"
            paper = f"<br>[arXiv:{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else ""
            verdict = verdict_words(entry.slug)
            parts.append(f"| {name} | {entry.summary}{paper} | {entry.form} | {entry.claim or '-'} | {verdict} |")
        parts.append("")
    return "\n".join(parts)


def parts_page() -> str:
    """What one builds with: a table for each kind, in the words of the docstrings."""
    lines = ["# Parts\n", "`lit list --parts` prints the same; `lit info <name>` shows a whole docstring. Empty: the class doesn't say.\n"]
    linked = public_names()

    def cell(text: str) -> str:
        return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*").replace("[", "\\[") or "-"

    for kind, heading in KINDS.items():
        shapes = "batch" if kind == "datamodule" else "takes and gives"
        lines += [f"## {heading.partition(':')[0]}\n", f"| class | family | what it is | {shapes} | cost |", "|---|---|---|---|---|"]
        for part in parts():
            if part.kind == kind:
                name = f"[`{part.name}`][{part.path}]" if part.name in linked else f"`{part.path}`"
                family = family_title(part.family) if part.family else "-"
                lines.append(f"| {name} | {family} | {cell(part.line)} | {cell(part.shapes)} | {cell(part.cost)} |")
        lines.append("")
    return "\n".join(lines)


def at_a_glance(entry: Technique) -> str:
    """The box at the head of a technique's page, from its catalogue entry."""
    names = public_names()
    classes = []
    for dotted in entry.classes:
        name = dotted.rpartition(".")[2]
        classes.append(f"[`{name}`][{names[name]}.{name}]" if name in names else f"`{dotted}`")
    rows = {
        "paper": f"[arXiv:{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else "",
        "family": f"[{family_title(entry.family)}](index.md#{_slug(family_title(entry.family), '-')}), as a {entry.form}",
        "classes": ", ".join(classes),
        "configs": ", ".join(f"[`{config}`](../../configs/{config})" for config in entry.configs),
        "golden vectors": ", ".join(f"`{kind}`" for kind in entry.golden),
        "claim": entry.claim,
        "does it hold?": f"[{verdict_words(entry.slug)}](../evidence.md#{entry.slug})" if entry.claim else "",
    }
    lines = [f"    **{name}:** {value}<br>" for name, value in rows.items() if value]
    return '!!! abstract "At a glance"\n\n' + "\n".join(lines) + "\n"


def readme_sections() -> dict[str, str]:
    """Text below each heading of the README that some page of the site shows, deeper headings included."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    fences = [match.span() for match in re.finditer(r"^```.*?^```", text, flags=re.M | re.S)]
    found = [match for match in re.finditer(r"^(#+) (.+)$", text, flags=re.M) if not any(a <= match.start() < b for a, b in fences)]
    sections = {}
    for index, heading in enumerate(found):
        end = next((later.start() for later in found[index + 1 :] if len(later[1]) <= len(heading[1])), len(text))
        sections[heading[2]] = text[heading.end() : end].strip("\n")
    return sections


def readme_page(title: str, headings: tuple[str, ...]) -> str:
    """A page made of sections of the README."""
    sections = readme_sections()
    gone = [heading for heading in headings if heading not in sections]
    if gone:
        raise PluginError(f"README.md has no heading {gone[0]!r}: README_PARTS in docs/tools/hooks.py shows it on the site")
    parts = [f"# {title}\n"]
    for heading in headings:
        parts += [] if len(headings) == 1 else [f"## {_without_number(heading)}\n"]
        parts.append(sections[heading] + "\n")
    return "\n".join(parts)


def _without_number(heading: str) -> str:
    return re.sub(r"^\d+\. ", "", heading)


def public_classes() -> dict[str, tuple[str, str]]:
    """Public name -> (package, family), from the stubs; the family is "" for what belongs to none."""
    found = {}
    for package in PACKAGES:
        stub = ast.parse((package_folder(package) / "__init__.pyi").read_text(encoding="utf-8"))
        for node in stub.body:
            if isinstance(node, ast.ImportFrom):
                first, _, rest = (node.module or "").partition(".")
                is_family = bool(rest) or (package_folder(package) / first).is_dir()
                for alias in node.names:
                    found[alias.asname or alias.name] = (package, first if is_family else "")
    return found


def core_functions() -> dict[str, list[str]]:
    """Names of ``lit_methods.functional`` by family, "" for those of none."""
    tree = ast.parse((ROOT / "lit_methods" / "functional.pyi").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lit_methods."):
            parts = [part for part in (node.module or "").split(".")[1:] if part not in ("callbacks", "datamodules")]
            found.setdefault(parts[0] if len(parts) > 1 else "", []).extend(alias.asname or alias.name for alias in node.names)
    return found


def api_pages() -> dict[str, tuple[str, str, str]]:
    """Path of each page of the API reference -> (group of the navigation, title, text)."""
    pages = {}
    grouped: dict[tuple[str, str], list[str]] = {}
    for name, place in public_classes().items():
        grouped.setdefault(place, []).append(name)
    titles = {"lit_methods": "Modules and networks", "lit_methods.callbacks": "Callbacks", "lit_methods.datamodules": "Data"}
    for (package, family), names in sorted(grouped.items(), key=lambda item: (PACKAGES.index(item[0][0]), item[0][1])):
        title = family_title(family) if family else "General"
        head = f"# {titles[package]}: {title}\n\n`from {package} import ...`\n\n"
        text = head + "\n".join(f"::: {package}.{name}\n" for name in names)
        pages[f"api/{package}{'.' + family if family else ''}.md"] = (titles[package], title, text)
    for family, names in sorted(core_functions().items()):
        title = family_title(family) if family else "General"
        head = f"# Functions: {title}\n\n`from lit_methods.functional import ...`: pure functions for a bare PyTorch loop.\n\n"
        text = head + "\n".join(f"::: lit_methods.functional.{name}\n" for name in sorted(names))
        pages[f"api/lit_methods.functional{'.' + family if family else ''}.md"] = ("Functions", title, text)
    for module in API_MODULES:
        text = f"::: {module}\n    options: {{heading_level: 1, show_root_full_path: true}}\n"
        pages[f"api/{module}.md"] = ("Panels and errors", module.rpartition(".")[2].capitalize(), text)
    return pages


def api_index(pages: dict[str, tuple[str, str, str]]) -> str:
    """The first page of the API reference: every public class with the page that describes it."""
    parts = ["# API reference\n", "Written from the docstrings of the public names. Short class names work in YAML as they stand here.\n"]
    previous = ""
    for path, (group, title, text) in pages.items():
        if group != previous:
            parts.append(f"\n## {group}\n")
            previous = group
        names = re.findall(r"^::: ([\w.]+)$", text, flags=re.M)
        shown = ", ".join(f"[`{name.rpartition('.')[2]}`]({posixpath.basename(path)}#{name})" for name in names)
        parts.append(f"- [{title}]({posixpath.basename(path)}): {shown}")
    return "\n".join(parts) + "\n"


def generated_pages() -> dict[str, str]:
    """Every page that no file holds: path in the site -> Markdown."""
    pages = {path: readme_page(*part) for path, part in README_PARTS.items()}
    pages["techniques/index.md"] = techniques_page()
    pages["parts.md"] = parts_page()
    api = api_pages()
    pages |= {path: text for path, (_, _, text) in api.items()}
    pages["api/index.md"] = api_index(api)
    return pages


# ---- mkdocs: configuration, files, navigation ------------------------------------------------------------------------------------------


def source_view(folder: Path) -> None:
    """Copy the sources under ``folder`` as their import names say, so that griffe finds them without importing.

    Names that a package or module resolves lazily (from its stub, or by ``lazy_loader.attach``) become imports in the copy.
    """
    for package in PACKAGES:
        source = package_folder(package)
        for path in sorted(source.rglob("*.py")):
            copy = folder / package.replace(".", "/") / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8")
            copy.write_text(text + lazy_imports(path), encoding="utf-8")


def lazy_imports(source: Path) -> str:
    """The imports that stand for the lazy names of a package or module: its stub, or ``submod_attrs`` of ``lazy_loader.attach``."""
    stub = source.with_suffix(".pyi")
    if stub.is_file():
        return "\n" + stub.read_text(encoding="utf-8")
    if source.name != "__init__.py":
        return ""
    lines = [""]
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "attach":
            for word in node.keywords:
                if word.arg == "submod_attrs":
                    attributes = ast.literal_eval(word.value)
                    lines += [f"from .{module} import {name} as {name}" for module, names in attributes.items() for name in names]
    return "\n".join(lines) + "\n"


_view: Path | None = None


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: Any) -> Any:
    """Point mkdocstrings at the packages."""
    global _view
    _view = Path(tempfile.mkdtemp(prefix="lit-methods-docs-"))
    source_view(_view)
    handler = config.plugins["mkdocstrings"].config.handlers["python"]
    handler["paths"] = [str(_view)]
    handler["options"]["extensions"] = [str(ROOT / path) for path in handler["options"]["extensions"]]
    return config


def on_post_build(config: Any) -> None:
    """Remove what ``on_config`` made."""
    if _view is not None:
        shutil.rmtree(_view, ignore_errors=True)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are no files of ``docs/``, and make the navigation."""
    for path, source in WHOLE_FILES.items():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / source)))
    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    config.nav = navigation({file.src_uri for file in files if file.is_documentation_page()})
    return files


def navigation(present: set[str]) -> list[Any]:
    """The navigation: what stands in ``NAVIGATION`` and is there, techniques by family, the API, then every other page.

    Args:
        present: Paths of all pages.
    """
    nav: list[Any] = [{"Home": "index.md"}]
    used = {"index.md"}
    for section, pages in NAVIGATION:
        shown = [page for page in pages if page in present]
        if shown:
            nav.append({section: shown})
        used.update(shown)
    by_family: list[Any] = [
        {family_title(family): [{entry.name: f"techniques/{entry.slug}.md"} for entry in entries]} for family, entries in families().items()
    ]
    nav.insert(2, {"Techniques": ["techniques/index.md", *by_family]})
    groups: dict[str, list[dict[str, str]]] = {}
    for path, (group, title, _) in api_pages().items():
        groups.setdefault(group, []).append({title: path})
    nav.insert(4, {"API": ["api/index.md", *({group: pages} for group, pages in groups.items())]})
    used |= {f"techniques/{slug}.md" for slug in published()} | {"techniques/index.md", "api/index.md", *api_pages()}
    if others := sorted(present - used):
        nav.append({"More": others})
    return nav


# ---- Markdown: the same text on GitHub and on the site ---------------------------------------------------------------------------------


def repository_path(src_uri: str) -> str:
    """The file of the repository whose links a page of the site carries."""
    if src_uri in WHOLE_FILES:
        return WHOLE_FILES[src_uri]
    return "README.md" if src_uri in README_PARTS else f"docs/{src_uri}"


def site_target(path: str, anchor: str, present: set[str]) -> str | None:
    """The page of the site, with anchor, that shows a file of the repository; None where no page does.

    Args:
        path: Relative to the repository.
        anchor: Without ``#``, "" for none.
        present: Paths of all pages.
    """
    if path == "README.md":
        return _readme_target(anchor)
    page = next((page for page, source in WHOLE_FILES.items() if source == path), None)
    if page is None and path.startswith("docs/"):
        page = path.removeprefix("docs/") if path.removeprefix("docs/") in present else None
    return None if page is None else page + (f"#{anchor}" if anchor else "")


def _readme_target(anchor: str) -> str | None:
    if not anchor:
        return "index.md"
    if anchor == "techniques":
        return "techniques/index.md"
    for page, (_, headings) in README_PARTS.items():
        for heading in headings:
            if anchor == _slug(heading, "-"):
                return page if len(headings) == 1 else f"{page}#{_slug(_without_number(heading), '-')}"
    return None


def rewritten(target: str, src_uri: str, present: set[str], repository: str) -> str:
    """A link of the repository as one of the site: to the page that shows the file, else to the file in the repository.

    Args:
        target: What stands in the link, relative to the page's file in the repository.
        src_uri: The page.
        present: Paths of all files of the site.
        repository: Address of the repository.
    """
    if re.match(r"[a-z][a-z+.-]*:|#|//", target):
        return target
    path, _, anchor = target.partition("#")
    here = repository_path(src_uri)
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    if wanted.startswith("docs/") and wanted.removeprefix("docs/") in present and here.startswith("docs/"):
        return target
    place = site_target(wanted, anchor, present)
    if place is None and wanted.startswith("docs/") and wanted.removeprefix("docs/") in present:
        place = wanted.removeprefix("docs/")  # a picture
    if place is not None:
        page, _, anchor = place.partition("#")
        return posixpath.relpath(page, posixpath.dirname(src_uri) or ".") + (f"#{anchor}" if anchor else "")
    if not (ROOT / wanted).exists():
        return target  # mkdocs says that it leads nowhere
    kind = "tree" if (ROOT / wanted).is_dir() else "blob"
    return f"{repository}/{kind}/main/{quote(wanted)}" + (f"#{anchor}" if anchor else "")


def split_fences(markdown: str) -> Iterator[tuple[bool, str]]:
    """(is a fenced block, text) in order."""
    for part in re.split(r"(^```.*?^```[^\n]*$)", markdown, flags=re.M | re.S):
        if part:
            yield part.startswith("```"), part


def fence_for_the_site(block: str) -> str:
    """The info string without our test options; a first line that names a file becomes the block's title."""
    language, body = re.match(r"```(\w+)[^\n]*\n(.*)", block, flags=re.S).groups()  # type: ignore[union-attr]
    named = re.match(r"#\s*([\w./-]+\.(?:py|yaml))\s*\n", body)
    if named:
        return f'```{language} title="{named[1]}"\n{body[named.end() :]}'
    return f"```{language}\n{body}"


def prose_for_the_site(text: str, link: Callable[[str], str]) -> str:
    """Links go through ``link``; a list right below a paragraph gets the empty line that Python-Markdown needs."""

    def shown(found: re.Match[str]) -> str:
        return f"]({link(found[1])}{found[2]})"

    pieces = re.split(r"(`+[^`\n]*`+)", text)
    text = "".join(piece if piece.startswith("`") else _TARGET.sub(shown, piece) for piece in pieces)
    text = re.sub(r"(?<!^)(?<=[^\n])\n(?=(?:[-*] |1\. ))", _list_start, text)
    return text


_TARGET = re.compile(r"\]\(([^)\s]+)((?:\s+\"[^\"]*\")?)\)")


def _list_start(found: re.Match[str]) -> str:
    line = found.string[found.string.rfind("\n", 0, found.start()) + 1 : found.start()]
    in_list = bool(re.match(r"(?:[-*] |\d+\. |\s)", line)) or not line.strip()
    return "\n" if in_list else "\n\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Everything that a page of the repository needs to be one of the site."""
    src_uri = page.file.src_uri
    present = {file.src_uri for file in files}

    def link(target: str) -> str:
        return rewritten(target, src_uri, present, config.extra["repository"])

    if src_uri == "index.md":
        page.meta["hide"] = ["navigation", "toc"]  # room for the gallery
        markdown = markdown.replace("<!-- gallery -->", whole_gallery())
    if src_uri == "evidence.md":
        page.meta["hide"] = ["navigation"]  # and for the table
    slug = Path(src_uri).stem
    if src_uri == f"techniques/{slug}.md" and slug in published():
        markdown = re.sub(r"\A(# .+\n)", lambda title: f"{title[1]}\n{at_a_glance(published()[slug])}\n", markdown, count=1)
    return "".join(fence_for_the_site(part) if fenced else prose_for_the_site(part, link) for fenced, part in split_fences(markdown))
