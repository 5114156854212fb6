"""The catalogue of techniques, read from the ``TECHNIQUE = Technique(...)`` entry that stands beside each class.

Entries are literals, so the catalogue is read from the source with :mod:`ast`: listing techniques imports neither torch nor Lightning.

Other packages add techniques. Their metadata name the package under the entry point group ``lit_methods.techniques``::

    [project.entry-points."lit_methods.techniques"]
    my_methods = "my_methods"

Its sources are then searched for entries, its folder ``configs`` for YAML files, and its ``__init__.pyi`` for short class names.
:func:`techniques` and :func:`public_names` are this package alone, :func:`installed_techniques` and :func:`installed_names` all of them.
"""

import ast
import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("lit_methods", "lit_methods.callbacks", "lit_methods.datamodules")
GROUP = "lit_methods.techniques"


@dataclass(frozen=True)
class Technique:
    """One published technique.

    Attributes:
        slug: Short lower-case name, the stem of its config, golden folder, claim and docs page.
        title: Full title, as in the paper.
        arxiv: arXiv identifier such as ``2503.19912``; "" for a technique that has none.
        family: Folder that holds it, such as ``lidar``.
        form: ``module`` (owns the training step) or ``callback`` (attaches to any LightningModule).
        classes: Dotted paths of its public classes, the main one first.
        configs: Runnable configs relative to ``configs/``, the embedded run first.
        golden: Kinds of golden vectors that test it.
        claim: The claim that ``configs/claims/<slug>.yaml`` re-shows, in one sentence.
        summary: What it does, in one sentence.
        draft: It isn't finished: it needs no full-scale config, claim, page and picture yet, and the README leaves it out.
        short: What people call it, such as ``iCT``; "" where the title begins with that and a colon, or is short itself.
    """

    slug: str
    title: str
    arxiv: str
    family: str
    form: str
    classes: tuple[str, ...]
    configs: tuple[str, ...]
    golden: tuple[str, ...]
    claim: str
    summary: str
    draft: bool = False
    short: str = ""

    @property
    def name(self) -> str:
        """``short``, else the title up to its colon, as in "SuperFlow++: Enhanced ...", if that is short, else the whole title."""
        head, colon, _ = self.title.partition(": ")  # the one of "N:M" ends no name
        return self.short or (head if colon and len(head) <= 40 else self.title)

    @property
    def names(self) -> tuple[str, ...]:
        """Short names of its classes, the main one first."""
        return tuple(path.rpartition(".")[2] for path in self.classes)


def package_folder(package: str) -> Path:
    """Folder of one of our three import packages, in a repository (editable install) as in a wheel."""
    here = Path(__file__).resolve().parent
    if package == "lit_methods":
        return here
    name = package.rpartition(".")[2]
    inside = here / name
    return inside if inside.is_dir() else here.parent / name


def _entries(source: Path) -> list[Technique]:
    text = source.read_text(encoding="utf-8")
    if "Technique(" not in text:
        return []
    found = []
    for node in ast.parse(text, filename=str(source)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "Technique":
            found.append(Technique(**{word.arg: ast.literal_eval(word.value) for word in node.value.keywords if word.arg}))
    return found


def collect(folders: Iterable[Path]) -> dict[str, Technique]:
    """The entries of all sources below the folders, by slug, sorted.

    Raises:
        ValueError: Two entries share a slug.
    """
    found: dict[str, Technique] = {}
    for folder in folders:
        for source in sorted(folder.rglob("*.py")):
            for entry in _entries(source):
                if found.setdefault(entry.slug, entry) != entry:
                    raise ValueError(f"two catalogue entries are called {entry.slug!r}, one of them in {source}: rename one")
    return dict(sorted(found.items()))


@functools.cache
def techniques() -> dict[str, Technique]:
    """All techniques of this package by slug, sorted, drafts too.

    Raises:
        ValueError: Two entries share a slug.
    """
    return collect(package_folder(package) for package in PACKAGES)


def family_title(family: str) -> str:
    """``sparse_attention`` -> ``Sparse attention``; words with hyphens and LiDAR are written as they are."""
    written = {
        "fine_tuning": "Fine-tuning",
        "lidar": "LiDAR",
        "self_supervised": "Self-supervised learning",
        "semi": "Semi-supervised learning",
    }
    return written.get(family, family.replace("_", " ").capitalize())


def published() -> dict[str, Technique]:
    """The techniques of this package that are no drafts."""
    return {slug: entry for slug, entry in techniques().items() if not entry.draft}


def installed_techniques() -> dict[str, Technique]:
    """The techniques of this package and of every readable plugin, by slug, sorted."""
    return dict(sorted([*techniques().items(), *(item for plugin in plugins() for item in plugin.techniques.items())]))


def techniques_in(names: Iterable[str]) -> list[Technique]:
    """The techniques that a run with classes of these short names is about.

    Those whose main class is there. Without one, those with any of their classes: several techniques share modules such as
    ``ImageSegmentor``, which alone don't say which of them it is.
    """
    there, entries = set(names), installed_techniques().values()
    return [entry for entry in entries if entry.names[0] in there] or [entry for entry in entries if there & set(entry.names)]


def stub_names(package: str, stub: Path) -> dict[str, str]:
    """Short name -> package that exports it, from the imports of a stub."""
    nodes = ast.parse(stub.read_text(encoding="utf-8")).body
    return {alias.asname or alias.name: package for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}


@functools.cache
def public_names() -> dict[str, str]:
    """Short public class name -> package that exports it, from the three ``__init__.pyi`` stubs, without importing anything."""
    names: dict[str, str] = {}
    for package in PACKAGES:
        names.update(stub_names(package, package_folder(package) / "__init__.pyi"))
    return names


def installed_names() -> dict[str, str]:
    """:func:`public_names`, and behind them those of every readable plugin; a name that is taken keeps its first meaning."""
    names: dict[str, str] = {}
    for plugin in plugins():
        names = {**plugin.names, **names}
    return {**names, **public_names()}


def configs_folder() -> Path:
    """Folder of the shipped YAML files."""
    return package_folder("lit_methods.configs")


def configs_folders() -> list[Path]:
    """Folders of YAML files: the shipped ones, then those of the plugins."""
    folders = [plugin.folder / "configs" for plugin in plugins() if plugin.folder is not None]
    return [configs_folder(), *(folder for folder in folders if folder.is_dir())]


# ---- other packages --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plugin:
    """A package that adds techniques.

    Attributes:
        package: Its import name.
        distribution: What is installed: name and version.
        folder: Folder of its sources; None where it can't be used.
        techniques: Its entries by slug.
        names: Its short class names -> module or package that exports them.
        problem: Why it is left out, in one line; "" where it isn't.
    """

    package: str
    distribution: str
    folder: Path | None = None
    techniques: dict[str, Technique] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def warning(self) -> str:
        """One line about a plugin that is left out."""
        return f"warning: the package {self.package} of {self.distribution} is left out: {self.problem}"


@functools.cache
def plugins() -> tuple[Plugin, ...]:
    """The packages that the entry point group names, in the order of their names; none of them is imported."""
    taken = {slug: "lit-methods" for slug in techniques()}
    found: list[Plugin] = []
    for package, distribution in sorted(_entry_points()):
        try:
            plugin = _read_plugin(package, distribution)
            for slug in plugin.techniques:
                if taken.setdefault(slug, package) != package:
                    raise ValueError(f"its technique {slug!r} has the slug of one of {taken[slug]}, rename it")
        except Exception as error:  # whatever is wrong with somebody's package, the others are listed
            said = " ".join(str(error).split()) or "no reason given"
            plugin = Plugin(package, distribution, problem=f"{type(error).__name__}: {said}")
        found.append(plugin)
    return tuple(found)


def _entry_points() -> Iterator[tuple[str, str]]:
    """(package, name and version of its distribution) of every entry point of the group, each once."""
    seen = set()
    for point in importlib.metadata.entry_points(group=GROUP):
        distribution = f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.name
        if point.value not in seen:
            seen.add(point.value)
            yield point.value, distribution


def _read_plugin(package: str, distribution: str) -> Plugin:
    top, *inside = package.split(".")
    spec = importlib.util.find_spec(top)  # of a package without dots: nothing is imported
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"there is no package {top!r}; the entry point must name one, not a module or a class")
    folder = Path(next(iter(spec.submodule_search_locations))).joinpath(*inside).resolve()
    if not folder.is_dir():
        raise ModuleNotFoundError(f"{folder} is no folder")
    entries = collect([folder])
    stub = folder / "__init__.pyi"
    names = {dotted.rpartition(".")[2]: dotted.rpartition(".")[0] for entry in entries.values() for dotted in entry.classes}
    names.update(stub_names(package, stub) if stub.is_file() else {})
    return Plugin(package, distribution, folder, entries, names)
