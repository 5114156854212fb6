"""The arrows of the source tree, read from the sources: who may import whom (docs/design.md, "Layout")."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_methods import catalog
from lit_methods.catalog import package_folder

PACKAGES = ("lit_methods", "lit_methods.callbacks", "lit_methods.datamodules")
AGGREGATES = {"lit_methods.functional"}  # shows the cores of all techniques in one place, which is its purpose


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of all three packages."""
    found = {}
    for package in PACKAGES:
        folder = package_folder(package)
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts[: -1 if parts[-1] == "__init__" else None]])
            if name.split(".")[: len(package.split("."))] == package.split("."):
                found[name] = path
    return found


@functools.cache
def public() -> dict[tuple[str, str], str]:
    """(Package, public name) -> module that defines it, from the stubs."""
    found = {}
    for package in PACKAGES:
        for node in ast.parse((package_folder(package) / "__init__.pyi").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                found.update({(package, alias.name): f"{package}.{node.module}" for alias in node.names})
    return found


def statements(node: ast.AST, *, inside: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that run: those under TYPE_CHECKING don't; those in functions only if ``inside``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        elif inside or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from statements(child, inside=inside)


@functools.cache
def imports(module: str, *, inside: bool = True) -> frozenset[str]:
    """What a module imports: our modules by their dotted names, others by their first part."""
    found = set()
    for node in statements(ast.parse(modules()[module].read_text(encoding="utf-8")), inside=inside):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
            continue
        assert not node.level, f"{module}: import by the installed name"
        source = node.module or ""
        for alias in node.names:
            full = f"{source}.{alias.name}"
            found.add(full if full in modules() else public().get((source, alias.name), source))
    return frozenset(name if name in modules() else name.partition(".")[0] for name in found) - {module}


@functools.cache
def techniques() -> dict[str, str]:
    """Module -> the technique that it belongs to.

    The file with the catalogue entry, its folder where that has a core of its own, and files elsewhere with a class that the entry names
    and that builds on that core: the callbacks of a technique whose main class is a module.
    """
    found: dict[str, str] = {}
    for name, path in modules().items():
        if re.search(r"^TECHNIQUE = Technique\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[name] = name
            if (path.parent / "core.py").is_file() and path.parent.name != "tasks":
                home = name.rpartition(".")[0]
                found.update({other: home for other in modules() if other == home or other.startswith(f"{home}.")})
    for entry in catalog.techniques().values():
        main = next(public()[package, entry.names[0]] for package in PACKAGES if (package, entry.names[0]) in public())
        for (_, short), module in public().items():
            if short in entry.names and any(found.get(name) == found[main] for name in imports(module)):
                found.setdefault(module, found[main])
    return found


def shares(module: str) -> bool:
    """Whether a module is a piece that its level shares: no technique, and no list of them all."""
    return module not in techniques() and module not in AGGREGATES


def broken(importers: list[str], wrong: set[str]) -> list[str]:
    return [f"{importer} imports {name}" for importer in importers for name in sorted(imports(importer) & wrong)]


def test_there_is_something_to_test() -> None:
    assert len(modules()) > 200
    assert len(set(techniques().values())) >= 20
    assert "lit_methods.callbacks.sparsity.cast.core" in techniques()


CORES = [name for name in modules() if name.endswith(".core")]


@pytest.mark.parametrize("core", CORES)
def test_a_core_is_maths_alone(core: str) -> None:
    assert not imports(core) & {"lightning", "pytorch_lightning", "wandb"}, "a core knows no trainer"
    wiring = {name for name in modules() if name.rpartition(".")[2] in ("callback", "module", "loss_term", "ordering")}
    own = techniques().get(core)
    assert not broken([core], wiring | {name for name, home in techniques().items() if home != own})


def test_no_shared_piece_imports_a_technique() -> None:
    assert not broken([name for name in modules() if shares(name)], set(techniques()))


def test_no_technique_imports_another() -> None:
    for module, home in techniques().items():
        assert not broken([module], {name for name, other in techniques().items() if other != home})


def test_hosts_import_no_technique() -> None:
    hosts = [name for name in modules() if name.startswith("lit_methods.tasks.")]
    assert hosts
    assert not broken(hosts, set(techniques()))


def test_imports_go_in_no_circle() -> None:
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if state.get(name) == 2:
            return
        assert state.get(name) != 1, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        state[name] = 1
        for other in sorted(imports(name, inside=False) & set(modules())):
            visit(other, (*path, name))
        state[name] = 2

    for name in modules():
        visit(name, ())


def test_a_technique_with_a_folder_has_its_maths_in_core() -> None:
    homes = {home for home in techniques().values() if home not in modules() or modules()[home].name == "__init__.py"}
    assert homes
    assert all(f"{home}.core" in modules() for home in homes)
