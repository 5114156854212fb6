"""Short reasons for failed runs: which key or class is wrong, where it stands, and the nearest valid names.

Only consulted after the parser has refused something, so it can't reject what the parser accepts.
"""

import contextlib
import errno
import importlib
import inspect
import itertools
import os
import pickle
import re
import sys
import textwrap
import traceback
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LRSchedulerTypeTuple
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lit_methods.callbacks.run.finite import NonFiniteError
from lit_methods.catalog import PACKAGES, installed_names, package_folder, public_names
from lit_methods.errors import CommandError, nearest, suggest
from lit_methods.files import shown
from lit_methods.runs.checkpoints import UnreadableCheckpoint, check_readable

# What a class_path at these keys must be a subclass of.
_BASES: dict[str, tuple[type, ...]] = {
    "model": (LightningModule,),
    "data": (LightningDataModule,),
    "optimizer": (Optimizer,),
    "lr_scheduler": LRSchedulerTypeTuple,
    "trainer.callbacks": (Callback,),
    "trainer.logger": (Logger,),
    "trainer.profiler": (Profiler,),
}
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


class Wrong(Exception):
    """The reason was found; its text is the message."""


@dataclass
class Entry:
    """A value of the config, with the place that set it. ``value``: dict of entries, list of entries, or a scalar."""

    value: Any
    where: str

    @property
    def place(self) -> str:
        """The place in brackets, for the end of a message's first line."""
        return f" ({self.where})"

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        return [entry.plain() for entry in self.value] if isinstance(self.value, list) else self.value


def explain(message: str, cli: Any, argv: list[str], files: list[Path]) -> str:
    """A message of a few lines for an error of the parser.

    Args:
        message: What the parser said.
        cli: The half-made ``LitCLI``, which holds the parsers.
        argv: Subcommand and arguments.
        files: The config files, in order.
    """
    parser = getattr(cli, "_subcommand_parsers", {}).get(argv[0])
    if parser is None:
        return _condensed(message)
    ambiguous = re.search(r"Multiple subclasses with name (\w+)\. .*?: (.*?)\.?$", message, flags=re.M)
    if ambiguous is not None:
        return f"{ambiguous.group(1)} is the short name of several classes: give the full path\n  {ambiguous.group(2)}"
    keys = {action.dest for action in parser._actions if action.dest not in ("help", "config", "print_config")}
    try:
        tree = Entry({}, "")
        for path in files:
            tree = _merged(tree, _from_file(path))
        for entry in _from_words(argv[1:], keys):
            tree = _merged(tree, entry)
        _check_root(tree, keys, message)
        _from_message(message)
    except Wrong as wrong:
        return str(wrong)
    return _condensed(message)


def _from_file(path: Path) -> Entry:
    """The file as entries. Raises Wrong for a file that is no YAML mapping."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        context = getattr(error, "context", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise Wrong(f"{path}{line}: not valid YAML: {f'{context}: ' if context else ''}{reason}") from error
    except UnicodeDecodeError as error:
        raise Wrong(f"{path}: not a text file: {error}") from error
    if node is None:
        return Entry({}, str(path))
    if not isinstance(node, yaml.MappingNode):
        raise Wrong(f"{path} holds no `key: value` pairs on its top level")
    return _from_node(node, path)


def _from_node(node: yaml.Node, path: Path) -> Entry:
    where = f"{path}, line {node.start_mark.line + 1}"
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise Wrong(f"{where}: {tag[:80]!r} isn't read: a config holds plain values, lists and mappings, and builds no objects by tags")
    if isinstance(node, yaml.MappingNode):
        pairs = {str(key.value): _from_node(value, path) for key, value in node.value}
        for key, _ in node.value:  # a mapping below its key: the key's line is what the reader looks for
            if isinstance(pairs[str(key.value)].value, dict | list):
                pairs[str(key.value)].where = f"{path}, line {key.start_mark.line + 1}"
        return Entry(pairs, where)
    if isinstance(node, yaml.SequenceNode):
        return Entry([_from_node(item, path) for item in node.value], where)
    loader = yaml.SafeLoader("")
    return Entry(loader.construct_object(node, deep=True), where)


def _from_words(words: list[str], keys: set[str]) -> list[Entry]:
    """The ``--key value`` arguments as one entry each. Raises Wrong for words that are no arguments."""
    entries = []
    where = "command line"
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("-"):
            hint = f"--config {word}" if word.endswith((".yaml", ".yml")) else f"--<key> {word}"
            raise Wrong(f"unexpected argument {word!r}{' (command line)'}\n  did you mean: {hint}")
        flag, equals, value = word.partition("=")
        if not equals and index < len(words) and not words[index].startswith("--"):
            value = words[index]
            index += 1
        key = flag.lstrip("-")
        if key in ("config", "c", "help", "h", "print_config") or key.endswith(".help"):
            continue
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        entry = _wrap(parsed, where)
        for part in reversed(key.split(".")):
            entry = Entry({part: entry}, where)
        entries.append(entry)
    return entries


def _wrap(value: Any, where: str) -> Entry:
    if isinstance(value, dict):
        return Entry({str(key): _wrap(item, where) for key, item in value.items()}, where)
    return Entry([_wrap(item, where) for item in value] if isinstance(value, list) else value, where)


def _as_class(entry: Entry) -> Entry:
    """The short forms of a class section (a name alone, or arguments alone as on the command line) as the long one."""
    if isinstance(entry.value, str):
        return Entry({"class_path": entry}, entry.where)
    if isinstance(entry.value, dict) and entry.where == "command line" and not any(key in entry.value for key in _CLASS_KEYS):
        return Entry({"init_args": entry}, entry.where)
    return entry


def _merged(old: Entry, new: Entry, path: str = "") -> Entry:
    """``new`` laid over ``old`` by the parser's rules: mappings merge, ``key+`` appends, everything else replaces."""
    if path in _BASES and not isinstance(new.value, list):
        new = _as_class(new)
        if isinstance(old.value, list) and isinstance(new.value, dict) and "class_path" not in new.value and old.value:
            return Entry([*old.value[:-1], _merged(_as_class(old.value[-1]), new)], old.where)  # arguments of the last item
        old = _as_class(old)
    if not isinstance(new.value, dict):
        return new
    if not isinstance(old.value, dict):
        old = Entry({}, new.where)
    values = dict(old.value)
    if "class_path" in new.value and "class_path" in values and values["class_path"].value != new.value["class_path"].value:
        values.pop("init_args", None)
    for key, entry in new.value.items():
        inner = f"{path}.{key.rstrip('+')}".lstrip(".")
        if key.endswith("+"):
            before = values.get(key[:-1]) or values.get(key)
            items = entry.value if isinstance(entry.value, list) else [entry]
            items = [_as_class(item) for item in items] if inner in _BASES else items
            values.pop(key, None)
            values[key[:-1]] = Entry([*(before.value if before and isinstance(before.value, list) else []), *items], entry.where)
        else:
            values[key] = _merged(values[key], entry, inner) if key in values else _merged(Entry(None, ""), entry, inner)
    return Entry(values, new.where or old.where)


def _check_root(tree: Entry, keys: set[str], message: str) -> None:
    top = {key.split(".")[0] for key in keys}
    for key, entry in tree.value.items():
        if key.rstrip("+") not in top:
            inside = [known for known in keys if known.endswith(f".{key}")]
            near = suggest(key, top | {"config"})
            raise Wrong(f"unknown key {key!r}{entry.place}" + (f"\n  did you mean: {inside[0]}" if inside else near))
    trainer = tree.value.get("trainer")
    known = {key.removeprefix("trainer.") for key in keys if key.startswith("trainer.")}
    if trainer is not None and isinstance(trainer.value, dict):
        for key, entry in trainer.value.items():
            if key.rstrip("+") not in known:
                raise Wrong(f"unknown key 'trainer.{key}'{entry.place}" + suggest(key, known, otherwise="see: lit fit --help-all"))
    model = tree.value.get("model")
    from_words = model is not None and model.where == "command line" and isinstance(model.value, dict)  # arguments alone
    if model is None or model.value in (None, {}) or (from_words and "class_path" not in model.value):
        raise Wrong(
            "no model given\n  with a config: --config configs/<name>.yaml (`lit list` shows what is there)\n"
            "  or a class: --model SuperFlow, --model my_project.MyModule" + _written_by(tree)
        )
    for path, bases in _BASES.items():
        section: Entry | None = tree
        for part in path.split("."):
            section = section.value.get(part) if section is not None and isinstance(section.value, dict) else None
        if section is None or section.value in (None, True, False):
            continue
        for item in section.value if isinstance(section.value, list) else [section]:
            item = _as_class(item)
            if path == "trainer.profiler" and "." not in str(item.plain().get("class_path", "")) and "init_args" not in item.value:
                continue  # "simple", "advanced"
            _check_class(item, path, bases, message)
    _check_scalars(tree, keys, message)


def _written_by(tree: Entry) -> str:
    """A line on what wrote the checkpoint that is given without a model: it names a class, which is for the user to give."""
    given = next((str(tree.value[key].value) for key in ("ckpt_path", "resume") if key in tree.value), "")
    path = Path(given).expanduser()
    if not path.is_file():
        return ""
    lines = "\n  a checkpoint holds weights, and the class that it names isn't taken from it"
    config = next((folder / "config.yaml" for folder in path.resolve().parents[:3] if (folder / "config.yaml").is_file()), None)
    if config is not None:
        return f"{lines}; its run's config: --config {shown(config)}"
    with contextlib.suppress(UnreadableCheckpoint, AttributeError):
        name = str(check_readable(path).get("hyper_parameters", {}).get("_class_path", ""))
        if re.fullmatch(r"[\w.]{1,200}", name):
            lines += f"; it was written by {name}: --model {name}"
    return lines


def _check_class(entry: Entry, path: str, bases: tuple[type, ...], message: str) -> None:
    """Check one ``{class_path, init_args}`` section and those below it."""
    if not isinstance(entry.value, dict):
        form = "{class_path: Name, init_args: {key: value}}"
        raise Wrong(f"{path}: expected a class, got {entry.plain()!r}{entry.place}\n  form: {form}")
    for key, value in entry.value.items():
        if key not in _CLASS_KEYS:
            hint = suggest(key, _CLASS_KEYS) if nearest(key, _CLASS_KEYS) else f"\n  arguments of the class belong under {path}.init_args"
            raise Wrong(f"{path}: key {key!r} beside class_path{value.place}{hint}")
    name = entry.value.get("class_path")
    if name is None:
        raise Wrong(f"{path}: class_path is missing{entry.place}")
    if not isinstance(name.value, str) or name.value.endswith((".yaml", ".yml")):
        return
    kind = _resolve(name, path, bases)
    if not isinstance(kind, type):
        return  # a function that returns an instance
    if bases and not issubclass(kind, bases):
        wanted = " or ".join(base.__name__ for base in bases)
        raise Wrong(f"{path}: {name.value} is no {wanted}{name.place}" + suggest(kind.__name__, _names(path, bases)))
    checker = ArgumentParser(exit_on_error=False)
    known = {key.split(".")[0] for key in checker.add_class_arguments(kind, fail_untyped=False, sub_configs=True)}
    arguments = entry.value.get("init_args")
    given = arguments.value if arguments is not None and isinstance(arguments.value, dict) else {}
    for key, value in given.items():
        if key.rstrip("+") not in known:
            note = f"all arguments: lit fit --{path}.help {name.value}" if path in _BASES else ""
            near = suggest(key, known, otherwise=note)
            raise Wrong(f"{kind.__name__} has no argument {key!r}{value.place}{near if known else chr(10) + '  it takes no arguments'}")
    for key, value in given.items():
        for item in value.value if isinstance(value.value, list) else [value]:
            if isinstance(item.value, dict) and "class_path" in item.value:
                _check_class(item, f"{path}.init_args.{key}", _annotated(kind, key), message)
    for key, value in given.items():
        if re.search(rf"\b{re.escape(key)}\b", message) and not isinstance(value.value, dict):
            _check_value(checker, key, value, f"{kind.__name__}: {key}")
    if "required" in message and kind.__name__ in message:
        needed = [
            parameter.name
            for parameter in list(inspect.signature(kind).parameters.values())
            if parameter.default is parameter.empty and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        missing = [key for key in needed if key in known and key not in given]
        if missing and path not in ("optimizer", "lr_scheduler"):
            raise Wrong(f"{kind.__name__} needs {', '.join(missing)}{entry.place}\n  set {path}.init_args.{missing[0]}")


def _annotated(kind: type, key: str) -> tuple[type, ...]:
    """The classes in the annotation of an argument, such as (nn.Module,) for ``nn.Module | None``; () when there are none."""
    try:
        hint = typing.get_type_hints(kind.__init__).get(key)  # type: ignore[misc]
    except Exception:  # a name that only a type checker can resolve
        return ()
    pending, found = [hint], []
    while pending:
        hint = pending.pop()
        pending += typing.get_args(hint)
        if inspect.isclass(hint) and typing.get_origin(hint) is None and hint.__module__ not in ("builtins", "types", "typing"):
            found.append(hint)
    return tuple(found)


def _from_message(message: str) -> None:
    """Find the innermost class and argument in the parser's own words, for forms that the entries don't follow."""
    for class_path, key in re.findall(r"Problem with given class_path '([\w.]+)':\s*-?\s*Option '([^']+)' is not accepted", message):
        kind = _resolve(Entry(class_path, "command line"), "", ())
        known = ArgumentParser(exit_on_error=False).add_class_arguments(kind, fail_untyped=False, sub_configs=True)
        raise Wrong(f"{kind.__name__} has no argument {key!r}" + suggest(key, {name.split(".")[0] for name in known}))


def _check_scalars(tree: Entry, keys: set[str], message: str) -> None:
    """Name the value that the parser found of the wrong type, when the key is the trainer's or the run's own."""
    found = re.search(r'[Kk]ey "([\w.]+)"', message)
    if found is None or found.group(1) not in keys:
        return
    entry: Entry | None = tree
    for part in found.group(1).split("."):
        entry = entry.value.get(part) if entry is not None and isinstance(entry.value, dict) else None
    if entry is None or isinstance(entry.value, dict):
        return
    raise Wrong(f"{found.group(1)}: {_type_error(message, entry.plain())}{entry.place}")


def _check_value(checker: ArgumentParser, key: str, entry: Entry, label: str) -> None:
    try:
        checker.validate(Namespace({key: entry.plain()}), skip_required=True)
    except Exception as error:  # the parser's own checks raise several kinds
        raise Wrong(f"{label}: {_type_error(str(error), entry.plain())}{entry.place}") from error


def _type_error(message: str, value: Any) -> str:
    """What was expected, out of the parser's many lines."""
    union = re.search(r"Subtypes: \[(.*)\]", message)
    wanted = re.findall(r"Expected an? (<class '[\w.]+'>|[^.\n]*?)(?:\. Got value|\n|$)", message)
    wanted = [re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", want).replace("NoneType", "null") for want in wanted]
    if union is not None and not wanted:
        wanted = [re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", union.group(1))]
    wanted = list(dict.fromkeys(want.strip() for want in wanted if want.strip()))
    return f"expected {' or '.join(wanted[:4])}, got {value!r}" if wanted else f"{value!r} is not accepted: {_condensed(message, lines=2)}"


def _resolve(name: Entry, path: str, bases: tuple[type, ...]) -> Any:
    """The class behind a dotted path or a short name. Raises Wrong, with the import error or the nearest names."""
    given = str(name.value)
    if "." not in given:
        names = _names(path, bases)
        if given in names:
            return names[given] or getattr(importlib.import_module(installed_names()[given]), given)
        if given in installed_names():
            return getattr(importlib.import_module(installed_names()[given]), given)
        reason = f"{path}: there is no class {given!r}{name.place}"
        raise Wrong(reason + suggest(given, names, otherwise="a class of your own goes by its dotted path: my_project.MyClass"))
    module_name, _, attribute = given.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        try:  # a nested class, or a class method
            module = getattr(importlib.import_module(module_name.rpartition(".")[0]), module_name.rpartition(".")[2])
        except (ImportError, AttributeError, ValueError):
            reason = f"{path}: can't import {given!r}{name.place}\n  {type(error).__name__}: {error}"
            here = "" if _missing_library(error, module_name) else f"\n  dotted paths start from the current folder: {Path.cwd()}"
            raise Wrong(reason + (_shadowed(module_name) or here)) from error
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise Wrong(f"{path}: importing {module_name} failed{name.place}\n  {last.filename}, line {last.lineno}: {error!r}") from error
    if not hasattr(module, attribute):
        near = _shadowed(module_name) or suggest(attribute, dir(module))
        raise Wrong(f"{path}: {module_name} has no {attribute!r}{name.place}{near}")
    return getattr(module, attribute)


def _shadowed(module_name: str) -> str:
    """A line for a module of the current folder that isn't looked at, since a library has its name; "" where there is none."""
    top = module_name.partition(".")[0]
    mine = next((Path.cwd() / name for name in (f"{top}.py", top) if (Path.cwd() / name).exists()), None)
    file = getattr(sys.modules.get(top), "__file__", None)
    if mine is None or file is None or Path(file).resolve().is_relative_to(mine.resolve()):
        return ""
    return f"\n  {mine} isn't looked at: {file} has the same name, and libraries come first: rename yours"


def _missing_library(error: ImportError, module_name: str) -> bool:
    """Whether the module was found, but something that it imports was not."""
    return not (isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."))


def _names(path: str, bases: tuple[type, ...]) -> dict[str, Any]:
    """Short names that fit at ``path``: ours by package, and every imported subclass of ``bases``; name -> class or None."""
    package = {"trainer.callbacks": "lit_methods.callbacks", "data": "lit_methods.datamodules"}.get(path, "lit_methods")
    ours = [] if path in ("optimizer", "lr_scheduler", "trainer.logger", "trainer.profiler") else public_names().items()
    names: dict[str, Any] = {name: None for name, home in ours if home == package and name != "Technique"}
    pending = list(bases)
    while pending:
        kind = pending.pop()
        if not kind.__name__.startswith("_") and "<locals>" not in kind.__qualname__:
            names[kind.__name__] = kind
        pending += kind.__subclasses__() if kind is not type else []
    return {name: kind for name, kind in names.items() if kind not in bases or kind is None}


def _condensed(message: str, lines: int = 5) -> str:
    """The parser's message without its lists of forms and types."""
    unknown = re.search(r"unrecognized arguments: (.*)", message)
    if unknown is not None:
        return f"unknown argument {unknown.group(1)}\n  see: lit fit --help"
    skip = ("Subtypes:", "Errors:", "Given value", "Subclass types expect", "- a class path", "- a dict", "Does not validate", "- Does not")
    kept = [line.strip() for line in message.splitlines() if line.strip() and not line.strip().startswith(skip)]
    return "\n  ".join(line[:300] for line in kept[:lines])


def refuse_unknown_help(argv: list[str]) -> None:
    """Raise if ``--model.help Name`` (or of another key) asks for a class that isn't there.

    Raises:
        CommandError: The nearest names, or why the class can't be imported.
    """
    words = [part for word in argv for part in word.split("=", 1)]
    for flag, name in itertools.pairwise(words):
        if flag.startswith("--") and flag.endswith(".help") and name and not name.startswith("-"):
            path = flag.removeprefix("--").removesuffix(".help")
            try:
                _resolve(Entry(name, "command line"), path, _BASES.get(path, ()))
            except Wrong as wrong:
                raise CommandError(str(wrong)) from wrong


def condense_help(text: str) -> str:
    """A class's help with only our own among the "known subclasses": the parser lists every subclass of ``nn.Module`` that is imported."""

    def ours(found: re.Match[str]) -> str:
        names = re.sub(r"\s", "", found.group(1)).split(",")
        if len(names) < 12:
            return found.group(0)
        kept = [name.rpartition(".")[2] for name in names if name.startswith("lit_methods.")]
        return f"known of ours:\n{indent}" + textwrap.fill(", ".join([*kept, "all in `lit list --parts`"]), 54).replace("\n", f"\n{indent}")

    indent = " " * 24
    return re.sub(r"known\s+subclasses:\s+([^)]*)", ours, text)


def explain_run_error(error: Exception) -> CommandError | None:
    """A short message for an error that a user can act on; None for a defect, which keeps its traceback.

    Short are: what Lightning and torch's optimisers say of their settings, checkpoints that don't fit, ``ValueError``, ``OSError``,
    ``ImportError`` that our own packages raise on purpose (bad data, wrong root, missing library), in a loader's worker process too, and
    what a machine does to a long run: a full disk, a folder that can't be written, a killed loader worker, a full GPU; and a loss that is
    not finite.
    """
    if trouble := _machine_trouble(error):
        return CommandError(trouble, exit_code=1)
    if built := _constructor_error(str(error)):
        return CommandError(built, exit_code=1)
    if isinstance(error, MisconfigurationException):
        return CommandError(str(error).strip(), exit_code=1)
    if isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
        return CommandError(_state_dict_mismatch(str(error)), exit_code=1)
    if isinstance(error, RuntimeError) and (twice := re.match(r"Found more than one stateful callback of type `(\w+)`", str(error))):
        what = f"{twice[1]} stands twice among the callbacks, and a checkpoint could keep only one of them"
        return CommandError(f"{what}\n  callbacks+ adds to the list of the files before: leave it out in one of them", exit_code=1)
    if isinstance(error, RuntimeError) and (shared := re.match(r"Error while merging hparams: the keys \[(.+?)\]", str(error))):
        advice = "rename them in one of the two, or leave them out there: self.save_hyperparameters(ignore=[...])"
        return CommandError(
            f"hyperparameters of module and datamodule share names, with different values: {shared[1]}\n  {advice}", exit_code=1
        )
    if isinstance(error, pickle.UnpicklingError | UnreadableCheckpoint) or "PytorchStreamReader" in str(error):
        file = f"{str(error).partition(': ')[0]}: " if isinstance(error, UnreadableCheckpoint) else ""
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            reason = f"{file}the checkpoint holds a {foreign.group(1)}, and only tensors, numbers, strings, lists and dicts are loaded"
            advice = "save it without that object, or, if you trust the file: --weights_only false"
            return CommandError(f"{reason}\n  {advice}", exit_code=1)
        said = str(error).removeprefix(file).splitlines()[0][:120]
        return CommandError(f"{file}the checkpoint can't be read: it is cut off, or no checkpoint\n  {said}", exit_code=1)
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, RuntimeError) and frames and "/fabric/plugins/environments/" in Path(frames[-1].filename).as_posix():
        return CommandError(str(error).strip(), exit_code=1)  # how the job was started, such as SLURM's --ntasks
    if not isinstance(error, ValueError | OSError | ImportError | TypeError):
        return None
    text = str(error)
    worker = re.match(r"Caught (\w+) in DataLoader worker process \d+\.", text)
    if worker:
        files = re.findall(r'File "([^"]+)", line \d+', text)
        return CommandError(text.rpartition(f"{worker.group(1)}: ")[2].strip(), exit_code=1) if files and _ours(files[-1]) else None
    if frames and (_ours(frames[-1].filename) or _refuses_settings(frames[-1].filename)) and not isinstance(error, TypeError):
        return CommandError(text.strip(), exit_code=1)
    return None


def _machine_trouble(error: Exception) -> str | None:
    """What to do about a disk, folder, memory or loader worker that failed a run, and about a loss that is not finite."""
    text = str(error)
    if isinstance(error, NonFiniteError):
        return text
    if isinstance(error, OSError):
        file = f": {error.filename}" if error.filename else ""
        resume = "a run goes on from its last whole checkpoint with --resume auto"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"the disk or the quota is full ({error.strerror}){file}\n  make room, or give another --run_root; {resume}"
        if error.errno in (errno.EACCES, errno.EPERM) and (closed := _closed(error.filename)):
            return f"{closed} may not be read by this user ({error.strerror}){file}\n  chmod u+rX it, or ask its owner"
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            return f"no permission, or no folder to write to ({error.strerror}){file}\n  mend it, or give another --run_root; {resume}"
    if isinstance(error, torch.OutOfMemoryError):
        said = text.splitlines()[0][:160]
        return (
            f"{said}\n  lower batch_size (with --trainer.accumulate_grad_batches for the same step), or use --trainer.precision bf16-mixed"
        )
    died = re.search(r"DataLoader worker \(pid\S* [\d, ]+\) (exited unexpectedly|is killed by signal: \w+)", text)
    if died:
        return (
            f"a {died.group(0)}\n  most often the memory ran out (`dmesg` names the killed process): lower num_workers or batch_size,\n"
            "  and in a container give more shared memory (--shm-size); the run goes on from its last checkpoint with --resume auto"
        )
    return None


def _closed(name: Any) -> str | None:
    """The file, or the folder on the way to it, that is there and that this user may not read; None: writing was the trouble."""
    if not isinstance(name, str):
        return None
    effective = os.access in os.supports_effective_ids
    for place in (*reversed(Path(name).parents), Path(name)):
        wanted = os.X_OK if place != Path(name) else os.R_OK
        if os.path.lexists(place) and not os.access(place, wanted, effective_ids=effective):
            return str(place)
    return None


def _constructor_error(text: str) -> str | None:
    """What a constructor of ours said, out of jsonargparse's account of all types that it tried; None for other errors."""
    if not text.startswith("Does not validate against any of the Union subtypes"):
        return None
    # an object within another one: the inner account is the first error of the outer
    inner = re.search(r"Errors:\n\s*- (Does not validate against any of the Union subtypes\n.*?Given value: [^\n]*)\n", text, re.DOTALL)
    if inner is not None:
        return _constructor_error(inner.group(1))
    said = re.search(
        r"Errors:\n\s*- (?:Problem with given class_path '[^']+':\s*)?(.+?)\n\s*- (?:Expected a|Not a valid)", text, flags=re.DOTALL
    )
    given = text.rpartition("Given value: ")[2]
    # of a list, those in front are built already: the first that still is a section is the one that failed
    failed = re.search(r"Namespace\(class_path='([\w.]+)'", given) if given.startswith(("Namespace(", "[")) else None
    if said is None or failed is None or not failed.group(1).startswith(("lit_methods.", "lightning.", "torch.")):
        return None
    text = " ".join(said.group(1).split())
    named = re.match(r"\w+", text)  # the message may name the class that it is about, deep inside the one that failed
    return text if named and named.group(0) in public_names() else f"{failed.group(1).rpartition('.')[2]}: {text}"


def _refuses_settings(filename: str) -> bool:
    """Whether a file is Lightning's, or one of torch's optimisers: what they raise themselves is about the values that they were given."""
    return any(folder in Path(filename).as_posix() for folder in ("/lightning/pytorch/", "/lightning/fabric/", "/torch/optim/"))


def _ours(filename: str) -> bool:
    path = Path(filename).resolve()
    return any(path.is_relative_to(package_folder(name)) for name in PACKAGES)


def _state_dict_mismatch(message: str) -> str:
    lines = [line.strip() for line in message.splitlines()[1:]]
    shown = [line if len(line) <= 160 else f"{line[:157]}..." for line in lines[:4]]
    more = f"\n  ... {len(lines) - 4} more lines with --debug" if len(lines) > 4 else ""
    model = re.search(r"state_dict for (\w+)", message)
    name = model.group(1) if model else "the model"
    return f"the checkpoint does not fit {name}: it comes from another class or other sizes\n  " + "\n  ".join(shown) + more
