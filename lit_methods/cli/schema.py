"""``lit schema``: what a config may hold, as a JSON schema that editors check and complete by.

It is read from the parsers that ``lit fit --help-all`` and ``--model.help`` print, so it knows the same keys, types, defaults and
descriptions, of our classes, of Lightning's and of plugins'. It is as strict as a file alone allows: files compose, so no key is required,
and a class that it doesn't know, by its dotted path, may have any arguments.
"""

import argparse
import collections.abc
import dataclasses
import enum
import importlib
import inspect
import json
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from lit_methods.catalog import installed_names
from lit_methods.cli.commands import Parser, parsed
from lit_methods.errors import CommandError
from lit_methods.files import shown, write_atomically

FILE = "lit-schema.json"
DRAFT = "http://json-schema.org/draft-07/schema#"  # the one that VS Code's YAML server knows best
COMMANDS = ("fit", "validate", "test", "predict")
# foreign classes that are known by their short names: module -> its classes are taken from `__all__`
FOREIGN = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "torch.optim", "torch.optim.lr_scheduler")
_PLAIN: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    type(None): {"type": "null"},
}


def schema(words: list[str]) -> int:
    """``lit schema [config...]``."""
    parser = Parser(
        prog="lit schema",
        description="Write the JSON schema of all configs of runs; editors with a YAML server, such as VS Code with its "
        "extension YAML, then check keys and values, complete them and show what they mean.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("configs", nargs="*", type=Path, metavar="config", help="your files: gets the comment line that names the schema")
    parser.add_argument("--out", type=Path, default=Path(FILE), help="file to write (default: %(default)s)")
    options = parsed(parser, words)
    if options is None:
        return 0
    for config in options.configs:
        if not config.is_file():
            raise CommandError(f"there is no file {config}: copy a shipped config by lit cp, or leave it out")
    if options.out.is_dir():
        raise CommandError(f"--out {options.out} is a folder: give the name of a file, such as {options.out / FILE}")
    text = json.dumps(config_schema(), indent=1, ensure_ascii=False)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, f"{text}\n")
        for config in options.configs:
            write_atomically(config, with_line(config.read_text(encoding="utf-8"), line_for(config, options.out)))
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{error}", exit_code=1) from error
    print(f"schema: {shown(options.out)}")
    for config in options.configs:
        print(f"named in: {shown(config)}")
    if not options.configs:
        print(f"in a config beside it: {line_for(options.out.with_name('mine.yaml'), options.out)}")
        print("or let it be put there: lit schema <config>")
    return 0


def line_for(config: Path, schema_file: Path) -> str:
    """The comment line that makes a YAML server use ``schema_file`` for ``config``."""
    import os

    return f"# yaml-language-server: $schema={Path(os.path.relpath(schema_file.resolve(), config.resolve().parent)).as_posix()}"


def with_line(text: str, line: str) -> str:
    """A config with the comment line: in place of an earlier one, or behind the comment at its head."""
    earlier = re.compile(r"^# yaml-language-server: \$schema=.*$", flags=re.M)
    if earlier.search(text):
        return earlier.sub(lambda _: line, text, count=1)
    head = re.match(r"(?:#.*\n)*", text)
    end = head.end() if head else 0
    return f"{text[:end]}{line}\n{text[end:]}"


# ---- the schema ------------------------------------------------------------------------------------------------------------------------


def config_schema() -> dict[str, Any]:
    """The JSON schema of every file that ``lit fit | validate | test | predict --config`` takes."""
    from lit_methods.cli.lightning_cli import run_parser

    made = _Schema()
    root: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
    for command in COMMANDS:
        made.add_keys(root, run_parser(command), leave_out=("config", "print_config"))
    return {"$schema": DRAFT, "title": "A config of lit", **root, "definitions": made.definitions}


def known_classes() -> dict[str, type]:
    """Short name -> class, of ours, of plugins and of the modules in ``FOREIGN``; what an optional library is missing for is left out."""
    found: dict[str, type] = {}
    for package in FOREIGN:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", vars(module)):
            if isinstance(value := getattr(module, name, None), type):
                found[name] = value
    for name, package in installed_names().items():
        try:
            value = getattr(importlib.import_module(package), name)
        except Exception:  # a library that isn't there, or a plugin that is broken: `lit list` says so
            continue
        if isinstance(value, type):
            found[name] = value
    return found


class _Schema:
    """Builds definitions of the classes that arguments name, each once."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}
        self.classes = known_classes()
        self.packages = installed_names()

    def add_keys(self, node: dict[str, Any], parser: Any, leave_out: tuple[str, ...] = ()) -> None:
        """Put the keys of a parser into an object's properties; dots nest."""
        for action in parser._actions:
            hint, key = getattr(action, "_typehint", None) or action.type, action.dest
            if type(action).__name__ == "_ActionConfigLoad":  # a file in place of a group, such as --trainer my_trainer.yaml
                continue
            if not action.option_strings or key in ("help", *leave_out) or key.endswith(".help"):
                continue
            place = node
            *above, last = key.split(".")
            for name in above:
                inner = {"type": "object", "properties": {}, "additionalProperties": False}
                place = place["properties"].setdefault(name, inner)
                if "properties" not in place:  # a value of its own, such as a group that a file may stand for
                    break
            else:
                entry = self.of_hint(hint) if hint is not None else {}
                entry = dict(entry) if "$ref" not in entry else {"allOf": [entry]}
                if action.help and action.help != argparse.SUPPRESS:
                    entry["description"] = " ".join(str(action.help).split())
                default = _as_json(action.default)
                if default is not None and "default" not in entry:
                    entry["default"] = default
                place["properties"][last] = entry
                if _takes_list(entry):
                    place["properties"][f"{last}+"] = entry  # added to what earlier files give

    def of_hint(self, hint: Any) -> dict[str, Any]:
        """The schema of a type hint; {} where anything goes."""
        origin, inner = get_origin(hint), get_args(hint)
        if hint in _PLAIN:
            return _PLAIN[hint]
        if origin in (Union, types.UnionType):
            return self._any([self.of_hint(one) for one in inner])
        if origin is Literal:
            return {"enum": list(inner)}
        if isinstance(hint, tuple):  # several classes, as of learning rate schedules
            return self._any([self.of_hint(one) for one in hint])
        if origin in (list, set, frozenset, collections.abc.Sequence, collections.abc.Iterable) or hint in (list, tuple, set):
            return {"type": "array", **({"items": self.of_hint(inner[0])} if inner else {})}
        if origin is tuple:
            if len(inner) == 2 and inner[1] is Ellipsis:
                return {"type": "array", "items": self.of_hint(inner[0])}
            return {"type": "array", "items": [self.of_hint(one) for one in inner], "minItems": len(inner), "maxItems": len(inner)}
        if origin in (dict, collections.abc.Mapping) or hint in (dict, collections.abc.Mapping):
            values = self.of_hint(inner[1]) if len(inner) == 2 else {}
            return {"type": "object", **({"additionalProperties": values} if values else {})}
        if not isinstance(hint, type):
            return {}
        if issubclass(hint, enum.Enum):
            return {"enum": [one.name for one in hint]}
        if issubclass(hint, Path):
            return {"type": "string"}
        if hint.__module__.partition(".")[0] in ("builtins", "typing", "jsonargparse") or hint.__name__ in ("dtype", "device", "timedelta"):
            return {}
        return self.of_class(hint)

    @staticmethod
    def _any(options: list[dict[str, Any]]) -> dict[str, Any]:
        if {} in options:
            return {}
        kept = [one for index, one in enumerate(options) if one not in options[:index]]
        return kept[0] if len(kept) == 1 else {"anyOf": kept}

    def of_class(self, base: type) -> dict[str, Any]:
        """A class by name, or with ``class_path`` and ``init_args``: those known are checked, others must be dotted paths."""
        name = f"{base.__module__}.{base.__name__}"
        if name not in self.definitions:
            self.definitions[name] = {}  # a class may take one of its own kind
            known = {short: one for short, one in sorted(self.classes.items()) if issubclass(one, base) and not inspect.isabstract(one)}
            dotted: dict[str, Any] = {"type": "string", "pattern": r"\."}
            paths: dict[str, Any] = {"anyOf": [{"enum": [path for short in known for path in self._paths(short)]}, dotted]}
            if not known or base.__name__ == "Module":  # any layer of torch goes by its short name
                paths = {"type": "string"}
            cases = [
                {
                    "if": {"properties": {"class_path": {"enum": self._paths(short)}}, "required": ["class_path"]},
                    "then": {"properties": {"init_args": {"$ref": f"#/definitions/{self._arguments(short, one)}"}}},
                }
                for short, one in known.items()
            ]
            spelled = {
                "type": "object",
                "properties": {"class_path": paths, "init_args": {"type": "object"}, "dict_kwargs": {"type": "object"}},
                "additionalProperties": False,
                **({"allOf": cases} if cases else {}),
            }
            fields = [{"$ref": f"#/definitions/{self._arguments(base.__name__, base)}"}] if dataclasses.is_dataclass(base) else []
            self.definitions[name] = {"anyOf": [paths, spelled, *fields]}  # a data class may go without its name
        return {"$ref": f"#/definitions/{name}"}

    def _paths(self, short: str) -> list[str]:
        """How a class may be named: its short name, and where it is imported from."""
        one = self.classes[short]
        package = self.packages.get(short)
        return list(dict.fromkeys([short, *([f"{package}.{short}"] if package else []), f"{one.__module__}.{one.__qualname__}"]))

    def _arguments(self, short: str, one: type) -> str:
        """Name of the definition of a class's arguments."""
        from jsonargparse import ArgumentParser

        name = f"arguments of {short}"
        if name not in self.definitions:
            made: dict[str, Any] = {"type": "object"}
            self.definitions[name] = made
            summary = (inspect.getdoc(one) or "").partition("\n\n")[0]
            parser = ArgumentParser(exit_on_error=False)
            try:
                parser.add_class_arguments(one, fail_untyped=False)
                parameters = inspect.signature(one).parameters.values()
            except Exception:  # a signature that can't be read: anything goes, as the run says what is wrong
                return name
            made |= {"description": " ".join(summary.split()), "properties": {}, "additionalProperties": False}
            if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
                made["additionalProperties"] = True
            self.add_keys(made, parser)
        return name


def _takes_list(entry: dict[str, Any]) -> bool:
    options = entry.get("anyOf", [entry])
    return any(option.get("type") == "array" for option in options)


def _as_json(value: Any) -> Any:
    """A default as JSON; None for one that has no form there."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, list | tuple) and all(isinstance(item, bool | int | float | str) for item in value):
        return list(value)
    return None
