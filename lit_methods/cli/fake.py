"""``lit fake``: a tiny release in a benchmark's official layout, to try a pipeline before the data have arrived."""

import importlib
import inspect
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_methods.catalog import installed_names
from lit_methods.cli.commands import Parser, parsed
from lit_methods.cli.config_files import find_config, shipped_configs
from lit_methods.errors import CommandError, suggest
from lit_methods.files import refuse_repeated_keys
from lit_methods.import_path import add_current_folder

SIZES = ("num_users", "num_items", "text_width", "channels", "width")  # numbers of a model that its data must have
ON_A_LAPTOP = (
    "--trainer.accelerator=cpu --trainer.devices=1 --trainer.num_nodes=1 --trainer.strategy=auto --trainer.precision=32-true "
    "--trainer.max_steps=2"
)


@dataclass(frozen=True)
class Section:
    """A datamodule of a config: where it stands, its class, its arguments."""

    key: str
    kind: type
    arguments: Mapping[str, Any]
    sizes: dict[str, int] = field(default_factory=dict)


def fake(argv: list[str]) -> int:
    """``lit fake <datamodule or config> <root>``: write the release, and say how to read it."""
    parser = Parser(
        prog="lit fake",
        description="Write a tiny release in a benchmark's official layout. What is in it is made up: figures on it mean "
        "nothing. With a config, all data that the config names are written, so that they are found with LIT_METHODS_DATA=<root>.",
    )
    parser.add_argument("what", metavar="datamodule|config", help="such as CIFARDataModule, or configs/full/tcm_cub.yaml")
    parser.add_argument("root", help="a new or empty folder")
    parser.add_argument("arguments", nargs="*", metavar="ARG=VALUE", help="arguments of the datamodule that choose the layout: name=sop")
    options = parsed(parser, argv)
    if options is None:
        return 0
    root = Path(options.root).expanduser()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise CommandError(
            f"{root} is {'not empty' if root.is_dir() else 'a file'}: give a new folder, so that no data of yours are touched"
        )
    name = options.what
    is_config = name not in installed_names() and ("/" in name or name.endswith((".yaml", ".yml")))
    if is_config and options.arguments:
        raise CommandError(f"{options.arguments[0]}: a config has its arguments already; they can be given to a datamodule alone")
    try:
        said = _of_config(name, root) if is_config else _of_datamodule(name, root, options.arguments)
    except OSError as error:
        raise CommandError(f"can't write to {root}: {error.strerror or error}", exit_code=1) from error
    except ImportError as error:
        raise CommandError(f"{name}: {error}", exit_code=1) from error
    files = [path for path in root.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{root}: {len(files)} files, {size / 1e6:.1f} MB, made up: figures on them mean nothing")
    print("\n".join(said))
    return 0


# ---- one datamodule --------------------------------------------------------------------------------------------------------------------


def _of_datamodule(name: str, root: Path, words: list[str]) -> list[str]:
    from lit_methods.datamodules.fake import write_fake, writer_of

    kind = _class_of(name)
    if kind is None or writer_of(kind) is None or "root" not in inspect.signature(kind).parameters:
        known = [other for other in _with_root()]
        reason = f"no datamodule with a root {name!r}" if kind is None else f"{name} reads no root of its own"
        near = suggest(name, [*known, *shipped_configs()], otherwise=f"known: {', '.join(known)}")
        raise CommandError(reason + near)
    arguments = _parsed_words(kind, words)
    found = write_fake(kind, root, **arguments)
    given = " ".join(f"--data.{key} {shlex.quote(_text(value))}" for key, value in (arguments | found).items())
    return [f"  --data {name} {given}"]


def _with_root() -> list[str]:
    """Names of our datamodules that read a root and have a writer."""
    from lit_methods.datamodules.fake import writer_of

    found = []
    for name, package in installed_names().items():
        if name.endswith("DataModule"):
            kind = getattr(importlib.import_module(package), name)
            if writer_of(kind) is not None and "root" in inspect.signature(kind).parameters:
                found.append(name)
    return sorted(found)


def _parsed_words(kind: type, words: list[str]) -> dict[str, Any]:
    known = [name for name in inspect.signature(kind).parameters if name not in ("self", "root")]
    found = {}
    for word in words:
        key, equals, value = word.removeprefix("--").removeprefix("data.").partition("=")
        if not equals:
            raise CommandError(f"{word!r}: write <argument>=<value>, such as name=cub")
        if key not in known:
            raise CommandError(f"{kind.__name__} has no argument {key!r}" + suggest(key, known))
        found[key] = yaml.safe_load(value)
    try:
        kind(root="none", **found)
    except (TypeError, ValueError) as error:
        if found:
            raise CommandError(f"{kind.__name__}: {error}") from error
    return found


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _class_of(name: str) -> type | None:
    """A class by its short name or its dotted path; None: there is none."""
    package, _, last = name.rpartition(".")
    package = package or installed_names().get(name, "")
    if not package:
        return None
    add_current_folder()
    try:
        found = getattr(importlib.import_module(package), last, None)
    except ModuleNotFoundError:
        return None
    return found if isinstance(found, type) else None


# ---- a config --------------------------------------------------------------------------------------------------------------------------


def _of_config(name: str, root: Path) -> list[str]:
    from lit_methods.datamodules.fake import path_arguments, write_fake

    file = find_config(name)
    text = file.read_text(encoding="utf-8")
    try:
        refuse_repeated_keys(text, str(file))
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise CommandError(f"{name} isn't a YAML config: {error}") from error
    sections = list(_sections(config)) if isinstance(config, dict) else []
    if not sections:
        raise CommandError(f"{name} has no datamodule that reads a root\n  known: {', '.join(_with_root())}")
    by_variable = True
    keys: list[tuple[str, str]] = []
    for section in sections:
        arguments = dict(section.arguments)
        paths = [key for key in path_arguments(section.kind) if arguments.get(key) is not None]
        for key in paths:
            given = Path(arguments[key])
            if key == "tokenizer" and given.is_absolute():  # comes with the model, not with the data
                continue
            below = given.relative_to("data") if given.parts[:1] == ("data",) else given
            inside = not given.is_absolute() and not str(given).startswith("~")
            arguments[key] = root / (below if inside else given.name)
            by_variable &= inside
        own = None
        if "root" in inspect.signature(section.kind).parameters:
            own = arguments.pop("root", None) or root
            by_variable &= "root" in paths
        found = write_fake(section.kind, own, section.sizes, **arguments)
        keys += [(f"{section.key}.init_args.{key}", _text(value)) for key, value in found.items()]
    command = f"lit fit --config {name}"
    if not by_variable:
        return [f"  {command} {' '.join(f'--{key}={shlex.quote(value)}' for key, value in keys)}"]
    here = [] if not Path("data").exists() else ["  (what lies in ./data comes first: run it in another folder where you have such data)"]
    return [
        f"  LIT_METHODS_DATA={shlex.quote(str(root))} lit doctor --config {name}",
        f"  LIT_METHODS_DATA={shlex.quote(str(root))} {command} {ON_A_LAPTOP}",
        *(f"  {key} is then {value}" for key, value in keys),
        *here,
    ]


def _sections(config: dict[str, Any]) -> Iterator[Section]:
    """All datamodules in a config that have a writer, those inside others first."""
    sizes = dict(_numbers(config.get("model"), SIZES))
    yield from _below(config, "", sizes)


def _below(value: Any, key: str, sizes: dict[str, int]) -> Iterator[Section]:
    from lit_methods.datamodules.fake import writer_of
    from lit_methods.datamodules.vision.fake import LABELLED

    if isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _below(inner, f"{key}[{place}]", sizes)
    if not isinstance(value, dict):
        return
    arguments = value.get("init_args") or {}
    if isinstance(value.get("class_path"), str):
        asked = {name: arguments[name] for name in ("batch_size", "ratio") if isinstance(arguments.get(name), int)}
        if len(asked) == 2:  # semi-supervised: a batch of unlabelled images must be had from those below
            sizes = sizes | {"images": asked["batch_size"] * asked["ratio"] + (0 if arguments.get("label_list") is None else LABELLED)}
    for name, inner in value.items():
        yield from _below(inner, f"{key}.{name}".removeprefix("."), sizes)
    if isinstance(value.get("class_path"), str):
        kind = _class_of(value["class_path"])
        if kind is not None and writer_of(kind) is not None:
            yield Section(key, kind, arguments, sizes)


def _numbers(value: Any, names: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Integers of some names anywhere below a section."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        if name in names and isinstance(inner, int):
            yield name, inner
        yield from _numbers(inner, names)
