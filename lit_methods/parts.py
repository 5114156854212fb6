"""What one builds with: datamodules, hosts, networks, losses, metrics, callbacks, and the classes that one subclasses.

A class describes itself, in its own docstring, and the table is read from the sources with :mod:`ast`: neither torch nor Lightning is
imported. The first sentence says what it is. A paragraph or line that begins with ``Batches:``, ``Shapes:`` or ``Needs:`` says what a
datamodule gives and what a host or callback wants; for a network it is the docstring of ``forward``. ``Cost:`` holds what was measured.
"""

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_methods.catalog import PACKAGES, package_folder, public_names, techniques

# kind -> the foreign classes that its classes descend from, the most special kind first
_ROOTS = {
    "datamodule": {"LightningDataModule"},
    "host module": {"LightningModule"},
    "metric": {"Metric"},
    "callback": {"Callback", "BasePredictionWriter", "RichProgressBar", "WeightAveraging"},
    "network": {"Module"},
}
KINDS = {
    "datamodule": "Datamodules: --data NAME",
    "host module": "Host modules, which train a network on a task: --model NAME",
    "network": "Networks: class_path: lit_methods.NAME",
    "loss": "Losses with weights of their own",
    "metric": "Metrics of torchmetrics",
    "callback": "Callbacks that belong to no technique: --trainer.callbacks+=NAME",
    "base class": "Base classes: subclass one",
    "tool": "Tools",
}


@dataclass(frozen=True)
class Part:
    """A class to build with.

    Attributes:
        name: Class name.
        kind: A key of ``KINDS``.
        family: Folder of its family; "" for what belongs to none.
        path: Dotted path to import it by: the short public one where there is one.
        line: What it is, in one sentence.
        shapes: What it takes and gives; "" where the docstring doesn't say.
        cost: What was measured; "" where nothing was.
        docstring: All of it.
    """

    name: str
    kind: str
    family: str
    path: str
    line: str
    shapes: str
    cost: str
    docstring: str


@dataclass(frozen=True)
class _Class:
    node: ast.ClassDef
    module: str  # dotted, as it is imported
    source: Path
    family: str

    @property
    def bases(self) -> list[str]:
        return [base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in self.node.bases]


def sources() -> Iterator[tuple[str, Path, str]]:
    """(dotted module, file, family) of every source file of the three packages; the family is "" for files of the top level."""
    inner = [package_folder(package).resolve() for package in PACKAGES[1:]]
    for package in PACKAGES:
        folder = package_folder(package)
        for source in sorted(folder.rglob("*.py")):
            if package == PACKAGES[0] and any(source.resolve().is_relative_to(other) for other in inner):
                continue  # installed, the other packages lie inside this one
            parts = source.relative_to(folder).with_suffix("").parts
            below = parts[1:] if parts[0] == "tasks" else parts
            family = below[0] if len(below) > 1 else ""
            yield ".".join([package, *(part for part in parts if part != "__init__")]), source, family


@functools.cache
def _classes() -> dict[str, _Class]:
    found: dict[str, _Class] = {}
    for module, source, family in sources():
        text = source.read_text(encoding="utf-8")
        if "\nclass " not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, _Class(node, module, source, family))
    return found


def _ancestors(name: str) -> list[str]:
    """Names of all base classes, the nearest first."""
    found: list[str] = []
    pending = [name]
    while pending:
        known = _classes().get(pending.pop(0))
        new = [base for base in (known.bases if known else []) if base not in found]
        found += new
        pending += new
    return found


def _subclassed_elsewhere() -> set[str]:
    classes = _classes()
    return {base for one in classes.values() for base in one.bases if base in classes and classes[base].source != one.source}


def _kind(name: str, one: _Class, public: bool, bases: set[str]) -> str:
    above = _ancestors(name)
    kind = next((kind for kind, roots in _ROOTS.items() if roots & set(above)), "")
    if kind in ("callback", "") and name in bases:
        return "base class" if kind else "tool"
    if not public:
        return "base class" if kind and name in bases else ""
    if kind == "network" and one.source.stem == "losses":
        return "loss"
    return kind or "tool"


@functools.cache
def parts() -> tuple[Part, ...]:
    """All parts, by kind, family and name. Main classes of techniques are left out: the catalogue lists them."""
    public, bases = public_names(), _subclassed_elsewhere()
    taken = {entry.names[0] for entry in techniques().values()} | {"Technique"}
    found = []
    for name, one in _classes().items():
        docstring = ast.get_docstring(one.node) or ""
        if name in taken or name.startswith("_") or not docstring:
            continue
        if kind := _kind(name, one, name in public, bases):
            if kind == "tool" and name not in public:
                continue
            path = f"{public[name]}.{name}" if name in public else f"{one.module}.{name}"
            shapes = next((said for base in (name, *_ancestors(name)) if (said := _shapes(base))), "")
            line = _plain(docstring.partition("\n\n")[0]) if kind == "base class" else _first_sentence(docstring)
            found.append(Part(name, kind, one.family, path, line, shapes, _paragraph(docstring, "Cost"), docstring))
    order = list(KINDS)
    return tuple(sorted(found, key=lambda part: (order.index(part.kind), part.family, part.name)))


def _plain(text: str) -> str:
    """One line without reStructuredText."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", " ".join(text.split()))
    return text.replace("``", "")


def _first_sentence(text: str) -> str:
    first = _plain(text.partition("\n\n")[0])
    end = re.search(r"(?<![A-Z])(?<! al)\.(?= [A-Za-z])", first)
    return first if end is None else first[: end.end()]


def _paragraph(docstring: str, words: str) -> str:
    """The first sentence behind a word such as ``Batches:`` at the beginning of a line."""
    found = re.search(rf"^(?:{words}):\s*(.*?)(?=\n\n|\n\w+: |\Z)", docstring, flags=re.M | re.S)
    return _first_sentence(found[1]).rstrip(".") if found else ""


def _shapes(name: str) -> str:
    known = _classes().get(name)
    if known is None:
        return ""
    docstring = ast.get_docstring(known.node) or ""
    return (
        _paragraph(docstring, r"(?:[A-Z][\w ]* b|B)atch(?:es)?(?: \([^)]*\))?|Shapes|Needs")
        or _of_forward(known.node)
        or _of_batch(known.node)
    )


def _of_forward(node: ast.ClassDef) -> str:
    """The docstring of ``forward`` where it says what goes in and comes out."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "forward":
            said = _first_sentence(ast.get_docstring(item) or "").rstrip(".")
            return said if "->" in said else ""
    return ""


def _of_batch(node: ast.ClassDef) -> str:
    """Keys that the class takes out of ``batch``, in their order of use."""
    keys = [
        item.slice.value
        for item in ast.walk(node)
        if isinstance(item, ast.Subscript) and isinstance(item.value, ast.Name) and item.value.id == "batch"
        if isinstance(item.slice, ast.Constant) and isinstance(item.slice.value, str)
    ]
    return f"batch keys {', '.join(dict.fromkeys(keys))}" if keys else ""


__all__ = ["KINDS", "Part", "parts", "sources"]
