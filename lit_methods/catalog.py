"""The catalogue of techniques, read from the ``TECHNIQUE = Technique(...)`` entry that stands beside each class.

Entries are literals, so the catalogue is read from the source with :mod:`ast`: listing techniques imports neither torch nor Lightning.
"""

import ast
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


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


@functools.cache
def techniques() -> dict[str, Technique]:
    """All techniques by slug, sorted.

    Raises:
        ValueError: Two entries share a slug.
    """
    found: dict[str, Technique] = {}
    for package in ("lit_methods", "lit_methods.callbacks", "lit_methods.datamodules"):
        for source in sorted(package_folder(package).rglob("*.py")):
            for entry in _entries(source):
                if found.setdefault(entry.slug, entry) != entry:
                    raise ValueError(f"two catalogue entries are called {entry.slug!r}, one of them in {source}: rename one")
    return dict(sorted(found.items()))


def techniques_in(names: Iterable[str]) -> list[Technique]:
    """The techniques that a run with classes of these short names is about.

    Those whose main class is there. Without one, those with any of their classes: several techniques share modules such as
    ``ImageSegmentor``, which alone don't say which of them it is.
    """
    there, entries = set(names), techniques().values()
    return [entry for entry in entries if entry.names[0] in there] or [entry for entry in entries if there & set(entry.names)]


@functools.cache
def public_names() -> dict[str, str]:
    """Short public class name -> package that exports it, from the three ``__init__.pyi`` stubs, without importing anything."""
    names = {}
    for package in ("lit_methods", "lit_methods.callbacks", "lit_methods.datamodules"):
        stub = ast.parse((package_folder(package) / "__init__.pyi").read_text(encoding="utf-8"))
        for node in stub.body:
            if isinstance(node, ast.ImportFrom):
                names.update({alias.asname or alias.name: package for alias in node.names})
    return names


def configs_folder() -> Path:
    """Folder of the shipped YAML files."""
    return package_folder("lit_methods.configs")
