"""Whether the keys of a claim exist, found out within a second: configs and sources are read, neither torch nor a technique imported."""

import ast
import copy
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_methods.catalog import configs_folder, package_folder, public_names
from lit_methods.claims.sources import PACKAGES
from lit_methods.claims.study import SOUP_OPTIONS, Stage, Study
from lit_methods.errors import CommandError, nearest

_SECTIONS = ("model", "data", "trainer", "optimizer", "lr_scheduler")
_ROOT = (*_SECTIONS, "seed_everything", "name", "run_root", "resume", "ckpt_path", "weights_only")

Arguments = frozenset[str]


def check_keys(study: Study, file: Path, passed: Sequence[str] = ()) -> None:
    """Refuse a claim with a key that its configs' classes don't have.

    Checked are ``set``, ``seed_keys``, ``tuned`` and the words from the command line. What can't be known without imports passes, and is
    checked when the configs are resolved: classes of other packages, and values below an argument that the config doesn't set.

    Args:
        study: What the file declares.
        file: For messages.
        passed: Words from the command line for every stage.

    Raises:
        CommandError: The first wrong key, with the file, the place in it and the nearest keys that exist.
    """
    words = [word[2:].partition("=")[0] for word in passed if word.startswith("--") and not word.startswith("--config")]
    chains = {f"arms.{arm}": list(chain) for arm, chain in study.arms.items()}
    extra = [(f"reports ({report.name})", [report.stage]) for report in study.reports if report.stage is not None]
    trees: dict[str, list[Any]] = {}
    for where, chain in [*chains.items(), *extra]:
        for index, stage in enumerate(chain):
            tree = stage_config(stage)
            trees.setdefault(where, []).append(tree)
            place = f"{where}[{index}]" if where in chains else f"{where}.stage"
            for source, keys in ((f"{place}.set", stage.set), (f"seed_keys, in {place}", study.seed_keys), ("the command line", words)):
                for key in keys:
                    if stage.command == "soup" and key in SOUP_OPTIONS:
                        continue
                    if tree is not None and (problem := wrong_key(tree, key)):
                        raise CommandError(f"{file}: {source}: {problem}")
    for arm, keys in study.tuned.items():
        for key in keys:
            problems = [wrong_key(tree, key) if tree is not None else "" for tree in trees[f"arms.{arm}"]]
            if all(problems):
                raise CommandError(f"{file}: tuned.{arm}: {problems[-1]}")


# ---- configs ---------------------------------------------------------------------------------------------------------------------------


def stage_config(stage: Stage) -> dict[str, Any] | None:
    """What a stage's files hold, later ones over earlier ones, with the classes that ``set`` chooses; None if one isn't there."""
    merged: dict[str, Any] = {}
    for name in stage.configs:
        path = config_file(f"configs/{name}")
        if path is None:
            return None
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        _merge(merged, content if isinstance(content, dict) else {})
    for key, value in stage.set.items():
        _choose_class(merged, key.removesuffix(".class_path").split("."), value, key.endswith(".class_path"))
    return merged


def config_file(given: str) -> Path | None:
    """The file that ``--config`` means: in the current folder, else among the shipped ones; None for neither."""
    inside = given.removeprefix("configs/")
    return next((path for path in (Path(given), configs_folder() / inside, configs_folder() / f"{inside}.yaml") if path.is_file()), None)


def _merge(base: dict[str, Any], new: dict[str, Any]) -> None:
    if base.get("class_path") != new.get("class_path", base.get("class_path")):
        base.pop("init_args", None)
    for key, value in new.items():
        if key.endswith("+"):
            name = key[:-1]
            before = base.get(name) or []
            base[name] = [*(before if isinstance(before, list) else [before]), *(value if isinstance(value, list) else [value])]
        elif isinstance(value, dict):
            base[key] = base[key] if isinstance(base.get(key), dict) else {}
            _merge(base[key], value)
        else:
            base[key] = copy.deepcopy(value)


def _choose_class(tree: Any, parts: Sequence[str], value: Any, says_so: bool) -> None:
    """Note another class at a place where the config has one: its arguments are the ones that later keys may set."""
    for part in parts:
        tree = tree[-1] if isinstance(tree, list) and tree else tree
        if not isinstance(tree, dict):
            return
        inside = tree.get("init_args") if "class_path" in tree and part != "init_args" else None
        tree = (inside if isinstance(inside, dict) else tree).get(part)
    tree = tree[-1] if isinstance(tree, list) and tree else tree
    if isinstance(tree, dict) and (says_so or "class_path" in tree):
        chosen = value if isinstance(value, dict) else {"class_path": value}
        if chosen.get("class_path") != tree.get("class_path"):
            tree.clear()
        _merge(tree, chosen)


# ---- keys ------------------------------------------------------------------------------------------------------------------------------


def wrong_key(tree: dict[str, Any], key: str) -> str:
    """Why a dotted key can't be set in a config, with the nearest keys that can; "" if it can, or if that can't be known.

    Args:
        tree: The config.
        key: As on the command line: ``init_args`` may be left out, and behind ``trainer.callbacks`` stands an argument of the last one.
    """
    first, *rest = key.rstrip("+").split(".")
    if first not in _ROOT:
        hint = [
            f"{section}.init_args.{first}" for section in ("model", "data") if first in (class_arguments(_class_of(tree, section)) or ())
        ]
        return f"unknown key {key!r}" + _hint(hint or nearest(first, _ROOT), _ROOT)
    if first == "trainer" and rest:
        known = trainer_arguments()
        if known and rest[0] not in known:
            return f"unknown key {key!r}: the Trainer has no argument {rest[0]!r}" + _hint(
                [f"trainer.{name}" for name in nearest(rest[0], known)]
            )
        if rest[0] == "callbacks" and len(rest) > 1 and not (tree.get("trainer") or {}).get("callbacks"):
            return f"unknown key {key!r}: the stage's configs have no callback"
        first, rest = f"trainer.{rest[0]}", rest[1:]
        return _wrong_below((tree.get("trainer") or {}).get(first[8:]), first, rest, key)
    return _wrong_below(tree.get(first), first, rest, key)


def _wrong_below(node: Any, path: str, rest: Sequence[str], key: str) -> str:
    node = node[-1] if isinstance(node, list) and node else node  # `set` reaches the last callback alone
    if not rest or not isinstance(node, dict) or "class_path" not in node or rest[0] in ("class_path", "dict_kwargs"):
        return ""
    if rest[0] == "init_args":
        rest = rest[1:]
        if not rest:
            return ""
    known = class_arguments(str(node["class_path"]))
    if known is None:
        return ""
    if rest[0] not in known:
        name = str(node["class_path"]).rpartition(".")[2]
        near = [f"{path}.init_args.{one}" for one in nearest(rest[0], known)]
        return f"unknown key {key!r}: {name} has no argument {rest[0]!r}" + _hint(near, known)
    return _wrong_below((node.get("init_args") or {}).get(rest[0]), f"{path}.init_args.{rest[0]}", rest[1:], key)


def _hint(near: Sequence[str], known: Sequence[str] | Arguments = ()) -> str:
    if near:
        return f"\n  nearest: {', '.join(near)}"
    return f"\n  known: {', '.join(sorted(known))}" if known else ""


def _class_of(tree: dict[str, Any], section: str) -> str:
    node = tree.get(section)
    return str(node.get("class_path", "")) if isinstance(node, dict) else ""


# ---- classes ---------------------------------------------------------------------------------------------------------------------------


@functools.cache
def trainer_arguments() -> Arguments:
    """Names of the arguments of Lightning's Trainer, from its source; empty if that isn't found."""
    spec = importlib.util.find_spec("lightning")
    file = Path(spec.origin or "").parent / "pytorch" / "trainer" / "trainer.py" if spec else Path()
    definition = _class_in(file, "Trainer") if file.is_file() else None
    return _arguments(*definition) or frozenset() if definition else frozenset()


@functools.cache
def class_arguments(class_path: str) -> Arguments | None:
    """Names of a class's arguments, from its source, base classes included; None if it, or one that it passes arguments on to, isn't found.

    Args:
        class_path: A short name of ours, or a dotted path into our packages or the current folder.
    """
    definition = _find(class_path)
    return _arguments(*definition) if definition else None


def _find(class_path: str) -> tuple[Path, ast.ClassDef] | None:
    module, _, name = class_path.rpartition(".")
    if module in ("", *PACKAGES):
        module = _stub_modules().get(name, "")
    for place in _places(module):
        for file in [place.with_suffix(".py"), *sorted(place.glob("*.py"))]:
            if file.is_file() and (definition := _class_in(file, name)):
                return definition
    return None


def _places(module: str) -> list[Path]:
    if not module:
        return []
    for package in PACKAGES:
        if module == package or module.startswith(f"{package}."):
            return [package_folder(package).joinpath(*module.removeprefix(package).strip(".").split("."))]
    return [Path.cwd().joinpath(*module.split("."))]


@functools.cache
def _stub_modules() -> dict[str, str]:
    """Short public name -> module that defines it, or the package around that module."""
    modules = {}
    for package in set(public_names().values()):
        stub = ast.parse((package_folder(package) / "__init__.pyi").read_text(encoding="utf-8"))
        for node in stub.body:
            if isinstance(node, ast.ImportFrom):
                module = f"{package}.{node.module}" if node.level else str(node.module)
                modules.update({alias.asname or alias.name: module for alias in node.names})
    return modules


@functools.cache
def _class_in(file: Path, name: str) -> tuple[Path, ast.ClassDef] | None:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return file, node
    return None


def _arguments(file: Path, node: ast.ClassDef) -> Arguments | None:
    constructor = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    names = frozenset[str]()
    if constructor is not None:
        names = frozenset(
            argument.arg for argument in [*constructor.args.posonlyargs, *constructor.args.args[1:], *constructor.args.kwonlyargs]
        )
        if constructor.args.kwarg is None:
            return names
    elif any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        names = frozenset(item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name))
    for base in node.bases:
        inherited = _inherited(file, base)
        if inherited is None:
            return None
        names |= inherited
    return names


def _inherited(file: Path, base: ast.expr) -> Arguments | None:
    name = ast.unparse(base).partition("[")[0]
    if name in ("object", "ABC", "Generic", "Protocol"):
        return frozenset()
    if definition := _class_in(file, name):
        return _arguments(*definition)
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return class_arguments(f"{node.module}.{alias.name}")
    return None
