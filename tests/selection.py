"""``pytest --technique <slug>``: which tests concern one technique. No list to keep: it follows from names and imports.

- Its own files: ``test_<slug>*.py`` anywhere (golden, trajectory, technique), and files that import classes or modules of it and of at most
  :data:`NEIGHBOURS` techniques altogether. All their tests are run.
- Files about all techniques: those that read the catalogue, import more techniques, or check the layout. Of these, the tests whose
  parameters name the technique, one of its classes, configs, its claim or its page, and those marked ``catalogue``.
"""

import ast
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_methods.catalog import Technique, techniques
from lit_methods.errors import suggest

NEIGHBOURS = 3
WHOLE_TREE = ("test_layout",)  # files that look at every source file


def find_technique(slug: str) -> Technique:
    """The technique.

    Raises:
        ValueError: There is none of that name; the message lists those that there are.
    """
    found = techniques().get(slug)
    if found is None:
        known = ", ".join(techniques())
        raise ValueError(f"no technique {slug!r}{suggest(slug, list(techniques()))}\n  techniques: {known}")
    return found


def has_word(slug: str, stem: str) -> bool:
    """Whether a file's stem is the slug, or holds it between underscores."""
    return re.search(rf"(?:^|_){re.escape(slug)}(?:_|$)", stem) is not None


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of what a test file imports from us."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lit_methods"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("lit_methods")}
    return frozenset(found)


def is_of(dotted: str, technique: Technique) -> bool:
    """Whether an imported name is a class of the technique, or stands in its folder or module."""
    return technique.slug in dotted.split(".") or dotted.rpartition(".")[2] in own_names(technique)


@functools.cache
def own_names(technique: Technique) -> frozenset[str]:
    """Short names of its main class, and of those that no other technique lists."""
    others = {name for other in techniques().values() if other != technique for name in other.names}
    return frozenset({technique.names[0], *(set(technique.names) - others)})


def concerned(path: Path) -> list[str]:
    """Slugs of all techniques that a test file imports something of."""
    return [slug for slug, entry in techniques().items() if any(is_of(dotted, entry) for dotted in imports(path))]


def is_own_file(path: Path, technique: Technique) -> bool:
    """Whether all tests of a file belong to the technique."""
    if re.fullmatch(rf"test_{re.escape(technique.slug)}(?:_\w+)?", path.stem):
        return True
    if any(re.fullmatch(rf"test_{re.escape(slug)}(?:_\w+)?", path.stem) for slug in techniques()):
        return False  # another one's
    found = concerned(path)
    return technique.slug in found and len(found) <= NEIGHBOURS


def is_about_all(path: Path) -> bool:
    """Whether a file may hold tests of any technique."""
    reads_catalogue = imports(path) & {"lit_methods.catalog.techniques", "lit_methods.catalog.published"}
    return path.stem in WHOLE_TREE or bool(reads_catalogue) or len(concerned(path)) > NEIGHBOURS


def names_it(value: Any, technique: Technique) -> bool:
    """Whether a parameter of a test is the technique, or one of its classes, configs, claims or pages."""
    if isinstance(value, Technique):
        return value == technique
    if isinstance(value, type):
        return value.__name__ in own_names(technique)
    if isinstance(value, Path):
        return has_word(technique.slug, value.stem) or value.name in {Path(config).name for config in technique.configs}
    if isinstance(value, str):
        return value == technique.slug or value in technique.configs or value.partition(",")[0] in own_names(technique)
    return False


def concerns(path: Path, parameters: Iterable[Any], is_catalogue: bool, technique: Technique) -> bool:
    """Whether a test of the file ``path`` belongs to the technique.

    Args:
        path: The test's file.
        parameters: Values of its parameters.
        is_catalogue: Whether it is marked ``catalogue``, or looks at the whole tree.
        technique: The technique.
    """
    return (
        is_own_file(path, technique) or is_catalogue or path.stem in WHOLE_TREE or any(names_it(value, technique) for value in parameters)
    )
